"""The other side of every proof of adapters: PEFT, or the adapters added to a model's own parameters by torch.

`LoraReference` starts the process; the file run as a script is that process. It imports nothing of the trainer.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "zoo"))

from reference import BETAS, CLIP, DECAY, EPSILON, LEARNING_RATE, Reference, load, main

PEFT = "base_model.model."


class LoraReference(Reference):
    """The running process; every call waits for its answer."""

    def __init__(self) -> None:
        super().__init__(Path(__file__))

    def create(self, case: str, base: Path, targets: list[str], out: Path) -> None:
        """An adapter made and written by PEFT, A and B random."""
        self._ask("create", case, str(base), targets, str(out))

    def adapted(self, case: str, base: Path, adapter: Path, batch: Path, out: Path, *, by_peft: bool) -> float:
        """The mean loss; logits and the gradient of every A and B go to the file `out`."""
        return self._ask("adapted", case, str(base), str(adapter), str(batch), str(out), by_peft)["loss"]

    def logits(self, case: str, base: Path, adapter: Path, batch: Path, out: Path) -> float:
        """The mean loss by PEFT; logits alone go to the file `out`."""
        return self._ask("logits", case, str(base), str(adapter), str(batch), str(out))["loss"]

    def trained(self, case: str, base: Path, adapter: Path, batches: list[Path], out: Path) -> dict[str, list[float]]:
        """`losses` and `norms` of one AdamW step by PEFT for each batch; A and B afterwards go to the file `out`."""
        return self._ask("trained", case, str(base), str(adapter), list(map(str, batches)), str(out))

    def merged(self, case: str, base: Path, adapter: Path, out: Path) -> None:
        """PEFT's merge_and_unload, written to the directory `out`."""
        self._ask("merged", case, str(base), str(adapter), str(out))


def create(case: Any, base: str, targets: list[str], out: str) -> dict[str, Any]:
    """PEFT's own adapter with some of its options."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(7)
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, rank_pattern={"o_proj": 3}, alpha_pattern={r"layers\.1\..*k_proj": 9}
    )
    model = get_peft_model(load(case, base), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, 0, 0.2)
    model.save_pretrained(out)
    return {}


def adapted(case: Any, base: str, adapter: str, batch: str, out: str, by_peft: bool) -> dict[str, Any]:
    """Forward and backward over the whole batch."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(batch)
    parameters, forward = (_by_peft if by_peft else _by_torch)(case, base, adapter)
    logits, extra = forward(tensors)
    loss = _loss(logits, tensors)
    (loss if extra is None else loss + extra).backward()
    found = {name: parameter.grad.contiguous() for name, parameter in parameters.items()}
    save_file(found | {"logits": logits.detach().contiguous()}, out)
    return {"loss": loss.item()}


def logits(case: Any, base: str, adapter: str, batch: str, out: str) -> dict[str, Any]:
    """Forward over the whole batch, by transformers' class even where it lacks the further layers of a case."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(batch)
    with torch.no_grad():
        found, _ = _by_peft(replace(case, reference=None), base, adapter)[1](tensors)
    save_file({"logits": found.contiguous()}, out)
    return {"loss": _loss(found, tensors).item()}


def trained(case: Any, base: str, adapter: str, batches: list[str], out: str) -> dict[str, Any]:
    """torch's AdamW over A and B alone."""
    import torch
    from safetensors.torch import load_file, save_file

    parameters, forward = _by_peft(case, base, adapter)
    values = list(parameters.values())
    optimizer = torch.optim.AdamW(values, lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, weight_decay=DECAY)
    losses, norms = [], []
    for path in batches:
        batch = load_file(path)
        loss = _loss(forward(batch)[0], batch)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(values, CLIP).item())
        optimizer.step()
        losses.append(loss.item())
    save_file({name: parameter.detach().contiguous() for name, parameter in parameters.items()}, out)
    return {"losses": losses, "norms": norms}


def merged(case: Any, base: str, adapter: str, out: str) -> dict[str, Any]:
    """The model with the adapters in its weights."""
    from peft import PeftModel

    PeftModel.from_pretrained(load(case, base), adapter).merge_and_unload().save_pretrained(out)
    return {}


def _loss(logits: Any, batch: Any) -> Any:
    import torch.nn.functional as F

    losses = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    return (losses * batch["loss_mask"].flatten()).sum() / batch["loss_mask"].sum()


def _by_peft(case: Any, base: str, adapter: str) -> tuple[dict[str, Any], Any]:
    """Adapters by their names in the file, and from a batch to logits and what training adds to the loss."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(load(case, base), adapter, is_trainable=True).eval()
    found = {name.replace(".default", ""): one for name, one in model.named_parameters() if one.requires_grad}
    return found, lambda batch: (model(input_ids=batch["tokens"]).logits, None)


def _by_torch(case: Any, base: str, adapter: str) -> tuple[dict[str, Any], Any]:
    """The same, W + scale x B A put in place of every parameter, experts in the tensors that stack them."""
    import torch
    from safetensors.torch import load_file

    config = json.loads(Path(adapter, "adapter_config.json").read_text())
    model = load(case, base)
    own = dict(model.named_parameters())
    pairs = {
        name: tensor.requires_grad_() for name, tensor in load_file(Path(adapter, "adapter_model.safetensors")).items()
    }

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, batch: Any) -> Any:
            extra = None if case.extra_loss is None else case.extra_loss(model, [batch])
            return model(input_ids=batch["tokens"]).logits, extra

    whole = Whole()

    def forward(batch: Any) -> Any:
        changed: dict[str, Any] = {}
        for name in [name for name in pairs if name.endswith("lora_A.weight")]:
            module = name.removeprefix(PEFT).removesuffix(".lora_A.weight")
            left, right = pairs[name.replace("lora_A", "lora_B")], pairs[name]
            delta = left @ right * _scale(config, module, right.size(0))
            place, index = _place(module, own, getattr(model, "own_name", str))
            before = changed.get(place, own[place])
            changed[place] = before + delta if index is None else _put(before, delta, index)
        return torch.func.functional_call(whole, {f"model.{name}": one for name, one in changed.items()}, (batch,))

    return pairs, forward


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    fitting = (alpha for key, alpha in config["alpha_pattern"].items() if re.match(rf"(.*\.)?({key})$", module))
    alpha = next(fitting, config["lora_alpha"])
    return alpha / (sqrt(rank) if config["use_rslora"] else rank)


def _place(module: str, own: dict[str, Any], own_name: Any) -> tuple[str, tuple[int, str] | None]:
    """The parameter of a module; with the expert and its half where experts are stacked."""
    place: str = own_name(f"{module}.weight")
    if place in own:
        return place, None
    module = place.removesuffix(".weight")
    experts, number, leaf = module.rsplit(".", 2)
    half = {"gate_proj": "first", "w1": "first", "up_proj": "second", "w3": "second"}.get(leaf, "all")
    name = f"{experts}.{'down_proj' if half == 'all' else 'gate_up_proj'}"
    if name not in own:
        name = name.replace("block_sparse_moe", "mlp")
    return name, (int(number), half)


def _put(stacked: Any, delta: Any, index: tuple[int, str]) -> Any:
    """The stacked tensor with `delta` added to one expert's matrix, or to a half of it."""
    import torch.nn.functional as F

    number, half = index
    rows = stacked.size(1) - delta.size(0)
    sides = {"first": (0, rows), "second": (rows, 0), "all": (0, 0)}[half]
    return stacked + F.pad(delta[None], (0, 0, *sides, number, stacked.size(0) - number - 1))


if __name__ == "__main__":
    main(create=create, adapted=adapted, logits=logits, trained=trained, merged=merged)

"""The other side of every proof, in a process of its own that imports nothing of the trainer.

`Reference` starts the process and talks to it; the file run as a script is that process. It imports transformers once
and answers one request after the other.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

SEED = 5
LEARNING_RATE, DECAY, BETAS, EPSILON, CLIP = 1e-3, 0.1, (0.9, 0.95), 1e-8, 1.0


class Reference:
    """The running process; every call waits for its answer."""

    def __init__(self, script: Path = Path(__file__)) -> None:
        command = [sys.executable, "-W", "ignore", str(script)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin
        assert self._process.stdout
        self._requests, self._answers = self._process.stdin, self._process.stdout

    def write(self, case: str, directory: Path) -> None:
        """Make the case's checkpoint."""
        self._ask("write", case, str(directory))

    def measure(self, case: str, directory: Path, batch: Path, out: Path) -> dict[str, float]:
        """`loss` and `extra`, means over the batch's unmasked tokens; logits and all gradients go to the file `out`."""
        return self._ask("measure", case, str(directory), str(batch), str(out))

    def documents(self, case: str, directory: Path, batches: list[Path], out: Path) -> dict[str, float]:
        """Each batch by itself, and the gradients of the mean over the tokens of all."""
        return self._ask("documents", case, str(directory), list(map(str, batches)), str(out))

    def steps(self, case: str, directory: Path, batches: list[Path], out: Path) -> dict[str, list[float]]:
        """`losses` and `norms` of one AdamW step for each batch; the weights afterwards go to the file `out`."""
        return self._ask("steps", case, str(directory), list(map(str, batches)), str(out))

    def routed(self, case: str, directory: Path, batch: Path, out: Path, **terms: Any) -> dict[str, Any]:
        """As `measure`, with what training adds for routers: `kind`, `balance` and `z_loss`; and their `loads`."""
        return self._ask("routed", case, str(directory), str(batch), str(out), terms)

    def taught(
        self, case: str, directory: Path, batch: Path, out: Path, factor: float, *, every: bool = False,
        fp8: bool = False,
    ) -> dict[str, float]:  # fmt: skip
        """As `measure`, with `factor` times the loss of the model's own indexers, whose sum over layers is `indexers`;
        `every`: while attention goes to every key; `fp8`: to those that rounded scores choose, of which `moved` are
        others."""
        return self._ask("taught", case, str(directory), str(batch), str(out), factor, every, fp8)

    def greedy(self, case: str, directory: Path, batch: Path) -> dict[str, Any]:
        """`chosen`: the most probable token at every place, of the model and of each further layer."""
        return self._ask("greedy", case, str(directory), str(batch))

    def close(self) -> None:
        """End the process."""
        self._requests.close()
        self._process.wait(timeout=30)
        self._answers.close()

    def _ask(self, *request: Any) -> Any:
        self._requests.write(json.dumps(request) + "\n")
        self._requests.flush()
        line = self._answers.readline()
        assert line, "the reference's process ended"
        answer = json.loads(line)
        assert "error" not in answer, answer["error"]
        return answer


def main(**more: Any) -> None:
    """Answer requests until there are no more; `more` verbs besides those of this file."""
    import torch
    from transformers.utils import logging

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    every = (write, measure, documents, routed, taught, steps, greedy)
    verbs: dict[str, Any] = {one.__name__: one for one in every} | more
    for line in sys.stdin:
        verb, case, *rest = json.loads(line)
        try:
            answer = verbs[verb](_case(case), *rest)
        except Exception as error:  # noqa: BLE001 - every failure is told to the test that asked
            answer = {"error": f"{type(error).__name__}: {error}\n{traceback.format_exc()}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _case(name: str) -> Any:
    from cases import EVERY

    return EVERY[name]


def write(case: Any, directory: str) -> dict[str, Any]:
    """The checkpoint, and a `config.json` spelled as in the releases."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(SEED)
    if case.write is not None:
        case.write(Path(directory), SEED)
    else:
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**deepcopy(dict(case.config))), dtype=torch.float32
        )
        randomise(model)
        model.save_pretrained(directory, max_shard_size="100KB")
        Path(directory, "config.json").write_text(json.dumps(dict(case.config), indent=2))
    return {}


def randomise(model: Any) -> None:
    """Every parameter and every buffer of a checkpoint is random: a value that ought to be 1 or 0 hides mistakes."""
    import torch

    names = set(model.state_dict())
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name not in names or not tensor.is_floating_point():
                continue
            if tensor.dim() > 1:  # large enough that attention is far from uniform
                tensor.normal_(0, 0.1)
            elif "norm" in name:
                tensor.copy_(1 + 0.3 * torch.randn_like(tensor))
            else:
                tensor.add_(0.2 * torch.randn_like(tensor))


def load(case: Any, directory: str) -> Any:
    """The module, fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    if case.reference is not None:
        return case.reference(Path(directory)).eval()
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()


def _losses(case: Any, model: Any, batch: Any) -> tuple[Any, Any, Any]:
    """Logits, the sum of the unmasked tokens' losses, and what training adds."""
    import torch.nn.functional as F

    logits = model(input_ids=batch["tokens"]).logits
    losses = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    total = (losses * batch["loss_mask"].flatten()).sum()
    return logits, total, None if case.extra_loss is None else case.extra_loss(model, [batch])


def measure(case: Any, directory: str, batch: str, out: str) -> dict[str, float]:
    """Forward and backward over the whole batch."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(batch)
    model = load(case, directory)
    logits, total, extra = _losses(case, model, tensors)
    loss = total / tensors["loss_mask"].sum()
    (loss if extra is None else loss + extra).backward()
    found = _tensors(case, model, Path(out).with_suffix(""), gradients=True)
    save_file(found | {"logits": logits.detach().contiguous()}, out)
    return {"loss": loss.item(), "extra": 0.0 if extra is None else float(extra)}


def routed(case: Any, directory: str, batch: str, out: str, terms: dict[str, Any]) -> dict[str, Any]:
    """Forward and backward over the whole batch, a micro-batch for each sequence."""
    import router_terms
    from safetensors.torch import load_file, save_file

    tensors = load_file(batch)
    model = load(case, directory)
    logits, chosen = router_terms.watch(model)
    _, total, extra = _losses(case, model, tensors)
    assert extra is None, "what training adds else has its own tests"
    shape = {"sigmoid": case.config.get("scoring_func", terms["score"]) == "sigmoid", "made": terms["made"]}
    found = [
        router_terms.losses(one, other, len(tensors["tokens"]), kind=terms["kind"], **shape)
        for one, other in zip(logits, chosen, strict=True)
    ]
    balance, z_loss = (sum(one[at] for one in found) for at in (0, 1))
    loss = total / tensors["loss_mask"].sum()
    (loss + terms["balance"] * balance + terms["z_loss"] * z_loss).backward()
    save_file(_tensors(case, model, Path(out).with_suffix(""), gradients=True), out)
    return {
        "loss": loss.item(),
        "balance": float(balance) / len(found),
        "z_loss": float(z_loss) / len(found),
        "loads": [router_terms.load(one, scores.size(-1)) for one, scores in zip(chosen, logits, strict=True)],
    }


def taught(case: Any, directory: str, batch: str, out: str, factor: float, every: bool, fp8: bool) -> dict[str, float]:
    """Forward and backward over the whole batch."""
    from indexer_terms import Watch
    from safetensors.torch import load_file, save_file

    tensors = load_file(batch)
    model = load(case, directory)
    everything = tensors["tokens"].size(1) if every else None
    watch = Watch(getattr(model, "trunk", model), case.config["num_hidden_layers"], everything, fp8=fp8)
    _, total, extra = _losses(case, model, tensors)
    loss = total / tensors["loss_mask"].sum()
    taught = watch.loss()
    (loss + factor * taught + (0.0 if extra is None else extra)).backward()
    save_file(_tensors(case, model, Path(out).with_suffix(""), gradients=True), out)
    return {"loss": loss.item(), "indexers": taught.item(), "moved": watch.moved}


def documents(case: Any, directory: str, batches: list[str], out: str) -> dict[str, float]:
    """Forward and backward, one document after the other."""
    from safetensors.torch import load_file, save_file

    rows = [load_file(batch) for batch in batches]
    count = sum(float(row["loss_mask"].sum()) for row in rows)
    model, seen = load(case, directory), 0.0
    for row in rows:
        _, total, _ = _losses(replace(case, extra_loss=None), model, row)
        (total / count).backward()
        seen += total.item() / count
    if case.extra_loss is not None:
        case.extra_loss(model, rows).backward()
    save_file(_tensors(case, model, Path(out).with_suffix(""), gradients=True), out)
    return {"loss": seen}


def greedy(case: Any, directory: str, batch: str) -> dict[str, Any]:
    """Forward alone."""
    from safetensors.torch import load_file

    model, tokens = load(case, directory), load_file(batch)["tokens"]
    return {"chosen": [one.argmax(-1).tolist() for one in (model(input_ids=tokens).logits, *model.further(tokens))]}


def steps(case: Any, directory: str, batches: list[str], out: str) -> dict[str, list[float]]:
    """torch's AdamW; matrices decay, vectors do not, as in megatron-core."""
    import torch
    from safetensors.torch import load_file, save_file

    model = load(case, directory)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPSILON)
    losses, norms = [], []
    for path in batches:
        batch = load_file(path)
        _, total, extra = _losses(case, model, batch)
        loss = total / batch["loss_mask"].sum()
        optimizer.zero_grad()
        (loss if extra is None else loss + extra).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        losses.append(loss.item())
    save_file(_tensors(case, model, Path(out).with_suffix(""), gradients=False), out)
    return {"losses": losses, "norms": norms}


def _tensors(case: Any, model: Any, scratch: Path, *, gradients: bool) -> dict[str, Any]:
    """Weights, or gradients in their place, under their names in a checkpoint.

    transformers writes them itself: it alone says what becomes of its stacked tensors on the disk.
    """
    import torch
    from safetensors.torch import load_file

    if gradients:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(scratch)
        found = {
            name: tensor for file in sorted(scratch.glob("*.safetensors")) for name, tensor in load_file(file).items()
        }
    else:
        found = model.state_dict()
    named = {(case.names(name) if case.names else name): tensor for name, tensor in found.items()}
    return {name: tensor.detach().clone().contiguous() for name, tensor in named.items() if name is not None}


if __name__ == "__main__":
    main()

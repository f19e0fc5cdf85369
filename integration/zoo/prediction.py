"""Multi-token prediction in plain torch on transformers' decoder layers: DeepSeek-V3 (2024), section 2.2.

transformers has no class that trains it. The trunk is transformers' model; the block of every further layer is one of
its decoder layers behind the last one that it runs itself, and all around them is written here: the inputs, the shared
embedding and output matrix, the losses. Nothing is padded: depth k has k tokens less, as the paper's equations say it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a checkpoint names further layers; `{depth}` counts them from 0, `{layer}` from the decoder's end."""

    block: str
    """Beginning of the names of the inner layer's tensors."""
    embedding_norm: str
    hidden_norm: str
    projection: str
    last_norm: str
    hidden_first: bool = False
    """The projection's first columns take the hidden state."""
    copies: tuple[str, ...] = ()
    """Names of the copies of embedding and output matrix."""
    trunk: Mapping[str, Any] | None = None
    """Keys of `config.json` as transformers' class wants them, where it has no class of that name."""
    kinds: Callable[[int, int], list[str]] | None = None
    """`layer_types` of a number of layers and of further ones."""
    zero_centred: bool = False
    """Norms multiply by 1 + weight."""


AS_LAYERS = Layout(
    block="model.layers.{layer}.",
    embedding_norm="model.layers.{layer}.enorm.weight",
    hidden_norm="model.layers.{layer}.hnorm.weight",
    projection="model.layers.{layer}.eh_proj.weight",
    last_norm="model.layers.{layer}.shared_head.norm.weight",
    copies=("model.layers.{layer}.embed_tokens.weight", "model.layers.{layer}.shared_head.head.weight"),
)
"""DeepSeek-V3 and GLM-4.5."""

QWEN3_NEXT = Layout(
    block="mtp.layers.{depth}.",
    embedding_norm="mtp.pre_fc_norm_embedding.weight",
    hidden_norm="mtp.pre_fc_norm_hidden.weight",
    projection="mtp.fc.weight",
    last_norm="mtp.norm.weight",
    kinds=lambda layers, further: [
        *("full_attention" if (number + 1) % 4 == 0 else "linear_attention" for number in range(layers)),
        *["full_attention"] * further,
    ],
    zero_centred=True,
)

MIMO = Layout(
    block="model.mtp_layers.{depth}.",
    embedding_norm="model.mtp_layers.{depth}.token_layernorm.weight",
    hidden_norm="model.mtp_layers.{depth}.hidden_layernorm.weight",
    projection="model.mtp_layers.{depth}.input_proj.weight",
    last_norm="model.mtp_layers.{depth}.final_layernorm.weight",
    hidden_first=True,
    trunk={"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
)
ENDS = ("embedding_norm", "hidden_norm", "projection", "last_norm")


class Ends(nn.Module):
    """What one further layer has around its block."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.embedding_norm, self.hidden_norm, self.last_norm = (nn.Parameter(torch.empty(hidden)) for _ in range(3))
        self.projection = nn.Parameter(torch.empty(hidden, 2 * hidden))


class Predicting(nn.Module):
    """A causal language model with further layers; called, it is the model without them."""

    def __init__(self, config: Mapping[str, Any], depths: int, layout: Layout) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        super().__init__()
        self.layout, self.depths, self.layers = layout, depths, config["num_hidden_layers"]
        wanted = deepcopy(dict(config)) | {"num_hidden_layers": self.layers + depths, **(layout.trunk or {})}
        if layout.kinds is not None:
            wanted["layer_types"] = layout.kinds(self.layers, depths)
        self.trunk = AutoModelForCausalLM.from_config(AutoConfig.for_model(**wanted), dtype=torch.float32)
        self.ends = nn.ModuleList(Ends(config["hidden_size"]) for _ in range(depths))
        self.epsilon = config["rms_norm_eps"]

    def forward(self, input_ids: torch.Tensor) -> Any:
        """As transformers' model."""
        with self._own_layers():
            return self.trunk(input_ids=input_ids)

    @contextmanager
    def _own_layers(self) -> Iterator[None]:
        """transformers' model runs its own layers and leaves the further ones behind them alone."""
        self.trunk.config.num_hidden_layers = self.layers
        yield
        self.trunk.config.num_hidden_layers = self.layers + self.depths

    def further(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """Logits `[B, T - k, V]` of every depth k from 1: at place i of token i + k + 1 (equations 21 to 23)."""
        model, found = self.trunk.model, []
        with self._own_layers():
            hidden = model(input_ids=tokens).last_hidden_state
        for number, ends in enumerate(self.ends):
            embedded = self._norm(model.embed_tokens(tokens[:, number + 1 :]), ends.embedding_norm)
            hidden = self._norm(hidden[:, :-1], ends.hidden_norm)
            both = (hidden, embedded) if self.layout.hidden_first else (embedded, hidden)
            hidden = F.linear(torch.cat(both, dim=-1), ends.projection)
            positions = torch.arange(hidden.size(1))[None]
            causal = torch.full((hidden.size(1),) * 2, -torch.inf).triu(1)[None, None]
            hidden = model.layers[self.layers + number](
                hidden, attention_mask=causal, position_ids=positions,
                position_embeddings=model.rotary_emb(hidden, positions),
            )  # fmt: skip
            hidden = self._norm(hidden, ends.last_norm)
            found.append(self.trunk.lm_head(hidden))
        return found

    def further_losses(self, documents: Sequence[Mapping[str, torch.Tensor]]) -> list[torch.Tensor]:
        """Every depth's mean loss over the tokens that count, of all documents (equation 24)."""
        sums, counts = [torch.zeros(())] * self.depths, [0.0] * self.depths
        for document in documents:
            for number, logits in enumerate(self.further(document["tokens"])):
                labels, mask = (document[name][:, number + 1 :] for name in ("labels", "loss_mask"))
                losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
                sums[number] = sums[number] + (losses * mask.flatten()).sum()
                counts[number] += float(mask.sum())
        return [total / count for total, count in zip(sums, counts, strict=True)]

    def _norm(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        unit = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.epsilon)
        return unit * (1 + weight if self.layout.zero_centred else weight)

    def randomise(self) -> None:
        """Every tensor random, norms about one."""
        from reference import randomise

        randomise(self.trunk)
        with torch.no_grad():
            for name, tensor in self.ends.named_parameters():
                tensor.normal_(0, 0.1)
                if "norm" in name:
                    tensor.mul_(3).add_(1)
            if self.layout.zero_centred:
                for name, tensor in self.named_parameters():
                    if "norm" in name and "linear_attn" not in name:
                        tensor -= 1
                    if name.endswith("A_log"):
                        tensor.uniform_(-3, 0)

    def save_pretrained(self, directory: str | Path, **_: Any) -> None:
        """The checkpoint's tensors under its names, one file."""
        from safetensors.torch import load_file, save_file

        with TemporaryDirectory() as scratch:
            self.trunk.save_pretrained(scratch)
            files = sorted(Path(scratch).glob("*.safetensors"))
            found = {name: tensor for file in files for name, tensor in load_file(file).items()}
        for depth, ends in enumerate(self.ends):
            theirs = f"model.layers.{self.layers + depth}."
            block = self._name(self.layout.block, depth)
            found = {
                (block + name.removeprefix(theirs) if name.startswith(theirs) else name): tensor
                for name, tensor in found.items()
            }
            for end in ENDS:
                found[self._name(getattr(self.layout, end), depth)] = getattr(ends, end).detach()
            shared = (found["model.embed_tokens.weight"], found["lm_head.weight"])
            for name, tensor in zip(self.layout.copies, shared, strict=False):
                found[self._name(name, depth)] = tensor
        Path(directory).mkdir(parents=True, exist_ok=True)
        file = Path(directory) / "model.safetensors"
        save_file({name: one.clone().contiguous() for name, one in found.items()}, file, metadata={"format": "pt"})

    def fill(self, directory: Path) -> None:
        """The weights of a checkpoint, read by transformers where they are its own."""
        from safetensors.torch import load_file, save_file

        found = {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for depth, ends in enumerate(self.ends):
            block = self._name(self.layout.block, depth)
            for end in ENDS:
                getattr(ends, end).data = found.pop(self._name(getattr(self.layout, end), depth))
            for name in self.layout.copies:
                found.pop(self._name(name, depth))
            theirs = f"model.layers.{self.layers + depth}."
            found = {
                (theirs + name.removeprefix(block) if name.startswith(block) else name): one
                for name, one in found.items()
            }
        with TemporaryDirectory() as scratch:
            save_file(found, Path(scratch) / "model.safetensors", metadata={"format": "pt"})
            self.trunk.config.save_pretrained(scratch)
            self.trunk, report = type(self.trunk).from_pretrained(
                scratch, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report

    def own_name(self, name: str) -> str:
        """The parameter that holds a tensor of the checkpoint."""
        for depth in range(self.depths):
            for end in ENDS:
                if name == self._name(getattr(self.layout, end), depth):
                    return f"ends.{depth}.{end}"
            if name.startswith(block := self._name(self.layout.block, depth)):
                return f"trunk.model.layers.{self.layers + depth}.{name.removeprefix(block)}"
        return f"trunk.{name}"

    def _name(self, pattern: str, depth: int) -> str:
        return pattern.format(depth=depth, layer=self.layers + depth)


def write(config: Mapping[str, Any], depths: int, layout: Layout, directory: Path, seed: int) -> None:
    """A random checkpoint as the hub has it."""
    model = Predicting(config, depths, layout)
    model.randomise()
    model.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(dict(config), indent=2))


def reference(config: Mapping[str, Any], depths: int, layout: Layout, directory: Path) -> Predicting:
    """The module with a checkpoint's weights."""
    model = Predicting(config, depths, layout)
    model.fill(directory)
    return model

"""Text towers of transformers, tiny and random: the truth for `LanguageModel` under features and position ids.

Shapes: S tokens of a sequence, H hidden. A tower runs on one sequence at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from loongforge.core.model.geometry import Llama3Scaling, TransformerGeometry

VOCABULARY = 130
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4,
    "num_attention_heads": 6, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "max_position_embeddings": 256,
}  # fmt: skip
SPECIAL = {"bos_token_id": None, "eos_token_id": None}


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """One training sequence."""

    tokens: torch.Tensor
    """int64 `[S]`."""
    labels: torch.Tensor
    """int64 `[S]`."""
    loss_mask: torch.Tensor
    """fp32 `[S]`."""
    position_ids: torch.Tensor
    """int64 `[S]` or `[3, S]`."""
    places: torch.Tensor
    """int64 `[n]`: tokens that features replace, ascending."""
    rows: torch.Tensor
    """fp32 `[n, 1 + levels, H]`."""


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What transformers computes over a list of sequences."""

    geometry: TransformerGeometry
    levels: int
    weights: dict[str, torch.Tensor]
    """By name within the tower; `lm_head.weight` besides."""
    sequences: list[Sequence]
    loss: float
    """Sum over unmasked tokens."""
    logits: list[torch.Tensor]
    """`[S, V]` each."""
    grads: dict[str, torch.Tensor]
    row_grads: list[torch.Tensor]


def truth(kind: str, lengths: tuple[int, ...], features: tuple[int, ...], levels: int = 0) -> Truth:
    """Loss and gradients of the tower `kind` on random sequences, `features[i]` features in sequence i.

    Every feature has `levels` more for the first layers (`qwen3_vl` alone).
    """
    torch.manual_seed(5)
    tower, head, geometry = _tower(kind)
    sequences = [_sequence(geometry, levels, *sizes) for sizes in zip(lengths, features, strict=True)]
    total = torch.zeros(())
    logits: list[torch.Tensor] = []
    rows = [sequence.rows.clone().requires_grad_() for sequence in sequences]
    for sequence, row in zip(sequences, rows, strict=True):
        found = head(_hidden(tower, sequence, row))
        losses = torch.nn.functional.cross_entropy(found, sequence.labels, reduction="none")
        total = total + (losses * sequence.loss_mask).sum()
        logits.append(found.detach())
    total.backward()
    named = {**dict(tower.named_parameters()), "lm_head.weight": head.weight}
    return Truth(
        geometry=geometry, levels=levels, sequences=sequences, loss=total.item(), logits=logits,
        weights={name: tensor.detach() for name, tensor in named.items()},
        grads={name: tensor.grad for name, tensor in named.items() if tensor.grad is not None},
        row_grads=[torch.zeros_like(row) if row.grad is None else row.grad for row in rows],
    )  # fmt: skip


def _hidden(tower: Any, sequence: Sequence, rows: torch.Tensor) -> torch.Tensor:
    embedded = tower.embed_tokens(sequence.tokens)
    extra: dict[str, Any] = {}
    if len(rows):
        embedded = embedded.index_put((sequence.places,), rows[:, 0])
        if rows.size(1) > 1:
            mask = torch.zeros(1, len(sequence.tokens), dtype=torch.bool)
            mask[0, sequence.places] = True
            extra = {"visual_pos_masks": mask, "deepstack_visual_embeds": list(rows[:, 1:].unbind(1))}
    positions = sequence.position_ids.unsqueeze(-2)
    return tower(inputs_embeds=embedded[None], position_ids=positions, use_cache=False, **extra).last_hidden_state[0]


def _sequence(geometry: TransformerGeometry, levels: int, length: int, features: int) -> Sequence:
    tokens = torch.randint(VOCABULARY, (length + 1,))
    three = (3,) if geometry.mrope_section else ()
    return Sequence(
        tokens=tokens[:-1], labels=tokens[1:], loss_mask=(torch.rand(length) < 0.8).float(),
        # Any ids at all where there are three rows, and the place in the sequence where there is one.
        position_ids=torch.randint(100, (3, length)) if three else torch.arange(length),
        places=torch.randperm(length)[:features].sort().values,
        rows=torch.randn(features, 1 + levels, geometry.hidden_size),
    )  # fmt: skip


def _tower(kind: str) -> tuple[Any, torch.nn.Linear, TransformerGeometry]:
    common: dict[str, Any] = {
        "num_layers": 4, "hidden_size": 48, "ffn_hidden_size": 80, "num_attention_heads": 6, "num_query_groups": 2,
        "vocab_size": VOCABULARY, "max_position_embeddings": 256, "norm_epsilon": 1e-6, "tie_word_embeddings": False,
    }  # fmt: skip
    if kind == "qwen3_vl":
        from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextConfig, Qwen3VLTextModel

        rope = {"rope_type": "default", "rope_theta": 5e3, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
        tower = Qwen3VLTextModel(Qwen3VLTextConfig(**SIZES, **SPECIAL, head_dim=16, rope_parameters=rope))
        geometry = TransformerGeometry(
            **common, kv_channels=16, rotary_base=5e3, qk_layernorm=True, mrope_section=(4, 2, 2),
            mrope_interleaved=True,
        )  # fmt: skip
    elif kind == "qwen2_5_vl":
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

        rope = {"rope_type": "default", "rope_theta": 2e4, "mrope_section": [1, 2, 1]}
        tower = Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**SIZES, **SPECIAL, rope_parameters=rope))
        geometry = TransformerGeometry(
            **common, kv_channels=8, rotary_base=2e4, add_qkv_bias=True, mrope_section=(1, 2, 1)
        )
    else:
        from transformers import LlamaConfig, LlamaModel

        scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope = {"rope_type": "llama3", "rope_theta": 1e4, "original_max_position_embeddings": 32, **scaling}
        tower = LlamaModel(LlamaConfig(**SIZES, head_dim=16, rope_parameters=rope))
        geometry = TransformerGeometry(
            **common, kv_channels=16, rotary_base=1e4,
            rope_scaling=Llama3Scaling(original_max_position_embeddings=32, **scaling),
        )  # fmt: skip
    head = torch.nn.Linear(48, VOCABULARY, bias=False)
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if "norm" in name:  # ones would hide a swapped or forgotten norm
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            elif "bias" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
            else:  # large enough that attention is far from uniform
                parameter.mul_(4)
    return tower, head, geometry


def part_of(
    tensors: dict[str, torch.Tensor], geometry: TransformerGeometry, tp_rank: int, tp: int
) -> dict[str, torch.Tensor]:
    """Weights or gradients of a tower as a tensor parallel rank of `LanguageModel` holds them, all layers of it."""
    groups = geometry.num_query_groups
    found: dict[str, torch.Tensor] = {}

    def part(name: str, dim: int) -> torch.Tensor:
        return tensors[name].chunk(tp, dim)[tp_rank]

    def qkv(name: str, kind: str) -> torch.Tensor:
        parts = [tensors[f"{name}{one}_proj.{kind}"] for one in "qkv"]
        joined = torch.cat([one.unflatten(0, (groups, -1)) for one in parts], dim=1)
        return joined.chunk(tp)[tp_rank].flatten(0, 1)

    found["embedding.word_embeddings.weight"] = part("embed_tokens.weight", 0)
    found["output_layer.weight"] = part("lm_head.weight", 0)
    found["decoder.final_layernorm.weight"] = tensors["norm.weight"]
    for number in range(geometry.num_layers):
        theirs, ours = f"layers.{number}.", f"decoder.layers.{number}."
        found[ours + "input_layernorm.weight"] = tensors[theirs + "input_layernorm.weight"]
        found[ours + "pre_mlp_layernorm.weight"] = tensors[theirs + "post_attention_layernorm.weight"]
        found[ours + "self_attention.linear_qkv.weight"] = qkv(theirs + "self_attn.", "weight")
        if geometry.add_qkv_bias:
            found[ours + "self_attention.linear_qkv.bias"] = qkv(theirs + "self_attn.", "bias")
        if geometry.qk_layernorm:
            for one in "qk":
                found[f"{ours}self_attention.{one}_layernorm.weight"] = tensors[f"{theirs}self_attn.{one}_norm.weight"]
        found[ours + "self_attention.linear_proj.weight"] = part(theirs + "self_attn.o_proj.weight", 1)
        halves = [part(f"{theirs}mlp.{one}_proj.weight", 0) for one in ("gate", "up")]
        found[ours + "mlp.linear_fc1.weight"] = torch.cat(halves)
        found[ours + "mlp.linear_fc2.weight"] = part(theirs + "mlp.down_proj.weight", 1)
    return found

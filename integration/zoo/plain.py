"""References for families that transformers has no class for, in plain torch from the released code's mathematics.

Modules are named as the tensors of the released checkpoints. Nothing here is shared with the trainer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Config = Mapping[str, Any]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) x weight, over the last dimension."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight


def rotate(x: Tensor, base: float) -> Tensor:
    """`x` is [batch, length, heads, width]: channel i of a head turns with channel i + width / 2."""
    length, width = x.size(1), x.size(-1)
    angles = torch.outer(torch.arange(length).double(), base ** (-torch.arange(0, width, 2).double() / width))
    cos, sin = (part.float()[None, :, None] for part in (angles.cos(), angles.sin()))
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of [batch, length, heads, width]; key and value heads each serve several query heads."""
    shared = query.size(2) // key.size(2)
    key, value = (one.repeat_interleave(shared, dim=2) for one in (key, value))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(query.size(-1))
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -math.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value).flatten(2)


class QwenAttention(nn.Module):
    """All queries, all keys, all values out of one matrix with a bias."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, self.config = config["hidden_size"], config
        self.c_attn = nn.Linear(hidden, 3 * hidden)
        self.c_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        heads, base = self.config["num_attention_heads"], self.config["rotary_emb_base"]
        query, key, value = (one.unflatten(-1, (heads, -1)) for one in self.c_attn(x).chunk(3, dim=-1))
        # Of use_dynamic_ntk and use_logn_attn nothing is left up to seq_length tokens, and in training at any length.
        assert x.size(1) <= self.config["seq_length"]
        return self.c_proj(attend(rotate(query, base), rotate(key, base), value))


class QwenMLP(nn.Module):
    """`w2` is the gate; the file counts both matrices together."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, width = config["hidden_size"], config["intermediate_size"] // 2
        self.w1, self.w2 = nn.Linear(hidden, width, bias=False), nn.Linear(hidden, width, bias=False)
        self.c_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.w1(x) * F.silu(self.w2(x)))


class QwenBlock(nn.Module):
    """Pre-norm, twice."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, eps = config["hidden_size"], config["layer_norm_epsilon"]
        self.ln_1, self.attn = RMSNorm(hidden, eps), QwenAttention(config)
        self.ln_2, self.mlp = RMSNorm(hidden, eps), QwenMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Qwen(nn.Module):
    """QWenLMHeadModel (Bai et al., "Qwen Technical Report", 2023)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, vocab, eps = config["hidden_size"], config["vocab_size"], config["layer_norm_epsilon"]
        blocks = nn.ModuleList(QwenBlock(config) for _ in range(config["num_hidden_layers"]))
        self.transformer = nn.ModuleDict(
            {"wte": nn.Embedding(vocab, hidden), "h": blocks, "ln_f": RMSNorm(hidden, eps)}
        )
        self.lm_head = nn.Linear(hidden, vocab, bias=False)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        x = self.transformer["wte"](input_ids)
        for block in self.transformer["h"].children():
            x = block(x)
        return SimpleNamespace(logits=self.lm_head(self.transformer["ln_f"](x)))


class InternLM2Attention(nn.Module):
    """One matrix: for each key/value group its query heads, then its key, then its value."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, self.config = config["hidden_size"], config
        self.width = hidden // config["num_attention_heads"]
        rows = (config["num_attention_heads"] + 2 * config["num_key_value_heads"]) * self.width
        self.wqkv = nn.Linear(hidden, rows, bias=False)
        self.wo = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        grouped = self.wqkv(x).unflatten(-1, (self.config["num_key_value_heads"], -1, self.width))
        query, key, value = grouped[..., :-2, :].flatten(2, 3), grouped[..., -2, :], grouped[..., -1, :]
        # A dynamic rope_scaling changes the base beyond max_position_embeddings only.
        assert x.size(1) <= self.config["max_position_embeddings"]
        base = self.config["rope_theta"]
        return self.wo(attend(rotate(query, base), rotate(key, base), value))


class InternLM2MLP(nn.Module):
    """`w1` is the gate, `w3` the up matrix."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, width = config["hidden_size"], config["intermediate_size"]
        self.w1, self.w3 = nn.Linear(hidden, width, bias=False), nn.Linear(hidden, width, bias=False)
        self.w2 = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class InternLM2Block(nn.Module):
    """Pre-norm, twice."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, eps = config["hidden_size"], config["rms_norm_eps"]
        self.attention_norm, self.attention = RMSNorm(hidden, eps), InternLM2Attention(config)
        self.ffn_norm, self.feed_forward = RMSNorm(hidden, eps), InternLM2MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class InternLM2(nn.Module):
    """InternLM2ForCausalLM (Cai et al., "InternLM2 Technical Report", 2024)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, vocab, eps = config["hidden_size"], config["vocab_size"], config["rms_norm_eps"]
        blocks = nn.ModuleList(InternLM2Block(config) for _ in range(config["num_hidden_layers"]))
        parts = {"tok_embeddings": nn.Embedding(vocab, hidden), "layers": blocks, "norm": RMSNorm(hidden, eps)}
        self.model = nn.ModuleDict(parts)
        self.output = nn.Linear(hidden, vocab, bias=False)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        x = self.model["tok_embeddings"](input_ids)
        for block in self.model["layers"].children():
            x = block(x)
        return SimpleNamespace(logits=self.output(self.model["norm"](x)))


def writer(kind: Callable[[Config], nn.Module], config: Config) -> Callable[[Path, int], None]:
    """A case's `write` for one of these modules: random weights beside `config`."""

    def write(directory: Path, seed: int) -> None:
        from reference import randomise
        from safetensors.torch import save_file

        torch.manual_seed(seed)
        model = kind(config)
        randomise(model)
        directory.mkdir(parents=True)
        save_file(model.state_dict(), directory / "model.safetensors", metadata={"format": "pt"})
        (directory / "config.json").write_text(json.dumps(dict(config), indent=2))

    return write


def reader(kind: Callable[[Config], nn.Module]) -> Callable[[Path], nn.Module]:
    """A case's `reference` for one of these modules: all tensors of a directory, and no other."""

    def read(directory: Path) -> nn.Module:
        from safetensors.torch import load_file

        model = kind(json.loads((directory / "config.json").read_text()))
        model.load_state_dict(load_file(directory / "model.safetensors"))
        return model

    return read

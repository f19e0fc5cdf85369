"""The loss of an indexer in plain torch on transformers' models: DeepSeek-V3.2 (2025), equations 1, 3 and 4."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch


class Watch:
    """What the indexer of each of `layers` layers read and chose, and what attention gave, of the first pass since this
    was made. `topk`: the keys that are chosen, in place of the model's own number; `fp8`: they are chosen by rounded
    queries and keys, as the release has it, and not as transformers."""

    def __init__(self, model: Any, layers: int, topk: int | None = None, *, fp8: bool = False) -> None:
        model.set_attn_implementation("eager")  # the one that says its probabilities
        self._read: list[tuple[Any, ...]] = []
        self._chosen: list[torch.Tensor] = []
        self._gave: list[torch.Tensor] = []
        self._neighbours, self._indexers = model.config.model_type == "glm_moe_dsa", 0
        self._fp8, self.moved = fp8, 0
        """Keys that fp8 chose and transformers did not."""
        for number, layer in enumerate(model.model.layers):
            indexer = layer.self_attn.indexer
            if indexer is None:  # attends to what an earlier layer chose, and teaches nobody
                continue
            self._indexers += number < layers
            indexer.index_topk = topk or indexer.index_topk
            indexer.register_forward_hook(self._indexed)
            layer.self_attn.register_forward_hook(lambda _, __, output: self._gave.append(output[1].detach()))

    def _indexed(self, indexer: Any, inputs: tuple[Any, ...], chosen: torch.Tensor) -> torch.Tensor:
        self._read.append((indexer, *inputs[:3]))
        if self._fp8:
            plain = chosen
            with torch.no_grad():
                logits = scores(*self._read[-1], neighbours=self._neighbours, fp8=True)
            unseen = torch.ones_like(logits, dtype=torch.bool).triu(1)
            chosen = logits.masked_fill(unseen, float("-inf")).topk(indexer.index_topk).indices.to(chosen.dtype)
            marks = (torch.zeros_like(unseen).scatter(-1, one.long(), True) & ~unseen for one in (chosen, plain))
            mine, theirs = marks
            self.moved += int((mine & ~theirs).sum())
        self._chosen.append(chosen)
        return chosen

    def loss(self) -> Any:
        """The sum over layers of the mean over tokens."""
        assert len(self._read) >= self._indexers, "no pass yet"
        seen = zip(self._read, self._chosen, self._gave, strict=True)
        return sum(
            divergence(scores(*read, neighbours=self._neighbours), chosen, gave)
            for read, chosen, gave in islice(seen, self._indexers)
        )


def scores(
    indexer: Any, hidden: torch.Tensor, latent: torch.Tensor, turns: Any, *, neighbours: bool, fp8: bool = False
) -> torch.Tensor:
    """Equation 1, with gradients to the indexer alone: `[B, S, S]`; `neighbours` are turned together, not halves."""
    hidden, latent = hidden.detach(), latent.detach()
    heads, width = indexer.n_heads, indexer.head_dim
    query = indexer.wq_b(latent).unflatten(-1, (heads, width))
    query = turned(query, *(one[:, :, None] for one in turns), neighbours=neighbours)
    key = turned(indexer.k_norm(indexer.wk(hidden)), *turns, neighbours=neighbours)
    if fp8:
        query, key = rounded(query), rounded(key)
    products = torch.einsum("bthd,bsd->btsh", query, key).relu()
    return torch.einsum("btsh,bth->bts", products, indexer.weights_proj(hidden)) * (heads * width) ** -0.5


def rounded(vectors: torch.Tensor) -> torch.Tensor:
    """Rotated, and what is left of them in float8_e4m3fn whose largest number stands for the vector's largest."""
    matrix = torch.ones(1, 1)
    while len(matrix) < vectors.size(-1):
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    rotated = vectors @ matrix * len(matrix) ** -0.5
    scale = rotated.abs().amax(-1, keepdim=True) / 448
    return (rotated / scale).to(torch.float8_e4m3fn).float() * scale


def turned(vectors: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, *, neighbours: bool) -> torch.Tensor:
    """The first channels as pairs, of one from either half or of neighbours, each a rotated point of the plane."""
    count = cosines.size(-1)
    before = vectors[..., :count]
    first, second = (before[..., 0::2], before[..., 1::2]) if neighbours else before.chunk(2, -1)
    cosine, sine = cosines[..., : count // 2], sines[..., : count // 2]
    # Neighbours need not go back to their places: keys and queries are in one order.
    pairs = (first * cosine - second * sine, second * cosine + first * sine)
    return torch.cat((*pairs, vectors[..., count:]), -1)


def divergence(logits: torch.Tensor, chosen: torch.Tensor, gave: torch.Tensor) -> torch.Tensor:
    """Equations 3 and 4: logits `[B, S, S]`, chosen `[B, S, K]`, what attention gave `[B, N, S, S]`."""
    size = logits.size(-1)
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, chosen.long(), True)
    seen &= torch.ones(size, size, dtype=torch.bool).tril()
    target = gave.mean(1)
    assert float(target[~seen].abs().max()) == 0, "attention goes to chosen keys alone"
    logs = torch.log_softmax(logits.masked_fill(~seen, float("-inf")), -1).masked_fill(~seen, 0.0)
    return (torch.xlogy(target, target) - target * logs).sum(-1).mean()

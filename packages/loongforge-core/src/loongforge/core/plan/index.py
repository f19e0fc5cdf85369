"""What an indexer that chooses keys holds, keeps and computes (DeepSeek Sparse Attention)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from loongforge.core.model.geometry import IndexGeometry, LatentGeometry, TransformerGeometry

if TYPE_CHECKING:
    from loongforge.core.plan.candidate import Candidate
    from loongforge.core.plan.plan import Plan

INT32 = FP32 = 4


def matrices(geometry: TransformerGeometry, latent: LatentGeometry, index: IndexGeometry) -> int:
    """Elements of the three matrices: multiply-adds per token, too."""
    return (latent.q_lora_rank or 0) * index.heads * index.head_dim + geometry.hidden_size * (
        index.head_dim + index.heads
    )


def elements(geometry: TransformerGeometry) -> int:
    """Elements of one layer's indexer, which every tensor parallel rank holds: matrices, norm of the keys."""
    latent = geometry.latent
    index = None if latent is None else latent.index
    return 0 if latent is None or index is None else matrices(geometry, latent, index) + 2 * index.head_dim


def keys_seen(latent: LatentGeometry | None, length: int) -> float:
    """Keys that a token of a document of `length` attends to in the mean, counted as half of the document without a
    choice; with one, no token attends to more than top-k."""
    topk = length if latent is None or latent.index is None else min(latent.index.topk, length)
    return topk - topk**2 / (2 * length)


def flops(geometry: TransformerGeometry, length: int) -> int:
    """Per token of a document of `length` in all layers: projections, and scores of every key before the token.

    Where a loss teaches the indexer, the gradients of its matrices, and of the chosen keys' scores in queries and keys.
    No gradient goes on from it, and the loss itself is not counted.
    """
    latent = geometry.latent
    index = None if latent is None else latent.index
    if latent is None or index is None:
        return 0
    width, times = index.heads * index.head_dim, 1 + (index.loss_coeff > 0)
    scores = width * (length / 2 + 2 * (times - 1) * keys_seen(latent, length))
    layers = geometry.num_layers + geometry.prediction_layers
    return round(2 * layers * (times * matrices(geometry, latent, index) + scores))


def kept_bytes(plan: Plan, *, element: int) -> float:
    """Bytes per token that one layer keeps for its backward pass: a bit for every key. Where a loss teaches the indexer
    its operands besides, with what the weights of its heads come from in fp32 (divided under sequence parallelism; the
    keys of all), and of every chosen key the number, the score and what attention gave it."""
    latent, layout = plan.geometry.latent, plan.layout
    index = None if latent is None else latent.index
    if index is None:
        return 0.0
    bits = plan.seq_length / 8
    if not index.loss_coeff:
        return bits
    split = layout.tp if layout.sp else 1
    operands = (2 * index.heads * index.head_dim + 3 * index.head_dim) / split + index.head_dim * layout.cp
    chosen = (INT32 + 2 * FP32) * min(index.topk, plan.seq_length)
    wide = FP32 * (index.heads + (plan.geometry.hidden_size if element != FP32 else 0))
    return bits + operands * element + (chosen + wide) / split


def index_rules(candidate: Candidate) -> Iterator[str]:
    """A loss teaches what trains."""
    latent, foundation = candidate.geometry.latent, candidate.config.model.foundation
    if latent is None or latent.index is None or not latent.index.loss_coeff:
        return
    if foundation.freeze or candidate.adapters:
        yield (
            f"model.foundation: dsa_indexer_loss_coeff={latent.index.loss_coeff} teaches an indexer that does not "
            "train here: set it to 0, or train the foundation whole."
        )

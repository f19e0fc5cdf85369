"""Blocks against fusions written down independently, and every element exactly once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loongforge.core.model.pieces import Shard, hf_shapes, pieces
from loongforge.core.model.weights import Copy, FuseDelta, FuseGateUp, FuseQKV, Rule, SplitDelta

SIZES = {"num_key_heads": 2, "num_value_heads": 6, "key_head_dim": 4, "value_head_dim": 5}
DELTA = FuseDelta(megatron="m", qkvz="x", ba="y", **SIZES)
QKV = FuseQKV(megatron="m", q="q", k="k", v="v", num_attention_heads=6, num_query_groups=2, kv_channels=10)


def fill(rule: Rule, tensors: dict[str, torch.Tensor], local: tuple[int, ...], shard: Shard) -> torch.Tensor:
    parameter = torch.full(local, -1.0)
    for piece in pieces(rule, local, shard):
        target = parameter.narrow(piece.dim, piece.at, piece.length)
        assert (target == -1).all(), "written twice"
        target.copy_(tensors[piece.hf].narrow(piece.dim, piece.hf_at, piece.length))
    return parameter


def numbers(*shape: int, start: int = 0) -> torch.Tensor:
    return torch.arange(start, start + torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


@pytest.mark.parametrize("tail", [(), (7,)])
@pytest.mark.parametrize("tp", [1, 2, 4, 5])  # 4 and 5 cut inside a group
def test_qkv_rows_interleave_by_group(tp: int, tail: tuple[int, ...]) -> None:
    q, k, v = numbers(60, *tail), numbers(20, *tail, start=1000), numbers(20, *tail, start=2000)
    fused = torch.cat([q[:30], k[:10], v[:10], q[30:], k[10:], v[10:]])
    local = (100 // tp, *tail)
    for rank in range(tp):
        shard = Shard(rank=rank, size=tp, vocab_size=1)
        assert hf_shapes(QKV, local, shard) == {"q": (60, *tail), "k": (20, *tail), "v": (20, *tail)}
        mine = fill(QKV, {"q": q, "k": k, "v": v}, local, shard)
        assert torch.equal(mine, fused[rank * local[0] : (rank + 1) * local[0]])


@pytest.mark.parametrize("tp", [1, 2, 4])  # 4 cuts inside a group
def test_gates_stand_behind_the_queries_of_their_group(tp: int) -> None:
    rule = replace(QKV, gated=True)
    heads = numbers(6, 2, 10, 7)  # of each head the query, then the gate
    k, v = numbers(20, 7, start=1000), numbers(20, 7, start=2000)
    groups = [
        (*heads[3 * group : 3 * group + 3].unbind(1), k.view(2, 10, 7)[group], v.view(2, 10, 7)[group])
        for group in range(2)
    ]
    fused = torch.cat([block.reshape(-1, 7) for group in groups for block in group])
    local = (160 // tp, 7)
    for rank in range(tp):
        shard = Shard(rank=rank, size=tp, vocab_size=1)
        assert hf_shapes(rule, local, shard) == {"q": (120, 7), "k": (20, 7), "v": (20, 7)}
        mine = fill(rule, {"q": heads.reshape(120, 7), "k": k, "v": v}, local, shard)
        assert torch.equal(mine, fused[rank * local[0] : (rank + 1) * local[0]])


@pytest.mark.parametrize("tp", [1, 2])
def test_projections_of_a_delta_rule_stand_key_head_by_key_head(tp: int) -> None:
    qkvz, ba = numbers(76, 7), numbers(12, 7, start=1000)
    fused = torch.cat([qkvz[:38], ba[:6], qkvz[38:], ba[6:]])
    local = (88 // tp, 7)
    for rank in range(tp):
        shard = Shard(rank=rank, size=tp, vocab_size=1)
        assert hf_shapes(DELTA, local, shard) == {"x": (76, 7), "y": (12, 7)}
        mine = fill(DELTA, {"x": qkvz, "y": ba}, local, shard)
        assert torch.equal(mine, fused[rank * local[0] : (rank + 1) * local[0]])


@pytest.mark.parametrize("tp", [1, 2])
def test_convolution_of_a_delta_rule_stands_key_head_by_key_head(tp: int) -> None:
    rule = SplitDelta(megatron="m", hf="h", **SIZES)
    q, k, v = numbers(8, 1, 3), numbers(8, 1, 3, start=1000), numbers(30, 1, 3, start=2000)
    ordered = torch.cat([q[:4], k[:4], v[:15], q[4:], k[4:], v[15:]])
    local = (46 // tp, 1, 3)
    for rank in range(tp):
        shard = Shard(rank=rank, size=tp, vocab_size=1)
        assert hf_shapes(rule, local, shard) == {"h": (46, 1, 3)}
        mine = fill(rule, {"h": torch.cat([q, k, v])}, local, shard)
        assert torch.equal(mine, ordered[rank * local[0] : (rank + 1) * local[0]])


@pytest.mark.parametrize("tp", [1, 2, 3])
def test_gate_above_up_on_every_rank(tp: int) -> None:
    rule = FuseGateUp(megatron="m", gate="g", up="u")
    gate, up = numbers(12, 5), numbers(12, 5, start=100)
    local = (24 // tp, 5)
    for rank in range(tp):
        shard = Shard(rank=rank, size=tp, vocab_size=1)
        assert hf_shapes(rule, local, shard) == {"g": (12, 5), "u": (12, 5)}
        expected = torch.cat([gate.chunk(tp)[rank], up.chunk(tp)[rank]])
        assert torch.equal(fill(rule, {"g": gate, "u": up}, local, shard), expected)


@pytest.mark.parametrize("dim", [0, 1])
def test_copy_splits_one_dimension(dim: int) -> None:
    rule = Copy(megatron="m", hf="h", shard_dim=dim)
    whole = numbers(6, 8)
    for rank in range(2):
        local = tuple(whole.chunk(2, dim)[rank].shape)
        shard = Shard(rank=rank, size=2, vocab_size=1)
        assert hf_shapes(rule, local, shard) == {"h": (6, 8)}
        assert torch.equal(fill(rule, {"h": whole}, local, shard), whole.chunk(2, dim)[rank])


def test_padding_of_the_vocabulary_belongs_to_no_piece() -> None:
    rule = Copy(megatron="m", hf="h", shard_dim=0, vocab=True)
    whole = numbers(9, 3)
    parts = []
    for rank in range(4):  # four ranks of 4 rows: 9 tokens, 7 rows of padding, the last rank has no token
        shard = Shard(rank=rank, size=4, vocab_size=9)
        assert hf_shapes(rule, (4, 3), shard) == {"h": (9, 3)}
        parts.append(fill(rule, {"h": whole}, (4, 3), shard))
    assert torch.equal(torch.cat(parts), torch.cat([whole, torch.full((7, 3), -1.0)]))


@pytest.mark.parametrize(
    ("rule", "local", "text"),
    [
        (QKV, (48, 7), r"48 rows on each of 2 ranks are not 6 \+ 2 x 2 heads of 10"),
        (replace(QKV, gated=True), (50, 7), r"50 rows on each of 2 ranks are not 12 \+ 2 x 2 heads of 10"),
        (DELTA, (40, 7), "40 rows on each of 2 ranks are not the 88 of 2 key heads of 4 and 6 value heads of 5"),
        (FuseGateUp(megatron="m", gate="g", up="u"), (7, 2), "7 rows have no two halves"),
        (Copy(megatron="m", hf="h", shard_dim=0, vocab=True), (4, 2), "8 rows over all ranks cannot hold 9 tokens"),
    ],
)
def test_impossible_shapes(rule: Rule, local: tuple[int, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        hf_shapes(rule, local, Shard(rank=0, size=2, vocab_size=9))

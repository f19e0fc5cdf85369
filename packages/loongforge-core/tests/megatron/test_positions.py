"""Angles by place and by position ids, and the two forms of the rotation that takes them."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loongforge.core.megatron.context_parallel import local_indices
from loongforge.core.megatron.positions import Rotary, axes_of_pairs, frequencies
from loongforge.core.megatron.rope import Rotation, unless_of_each_token, unless_of_each_token_packed
from loongforge.core.model.geometry import Llama3Scaling, TransformerGeometry
from loongforge.core.platform.substitution import ORIGINAL

WIDTH = 16
apply_rope = Rotation()
apply_rope_packed = apply_rope.packed


def geometry(**options: Any) -> TransformerGeometry:
    return TransformerGeometry(
        num_layers=1, hidden_size=48, ffn_hidden_size=8, num_attention_heads=3, num_query_groups=3, kv_channels=WIDTH,
        vocab_size=7, max_position_embeddings=64, norm_epsilon=1e-6, rotary_base=5e3, tie_word_embeddings=False,
        **options,
    )  # fmt: skip


def group(size: int = 1, rank: int = 0) -> Any:
    return SimpleNamespace(size=lambda: size, rank=lambda: rank)


def packed(*ends: int) -> Any:
    return SimpleNamespace(boundaries=ends)


def turned(query: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Complex multiplication in fp64: `query [..., D]` by `angles [..., D / 2]`."""
    first, second = query.double().chunk(2, -1)
    value = torch.complex(first, second) * torch.polar(torch.ones_like(angles.double()), angles.double())
    return torch.cat((value.real, value.imag), -1)


def test_pairs_take_turns_or_stand_in_sections() -> None:
    assert axes_of_pairs(geometry(mrope_section=(3, 4, 1))).tolist() == [0, 0, 0, 1, 1, 1, 1, 2]
    mixed = geometry(mrope_section=(4, 2, 2), mrope_interleaved=True)
    assert axes_of_pairs(mixed).tolist() == [0, 1, 2, 0, 1, 2, 0, 0]


def test_sections_that_do_not_fill_a_head_are_refused() -> None:
    with pytest.raises(AssertionError, match=r"mrope_section \(3, 4, 2\) does not add up to the 8 pairs of a head"):
        axes_of_pairs(geometry(mrope_section=(3, 4, 2)))


def test_llama3_stretches_long_wavelengths_alone() -> None:
    scaling = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=256)
    plain, found = frequencies(geometry()), frequencies(geometry(rope_scaling=scaling))
    turns = 256 * plain / (2 * math.pi)
    assert (turns > 4).any()
    assert (turns < 1).any()
    assert torch.equal(found[turns > 4], plain[turns > 4])
    assert torch.equal(found[turns < 1], plain[turns < 1] / 8)
    between = (turns > 1) & (turns < 4)
    assert between.any()
    assert ((found < plain) & (found > plain / 8))[between].all()


@pytest.mark.parametrize("interleaved", [False, True])
def test_three_rows_turn_every_token_by_its_own(interleaved: bool) -> None:
    torch.manual_seed(1)
    shape = geometry(mrope_section=(3, 3, 2), mrope_interleaved=interleaved)
    ids = torch.randint(50, (3, 2, 5))
    query = torch.randn(5, 2, 3, WIDTH)
    angles = Rotary(shape, group())(ids[0], ids, None)
    assert angles.shape == (5, 2, 1, WIDTH)
    order = [0, 1, 2, 0, 1, 2, 0, 1] if interleaved else [0, 0, 0, 1, 1, 1, 2, 2]
    right = torch.stack([ids[axis] * frequencies(shape)[pair] for pair, axis in enumerate(order)], -1)
    right = right.transpose(0, 1).unsqueeze(2)  # [S, B, 1, pairs]
    # Angles up to 50 in fp32 are right to 50 x 2^-24.
    assert torch.allclose(apply_rope(query, angles).double(), turned(query, right), atol=2e-5)


@pytest.mark.parametrize("interleaved", [False, True])
def test_three_equal_rows_are_text(interleaved: bool) -> None:
    rotary = Rotary(geometry(mrope_section=(3, 3, 2), mrope_interleaved=interleaved), group())
    ids = torch.arange(6).expand(2, 6)
    assert torch.equal(rotary(ids, ids.expand(3, 2, 6), None), rotary(ids, ids, None).expand(6, 2, 1, WIDTH))


def test_a_packed_row_by_place_begins_anew_in_every_segment() -> None:
    torch.manual_seed(2)
    rotary, row = Rotary(geometry(), group()), packed(0, 3, 8)
    query = torch.randn(8, 3, WIDTH)
    angles = rotary(torch.zeros(1, 8, dtype=torch.int64), None, row)
    found = apply_rope_packed(query, torch.tensor(row.boundaries), angles)
    places = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4])
    right = turned(query, (places[:, None] * frequencies(geometry()))[:, None])
    assert torch.allclose(found.double(), right, atol=2e-6)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_packed_row_by_place_has_the_tokens_of_its_rank(rank: int) -> None:
    torch.manual_seed(2)
    rotary, row = Rotary(geometry(), group()), packed(0, 12, 12, 36, 48)
    whole, query = rotary(torch.zeros(1, 48, dtype=torch.int64), None, row), torch.randn(48, 3, WIDTH)
    index = local_indices(row.boundaries, rank, 3)
    expected = apply_rope_packed(query, torch.tensor(row.boundaries), whole)[index]
    assert torch.equal(apply_rope_packed(query[index], torch.tensor(row.boundaries), whole, 3, rank), expected)


def test_layers_share_cosines_and_sines() -> None:
    seen: list[torch.Tensor] = []

    def spy(query: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
        seen.append(cos)
        return query

    rotation, ends = Rotation(spy), torch.tensor([0, 3, 8])
    angles, other = (torch.rand(8, 1, 1, WIDTH) for _ in range(2))
    for freqs in (angles, angles, other):
        rotation(torch.zeros(8, 1, 3, WIDTH), freqs)
    for boundaries in (ends, ends, ends.clone()):
        rotation.packed(torch.zeros(8, 3, WIDTH), boundaries, other)
    assert [one is two for one, two in pairwise(seen)] == [True, False, False, True, False]


def test_the_rotation_waits_for_no_device() -> None:
    """A tensor without data has no number to wait for."""
    query, ends = torch.empty(8, 3, WIDTH, device="meta"), torch.empty(3, dtype=torch.int32, device="meta")
    assert apply_rope_packed(query, ends, torch.empty(8, 1, 1, WIDTH, device="meta"), 2, 1).shape == (8, 3, WIDTH)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_packed_row_by_three_rows_of_ids_equals_the_same_batch(rank: int) -> None:
    """The ids are the rank's own already: no context parallel slicing on top."""
    torch.manual_seed(3)
    rotary, row = Rotary(geometry(mrope_section=(3, 3, 2)), group(2, rank)), packed(0, 8, 12)
    index = local_indices(row.boundaries, rank, 2)
    ids, query = torch.randint(50, (3, 1, 12))[..., index], torch.randn(6, 3, WIDTH)
    angles = rotary(ids[0], ids, row)
    assert angles.shape == (1, 6, 1, WIDTH)
    found = apply_rope_packed(query, torch.tensor(row.boundaries), angles, 2, rank)
    assert torch.equal(found, apply_rope(query[:, None], rotary(ids[0], ids, None))[:, 0])


def test_angles_by_place_are_those_of_the_rank_and_follow_the_length() -> None:
    whole = Rotary(geometry(), group())
    for rank in range(2):
        part = Rotary(geometry(), group(2, rank))
        for length in (8, 12, 8):
            tokens = torch.zeros(1, length // 2, dtype=torch.int64)
            expected = whole(torch.zeros(1, length, dtype=torch.int64), None, None)
            assert torch.equal(part(tokens, None, None), expected[local_indices((0, length), rank, 2)])


def test_three_rows_need_sections() -> None:
    ids = torch.zeros(3, 1, 4, dtype=torch.int64)
    with pytest.raises(AssertionError, match="the geometry has no mrope_section"):
        Rotary(geometry(), group())(ids[0], ids, None)


def test_a_fused_rotation_gets_angles_by_place_alone() -> None:
    """What TransformerEngine's cannot take goes to ours."""
    seen: list[str] = []

    def fused(query: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        seen.append("fused")
        return query

    plain, row = unless_of_each_token(fused, apply_rope), unless_of_each_token_packed(fused, apply_rope)
    ends = torch.tensor([0, 4])
    plain(torch.zeros(4, 2, 3, WIDTH), torch.zeros(4, 1, 1, WIDTH), interleaved=False)
    row(torch.zeros(4, 3, WIDTH), ends, torch.zeros(4, 1, 1, WIDTH), cp_size=1, cp_rank=0, interleaved=False)
    assert seen == ["fused", "fused"]
    torch.manual_seed(4)
    angles, query = torch.rand(4, 2, 1, WIDTH // 2).repeat(1, 1, 1, 2), torch.randn(4, 2, 3, WIDTH)
    assert torch.equal(plain(query, angles, interleaved=False), apply_rope(query, angles))
    first = row(query[:, 0], ends, angles[:, :1].transpose(0, 1), cp_size=1, cp_rank=0, interleaved=False)
    assert torch.equal(first, apply_rope(query, angles)[:, 0])
    assert len(seen) == 2


@pytest.mark.parametrize(("size", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_a_plain_packed_rotation_is_megatron_cores_without_its_wait(size: int, rank: int, tiny: Any) -> None:
    """Latent attention's: bit for bit. Where the original waits no longer, the repair can go."""
    from megatron.core.models.common.embeddings import rope_utils

    ours = rope_utils._apply_rotary_pos_emb_thd
    original = getattr(ours, ORIGINAL)
    torch.manual_seed(5)
    query, angles, ends = torch.randn(24 // size, 3, WIDTH), torch.randn(12, 1, 1, WIDTH), torch.tensor([0, 4, 16, 24])
    options = {"mla_rotary_interleaved": True, "mscale": 1.3, "cp_group": group(size, rank)}
    assert torch.equal(ours(query, ends, angles, **options), original(query, ends, angles, **options))
    there = [tensor.to("meta") for tensor in (query, ends, angles)]
    assert ours(*there, **options).shape == query.shape
    with pytest.raises(NotImplementedError, match="no data"):
        original(*there, **options)

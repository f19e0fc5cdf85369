"""Segment attention against a mask over the whole row, and which layer sees which segments."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from loongforge.kernels.packed_attention.reference import packed_attention

HEADS, WIDTH = 3, 8

ROWS: dict[str, list[int]] = {
    "one": [7],
    "equal": [4, 4, 4],
    "unequal": [5, 2, 9],
    "equal ones apart": [4, 6, 4, 1, 6, 4],
    "already arranged": [6, 6, 3, 3, 1],
}


@pytest.fixture(scope="module", autouse=True)
def megatron() -> None:
    from loongforge.core.megatron.start import start_megatron
    from loongforge.core.platform import choose

    start_megatron(choose("cpu").platform())


def numbers_of(lengths: list[int], scattered: bool) -> torch.Tensor:
    numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    if scattered:
        numbers = numbers[torch.randperm(len(numbers), generator=torch.Generator().manual_seed(5))]
    return numbers


def tensors(count: int) -> list[torch.Tensor]:
    """Query, key, value and a factor for every number of the result, `[T, 1, N, D]`."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(count, 1, HEADS, WIDTH, generator=generator).requires_grad_() for _ in range(4)]


def masked(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    mask = numbers[:, None] == numbers[None]
    rows = [tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)]
    return F.scaled_dot_product_attention(rows[0], rows[1], rows[2], attn_mask=mask).permute(2, 0, 1, 3).flatten(2)


def attention(layer_number: int, **options: Any) -> Any:
    from megatron.core.transformer.enums import AttnMaskType

    from loongforge.core.megatron.segment_attention import SegmentAttention

    groups: Any = SimpleNamespace(cp=SimpleNamespace(size=lambda: 1))
    return SegmentAttention(
        SimpleNamespace(attention_dropout=0.0),
        layer_number,
        AttnMaskType.no_mask,
        "self",
        pg_collection=groups,
        **options,
    )


@pytest.mark.parametrize("kernel", [None, packed_attention], ids=["by length", "all at once"])
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS)
def test_equals_a_mask(lengths: list[int], scattered: bool, kernel: Any) -> None:
    from loongforge.core.megatron.segment_attention import SegmentedRow, Segments

    numbers = numbers_of(lengths, scattered)
    row = SegmentedRow(qkv_format="sbhd", frames=Segments.of(numbers, torch.device("cpu")))
    query, key, value, factor = tensors(len(numbers))
    ours = attention(1, packed_attention=kernel)(query, key, value, None, packed_seq_params=row)
    right = masked(query, key, value, numbers)
    # Measured: 4e-7 at values up to 2 and gradients up to 4; sums in another order.
    torch.testing.assert_close(ours, right, rtol=0, atol=4e-6)
    gradients = torch.autograd.grad((ours * factor.flatten(2)).sum(), [query, key, value])
    expected = torch.autograd.grad((right * factor.flatten(2)).sum(), [query, key, value])
    for mine, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=4e-6)


def test_segments_of_one_length_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from loongforge.core.megatron.segment_attention import Segments

    shapes: list[tuple[int, ...]] = []
    original = F.scaled_dot_product_attention

    def seen(query: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        shapes.append(tuple(query.shape))
        return original(query, *args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", seen)
    numbers = numbers_of(ROWS["equal ones apart"], scattered=False)
    query, key, value, _ = (tensor.squeeze(1) for tensor in tensors(len(numbers)))
    Segments.of(numbers, torch.device("cpu")).attend(query, key, value, None)
    assert shapes == [(2, HEADS, 6, WIDTH), (3, HEADS, 4, WIDTH), (1, HEADS, 1, WIDTH)]


def test_a_row_in_order_is_not_moved() -> None:
    from loongforge.core.megatron.segment_attention import Segments

    ready = Segments.of(numbers_of(ROWS["already arranged"], scattered=False), torch.device("cpu"))
    assert ready.order is ready.back is None
    moved = Segments.of(numbers_of(ROWS["unequal"], scattered=False), torch.device("cpu"))
    assert moved.order is not None
    assert moved.back is not None
    assert torch.equal(moved.order[moved.back], torch.arange(16))
    assert moved.arranged().shapes == moved.shapes == ((1, 9), (1, 5), (1, 2))
    assert moved.arranged().order is None


def test_layers_choose_between_frames_and_windows() -> None:
    from loongforge.core.megatron.segment_attention import SegmentedRow, Segments

    frames, windows = numbers_of([8, 4], scattered=False), numbers_of([4, 4, 2, 2], scattered=False)
    device = torch.device("cpu")
    row = SegmentedRow(
        qkv_format="sbhd",
        frames=Segments.of(frames, device),
        windows=Segments.of(windows, device),
        frame_layers=frozenset({1}),
    )
    query, key, value, _ = tensors(12)
    for number, seen in ((1, windows), (2, frames), (3, windows)):  # megatron-core counts layers from 1
        ours = attention(number)(query, key, value, None, packed_seq_params=row)
        torch.testing.assert_close(ours, masked(query, key, value, seen), rtol=0, atol=4e-6)


def test_programmer_mistakes_are_named() -> None:
    from megatron.core.packed_seq_params import PackedSeqParams

    from loongforge.core.megatron.segment_attention import Segments

    with pytest.raises(AssertionError, match="without tokens"):
        Segments.of(torch.tensor([0, 2]), torch.device("cpu"))
    with pytest.raises(AssertionError, match="without tokens"):
        Segments.of(torch.tensor([], dtype=torch.int64), torch.device("cpu"))
    query, key, value, _ = tensors(4)
    with pytest.raises(AssertionError, match="comes as SegmentedRow"):
        attention(1)(query, key, value, None, packed_seq_params=PackedSeqParams(qkv_format="sbhd"))

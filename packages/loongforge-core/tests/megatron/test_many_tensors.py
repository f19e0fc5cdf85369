"""Lists of tensors in few operations, against one at a time; and what megatron-core's own does with them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

SIZES = (3, 70, 5000, 1)
FLAG = torch.zeros(1, dtype=torch.int32)


class Counted(TorchDispatchMode):
    """How often each operator runs; `_local_scalar_dense` is a number that the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def many(tiny: Any) -> Any:
    from loongforge.core.megatron import many_tensors

    return many_tensors


def tensors(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, generator=generator).to(dtype) for size in SIZES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm_of_all(many: Any, dtype: torch.dtype) -> None:
    lists = [tensors(dtype), tensors(dtype)[:2]]
    with Counted() as counted:
        norm, each = many.norm_of(65536, FLAG, lists, False)
    wide = torch.cat([one.double() for some in lists for one in some])
    assert each is None
    assert (norm.shape, norm.dtype) == ((1,), torch.float32)
    torch.testing.assert_close(norm.double().squeeze(), wide.norm(), rtol=1e-6, atol=0)  # 6e-8 measured
    assert "_local_scalar_dense" not in counted.calls


def test_scaled_in_place(many: Any) -> None:
    mine, expected = tensors(), [one * 0.3 for one in tensors()]
    with Counted() as counted:
        many.scale(65536, FLAG, [mine, mine], 0.3)
    assert all(torch.equal(have, want) for have, want in zip(mine, expected, strict=True))
    assert counted.calls.total() == 1


@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_scaled_into_others(many: Any, factor: float) -> None:
    source, target = tensors(), [torch.empty_like(one) for one in tensors(torch.bfloat16)]
    many.scale(65536, FLAG, [source, target], factor)
    for have, want in zip(target, source, strict=True):
        assert torch.equal(have, (want * factor).to(torch.bfloat16))
    assert all(torch.equal(have, want) for have, want in zip(source, tensors(), strict=True))


def test_upstream_still_waits_and_copies(many: Any) -> None:
    """When this fails, `many_tensors` can go."""
    from megatron.core.utils import local_multi_tensor_l2_norm, local_multi_tensor_scale

    without_numbers = [one.to("meta") for one in tensors()]
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        local_multi_tensor_l2_norm(65536, FLAG, [without_numbers], False)
    assert many.norm_of(65536, FLAG, [without_numbers], False)[0].is_meta
    mine = tensors()
    with Counted() as counted:
        local_multi_tensor_scale(65536, FLAG, [mine, mine], 0.3)
    assert counted.calls.total() == 2 * len(SIZES)


def test_what_is_put_where(many: Any) -> None:
    """On a CPU the exact norm stays, which is there already."""
    from megatron.core.optimizer import clip_grads, optimizer

    assert [(one.owner, one.name) for one in many.substitutions()] == [
        (clip_grads, "multi_tensor_scale_impl"),
        (optimizer, "multi_tensor_scale_impl"),
    ]
    assert clip_grads.multi_tensor_scale_impl.func is many.scale
    assert clip_grads.l2_norm_impl is not many.norm_of

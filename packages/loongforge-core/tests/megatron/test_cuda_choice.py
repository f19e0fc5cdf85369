"""What a run on CUDA would be made of, as far as a machine without a GPU can tell."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def cuda(tiny: Any) -> Any:
    import torch

    from loongforge.core.platform.cuda import CudaPlatform

    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    return CudaPlatform()


def test_a_device_node_without_a_gpu_is_one_sentence(cuda: Any) -> None:
    from loongforge.core.errors import PlatformError

    with pytest.raises(PlatformError, match=r"a device node is here, but torch sees no GPU .*LOONGFORGE_PLATFORM=cpu"):
        cuda.device(0)


def test_without_transformer_engine_the_layers_are_ours_and_say_so(cuda: Any, monkeypatch: Any) -> None:
    import torch

    from loongforge.core.megatron.layers import RowLinear
    from loongforge.core.megatron.specs import layers_for

    assert cuda.capabilities() == frozenset()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    layers = layers_for(cuda, torch.bfloat16)
    assert (layers.name, layers.reason) == ("torch", "transformer-engine is not installed")
    assert layers.row_linear is RowLinear
    assert layers.core_attention.keywords["causal_attention"] is None  # torch's own, which has fused kernels there
    assert layers.uneven_gather
    said = [f"{op}: using triton" for op in ("rms_norm", "swiglu", "rope", "linear_cross_entropy")]
    assert list(layers.ops) == [*said, "packed_attention: using varlen"]
    assert layers.linear_cross_entropy.__module__ == "loongforge.kernels.linear_cross_entropy.triton"


@pytest.mark.parametrize(
    ("dtype", "said"),
    [("float32", "takes bfloat16, float16, not float32"), ("bfloat16", "needs pip install 'fla-core")],
)
def test_a_gated_delta_rule_says_why_it_is_torch(dtype: str, said: str, cuda: Any) -> None:
    import torch

    from loongforge.core.megatron.specs import layers_for

    convolution, rule = layers_for(cuda, getattr(torch, dtype)).delta().lines
    assert convolution.startswith(f"causal_convolution: fla refused ({said}")
    assert rule.startswith(f"gated_delta_rule: fla refused ({said}")


def test_cuda_is_used_as_it_is(cuda: Any) -> None:
    """No substitution, no fork of a process that may have touched the device."""
    from loongforge.core.platform.contract import Platform

    assert type(cuda).activate is Platform.activate
    assert type(cuda).after_import is Platform.after_import
    assert (cuda.backend, cuda.device_type, cuda.fork_safe) == ("nccl", "cuda", False)

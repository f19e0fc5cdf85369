"""The gated delta rule in chunks against its definition, token by token in float64, and against transformers."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from loongforge.kernels.causal_convolution import causal_convolution
from loongforge.kernels.gated_delta_rule import gated_delta_rule
from loongforge.kernels.gated_delta_rule.reference import EPSILON

B, K, R, D, V = 2, 2, 3, 8, 12


def operands(length: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Random q, k, v, decay, beta; some tokens keep nearly everything, some nearly nothing."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    decay = -F.softplus(3 * normal(B, length, K, R))
    made = [normal(B, length, K, D), normal(B, length, K, D), normal(B, length, K, R, V)]
    made += [decay, normal(B, length, K, R).sigmoid()]
    return [one.to(dtype).requires_grad_() for one in made]


def recurrence(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor
) -> torch.Tensor:
    """The definition of the package's docstring, one token after the other."""
    q, k = (one * torch.rsqrt(one.square().sum(-1, keepdim=True) + EPSILON) for one in (q, k))
    state, outputs = torch.zeros(B, K, R, D, V, dtype=q.dtype), []
    for t in range(q.size(1)):
        key, query = (one[:, t].unsqueeze(2).unsqueeze(-1) for one in (k, q))  # [B, K, 1, D, 1]
        state = state * decay[:, t].exp()[..., None, None]
        read = (state * key).sum(-2)  # [B, K, R, V]
        correction = beta[:, t].unsqueeze(-1) * (v[:, t] - read)
        state = state + key * correction.unsqueeze(-2)
        outputs.append((state * query).sum(-2) * D**-0.5)
    return torch.stack(outputs, dim=1)


def worst(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    return max(
        float((one - other).detach().abs().max() / other.detach().abs().max().clamp(min=1e-30))
        for one, other in zip(ours, theirs, strict=True)
    )


def both_ways(rule: object, made: list[torch.Tensor]) -> list[torch.Tensor]:
    output = rule(*made)  # pyright: ignore[reportCallIssue]
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), made)]


@pytest.mark.parametrize("length", [1, 5, 63, 64, 65, 150])
def test_chunks_equal_the_recurrence(length: int) -> None:
    made = operands(length)
    assert worst(both_ways(gated_delta_rule, made), both_ways(recurrence, made)) < 1e-11


@pytest.mark.parametrize("length", [7, 130])
def test_fp32_is_as_near_as_fp32_can_be(length: int) -> None:
    ours = gated_delta_rule(*operands(length, torch.float32))
    assert worst([ours.double()], [recurrence(*operands(length))]) < 2e-5  # measured 3e-6


def test_segments_do_not_see_each_other() -> None:
    ends = (0, 3, 70, 71, 90)
    made = operands(90)
    parts = [recurrence(*(one[:, start:end] for one in made)) for start, end in pairwise(ends)]
    assert worst([gated_delta_rule(*made, ends)], [torch.cat(parts, dim=1)]) < 1e-11
    assert worst([gated_delta_rule(*made)], [torch.cat(parts, dim=1)]) > 1e-2


def test_equals_transformers() -> None:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

    q, k, v, decay, beta = operands(40, torch.float32)
    wide = [one.repeat_interleave(R, dim=2) for one in (q, k)]
    theirs, _ = torch_recurrent_gated_delta_rule(
        *wide, v.flatten(2, 3), g=decay.flatten(2), beta=beta.flatten(2), initial_state=None,
        output_final_state=False, use_qk_l2norm_in_kernel=True,
    )  # fmt: skip
    assert worst([gated_delta_rule(q, k, v, decay, beta).flatten(2, 3)], [theirs]) < 2e-5


def test_the_convolution_is_causal_and_ends_with_its_segment() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, 20, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    direct = torch.zeros_like(x)
    for t in range(20):
        for back in range(min(4, t + 1)):
            direct[:, t] += weight[:, 3 - back] * x[:, t - back]
    torch.testing.assert_close(causal_convolution(x, weight), F.silu(direct))
    apart = torch.cat([causal_convolution(x[:, :9], weight), causal_convolution(x[:, 9:], weight)], dim=1)
    torch.testing.assert_close(causal_convolution(x, weight, (0, 9, 20)), apart)
    assert not torch.allclose(apart, F.silu(direct))

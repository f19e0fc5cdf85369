"""Random inputs of one layer's sparse attention, and the arithmetic that its parts need."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from loongforge.kernels.dsa import Shape
from loongforge.kernels.row_bounds import row_bounds


@dataclass(frozen=True, slots=True, kw_only=True)
class Dims:
    """Widths of a model's attention and indexer."""

    latent: int = 512
    rope: int = 64
    nope: int
    value: int
    index_heads: int
    index_width: int = 128


DIMS = {
    "deepseek_v3_2": Dims(nope=128, value=128, index_heads=64),
    "glm_5": Dims(nope=192, value=256, index_heads=32),
}


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """One causal document; T tokens, H heads. Every tensor but the bounds wants gradients."""

    dims: Dims
    topk: int
    q: Tensor
    """`[T, H, nope + rope]`."""
    kv: Tensor
    """`[T, latent + rope]`: the latent of unit root mean square, and the rotary key."""
    up: Tensor
    """`[H, nope + value, latent]`."""
    index: tuple[Tensor, Tensor, Tensor]
    """Queries `[T, HI, DI]`, keys `[T, DI]` and weights `[T, HI]`, which carry the scale of the scores."""
    ks: Tensor
    ke: Tensor
    grad: Tensor
    """Of the output, `[T, H, value]`."""

    @property
    def scale(self) -> float:
        """Of the attention scores."""
        return self.q.shape[2] ** -0.5

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What gets gradients."""
        return (self.q, self.kv, self.up, *self.index)

    @cached_property
    def shape(self) -> Shape:
        """What the cost table is asked about."""
        length, heads, _ = self.q.shape
        dims = self.dims
        return Shape(
            queries=length, keys=length, heads=heads, topk=self.topk, latent=dims.latent, rope=dims.rope,
            nope=dims.nope, value=dims.value,
        )  # fmt: skip

    def wide(self) -> Inputs:
        """The same numbers in fp64 on the CPU."""

        def truth(x: Tensor) -> Tensor:
            return x.detach().cpu().double().requires_grad_(x.requires_grad)

        q, kv, up, *index = (truth(x) for x in self.leaves)
        return Inputs(
            dims=self.dims, topk=self.topk, q=q, kv=kv, up=up, index=(index[0], index[1], index[2]), ks=self.ks.cpu(),
            ke=self.ke.cpu(), grad=truth(self.grad),
        )  # fmt: skip


def make(dims: Dims, length: int, heads: int, topk: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Inputs from a fixed seed, of the magnitudes that norms and initialised matrices give."""
    generator = torch.Generator(device).manual_seed(length * 1000 + heads)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    width = dims.index_heads, dims.index_width
    tensors = (
        random(length, heads, dims.nope + dims.rope),
        random(length, dims.latent + dims.rope),
        random(heads, dims.nope + dims.value, dims.latent, scale=dims.latent**-0.5),
        random(length, *width),
        random(length, width[1]),
        random(length, width[0], scale=(width[0] * width[1]) ** -0.5),
    )
    q, kv, up, *index = (tensor.requires_grad_() for tensor in tensors)
    ks, ke = row_bounds(torch.tensor([0, length], device=device))
    return Inputs(
        dims=dims, topk=topk, q=q, kv=kv, up=up, index=(index[0], index[1], index[2]), ks=ks, ke=ke,
        grad=random(length, heads, dims.value),
    )  # fmt: skip


def tflop(inputs: Inputs, part: str) -> float:
    """Arithmetic that a part's result needs, in TFLOP: products of pairs of query and key that are seen or chosen."""
    dims, shape = inputs.dims, inputs.shape
    wide, absorbed = dims.nope + dims.rope, dims.latent + dims.rope
    index = dims.index_heads * dims.index_width
    columns = {
        "indexer": index * shape.seen,
        "indexer backward": 3 * index * shape.chosen,
        "masked": shape.heads * (wide + dims.value) * shape.seen,
        "masked backward": shape.heads * (3 * wide + 2 * dims.value) * shape.seen,
        "gather": shape.heads * (absorbed + dims.latent) * shape.chosen,
        "gather backward": shape.heads * (3 * absorbed + 2 * dims.latent) * shape.chosen,
        "target": shape.heads * absorbed * shape.chosen,
    }
    return 2e-12 * shape.queries * columns[part]

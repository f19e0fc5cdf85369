"""Random inputs of the sparse attention ops over the shapes of the zoo."""

from __future__ import annotations

import torch
from torch import Tensor

from loongforge.kernels.testing import Rows


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
    """Standard normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(shape, generator=generator, device="cpu")
    return numbers.to(torch.get_default_device(), dtype).requires_grad_(grad)


def bits_of(indices: Tensor, keys: int) -> Tensor:
    """Bit masks `[T, ceil(keys / 32)]` int32 of a selection, one bit after the other."""
    words = torch.zeros(len(indices), -(-keys // 32), dtype=torch.int64)
    for row, chosen in enumerate(indices.tolist()):
        for key in chosen:
            if 0 <= key < keys:
                words[row, key // 32] |= 1 << key % 32
    return (words - (words >= 2**31).long() * 2**32).int()


def sparse(rows: Rows, heads: int, latent: int, rope: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """q `[T, H, latent + rope]`, kv `[S, latent + rope]` and a selection with holes."""
    indices = rows.indices(holes=True)
    return {
        "q": normal(len(indices), heads, latent + rope, seed=1, dtype=dtype),
        "kv": normal(rows.keys, latent + rope, seed=2, dtype=dtype),
        "indices": indices,
    }


def masked(rows: Rows, heads: int, width: int, v_width: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """q, k, v, and the bits of a selection within the rows' bounds."""
    ks, ke = rows.bounds()
    return {
        "q": normal(len(ks), heads, width, seed=1, dtype=dtype),
        "k": normal(rows.keys, heads, width, seed=2, dtype=dtype),
        "v": normal(rows.keys, heads, v_width, seed=3, dtype=dtype),
        "bits": bits_of(rows.indices(), rows.keys),
        "ks": ks,
        "ke": ke,
    }

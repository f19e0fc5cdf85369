"""Optimizer state where megatron-core looks for it, buckets that end in padding included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def padding_kept(optimizer: Any) -> Iterator[None]:
    """Let the distributed optimizer describe its state rightly while this is open.

    Why: it joins its buckets without the padding between them and then cuts parameters out at their places with it.
    Behind a bucket that ends in padding every parameter is saved with its neighbour's numbers, without an error: with
    tied embeddings over pipeline stages, an odd vocabulary, or buckets that the data parallel size does not divide.
    Upstream: optimizer/distrib_optimizer.py get_parameter_state_dp_zero and sharded_param_state_fully_reshardable.
    How: put the padding back in what the first of them returns. Remove when: test_remove_padding_kept fails.
    """
    with ExitStack() as opened:
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            if hasattr(part, "get_parameter_state_dp_zero"):
                part.get_parameter_state_dp_zero = _padded(part, part.get_parameter_state_dp_zero)
                opened.callback(delattr, part, "get_parameter_state_dp_zero")
        yield


def _padded(part: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    def get_parameter_state_dp_zero(*arguments: Any, **named: Any) -> Any:
        found = original(*arguments, **named)
        if found is not None:
            for number, buffer in enumerate(part.buffers):
                for tensors in found[number].values():
                    for key, value in tensors.items():
                        if torch.is_tensor(value):
                            tensors[key] = _spread(value, buffer)
        return found

    return get_parameter_state_dp_zero


def _spread(joined: torch.Tensor, buffer: Any) -> torch.Tensor:
    """`[sum of unpadded buckets]` to `[numel of the buffer]`, every bucket at its own offset, zeros between."""
    whole = torch.zeros(buffer.numel, dtype=joined.dtype)
    begin = 0
    for bucket in buffer.buckets:
        whole[bucket.offset : bucket.offset + bucket.numel_unpadded] = joined[begin : begin + bucket.numel_unpadded]
        begin += bucket.numel_unpadded
    assert begin == joined.numel(), f"{begin} numbers in the buckets, {joined.numel()} saved"
    return whole

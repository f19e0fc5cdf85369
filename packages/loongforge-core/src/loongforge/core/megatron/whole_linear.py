"""A matrix without tensor parallelism."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


class WholeLinear(torch.nn.Module):
    """A matrix that every tensor parallel rank holds whole; no bias."""

    def __init__(self, input_size: int, output_size: int, config: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(
            torch.empty(output_size, input_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        if config.perform_initialization:
            config.init_method(self.weight)  # from the generator that agrees on all tensor parallel ranks
        # Tells megatron-core to sum its gradient over tensor parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
        """`[..., input]` to `[..., output]`, and no bias."""
        return F.linear(hidden, self.weight), None

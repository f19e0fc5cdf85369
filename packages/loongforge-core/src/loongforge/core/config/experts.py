"""How a mixture of experts trains: the `moe` section. What the model is, its balance loss included, its family says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from loongforge.core.config.bounds import below, refuse


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertConfig:
    """Options of mixture-of-experts layers besides those of the family; refused where the model has no experts."""

    moe_z_loss_coeff: float = 0.0
    """Factor of the router z-loss, the mean square of log-sum-exp of a token's logits (ST-MoE, 2022)."""
    moe_expert_capacity_factor: float | None = None
    """Tokens that an expert takes from one rank's part of a micro-batch, relative to an even share; what is beyond it
    is dropped (GShard, 2020). Nothing is dropped when unset."""
    moe_token_drop_policy: Literal["probs", "position"] = "probs"
    """Which tokens are dropped: those with the smallest weight for the expert, or the last ones."""
    moe_pad_expert_input_to_capacity: bool = False
    """Fill every expert's input up to its capacity, so that all sizes are fixed."""
    moe_token_dispatcher_type: Literal["alltoall", "allgather"] | None = None
    """How tokens get to their experts; alltoall when unset, where the platform's collectives can."""
    moe_grouped_gemm: bool | None = None
    """One matrix product for all experts of a rank instead of one for each; unset, where that is faster: on NVIDIA GPUs
    in bf16."""
    moe_shared_expert_overlap: bool = False
    """Compute the shared expert while tokens are on their way."""

    def __post_init__(self) -> None:
        problems = below(0, "moe", self, "moe_z_loss_coeff")
        factor = self.moe_expert_capacity_factor
        if factor is not None and factor <= 0:
            problems.append(f"moe.moe_expert_capacity_factor: must be above 0, got {factor!r}.")
        refuse(problems)

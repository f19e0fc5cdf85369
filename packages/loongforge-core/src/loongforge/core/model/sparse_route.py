"""Which of the exact routes of sparse attention a layer takes, and why: plain arithmetic, before torch is imported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from loongforge.core.errors import ConfigError
from loongforge.core.model.geometry import LatentGeometry
from loongforge.kernels.dsa_costs import ESTIMATED, Plan, Shape, Speeds, plan


def read_speeds(path: str) -> Speeds:
    """The table in a file; `ConfigError` where there is none."""
    try:
        return Speeds.load(Path(path))
    except (OSError, ValueError, TypeError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else problem
        raise ConfigError(
            f"model.foundation.dsa_speeds={path!r} is no table of speeds ({reason}): `loongforge bench kernels "
            "--speeds FILE` writes one, or leave it out for the estimate."
        ) from None


def sparse_route(latent: LatentGeometry, *, heads: int, queries: int, keys: int, longest: int | None = None) -> Plan:
    """For a row of `keys` tokens of which a rank has `queries`, and `heads` of the heads; `longest` is the longest
    document in it, None for the whole row.

    `masked` asked for is `causal` where nothing would be masked: the same, without making the mask.
    """
    index = latent.index
    assert index is not None, "asked of models with an indexer only"
    found = plan(
        Shape(
            queries=queries, keys=keys, heads=heads, topk=index.topk, longest=longest, latent=latent.kv_lora_rank,
            rope=latent.qk_rope_head_dim, nope=latent.qk_nope_head_dim, value=latent.v_head_dim,
        ),
        ESTIMATED if index.speeds is None else index.speeds,
    )  # fmt: skip
    if index.warmup:
        return replace(found, route="causal", reason="dsa_indexer_warmup: every key is attended to")
    if index.route == "auto" or (index.route == "masked" and found.route == "causal"):
        return found
    return replace(found, route=index.route, reason=f"as dsa_route={index.route!r} says")

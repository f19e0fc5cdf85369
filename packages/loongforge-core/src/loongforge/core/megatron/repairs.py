"""Repairs of megatron-core for any device, each guarded by what is missing, mostly TransformerEngine."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

from loongforge.core.platform.substitution import ORIGINAL, Substitution, install


def install_repairs() -> None:
    """Install what applies here."""
    install(repairs())


def repairs() -> tuple[Substitution, ...]:
    """The repairs that this environment needs; with TransformerEngine, rotation by three rows of position ids alone."""
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.tensor_parallel import random

    from loongforge.core.megatron import many_tensors

    found: list[Substitution] = []
    if not random.HAVE_TE:
        why = "selective recompute asks TransformerEngine whether FP8 is on, and the name is absent without it"
        upstream, remove_when = (
            "tensor_parallel/random.py CheckpointWithoutOutput",
            "the question is guarded by HAVE_TE",
        )
        found += [
            Substitution(owner=random, name=name, make=make, why=why, upstream=upstream, remove_when=remove_when)
            for name, make in (
                ("FP8GlobalStateManager", lambda original: type("NoFP8", (_NoFP8,), {})),
                ("activation_recompute_forward", lambda original: _no_context),
                ("fp8_autocast", lambda original: lambda *args, **kwargs: contextlib.nullcontext()),
            )
        ]
    found += (*_rotary_repairs(), *many_tensors.substitutions())
    if not distrib_optimizer.HAVE_APEX_OR_TE:
        found.append(
            Substitution(
                owner=distrib_optimizer.DistributedOptimizer,
                name="_set_main_param_and_optimizer_states",
                make=_with_step,
                why="torch AdamW keeps `step` in its state, which a sharded load does not supply: KeyError",
                upstream="optimizer/distrib_optimizer.py",
                remove_when="loading the distributed optimizer works with torch AdamW",
            )
        )
    return tuple(found)


def _rotary_repairs() -> list[Substitution]:
    from megatron.core.models.common.embeddings import rope_utils

    from loongforge.core.megatron import rope
    from loongforge.core.megatron.ops import kernels

    present = rope_utils.fused_apply_rotary_pos_emb
    if hasattr(present, ORIGINAL):
        return []  # installed already
    ours = rope.Rotation(kernels().op("rope"))  # by the device and dtype of what is turned
    if present is None:
        why = "the fused rotary embedding has no implementation without TransformerEngine; ours reads memory once"
        remove_when = "the implementation can be passed to the attention layer"
        makers = (lambda _: partial(ours), lambda _: partial(ours.packed))
    else:
        why = "TransformerEngine's fused rotary embedding takes angles by place only, not each token's own"
        remove_when = "TransformerEngine takes angles [S, B, 1, R], and each token's own for packed rows"
        makers = (partial(rope.unless_of_each_token, ours=ours), partial(rope.unless_of_each_token_packed, ours=ours))
    names = ("fused_apply_rotary_pos_emb", "fused_apply_rotary_pos_emb_thd")
    plain = Substitution(
        owner=rope_utils, name="_apply_rotary_pos_emb_thd", remove_when="it asks the device for no length",
        make=lambda original: rope.PlainRotation(rope_utils._apply_rotary_pos_emb_bshd),
        why="latent attention, which is not fused, waits in every layer for the lengths of a packed row's documents, "
        "and turns one after the other", upstream="models/common/embeddings/rope_utils.py",
    )  # fmt: skip
    return [plain] + [
        Substitution(owner=rope_utils, name=name, make=make, why=why, remove_when=remove_when,
                     upstream="models/common/embeddings/rope_utils.py")
        for name, make in zip(names, makers, strict=True)
    ]  # fmt: skip


class _NoFP8:
    @staticmethod
    def is_fp8_enabled() -> bool:
        return False

    @staticmethod
    def get_fp8_recipe() -> None:
        return None


def _no_context(activation_recompute: bool = False, recompute_phase: bool = False) -> Any:
    return contextlib.nullcontext()


def _with_step(original: Any) -> Any:
    def set_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> Any:
        tensors.setdefault("step", None)  # megatron-core restores the common step by itself afterwards
        return original(self, model_param, tensors)

    return set_states

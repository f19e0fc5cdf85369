"""transformers as somebody would tune it: fused attention, Liger's kernels, a fused optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from loongforge.ckpt.bench.step.case import CLIP, LEARNING_RATE, WEIGHT_DECAY, Case, Unable
from loongforge.ckpt.bench.step.worker import Step
from loongforge.core.platform import choose

if TYPE_CHECKING:
    import torch

ATTENTION = {"flash_attn_interface": "flash_attention_3", "flash_attn": "flash_attention_2"}
"""Package to what transformers calls its attention; the first that is installed."""


def prepare() -> None:
    """Import what a case needs; nothing of the trainer's reaches this process."""
    import transformers.modeling_utils  # noqa: F401
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def halved(case: Case) -> Iterator[tuple[Step, str]]:
    """Weights and optimizer state in the compute type: the quickest, and in bf16 small updates are rounded away."""
    with _step(case, "transformers", autocast=False) as found:
        yield found


@contextmanager
def autocast(case: Case) -> Iterator[tuple[Step, str]]:
    """fp32 weights under torch's autocast, as transformers' Trainer does with `bf16=True`: the precision of ours."""
    if case.config.train.precision != "bf16":
        raise Unable("in fp32 it is the side `transformers`")
    with _step(case, "transformers-autocast", autocast=True) as found:
        yield found


@contextmanager
def _step(case: Case, side: str, *, autocast: bool) -> Iterator[tuple[Step, str]]:
    import torch

    from loongforge.ckpt.bench.step.drawn import Drawn, fill_transformers

    device = choose().platform().device(0)
    bf16 = case.config.train.precision == "bf16"
    attention = _attention(device)
    model = _model(case, device, torch.bfloat16 if bf16 and not autocast else torch.float32, attention)
    liger = _use_liger(model, device)
    fill_transformers(model, Drawn(seed=case.config.train.seed, device=device, disturbed=case.disturbed == side))
    recompute = case.config.parallel.recompute_granularity is not None
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = _optimizer(model)

    def step(batch: Any, number: int) -> tuple[Any, Any]:
        here = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        labels = here["labels"].masked_fill(here["loss_mask"] == 0, -100)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext():
            # shift_labels: transformers' own loss without shifting again. Positions that begin anew mark documents.
            places = {"position_ids": here["position_ids"]} if case.documents > 1 else {}
            loss = model(
                input_ids=here["tokens"], labels=labels, shift_labels=labels, use_cache=False, **places
            ).loss  # fmt: skip
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return loss.detach(), norm

    weights = "fp32 weights" if autocast or not bf16 else "bf16 weights without an fp32 copy"
    words = [attention, liger, "fused AdamW", weights, *(["gradient checkpointing"] if recompute else [])]
    yield step, ", ".join(words)


def _attention(device: torch.device) -> str:
    if device.type != "cuda":
        return "sdpa"
    return next((name for package, name in ATTENTION.items() if find_spec(package)), "sdpa")


def _model(case: Case, device: torch.device, dtype: torch.dtype, attention: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    written = case.config.model.foundation.geometry.to_hf()
    # Tokens that end a text have no place in a vocabulary made small, and nothing is generated.
    written |= {name: None for name in written if name.endswith("_token_id")}
    config = AutoConfig.for_model(**written)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    return model.to(dtype).train()


def _use_liger(model: Any, device: Any) -> str:
    """Patch the model where Liger is installed and runs: rotation, norms, gated MLP, output matrix with the loss."""
    if device.type != "cuda" or find_spec("liger_kernel") is None:
        return "no Liger" if device.type == "cuda" else "Liger needs a GPU"
    # By name: the package is absent where types are checked.
    import_module("liger_kernel.transformers")._apply_liger_kernel_to_instance(model)
    return "Liger"


def _optimizer(model: Any) -> torch.optim.Optimizer:
    """Matrices decay, vectors do not, as in Megatron."""
    import torch

    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=True)

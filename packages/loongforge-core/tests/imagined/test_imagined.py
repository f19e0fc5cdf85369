"""What a training step asks of a GPU, without one: where its host waits, what it sends, which kernels it launches.

Every place is expected with how often a step comes there and, beside its name, with the reason. A wait that a layer
brings along, or a micro-batch, is a defect unless megatron-core's way needs it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

LOSS = "loongforge/core/step/forward.py _global_means: reads"
"""The loss, and how many tokens it is of, for the step's line and the check that it is finite."""
NORM = "megatron/core/optimizer/clip_grads.py get_grad_norm_fp32: reads"
"""The norm of the gradients, which decides about clipping and about going on."""
BATCH = "loongforge/core/step/batch.py mine: sends"
"""Tokens, labels, mask and positions of a micro-batch; nobody waits."""

LAYERS = 2
NORMS = {"rms_norm.triton._forward": 4 * LAYERS + 1, "rms_norm.triton._backward": 4 * LAYERS + 1}
"""Of Qwen3: before attention and MLP, of queries and keys, and the last."""
QWEN3 = {
    **NORMS,
    "rope.triton._turn": 4 * LAYERS,  # queries and keys, there and back
    "swiglu.triton._forward": LAYERS,
    "swiglu.triton._backward": LAYERS,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run and what its second step asks for."""

    flags: str
    waits: Mapping[str, int] = field(default_factory=lambda: {LOSS: 1, NORM: 1})
    copies: Mapping[str, int] = field(default_factory=lambda: {BATCH: 4})
    launches: Mapping[str, int]
    ops: Mapping[str, int] = field(default_factory=dict)
    strays: Mapping[str, int] = field(default_factory=dict)


CASES = {
    "dense": Case(flags="--model-name qwen3-0.6b --micro-batch-size 2", launches=QWEN3),
    "recompute": Case(
        flags="--model-name qwen3-0.6b --recompute-granularity selective --recompute-modules core_attn layernorm mlp",
        # two norms and the activation of every layer once more
        launches=QWEN3 | {"rms_norm.triton._forward": 6 * LAYERS + 1, "swiglu.triton._forward": 2 * LAYERS},
    ),
    "distributed optimizer": Case(
        flags="--model-name qwen3-0.6b --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
        launches=QWEN3,
    ),
}
COMMON = f"--num-layers {LAYERS} --seq-length 64 --bf16 --train-iters 4"


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """What the second step of every case asked for, or the error that ended it."""
    found = tmp_path_factory.mktemp("imagined") / "found.json"
    cases = {name: [*COMMON.split(), *case.flags.split()] for name, case in CASES.items()}
    subprocess.run(
        [sys.executable, str(Path(__file__).with_name("imagined.py")), str(found)],
        input=json.dumps(cases), text=True, check=True, timeout=500, env={**os.environ, "LOONGFORGE_PLATFORM": "cpu"},
    )  # fmt: skip
    return json.loads(found.read_text())


@pytest.mark.parametrize("name", CASES)
def test_a_step_waits_sends_and_launches_what_it_has_to(name: str, steps: Mapping[str, Any]) -> None:
    step, case = steps[name], CASES[name]
    assert isinstance(step, dict), step
    assert step == {what: dict(getattr(case, what)) for what in step}

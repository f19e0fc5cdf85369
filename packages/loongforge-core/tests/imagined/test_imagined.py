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

# Waits.
LOSS = "loongforge/core/step/forward.py _global_means: reads"
"""The loss, and how many tokens it is of, for the step's line and the check that it is finite."""
NORM = "megatron/core/optimizer/clip_grads.py get_grad_norm_fp32: reads"
"""The norm of the gradients, which decides about clipping and about going on; of every component's optimizer."""
ROUTERS = "loongforge/core/megatron/expert_numbers.py take_expert_numbers: reads"
"""How tokens spread over experts, of all layers at once, for the step's line."""
INDEXERS = "loongforge/core/megatron/indexer.py take_index_losses: reads"
"""The losses of all indexers at once, for the step's line."""
DISPATCH = "megatron/core/transformer/moe/token_dispatcher.py _maybe_dtoh_and_synchronize: synchronizes"
"""megatron-core's dispatcher cuts its buffers on the host, by how many tokens every expert has: once a layer."""

# Copies that nobody waits for.
BATCH = "loongforge/core/step/batch.py mine: sends"
"""Tokens, labels, mask and positions of a micro-batch; three of them once more for each further prediction layer."""
DOCUMENTS = "loongforge/core/megatron/layers.py of: sends"
"""Where the documents of a packed row end, once for all its layers."""
PARTS = "loongforge/kernels/packed_attention/parts.py _ends: sends"
"""The same for attention, where keys end as queries do; and where the images of an encoder end."""
SIGHT = "loongforge/core/megatron/row_parts.py of: sends"
"""The same for layers that choose keys; where rows are not packed, two numbers in each layer."""
SPLITS = "megatron/core/transformer/moe/moe_utils.py maybe_move_tensor_to_cpu: reads"
"""What `DISPATCH` waits for: two tensors a layer."""
GROUPS = "loongforge/kernels/grouped_linear/grouped_mm.py forward: sends"
"""Where the rows of each expert end, for the two products of a layer."""
IMAGES = {
    "loongforge/core/model/omni.py _made: sends": 1,  # patches of all images
    "loongforge/models/vision/patch_grid.py angles: sends": 1,  # rows and columns of patches
    "loongforge/models/vision/patch_grid.py <genexpr>: sends": 2,  # four neighbours of learned positions, and shares
    "loongforge/core/exchange/move.py of: sends": 2,  # which features a rank hands out, and their order when they come
    "loongforge/core/model/omni.py _places: sends": 1,  # of features among the tokens
}

LAYERS = 2


def norms(count: int, frozen: int = 0) -> dict[str, int]:
    """Of which `frozen` have nothing before them that learns."""
    return {"rms_norm.triton._forward": count, "rms_norm.triton._backward": count - frozen}


def gated(count: int) -> dict[str, int]:
    """Activations of MLPs, of experts together, of shared experts."""
    return {"swiglu.triton._forward": count, "swiglu.triton._backward": count}


def turned(count: int) -> dict[str, int]:
    """Queries and keys, there and back."""
    return {"rope.triton._turn": 4 * count}


LOGITS = {"cross_entropy.triton._forward": 1}
"""Between the products of `linear_cross_entropy`, which makes its gradients on the way: one block of tokens."""
QWEN3 = norms(4 * LAYERS + 1) | turned(LAYERS) | gated(LAYERS) | LOGITS
"""Norms before attention and MLP, of queries and keys, and the last."""
LATENT = norms(4 * LAYERS + 1) | gated(1 + 2) | LOGITS
"""One dense layer and one with a shared expert; megatron-core rotates in torch here. As many norms, of latents."""
CHOSEN = {"indexer_logits.triton._logits": LAYERS, "select_topk.triton._select": LAYERS}
MASKED = CHOSEN | {
    "selection_bits.triton._set": LAYERS,
    "masked_mha.triton._forward": LAYERS,
    "masked_mha.triton._backward_q": LAYERS,
    "masked_mha.triton._backward_kv": LAYERS,
}
TAUGHT = {
    "indexer_kl.triton._forward": LAYERS,
    "indexer_kl.triton._backward": LAYERS,
    "gather_scores.triton._backward": LAYERS,
}
GATHERED = CHOSEN | {
    "sparse_mla.triton._forward": LAYERS,
    "sparse_mla.triton._backward_scores": LAYERS,
    "sparse_mla.triton._backward_products": 2 * LAYERS,  # for queries and for keys
}


def ops(*names: str) -> dict[str, int]:
    """Each once a layer."""
    return dict.fromkeys(names, LAYERS)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run and what its second step asks for."""

    flags: str
    waits: Mapping[str, int] = field(default_factory=dict)
    """Besides those of every step."""
    copies: Mapping[str, int] = field(default_factory=dict)
    """Besides those of every step."""
    launches: Mapping[str, int]
    ops: Mapping[str, int] = field(default_factory=dict)

    def expected(self) -> dict[str, dict[str, int]]:
        """As it is written down; no tensor goes astray."""
        waits, copies = {LOSS: 1, NORM: 1} | dict(self.waits), {BATCH: 4} | dict(self.copies)
        return {"waits": waits, "copies": copies, "launches": dict(self.launches), "ops": dict(self.ops), "strays": {}}


def experts(layers: int) -> dict[str, Any]:
    """What layers with experts bring along."""
    return {"waits": {ROUTERS: 1, DISPATCH: layers}, "copies": {SPLITS: 2 * layers, GROUPS: 2 * layers}}


PACKED = "--training-phase sft"
SPARSE = "--model-name deepseek-v3.2 model.foundation.first_dense_layers=1 --num-experts 16 --dsa-indexer-topk 16"
CASES = {
    "dense": Case(flags="--model-name qwen3-0.6b --micro-batch-size 2", launches=QWEN3),
    "overlap and recompute": Case(
        flags="--model-name qwen3-0.6b --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather "
        "--recompute-granularity selective --recompute-modules core_attn layernorm mlp",
        # two norms and the activation of every layer once more
        launches=QWEN3 | {"rms_norm.triton._forward": 6 * LAYERS + 1, "swiglu.triton._forward": 2 * LAYERS},
    ),
    "packed": Case(flags=f"--model-name qwen3-0.6b {PACKED}", copies={DOCUMENTS: 1, PARTS: 1}, launches=QWEN3),
    "adapters": Case(
        flags="--model-name qwen3-0.6b --lora-rank 8",
        launches=QWEN3 | norms(4 * LAYERS + 1, frozen=1),  # the first layer's input has no gradient
    ),
    "experts": Case(flags="--model-name qwen3-30b-a3b --num-experts 16", launches=QWEN3, **experts(LAYERS)),
    "latent attention, further predictions": Case(
        flags="--model-name deepseek-v3 model.foundation.first_dense_layers=1 --num-experts 16 --mtp-num-layers 1",
        waits={ROUTERS: 1, DISPATCH: 2},
        copies={SPLITS: 4, GROUPS: 4, BATCH: 4 + 3},
        # a third layer, with norms of its two inputs and its output
        launches=norms(4 * (LAYERS + 1) + 1 + 3) | gated(1 + 2 + 2) | {"cross_entropy.triton._forward": 2},
    ),
    "sparse attention that learns": Case(
        flags=f"{SPARSE} --dsa-indexer-loss-coeff 0.01",
        waits={ROUTERS: 1, INDEXERS: 1, DISPATCH: 1},
        copies={SIGHT: LAYERS, SPLITS: 2, GROUPS: 2},
        launches=LATENT | MASKED | TAUGHT,
        ops=ops(
            "lightning_indexer",
            "selection_bits",
            "masked_mha",
            "masked_mha_backward",
            "indexer_divergence",
            "indexer_divergence_backward",
            "gather_scores_backward",
        ),
    ),
    "sparse attention in packed rows, gathering": Case(
        flags=f"{SPARSE} {PACKED} --dsa-route gather",
        waits={ROUTERS: 1, DISPATCH: 1},
        copies={DOCUMENTS: 1, SIGHT: 1, SPLITS: 2, GROUPS: 2},
        launches=LATENT | GATHERED,
        ops=ops("lightning_indexer", "sparse_mla", "sparse_mla_backward"),
    ),
    "gated delta rule": Case(
        # without flash-linear-attention the rule and its norm are torch's
        flags="--model-name qwen3-next-80b-a3b --num-experts 16 model.foundation.linear_attention_freq=2",
        launches=norms(8) | turned(1) | gated(2 * LAYERS) | LOGITS,
        **experts(LAYERS),
    ),
    "images": Case(
        flags=f"--model-name qwen3-vl-2b {PACKED} --min-pixels 1024 --max-pixels 4096 "
        "model.image_encoder.num_layers=4 model.image_encoder.deepstack_layers=[1]",
        waits={NORM: 2},
        copies={DOCUMENTS: 1, PARTS: 2, **IMAGES},
        launches=QWEN3 | turned(LAYERS + 4),
    ),
}
COMMON = f"--num-layers {LAYERS} --seq-length 64 --bf16 --train-iters 4 --global-batch-size"


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """What the second step of every case asked for, or the error that ended it."""
    found = tmp_path_factory.mktemp("imagined") / "found.json"
    cases = {
        name: [*COMMON.split(), "2" if "micro-batch" in case.flags else "1", *case.flags.split()]
        for name, case in CASES.items()
    }
    subprocess.run(
        [sys.executable, str(Path(__file__).with_name("imagined.py")), str(found)],
        input=json.dumps(cases), text=True, check=True, timeout=500, env={**os.environ, "LOONGFORGE_PLATFORM": "cpu"},
    )  # fmt: skip
    return json.loads(found.read_text())


@pytest.mark.parametrize("name", CASES)
def test_a_step_waits_sends_and_launches_what_it_has_to(name: str, steps: Mapping[str, Any]) -> None:
    assert steps[name] == CASES[name].expected()


def test_every_way_to_ask_the_device_is_noticed(steps: Mapping[str, Any]) -> None:
    """Four scalars, a list and a tensor are read; a literal and a copy are sent; an index of the host is a stray."""
    assert steps["asked"] == {
        "waits": {"torch: reads": 6, "torch: sends": 2, "torch: synchronizes": 1},
        "copies": {"torch: reads": 1, "torch: sends": 1},
        "launches": {},
        "ops": {},
        "strays": {"aten.index.Tensor in torch": 1},
    }

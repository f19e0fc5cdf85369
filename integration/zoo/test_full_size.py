"""Every shipped size as it is released: built whole without memory, counted, its table laid over the released index."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from index import index_of
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from loongforge.core import plugins
from loongforge.core.config.resolve import resolve

sys.path.insert(0, str(Path(__file__).parents[2] / "packages/loongforge-models/tests/foundations"))
from released import FAMILIES, SIZES

UNSEEN = ("bos_token_id", "eos_token_id", "max_position_embeddings", "rope_theta")
"""Keys of a `config.json` that change no tensor."""
BUFFERS = "e_score_correction_bias"
"""Tensors that a count of parameters leaves out."""


class Meta(TorchFunctionMode):
    """Shapes without memory, also where megatron-core names a device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _device_constructors():
            kwargs["device"] = torch.device("meta")
        return func(*args, **kwargs)


@cache
def run_of(size: str, *flags: str) -> Any:
    return resolve(["--model-name", size, "--train-iters", "1", *flags], note=lambda _: None)


def tensors_of(worker: Any, size: str, flags: tuple[str, ...] = ()) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Names and shapes of the Hugging Face tensors behind the parameters of one process, and parameters without any."""
    from loongforge.ckpt.hf.parameters import collect
    from loongforge.core.checkpoint.contract import WeightPart
    from loongforge.core.megatron.groups import join
    from loongforge.core.megatron.specs import layers_for
    from loongforge.core.megatron.transformer_config import compute_type, transformer_config
    from loongforge.core.model.contract import BuildContext
    from loongforge.core.plan import Plan
    from loongforge.core.platform import choose

    plan = Plan.of(run_of(size, *flags), 1)
    component = plan.config.model.foundation
    family = plugins.load("models", component.family)
    with join(plan.layout, worker, choose().platform(), 3.0) as world:
        layers = layers_for(world.platform, compute_type(plan.config.train))
        context = BuildContext(
            config=transformer_config(plan.geometry, plan.config, plan.layout, layers, initialise=False),
            groups=world.groups, layers=layers, padded_vocab_size=plan.padded_vocab_size, seq_length=plan.seq_length,
            pre_process=True, post_process=True, vp_stage=None,
        )  # fmt: skip
        with Meta():
            chunk = family.build()(component.geometry, context)
        part = WeightPart(
            component="foundation", chunks=[chunk], table=family.weights()(component.geometry), groups=world.groups,
            vocab_size=plan.geometry.vocab_size,
        )  # fmt: skip
        parameters, orphans = collect(part)
        shapes: dict[str, tuple[int, ...]] = {}
        for parameter in parameters:
            assert parameter.tensor.is_meta, f"{parameter.name} takes memory"
            shapes |= {name: tuple(shape) for name, shape in parameter.hf_shapes().items()}
        return shapes, orphans


@pytest.fixture(scope="module")
def built(megatron: Any) -> Callable[[str], tuple[dict[str, tuple[int, ...]], list[str]]]:
    """`tensors_of` a size; releases that differ in what no tensor shows are built once."""
    from loongforge.core.testing import run_distributed

    kept: dict[str, Any] = {}

    def of(size: str) -> Any:
        config = run_of(size).model.foundation.geometry.to_hf()  # resolved before the worker is forked
        shape = json.dumps({key: value for key, value in config.items() if key not in UNSEEN}, sort_keys=True)
        if shape not in kept:
            (kept[shape],) = run_distributed(partial(tensors_of, size=size), 1)
        return kept[shape]

    return of


@pytest.mark.parametrize(("family", "size"), SIZES)
def test_model_and_table_are_the_released_checkpoint(family: str, size: str, built: Any) -> None:
    expected = index_of(run_of(size).model.foundation.geometry.to_hf())
    shapes, orphans = built(size)
    assert orphans == []
    assert shapes.keys() == expected.keys(), sorted(shapes.keys() ^ expected.keys())[:5]
    assert {name: shape for name, shape in shapes.items() if shape != expected[name]} == {}
    counted = sum(math.prod(shape) for name, shape in shapes.items() if not name.endswith(BUFFERS))
    assert counted == FAMILIES[family].parameters[size]


FURTHER = {
    "deepseek_v3": 11_610_067_968,
    "glm_4_5_air_106b_a12b": 2_375_059_456,
    "qwen3_next_80b_a3b": 1_650_471_424,
    "mimo_7b": 210_790_400,
}
"""Parameters of the further layer, the copies of embedding and output matrix left out, from its matrices by hand."""


@pytest.mark.parametrize("size", FURTHER)
def test_its_further_layer_too(size: str, megatron: Any) -> None:
    from loongforge.core.plan import Plan
    from loongforge.core.plan.parameters import count_parameters
    from loongforge.core.testing import run_distributed

    flags = ("--mtp-num-layers", "1")
    ((shapes, orphans),) = run_distributed(partial(tensors_of, size=size, flags=flags), 1)
    config = run_of(size, *flags).model.foundation.geometry.to_hf()
    expected = index_of({**config, "num_nextn_predict_layers": 1})
    assert orphans == []
    assert shapes == expected
    plain, plan = Plan.of(run_of(size), 1), Plan.of(run_of(size, *flags), 1)
    rows = plain.geometry.vocab_size
    assert count_parameters(plan.geometry, rows) - count_parameters(plain.geometry, rows) == FURTHER[size]


@pytest.mark.parametrize(("family", "size"), SIZES)
def test_plan_of_it_counts_the_same(family: str, size: str) -> None:
    from loongforge.core.plan import Plan
    from loongforge.core.plan.parameters import count_parameters
    from loongforge.core.plan.report import report

    flags = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
    if run_of(size).model.foundation.geometry.geometry().experts is not None:
        flags += ["--expert-model-parallel-size", "8", "--expert-tensor-parallel-size", "1"]
    plan = Plan.of(run_of(size, *flags), 16)
    assert count_parameters(plan.geometry, plan.geometry.vocab_size) == FAMILIES[family].parameters[size]
    found = report(plan)
    assert found.components[-1].parameters >= FAMILIES[family].parameters[size]  # with the padding of the vocabulary
    assert found.peak_bytes > 0
    assert found.flops_per_token > 0

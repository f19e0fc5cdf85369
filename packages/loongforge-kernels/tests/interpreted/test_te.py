"""TransformerEngine's Triton kernel behind our signature against our reference in fp64, where its Python is installed.

Its other kernels are CUDA. CI has none of it: there `test_peers_te.py` checks how the adapters call what
`peers_recorded.py` has of it. To run it, without the extension that needs a GPU's toolkit to be built:
`uv run --with transformer-engine==2.20.2 pytest -n0 packages/loongforge-kernels/tests/test_interpreted.py -k '[te]'`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
from dsa_inputs import normal
from peers_recorded import TE

from loongforge.kernels.cross_entropy.reference import cross_entropy as truth
from loongforge.kernels.peers import te
from loongforge.kernels.testing import assert_matches

pytestmark = pytest.mark.skipif(find_spec("transformer_engine") is None, reason="needs pip install transformer-engine")
RATIO = {torch.float32: 4e-7, torch.bfloat16: 5e-3}
"""Measured 4.7e-8 and 2.4e-3 at most."""
PLACE = "transformer_engine.pytorch.cross_entropy"


@pytest.fixture(autouse=True)
def interpreted() -> Iterator[None]:
    """Packages whose own `__init__` would load the extension are empty ones here, and tensors may be on a CPU."""
    found = find_spec("transformer_engine")
    assert found is not None
    assert found.submodule_search_locations is not None
    root = Path(found.submodule_search_locations[0])
    modules: dict[str, ModuleType] = {}
    for name in ("", ".pytorch", ".pytorch.triton", ".common", ".common.triton"):
        modules[f"transformer_engine{name}"] = package = ModuleType(f"transformer_engine{name}")
        package.__path__ = [str(root.joinpath(*name.split(".")))]
    modules["transformer_engine.pytorch.jit"] = jit = ModuleType("transformer_engine.pytorch.jit")
    vars(jit)["no_torch_dynamo"] = lambda: lambda function: function
    with mock.patch.dict(sys.modules, modules), mock.patch.object(import_module(PLACE), "_validate_inputs"):
        yield


@pytest.mark.parametrize("dtype", RATIO, ids=str)
@pytest.mark.parametrize("vocabulary", [17, 40000])
def test_cross_entropy(vocabulary, dtype):
    labels = torch.randint(vocabulary, (3, 5), generator=torch.Generator().manual_seed(1))
    labels.view(-1)[::4] = -100
    logits = normal(3, 5, vocabulary, seed=1, dtype=dtype)
    before = logits.detach().clone()
    mine, right = (partial(op, labels=labels) for op in (te.cross_entropy, truth))
    assert_matches(mine, right, {"logits": logits}, RATIO[dtype])
    assert torch.equal(logits, before)


def test_its_signature_is_the_one_recorded():
    parameters = list(inspect.signature(import_module(PLACE).parallel_cross_entropy).parameters)
    recorded = TE[PLACE, "parallel_cross_entropy"]
    assert tuple(parameters[: len(recorded)]) == recorded

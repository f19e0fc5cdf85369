"""What an extra of loongforge-models promises, out of built wheels in a clean environment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

EXTRAS = ("qwen", "llama", "deepseek", "glm", "internlm", "minimax", "mimo")
"""Extras that install other wheels of ours; `test_no_extra_is_forgotten` keeps the list whole."""

LIST = "import sys; from loongforge.core.cli import main; sys.exit(main(sys.argv[1:]))"
FAMILIES = """
import json
from loongforge.core import plugins
rows = [pick[0] for pick in plugins.registered("models").values()]
print(json.dumps([[one.name, one.spec.extra, one.spec.role, one.state(), list(one.spec.sizes)] for one in rows]))
"""
ABSENT = "import importlib.util, sys; print([n for n in sys.argv[1:] if importlib.util.find_spec(n) is not None])"
TINY = (
    "model.foundation.num_layers=2", "model.foundation.hidden_size=64", "model.foundation.ffn_hidden_size=96",
    "model.foundation.num_attention_heads=4", "model.foundation.num_query_groups=2", "model.foundation.kv_channels=16",
    "model.foundation.vocab_size=256",
)  # fmt: skip


@pytest.fixture
def environment(clean: Any, request: pytest.FixtureRequest) -> Any:
    """The clean environment with `loongforge-models[extra]` and nothing else."""
    clean.install_extra("models", request.param)
    return clean


def test_no_extra_is_forgotten(built: Any) -> None:
    assert sorted(built["models"].metadata.get_all("Provides-Extra")) == sorted(EXTRAS)


@pytest.mark.slow
@pytest.mark.parametrize(("environment", "extra"), [(one, one) for one in EXTRAS], indirect=["environment"])
def test_families_of_an_extra_are_ready_and_plan(environment: Any, extra: str, tmp_path: Path) -> None:
    rows = json.loads(environment.run(FAMILIES))
    own = [row for row in rows if row[1] == extra and row[2] == "foundation"]
    assert own, f"no language model names the extra {extra!r}: remove it"
    for name, _, _, state, sizes in own:
        assert state == "ready", name
        words = ("plan", "--model-name", sizes[0], "--train-iters", "1", "--json")
        assert json.loads(environment.run(LIST, *words))["components"]
    # The reference of the parity tests is no part of training.
    assert environment.run(ABSENT, "transformers", "peft").strip() == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("environment", ["qwen"], indirect=True)
def test_qwen_trains_from_its_extra_alone(environment: Any, tmp_path: Path) -> None:
    words = ("--fp32", "--seq-length", "32", "--train-iters", "2", "--global-batch-size", "2", "--mock-data")
    save = ("--save", str(tmp_path / "run"), "--save-hf", "true")
    out = environment.run(LIST, "train", "--model-name", "qwen3_0_6b", *words, *save, *TINY)
    assert "step 2/2" in out
    assert json.loads((tmp_path / "run/hf/config.json").read_text())["hidden_size"] == 64
    again = ("--load", str(tmp_path / "run/hf"), *words)
    assert "step 2/2" in environment.run(LIST, "train", *again)

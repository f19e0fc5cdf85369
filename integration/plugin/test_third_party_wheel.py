"""A wheel that we did not make adds a model to an installed LoongForge: list, show, train, export, conform, remove."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

SHAPE = ("--fp32", "--seq-length", "32", "--train-iters", "4", "--global-batch-size", "4", "data.source=mock")

PARAMETERS = 512 * 64 + 4 * (2 * 64 + 2 * 64 * 64 + 2 * 32 * 64 + 3 * 176 * 64) + 64
"""Of acme-llama-tiny: tied embedding; norms, query and output, key and value, MLP of four layers; last norm."""


def models(user: Any) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(user.run("loongforge", "list", "models", "--json"))}


def test_nothing_comes_from_a_source_tree(user: Any) -> None:
    code = "import acme_llama, loongforge.core as core; print(acme_llama.__file__, core.__file__)"
    for file in user.run("python", "-c", code).split():
        assert Path(file).is_relative_to(user.folder), file


def test_it_is_listed_and_shown(user: Any) -> None:
    row = models(user)["acme_llama"]
    assert (row["state"], row["owner"]) == ("ready", "acme-llama 0.3.0")
    shown = user.run("loongforge", "show", "models", "acme_llama")
    for text in ("acme-llama 0.3.0", "acme_llama_tiny", "acme_llama_1b", "LlamaForCausalLM"):
        assert text in shown, shown


def test_it_trains_saves_and_exports(user: Any, tmp_path: Path) -> None:
    save = tmp_path / "run"
    out = user.run(
        "loongforge", "train", "--model-name", "acme-llama-tiny", "--nproc-per-node", "2",
        "--tensor-model-parallel-size", "2", "--save", save, "--save-hf", "true", *SHAPE,
    )  # fmt: skip
    assert "step 4/4" in out, out
    assert (save / "latest").read_text().strip() == "step_00000004"
    config = json.loads((save / "hf" / "config.json").read_text())
    assert (config["architectures"], config["hidden_size"]) == (["LlamaForCausalLM"], 64)
    # The export is a checkpoint of this family again; ours claims the architecture too, so the user says whose.
    plan = ("loongforge", "plan", "--load", save / "hf", *SHAPE, "--json")
    assert "is claimed by acme_llama of acme-llama 0.3.0 and llama of loongforge-models" in user.run(*plan, code=2)
    (again,) = json.loads(user.run(*plan, "model.foundation.family=acme-llama:acme_llama"))["components"]
    assert (again["family"], again["parameters"]) == ("acme-llama:acme_llama", PARAMETERS), again


def test_it_conforms(user: Any) -> None:
    report = user.run("python", "-c", "from loongforge.core.testing import *; print(check_family('acme_llama'))")
    lines = report.splitlines()
    assert lines[0] == "acme_llama of acme-llama 0.3.0 conforms:"
    assert len(lines) == 11, report
    assert all(line.startswith("passed ") for line in lines[1:]), report


def test_an_encoder_comes_the_same_way(user: Any, tmp_path: Path) -> None:
    row = models(user)["acme_vit"]
    assert (row["state"], row["owner"]) == ("ready", "acme-vision 0.3.0")
    words = ("--model-name", "acme-vl-tiny", "--save", tmp_path / "run", "--save-hf", "true", "--max-pixels", "12544")
    out = user.run("loongforge", "train", *words, "--fp32", "--seq-length", "256", "--train-iters", "2", "--mock-data")
    assert "step 2/2" in out, out
    assert sorted(path.name for path in (tmp_path / "run/hf").iterdir()) == [
        "foundation", "image_encoder", "image_projector",
    ]  # fmt: skip


def test_removing_the_wheel_removes_the_model(user: Any) -> None:
    user.remove_acme()
    try:
        assert "acme_llama" not in models(user)
        error = user.run("loongforge", "train", "--model-name", "acme-llama-tiny", *SHAPE, code=2)
        assert "no model 'acme-llama-tiny'" in error, error
    finally:
        user.install_acme()

"""From a command line to a run: sources of the model, precedence, composition, and what is left untouched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from loongforge.core.config.dump import dump, to_yaml
from loongforge.core.config.resolve import resolve
from loongforge.core.config.run import RunConfig
from loongforge.core.errors import ConfigError

pytestmark = pytest.mark.usefixtures("acme")


def yaml_file(folder: Path, text: str, name: str = "run.yaml") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return str(folder / name)


def quiet(*argv: str) -> RunConfig:
    """Resolve, and fail on any note."""
    return resolve(argv, note=lambda text: pytest.fail(f"unexpected note: {text}"))


def shape(run: RunConfig) -> Any:
    return run.model.foundation.geometry


@pytest.mark.parametrize("name", ["acme-0.1b", "acme_0_1b", "Acme-0.1B", "acme-wheel:acme_0_1b"])
def test_a_model_is_named_as_people_write_it(name: str) -> None:
    run = quiet("--model-name", name)
    assert run.model.foundation.family == "acme"
    assert (shape(run).num_layers, shape(run).hidden_size, shape(run).rotary_base) == (2, 16, 1e4)


@pytest.mark.parametrize("group", ["models/acme", "../../models/acme", "../models/acme", "/models/acme"])
def test_a_run_composes_a_family_from_anywhere(group: str, tmp_path: Path) -> None:
    text = f"defaults:\n- {group}@model.foundation: acme_2b\n- _self_\nmodel:\n  model_type: mine\n"
    run = quiet("--config-file", yaml_file(tmp_path / "deep" / "er", text))
    assert (shape(run).num_layers, run.model.model_type) == (4, "mine")


def test_the_runs_own_values_win_without_self(tmp_path: Path) -> None:
    text = "defaults:\n- models/acme@model.foundation: acme_2b\nmodel:\n  foundation:\n    num-layers: 7\n"
    assert shape(quiet("--config-file", yaml_file(tmp_path, text))).num_layers == 7


def test_files_beside_the_run_are_composed(tmp_path: Path) -> None:
    yaml_file(tmp_path / "schedule", "optimizer:\n  lr: 1e-3\n", "slow.yaml")
    yaml_file(tmp_path / "schedule", "optimizer:\n  lr: 2e-3\n", "fast.yaml")
    text = "defaults:\n- models/acme@model.foundation: acme_2b\n- schedule@_global_: slow\n"
    run = yaml_file(tmp_path, text)
    assert quiet("--config-file", run).optimizer.lr == 1e-3
    assert quiet("--config-file", run, "schedule@_global_=fast").optimizer.lr == 2e-3


def test_later_wins_and_a_beaten_yaml_value_is_said_once(tmp_path: Path) -> None:
    """Defaults < model YAML < run YAML < flags < overrides, each level seen to win over the one before."""
    text = (
        "defaults:\n- models/acme@model.foundation: acme_2b\n- _self_\n"
        "model:\n  foundation:\n    vocab_size: 128\n    hidden_size: 64\n    num_layers: 8\n"
    )
    notes: list[str] = []
    argv = ["--config-file", yaml_file(tmp_path, text), "--hidden-size", "96", "--num-layers", "9"]
    run = resolve([*argv, "model.foundation.num_layers=10"], notes.append)
    assert shape(run).num_attention_heads == 2
    assert shape(run).rotary_base == 1e6
    assert shape(run).vocab_size == 128
    assert shape(run).hidden_size == 96
    assert shape(run).num_layers == 10
    assert notes == [
        "note: --hidden-size 96 beats model.foundation.hidden_size: 64 of the YAML file.",
        "note: --num-layers 9 beats model.foundation.num_layers: 8 of the YAML file.",
        "note: model.foundation.num_layers=10 beats --num-layers 9.",
    ]


def test_an_equal_value_is_not_worth_a_note(tmp_path: Path) -> None:
    text = "defaults:\n- models/acme@model.foundation: acme_2b\noptimizer:\n  lr: 1e-4\n"
    assert quiet("--config-file", yaml_file(tmp_path, text), "--lr", "0.0001").optimizer.lr == 1e-4
    assert quiet("--model-name", "acme-2b", "--lr", "0.0001", "optimizer.lr=1e-4").optimizer.lr == 1e-4


@pytest.mark.parametrize("mark", ["", "+", "++"])
@pytest.mark.parametrize("key", ["optimizer.clip-grad", "optimizer.clip_grad"])
def test_an_override_is_spelled_freely(mark: str, key: str, tmp_path: Path) -> None:
    text = "defaults:\n- models/acme@model.foundation: acme_2b\noptimizer:\n  clip_grad: 2\n"
    assert quiet("--config-file", yaml_file(tmp_path, text), f"{mark}{key}=0.5").optimizer.clip_grad == 0.5
    assert quiet("--model-name", "acme-2b", f"{mark}{key}=0.5").optimizer.clip_grad == 0.5


def test_an_override_takes_a_value_back(tmp_path: Path) -> None:
    text = "defaults:\n- models/acme@model.foundation: acme_2b\noptimizer:\n  clip_grad: 2\n"
    assert quiet("--config-file", yaml_file(tmp_path, text), "~optimizer.clip_grad").optimizer.clip_grad == 1.0


@pytest.mark.parametrize(
    "choice", ["models/acme@model.foundation=acme_0_1b", "+../../models/acme@model.foundation=acme_0_1b"]
)
def test_the_foundation_is_swapped_by_one_line(choice: str, tmp_path: Path) -> None:
    text = "defaults:\n- models/acme@model.foundation: acme_2b\n"
    assert shape(quiet("--config-file", yaml_file(tmp_path, text), choice)).num_layers == 2
    assert shape(quiet("--config-file", yaml_file(tmp_path, text), "--model-name", "acme-0.1b")).num_layers == 2
    assert shape(quiet(choice)).num_layers == 2


def test_the_foundations_layout_is_the_runs() -> None:
    run = quiet("--model-name", "acme-2b", "+model.foundation.tensor-model-parallel-size=4")
    assert run.parallel.tensor_model_parallel_size == 4
    both = ["--tensor-model-parallel-size", "4", "model.foundation.tensor_model_parallel_size=4"]
    assert quiet("--model-name", "acme-2b", *both).parallel.tensor_model_parallel_size == 4


def test_megatrons_flags_and_ours_together() -> None:
    run = quiet(
        "--model-name", "acme-2b", "--bf16", "--sequence-parallel", "--tensor-model-parallel-size=2", "--swiglu",
        "--micro-batch-size", "2", "--global_batch_size", "8", "--train-iters", "10", "--training-phase", "sft",
        "--save", "out", "--save-hf", "true", "--save-hf-path", "out/hf", "--tokenizer-type", "HuggingFaceTokenizer",
        "--tokenizer-model", "tok", "--data-path", "0.3", "a", "0.7", "b", "--untie-embeddings-and-output-weights",
        "--freeze-parameters", r"layers\.0\..*", "--nproc-per-node", "2", "--eod-mask-loss", "--platform", "cpu",
    )  # fmt: skip
    assert run.train.precision == "bf16"
    assert run.train.training_phase == "sft"
    assert (run.parallel.tensor_model_parallel_size, run.parallel.sequence_parallel) == (2, True)
    assert (run.train.micro_batch_size, run.train.global_batch_size, run.train.train_iters) == (2, 8, 10)
    assert (run.checkpoint.save, run.checkpoint.save_hf, run.checkpoint.save_hf_path) == ("out", True, "out/hf")
    assert (run.tokenizer.tokenizer_type, run.tokenizer.hf_tokenizer_path) == ("HFTokenizer", "tok")
    assert run.data.data_path == ("0.3", "a", "0.7", "b")
    assert (run.data.loss_mask_eod, run.platform, run.launch.nproc_per_node) == (True, "cpu", 2)
    assert run.model.freeze_parameters == (r"layers\.0\..*",)
    assert shape(run).tie_word_embeddings is False


def test_numbers_between_files_are_texts(tmp_path: Path) -> None:
    text = "defaults:\n- models/acme@model.foundation: acme_2b\ndata:\n  data-path: [0.3, a.jsonl, 1, b]\n"
    assert quiet("--config-file", yaml_file(tmp_path, text)).data.data_path == ("0.3", "a.jsonl", "1", "b")


def test_a_flag_may_hold_what_yaml_would_interpolate(tmp_path: Path) -> None:
    assert quiet("--model-name", "acme-2b", "--save", "a/${b}").checkpoint.save == "a/${b}"
    text = "defaults:\n- models/acme@model.foundation: acme_2b\ntrain:\n  seq_length: 64\n"
    text += "  eval_interval: ${train.seq_length}\n"
    assert quiet("--config-file", yaml_file(tmp_path, text)).train.eval_interval == 64


def test_load_alone_names_model_and_tokenizer(checkpoint: Path) -> None:
    run = quiet("--load", str(checkpoint))
    assert run.model.foundation.family == "acme"
    assert (shape(run).num_layers, shape(run).hidden_size, shape(run).rotary_base) == (3, 24, 5e5)
    assert run.tokenizer.hf_tokenizer_path == str(checkpoint)
    notes: list[str] = []
    argv = ["--load", str(checkpoint), "--hf-tokenizer-path", "other", "model.foundation.rotary_base=7"]
    changed = resolve(argv, notes.append)
    assert (changed.tokenizer.hf_tokenizer_path, shape(changed).rotary_base) == ("other", 7.0)
    assert [note.split(",")[0] for note in notes] == ["note: model.foundation.rotary_base is 7.0"]
    from_override = quiet(f"checkpoint.load={checkpoint}", "model.foundation.freeze=true")
    assert (shape(from_override).num_layers, from_override.model.foundation.freeze) == (3, True)


def test_a_named_model_that_differs_from_the_checkpoint_is_said(checkpoint: Path) -> None:
    notes: list[str] = []
    run = resolve(["--model-name", "acme-2b", "--load", str(checkpoint)], notes.append)
    assert shape(run).num_layers == 4
    prefix, suffix = "note: model.foundation.", f"the acme_json checkpoint in {checkpoint} says"
    assert notes == [
        f"{prefix}num_layers is 4, {suffix} 3.",
        f"{prefix}hidden_size is 32, {suffix} 24.",
        f"{prefix}rotary_base is 1000000.0, {suffix} 500000.0.",
    ]


def test_a_first_start_may_name_a_run_directory_that_is_not_there(tmp_path: Path) -> None:
    """Scripts give --load and --save the same directory; before the first save there is nothing to read."""
    run = quiet("--model-name", "acme-2b", "--load", str(tmp_path / "run"), "--save", str(tmp_path / "run"))
    assert shape(run).num_layers == 4


def test_a_saved_run_resolves_to_itself(tmp_path: Path, checkpoint: Path) -> None:
    argv = ["--load", str(checkpoint), "--bf16", "--data-path", "0.5", "a", "0.5", "b", "--freeze-parameters", "a.*$"]
    run = quiet(
        *argv, "--save", "x/${y}", "model.foundation.lr_mult=0.1", "train.seed=7", "--requires", "acme-wheel>=0.1"
    )
    saved = yaml_file(tmp_path / "saved", to_yaml(run), "config.yaml")
    assert quiet("--config-file", saved) == run
    assert dump(run)["model"]["foundation"]["num_layers"] == 3
    assert json.loads(json.dumps(dump(run))) == dump(run), "a dump is plain data"
    again = quiet("--load", str(tmp_path / "saved"))
    assert again.model == run.model
    assert again.tokenizer == run.tokenizer
    assert again.train.seed == 1234, "how to train is not taken from another run"


def test_two_owners_of_a_name_are_told_apart(
    acme_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    other = tmp_path / "site" / "rival-1.0.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: rival\nVersion: 1.0\n")
    (other / "entry_points.txt").write_text("[loongforge.models]\nacme = acme_wheel.spec:FAMILY\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    with pytest.raises(ConfigError, match="Say whose: --model-name acme-wheel:acme-2b or --model-name rival:acme-2b"):
        quiet("--model-name", "acme-2b")
    assert quiet("--model-name", "rival:acme-2b").model.foundation.family == "rival:acme"
    with pytest.raises(ConfigError, match="Say whose: 'rival:acme' or 'acme-wheel:acme'"):
        quiet("models/acme@model.foundation=acme_2b")
    run = quiet("models/rival:acme@model.foundation=acme_2b")
    assert (run.model.foundation.family, shape(run).num_layers) == ("rival:acme", 4)
    with pytest.raises(ConfigError, match="is claimed by acme of "):
        quiet("--load", str(checkpoint))
    assert (
        quiet("--load", str(checkpoint), "model.foundation.family=rival:acme").model.foundation.family == "rival:acme"
    )


def test_requirements_that_are_met_pass() -> None:
    assert quiet("--model-name", "acme-2b", "--requires", "acme-wheel>=0.3", "pydantic").requires == (
        "acme-wheel>=0.3",
        "pydantic",
    )


def test_hydra_is_left_as_it_was(tmp_path: Path) -> None:
    where, nodes = os.getcwd(), list(ConfigStore.instance().repo)
    quiet("--model-name", "acme-2b")
    assert (os.getcwd(), list(ConfigStore.instance().repo)) == (where, nodes)
    assert not GlobalHydra.instance().is_initialized()
    assert not OmegaConf.has_resolver("hydra")
    yaml_file(tmp_path, "x: 1\n", "theirs.yaml")
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.2"):
        quiet("--model-name", "acme-2b")
        assert hydra.compose("theirs").x == 1


def test_resolving_imports_no_torch(acme: Path, checkpoint: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(acme)!r})\n"
        "from loongforge.core.config.resolve import resolve\n"
        f"run = resolve(['--load', {str(checkpoint)!r}, '--bf16', 'train.seed=3'])\n"
        "print([m for m in ('torch', 'numpy', 'megatron') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=180)
    assert answer.stdout.strip() == "[]"


def test_one_checkpoint_of_a_run_says_its_model_too(tmp_path: Path, checkpoint: Path) -> None:
    run = quiet("--load", str(checkpoint), "--train-iters", "5")
    yaml_file(tmp_path / "saved", to_yaml(run), "config.yaml")
    step = tmp_path / "saved" / "checkpoints" / "step_00000003"
    step.mkdir(parents=True)
    (step / "manifest.json").write_text("{}")
    assert quiet("--load", str(step), "--train-iters", "5").model == run.model

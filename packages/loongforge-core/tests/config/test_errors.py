"""Every mistake has one sentence: where, what, what is allowed, what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from loongforge.core import plugins
from loongforge.core.config.resolve import resolve
from loongforge.core.config.run import DataConfig
from loongforge.core.errors import ConfigError

pytestmark = pytest.mark.usefixtures("acme")

KNOWN = sorted([*plugins.registered("models"), "acme"])
RUN = "defaults:\n- models/acme@model.foundation: acme_2b\n- _self_\n"


def problems(*argv: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        resolve(argv)
    return caught.value.problems


def in_file(folder: Path, text: str, *argv: str) -> tuple[str, ...]:
    (folder / "run.yaml").write_text(text)
    return problems("--config-file", str(folder / "run.yaml"), *argv)


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["optimizer.lrr=1"], "optimizer.lrr: unknown key (value 1). Did you mean 'lr'?"),
        (["+optimizer.lrr=1"], "optimizer.lrr: unknown key (value 1). Did you mean 'lr'?"),
        (["++optimzer.lr=1"], "optimzer: unknown key (value {'lr': 1}). Did you mean 'optimizer'?"),
        (["model.foundation.num_layer=1"],
         "model.foundation.num_layer: unknown key (value 1). Did you mean 'num_layers'?"),
        (["model.foundation.freezee=true"],
         "model.foundation.freezee: unknown key (value True). Did you mean 'freeze'?"),
        (["train.precision=bf61"],
         "train.precision: 'bf61' is not allowed; use 'fp32' or 'bf16'. Did you mean 'bf16'?"),
        (["--lr", "fast"], "optimizer.lr (--lr): must be a number, got 'fast'."),
        (["data.num_workers=1.5"], "data.num_workers: must be a whole number, got 1.5."),
        (["--micro-batch-size", "0"], "train.micro_batch_size: must be at least 1, got 0."),
        (["--min-pixels", "9", "--max-pixels", "8"],
         "data: min_pixels=9 is above max_pixels=8: swap them, or leave one out."),
        (["--min-lr", "1"], "optimizer: need 0 <= min_lr <= lr, got min_lr=1.0 lr=0.0001."),
        (["data.packing=maybe"], "data.packing: must be true or false, got 'maybe'."),
        (["data.data_path=a"], "data.data_path: must be a list, got 'a'."),
        (["train=5"], "train: is a section with fields of its own, got 5."),
        (["model.foundation.family=acne"],
         f"model.foundation.family: no model 'acne'. Did you mean 'acme'? Known: {', '.join(KNOWN)}."),
        (["--hidden-size", "33"], "model.foundation: hidden_size=33 must be a multiple of num_attention_heads."),
        (["model.foundation._target_=os.system"],
         "model.foundation._target_: is never executed. Name a registered family, source or format instead."),
        (["~optimizer.lr"], "~optimizer.lr: there is nothing to remove, no YAML file or flag sets it."),
        (["--requires", "acme-wheel>=9"],
         "requires (--requires): acme-wheel>=9 is needed, acme-wheel 0.3.0 is installed: pip install 'acme-wheel>=9'."),
        (["--requires", "no-such-wheel"],
         "requires (--requires): no-such-wheel is not installed: pip install 'no-such-wheel'."),
        (["parallel.tensor-model-parallel-size=2", "model.foundation.tensor-model-parallel-size=4"],
         "model.foundation.tensor_model_parallel_size: is 4, but parallel.tensor_model_parallel_size is 2. "
         "The foundation defines the run's layout: give one of them."),
        (["optimizer.lr=${nope}"], "optimizer.lr: Interpolation key 'nope' not found. Set what it refers to."),
    ],
)  # fmt: skip
def test_one_mistake_one_sentence(argv: list[str], problem: str) -> None:
    assert problems("--model-name", "acme-2b", *argv) == (problem,)


def test_an_unknown_key_without_a_neighbour_lists_what_there_is() -> None:
    (problem,) = problems("--model-name", "acme-2b", "launch.zzz=1")
    assert problem == (
        "launch.zzz: unknown key (value 1). Known here: distributed_timeout_minutes, max_restarts, nnodes, node_rank, "
        "nproc_per_node, rdzv_endpoint."
    )


@pytest.mark.parametrize("text", ["data.split=969,30,1", "data.split=[1", "data.split=a b(c"])
def test_an_override_that_hydra_cannot_read(text: str) -> None:
    (problem,) = problems("--model-name", "acme-2b", text)
    assert problem.startswith(f"{text!r}: ")
    assert problem.endswith("and a text with commas, spaces or brackets in double quotes: 'data.split=\"...\"'.")
    assert resolve(["--model-name", "acme-2b", 'data.split="969,30,1"']).data.split == "969,30,1"


def test_everything_wrong_in_a_file_comes_at_once(tmp_path: Path) -> None:
    text = RUN + (
        "model:\n  foundation: {tpp: 3, num-layers: many}\n"
        "train: {precision: fp8, train_iters: 0}\noptimizer: {lrr: 1}\nwatch: {log_interval: 0}\ndataa: {}\n"
    )
    assert [line.split(":")[0] for line in in_file(tmp_path, text)] == [
        "dataa", "model.foundation.num_layers", "model.foundation.tpp", "train.precision", "optimizer.lrr",
        "watch.log_interval",
    ]  # fmt: skip


def test_a_file_that_is_no_yaml_says_where(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    assert in_file(tmp_path, "train:\n  a: 1\n  b: [1,\noptimizer: 2\n") == (
        f"{path}:5:1: not valid YAML: expected ',' or ']', but got '<stream end>'.",
    )
    assert in_file(tmp_path, "train:\n  seq-length: 1\n  seq_length: 2\n") == (
        f"{path}:3:3: not valid YAML: 'seq_length' is given twice.",
    )
    assert in_file(tmp_path, "? [a]\n: 1\n") == (f"{path}:1:3: not valid YAML: found unhashable key.",)
    assert in_file(tmp_path, RUN + "5: 1\ndata: {split: 2020-01-01, seed: !!binary aGk=}\n") == (
        "5: unknown key (value 1). Known here: checkpoint, data, launch, lora, model, moe, optimizer, parallel, "
        "platform, requires, tokenizer, train, watch.",
        "data.seed: unknown key (value b'hi'). Known here: " + ", ".join(sorted(vars(DataConfig)["__slots__"])) + ".",
    )
    assert in_file(tmp_path, "- a\n") == (f"{path}: must hold sections (`train:`, `model:`, ...), got list.",)
    assert problems("--config-file", "nowhere.yaml") == ("nowhere.yaml: no such file.",)
    (tmp_path / "beside.yaml").write_text("a: [1\nb: 2")
    (problem,) = in_file(tmp_path, "defaults:\n- beside\n")
    assert problem.startswith(f"{tmp_path}/beside.yaml:2:2: not valid YAML")


def test_a_defaults_list_that_names_nothing(tmp_path: Path) -> None:
    pools = {pool for plugin in plugins.usable("models") for pool in plugin.spec.groups}
    groups = sorted({*KNOWN, *plugins.registered("compositions"), *pools})
    assert in_file(tmp_path, "defaults:\n- models/acne@model.foundation: acme_2b\n") == (
        f"models/acne: no model 'acne'. Did you mean 'acme'? Known: {', '.join(groups)}.",
    )
    assert in_file(tmp_path, "defaults:\n- models/acme@model.foundation: acme_3b\n") == (
        "defaults: no configuration 'models/acme/acme_3b'. Did you mean 'acme_2b'? Known: acme_0_1b, acme_2b.",
    )
    assert in_file(tmp_path, "defaults:\n- schedule: slow\n") == ("defaults: no configuration 'schedule/slow'.",)
    assert in_file(tmp_path, "defaults:\n- 5\n- {a: b, c: d}\n") == (
        "defaults: 5 is neither a file nor 'models/FAMILY@model.foundation: SIZE'.",
        "defaults: {'a': 'b', 'c': 'd'} is neither a file nor 'models/FAMILY@model.foundation: SIZE'.",
    )
    assert in_file(tmp_path, "defaults: acme\n") == ("defaults: must be a list, got 'acme'.",)


def test_a_choice_and_a_removal_that_fit_nothing(tmp_path: Path) -> None:
    text = RUN + "optimizer:\n  clip_grad: 2\n"
    assert in_file(tmp_path, text, "~optimizer.clip_gard") == (
        "~optimizer.clip_gard: there is nothing to remove, no YAML file or flag sets it. "
        "Did you mean ~optimizer.clip_grad?",
    )
    (problem,) = in_file(tmp_path, text, "schedule@_global_=slow")
    assert problem == f"schedule@_global_=slow: there is no folder of YAML files 'schedule' beside {tmp_path}/run.yaml."
    (tmp_path / "schedule").mkdir()
    (tmp_path / "schedule" / "slow.yaml").write_text("optimizer: {lr: 1}")
    (problem,) = in_file(tmp_path, text, "schedule@_global_=slow")
    assert problem == f"schedule@_global_: the defaults list of {tmp_path}/run.yaml has no such choice."


def test_hydras_own_settings_are_refused(tmp_path: Path) -> None:
    (problem,) = in_file(tmp_path, RUN + "hydra:\n  run: {dir: x}\n")
    assert problem.endswith("hydra: Hydra's own settings have no effect here. Remove the section.")


def test_a_name_that_no_family_ships() -> None:
    (problem,) = problems("--model-name", "acme-3b")
    assert problem.startswith("--model-name: no model 'acme-3b'. Did you mean 'acme_2b'? Known: acme_0_1b, acme_2b,")
    assert problems() == (
        "model: no model is named. Give --model-name NAME, --load DIR, or a --config-file that names one.",
    )


def test_a_directory_to_load_that_says_no_model(tmp_path: Path, checkpoint: Path) -> None:
    assert problems("--load", "Org/Model") == (
        "checkpoint.load: no directory 'Org/Model'. A name on a hub is not a directory: download it first.",
    )
    (problem,) = problems("--load", str(tmp_path))
    assert problem.startswith(f"checkpoint.load: '{tmp_path}' is neither a run (no config.yaml) nor a checkpoint of")
    (checkpoint / "acme.json").write_text('{"architectures": ["WhoForCausalLM"]}')
    (problem,) = problems("--load", str(checkpoint))
    assert problem.startswith(f"{checkpoint}: no registered family knows the architecture WhoForCausalLM. Known: Acme")
    (checkpoint / "acme.json").write_text('{"architectures": ["AcmeForCausalLM"], "bits": 4}')
    assert problems("--load", str(checkpoint)) == (f"{checkpoint}: config.json: bits is not supported.",)

"""A model of several components: composed by name, checked by role, laid out, loaded and saved as one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loongforge.core.cli import main, schema
from loongforge.core.config.dump import dump, to_yaml
from loongforge.core.config.resolve import resolve
from loongforge.core.config.run import ComponentParallel, RunConfig
from loongforge.core.errors import ConfigError

pytestmark = pytest.mark.usefixtures("vision")

RUN = """
defaults:
- ../../models/image_encoder@model.image_encoder: acme_vit
- ../../models/image_projector@model.image_projector: acme_adapter
- ../../models/acme@model.foundation: {foundation}
- _self_
model:
  model_type: acme_vl
"""


def run_file(folder: Path, foundation: str = "acme_2b", more: str = "") -> list[str]:
    path = folder / "configs" / "deep" / "run.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(RUN.format(foundation=foundation) + more)
    return ["--config-file", str(path)]


def quiet(*argv: str) -> RunConfig:
    """Resolve, and fail on any note."""
    return resolve(argv, note=lambda text: pytest.fail(f"unexpected note: {text}"))


def problems(*argv: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        resolve(argv, note=lambda text: None)
    return caught.value.problems


def shapes(run: RunConfig) -> dict[str, tuple[str, Any]]:
    return {slot: (one.family, one.geometry) for slot, one in run.model.components.items()}


def test_three_lines_make_a_model(tmp_path: Path) -> None:
    run = quiet(*run_file(tmp_path))
    assert list(shapes(run)) == ["image_encoder", "image_projector", "foundation"]
    assert [family for family, _ in shapes(run).values()] == ["acme_vit", "acme_adapter", "acme"]
    assert run.model.image_encoder is not None
    assert run.model.image_encoder.geometry.deepstack_layers == (0, 1)
    assert run.model.model_type == "acme_vl"


def test_a_group_pools_the_sizes_of_several_families(tmp_path: Path) -> None:
    run = quiet(*run_file(tmp_path, "acme_8x1b"))
    assert (run.model.foundation.family, run.model.foundation.geometry.num_layers) == ("acme_moe", 5)
    assert quiet("models/acme_moe@model.foundation=acme_8x1b").model.foundation == run.model.foundation


def test_the_foundation_is_swapped_whole(tmp_path: Path) -> None:
    """No field of the first foundation is left over: `qk_layernorm` is only in the file of the second."""
    swap = "models/acme@model.foundation=acme_0_1b"
    for argv in (run_file(tmp_path, "acme_8x1b"), ["--model-name", "acme-vl-1b"]):
        run = quiet(*argv, swap)
        assert run.model.foundation.geometry == quiet(swap).model.foundation.geometry
        assert run.model.image_encoder == quiet(*argv).model.image_encoder
        assert run.model.model_type == "acme_vl"


def test_a_whole_model_replaces_the_components_of_a_file(tmp_path: Path) -> None:
    run = quiet(*run_file(tmp_path), "--model-name", "acme-vl-1b")
    assert run.model == quiet("--model-name", "acme-vl-1b").model
    assert run.model.image_encoder is not None
    assert run.model.image_encoder.geometry.hidden_size == 6


def test_components_can_be_left_out() -> None:
    without = [f"models/{slot}@model.{slot}=null" for slot in ("image_encoder", "image_projector")]
    assert list(quiet("--model-name", "acme-vl-1b", *without).model.components) == ["foundation"]


def test_a_size_of_a_composition_is_a_whole_model() -> None:
    run = quiet("--model-name", "acme-vl-1b")
    assert shapes(run)["foundation"][1].vocab_size == 77
    assert run.model.model_type == "acme_vl"
    assert quiet("models/acme_vl@model=acme_vl_1b").model == run.model
    assert quiet("models/acme-vision:acme_vl@model=acme_vl_1b").model.image_encoder == run.model.image_encoder


def test_overrides_are_spelled_as_announced(tmp_path: Path) -> None:
    run = quiet(
        *run_file(tmp_path),
        "+model.image_encoder.tensor-model-parallel-size=1",
        "+model.foundation.tensor-model-parallel-size=4",
        "+model.image_encoder.freeze=True",
        "+model.foundation.freeze=True",
        "+model.image_projector.lr_mult=5",
        "model.image_encoder.recompute-granularity=full",
        "model.foundation.recompute_granularity=selective",
        "model.foundation.data-parallel-size=2",
    )
    encoder, projector = run.model.image_encoder, run.model.image_projector
    assert encoder is not None
    assert projector is not None
    assert encoder.parallel == ComponentParallel(tensor_model_parallel_size=1, recompute_granularity="full")
    assert run.parallel.tensor_model_parallel_size == 4
    assert run.parallel.recompute_granularity == "selective"
    assert run.model.foundation.parallel == ComponentParallel(data_parallel_size=2)
    assert (encoder.freeze, projector.freeze, run.model.foundation.freeze) == (True, False, True)
    assert projector.lr_mult == 5.0


def test_layouts_may_stand_in_the_file(tmp_path: Path) -> None:
    more = "  image_encoder: {tensor-model-parallel-size: 2, freeze: true}\n  foundation: {context-parallel-size: 2}\n"
    run = quiet(*run_file(tmp_path, more=more))
    assert run.model.image_encoder is not None
    assert run.model.image_encoder.parallel.tensor_model_parallel_size == 2
    assert run.parallel.context_parallel_size == 2


def test_the_encoders_flag_and_the_modes(tmp_path: Path) -> None:
    run = quiet(
        *run_file(tmp_path), "--encoder-tensor-model-parallel-size", "2", "--enable-full-hetero-dp",
        "--full-hetero-dp-cpu-offload", "--max-pixels", "50176", "--fps", "0.5", "--fps_max_frames=16",
    )  # fmt: skip
    assert run.model.image_encoder is not None
    assert run.model.image_encoder.parallel.tensor_model_parallel_size == 2
    assert (run.parallel.enable_full_hetero_dp, run.parallel.full_hetero_dp_cpu_offload) == (True, True)
    assert (run.data.max_pixels, run.data.fps, run.data.fps_max_frames) == (50176, 0.5, 16)
    assert quiet(*run_file(tmp_path), "--encoder-ranks", "3").parallel.encoder_ranks == 3
    assert quiet(*run_file(tmp_path), "--enable_encoder_hetero_dp").parallel.enable_encoder_hetero_dp


def test_an_override_of_the_foundation_beats_the_runs_flag(tmp_path: Path) -> None:
    notes: list[str] = []
    flag = ["--tensor-model-parallel-size", "1"]
    run = resolve([*run_file(tmp_path), *flag, "+model.foundation.tensor-model-parallel-size=4"], notes.append)
    assert run.parallel.tensor_model_parallel_size == 4
    assert notes == [
        "note: model.foundation.tensor_model_parallel_size=4 beats --tensor-model-parallel-size=1."
    ]  # fmt: skip
    notes.clear()
    in_file = run_file(tmp_path, more="  foundation: {tensor_model_parallel_size: 4}\n")
    assert resolve([*in_file, *flag], notes.append).parallel.tensor_model_parallel_size == 1
    assert notes == ["note: --tensor-model-parallel-size=1 beats model.foundation.tensor_model_parallel_size=4."]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["models/acme@model.image_encoder=acme_2b"],
         "model.image_encoder.family: 'acme' is a family of the role foundation, not image_encoder. "
         "Registered for this slot: "),
        (["models/image_encoder@model.foundation=acme_vit"],
         "model.foundation.family: 'acme_vit' is a family of the role image_encoder, not foundation. "
         "Registered for this slot: acme, acme_moe"),
        (["model.image_encoder.expert_model_parallel_size=2"],
         "model.image_encoder.expert_model_parallel_size: belongs to the whole run, got 2 here. "
         "Set parallel.expert_model_parallel_size."),
        (["model.image_encoder.tensor_model_paralel_size=2"],
         "model.image_encoder.tensor_model_paralel_size: unknown key (value 2). "
         "Did you mean 'tensor_model_parallel_size'?"),
        (["--encoder-tensor-model-parallel-size", "0"],
         "model.image_encoder.tensor_model_parallel_size (--encoder-tensor-model-parallel-size): must be at least 1, "
         "got 0."),
        (["model.image_projector.lr_mult=-1"], "model.image_projector.lr_mult: must be at least 0, got -1.0."),
        (["model.image_encoder.num_layers=many"],
         "model.image_encoder.num_layers: must be a whole number, got 'many'."),
    ],
)  # fmt: skip
def test_one_mistake_one_sentence(argv: list[str], expected: str) -> None:
    (problem,) = problems("--model-name", "acme-vl-1b", *argv)
    assert problem.startswith(expected)


def test_an_encoder_and_a_projector_come_together() -> None:
    (problem,) = problems("--model-name", "acme-2b", "models/image_encoder@model.image_encoder=acme_vit")
    assert problem.startswith("model.image_encoder: needs an image_projector beside it. Name one in the `defaults`, ")
    assert "acme_adapter" in problem
    (problem,) = problems("--model-name", "acme-2b", "models/image_projector@model.image_projector=acme_adapter")
    assert problem.startswith("model.image_projector: needs an image_encoder beside it.")


def test_a_setting_of_an_encoder_that_is_not_there() -> None:
    (problem,) = problems("--model-name", "acme-2b", "+model.image_encoder.freeze=True")
    assert problem.startswith("model.image_encoder.family: is required and not given: this model has no image_encoder")


def test_an_encoder_is_not_a_model_name() -> None:
    assert problems("--model-name", "acme-vit") == (
        "--model-name: 'acme-vit' is an image_encoder, one part of a model. Name it in the `defaults` of a "
        "--config-file, `- models/image_encoder@model.image_encoder: acme_vit`, or as an override, "
        "models/image_encoder@model.image_encoder=acme_vit.",
    )
    assert "acme_vl_1b" in problems("--model-name", "acme-vl-7b")[0]


def test_a_size_that_two_families_of_a_group_have(vision_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    info = tmp_path / "site" / "rival-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rival\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[loongforge.models]\nacme_vit = acme_sight.spec:VIT\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    (problem,) = problems(*run_file(tmp_path))
    assert problem.startswith("models/image_encoder: 'acme_vit' is a size of acme_vit of ")
    assert "'models/rival:acme_vit'" in problem
    chosen = "models/rival:acme_vit@model.image_encoder=acme_vit"
    assert shapes(quiet(*run_file(tmp_path), chosen))["image_encoder"][0] == "rival:acme_vit"
    only_foundation = quiet("models/acme@model.foundation=acme_8x1b")
    assert only_foundation.model.foundation.family == "acme_moe", "a tie that is not used disturbs nobody"


def test_load_names_all_components(whole_checkpoint: Path) -> None:
    run = quiet("--load", str(whole_checkpoint), "+model.image_encoder.freeze=true")
    assert run.model.model_type == "acme_vl"
    assert [family for family, _ in shapes(run).values()] == ["acme_vit", "acme_adapter", "acme"]
    assert (shapes(run)["image_encoder"][1].hidden_size, shapes(run)["foundation"][1].hidden_size) == (8, 24)
    assert run.model.components["image_encoder"].freeze
    assert run.tokenizer.hf_tokenizer_path == str(whole_checkpoint)


def test_a_foundation_alone_may_load_from_a_whole_model(whole_checkpoint: Path) -> None:
    notes: list[str] = []
    run = resolve(["--model-name", "acme-2b", "--load", str(whole_checkpoint)], notes.append)
    assert list(run.model.components) == ["foundation"]
    where = f"the acme_json checkpoint in {whole_checkpoint} says"
    assert notes[0] == f"note: model.foundation.num_layers is 4, {where} 3."


def test_components_load_from_directories_of_their_own(whole_checkpoint: Path, checkpoint: Path) -> None:
    notes: list[str] = []
    run = resolve(
        [
            "--model-name", "acme-vl-1b", f"model.foundation.load={checkpoint}",
            f"model.image_encoder.load={whole_checkpoint}", "model.image_projector.load=random",
        ],
        notes.append,
    )  # fmt: skip
    assert [one.load for one in run.model.components.values()] == [str(whole_checkpoint), "random", str(checkpoint)]
    assert run.checkpoint.load is None
    assert run.tokenizer.hf_tokenizer_path == str(checkpoint), "the foundation's tokenizer is the model's"
    assert [note.partition(",")[0] for note in notes] == [
        "note: model.image_encoder.num_layers is 2", "note: model.image_encoder.hidden_size is 6",
        "note: model.foundation.num_layers is 2", "note: model.foundation.hidden_size is 18",
        "note: model.foundation.vocab_size is 77", "note: model.foundation.rotary_base is 10000.0",
    ]  # fmt: skip


def test_an_export_of_components_side_by_side_has_a_tokenizer(tmp_path: Path, checkpoint: Path) -> None:
    apart = tmp_path / "apart"
    apart.mkdir()
    checkpoint.rename(apart / "foundation")
    run = quiet("--model-name", "acme-vl-1b", "--load", str(apart))
    assert run.tokenizer.hf_tokenizer_path == str(apart / "foundation")
    (problem,) = problems("--load", str(apart))
    assert problem.endswith("Name the model with --model-name or --config-file.")
    (apart / "config.yaml").write_text(to_yaml(run))
    again = quiet("--load", str(apart))
    assert (shapes(again), again.model.model_type) == (shapes(run), "acme_vl")
    assert again.tokenizer == run.tokenizer


def test_a_component_without_a_directory_stops_the_launch(capsys: pytest.CaptureFixture[str]) -> None:
    """Before any worker starts."""
    argv = ["train", "--model-name", "acme-2b", "--train-iters", "1", "--mock-data", "--platform", "cpu"]
    assert main([*argv, "model.foundation.load=nowhere"]) == 5
    assert "model.foundation.load=nowhere: no such directory." in capsys.readouterr().err


def test_a_saved_run_resolves_to_itself(tmp_path: Path, whole_checkpoint: Path) -> None:
    run = quiet(
        *run_file(tmp_path),
        "+model.image_encoder.tensor-model-parallel-size=2", "model.foundation.data_parallel_size=2",
        "--tensor-model-parallel-size", "4", "model.image_projector.lr_mult=2", "model.image_projector.load=random",
    )  # fmt: skip
    assert json.loads(json.dumps(dump(run))) == dump(run), "a dump is plain data"
    assert "parallel" not in dump(run)["model"]["image_encoder"]
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "config.yaml").write_text(to_yaml(run))
    assert quiet("--config-file", str(saved / "config.yaml")) == run
    again = quiet("--load", str(saved))
    assert shapes(again) == shapes(run)
    projector = again.model.image_projector
    assert projector is not None
    assert (projector.lr_mult, projector.load) == (2.0, None), "the run has the weights of every component"
    assert all(one.parallel == ComponentParallel() for one in again.model.components.values())
    assert again.parallel.tensor_model_parallel_size == 1, "a layout is not taken from another run"


def test_schema_offers_each_slot_its_role(capsys: pytest.CaptureFixture[str]) -> None:
    assert schema.command([]) == 0
    definitions = json.loads(capsys.readouterr().out)["$defs"]
    encoders = [choice.get("$ref") for choice in definitions["ImageEncoder"]["anyOf"]]
    assert "#/$defs/acme-vision:acme_vit" in encoders
    assert "#/$defs/acme-wheel:acme" not in encoders
    assert {"$ref": "#/$defs/acme-vision:acme_moe"} in definitions["Foundation"]["anyOf"]
    assert "context_parallel_size" in definitions["acme-vision:acme_vit"]["properties"]
    assert "overlap_grad_reduce" not in definitions["acme-vision:acme_vit"]["properties"]
    assert "overlap_grad_reduce" in definitions["acme-wheel:acme"]["properties"]


def test_list_and_show_know_roles_and_compositions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "models"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "acme_vit acme-vision 0.4.0 ready role: image_encoder; modality: vision; sizes: acme_vit" in text
    assert "A test composition. role: composition; modality: vision-language; sizes: acme_vl_1b" in text
    assert main(["show", "models", "acme_vl"]) == 0
    shown = capsys.readouterr().out
    assert "loongforge.compositions: acme_vl = acme_sight.spec:VL" in shown
    assert "acme_vl_1b.yaml" in shown
    assert main(["list", "compositions", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["acme_vl"]["hf_architectures"] == ["AcmeVLForConditionalGeneration"]

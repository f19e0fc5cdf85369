"""Components train as their settings say: frozen, at their own rate, from a directory of their own."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import command_line
import omni_run as run
import pytest
import tiny_sizes
import tiny_vlm
import torch

from loongforge.core.config.resolve import resolve
from loongforge.core.config.run import RunConfig
from loongforge.core.errors import ConfigError, ForgeError
from loongforge.core.plan import Plan
from loongforge.core.testing import run_distributed

FAMILY = "qwen3_vl"
SLOTS = ("image_encoder", "image_projector", "foundation")
FROZEN = {slot: f"+model.{slot}.freeze=True" for slot in SLOTS}
TP2 = ["--tensor-model-parallel-size", "2", "+model.image_encoder.tensor-model-parallel-size=1"]
AHEAD = ["--pipeline-model-parallel-size", "2", "--enable-full-hetero-dp"]
LAYOUTS: dict[str, tuple[list[str], int]] = {"one": ([], 1), "tp2, encoder tp1": (TP2, 2), "pp2, ahead": (AHEAD, 2)}
RATES = ["--lr", "1e-3", "--min-lr", "1e-3", "--weight-decay", "0.1"]


def slot_of(name: str) -> str:
    """The component a Hugging Face name of the whole belongs to."""
    if re.search(r"visual\.(merger|deepstack_merger_list)\.", name):
        return "image_projector"
    return "image_encoder" if "visual." in name else "foundation"


@pytest.mark.parametrize(
    ("frozen", "layout"),
    [
        (("image_encoder",), "one"),
        (("foundation",), "tp2, encoder tp1"),
        (("image_encoder", "foundation"), "tp2, encoder tp1"),
        (("image_encoder", "foundation"), "pp2, ahead"),
        (("foundation",), "pp2, ahead"),
        (("image_encoder", "image_projector"), "pp2, ahead"),
        (("image_encoder", "image_projector"), "tp2, encoder tp1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_freezing_leaves_the_other_gradients_as_they_are(
    frozen: tuple[str, ...], layout: str, vlm: dict[str, Path], one_process: run.OneProcess, tmp_path: Path
) -> None:
    flags, world = LAYOUTS[layout]
    config = run.config_of(vlm[FAMILY], [*flags, *(FROZEN[slot] for slot in frozen)])
    found = run.gradients(config, world, "mixed", tmp_path)
    plain = one_process.gradients("mixed")
    assert found.loss == pytest.approx(plain.loss, rel=1e-6)
    expected = {
        name: torch.zeros_like(tensor) if slot_of(name) in frozen else tensor for name, tensor in plain.tensors.items()
    }
    difference, name = run.worst(found.tensors, expected)
    assert difference < 1e-5, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_frozen_weights_stay_and_the_others_move(
    layout: str, megatron: Any, vlm: dict[str, Path], tmp_path: Path
) -> None:
    flags, world = LAYOUTS[layout]
    more = [FROZEN["image_encoder"], FROZEN["foundation"], *RATES, "--use-distributed-optimizer"]
    _, after = run.steps(run.config_of(vlm[FAMILY], [*flags, *more]), world, ["mixed", "no image"], tmp_path)
    before = run.read(vlm[FAMILY])
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if slot_of(name) == "image_projector"}


def test_a_rate_of_its_own_for_every_component(megatron: Any, vlm: dict[str, Path], tmp_path: Path) -> None:
    """A step of AdamW is proportional to its rate: half the rate, half the way; the others go theirs to the bit."""
    before = run.read(vlm[FAMILY])
    slower = ["+model.image_encoder.lr_mult=0.5", "+model.foundation.lr_mult=0.25"]
    for layout in ("one", "tp2, encoder tp1"):
        flags, world = LAYOUTS[layout]
        ways: list[run.Tensors] = []
        for more in ([], slower):
            out = tmp_path / f"{layout}{len(more)}"
            _, after = run.steps(run.config_of(vlm[FAMILY], [*flags, *RATES, *more]), world, ["mixed"], out)
            ways.append({name: tensor - before[name] for name, tensor in after.items()})
        for name, way in ways[0].items():
            factor = {"image_encoder": 0.5, "image_projector": 1.0, "foundation": 0.25}[slot_of(name)]
            # The difference of two weights near 1 is known to 6e-8; a step is 1e-3.
            torch.testing.assert_close(ways[1][name], way * factor, rtol=1e-4, atol=2e-7, msg=name)
            assert factor < 1 or torch.equal(ways[1][name], way), name


def test_rates_of_the_parameter_groups(megatron: Any, vlm: dict[str, Path]) -> None:
    mults = {"image_encoder": 0.5, "image_projector": 2.0, "foundation": 0.25}
    more = [f"+model.{slot}.lr_mult={value}" for slot, value in mults.items()]
    config = run.config_of(vlm[FAMILY], [*TP2, *RATES, *more])
    for rates in run_distributed(partial(rates_of, config=config), 2):
        assert rates == {slot: {1e-3 * value} for slot, value in mults.items()}


def rates_of(worker: Any, config: RunConfig) -> dict[str, set[float]]:
    """Largest learning rates of a component's parameters."""
    from loongforge.ckpt.workers import part_of

    with part_of(config) as part:
        training = run.built(part)
        owner = {
            id(one): slot for slot, modules in part.model.modules.items() for m in modules for one in m.parameters()
        }
        found: dict[str, set[float]] = {slot: set() for slot in owner.values()}
        for optimizer in training.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    found[owner[id(parameter)]].add(group["max_lr"])
    return found


@pytest.mark.parametrize("layout", ["one", "tp2, encoder tp1", "pp2, ahead"])
def test_the_table_counts_every_component_once(layout: str, megatron: Any, vlm: dict[str, Path]) -> None:
    flags, world = LAYOUTS[layout]
    config = run.config_of(vlm[FAMILY], [*flags, FROZEN["image_encoder"]])
    seen = run_distributed(partial(counted, config=config), world)
    assert all(one == seen[0] for one in seen)
    sizes = dict.fromkeys(SLOTS, 0)
    for name, tensor in run.read(vlm[FAMILY]).items():
        sizes[slot_of(name)] += tensor.numel()
    sizes["foundation"] += 2 * 64 * (-tiny_vlm.VOCABULARY % config.parallel.tensor_model_parallel_size)  # padding
    assert seen[0] == {slot: (0 if slot == "image_encoder" else size, size) for slot, size in sizes.items()}


def counted(worker: Any, config: RunConfig) -> dict[str, tuple[int, int]]:
    """Trained and all parameters by component, as the run's table has them."""
    from loongforge.ckpt.workers import part_of

    with part_of(config) as part:
        return {
            slot: (
                sum(one.trained for one in part.model.parts if one.component == slot),
                sum(one.total for one in part.model.parts if one.component == slot),
            )
            for slot in SLOTS
        }


def test_patterns_freeze_parts_of_components(megatron: Any, vlm: dict[str, Path], tmp_path: Path) -> None:
    patterns = r"+model.freeze_parameters=['image_encoder\.decoder\.layers\.[01]\.','foundation\.embedding']"
    _, after = run.steps(run.config_of(vlm[FAMILY], [*TP2, *RATES, patterns]), 2, ["mixed"], tmp_path)
    before = run.read(vlm[FAMILY])
    still = {name for name, tensor in after.items() if torch.equal(tensor, before[name])}
    assert still == {name for name in before if re.search(r"visual\.blocks\.[01]\.|language_model\.embed_tokens", name)}


def test_a_pattern_that_matches_nothing_is_an_error_everywhere(megatron: Any, vlm: dict[str, Path]) -> None:
    patterns = r"+model.freeze_parameters=['image_encoder\.','no_such_part']"
    config = run.config_of(vlm[FAMILY], [*AHEAD, patterns])
    problems = run_distributed(partial(refusal, config=config), 2)
    assert problems[0] == problems[1]
    assert problems[0].startswith("model.freeze_parameters: 'no_such_part' matches no parameter; names are like")
    assert "image_encoder." in problems[0], "the names shown have their component before them"


def refusal(worker: Any, config: RunConfig) -> str:
    from loongforge.ckpt.workers import part_of

    with pytest.raises(ConfigError) as caught, part_of(config):
        pass
    assert len(caught.value.problems) == 1
    return str(caught.value)


MISFITS = {
    "wide projector": (
        ["+model.image_projector.output_size=63"],
        r"model\.image_projector \(qwen_mlp_adapter\) states output_size=63, but model\.foundation \(qwen3\) has "
        r"hidden_size=64: set model\.image_projector\.output_size=null",
    ),
    "narrow projector": (
        ["+model.image_projector.input_size=47"],
        r"states input_size=47, but model\.image_encoder \(qwen3_vit\) has hidden_size=48",
    ),
    "unknown composition": (["+model.model_type=qwen3_vll"], r"model_type.*no composition 'qwen3_vll'.*'qwen3_vl'"),
    "no composition": (["+model.model_type=null"], r"model\.model_type is not given.*name one of .*qwen3_vl"),
    "shallow foundation": (
        ["+model.image_encoder.deepstack_layers=[0,1,2]", "model.foundation.num_layers=2"],
        r"of 3 of its layers to the first layers of the foundation, but model\.foundation \(qwen3\) has num_layers=2",
    ),
    "no projector": (["+model.image_projector=null"], r"image_encoder.*needs an image_projector beside it"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_components_that_do_not_fit_are_one_error(misfit: str, vlm: dict[str, Path]) -> None:
    overrides, message = MISFITS[misfit]
    with pytest.raises(ForgeError) as caught:
        Plan.of(run.config_of(vlm[FAMILY], overrides), 1)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert len(caught.value.problems) == 1, str(caught.value)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA 3 of random weights."""
    import transformers as hf

    path = tmp_path_factory.mktemp("llama")
    text = {**tiny_vlm.TEXT, "hidden_size": 40, "vocab_size": 137}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**text, head_dim=16, bos_token_id=1, eos_token_id=2))
    tiny_vlm.randomise(model, seed=3)
    model.save_pretrained(path)
    return path


def test_a_model_of_ones_own(megatron: Any, vlm: dict[str, Path], llama: Path, tmp_path: Path) -> None:
    """CustomCombinedModel: two directories and a fresh projector, trained, exported side by side, loaded back."""
    vision = vlm["qwen2_5_vl"]
    shape = [
        "--model-name", "qwen_vit_llama3_8b", "--fp32", "--training-phase", "sft", "--seq-length", "48",
        "--micro-batch-size", "1", "--global-batch-size", "4", "--train-iters", "2", "--lr", "1e-3",
        "--weight-decay", "0", "--num-workers", "0", "data.source=mock", "data.min_pixels=64", "data.max_pixels=512",
    ]  # fmt: skip
    sizes = [
        *tiny_sizes.overrides(resolve(shape)),
        "model.image_encoder.hidden_size=48", "model.image_encoder.ffn_hidden_size=56",
        "model.foundation.hidden_size=40", "model.foundation.ffn_hidden_size=88", "model.foundation.vocab_size=137",
    ]  # fmt: skip
    given = [f"+model.image_encoder.load={vision}", f"+model.foundation.load={llama}"]
    words = [*shape, *sizes, *given, *TP2, "--nproc-per-node", "2"]

    run_distributed(partial(moved_on, config=resolve(words, note=lambda _: None), out=tmp_path / "first"), 2)
    first = {slot: run.read(tmp_path / "first" / slot) for slot in SLOTS}
    same(first["foundation"], run.read(llama))
    whole = run.read(vision)
    begin = next(name for name in whole if "visual." in name).partition("visual.")[0] + "visual."
    tower = {name.removeprefix(begin): tensor for name, tensor in whole.items() if name.startswith(begin)}
    same(first["image_encoder"], {name: one for name, one in tower.items() if not name.startswith("merger.")})
    assert first["image_projector"].keys() == {name for name in tower if name.startswith("merger.")}

    ended = command_line.trained(*words, "--save", tmp_path / "run", "--save-hf", folder=tmp_path)
    assert "image_projector: freshly initialised." in ended.out
    exported = tmp_path / "run" / "hf"
    assert sorted(path.name for path in exported.iterdir()) == sorted(SLOTS)
    for slot in SLOTS:
        after = run.read(exported / slot)
        assert after.keys() == first[slot].keys()
        assert not any(torch.equal(tensor, first[slot][name]) for name, tensor in after.items()), slot

    again = [*shape, *sizes, "--load", exported]
    run_distributed(
        partial(moved_on, config=resolve(list(map(str, again)), note=lambda _: None), out=tmp_path / "b"), 1
    )
    for slot in SLOTS:
        same(run.read(tmp_path / "b" / slot), run.read(exported / slot))


def moved_on(worker: Any, config: RunConfig, out: Path) -> None:
    """Load as a run would and export."""
    from loongforge.ckpt.workers import part_of
    from loongforge.core.checkpoint.export import export_hf
    from loongforge.core.checkpoint.load import load_weights
    from loongforge.core.checkpoint.start import find_start

    with part_of(config) as part:
        load_weights(part.plan, part.world, part.model, find_start(config.checkpoint))
        export_hf(part.plan, part.world, part.model, out)


def same(found: run.Tensors, expected: run.Tensors) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []

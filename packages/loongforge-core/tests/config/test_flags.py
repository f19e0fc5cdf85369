"""The flag table: complete against megatron-core's parser, nothing stale, and every accepted flag changes the run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from loongforge.core.config import typed
from loongforge.core.config.arguments import parse
from loongforge.core.config.flags import AGREED, ALIASES, GEOMETRY, NEEDLESS, OWN, Flag, accepted
from loongforge.core.config.flags_refused import refused
from loongforge.core.config.run import RunConfig
from loongforge.core.errors import ConfigError

PARSER = """
import argparse, json
from megatron.training.arguments import add_megatron_arguments

parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False, add_help=False))
found = {}
for action in parser._actions:
    bare = action.nargs == 0
    takes = "switch" if bare else "many" if action.nargs in ("+", "*") or isinstance(action.nargs, int) else "one"
    for option in action.option_strings:
        found[option.removeprefix("--").replace("_", "-")] = takes
print("FLAGS" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def megatron() -> dict[str, str]:
    """Every flag of megatron-core's parser by name, and what it takes. About 15 s, in a process of its own."""
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PARSER], capture_output=True, text=True, check=True, timeout=300
    )
    return json.loads(next(line for line in answer.stdout.splitlines() if line.startswith("FLAGS"))[5:])


def test_every_megatron_flag_is_accepted_or_refused(megatron: dict[str, str]) -> None:
    assert len(megatron) > 700, "the parser was not read"
    assert sorted(set(megatron) - set(accepted()) - set(refused())) == []


def test_the_table_names_no_flag_that_megatron_lacks(megatron: dict[str, str]) -> None:
    named = {flag.name for flag in (*ALIASES, *GEOMETRY, *AGREED)} | set(refused())
    assert sorted(named - set(megatron)) == []


def test_flags_take_what_megatrons_take(megatron: dict[str, str]) -> None:
    shared = {name: flag for name, flag in accepted().items() if name in megatron}
    assert {name for name, flag in shared.items() if flag.takes != megatron[name]} == set()


def test_no_flag_is_both_accepted_and_refused() -> None:
    assert set(accepted()) & set(refused()) == set()
    names = Counter(flag.name for flag in (*ALIASES, *OWN, *GEOMETRY, *AGREED, *NEEDLESS))
    assert [name for name, count in names.items() if count > 1] == []


def test_every_refusal_says_why_and_what_to_do() -> None:
    for name, refusal in refused().items():
        assert refusal.because, name
        assert refusal.remedy[0].isupper(), name
        for word in refusal.remedy.replace(",", " ").split():
            if word.startswith("--"):
                assert word.removeprefix("--") in accepted(), f"the remedy of --{name} names {word}"


def leaf(path: str) -> Any:
    """Type of the field at a dotted path of the run."""
    kind: Any = RunConfig
    for name in path.split("."):
        kind = get_type_hints(kind)[name]
    return kind


def sample(kind: Any) -> list[str]:
    """Two words that a field of this type takes, of which at least one is not its default."""
    if get_origin(kind) is Literal:
        return [str(one) for one in get_args(kind)]
    inner = [one for one in get_args(kind) if one not in (type(None), ...)]
    if inner:
        return sample(inner[0])
    return {int: ["3", "5"], float: ["0.25", "0.5"]}.get(kind, ["some", "text"])


def words(flag: Flag, value: str) -> list[str]:
    return [f"--{flag.name}"] if flag.takes == "switch" else [f"--{flag.name}", value]


WORDS = {
    "lora.patterns": ["*.mlp.* rank=4", "q_proj alpha=8"],
    "tokenizer.chat_template_kwargs": ['{"enable_thinking": false}', '{"date_string": "today"}'],
}
"""Of fields whose text must say something."""
COMPONENTS = ("model.foundation.", "model.image_encoder.", "model.image_projector.")
FIELD_FLAGS = [flag for flag in accepted().values() if flag.path and not flag.path.startswith(COMPONENTS)]


@pytest.mark.parametrize("flag", FIELD_FLAGS, ids=lambda flag: flag.name)
def test_every_accepted_flag_reaches_its_field(flag: Flag, acme: Path) -> None:
    """The value written arrives, typed; a flag without effect cannot be in the table."""
    reached: set[str] = set()
    for value in WORDS.get(flag.path) or sample(leaf(flag.path)):
        arguments = parse(words(flag, value))
        assert arguments.problems == []
        section, _, name = flag.path.rpartition(".")
        content: dict[str, Any] = {"model": {"foundation": {"family": "acme", "num_layers": 1, "hidden_size": 4}}}
        at = content.setdefault(section, {}) if section else content
        at[name] = arguments.given[flag.path].value
        companions = {"node_rank": {"nnodes": 9}, "min_lr": {"lr": 9}}
        at.update(companions.get(name, {}))
        if name == "requires":
            at[name] = ["pydantic"]
        run = typed.build(content, {}, [])
        found = asdict(run)
        for part in flag.path.split("."):
            found = found[part]
        reached.add(repr(found))
    if flag.takes == "switch":
        assert reached == {repr(flag.writes)}
    elif flag.name != "requires":
        assert len(reached) > 1


def test_agreed_flags_accept_the_truth_and_refuse_the_rest() -> None:
    assert parse(["--swiglu", "--normalization", "RMSNorm", "--bf16"]).problems == []
    assert parse(["--moe-router-dtype", "fp32", "--optimizer", "adam"]).problems == []
    (problem,) = parse(["--normalization", "LayerNorm"]).problems
    assert problem == (
        "--normalization: 'LayerNorm' is not possible, every foundation has RMSNorm. Use 'RMSNorm' or leave it out."
    )


def test_flags_of_the_public_balancer_are_taken() -> None:
    """The two that turn it on write a field; what has nothing to decide here is said."""
    words = ["--use-vlm-dp-balance", "--use-vit-dp-balance", "--vlm-dp-balance-warmup-iters", "2", "3"]
    words += ["--dp-balance-max-len-ratio-vlm=1.2", "--dp-balance-trigger-threshold-vit", "0.2", "--dp-balance-verbose"]
    read = parse([*words, "data.balance_sync=step"])
    assert read.problems == []
    assert {path: given.value for path, given in read.given.items()} == {"data.balance": "analytic"}
    assert len(read.notes) == 4
    assert read.notes[0] == (
        "note: --vlm-dp-balance-warmup-iters changes nothing here: costs come from the model's geometry, so no step "
        "is spent on measuring them."
    )
    assert [override.text for override in read.overrides] == ["data.balance_sync=step"]


def test_arguments_are_read_as_megatron_users_write_them() -> None:
    read = parse(
        ["--tensor_model_parallel_size", "4", "--sequence-parallel", "--lr=1e-5", "--save-hf", "false", "--data-path",
         "0.3", "a=b.jsonl", "0.7", "/c/d", "optimizer.clip_grad=0.5", "--no-packing", "+train.seq-length=8"]
    )  # fmt: skip
    assert read.problems == []
    assert {path: given.value for path, given in read.given.items()} == {
        "parallel.tensor_model_parallel_size": "4",
        "parallel.sequence_parallel": True,
        "optimizer.lr": "1e-5",
        "checkpoint.save_hf": False,
        "data.data_path": ["0.3", "a=b.jsonl", "0.7", "/c/d"],
        "data.packing": False,
    }
    assert [override.hydra() for override in read.overrides] == ["++optimizer.clip_grad=0.5", "++train.seq_length=8"]


def test_shape_flags_reach_the_foundation() -> None:
    read = parse(
        ["--moe-aux-loss-coeff", "0.01", "--mrope-section", "24", "20", "20", "--num-experts", "8",
         "--moe-router-load-balancing-type", "seq_aux_loss"]
    )  # fmt: skip
    assert read.problems == []
    assert {path.rpartition(".")[2]: given.value for path, given in read.given.items()} == {
        "moe_aux_loss_coeff": "0.01",
        "mrope_section": ["24", "20", "20"],
        "num_experts": "8",
        "moe_router_load_balancing_type": "seq_aux_loss",
    }


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--lrr", "1"], "--lrr: unknown flag. Did you mean --lr?"),
        (["--fp16"], "--fp16: refused, fp16 with loss scaling is not trained here. Use --bf16 or --fp32."),
        (["--lr"], "--lr: needs a value."),
        (["--moe-aux-loss-coeff", "0.1", "0.2"], "--moe-aux-loss-coeff: takes one value here, got 0.1 0.2."),
        (["--moe-router-load-balancing-type", "sinkhorn"],
         "--moe-router-load-balancing-type: 'sinkhorn' is refused, its choice is another one than the model's, so its "
         "weights would mean something else."),
        (["--moe-token-dispatcher-type", "flex"],
         "--moe-token-dispatcher-type: 'flex' is refused, it needs the kernels of DeepEP or HybridEP, which no "
         "platform here has."),
        (["--bf16=yes"], "--bf16: takes no value, got 'yes'."),
        (["--packing=maybe"], "--packing: takes true or false, got 'maybe'."),
        (["run.yaml"], "'run.yaml': neither a flag (--name value) nor an override (key=value). "
                       "Did you mean --config-file run.yaml?"),
        (["--bf16", "--fp32"], "--bf16 and --fp32 contradict each other: both set train.precision."),
        (["hydra.run.dir=x"], "'hydra.run.dir=x': Hydra's own settings have no effect here. Remove it."),
        (["+optimizer.lr"], "'+optimizer.lr': an override needs a value: optimizer.lr=VALUE."),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_said(argv: list[str], problem: str) -> None:
    assert parse(argv).problems == [problem]


def test_all_problems_of_a_command_line_come_at_once(acme: Path) -> None:
    from loongforge.core.config.resolve import resolve

    with pytest.raises(ConfigError) as caught:
        resolve(["--model-name", "acme-2b", "--lrr", "1", "--fp16", "--lr", "fast", "train.precision=bf61"])
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "--lrr", "--fp16", "optimizer.lr (--lr)", "train.precision",
    ]  # fmt: skip

"""`loongforge quickstart`: train, fine-tune, export and ask a small model, start to end, on this machine."""

from __future__ import annotations

import json
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from loongforge.core import plugins
from loongforge.core.cli import arguments
from loongforge.core.errors import ConfigError, ForgeError

if TYPE_CHECKING:
    from loongforge.core.platform.choose import Choice
    from loongforge.core.quickstart import Places, Quickstart, Screen, Stages, Summary
    from loongforge.core.quickstart.vlm import VlmPlaces, VlmQuickstart, VlmSummary

OWNER, EXTRA, VLM_EXTRA = "loongforge-core", "quickstart", "quickstart-vlm"
"""The extras that bring what the quickstarts need beyond training."""


def command(argv: list[str]) -> int:
    """Run the quickstart; 0 when the held-out loss is well below the unigram entropy, or the images are read well.

    Raises `ConfigError` for wrong arguments, a missing extra or an output directory with other things in it, the error
    of a training that failed, and `ForgeError` when the model learned too little.
    """
    asked = _parser().parse_args(argv)
    extra = VLM_EXTRA if asked.vlm else EXTRA
    if lacking := plugins.unmet(distribution(OWNER), extra):
        raise ConfigError(f"quickstart needs {', '.join(lacking)}: pip install '{OWNER}[{extra}]'")
    from loongforge.core.platform import choose
    from loongforge.core.quickstart import Screen

    stream = sys.stderr if asked.json else sys.stdout
    screen, choice = Screen(stream), choose()
    story = (_vlm_story if asked.vlm else _story)(asked, choice, screen, stream)
    recipe, places = story.recipe, story.places
    _prepare(places, fresh=asked.fresh)
    screen.say(
        f"Output: {places.output}. Platform {choice.name} ({choice.reason}), {recipe.workers} worker(s), "
        f"{recipe.precision}."
    )
    summary = story.run()
    text = json.dumps(summary.as_json(), indent=2)
    places.summary.write_text(text + "\n", encoding="utf-8")
    _show(summary, screen)
    if asked.json:
        print(text)
    if not summary.passed:
        raise ForgeError(f"the model learned too little: {summary.verdict}. Give it more --steps.")
    return 0


def _parser() -> arguments.Parser:
    parser = arguments.parser(
        "quickstart",
        "",
        "--vlm",
        "--output /tmp/first --fresh",
        "--nproc-per-node 1",
        "--steps 2000",
        "--json > summary.json",
    )
    parser.add_argument("--vlm", action="store_true", help="a model that sees: it learns to read handwritten digits")
    parser.add_argument(
        "--output", metavar="DIR", help="where everything goes (./quickstart, with --vlm ./quickstart-vlm)"
    )
    parser.add_argument(
        "--nproc-per-node", type=_whole, metavar="N", help="workers; 2 on CPU, one per accelerator otherwise"
    )
    parser.add_argument(
        "--steps", type=_whole, metavar="N", help="optimizer steps of (pre-)training; a third to fine-tune text"
    )
    parser.add_argument("--fresh", action="store_true", help="start over; a rerun takes up finished stages otherwise")
    parser.add_argument("--json", action="store_true", help="for programs: the summary on stdout, all else on stderr")
    return parser


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"loongforge quickstart: expected a whole number of at least 1, got {text!r}.")
    return int(text)


def _story(asked: Namespace, choice: Choice, screen: Screen, stream: TextIO) -> Quickstart:
    """The quickstart with text, as this machine trains it."""
    from loongforge.core.quickstart import Places, Quickstart, Recipe

    places = Places(Path(asked.output or "quickstart"))
    recipe = Recipe(**_size(asked, choice, Recipe.most_workers))
    return Quickstart(recipe=recipe, places=places, stages=_stages(places, screen), screen=screen, train_stdout=stream)


def _vlm_story(asked: Namespace, choice: Choice, screen: Screen, stream: TextIO) -> VlmQuickstart:
    """The quickstart with images, as this machine trains it."""
    from loongforge.core.quickstart.vlm import VlmPlaces, VlmQuickstart, VlmRecipe

    places = VlmPlaces(Path(asked.output or "quickstart-vlm"))
    recipe = VlmRecipe(**_size(asked, choice, VlmRecipe.most_workers))
    stages = _stages(places, screen)
    return VlmQuickstart(recipe=recipe, places=places, stages=stages, screen=screen, train_stdout=stream)


def _size(asked: Namespace, choice: Choice, most_workers: Callable[[int], int]) -> dict[str, Any]:
    """Workers, precision and steps: as asked, else as fits the platform."""
    on_cpu = choice.spec.device == "cpu"
    workers: int | None = asked.nproc_per_node
    if workers is None:
        workers = 2 if on_cpu else most_workers(choice.platform().device_count())
    given = {} if asked.steps is None else {"steps": asked.steps}
    return {"workers": workers, "precision": "fp32" if on_cpu else "bf16", **given}


def _stages(places: Places | VlmPlaces, screen: Screen) -> Stages:
    from loongforge.core.quickstart import Stages

    return Stages(places.stages, screen.stage)


def _prepare(places: Places | VlmPlaces, *, fresh: bool) -> None:
    """Make the output directory, emptied of an earlier quickstart when `fresh`; nothing else in it is touched."""
    output = places.output
    try:
        if output.exists() and not places.stages.is_dir() and any(output.iterdir()):
            raise ConfigError(
                f"--output {output}: not empty and no quickstart of this kind. Give a new or an empty directory."
            )
        output.mkdir(parents=True, exist_ok=True)
        for entry in places.entries if fresh else ():
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {output}: {error.strerror}. Give a directory that can be written.") from error


def _show(summary: Summary | VlmSummary, screen: Screen) -> None:
    rows = [(one.name, f"{one.seconds:.1f}", f"{one.cpu_seconds:.1f}") for one in summary.stages]
    total = (sum(one.seconds for one in summary.stages), sum(one.cpu_seconds for one in summary.stages))
    screen.heading("Time")
    screen.table(("stage", "seconds", "CPU seconds"), [*rows, ("total", *(f"{value:.1f}" for value in total))])
    screen.heading("Where everything lies")
    for name, path in summary.paths():
        screen.say(f"{name:14}{path}")
    screen.heading("Result")
    screen.say(summary.verdict[0].upper() + summary.verdict[1:] + ".")
    screen.say(summary.closing)

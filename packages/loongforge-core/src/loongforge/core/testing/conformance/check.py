"""The checks of a family in order, each in processes of its own."""

from __future__ import annotations

import tempfile
import traceback
import unittest
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from loongforge.core import plugins
from loongforge.core.errors import ForgeError
from loongforge.core.plugins import Plugin
from loongforge.core.testing.conformance.report import FamilyReport, Outcome, Skipped
from loongforge.core.testing.distributed import run_distributed

TIMEOUT = 900.0
"""Seconds for all checks together; each has a shorter one of its own."""


def check_family(name: str, *, tiny: Mapping[str, Any] | None = None, directory: Path | None = None) -> FamilyReport:
    """Check the registered model family `name` (or `owner:name`), from its registration to exact resume.

    On the platform of LOONGFORGE_PLATFORM; what needs more devices than it has is skipped.

    The smallest size is shrunk by `conformance.subject.SHRUNK`; `tiny` sets or overrides fields of the family's config
    where that does not give a model. Checkpoints are written below `directory`, or below a temporary one. Needs the
    `hf` checkpoint format (`pip install loongforge-ckpt`). transformers is used when it is installed and has the class
    that `hf_architectures` names; `FamilyReport.skipped` says when it was not.

    Nothing is imported or changed in the calling process. Raises `AssertionError` naming the check that failed and why.
    """
    with tempfile.TemporaryDirectory(prefix="loongforge-check-") as scratch:
        where = (directory or Path(scratch)).resolve()
        (found,) = run_distributed(lambda worker: _check(name, dict(tiny or {}), where), 1, timeout=TIMEOUT)
    if isinstance(found, str):
        raise AssertionError(found)
    return found


def _check(name: str, tiny: Mapping[str, Any], directory: Path) -> FamilyReport | str:
    """In a process of its own: it may import megatron-core under the platform and pass it on to its workers.

    The report, or the text of the failure.
    """
    warnings.simplefilter("ignore")  # what torch and megatron-core warn about is not the family's doing
    outcomes: list[Outcome] = []
    title, label = "registration", f"model {name!r}"
    try:
        plugin = plugins.pick("models", name)
        label = f"{plugin.label} from {plugin.owner}"
        for title, step in _checks(plugin, tiny, directory):
            try:
                outcomes.append(Outcome(check=title, skipped=False, detail=step()))
            except (Skipped, unittest.SkipTest) as reason:
                outcomes.append(Outcome(check=title, skipped=True, detail=str(reason)))
    except (AssertionError, ForgeError) as error:
        return f"{label} fails the check {title!r}: {error}"
    except Exception as error:  # noqa: BLE001  a third party's code may raise anything; it is the family's failure
        return f"{label} fails the check {title!r}: {type(error).__name__}: {error}\n{traceback.format_exc()}"
    return FamilyReport(family=plugin.name, owner=plugin.owner, outcomes=tuple(outcomes))


def _checks(plugin: Plugin, tiny: Mapping[str, Any], directory: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    """Checks by name, each to be called before the next is asked for."""
    from loongforge.core.testing.conformance import registration

    yield "registration", partial(registration.is_plain, plugin)
    yield "sizes", partial(registration.sizes_resolve, plugin)
    yield "configuration", partial(registration.config_round_trips, plugin)

    from loongforge.core.megatron.start import preload
    from loongforge.core.platform import choose

    preload(choose().platform())
    from loongforge.core.testing.conformance import layouts, resume, transformers_parity, weights
    from loongforge.core.testing.conformance.subject import Subject

    subjects: list[Subject] = []

    def shrink() -> str:
        subjects.append(Subject.of(plugin, tiny, directory))
        return subjects[0].describe()

    yield "tiny model", shrink
    yield "weight table", partial(weights.table_is_complete, subjects[0])
    yield "Hugging Face round trip", partial(weights.round_trip_is_exact, subjects[0])
    yield "training", partial(weights.training_learns, subjects[0])
    yield "layouts", partial(layouts.agree, subjects[0])
    yield "transformers", partial(transformers_parity.agrees, subjects[0])
    yield "resume", partial(resume.is_exact, subjects[0])

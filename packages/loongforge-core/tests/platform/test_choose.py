"""Which platform a run gets, and the sentence that says why."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from loongforge.core import plugins
from loongforge.core.errors import PlatformError
from loongforge.core.platform import choose
from loongforge.core.plugins import PlatformSpec

Probe = tuple[bool, str]


def spec(name: str, answer: Probe) -> PlatformSpec:
    return PlatformSpec(
        name=name, api=(1, 0), device="cuda", probe=lambda: lambda: answer, platform=lambda: object, summary="."
    )  # type: ignore[arg-type]


@pytest.fixture
def platforms(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`platforms(acme=(True, "why"))` are the only ones registered, besides the CPU."""
    monkeypatch.delenv("LOONGFORGE_PLATFORM", raising=False)

    def register(**answers: Probe) -> None:
        specs = {"cpu": spec("cpu", (True, "always available"))}
        specs |= {name: spec(name, answer) for name, answer in answers.items()}
        monkeypatch.setattr(
            plugins, "usable", lambda kind: [SimpleNamespace(name=name, spec=one) for name, one in specs.items()]
        )
        monkeypatch.setattr(plugins, "load", lambda kind, name: specs[name])

    return register


def test_named(platforms: Any) -> None:
    platforms(acme=(True, "2 devices"))
    choice = choose("acme")
    assert (choice.name, choice.reason) == ("acme", "asked for; 2 devices")


def test_named_by_the_environment(platforms: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    platforms(acme=(True, "2 devices"))
    monkeypatch.setenv("LOONGFORGE_PLATFORM", " Acme ")
    assert choose().reason == "LOONGFORGE_PLATFORM; 2 devices"
    assert choose("cpu").name == "cpu", "the argument goes before the environment"


def test_auto_takes_the_only_accelerator(platforms: Any) -> None:
    platforms(acme=(True, "2 devices"), other=(False, "no device"))
    assert (choose("auto").name, choose().name) == ("acme", "acme")
    assert choose().reason == "auto: 2 devices"


def test_auto_without_accelerator_says_why_each_was_refused(platforms: Any) -> None:
    platforms(acme=(False, "2 device nodes, but the driver library is absent"), other=(False, "no /dev/other*"))
    choice = choose()
    assert choice.name == "cpu"
    assert choice.reason == (
        "auto: no accelerator is here; acme: 2 device nodes, but the driver library is absent; other: no /dev/other*"
    )


def test_two_accelerators_are_a_question(platforms: Any) -> None:
    platforms(acme=(True, "2 devices"), other=(True, "1 device"))
    with pytest.raises(PlatformError, match=r"acme \(2 devices\) and other \(1 device\).*LOONGFORGE_PLATFORM=acme"):
        choose()


def test_unavailable(platforms: Any) -> None:
    platforms(acme=(False, "no device"))
    with pytest.raises(PlatformError, match=r"'acme' \(asked for\) is not available here: no device"):
        choose("acme")


def test_unknown_suggests_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlatformError, match=r"'cudda' \(asked for\).*Did you mean 'cuda'"):
        choose("cudda")
    monkeypatch.setenv("LOONGFORGE_PLATFORM", "cpuu")
    with pytest.raises(PlatformError, match=r"'cpuu' \(LOONGFORGE_PLATFORM\).*cpu"):
        choose()


def test_the_real_cpu() -> None:
    platform = choose("cpu").platform()
    memory = platform.memory()
    assert 0 < memory.current <= memory.peak
    assert (platform.device_count(), platform.fork_safe, platform.capabilities()) == (0, True, frozenset())

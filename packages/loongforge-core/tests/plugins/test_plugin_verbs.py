"""Verbs and rows that other wheels add to the command line."""

from __future__ import annotations

import json

import pytest

from loongforge.core.cli import main

VERB = """\
from loongforge.core.plugins import CommandSpec, Lazy

SPEC = CommandSpec(name="{name}", api=(1, 0), command=Lazy("{module}:run"), summary="Greets.")


def run(argv: list[str]) -> int:
    print("hello", *argv)
    return 7
"""


def verb(wheel, distribution: str, module: str, name: str = "greet") -> None:
    wheel(
        distribution,
        entries={"commands": {name: f"{module}:SPEC"}},
        files={f"{module}.py": VERB.format(name=name, module=module)},
    )


def listed(capsys: pytest.CaptureFixture[str], kind: str) -> dict[str, dict[str, object]]:
    assert main(["list", kind, "--json"]) == 0
    return {row["name"]: row for row in json.loads(capsys.readouterr().out)}


def test_a_registered_verb_runs_with_its_arguments_and_exit_code(wheel, capsys: pytest.CaptureFixture[str]) -> None:
    verb(wheel, "acme-tools", "acme_verb")
    assert main(["greet", "a", "--b"]) == 7
    assert capsys.readouterr().out == "hello a --b\n"
    assert main(["--help"]) == 0
    assert "  greet          Greets. (acme-tools)\n" in capsys.readouterr().out


def test_a_name_with_a_dot_is_said_in_two_words(wheel, capsys: pytest.CaptureFixture[str]) -> None:
    verb(wheel, "acme-tools", "acme_verb", name="weigh.boats")
    verb(wheel, "other-tools", "other_verb", name="weigh.drums")
    assert main(["weigh", "drums", "a", "--b"]) == 7
    assert capsys.readouterr().out == "hello a --b\n"
    assert main(["weigh"]) == main(["weigh", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "  weigh boats    Greets. (acme-tools)\n  weigh drums    Greets. (other-tools)\n" in shown
    assert main(["weigh", "boat"]) == 2
    said = capsys.readouterr().err
    assert said == "error: no verb 'weigh' 'boat'. Did you mean 'boats'? Known: boats, drums.\n"


def test_a_typing_error_finds_it(wheel, capsys: pytest.CaptureFixture[str]) -> None:
    verb(wheel, "acme-tools", "acme_verb")
    assert main(["gret"]) == 2
    assert "error: no verb 'gret'. Did you mean 'greet'? Known: " in capsys.readouterr().err


def test_a_built_in_verb_is_not_replaced_and_the_other_has_a_name(wheel, capsys: pytest.CaptureFixture[str]) -> None:
    verb(wheel, "acme-tools", "acme_verb", name="list")
    commands = listed(capsys, "commands")
    assert commands["list"]["owner"].startswith("loongforge-core ")
    assert commands["acme-tools:list"]["summary"] == "Greets."
    assert main(["acme-tools:list", "x"]) == 7
    assert capsys.readouterr().out == "hello x\n"


def test_two_owners_of_a_verb(wheel, capsys: pytest.CaptureFixture[str]) -> None:
    verb(wheel, "acme-tools", "acme_verb")
    verb(wheel, "acme-other", "acme_other")
    assert main(["greet"]) == 6
    assert capsys.readouterr().err == (
        "error: command 'greet' is registered by acme-other 0.1.0 and acme-tools 0.1.0. "
        "Say whose: 'acme-other:greet' or 'acme-tools:greet'.\n"
    )
    assert main(["acme-other:greet"]) == 7


def test_a_broken_verb_is_shown_in_help_and_refused(wheel, capsys: pytest.CaptureFixture[str]) -> None:
    wheel("acme-tools", entries={"commands": {"greet": "acme_gone:SPEC"}}, files={})
    assert main(["--help"]) == 0
    assert "  greet          broken: command 'greet' from acme-tools 0.1.0 failed to load" in capsys.readouterr().out
    assert main(["greet"]) == 6
    assert "ModuleNotFoundError: No module named 'acme_gone'" in capsys.readouterr().err


def test_help_helps_when_the_filter_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOONGFORGE_PLUGINS", "nobody")
    assert main(["--help"]) == 0
    assert "error: LOONGFORGE_PLUGINS: no plugin is registered by 'nobody'." in capsys.readouterr().out
    assert main(["list", "models"]) == 6
    assert main(["doctor", "--quick", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert sum("LOONGFORGE_PLUGINS: no plugin is registered by 'nobody'." in one for one in report["problems"]) == 1


def test_switched_off_verbs_name_their_wheel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOONGFORGE_PLUGINS", "loongforge-core")
    for words in (["convert"], ["bench", "mtp"]):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert f"the verb {' '.join(words)!r} comes with loongforge-ckpt, which is not in use here" in said
    assert main(["bench", "ours"]) == 2
    assert "no verb 'bench' 'ours'. Known: kernels." in capsys.readouterr().err


def test_states_of_a_listing(wheel, acme, capsys: pytest.CaptureFixture[str]) -> None:
    extra = "Provides-Extra: big\nRequires-Dist: not-a-real-library; extra == 'big'\n"
    acme("acme-models", "acme_a", metadata=extra, extra="big")
    acme("acme-twin", "acme_b")
    wheel("acme-broken", entries={"models": {"busted": "acme_gone:FAMILY"}}, files={})
    models = listed(capsys, "models")
    assert models["acme-models:acme"]["state"] == "needs pip install 'acme-models[big]'"
    assert models["acme-twin:acme"]["state"] == "ready"
    assert models["acme-twin:acme"]["sizes"] == ["tiny"]
    assert models["busted"]["state"].startswith("broken: model 'busted' from acme-broken 0.1.0 failed to load")
    assert main(["list", "models"]) == 0
    text = capsys.readouterr().out
    assert "  acme-models:acme  acme-models 0.1.0  " in text
    assert "      role: foundation; modality: text; sizes: tiny\n" in text


def test_a_kernel_says_what_it_needs(wheel, capsys: pytest.CaptureFixture[str]) -> None:
    spec = (
        "from loongforge.kernels.spec import KernelSpec\n"
        "K = (KernelSpec(op='rms_norm', impl='acme', target='a:b', requires=('not-a-real-library>=2',)),\n"
        "     KernelSpec(op='rope', impl='acme', target='a:b'))\n"
    )
    wheel("acme-kernels", entries={"kernels": {"acme": "acme_k:K"}}, files={"acme_k.py": spec})
    kernels = listed(capsys, "kernels")
    assert kernels["rms_norm/acme"]["state"] == "needs pip install 'not-a-real-library>=2'"
    assert kernels["rope/acme"]["state"] == "ready"
    assert main(["show", "kernels", "acme", "--json"]) == 0
    assert [one["name"] for one in json.loads(capsys.readouterr().out)["kernels"]] == ["rms_norm/acme", "rope/acme"]


def test_show_a_family(acme, capsys: pytest.CaptureFixture[str]) -> None:
    site = acme(
        "acme-models", "acme_a", metadata="Provides-Extra: big\nRequires-Dist: nope; extra == 'big'\n", extra="big"
    )
    (site / "acme_a" / "configs").mkdir()
    (site / "acme_a" / "configs" / "tiny.yaml").touch()
    (site / "acme_a" / "README.md").touch()
    assert main(["show", "models", "acme", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "name": "acme",
        "owner": "acme-models 0.1.0",
        "state": "needs pip install 'acme-models[big]'",
        "registered": "loongforge.models: acme = acme_a.spec:FAMILY",
        "summary": "A family.",
        "api": "1.0",
        "modality": "text",
        "role": "foundation",
        "groups": [],
        "sizes": ["tiny"],
        "configs": str(site / "acme_a" / "configs"),
        "hf_architectures": [],
        "extra": "big",
        "missing": ["nope"],
        "folder": str(site / "acme_a"),
        "config_files": ["tiny.yaml"],
        "readme": str(site / "acme_a" / "README.md"),
    }
    assert main(["show", "models", "acme"]) == 0
    assert "sizes             tiny\n" in capsys.readouterr().out


def test_show_a_broken_one_is_no_error(wheel, capsys: pytest.CaptureFixture[str]) -> None:
    wheel("acme-broken", entries={"models": {"busted": "acme_gone:FAMILY"}}, files={})
    assert main(["show", "models", "busted"]) == 0
    text = capsys.readouterr().out
    assert "registered  loongforge.models: busted = acme_gone:FAMILY\n" in text
    assert "ModuleNotFoundError" in text


def test_doctor_warns_of_a_broken_plugin_and_stays_usable(wheel, capsys: pytest.CaptureFixture[str]) -> None:
    wheel("acme-broken", entries={"models": {"busted": "acme_gone:FAMILY"}}, files={})
    main(["doctor", "--quick", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert any(one.startswith("models: busted from acme-broken 0.1.0 is broken: ") for one in report["warnings"])
    assert not any("acme-broken" in one for one in report["problems"])

"""The shell of the command line: verbs, errors, exit codes, help, completion."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from loongforge.core.cli import VERBS, main, shell
from loongforge.core.errors import CheckpointError, ConfigError

RUN = [sys.executable, "-c", "import sys; from loongforge.core.cli import main; sys.exit(main())"]


def fails_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    def verb(argv: list[str]) -> int:
        raise error

    monkeypatch.setattr(shell, "find", lambda name: verb)
    return main(["train"])


def test_every_problem_is_a_line_on_stderr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert fails_with(monkeypatch, ConfigError("first", "second")) == 2
    assert capsys.readouterr() == ("", "error: first\nerror: second\n")


def test_the_error_fixes_the_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert fails_with(monkeypatch, CheckpointError("shard 3 is truncated")) == 5
    assert capsys.readouterr().err == "error: shard 3 is truncated\n"


def test_interrupt_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert fails_with(monkeypatch, KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        fails_with(monkeypatch, ZeroDivisionError())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "error: no verb 'trian'. Did you mean 'train'? Known: "),
        (["--lr", "1"], "error: --lr: give the verb first: loongforge VERB --lr ... . Verbs: train, "),
        (["list", "modles"], "error: no kind 'modles'. Did you mean 'models'? Known: models, compositions, "),
        (["list", "--jsn"], "error: loongforge list: unrecognized arguments: --jsn. See loongforge list --help."),
        (["show", "models"], "error: loongforge show: the following arguments are required: NAME."),
    ],
)
def test_typing_errors(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert capsys.readouterr().err.startswith(message)


def test_an_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "platforms", "cuddda"]) == 6
    assert capsys.readouterr().err.startswith("error: no platform 'cuddda'. Did you mean 'cuda'? Known: cpu, cuda")


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"loongforge {importlib.metadata.version('loongforge-core')}\n"
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {verb:14} {summary}\n" in text for verb, summary in VERBS.items())
    assert "\nexamples:\n" in text


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_module_and_help_with_examples(verb: str) -> None:
    done = subprocess.run([*RUN, verb, "--help"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"loongforge {verb}" in done.stdout


@pytest.mark.parametrize("verb", ["list", "show", "doctor"])
def test_small_verbs_take_their_summary_from_the_table(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert VERBS[verb] in text
    assert f"examples:\n  loongforge {verb}" in text


def test_a_closed_pipe_is_no_traceback() -> None:
    done = subprocess.run(f"'{sys.executable}' -c '{RUN[2]}' list --json | head -c 1", shell=True, capture_output=True)
    assert (done.stdout, done.stderr) == (b"{", b"")


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("loongforge sh", ["show"]),
        ("loongforge show pla", ["platforms"]),
        ("loongforge show platforms cu", ["cuda"]),
        ("loongforge list tr", ["trackers"]),
    ],
)
def test_completion_in_bash(typed: str, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_LOONGFORGE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
    done = subprocess.run(RUN, capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.stderr) == (expected, "")

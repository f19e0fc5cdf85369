"""Work over many items: in this process, in others, on a Ray cluster; always the same answers in order."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from loongforge.core.errors import DataError
from loongforge.data.cli import command
from loongforge.data.engine import Engine, Local, Ray, open_engine
from loongforge.data.parts import Part, PartEncoder, TextRules
from loongforge.data.tokenise import TokenizerChoice
from loongforge.data.tokenizer import open_tokenizer

needs_ray = pytest.mark.skipif(
    find_spec("ray") is None, reason="Ray is not installed: pip install 'loongforge-data[ray]'"
)
ENGINES = [
    pytest.param(Local(), id="threads"),
    pytest.param(Local(workers=2), id="processes"),
    pytest.param(Ray(workers=1), id="ray", marks=needs_ray),
]


@pytest.mark.filterwarnings("ignore")  # Ray's own, of files and processes it leaves to the operating system
@pytest.mark.parametrize("engine", ENGINES)
def test_answers_come_in_order_and_work_is_taken_as_it_is_needed(engine: Engine, tmp_path: Path) -> None:
    taken: list[int] = []

    def work() -> Iterator[Part]:
        for number in range(40):
            taken.append(number)
            path = tmp_path / f"{number}.txt"
            path.write_text(f"{number} 1 2")
            yield Part(path=str(path), first=0, last=5, size=5, ends=True)

    rules = TextRules(choice=TokenizerChoice(path=None, kind="NullTokenizer", vocab_size=100))
    answers = engine.map(PartEncoder, (rules, False), work())
    first = next(answers)
    assert len(taken) <= 9
    found = [first, *answers]
    assert [answer.tokens[0].tolist() for answer in found] == [[number, 1, 2] for number in range(40)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("engine", ENGINES)
def test_an_error_for_the_user_stays_one(engine: Engine) -> None:
    with pytest.raises(DataError, match=r"no tokenizer.json in nowhere"):
        list(engine.map(open_tokenizer, ("nowhere", None, 100), ["text"]))


@needs_ray
@pytest.mark.filterwarnings("ignore")
def test_a_cluster_writes_the_same_bytes(tokenizer_dir: Path, tmp_path: Path, write_rows) -> None:
    corpus = write_rows(tmp_path / "corpus.jsonl", [{"text": f"hello {n} 数据"} for n in range(3000)])
    words = ["preprocess", str(corpus), "--hf-tokenizer-path", str(tokenizer_dir), "--append-eod"]
    command([*words, "--output", str(tmp_path / "here")])
    command([*words, "--output", str(tmp_path / "there"), "--engine", "ray", "--split", "100,0,0"])
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"here{suffix}").read_bytes() == (tmp_path / f"there_train{suffix}").read_bytes()


def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DataError, match=r"--engine ray needs Ray: pip install 'loongforge-data\[ray\]'"):
        open_engine("ray", 0)

"""An export that fails says so on every rank, leaves the one before as it was, and leaves nothing else."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loongforge.ckpt.hf import save as save_module
from loongforge.ckpt.hf.load import load
from loongforge.ckpt.hf.save import save
from loongforge.core.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.fixture
def export(kit: Any, make_hf: Callable[..., Path]) -> Callable[..., list[str | None]]:
    """Load, prepare, save on every rank; the error text of each, None where there was none."""

    def run(out: Path, prepare: Callable[[Any], None] = lambda world: None, **layout: int) -> list[str | None]:
        source = make_hf(False)

        def work(world: Any) -> str | None:
            chunks = kit.chunks_of(world, torch.float32, tied=False)
            load(kit.move(source, world, chunks, tied=False))
            prepare(world)
            try:
                save(kit.move(out, world, chunks, tied=False, config={"model_type": "x"}, travel=source), 6000)
            except CheckpointError as error:
                return str(error)
            return None

        return kit.run_ranks(work, **layout)

    return run


def limit_file_size(world: Any) -> None:
    """On the last rank, no file may pass 4 kB: what a full disk looks like from inside."""
    if world.rank == world.size - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"pp": 2}])
def test_disk_full_midway(export: Callable[..., Any], tmp_path: Path, layout: dict[str, int]) -> None:
    out = tmp_path / "out"
    assert export(out) == [None]
    before = contents(tmp_path)
    texts = export(out, limit_file_size, **layout)
    assert len(set(texts)) == 1
    assert "cannot be written (File too large). What was there before is untouched." in texts[0]
    assert contents(tmp_path) == before


def test_disk_too_small_is_seen_before_writing(
    export: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(save_module.shutil, "disk_usage", lambda path: Usage)
    text = export(tmp_path / "out", tp=2)[1]
    assert "the export needs 0.000 GB, 0.000 GB are free. Nothing was written." in text
    assert not list(tmp_path.iterdir())


def test_unwritable_place(export: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    texts = export(tmp_path / "file" / "out", tp=2)
    assert texts[0] == texts[1]
    assert texts[0].startswith(f"{tmp_path}/file/out: cannot be written (")
    assert "exists and is not a directory" in export(tmp_path / "file")[0]


def test_complete_export_replaces_and_clears_leftovers(export: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export(out) == [None]
    first = contents(out)
    (out / "tokenizer.model").write_text("of the old export")
    (tmp_path / ".out.incomplete").mkdir()
    (tmp_path / ".out.incomplete" / "model-00001-of-00009.safetensors").write_text("half")
    (tmp_path / ".out.replaced").mkdir()
    assert export(out, pp=2) == [None, None]
    second = contents(out)
    assert second.keys() - first.keys() <= {name for name in second if name.startswith("model-")}
    assert second["config.json"] == first["config.json"]
    assert not (out / "tokenizer.model").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_foreign_files_are_not_deleted(export: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    text = export(tmp_path, tp=2)[0]
    assert "holds 'notes.txt', which no export writes and replacing the directory would delete" in text
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_failure_while_taking_the_name_brings_the_old_export_back(
    export: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert export(out) == [None]
    before = contents(out)
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == ".out.incomplete":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    assert "No space left on device" in export(out)[0]
    assert contents(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_parameter_without_a_rule(kit: Any, tmp_path: Path) -> None:
    def work(world: Any) -> str:
        chunks = kit.chunks_of(world, torch.float32, tied=False)
        kit.put(chunks[0], "decoder.layers.0.adapter.weight", (2, 2), torch.float32)
        with pytest.raises(CheckpointError) as caught:
            save(kit.move(tmp_path / "out", world, chunks, tied=False))
        return str(caught.value)

    texts = kit.run_ranks(work, tp=2)
    expected = "parameter 'decoder.layers.0.adapter.weight': no rule in the weight table says what it becomes."
    assert texts == [expected, expected]
    assert not list(tmp_path.iterdir())

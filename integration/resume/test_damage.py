"""Whatever is wrong with a checkpoint, its place or the disk: one clear error on every rank, older state stays."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loongforge.core.checkpoint.directory import RunDirectory


@pytest.fixture(scope="session")
def shared(tied: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes with optimizer shards on both; never changed by a test."""
    run = tmp_path_factory.mktemp("shared") / "run"
    tied.train(run, ["--use-distributed-optimizer"], 2)
    return run


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda at: _cut(at / "__1_0.distcp"), "__1_0.distcp is not what was written"),
    "flipped byte": (lambda at: _flip(at / "__0_0.distcp"), "__0_0.distcp is not what was written"),
    "missing file": (lambda at: (at / "__1_0.distcp").unlink(), "__1_0.distcp is missing"),
    "missing metadata": (lambda at: (at / ".metadata").unlink(), ".metadata is missing"),
    "flipped metadata": (lambda at: _flip(at / ".metadata"), ".metadata is not what was written"),
    "other manifest": (
        lambda at: (at / "manifest.json").write_text((at / "manifest.json").read_text().replace(": 12,", ": 16,")),
        "manifest.json is not what was written",
    ),
    "damaged integrity": (lambda at: _cut(at / "integrity.json"), "integrity.json cannot be read: JSONDecodeError"),
    "missing integrity": (lambda at: (at / "integrity.json").unlink(), "integrity.json cannot be read: FileNotFound"),
    "empty integrity": (
        lambda at: (at / "integrity.json").write_text('{"algorithm": "sha256", "files": {}}'),
        "integrity.json does not list .metadata, manifest.json, metadata.json",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_on_every_rank(damage: str, tied: Any, shared: Path, tmp_path: Path) -> None:
    run = tied.back(shared, tmp_path / "run")
    spoil, text = DAMAGES[damage]
    spoil(RunDirectory(run).path(3))
    error = tied.refused(run, ["--use-distributed-optimizer"], 2)
    assert error.startswith(f"CheckpointError: {RunDirectory(run).path(3)} is damaged: ")
    assert text in error
    assert error.endswith("Load another checkpoint of this run.")


def test_another_checkpoint_of_a_damaged_run_loads(tied: Any, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    _flip(RunDirectory(run).path(6) / "__0_0.distcp")
    assert "is damaged" in tied.refused(run)
    start = ["--config-file", str(run / "config.yaml"), "--load", str(RunDirectory(run).path(3))]
    said = tied.train(tmp_path / "next", start)
    assert "Resuming at step 3" in said
    assert tied.curve(tmp_path / "next") == tied.curve(whole)[3:]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "is damaged: Expecting property name"),
        ("[]", "is damaged: it is not an object"),
        ('{"step": 3}', "missing 6 required keyword-only arguments"),
        ("wrong type", "is damaged: step is '3', not of type int"),
        ("unknown key", "unexpected keyword argument 'speed'"),
        ("newer", "has format 3, this version reads 2. Upgrade loongforge-core."),
    ],
)
def test_a_damaged_manifest_is_refused(content: str, text: str, tied: Any, whole: Path, tmp_path: Path) -> None:
    run = tied.back(whole, tmp_path / "run")
    file = RunDirectory(run).path(3) / "manifest.json"
    good = json.loads(file.read_text())
    changed = {"wrong type": good | {"step": "3"}, "unknown key": good | {"speed": 1}, "newer": good | {"format": 3}}
    file.write_text(json.dumps(changed[content]) if content in changed else content)
    assert text in tied.refused(run)


def test_latest_that_points_nowhere_names_what_there_is(tied: Any, whole: Path, tmp_path: Path) -> None:
    run = tied.back(whole, tmp_path / "run")
    (run / "latest").write_text("step_00000099\n")
    error = tied.refused(run)
    assert "names 'step_00000099', which is not there. Complete checkpoints: step_00000003." in error


def test_a_checkpoint_that_was_published_and_not_yet_named_is_taken_up(tied: Any, whole: Path, tmp_path: Path) -> None:
    """What a kill between the two leaves behind."""
    run = tied.back(whole, tmp_path / "run")
    (run / "latest").unlink()
    assert RunDirectory(run).latest() == RunDirectory(run).path(3)
    assert RunDirectory(tmp_path / "nothing").latest() is None


def test_a_checkpoint_of_another_model_is_refused_by_name_and_shape(
    tied: Any, untied: Any, whole: Path, tmp_path: Path
) -> None:
    run = tied.back(whole, tmp_path / "run")
    error = tied.refused(run, ["--ffn-hidden-size", "96"], 2)
    assert "decoder.layers.mlp.linear_fc2.weight is [4, 48, 80] there and [4, 48, 96] in the model" in error
    error = untied.refused(run)
    assert "it lacks " in error
    assert "output_layer.weight" in error
    other = tmp_path / "untied"
    untied.train(other)
    error = tied.refused(untied.back(other, tmp_path / "other"))
    assert "it holds tensors that the model does not have: output_layer.weight" in error


def test_changed_data_is_refused_until_it_is_accepted(tied: Any, whole: Path, tmp_path: Path) -> None:
    run = tied.back(whole, tmp_path / "run")
    changed = ["--seed", "4321", "--global-batch-size", "8"]
    error = tied.refused(run, changed)
    assert "global_batch_size: '4' -> '8'; seed: '1234' -> '4321'" in error
    assert "checkpoint.allow=[global_batch_size,seed]" in error
    assert "seed" in tied.refused(run, [*changed, "checkpoint.allow=[global_batch_size]"])
    said = tied.train(run, [*changed, "checkpoint.allow=[global_batch_size,seed]"])
    assert "Accepted change of data: seed." in said


@pytest.mark.parametrize("where", ["a file", "/proc/loongforge"])
def test_a_directory_that_cannot_be_written_is_refused(where: str, tied: Any, tmp_path: Path) -> None:
    save = Path(where) if where.startswith("/") else tmp_path / "file" / "run"
    (tmp_path / "file").write_text("")
    error = tied.refused(save, (), 2)
    assert error.startswith(f"CheckpointError: cannot write into --save {save}: ")


def full_disk(rank: int, name: str) -> Callable[[Any], None]:
    """Let writing files that end with `name` fail on one rank, as a full disk does."""

    def install(worker: Any) -> None:
        if worker.rank != rank:
            return
        import builtins
        import io

        real = io.open

        def careful(file: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
            if ("w" in mode or "a" in mode) and str(file).endswith(name):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
            return real(file, mode, *rest, **more)

        builtins.open = io.open = careful

    return install


@pytest.mark.parametrize("flags", [[], ["--async-save"]], ids=["foreground", "background"])
@pytest.mark.parametrize(
    ("rank", "name"),
    [(0, "__0_0.distcp"), (1, "__1_0.distcp"), (0, ".metadata.tmp"), (0, "/metadata.json"), (0, "integrity.json")],
)
def test_a_full_disk_on_one_rank_stops_all_and_keeps_the_previous_checkpoint(
    rank: int, name: str, flags: list[str], tied: Any, shared: Path, tmp_path: Path
) -> None:
    run = tied.back(shared, tmp_path / "run")
    flags = [*flags, "--use-distributed-optimizer"]
    error = tied.refused(run, flags, 2, before=full_disk(rank, name))
    assert f"rank {rank}: " in error
    assert "No space left on device" in error
    assert f"The latest complete checkpoint is {RunDirectory(run).path(3)}." in error
    assert RunDirectory(run).steps() == [3]
    tied.train(run, flags, 2)
    assert tied.curve(run) == tied.curve(shared)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000003", "step_00000006"]


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.target),))


def _sign(checkpoint: Path) -> None:
    """What an attacker does too: make the hashes fit."""
    from megatron.core.dist_checkpointing.validation import save_integrity_manifest

    save_integrity_manifest(str(checkpoint))


def test_metadata_that_would_run_code_is_refused(tied: Any, whole: Path, tmp_path: Path) -> None:
    run, proof = tied.back(whole, tmp_path / "run"), tmp_path / "proof"
    checkpoint = RunDirectory(run).path(3)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Bomb(proof)))
    _sign(checkpoint)
    error = tied.refused(run, (), 2)
    assert "it asks to call posix.mkdir, which no checkpoint needs" in error
    assert not proof.exists()


def test_an_object_among_the_tensors_that_would_run_code_is_refused(tied: Any, whole: Path, tmp_path: Path) -> None:
    import torch

    from loongforge.core.checkpoint.safe_metadata import read_metadata

    run, proof = tied.back(whole, tmp_path / "run"), tmp_path / "proof"
    checkpoint = RunDirectory(run).path(3)
    metadata = read_metadata(checkpoint)
    index = next(index for index in metadata.storage_data if index.fqn.startswith("random"))
    place = metadata.storage_data[index]
    torch.save([Bomb(proof)], checkpoint / "bomb")
    bomb = (checkpoint / "bomb").read_bytes()
    (checkpoint / "bomb").unlink()
    with (checkpoint / place.relative_path).open("r+b") as stream:
        place.offset, place.length = stream.seek(0, 2), len(bomb)
        stream.write(bomb)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    _sign(checkpoint)
    error = tied.refused(run)
    assert "random/shard_0_1 in __0_" in error
    assert "is more than numbers and text" in error
    assert not proof.exists()
    pickle.loads(pickle.dumps(Bomb(proof)))
    assert proof.exists()  # the bomb works

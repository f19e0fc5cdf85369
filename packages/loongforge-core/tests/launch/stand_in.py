"""Entries that stand in for training, and a command line that launches one of them in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from loongforge.core import env
from loongforge.core.cli.launch import launch
from loongforge.core.config.run import ComponentConfig, LaunchConfig, ModelConfig, RunConfig
from loongforge.core.errors import PREEMPTED_EXIT_CODE, DataError, ForgeError


def run_config(**launch: object) -> RunConfig:
    model = ModelConfig(foundation=ComponentConfig(family="none", geometry=None))
    return RunConfig(model=model, launch=LaunchConfig(**launch))  # pyright: ignore[reportArgumentType]


def say(line: str) -> None:
    """One write: `print` makes two where Python is unbuffered, and two workers' lines then interleave."""
    os.write(sys.stdout.fileno(), f"{line}\n".encode())


def add_up(config: RunConfig) -> None:
    """Sum rank + 1 over all workers."""
    import torch
    import torch.distributed as dist

    worker = env.worker()
    assert worker is not None
    dist.init_process_group("gloo")
    total = torch.tensor([worker.rank + 1.0])
    dist.all_reduce(total)
    facts = {
        "rank": worker.rank,
        "world": worker.world_size,
        "local": worker.local_rank,
        "total": total.item(),
        "threads": torch.get_num_threads(),
        "pid": os.getpid(),
    }
    say(json.dumps(facts))
    dist.destroy_process_group()


def wrong_data(config: RunConfig) -> None:
    raise DataError("rows.jsonl, row 3: no field 'text'.")


def wrong_data_on_one(config: RunConfig) -> None:
    """Rank 1 meets a user's mistake while rank 0 waits for it in a collective."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    worker = env.worker()
    assert worker is not None
    if worker.rank == 1:
        raise DataError("rows.jsonl, row 3: no field 'text'.")
    dist.all_reduce(torch.zeros(1))


def crash(config: RunConfig) -> None:
    worker = env.worker()
    assert worker is not None
    if worker.rank == 1:
        raise ZeroDivisionError("a real defect")
    time.sleep(60)


def killed(config: RunConfig) -> None:
    worker = env.worker()
    assert worker is not None
    if worker.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def until_signal(config: RunConfig) -> None:
    """Announce itself, wait for SIGTERM, take a while to save, exit as a preempted worker does."""
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    worker = env.worker()
    assert worker is not None
    say(f"ready {worker.rank}")
    deadline = time.monotonic() + 60
    while not asked and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5 + worker.rank)  # ranks finish their save at different times
    say(f"saved {worker.rank}")
    raise SystemExit(PREEMPTED_EXIT_CODE)


def idle(config: RunConfig) -> None:
    """A worker that still reads its data: nothing of its own answers a signal yet."""
    say("ready")
    time.sleep(60)


def deaf(config: RunConfig) -> None:
    """A worker that never finishes its save."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    say("ready")
    time.sleep(60)


def fail_once(config: RunConfig) -> None:
    """Fail at the first attempt, succeed after the restart."""
    marker = Path(os.environ["STAND_IN_MARKER"])
    if not marker.exists():
        marker.touch()
        raise RuntimeError("first attempt")
    say("second attempt")


def warm() -> None:
    import torch  # noqa: F401


def main(name: str, nproc: int, method: str, options: dict[str, object]) -> int:
    try:
        return launch(run_config(**options), globals()[name], nproc=nproc, preload=warm if method == "fork" else None)
    except ForgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])))

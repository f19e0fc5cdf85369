"""The launcher: ranks, exit codes, one error once, signals. Every case is a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

STAND_IN = Path(__file__).with_name("stand_in.py")
LAUNCHERS_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextlib.contextmanager
def started(
    entry: str,
    *,
    nproc: int = 2,
    method: str = "fork",
    options: dict[str, object] | None = None,
    variables: dict[str, str] | None = None,
) -> Iterator[subprocess.Popen[str]]:
    """The stand-in's command line as a process of its own session, killed whole at the end."""
    inherited = {name: value for name, value in os.environ.items() if name not in LAUNCHERS_VARIABLES}
    command = [sys.executable, str(STAND_IN), entry, str(nproc), method, json.dumps(options or {})]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=inherited | (variables or {}),
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def finished(entry: str, **how: Any) -> tuple[int, str, str]:
    with started(entry, **how) as process:
        out, err = process.communicate(timeout=100)
        return process.returncode, out, err


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def lines_until(process: subprocess.Popen[str], wanted: int) -> list[str]:
    assert process.stdout is not None
    return [process.stdout.readline().strip() for _ in range(wanted)]


def test_two_forked_workers_meet_over_gloo():
    code, out, err = finished("add_up")
    facts = sorted((json.loads(line) for line in out.splitlines()), key=lambda fact: fact["rank"])
    assert code == 0, err
    assert [(fact["rank"], fact["local"], fact["world"], fact["total"]) for fact in facts] == [
        (0, 0, 2, 3),
        (1, 1, 2, 3),
    ]
    assert facts[0]["pid"] != facts[1]["pid"]
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert all(fact["threads"] <= share for fact in facts)


def test_spawned_workers_meet_too():
    code, out, err = finished("add_up", method="spawn")
    assert code == 0, err
    assert len(out.splitlines()) == 2


def test_one_worker_stays_in_this_process():
    with started("add_up", nproc=1) as process:
        out, err = process.communicate(timeout=100)
        assert process.returncode == 0, err
        assert json.loads(out)["pid"] == process.pid
        assert json.loads(out)["total"] == 1


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_foreign_launchers_variables_are_obeyed(nproc: int):
    """torchrun's; and those of a PyTorchJob whose container has one worker, which has no LOCAL_RANK."""
    variables = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with started("add_up", nproc=nproc, variables=variables | ({"LOCAL_RANK": "0"} if nproc > 1 else {})) as process:
        out, err = process.communicate(timeout=100)
        assert process.returncode == 0, err
        assert json.loads(out)["pid"] == process.pid


def test_containers_of_a_pytorchjob_start_several_workers_each():
    """RANK counts containers there, and the job's two have two workers each."""
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with (
        started("add_up", variables=meeting | {"RANK": "0"}) as first,
        started("add_up", variables=meeting | {"RANK": "1"}) as second,
    ):
        told = [process.communicate(timeout=100) for process in (first, second)]
    facts = sorted((json.loads(line) for out, _ in told for line in out.splitlines()), key=lambda one: one["rank"])
    assert [(one["rank"], one["local"], one["world"], one["total"]) for one in facts] == [
        (rank, rank % 2, 4, 10) for rank in range(4)
    ], told


def test_two_nodes_meet_at_the_rendezvous():
    port = free_port()

    def node(rank: int) -> dict[str, object]:
        return {"nnodes": 2, "node_rank": rank, "rdzv_endpoint": f"127.0.0.1:{port}"}

    with started("add_up", nproc=1, options=node(0)) as first, started("add_up", nproc=1, options=node(1)) as second:
        results = [json.loads(process.communicate(timeout=100)[0]) for process in (first, second)]
    assert [(fact["rank"], fact["world"], fact["local"], fact["total"]) for fact in results] == [
        (0, 2, 0, 3),
        (1, 2, 0, 3),
    ]


@pytest.mark.parametrize("entry", ["wrong_data", "wrong_data_on_one"])
def test_a_users_mistake_is_shown_once_with_its_exit_code(entry: str):
    code, _, err = finished(entry)
    assert code == 4
    assert err.strip() == "error: rows.jsonl, row 3: no field 'text'."


def test_a_crash_shows_its_rank_and_traceback_once():
    code, _, err = finished("crash")
    assert code == 1
    assert err.startswith("error: rank 1 crashed:\nTraceback")
    assert err.count("ZeroDivisionError: a real defect") == 1
    assert "elastic" not in err


def test_the_killed_worker_is_named_and_not_its_peer():
    code, _, err = finished("killed")
    assert code == 137
    assert err.strip() == "error: rank 1 was killed by SIGKILL. It may have run out of memory: see the kernel log."


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_workers_save(number: signal.Signals):
    with started("until_signal") as process:
        assert sorted(lines_until(process, 2)) == ["ready 0", "ready 1"]
        process.send_signal(number)
        out, err = process.communicate(timeout=180)
    assert sorted(out.split("\n")) == ["", "saved 0", "saved 1"]
    assert process.returncode == 75
    assert err == ""


def test_a_signal_before_training_asks_for_the_same_command_again():
    with started("idle") as process:
        lines_until(process, 2)
        process.terminate()
        _, err = process.communicate(timeout=180)
    assert process.returncode == 75
    assert err.strip() == "stopped before or after training: run the same command again."


def test_ctrl_c_in_a_terminal_reaches_everyone_and_still_saves():
    with started("until_signal") as process:
        lines_until(process, 2)
        os.killpg(process.pid, signal.SIGINT)
        out, _ = process.communicate(timeout=180)
    assert sorted(out.split()) == ["0", "1", "saved", "saved"]
    assert process.returncode == 75


def test_a_second_ctrl_c_kills():
    with started("deaf") as process:
        lines_until(process, 2)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None, "it must wait for workers that save"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=180)
    assert process.returncode == 130
    assert err.strip() == "error: killed by the second Ctrl-C before the state was saved."


def test_workers_do_not_outlive_a_killed_launcher():
    with started("deaf") as process:
        lines_until(process, 2)
        process.kill()
        process.wait(timeout=60)
        assert process.stdout is not None
        assert process.stdout.read() == "", "reading ends only when every worker has closed its end"


def test_a_restart_is_torchs_affair(tmp_path: Path):
    marker = str(tmp_path / "marker")
    code, out, err = finished("fail_once", options={"max_restarts": 1}, variables={"STAND_IN_MARKER": marker})
    assert code == 0, err
    assert "second attempt" in out
    assert "RuntimeError: first attempt" in err


def test_several_nodes_need_a_meeting_place():
    code, _, err = finished("add_up", nproc=1, options={"nnodes": 2, "rdzv_endpoint": "node0"})
    assert code == 2
    assert "--rdzv-endpoint node0:29500" in err

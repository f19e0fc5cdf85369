"""What a launcher's variables say about this process."""

from __future__ import annotations

import os

import pytest

from loongforge.core import env
from loongforge.core.cli.launch import world_size
from loongforge.core.config.run import LaunchConfig
from loongforge.core.errors import ConfigError

SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_JOB_ID": "71234",
}


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch):
    for name in (*SLURM, *env.VARIABLES):
        monkeypatch.delenv(name, raising=False)


def test_nothing_set_means_no_launcher():
    assert env.worker() is None


def test_srun_gives_rank_and_meeting_place(monkeypatch: pytest.MonkeyPatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    place = env.worker()
    assert place == env.Worker(rank=5, world_size=8, local_rank=1, local_world_size=4, launcher="slurm")
    assert env.rendezvous() == ("gpu03", 20000 + 71234 % 20000)


def test_a_batch_script_is_not_a_worker(monkeypatch: pytest.MonkeyPatch):
    """sbatch sets SLURM_PROCID=0 and SLURM_NTASKS in the script itself, where one process must start the others."""
    for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_JOB_ID"):
        monkeypatch.setenv(name, SLURM[name])
    assert env.worker() is None


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, env.Container(rank=1, count=2, workers=None)),
        (
            {"RANK": "1", "WORLD_SIZE": "16", "PET_NNODES": "2", "PET_NPROC_PER_NODE": "8"},
            env.Container(rank=1, count=2, workers=8),
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "PET_NNODES": "1:4", "PET_NPROC_PER_NODE": "auto"},
            env.Container(rank=0, count=2, workers=None),
        ),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, None),
        ({}, None),
    ],
    ids=["plain", "nprocPerNode", "open", "torchrun", "nothing"],
)
def test_a_pytorchjob_numbers_containers(
    variables: dict[str, str], place: env.Container | None, monkeypatch: pytest.MonkeyPatch
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert env.container() == place


def test_the_world_of_a_job_counts_the_workers_of_every_container(monkeypatch: pytest.MonkeyPatch):
    assert world_size(LaunchConfig(nnodes=3), 2) == 6
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert world_size(LaunchConfig(), 8) == 16
    assert world_size(LaunchConfig(), 1) == 2
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert world_size(LaunchConfig(), 8) == 2


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu7,gpu8", "gpu7"),
        ("gpu[03-07,9],login", "gpu03"),
        ("r[1-2]n[05,06]", "r1n05"),
        ("n[2,4]-ib", "n2-ib"),
        ("", ""),
    ],
)
def test_first_host_of_a_slurm_list(nodes: str, first: str):
    assert env.first_host(nodes) == first


def test_a_rank_without_a_meeting_place_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MASTER_ADDR", "node0")
    with pytest.raises(ConfigError, match="rank but not MASTER_PORT: set it to the host or port of rank 0"):
        env.rendezvous()


@pytest.mark.parametrize(("before", "after"), [({}, ":4096:8"), ({"CUBLAS_WORKSPACE_CONFIG": ":16:8"}, ":16:8")])
def test_deterministic_runs_tell_cublas(before: dict[str, str], after: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "environ", dict(before))
    env.repeat_cublas()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == after

"""The only environment variables LoongForge reads, in one table.

Launchers' variables (RANK, WORLD_SIZE, ...) are read here too, so that nothing else touches `os.environ`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from loongforge.core.errors import ConfigError

VARIABLES = {
    "LOONGFORGE_PLATFORM": "Device platform: `cpu`, `cuda`, `auto` or a registered one (default auto).",
    "LOONGFORGE_PLUGINS": "Comma-separated distributions whose plugins are used; a leading `-` switches one off.",
    "_LOONGFORGE_COMPLETE": "Set by the shell while it completes a command line.",
    "RANK": "Global rank, set by torchrun; without LOCAL_RANK the number of a Kubernetes PyTorchJob's container.",
    "WORLD_SIZE": "Number of processes of the job.",
    "LOCAL_RANK": "Rank on this node.",
    "LOCAL_WORLD_SIZE": "Processes on this node.",
    "MASTER_ADDR": "Host of rank 0.",
    "MASTER_PORT": "Port of rank 0.",
    "PET_NNODES": "Containers of a PyTorchJob; WORLD_SIZE when it is absent or a range.",
    "PET_NPROC_PER_NODE": "Workers of each container of a PyTorchJob, when it is a number.",
    "SLURM_PROCID": "Global rank under srun.",
    "SLURM_LOCALID": "Rank on this node under srun.",
    "SLURM_STEP_NUM_TASKS": "Number of processes of the srun step; absent in the batch script itself.",
    "SLURM_STEP_TASKS_PER_NODE": "Processes per node of the step, as `4(x2),3`.",
    "SLURM_STEP_NODELIST": "Nodes of the step; the first one is MASTER_ADDR when that is unset.",
    "SLURM_JOB_ID": "Gives every rank the same MASTER_PORT when that is unset.",
}
"""Every variable and what it does."""


def platform_name() -> str:
    """The platform asked for, `auto` when none is."""
    return os.environ.get("LOONGFORGE_PLATFORM", "auto").strip().lower() or "auto"


def plugin_filter() -> tuple[str, ...]:
    """Entries of LOONGFORGE_PLUGINS, empty when unset."""
    return tuple(part.strip() for part in os.environ.get("LOONGFORGE_PLUGINS", "").split(",") if part.strip())


def completing() -> bool:
    """Whether a shell asks for completions and not for a run."""
    return bool(os.environ.get("_LOONGFORGE_COMPLETE"))


def settings() -> dict[str, str]:
    """The variables of the table that are set, with their values."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """This process's place in the job, as its launcher says."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: str
    """`torchrun` (also PyTorchJob), `slurm` or `single`."""


def worker() -> Worker | None:
    """The place a launcher gave this process; None when no launcher has set its variables."""
    get = os.environ.get
    if get("RANK") is not None and get("WORLD_SIZE") is not None:
        rank, size = int(get("RANK", "0")), int(get("WORLD_SIZE", "1"))
        local = int(get("LOCAL_RANK", "0"))
        return Worker(
            rank=rank,
            world_size=size,
            local_rank=local,
            local_world_size=int(get("LOCAL_WORLD_SIZE", "1")),
            launcher="torchrun",
        )
    if get("SLURM_PROCID") is not None and int(get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return Worker(
            rank=int(get("SLURM_PROCID", "0")),
            world_size=int(get("SLURM_STEP_NUM_TASKS", "1")),
            local_rank=int(get("SLURM_LOCALID", "0")),
            local_world_size=int(get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0]),
            launcher="slurm",
        )
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """A container's place in a Kubernetes PyTorchJob."""

    rank: int
    count: int
    workers: int | None
    """Workers of each container, None where the job leaves it open."""


def container() -> Container | None:
    """The place of this container in a PyTorchJob, which numbers containers; None where workers are numbered.

    A PyTorchJob sets RANK and WORLD_SIZE as torchrun does, and no LOCAL_RANK (training-operator, setPodEnv).
    """
    get = os.environ.get
    rank, size = get("RANK"), get("WORLD_SIZE")
    if rank is None or size is None or get("LOCAL_RANK") is not None:
        return None
    nodes, each = get("PET_NNODES", ""), get("PET_NPROC_PER_NODE", "")
    return Container(
        rank=int(rank),
        count=int(nodes) if nodes.isdigit() else int(size),
        workers=int(each) if each.isdigit() else None,
    )


def rendezvous() -> tuple[str, int]:
    """Host and port of rank 0 as the launcher says; Slurm's first node and a port made of the job number by default.

    Raises `ConfigError` when nothing says where rank 0 is.
    """
    get = os.environ.get
    host = get("MASTER_ADDR") or first_host(get("SLURM_STEP_NODELIST", ""))
    port = get("MASTER_PORT") or (str(20000 + int(get("SLURM_JOB_ID", "0")) % 20000) if get("SLURM_JOB_ID") else "")
    lacking = [name for name, value in (("MASTER_ADDR", host), ("MASTER_PORT", port)) if not value]
    if lacking:
        raise ConfigError(
            f"a launcher set this worker's rank but not {' and '.join(lacking)}: set it to the host or port of rank 0."
        )
    return host, int(port)


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: `gpu[03-07,9],login` gives `gpu03`; empty for an empty list."""
    head = re.split(r",(?![^\[]*\])", nodes.strip())[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", head)


def repeat_cublas() -> None:
    """Let cuBLAS give the same bits every time; torch demands it on CUDA where only deterministic algorithms may run.

    cuBLAS reads the variable at its first product. A value that is set already stays.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def export(worker: Worker, master_addr: str, master_port: int) -> None:
    """Set the variables torch.distributed and megatron-core read for this worker."""
    os.environ.update(
        RANK=str(worker.rank),
        WORLD_SIZE=str(worker.world_size),
        LOCAL_RANK=str(worker.local_rank),
        LOCAL_WORLD_SIZE=str(worker.local_world_size),
        MASTER_ADDR=master_addr,
        MASTER_PORT=str(master_port),
    )

"""What a launcher says to this process: its rank, how many there are, and whether this launch began a run before.

Why: torchrun, accelerate, Ray's TorchTrainer and SkyPilot set torch's variables; `srun` and `mpirun` have their own. A
task of theirs that does not know of the others would train alone, unseen, so that is an error.
Source: docs.pytorch.org/docs/stable/elastic/run.html (the variables that torchrun sets); srun(1), "OUTPUT ENVIRONMENT
VARIABLES"; Open MPI's and MPICH's launchers.
Cost: none; no torch.
"""

import contextlib
import json
import os
import socket
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from halfbyte.errors import WorldError

TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# (rank, size, local rank) as each launcher calls them
OTHERS = {
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
}
PORT = "29500"
# What makes transformers, accelerate or a child process open a process group of their own.
OPENS = (*TORCH, "MASTER_ADDR", "MASTER_PORT", "MV2_COMM_WORLD_SIZE", *chain.from_iterable(OTHERS.values()))
LAUNCH = "launch.json"
SAME_START_S = 5.0  # the clock may have been set in between


@dataclass(frozen=True)
class Place:
    """This process among those of its run. `local_rank` is None where the launcher does not say it."""

    rank: int
    size: int
    local_rank: int | None
    local_size: int | None


def place(env: Mapping[str, str] = os.environ) -> Place | None:
    """Where this process is; None for one that is alone. Raises WorldError: a launcher started several, and does not
    say where they meet."""
    if env.get("RANK", "").isdigit() and env.get("WORLD_SIZE", "").isdigit():
        local = (int(env[name]) if env.get(name, "").isdigit() else None for name in TORCH[2:])
        return Place(int(env["RANK"]), int(env["WORLD_SIZE"]), *local)
    for launcher, names in OTHERS.items():
        rank, size, local_rank = (env.get(name, "") for name in names)
        if not (rank.isdigit() and size.isdigit() and int(size) > 1):
            continue
        if "MASTER_ADDR" not in env:
            raise WorldError(
                f"{launcher} started {size} processes, and each would train alone: MASTER_ADDR does not say where they "
                "meet.",
                fix="export MASTER_ADDR=HOST of the first one; or one torchrun for each machine (docs/scale.md)",
            )
        return Place(int(rank), int(size), int(local_rank) if local_rank.isdigit() else None, None)
    return None


@contextlib.contextmanager
def hide_launcher(env: MutableMapping[str, str] = os.environ) -> Iterator[None]:
    """Without the launcher's variables: the group is open, and neither a library nor a child shall open another."""
    removed = {name: env.pop(name) for name in OPENS if name in env}
    try:
        yield
    finally:
        env.update(removed)


def is_launchers_one_thread(env: Mapping[str, str] = os.environ) -> bool:
    """Whether OMP_NUM_THREADS is 1 since torchrun sets that for several processes, not since a user asked for it."""
    return env.get("OMP_NUM_THREADS") == "1" and "MKL_NUM_THREADS" not in env and "TORCHELASTIC_RUN_ID" in env


def agent() -> str:
    """The process that started this one, by host, number and the time of its start: of a launcher that restarts its
    workers it stays the same."""
    import psutil

    parent = os.getppid()
    try:
        return f"{socket.gethostname()}/{parent}/{psutil.Process(parent).create_time():.2f}"
    except psutil.Error:
        return f"{socket.gethostname()}/{parent}"


def process() -> tuple[int, float]:
    """The number of this process and when it began: by both, others of this machine know it (`end`)."""
    import psutil

    return os.getpid(), psutil.Process().create_time()


def end(number: int, began: float) -> None:
    """SIGKILL to a process of this machine, also a stopped one; not to a later process of the same number."""
    import psutil

    with contextlib.suppress(psutil.Error):
        process = psutil.Process(number)
        if abs(process.create_time() - began) < SAME_START_S:
            process.kill()


def boot() -> str:
    """What two processes of one machine have in common, also in containers of their own; and network namespaces not."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/net').st_ino}"
    except OSError:
        return socket.gethostname()


def launch_file(agents: Sequence[str]) -> dict[str, bytes]:
    """The file by which a run keeps the launch that began it, or goes on with it; none without a launcher."""
    return {LAUNCH: (json.dumps({"agents": sorted(set(agents))}) + "\n").encode()} if agents else {}


def began(run: Path, agents: Sequence[str]) -> bool:
    """Whether the same launch began this run: it has restarted its workers, and the run goes on without being asked."""
    try:
        known = json.loads((run / LAUNCH).read_bytes())["agents"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(set(known) & set(agents))

"""What a launcher says is read right, and a task that nobody told of the others does not train alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from halfbyte.distributed import launch, world
from halfbyte.distributed.launch import Place
from halfbyte.errors import WorldError

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SRUN = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4"}
MPIRUN = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}


@pytest.mark.parametrize(
    ("env", "wanted"),
    [
        ({}, None),
        (TORCHRUN, Place(5, 8, 1, 4)),
        ({"RANK": "0", "WORLD_SIZE": "2"}, Place(0, 2, None, None)),
        ({**SRUN, "MASTER_ADDR": "a"}, Place(3, 4, 1, None)),
        ({**MPIRUN, "MASTER_ADDR": "a"}, Place(1, 2, 0, None)),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, None),  # a batch script, not a step of it
        ({**TORCHRUN, **SRUN}, Place(5, 8, 1, 4)),
    ],
)
def test_a_place(env: dict[str, str], wanted: Place | None) -> None:
    assert launch.place(env) == wanted


@pytest.mark.parametrize(("launcher", "env"), [("srun", SRUN), ("mpirun", MPIRUN)])
def test_a_task_that_would_train_alone_is_refused(launcher: str, env: dict[str, str]) -> None:
    with pytest.raises(WorldError, match=f"{launcher} started . processes, and each would train alone") as caught:
        launch.place(env)
    assert caught.value.exit_code == 2


def test_the_launchers_variables_are_hidden_and_come_back() -> None:
    env = {**TORCHRUN, "MASTER_PORT": "1", "PATH": "x"}
    with launch.hide_launcher(env):
        assert env == {"PATH": "x"}
    assert env == {**TORCHRUN, "MASTER_PORT": "1", "PATH": "x"}


@pytest.mark.parametrize(
    ("env", "wanted"),
    [
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, True),
        ({"OMP_NUM_THREADS": "4", "TORCHELASTIC_RUN_ID": "x"}, False),
        ({"OMP_NUM_THREADS": "1"}, False),
        ({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, False),
    ],
)
def test_one_thread_that_torchrun_asked_for_is_not_the_users(env: dict[str, str], wanted: bool) -> None:
    assert launch.is_launchers_one_thread(env) is wanted


def test_a_launch_knows_its_own_run(tmp_path: Path) -> None:
    (tmp_path / launch.LAUNCH).write_bytes(launch.launch_file(["a/1/5.0", "b/1/5.0"])[launch.LAUNCH])
    assert launch.launch_file([]) == {}
    assert launch.began(tmp_path, ["b/1/5.0", "c/2/7.0"])
    assert not launch.began(tmp_path, ["a/1/6.0"])
    assert not launch.began(tmp_path, [])
    (tmp_path / launch.LAUNCH).write_text("{")
    assert not launch.began(tmp_path, ["a/1/5.0"])
    assert not launch.began(tmp_path / "nothing", ["a/1/5.0"])
    assert launch.agent() == launch.agent()


def test_a_stopped_process_is_ended_and_no_other_of_its_number() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    began = psutil.Process(child.pid).create_time()
    child.send_signal(signal.SIGSTOP)
    launch.end(child.pid, began - 60)
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.2)
    launch.end(child.pid, began)
    assert child.wait(10) == -signal.SIGKILL
    launch.end(child.pid, began)  # it is gone already
    assert launch.process() == (os.getpid(), psutil.Process().create_time())


def test_alone_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in launch.OPENS:
        monkeypatch.delenv(name, raising=False)
    with world.open_world() as here:
        assert (here.rank, here.size, here.first, here.alone, here.sharing) == (0, 1, True, True, None)
        assert here.gather({"a": 1}) == [{"a": 1}] and here.from_first(lambda: 3) == 3
        assert not here.goes_on(Path("nowhere"), False) and here.goes_on(Path("nowhere"), True)


def test_one_process_of_torchrun_opens_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with world.open_world() as here:
        assert here.alone and here.agents == (launch.agent(),)
        assert "LOCAL_RANK" not in os.environ  # accelerate would open one
    assert os.environ["LOCAL_RANK"] == "0"


def test_one_process_imports_nothing_more() -> None:
    """`--help` nothing of this room; a training's modules no more than what says that it is alone, and no torch."""
    code = (
        "import sys\n"
        "from halfbyte.cli import main\n"
        "of = lambda: sorted(name for name in sys.modules if name.startswith('halfbyte.distributed'))\n"
        "assert of() == [], of()\n"
        "from halfbyte.distributed import world\n"
        "with world.open_world() as here:\n"
        "    assert here.alone\n"
        "assert not {'torch', 'psutil', 'multiprocessing'} & set(sys.modules), sorted(sys.modules)\n"
        "assert of() == ['halfbyte.distributed', 'halfbyte.distributed.launch', 'halfbyte.distributed.watch',"
        " 'halfbyte.distributed.world'], of()\n"
    )
    env = {name: value for name, value in os.environ.items() if name not in launch.OPENS}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr

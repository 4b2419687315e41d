"""OpenMP's threads beside other programs: when they sleep instead of spinning, and that they do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from halfbyte.layers.kernels import cpu
from halfbyte.system import openmp, threads
from halfbyte.system.openmp import CALM_S, LEAST_WAIT, LOOK_S, CoreWatch, EmptyTeam
from halfbyte.system.usage import CpuTime

REGIONS = 200
# Parallel regions with a nap between them: how often the other thread of torch's team goes to sleep, in each turn.
SCRIPT = """
import json, os, sys, time
os.sched_setaffinity(0, range(os.cpu_count()))
from pathlib import Path
import torch
from halfbyte.system.openmp import EmptyTeam
torch.set_num_threads(2)
team, sleeps = EmptyTeam(), []
def tasks():
    return {path.name for path in Path("/proc/self/task").iterdir()}
before = tasks()
x = torch.ones(1_000_000)  # on both
(other,) = tasks() - before
def slept():
    text = Path(f"/proc/self/task/{other}/status").read_text()
    return int(text.split("\\nvoluntary_ctxt_switches:")[1].split()[0])
for turn in sys.argv[1].split(","):
    team.begin() if turn == "beside" else team.end()
    time.sleep(0.1)
    start = slept()
    for _ in range(int(sys.argv[2])):
        x.add(1)
        time.sleep(0.0002)
    sleeps.append(slept() - start)
print(json.dumps(sleeps))
"""
LINUX = pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="needs Linux's times of threads")


def environment(**values: str) -> dict[str, str]:
    """This one's without what says how to wait; a slot of a test machine may say how many threads there are."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))} | values


@pytest.fixture
def unwatched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmp, "_watching", None)
    monkeypatch.setattr(CoreWatch, "run", lambda self: threading.Event().wait())


@LINUX
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one processor: OpenMP never spins long")
def test_threads_sleep_between_regions_while_the_empty_team_is_there_and_only_then() -> None:
    command = [sys.executable, "-c", SCRIPT, "alone,beside,alone,beside", str(REGIONS)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    alone, beside, again, last = json.loads(done.stdout)
    # each nap is longer than 100 spins; 300,000 of them are longer than a nap, but for one that the machine prolongs
    assert min(beside, last) >= 0.9 * REGIONS
    assert max(alone, again) < min(beside, last)


def test_the_team_is_there_while_a_thread_waits_for_a_core() -> None:
    team = FakeTeam()
    watch, wait = CoreWatch(team, always=False), 1.1 * LEAST_WAIT * LOOK_S
    watch.look({"1": CpuTime(0.0, 5.0), "2": CpuTime(0.0, 7.0)}, at=0.0)
    assert not team.there  # what was before the first look does not count
    watch.look({"1": CpuTime(0.2, 5.0 + 0.4 * wait), "2": CpuTime(0.2, 7.0 + 0.4 * wait)}, at=1.0)
    assert not team.there  # by the one that waits most, not by their sum
    watch.look(
        {"1": CpuTime(0.3, 5.0 + 0.4 * wait), "2": CpuTime(0.2, 7.0 + 1.4 * wait), "3": CpuTime(0.0, 9.0)}, at=2.0
    )
    assert team.there
    calm = {"1": CpuTime(0.4, 5.0 + 0.4 * wait), "3": CpuTime(0.0, 9.0)}
    watch.look(calm, at=2.0 + CALM_S / 2)
    assert team.there
    watch.look(calm, at=2.0 + CALM_S)
    assert not team.there


def test_a_quota_of_fewer_cores_than_threads_keeps_the_team_there() -> None:
    team = FakeTeam()
    watch = CoreWatch(team, always=True)
    for at in (0.0, 2 * CALM_S):
        watch.look({"1": CpuTime(0.0, 0.0)}, at=at)
        assert team.there


class FakeTeam(EmptyTeam):
    """It only knows whether it was begun."""

    def begin(self) -> None:
        self._leave = threading.Event()


@pytest.mark.skipif(not any("libgomp" in path for path in openmp.libraries()), reason="torch brings another OpenMP")
def test_before_torch_is_loaded_no_spin_is_asked_for_beside_others_and_the_usual_ones_alone() -> None:
    script = (
        "import halfbyte, os, torch\n"
        "from halfbyte.system import threads\n"
        "print(threads.configure(2).waiting, *(os.environ.get(name) for name in ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY')))"
    )

    def told(**values: str) -> tuple[str, str]:
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=environment(OMP_DISPLAY_ENV="verbose", OMP_NUM_THREADS="2", **values),
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout.strip(), done.stderr

    said, library = told()
    assert "GOMP_SPINCOUNT = '300000'" in library and "OMP_WAIT_POLICY = 'PASSIVE'" in library
    assert "asleep" in said and said.endswith("None None")  # processes that are not ours are not told
    said, library = told(GOMP_SPINCOUNT="77")
    assert "GOMP_SPINCOUNT = '77'" in library and "OMP_WAIT_POLICY = 'ACTIVE'" not in library
    assert said == "GOMP_SPINCOUNT=77 77 None"


def test_after_torch_is_loaded_nothing_is_told() -> None:
    env: dict[str, str] = {}
    openmp.prepare(env)
    assert not env


@LINUX
def test_a_process_is_watched_once(unwatched: None) -> None:
    said = openmp.watch(2, 2.0, {})
    thread = openmp._watching
    assert said == "spinning; asleep while other programs use the cores" and thread is not None and thread.daemon
    assert openmp.watch(2, 1.5, {}) == "short, then asleep"
    assert openmp._watching is thread


@pytest.mark.parametrize("name", openmp.WAIT_VARIABLES)
def test_how_the_user_wants_threads_to_wait_holds(name: str, unwatched: None) -> None:
    assert openmp.watch(2, 2.0, {name: "passive"}) == f"{name}=passive"
    assert openmp._watching is None
    settings = threads.configure(2, env={name: "passive"})
    assert settings.waiting in settings.line and settings.waiting == f"{name}=passive"


def test_one_thread_and_another_library_need_no_watch(unwatched: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert openmp.watch(1, 2.0, {}) == "nothing to wait for"
    monkeypatch.setattr(openmp, "libraries", lambda: ["/torch/lib/libomp.dylib"])
    assert openmp.watch(2, 2.0, {}) == "the library's own way"
    assert openmp._watching is None


@LINUX
def test_scripts_that_only_use_kernels_are_watched_too(unwatched: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for name in openmp.WAIT_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    cpu.enabled.__wrapped__()
    assert openmp._watching is not None


@LINUX
def test_a_child_watches_itself_forked_or_not() -> None:
    child = (
        "import torch; torch.set_num_threads(2)\n"
        "from halfbyte.system import openmp, threads; import os, sys\n"
        "first = threads.configure(2, env={}); assert openmp._watching.is_alive()\n"
        "if os.fork() == 0:\n"
        "    assert not openmp._watching.is_alive()\n"
        "    threads.configure(2, env={}); os._exit(0 if openmp._watching.is_alive() else 1)\n"
        "assert os.wait()[1] == 0\n"
    )
    subprocess.run([sys.executable, "-c", child], env=environment(), check=True)


def test_the_library_that_torch_brings_is_found_without_a_list_of_maps(tmp_path: Path) -> None:
    """macOS has no /proc/self/maps; torch's wheel for it has lib/libomp.dylib. That for arm64 has a libarm_compute."""
    listed = openmp.libraries()
    assert listed and openmp.libraries(tmp_path / "none")[0] in listed


def test_the_library_is_found_in_a_path_with_a_space(tmp_path: Path) -> None:
    library = "/home/my models/.venv/lib/torch/lib/libgomp-1.so.1"
    (tmp_path / "maps").write_text(f"7f0c10000000-7f0c10020000 r-xp 00001000 fe:00 4711    {library}\n")
    assert openmp.libraries(tmp_path / "maps") == [library]

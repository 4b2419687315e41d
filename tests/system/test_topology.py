"""Machines as Linux describes them in files: which processors compute, where processes belong, and what is said."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from halfbyte.system import device, topology
from halfbyte.system.topology import numbers, read


def written(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / "sys/devices" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def processors(siblings: list[tuple[int, ...]], **more: dict[int, str]) -> dict[str, str]:
    """`siblings`: of each core its processors. `more`: files of single ones (__ for a slash), by processor."""
    files = {}
    for cpus in siblings:
        for cpu in cpus:
            folder = f"system/cpu/cpu{cpu}"
            files[f"{folder}/topology/thread_siblings_list"] = ",".join(map(str, cpus))
            files |= {f"{folder}/{name.replace('__', '/')}": text[cpu] for name, text in more.items() if cpu in text}
    return files


def nodes(lists: list[str], distances: list[str]) -> dict[str, str]:
    files = {f"system/node/node{n}/cpulist": text for n, text in enumerate(lists)}
    return files | {f"system/node/node{n}/distance": text for n, text in enumerate(distances)}


@pytest.fixture
def two_sockets(tmp_path: Path) -> Path:
    """2 x 32 cores with two threads each; the second threads are processors 64 to 127."""
    pairs = [(n, n + 64) for n in range(64)]
    return written(tmp_path, processors(pairs) | nodes(["0-31,64-95", "32-63,96-127"], ["10 21", "21 10"]))


def test_of_a_core_one_thread_computes(two_sockets: Path) -> None:
    seen = read(two_sockets, range(128))
    assert len(seen.cores) == len(seen.computing) == 64 and seen.nodes == (0, 1) and seen.far == 2.1
    assert seen.of_node(1) == (*range(32, 64), *range(96, 128))
    assert seen.words == "64 cores, 2 threads each, of which one computes, 2 memory nodes"


def test_processors_that_are_not_allowed_do_not_count(two_sockets: Path) -> None:
    seen = read(two_sockets, [0, 64, 1, 40, 104, 105])
    assert [core.cpus for core in seen.computing] == [(0, 64), (1,), (40, 104), (105,)]
    assert read(two_sockets, range(32)).nodes == (0,) and read(two_sockets, range(32)).far == 1.0


def test_a_container_with_three_and_a_half_processors(two_sockets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {"proc/self/cgroup": "0::/job\n", "sys/fs/cgroup/job/cpu.max": "350000 100000\n"}.items():
        (two_sockets / name).parent.mkdir(parents=True, exist_ok=True)
        (two_sockets / name).write_text(text)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(128)))
    assert device.core_share(two_sockets) == 3.5 and device.cores(two_sockets) == 4
    (two_sockets / "sys/fs/cgroup/job/cpu.max").write_text("max 100000\n")
    assert device.core_share(two_sockets) == 128 and device.cores(two_sockets) == 64


def test_eight_memory_nodes(tmp_path: Path) -> None:
    lists = [f"{8 * n}-{8 * n + 7}" for n in range(8)]
    rows = [" ".join("10" if n == m else "12" if n // 4 == m // 4 else "32" for m in range(8)) for n in range(8)]
    seen = read(written(tmp_path, processors([(n,) for n in range(64)]) | nodes(lists, rows)), range(64))
    assert seen.nodes == tuple(range(8)) and len(seen.computing) == 64
    assert seen.far == pytest.approx((3 * 1.2 + 4 * 3.2) / 7)
    assert seen.of_node(5) == tuple(range(40, 48)) and seen.words == "64 cores, 8 memory nodes"


@pytest.mark.parametrize(
    ("fast", "slow", "computing"),
    [(6, 4, 6), (8, 16, 24), (2, 8, 10)],  # 10 x 0.377 < 6; 24 x 0.377 > 8; 10 x 0.377 > 2
)
def test_slow_cores_compute_where_there_are_enough_of_them(
    fast: int, slow: int, computing: int, tmp_path: Path
) -> None:
    """An Intel hybrid: fast cores with two threads at 5.7 GHz, slow ones with one at 4.3, half as wide."""
    pairs, first = [(2 * n, 2 * n + 1) for n in range(fast)], 2 * fast
    singles, clocks = [(first + n,) for n in range(slow)], dict.fromkeys(range(first), "5700000")
    clocks |= dict.fromkeys(range(first, first + slow), "4300000")
    files = processors(pairs + singles, cpufreq__cpuinfo_max_freq=clocks)
    seen = read(written(tmp_path, files | {"cpu_atom/cpus": f"{first}-{first + slow - 1}"}), range(first + slow))
    assert len(seen.cores) == fast + slow and len(seen.computing) == computing
    assert seen.cores[-1].speed == pytest.approx(0.5 * 4.3 / 5.7) and seen.cores[0].speed == 1.0
    assert ("slower and left out" in seen.words) is (computing < fast + slow)
    assert seen.computing[0].cpus == (0, 1)


def test_capacities_as_arm_has_them(tmp_path: Path) -> None:
    """446 / 1024 = 0.436: four large ones count for 4, all eight for 3.5."""
    capacity = dict.fromkeys(range(4), "446") | dict.fromkeys(range(4, 8), "1024")
    seen = read(written(tmp_path, processors([(n,) for n in range(8)], cpu_capacity=capacity)), range(8))
    assert [core.cpus[0] for core in seen.computing] == [4, 5, 6, 7]
    assert seen.words == "8 cores, 4 of them slower and left out"


def test_where_nothing_is_told_each_processor_is_a_core(tmp_path: Path) -> None:
    seen = read(tmp_path, range(3))
    assert [core.cpus for core in seen.computing] == [(0,), (1,), (2,)] and seen.nodes == (0,)
    assert seen.words == "" and seen.far == 1.0


@pytest.mark.parametrize(("text", "wanted"), [("0-3,8,10-11\n", {0, 1, 2, 3, 8, 10, 11}), ("", set()), ("5", {5})])
def test_lists_as_linux_writes_them(text: str, wanted: set[int]) -> None:
    assert numbers(text) == wanted


@pytest.mark.parametrize(
    ("place", "processes", "node"), [(0, 2, 0), (1, 2, 1), (1, 4, 0), (2, 4, 1), (0, 3, None), (0, 1, None)]
)
def test_a_process_stays_on_a_node_where_each_gets_as_many(
    place: int, processes: int, node: int | None, two_sockets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[object]()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(128)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: asked.append(cpus))
    assert topology.stay_on_node(place, processes, two_sockets) == node
    assert asked == ([] if node is None else [read(two_sockets, range(128)).of_node(node)])

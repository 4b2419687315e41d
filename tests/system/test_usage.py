"""What a process holds: private memory and pages of files apart, and the highest of each while something runs."""

from __future__ import annotations

import ctypes
import mmap
import platform
import time
from pathlib import Path

import pytest

from halfbyte.system import usage

SIZE = 64_000_000
pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")


def new_pages() -> mmap.mmap:
    """Memory that no allocator has had before, all of it touched."""
    held = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for _ in range(SIZE // 1_000_000):  # no bytes object of that size beside it: the heap would keep its pages
        held.write(b"\1" * 1_000_000)
    return held


def test_private_memory_and_pages_of_files_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(SIZE))
    before = usage.now()
    held = new_pages()
    private = usage.now()
    assert private.private - before.private > 0.9 * SIZE and private.file - before.file < 0.1 * SIZE
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert all(mapped[at] == 0 for at in range(0, SIZE, mmap.PAGESIZE))
        both = usage.now()
        assert both.file - private.file > 0.9 * SIZE and both.private - private.private < 0.1 * SIZE
        assert both.total == both.private + both.file
    held.close()


def test_a_limit_is_of_both_together_where_they_are_not_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    assert usage.limit(5, 7) == usage.Usage(5, 7)
    monkeypatch.setattr(usage, "now", lambda: usage.Usage(9, 0))
    assert usage.limit(5, 7) == usage.Usage(12, 0)


def test_a_peak_is_seen_after_it_is_over() -> None:
    before = usage.now()
    with usage.Peak(period_s=0.005) as peak:
        held = new_pages()
        time.sleep(0.1)
        held.close()
    assert peak.private - before.private > 0.9 * SIZE
    assert usage.now().private - before.private < 0.5 * SIZE


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc keeps freed memory")
def test_what_the_c_library_keeps_is_given_back() -> None:
    """Blocks below the threshold from which each has pages of its own, freed but for the one behind them."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes, libc.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    blocks = [libc.malloc(50_000) for _ in range(SIZE // 50_000)]
    for block in blocks:
        libc.memset(block, 1, 50_000)
    last, full = blocks.pop(), usage.now().private
    for block in blocks:
        libc.free(block)
    kept = usage.now().private
    usage.trim()
    given = usage.now().private
    libc.free(last)
    assert full - kept < 0.2 * SIZE
    assert kept - given > 0.8 * SIZE


def test_waiting_for_a_core_is_read_from_every_thread(tmp_path: Path) -> None:
    for thread, text in (("1", "3000000000 1000000000 17"), ("2", "1000000000 3000000000 4")):
        (tmp_path / "task" / thread).mkdir(parents=True)
        (tmp_path / "task" / thread / "schedstat").write_text(text + "\n")
    seen = usage.cpu_time(tmp_path)
    assert seen == usage.CpuTime(4.0, 4.0) and seen.waited_share == 0.5
    assert seen.since(usage.CpuTime(3.0, 4.0)) == usage.CpuTime(1.0, 0.0)
    assert usage.cpu_times(tmp_path) == {"1": usage.CpuTime(3.0, 1.0), "2": usage.CpuTime(1.0, 3.0)}
    (tmp_path / "task" / "2" / "schedstat").unlink()  # a thread that has ended
    assert usage.cpu_time(tmp_path) == usage.CpuTime(3.0, 1.0)
    (tmp_path / "task" / "1" / "schedstat").write_text("")
    assert usage.cpu_time(tmp_path) is None
    assert usage.cpu_time(tmp_path / "none") is None


def test_pressure_is_the_share_of_the_last_ten_seconds(tmp_path: Path) -> None:
    path = tmp_path / "cpu"
    assert usage.pressure(path) is None
    path.write_text("some avg10=51.95 avg60=22.43 avg300=16.20 total=136747798\nfull avg10=0.00 avg60=0.00 total=0\n")
    assert usage.pressure(path) == pytest.approx(0.5195)


def test_what_a_process_holds_now_and_held_at_its_peak() -> None:
    usage.process_memory()  # its first call imports a library
    before = usage.process_memory()
    held = new_pages()
    during = usage.process_memory()
    held.close()
    after = usage.process_memory()
    assert during["rss_bytes"] - before["rss_bytes"] == pytest.approx(SIZE, rel=0.1)
    assert during["rss_bytes"] - after["rss_bytes"] == pytest.approx(SIZE, rel=0.1)
    # the kernel counts the two figures apart, each to some pages
    assert after["peak_rss_bytes"] >= during["peak_rss_bytes"] >= 0.98 * during["rss_bytes"]

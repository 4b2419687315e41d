"""The process's own settings: what is set, what the user's environment keeps, and what the report says."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from halfbyte import process


@pytest.fixture
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


def test_no_more_threads_than_may_run_at_once(threads: int) -> None:
    torch.set_num_threads(4)
    settings = process.settle(3, env={})
    assert (settings.threads, torch.get_num_threads()) == (3, 3)
    assert settings.threads_why == "3 of 4: more are not allowed to run at once"


def test_fewer_threads_are_left_alone(threads: int) -> None:
    torch.set_num_threads(2)
    assert process.settle(64, env={}).threads == torch.get_num_threads() == 2


@pytest.mark.parametrize("name", process.THREAD_VARIABLES)
def test_threads_that_the_user_asked_for_stay(name: str, threads: int) -> None:
    torch.set_num_threads(4)
    settings = process.settle(1, env={name: "4"})
    assert (settings.threads, settings.threads_why, torch.get_num_threads()) == (4, name, 4)


@pytest.mark.parametrize("name", process.MALLOC_VARIABLES)
def test_an_allocator_that_the_user_has_set_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.41"))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("the allocator was touched"))
    assert process.settle(2, env={name: "1"}).allocator == f"glibc 2.41, {name}"


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("the allocator was touched"))
    assert process.settle(2, env={}).allocator == "the system's"


_FAULTS = """
import ctypes, resource, sys
from halfbyte import process
if sys.argv[1] == "settled":
    process.settle(1)
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.memset.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(64 << 20)
    libc.memset(block, 1, 64 << 20)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's own settings")
def test_a_large_block_is_used_again_instead_of_fetched_anew() -> None:
    """64 MiB are more than glibc's threshold ever grows to: without the setting each block is 16,384 new pages."""

    def faults(what: str) -> int:
        command = [sys.executable, "-c", _FAULTS, what]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert faults("settled") < 1000 < faults("plain")

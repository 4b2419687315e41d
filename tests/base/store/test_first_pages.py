"""What opening a checkpoint touches is read, and nothing around it."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from halfbyte.base.store import reading
from halfbyte.errors import SourceError

PAGE = mmap.PAGESIZE


def cached_pages(path: Path) -> set[int]:
    """Pages of a file that are in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        size = len(mapped)
        content = np.frombuffer(mapped, np.uint8)
        seen = (ctypes.c_ubyte * -(-size // PAGE))()
        address, length = ctypes.c_void_p(content.ctypes.data), ctypes.c_size_t(size)
        assert libc.mincore(address, length, seen) == 0
        del content
        return {number for number, state in enumerate(seen) if state & 1}


def emptied(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_pages(path):
        pytest.skip("this file system does not give up its pages")


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="posix_fadvise is of Linux")
def test_only_the_first_pages_are_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(40 * PAGE, dtype=torch.uint8), "b": torch.ones(40 * PAGE, dtype=torch.uint8)}, path)
    emptied(path)
    assert reading.read_first_pages(tmp_path) == 2
    read = cached_pages(path)
    assert 2 <= len(read) <= 3  # the header may share its page with the first tensor
    with safe_open(path, framework="pt") as file:
        opened = [file.get_slice(name)[...] for name in file.keys()]  # noqa: SIM118
    assert cached_pages(path) == read
    assert [int(t[-1]) for t in opened] == [0, 1]


@pytest.mark.parametrize(
    ("offsets", "expected"),
    [
        pytest.param([(0, 3 * PAGE)], [1], id="a long tensor: its first page"),
        pytest.param([(PAGE - 8, PAGE + 8)], [1, 2], id="a short one over an edge: both"),
        pytest.param([(0, 0)], [], id="an empty one: none"),
        pytest.param([(0, 16), (16, 64), (64, 9 * PAGE), (9 * PAGE, 9 * PAGE + 4)], [1, 10], id="neighbours: once"),
    ],
)
def test_pages_of_a_header(offsets: list[tuple[int, int]], expected: list[int]) -> None:
    header = {str(i): {"data_offsets": list(pair)} for i, pair in enumerate(offsets)}
    assert reading.first_pages(header, PAGE) == expected


def test_a_file_that_is_cut_is_told(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1000)}, tmp_path / "model.safetensors")
    os.truncate(tmp_path / "model.safetensors", 2000)
    with pytest.raises(SourceError, match="is cut short"):
        reading.read_first_pages(tmp_path)

"""Pages of files: found, let go, brought back; private ones never let go."""

from __future__ import annotations

import gc
import mmap
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from halfbyte.system import pages
from halfbyte.system.pages import PAGE, FileMaps, Span
from tests.present import present_bytes

pytestmark = pytest.mark.skipif(not pages.supported(), reason="needs Linux and /proc/self/pagemap")
PAGES = 64


@pytest.fixture
def mapped(tmp_path: Path) -> tuple[Any, Span, Any]:
    """(array over a private file mapping, its span, what the file holds)."""
    content = np.random.default_rng(0).integers(0, 256, PAGES * PAGE, dtype=np.uint8)
    path = tmp_path / "weights"
    path.write_bytes(content.tobytes())
    with path.open("rb") as file:
        view = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    array = np.frombuffer(view, dtype=np.uint8)
    return array, Span(array.ctypes.data, array.ctypes.data + array.nbytes), content


def test_a_file_mapping_is_found_and_memory_is_not(mapped: Any) -> None:
    _, span, _ = mapped
    maps = FileMaps.read()
    assert maps.holds(span.start, span.bytes)
    assert maps.holds(span.start + 5, span.bytes - 5)
    assert not maps.holds(span.start, span.bytes + 2**40)
    private = np.ones(PAGES * PAGE, dtype=np.uint8)
    assert not maps.holds(private.ctypes.data, private.nbytes)
    assert not FileMaps(()).holds(span.start, 1)


def test_neighbouring_maps_of_a_file_count_as_one() -> None:
    maps = FileMaps((Span(0, 10), Span(10, 20), Span(30, 40)))
    assert maps.holds(5, 15)
    assert not maps.holds(5, 16)
    assert not maps.holds(15, 20)
    assert not maps.holds(20, 1)
    assert maps.holds(30, 10)


def test_what_is_let_go_is_gone_and_comes_back_the_same(mapped: Any) -> None:
    array, span, content = mapped
    assert int(array.sum()) == int(content.sum())
    assert present_bytes([span]) == span.bytes
    assert pages.release(span) == span.bytes
    assert present_bytes([span]) == 0
    assert np.array_equal(array, content)
    pages.release(span)
    pages.prefetch(span)  # into the page cache, not into this process
    assert present_bytes([span]) == 0


def test_a_page_that_was_written_to_is_kept(mapped: Any) -> None:
    array, span, content = mapped
    array.sum()
    array[5 * PAGE + 7] ^= 255
    array[-1] ^= 255
    assert list(pages.unmodified(span)) == [
        Span(span.start, span.start + 5 * PAGE),
        Span(span.start + 6 * PAGE, span.end - PAGE),
    ]
    assert pages.release(span) == span.bytes - 2 * PAGE
    assert array[5 * PAGE + 7] == content[5 * PAGE + 7] ^ 255
    assert array[-1] == content[-1] ^ 255
    changed = np.flatnonzero(array != content)
    assert changed.tolist() == [5 * PAGE + 7, PAGES * PAGE - 1]


def test_all_private_means_nothing_to_let_go(mapped: Any) -> None:
    array, span, _ = mapped
    array[:] = 1
    assert list(pages.unmodified(span)) == []
    assert pages.release(span) == 0
    assert int(array.sum()) == array.nbytes


def test_whole_pages_lie_inside_and_join_over_small_gaps() -> None:
    assert pages.whole_pages([(PAGE + 1, 3 * PAGE)]) == (Span(2 * PAGE, 4 * PAGE),)
    assert pages.whole_pages([(0, 100)]) == ()
    assert pages.whole_pages([(3 * PAGE, PAGE), (0, 3 * PAGE - 64)]) == (Span(0, 4 * PAGE),)
    assert pages.whole_pages([(0, PAGE), (3 * PAGE, PAGE)]) == (Span(0, PAGE), Span(3 * PAGE, 4 * PAGE))
    assert pages.whole_pages([(0, 4 * PAGE), (PAGE, PAGE)]) == (Span(0, 4 * PAGE),)


def test_a_fork_looks_at_its_own_pages(mapped: Any) -> None:
    array, span, _ = mapped
    array.sum()
    assert pages.release(span)
    child = os.fork()
    if child == 0:
        touched = int(array[: 2 * PAGE].sum() > 0) and present_bytes([Span(span.start, span.start + 2 * PAGE)])
        os._exit(0 if touched == 2 * PAGE else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert present_bytes([span]) == 0


def test_a_room_holds_copies_that_do_not_touch_each_other_and_refuses_none():
    tensors = [
        torch.arange(n, dtype=dtype) for n, dtype in ((3, torch.uint8), (1000, torch.float32), (65, torch.int16))
    ]
    tensors += [torch.arange(12.0).reshape(3, 4).t(), torch.empty(0), torch.arange(9000.0)]  # strided, empty, too large
    room = pages.Arena(8192)
    copies = [room.copy(each) for each in tensors]
    starts = sorted((c.data_ptr(), c.nbytes) for c in copies if c.nbytes)
    assert all(a + n <= b for (a, n), (b, _) in pairwise(starts))
    copies[1].fill_(7)
    copies[0].fill_(7)
    for number in (2, 3, 4, 5):
        assert torch.equal(copies[number], tensors[number])
    assert torch.equal(tensors[0], torch.arange(3, dtype=torch.uint8))  # a copy, not the tensor itself


def test_copies_outlive_their_room():
    copy = pages.Arena(1 << 20).copy(torch.arange(1000))
    gc.collect()
    assert torch.equal(copy, torch.arange(1000))


def test_zeros_take_memory_when_they_are_written_to():
    room = pages.Arena(64 << 20)
    before = psutil.Process().memory_info().rss
    made = [room.zeros((8 << 20,), torch.float32) for _ in range(3)]  # the last one has no place there
    assert psutil.Process().memory_info().rss - before < 48 << 20
    assert not any(one[:: 1 << 12].any() for one in made[:2]) and not made[2].any()
    made[0].fill_(1)
    assert not made[1][:: 1 << 12].any()


def test_code_of_libraries_is_let_go_and_comes_back_with_its_next_call() -> None:
    torch.linalg.svd(torch.ones(8, 8))
    before = psutil.Process().memory_info()
    pages.release_code()
    after = psutil.Process().memory_info()
    assert before.shared - after.shared > 50e6, "torch's code alone is more"
    assert torch.linalg.svd(torch.eye(8))[1].tolist() == [1.0] * 8

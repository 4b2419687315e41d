"""parallel.py: a kernel runs on every thread, by OpenMP or by Python's own, and each block is done once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numba import carray

from halfbyte.layers import attention, norm_gate
from halfbyte.layers.kernels.cpu import parallel
from halfbyte.layers.kernels.cpu.parallel import array, each_block, kernel
from halfbyte.layers.kernels.cpu.scalar import inlined
from halfbyte.system import openmp

ROWS = 5000


@inlined
def _count(rows, first, last):  # type: ignore[no-untyped-def]
    for row in range(first, last):
        rows[row] += 1


@kernel
def counted(p):  # type: ignore[no-untyped-def]
    slots = carray(p, (32,), np.int64)
    each_block(slots, _count, (array(slots[3], (slots[1],), np.int64),))


@pytest.fixture
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield 4
    torch.set_num_threads(before)


@pytest.mark.parametrize("on_openmp", [True, False])
def test_every_block_is_done_once(on_openmp: bool, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert openmp.region() is not None
    if not on_openmp:
        monkeypatch.setattr(openmp, "region", lambda: None)
    for _ in range(20):
        rows = torch.zeros(ROWS, dtype=torch.int64)
        parallel.run(counted, ROWS, 3, rows)
        assert bool((rows == 1).all())


def test_without_openmp_the_kernel_is_called_on_each_thread(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmp, "region", lambda: None)
    gate, called = threading.Barrier(threads), set[int]()

    class Compiled:
        @staticmethod
        def ctypes(_: int) -> None:
            gate.wait(timeout=30)  # opens when four are here at once
            called.add(threading.get_ident())

    parallel.start(Compiled, np.zeros(32, np.int64))
    assert len(called) == threads and threading.get_ident() in called


def test_a_failure_on_another_thread_is_not_lost(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmp, "region", lambda: None)
    own = threading.get_ident()

    class Compiled:
        @staticmethod
        def ctypes(_: int) -> None:
            if threading.get_ident() != own:
                raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        parallel.start(Compiled, np.zeros(32, np.int64))


def test_kernels_are_right_on_pythons_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention and norm, forward and backward, equal those on OpenMP's."""

    def made() -> list[Any]:
        torch.manual_seed(0)
        q, k, v = (torch.randn(90, heads, 16, requires_grad=True) for heads in (4, 2, 2))
        x, w = torch.randn(90, 64, requires_grad=True), torch.rand(64)
        out = attention.attention(q, k, v, (40, 50), 0.25, None, None)
        normed = norm_gate.norm(x, w, 1e-5, norm_gate.NormKind())
        (out.square().sum() + normed.pow(3).sum()).backward()
        return [out, normed, q.grad, k.grad, v.grad, x.grad]

    wanted = made()
    monkeypatch.setattr(openmp, "region", lambda: None)
    for got, want in zip(made(), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@kernel
def seen(p):  # type: ignore[no-untyped-def]
    slots = carray(p, (32,), np.int64)
    counter, out = array(slots[0], (8,), np.int64), array(slots[3], (36,), np.int64)
    for i in range(8):
        out[i] = counter[i]
        counter[i] = 9
    for i in range(4, 32):
        out[i + 4] = slots[i]


def test_a_call_finds_nothing_of_the_call_before() -> None:
    """A thread's slots and its counter's line are used again."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        first, second = torch.empty(36, dtype=torch.int64), torch.empty(36, dtype=torch.int64)
        parallel.run(seen, 1, 1, first, 7, 0.5, *range(26))
        parallel.run(seen, 1, 1, second)
    finally:
        torch.set_num_threads(before)
    assert first.tolist() == [0] * 8 + [7, np.float64(0.5).view(np.int64), *range(26)]
    assert second.tolist() == [0] * 36

"""Blocks that are lent to tensors and used again: never two tensors on one, given back when the last one goes."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.layers.kernels import pool
from halfbyte.layers.kernels.pool import LARGER, LEAST_BYTES, Pool
from halfbyte.system import usage

KIB = 1024


def of(lender: Pool, kib: int) -> torch.Tensor:
    return lender.empty((kib * KIB,), torch.uint8)


def test_a_block_goes_to_the_next_tensor_that_it_holds_and_not_before_it_is_free() -> None:
    lender = Pool()
    first = of(lender, 512)
    at, held = first.data_ptr(), lender.total_bytes
    second = of(lender, 512)
    assert second.data_ptr() != at and lender.total_bytes > held
    held = lender.total_bytes
    del first
    third = of(lender, 300)
    assert third.data_ptr() == at and lender.total_bytes == held, "a smaller tensor takes the larger block"


def test_a_view_keeps_the_block_and_the_last_one_gives_it_back() -> None:
    lender = Pool()
    whole = lender.empty((256, 1024), torch.float32).fill_(7)
    row, at = whole[3], whole.data_ptr()
    del whole
    others = [lender.empty((256, 1024), torch.float32).zero_() for _ in range(4)]
    assert all(other.data_ptr() != at for other in others)
    assert torch.equal(row, torch.full((1024,), 7.0))
    del row
    assert lender.empty((256, 1024), torch.float32).data_ptr() == at


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16, torch.uint8, torch.int64])
@pytest.mark.parametrize("shape", [(0, 3), (1,), (), (5, 7), (1000, 333), (3, 129, 1025)])
def test_a_tensor_is_as_asked_contiguous_and_holds_what_is_written(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    made = Pool().empty(shape, dtype)
    wanted = torch.randint(0, 100, shape).to(dtype)
    made.copy_(wanted)
    assert made.shape == wanted.shape and made.dtype == dtype and made.is_contiguous()
    assert (torch.equal(made, wanted) and made.data_ptr() % 64 == 0) or made.numel() * dtype.itemsize < LEAST_BYTES


def test_a_much_larger_block_is_not_taken() -> None:
    lender = Pool()
    big = of(lender, 4096)
    at = big.data_ptr()
    del big
    assert of(lender, int(4096 / LARGER / 2)).data_ptr() != at


def test_a_block_is_made_for_the_most_rows_that_are_expected_and_pages_not_reached_take_no_memory() -> None:
    lender, wide = Pool(), (4096, torch.float32)
    lender.expect((100, 112), 2000)
    before = usage.now().private
    packed = lender.empty((1, 112, wide[0]), wide[1]).fill_(1)
    assert usage.now().private - before < 16 << 20 < 2000 * 4096 * 4 <= lender.total_bytes
    at, held = packed.data_ptr(), lender.total_bytes
    del packed
    lender.expect((2000,), 2000)
    longest = lender.empty((2000, wide[0]), wide[1])
    assert longest.data_ptr() == at and lender.total_bytes == held
    other = lender.empty((111, wide[0]), wide[1])  # a weight, say: no row for each token
    assert lender.total_bytes - held < 112 * 4096 * 4 + 2 * KIB * 4
    assert other.shape == (111, wide[0]) and longest.shape == (2000, wide[0])


def test_of_one_size_the_last_one_that_came_back_goes_first() -> None:
    lender = Pool()
    three = [of(lender, 256) for _ in range(3)]
    places = [tensor.data_ptr() for tensor in three]
    three[2] = three[0] = three[1] = None  # type: ignore[call-overload]
    assert of(lender, 256).data_ptr() == places[1]


def test_what_is_free_beyond_a_share_of_the_most_that_was_lent_goes_back() -> None:
    """Sizes that only grow: each needs new blocks, and the smaller ones do not pile up."""
    lender = Pool()
    for kib in range(1000, 9000, 1000):
        kept = [of(lender, kib).fill_(1) for _ in range(4)]
        most = sum(tensor.numel() for tensor in kept)
        del kept
    assert lender.total_bytes <= pool.KEPT_SHARE * (most + 4 * 4096)
    lender.give_back()
    assert lender.total_bytes == lender.lent_bytes == 0


def test_memory_that_is_given_back_leaves_the_process() -> None:
    lender = Pool()
    kept = [of(lender, 100_000).fill_(1) for _ in range(2)]
    full = usage.now().private
    del kept
    assert usage.now().private > full - 20_000_000, "kept for the next ones"
    lender.give_back()
    assert usage.now().private < full - 180_000_000


def test_tensors_of_a_graph_give_their_blocks_back_with_it() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            y = lender.empty(x.shape, x.dtype)
            torch.mul(x, 2, out=y)
            ctx.save_for_backward(y)
            return y

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            (y,) = ctx.saved_tensors
            return grads[0] * 2 + 0 * y

    lender, x = Pool(), torch.randn(200, 200, requires_grad=True)
    y = Twice.apply(Twice.apply(x))
    y.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 4.0))
    assert lender.total_bytes > 0
    del y
    gc.collect()
    lender.give_back()
    assert lender.total_bytes == lender.lent_bytes == 0


def test_threads_never_share_a_block() -> None:
    lender, wrong = Pool(), list[int]()

    def work(number: int) -> None:
        for turn in range(300):
            tensor = of(lender, 64 + (turn * 37 + number) % 64).fill_(number)
            if int(tensor.min()) != number or int(tensor.max()) != number:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lender.give_back()
    assert not wrong and lender.total_bytes == lender.lent_bytes == 0


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no transparent huge pages")
def test_only_large_blocks_ask_for_huge_pages() -> None:
    lender = Pool()

    def asks(tensor: torch.Tensor) -> bool:
        """By the flags of the mapping in which the middle of the tensor lies."""
        at, inside = tensor.data_ptr() + tensor.nbytes // 2, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            first, _, last = line.split()[0].partition("-")
            if last and not line.startswith("Vm"):
                inside = int(first, 16) <= at < int(last, 16)
            elif inside and line.startswith("VmFlags:"):
                return "hg" in line.split()
        raise AssertionError("no such mapping")

    large, small = of(lender, pool.HUGE_FROM // KIB + 1), of(lender, pool.HUGE_FROM // KIB // 2)
    assert asks(large) and not asks(small)

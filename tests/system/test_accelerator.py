"""accelerator.py: what is an allocation that failed, whoever says it; peaks of the cards that are there."""

from __future__ import annotations

import pytest
import torch

from halfbyte.system import accelerator
from tests import fake_card


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("HIP error: hipErrorOutOfMemory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_an_allocation_that_failed_is_seen_whoever_says_it(error: BaseException, wanted: bool) -> None:
    assert accelerator.out_of_memory(error) == wanted


def test_peaks_are_each_cards_own_and_begin_anew() -> None:
    """What a calibration took is not a training's."""
    with fake_card.cards(2) as cards:
        cards.reset()
        one = torch.zeros(1000, device=f"{fake_card.KIND}:1")
        assert [allocated for allocated, _ in accelerator.peaks()] == [0, 4000]
        del one
        assert accelerator.allocated() == [0, 0]
        accelerator.reset_peaks()
        assert [allocated for allocated, _ in accelerator.peaks()] == [0, 0]
    assert accelerator.peaks() == [] and accelerator.count() == 0

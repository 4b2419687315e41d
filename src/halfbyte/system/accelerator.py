"""What is asked of the cards while a run goes on, whoever made them: peaks of memory, random states, the cache.

Why: `torch.cuda` and `torch.xpu` have the same functions, and so has a card of another kind that is registered as
torch's accelerator.
Source: `torch.accelerator`, `torch.get_device_module`, `torch.random.fork_rng`.
Cost: none where there is no card.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

    import torch

# What the libraries of a card say where memory is missing and torch raises no OutOfMemoryError.
FAILED_ALLOCATIONS = (
    "can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED",
    "CUDA_ERROR_OUT_OF_MEMORY", "hipErrorOutOfMemory", "UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY", "MIOPEN_STATUS_ALLOC",
)  # fmt: skip


def module() -> ModuleType | None:
    """torch's module of this machine's cards, `torch.cuda` for one; None where there are none that we compute on."""
    import torch

    kind = torch.accelerator.current_accelerator(check_available=True)
    return None if kind is None or kind.type == "mps" else torch.get_device_module(kind)


def count() -> int:
    cards = module()
    return 0 if cards is None else int(cards.device_count())


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed: of torch, of a card's libraries, of Python, of the system."""
    import torch

    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True

    told = isinstance(error, RuntimeError) and any(text in str(error) for text in FAILED_ALLOCATIONS)
    return told or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def empty_cache() -> None:
    """Give what torch keeps of freed memory back to the cards."""
    if (cards := module()) is not None:
        cards.empty_cache()


def reset_peaks() -> None:
    """Start each card's peaks of memory anew."""
    if (cards := module()) is not None:
        for index in range(cards.device_count()):
            cards.reset_peak_memory_stats(index)


def peaks() -> list[tuple[int, int]]:
    """(allocated, reserved) bytes of each card at their highest since `reset_peaks`: tensors, and what torch's
    allocator took from the driver for them."""
    if (cards := module()) is None:
        return []
    numbers = range(cards.device_count())
    return [(int(cards.max_memory_allocated(n)), int(cards.max_memory_reserved(n))) for n in numbers]


def allocated() -> list[int]:
    """Bytes of tensors on each card now."""
    cards = module()
    return [int(cards.memory_allocated(n)) for n in range(cards.device_count())] if cards is not None else []


def keep_random_state(devices: Iterable[torch.device]) -> AbstractContextManager[None]:
    """A context after which the random states of the CPU and of these devices are as they were before."""
    import torch

    on_cards = {device for device in devices if device.type not in ("cpu", "meta")}
    if not on_cards:
        return torch.random.fork_rng(devices=[])
    kind = next(iter(on_cards)).type
    return torch.random.fork_rng(devices=sorted({d.index or 0 for d in on_cards}), device_type=kind)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a card has bf16 products: NVIDIA's from compute capability 8.0 on; AMD's and Intel's."""
    import torch

    return bool(torch.version.hip) or device.type == "xpu" or _capability(device) >= (8, 0)


def _capability(device: torch.device) -> tuple[int, int]:
    """CUDA's compute capability; (0, 0) for a card that has none."""
    import torch

    asked = getattr(torch.get_device_module(device), "get_device_capability", None)
    told = asked(device) if asked is not None else None
    return told if isinstance(told, tuple) else (0, 0)


def fast_attention(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether flash kernels for packed examples run on a card in this dtype: NVIDIA's, from compute capability 8.0."""
    import torch

    if device.type == "cpu" or dtype not in (torch.bfloat16, torch.float16) or torch.version.hip:
        return False
    return _capability(device) >= (8, 0)

"""Causal attention over packed examples on a card: torch's flash kernel for examples of any lengths, or flash-attn's.

Why: SDPA takes one length at a time, so a pack of a hundred lengths is a hundred calls a layer; and on compute
capability 9.0 and later torch prefers cuDNN's kernel, which builds a plan for each shape that it has not met.
flash-attn's own package is used where the user asks for it: `HALFBYTE_ATTENTION=flash_attn`, or a model that was opened
with `attn_implementation="flash_attention_2"`. `HALFBYTE_ATTENTION=sdpa` takes neither.
Source: `torch.nn.attention.varlen` (torch 2.11 on has what is needed here), `flash_attn.flash_attn_varlen_func`.
Cost: one call a layer; no scores in memory.

Letters: T tokens of a pack, H query heads, K key heads, D head size.
"""

import importlib
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property

import torch
from torch import Tensor

from halfbyte.system import accelerator

VARIABLE = "HALFBYTE_ATTENTION"
VARLEN = "varlen"
FLASH_ATTN = "flash_attn"
SDPA = "sdpa"
LARGEST_HEAD, HEAD_STEP = 256, 8  # what the flash kernels take


@dataclass(frozen=True, eq=False)
class PackLengths:
    """The lengths of a pack's examples as numbers, so that no layer has to wait for a card to read them. `kernel`: by
    what attention is computed on a card. `levels`: where examples share their beginnings (`data/prefixes.py`), how many
    segments each one of the lengths follows; these are the last ones of the levels 0, 1, ... before it."""

    lengths: tuple[int, ...]
    kernel: str = VARLEN
    levels: tuple[int, ...] = ()
    _starts: dict[torch.device, Tensor] = field(default_factory=dict)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest example."""
        path, longest = [0], 0
        for length, level in zip(self.lengths, self.levels or (0,) * len(self.lengths), strict=True):
            path[level + 1 :] = [path[level] + length]
            longest = max(longest, path[-1])
        return longest

    def starts(self, device: torch.device) -> Tensor:
        """(examples + 1,) int32 on a card, copied there once."""
        if device not in self._starts:
            sums = torch.tensor([0, *self.lengths]).cumsum(0).int()
            self._starts[device] = sums.to(device, non_blocking=True)
        return self._starts[device]


def kernel_name(asked: str | None = None) -> str:
    """The kernel that the environment names, else what a model was opened with, else torch's."""
    named = os.environ.get(VARIABLE, "")
    if named in (VARLEN, FLASH_ATTN, SDPA):
        return named
    return FLASH_ATTN if asked is not None and asked.startswith("flash_attention") else VARLEN


def takes(q: Tensor, k: Tensor, v: Tensor, kernel: str) -> bool:
    """Whether a flash kernel takes these (T, heads, D) tensors of a card."""
    d = q.shape[2]
    if not q.dtype == k.dtype == v.dtype or not d == k.shape[2] == v.shape[2] or q.shape[1] % k.shape[1]:
        return False
    if d > LARGEST_HEAD or d % HEAD_STEP or not accelerator.fast_attention(q.device, q.dtype):
        return False
    return _kernel(kernel) is not None


def attention(q: Tensor, k: Tensor, v: Tensor, lengths: PackLengths, scale: float, window: int | None) -> Tensor:
    """(T, H, D), (T, K, D) -> (T, H, D). `window`: how many tokens a token sees, itself included; None for all."""
    kernel = _kernel(lengths.kernel)
    if kernel is None:
        raise RuntimeError(f"{lengths.kernel} is not here")
    return kernel(q, k, v, lengths, scale, window)


_Kernel = Callable[["Tensor", "Tensor", "Tensor", PackLengths, float, "int | None"], "Tensor"]


@cache
def _kernel(name: str) -> _Kernel | None:
    return {VARLEN: _torchs, FLASH_ATTN: _flash_attns}.get(name, lambda: None)()


def _torchs() -> _Kernel | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    if not {"scale", "window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters):
        return None

    def call(q: Tensor, k: Tensor, v: Tensor, lengths: PackLengths, scale: float, window: int | None) -> Tensor:
        pack, grouped = _arguments(lengths, q.device), q.shape[1] != k.shape[1]
        return varlen_attn(q, k, v, *pack, scale=scale, window_size=_seen(window), enable_gqa=grouped)

    return call


def _flash_attns() -> _Kernel | None:
    try:
        attend = importlib.import_module("flash_attn").flash_attn_varlen_func
    except ImportError:
        return _torchs()

    def call(q: Tensor, k: Tensor, v: Tensor, lengths: PackLengths, scale: float, window: int | None) -> Tensor:
        pack = _arguments(lengths, q.device)
        return attend(q, k, v, *pack, softmax_scale=scale, causal=True, window_size=_seen(window))

    return call


def _arguments(lengths: PackLengths, device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    """Where the examples begin and the longest one, for queries and for keys, as both kernels take them."""
    starts = lengths.starts(device)
    return starts, starts, lengths.longest, lengths.longest


def _seen(window: int | None) -> tuple[int, int]:
    """How many tokens before and after itself a token sees; -1: all."""
    return (-1 if window is None else window - 1), 0


@contextmanager
def without_cudnn() -> Iterator[None]:
    """SDPA by any of its kernels but cuDNN's, which builds a plan for each new shape."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        yield

"""Masks of LoRA's dropout that depend on the text, not on its micro-batch or process: with kernels on a CPU, and always
where several processes train. One process on a card, or without kernels, draws its masks instead (`lora_linear.py`).

Why: with a mask drawn for a whole micro-batch, what a step learns depends on how its rows share micro-batches, and on
which process computes them. Here it is a hash of (seed, step, the text up to the token; layer, feature), so any split
of a step, on any number of processes, drops the same numbers, whether what rows have in common is computed once or not.
Source: counter-based random numbers (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011); the hash
is `kernels.cpu.scalar.hash_u32`.
Cost: a hash for each token of a micro-batch, and one in every layer, beside those for the pairs.
"""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from halfbyte.data import prefixes
from halfbyte.models import structure

_WORD = 0xFFFFFFFF
_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64


@dataclass(frozen=True)
class TokenSeed:
    """The seed of one layer's mask: a key for each token, (N,) int32 read as uint32, and the layer's own number."""

    keys: Tensor
    site: int

    @property
    def seed(self) -> int:
        return self.site * _GOLDEN & _WORD


@dataclass(frozen=True)
class ScoreTerms:
    """What is done to scores beside their scale.

    slopes: (H,) fp32: ALiBi adds slope * (place of the key - place of the query). p: chances that are dropped, by a
    hash of (the query's key, the layer; head, place of the key); `seed` holds those keys (T,) and the layer's number.
    """

    slopes: Tensor | None = None
    p: float = 0.0
    seed: TokenSeed | None = None

    @property
    def low(self) -> int:
        """A chance is dropped where its 32 random bits are below this."""
        return round(self.p * 2**32) if self.seed is not None else 0


NO_TERMS = ScoreTerms()


@dataclass(frozen=True)
class LoraPart:
    """LoRA's part of a result: drop(scale left right). left: (N, R), right: (R, D), bf16. p, seed: of the mask."""

    left: Tensor
    right: Tensor
    scale: float = 1.0
    p: float = 0.0
    seed: int | TokenSeed = 0


@dataclass(frozen=True)
class RowMasks:
    """The keys of the tokens of the micro-batch that is computed now, (T,) int32, and the number of each module.
    `anywhere`: also where no kernel makes the mask. `filled`: keys with zeros behind them, by how many they are."""

    keys: Tensor
    sites: Mapping[int, int]
    anywhere: bool
    filled: dict[int, Tensor] = field(default_factory=dict)


_now = SimpleNamespace(masks=None)


def row_masks(
    sites: dict[int, int], beginnings: Tensor, *, seed: int, step: int, anywhere: bool = False
) -> AbstractContextManager[None]:
    """While it lasts (forward and backward), masks are those of these tokens.

    Args:
        sites: as `sites_of` makes them. beginnings: (T,) int64, a batch's.
        anywhere: also on cards and without kernels, where drawing one mask for all is faster.
    """
    keys = torch.from_numpy(token_keys(beginnings.numpy(), seed=seed, step=step))
    return structure.replaced((_now, "masks", RowMasks(keys, sites, anywhere)))


def by_row() -> bool:
    """Whether masks are those of rows of the data now."""
    return _now.masks is not None


def select_tokens(rows: Tensor) -> AbstractContextManager[None]:
    """While it lasts, only these rows (K,) of the micro-batch's tokens are computed; their masks are as ever."""
    now: RowMasks | None = _now.masks
    some = None if now is None else RowMasks(now.keys[rows], now.sites, now.anywhere)
    return structure.replaced((_now, "masks", some))


def sites_of(model: nn.Module) -> dict[int, int]:
    """A number for each module, the same in every process that has built the same model."""
    return {id(module): number for number, module in enumerate(model.modules())}


def token_seed(layer: nn.Module, x: Tensor, *, by_kernel: bool) -> TokenSeed | None:
    """The seed of a layer's mask for x (N, D). None where its rows are not the tokens of the micro-batch, perhaps with
    some of no text behind them; the mask then is drawn."""
    now: RowMasks | None = _now.masks
    if now is None or id(layer) not in now.sites or not (by_kernel or now.anywhere):
        return None
    keys, count = now.keys, x.shape[0]
    more = count - keys.shape[0]
    if more < 0:
        return None
    if more and count not in now.filled:
        now.filled[count] = torch.cat([keys, keys.new_zeros(more)])
    return TokenSeed(now.filled[count] if more else keys, now.sites[id(layer)])


def some_seed(layer: nn.Module, x: Tensor) -> TokenSeed:
    """`token_seed` for x (N, ..) with kernels at hand; one that is drawn where its rows are not the micro-batch's."""
    seed = token_seed(layer, x, by_kernel=True)
    return seed or TokenSeed(torch.arange(x.shape[0], dtype=torch.int32), draw_seed())


def draw_seed() -> int:
    """A seed for a mask from torch's global generator, so that runs repeat and recomputation draws the same."""
    return int(torch.randint(2**31 - 1, ()))


def token_keys(beginnings: np.ndarray, *, seed: int, step: int) -> np.ndarray:
    """(T,) int32: the key of each token, by its text up to it."""
    with np.errstate(over="ignore"):
        keys = prefixes.mix(beginnings.view(np.uint64) + np.uint64(_number(seed, step)))
    return keys.astype(np.uint32).view(np.int32)


def number(*parts: int) -> int:
    """A seed of 63 bits from several numbers."""
    return _number(*parts) >> 1


def _number(*parts: int) -> int:
    return int.from_bytes(hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest(), "little")


def keep_mask(key: TokenSeed, shape: Sequence[int], p: float, device: torch.device) -> Tensor:
    """The mask by its definition: (N, D) bool, False where a number is dropped. The kernel's is the same."""
    n, d = shape
    rows = _hash((key.keys.to(device).long() & _WORD) ^ key.seed)  # (N,)
    bits = _hash(torch.arange((d + 1) // 2, device=device) ^ rows[:, None])  # (N, D / 2)
    both = torch.stack([bits & 0xFFFF, bits >> 16], dim=-1).view(n, -1)[:, :d]
    return both >= round(p * 65536)


def _hash(x: Tensor) -> Tensor:
    """`scalar.hash_u32` of int64 numbers below 2^32."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _WORD
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _WORD
    return x ^ (x >> 16)

"""Masks of dropout by their definition, in numpy: the reference of kernels that drop. Ours is only the class of a seed.
Use: `from tests.dropout_masks import mask`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from halfbyte.layers.kernels import dropout


def hashed(x: np.ndarray) -> np.ndarray:
    """lowbias32 of C. Wellons, github.com/skeeto/hash-prospector."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def mask(n: int, d: int, p: float, seed: int | dropout.TokenSeed) -> Tensor:
    """1 where a number is kept, else 0: two neighbours share the 32 bits of their pair's hash; each is dropped where
    its 16 are below p. A pair is numbered in its row, under the hash of the row's key, or else in the whole matrix."""
    pairs = np.arange(n * d // 2, dtype=np.uint32).reshape(n, d // 2)
    if isinstance(seed, dropout.TokenSeed):
        keys = seed.keys.numpy().view(np.uint32)
        bits = hashed(pairs[:1] ^ hashed(keys ^ np.uint32(seed.seed))[:, None])
    else:
        bits = hashed(pairs ^ np.uint32(seed))
    halves = np.stack([bits & np.uint32(0xFFFF), bits >> np.uint32(16)], axis=-1).reshape(n, d)
    return torch.from_numpy(halves >= round(p * 65536)).double()

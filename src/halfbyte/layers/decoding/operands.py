"""What some operations of a tape are given.

Letters: M texts, H query heads, K key heads, T max_tokens of a cache, d numbers of a head, D in.
"""

from dataclasses import dataclass

from torch import Tensor

from halfbyte.layers.norm_gate import NormKind


@dataclass(frozen=True)
class NormFormula:
    """A norm over a vector; weight and bias (D,) of the tape's type."""

    weight: Tensor
    eps: float
    kind: NormKind = NormKind()  # noqa: RUF009, frozen
    bias: Tensor | None = None


@dataclass(frozen=True)
class CachedAttention:
    """One layer's attention: where its queries, keys and values are, and what it does with them. `keys`, `values`: (M,
    K, T, d), of `Tape.cache`."""

    qkv: Tensor  # (M, (H + 2 K) d) fp32
    keys: Tensor
    values: Tensor
    positions: Tensor  # (M,) int64, of this token
    heads: int
    key_heads: int
    d: int
    scale: float
    cap: float = 0.0  # of scores, by tanh; 0: none
    window: int = 0  # tokens seen, itself included; 0: all
    q_norm: NormFormula | None = None  # RMS norms over d
    k_norm: NormFormula | None = None
    places: Tensor | None = None  # (M,) int64, of its cache among those that there are; None: M of them, in order
    slopes: Tensor | None = None  # (H,) fp32, of ALiBi
    together: bool = False  # each head's query, key and value lie together in `qkv`
    neighbours: bool = False  # rotary turns neighbours, not halves
    gated: bool = False  # a gate of d numbers lies behind each query: (M, (2 H + 2 K) d)


@dataclass(frozen=True)
class Int8Head:
    """Rows in 8 bits: integers (O, D) int8, scales (O,), bounds (O,) of the error for a vector of length 1."""

    rows: Tensor
    scales: Tensor
    bounds: Tensor


@dataclass(frozen=True)
class Int16Vectors:
    """What the head in 8 bits reads of M vectors: lengths (M,), and integers (M, D..) int16 up to `largest` with a step
    for each vector (M,)."""

    lengths: Tensor
    steps: Tensor
    largest: int
    numbers: Tensor


def largest_int16(d: int) -> int:
    """Integers of x (D,) up to this times 8 bits: sums of D / 8 products are below 2^31."""
    return min(2**14, (2**31 - 1) // (127 * -(-d // 8)))

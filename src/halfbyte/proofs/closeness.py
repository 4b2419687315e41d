"""How far apart two ways of computing the same thing are, and how far rounding alone may bring them.

A distance is ||got - expected|| / ||expected||, computed in fp64. It is infinite where a number is NaN, or is
infinite while the tensors differ, and where `got` lacks a tensor: `distance <= bound` is false when it should be.
Source: errors of independent roundings add by their squares (N. Higham, "Accuracy and Stability of Numerical
Algorithms", section 2.8).
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def distance(got: Tensor | Mapping[str, Tensor], expected: Tensor | Mapping[str, Tensor]) -> float:
    """||got - expected|| / ||expected||, of all numbers of a tensor, or of all expected tensors, together."""
    got, expected = ({"": x} if isinstance(x, Tensor) else x for x in (got, expected))
    off = sum(_square_of_difference(got.get(name), wanted) for name, wanted in expected.items())
    size = sum(float(wanted.double().square().sum()) for wanted in expected.values())
    if size == 0:
        return 0.0 if off == 0 else math.inf
    ratio = math.sqrt(off / size)
    return ratio if math.isfinite(ratio) else math.inf


def row_distances(got: Tensor, expected: Tensor) -> Tensor:
    """`distance` of each row: both (N, D); returns (N,) in fp64."""
    got, expected = got.double(), expected.double()
    off = (got - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)
    return off.nan_to_num(math.inf, math.inf)


def centred(logits: Tensor) -> Tensor:
    """Logits (N, V) about their mean, in fp64: a number that is added to all of a row changes no probability."""
    logits = logits.double()
    return logits - logits.mean(-1, keepdim=True)


def accumulated_rounding(rounding: float, times: float, *, margin: float) -> float:
    """A bound for the distance after so many independent roundings, one after another. `rounding`: root mean square of
    what one rounding changes, relative to the number. `margin`: in standard deviations."""
    return margin * rounding * math.sqrt(times)


def _square_of_difference(got: Tensor | None, expected: Tensor) -> float:
    if got is None or got.shape != expected.shape:
        return math.inf
    if torch.equal(got, expected):
        return 0.0
    return float((got.double() - expected.double()).square().sum())

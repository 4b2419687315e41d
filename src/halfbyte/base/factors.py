"""The file of factors of what a store has lost: B (out, rank) and A (rank, in) of every quantised matrix, in fp32.

Why randomised: what 4 bits lose has a long tail, and only the first directions are wanted, of matrices whose full
decomposition takes minutes.
Source: Halko, Martinsson, Tropp 2011, arXiv:0909.4061, algorithms 4.4 and 5.1.
Cost: one matrix and its factors at a time; 2 + 2 x `POWERS` products of it with rank + `OVERSAMPLING` columns.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from halfbyte.base import lost
from halfbyte.base.store import shelf
from halfbyte.base.store.writer import Slot, Writer
from halfbyte.errors import StoreError
from halfbyte.quant import bnb, formats
from halfbyte.types import Model

# Of a spectrum as flat as that of rounding errors the first directions stand out a little only: each power widens that.
POWERS, OVERSAMPLING = 4, 16


def low_rank(matrix: Tensor, rank: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """B and A with B A close to the best approximation of a rank.

    Args:
        matrix: (O, D) fp32.
        rank: at most min(O, D); of a larger one the rest is zeros.

    Returns:
        B (O, rank) and A (rank, D) fp32, each with half of every singular value, the largest first. The first columns
        of B and rows of A are those of a lower rank.
    """
    width = min(rank + OVERSAMPLING, *matrix.shape)
    generator = torch.Generator().manual_seed(seed)
    sketch = torch.randn(matrix.shape[1], width, generator=generator)
    basis = torch.linalg.qr(matrix @ sketch).Q  # (O, width)
    for _ in range(POWERS):
        basis = torch.linalg.qr(matrix.T @ basis).Q  # (D, width)
        basis = torch.linalg.qr(matrix @ basis).Q  # (O, width)
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    kept = min(rank, width)
    roots = values[:kept].sqrt()
    b, a = matrix.new_zeros(matrix.shape[0], rank), matrix.new_zeros(rank, matrix.shape[1])
    b[:, :kept] = (basis @ left[:, :kept]) * roots
    a[:kept] = roots[:, None] * right[:kept]
    return b, a


def write(model: Model, wanted: shelf.Wanted, path: Path, rank: int) -> str:
    """Make the file for an open base, whole or not at all. Returns in words how much of the loss it holds.

    Raises:
        StoreError: the source lacks a matrix that the base has, or has changed.
    """
    todo = {n: (m.out_features, m.in_features) for n, m in bnb.quantised_linears(model) if formats.is_quantised(m)}
    lost_sum = left_sum = 0.0
    with Writer(path, [slot for name, shape in todo.items() for slot in _slots(name, *shape, rank)]) as out:
        for matrix in lost.matrices(model, wanted):
            difference = matrix.difference()
            b, a = low_rank(difference, rank)
            out.put(f"{matrix.name}.B", b.numpy().data)
            out.put(f"{matrix.name}.A", a.numpy().data)
            lost_sum += _squares(difference)
            left_sum += _squares(difference.addmm_(b, a, alpha=-1))
            del todo[matrix.name]
        if todo:
            raise StoreError(f"{wanted.checkpoint.id} holds no source of {len(todo)} matrices, such as {min(todo)}.")
        out.finish({})
    share = 1 - left_sum / lost_sum if lost_sum else 0.0
    return f"rank {rank} holds {share:.1%} of what {wanted.quant.type} has lost (of its squares)"


def _slots(name: str, rows: int, columns: int, rank: int) -> tuple[Slot, Slot]:
    return (
        Slot(f"{name}.B", "F32", (rows, rank), 4 * rows * rank),
        Slot(f"{name}.A", "F32", (rank, columns), 4 * rank * columns),
    )


def _squares(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2

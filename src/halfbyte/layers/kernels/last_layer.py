"""The rows that the last layer need make: those of tokens that predict a labelled token.

Why: of a prompt's tokens nobody reads what the last layer makes, beyond their keys and values. On GSM8K that is 42% of
the rows of its MLP and of its attention's last product: 1% of a step, forward and back.
What: `only_rows` tells one layer for one forward. It selects these rows behind its attention, where rows meet no more.
Each number is what it would have been.
Cost: a copy of the rows, twice, forward and back.

Letters: T tokens, K rows that are read, D width.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from halfbyte.layers.kernels import pool
from halfbyte.models import structure


class SelectRows(torch.autograd.Function):
    """Rows (K,) of x (N, D), named once each, and zeros behind them: (count, D). Backward copies, where torch's
    `index_select` adds one row after another."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, rows: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.size = x.shape[0]
        out = pool.empty((count, *x.shape[1:]), x)
        torch.index_select(x, 0, rows, out=out[: len(rows)])
        out[len(rows) :] = 0
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (rows,), (grad,) = ctx.saved_tensors, grads
        dx = pool.empty((ctx.size, *grad.shape[1:]), grad).zero_()
        return dx.index_copy_(0, rows, grad[: len(rows)]), None, None


@dataclass(eq=False)
class LastLayerRows:
    """The rows that the last layer of a forward need make, and whether it made no others."""

    layer: nn.Module  # the last one
    rows: Tensor  # (K,) of its T tokens
    count: int  # how many rows it makes, K or some of zeros more
    selected: bool = False

    def select(self, x: Tensor) -> Tensor:
        """(1, T, D) -> (1, count, D)."""
        rows: Tensor = SelectRows.apply(x[0], self.rows, self.count)
        return rows[None]


_now = SimpleNamespace(rows=None)


def only_rows(needed: LastLayerRows) -> AbstractContextManager[None]:
    """While it lasts (a forward), `needed.layer` need make no other rows."""
    return structure.replaced((_now, "rows", needed))


def rows_for(module: nn.Module) -> LastLayerRows | None:
    """The rows that this layer, or the attention of a layer that has begun, need make; None for all rows."""
    rows: LastLayerRows | None = _now.rows
    if rows is None:
        return None
    asked = module is rows.layer or (rows.selected and module is getattr(rows.layer, "self_attn", None))
    return rows if asked else None

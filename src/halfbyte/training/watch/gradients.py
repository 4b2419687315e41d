"""Stops a run at the first loss or gradient that is not finite, naming the rows and keeping the batch.

Why: a NaN in one step is in every weight after the next, and the loss of the step before it looked healthy.
Cost: nothing: the loss and the gradients' norm are read once a step for the metrics anyway.
"""

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import save_file

from halfbyte.adapters import learning
from halfbyte.data import collate, pack
from halfbyte.errors import TrainError
from halfbyte.system import files
from halfbyte.types import Batch, Model

BATCH = "not_finite.safetensors"
MOST = 4  # names in a message


def check(
    model: Model, run: Path, step: int, batches: collate.Batches, parts: Sequence[tuple[pack.MicroBatch, torch.Tensor]],
    *, total: float, norm: float,
) -> None:  # fmt: skip
    """Whether a step's losses and gradients are finite.

    Args:
        run: the folder that the batch is saved into.
        parts: each micro-batch with its share of the loss, of which `total` is the sum.
        norm: of all gradients; 0 where it is not to be looked at.

    Raises:
        TrainError: names the rows, and the gradients.
    """
    if math.isfinite(total) and math.isfinite(norm):
        return
    bad = [i for i, (_, part) in enumerate(parts) if not math.isfinite(float(part))]
    what = f"the gradients' norm is {norm}" if math.isfinite(total) else f"the loss is {total}"
    where = [batches.examples[row].where for i in bad or range(len(parts)) for row in parts[i][0]]
    if math.isfinite(total):
        names = learning.not_finite(model)
        what += f", of {len(names)} tensors, {', '.join(names[:MOST])}"
    saved = save(run, step, [batches.of(parts[i][0]) for i in bad or range(len(parts))], where)
    raise TrainError(
        f"{what} at step {step} (rows {_some(where)})."
        + (f" The batch is in {saved}; nothing of this step was saved." if saved else ""),
        fix="lower train.learning_rate, set train.max_grad_norm, or look at those rows"
        if step > 1
        else "nothing has been trained yet: look at the base's weights and at those rows",
    )


def save(run: Path, step: int, batches: Sequence[Batch], where: Sequence[str]) -> Path | None:
    """Keep the micro-batches of a step, as they were computed, with the rows' names. None if nothing can be written."""
    tensors = {f"{i}.{n}": v for i, b in enumerate(batches) for n, v in b.items() if isinstance(v, torch.Tensor)}
    path = run / BATCH
    temporary = files.beside(path)
    with suppress(OSError):
        # clone: safetensors refuses tensors that share storage
        about = {"step": str(step), "rows": json.dumps(list(where))}
        save_file({n: v.contiguous().clone() for n, v in tensors.items()}, temporary, metadata=about)
        files.put(temporary, path)
        return path
    return None


def check_first(model: Model, longest: int) -> None:
    """Whether the first backward has reached every adapter.

    Args:
        longest: tokens of the step's longest row. In a row of two tokens the one that is learned from sees only itself,
            so what asks and what is asked for (Q and K) get gradients of zeros, rightly.

    Raises:
        TrainError: names those without a gradient, or with one of zeros.
    """
    dead = learning.without_gradient(model) if longest > 2 else []
    if dead:
        raise TrainError(
            f"{len(dead)} trained tensors or layers got no gradient in the first step, or one of zeros, so they would "
            f"never learn: {_some(dead)}.",
            fix="turn gradient_checkpointing off; if it stays, report it with the recipe",
        )


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:MOST])}{' ...' if len(names) > MOST else ''}"

"""Whether a saved adapter says what it said when it was trained: a few logits are kept in the run, and looked at again.

Why: an adapter that loads zero tensors, or onto another base, answers fluently. PEFT tells of neither.
What: of three rows, the logits at some labelled tokens, each of the token itself and of the likeliest others; and how
far the adapter has moved them, so that a small difference can be told from an adapter that is not there.
Cost: two forwards of three rows, once at the end of a run, and again at each `halfbyte verify`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from halfbyte.data.encoding.examples import IGNORED, Example
from halfbyte.errors import RunError
from halfbyte.layers.loss import keeps_some
from halfbyte.system import files
from halfbyte.types import Document, Model

ROWS, TOKENS, LIKELIEST = 3, 16, 5
# What another order of the same sums may do, in units of the dtype's rounding and relative to the largest logit. In
# fp32 each sum has thousands of terms; in 16 bits sums are in fp32, and what is rounded is a few results in a row.
ROUNDINGS = {"float32": 128, "bfloat16": 4, "float16": 4}


@dataclass(frozen=True)
class Same:
    """How far logits are from those that were kept, and how far the adapter had moved these, each relative to the
    largest; `bound` is what rounding may make of it."""

    difference: float
    moved: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.difference <= self.bound

    @property
    def seen(self) -> str:
        return f"logits differ by {self.difference:.1e} of the largest; the adapter moves them by {self.moved:.1e}"


def keep(
    path: Path, model: Model, rows: Sequence[Example], alone: AbstractContextManager[None], saved: torch.dtype
) -> None:
    """Write what an adapter says of the first rows to a JSON file.

    Args:
        alone: in which the model is the base without its adapter. saved: the dtype of the adapter's file.
    """
    kept = []
    chosen = [row for row in rows[: 4 * ROWS] if any(label != IGNORED for label in row.labels)][:ROWS]
    for row in chosen:
        at = [i - 1 for i, label in enumerate(row.labels) if label != IGNORED]
        at = at[:: -(-len(at) // TOKENS)]
        logits = logits_at(model, row.input_ids, at)
        own = torch.tensor([[row.input_ids[i + 1]] for i in at], device=logits.device)
        tokens = torch.cat([own, logits.topk(min(LIKELIEST, logits.shape[1])).indices], 1)
        kept.append({"where": row.where, "ids": row.input_ids, "at": at, "tokens": tokens.tolist()})
        kept[-1]["logits"] = logits.gather(1, tokens).tolist()
    with alone:
        moved = _distance(model, kept)[0]
    frozen = next(p.dtype for p in model.parameters() if not p.requires_grad and p.is_floating_point())
    name = str(frozen).removeprefix("torch.")
    # rounding both matrices of an adapter changes what it adds by up to twice a rounding, which is `eps`
    bound = ROUNDINGS[name] * torch.finfo(frozen).eps + (torch.finfo(saved).eps * moved if saved != frozen else 0.0)
    # one of few steps moves logits by less than that: then one that is there comes at least half as near
    bound = min(bound, max(moved / 2, torch.finfo(frozen).eps))
    files.write(path, files.as_json({"dtype": name, "moved": moved, "bound": bound, "rows": kept}))


def compare(path: Path, model: Model) -> Same:
    """What an adapter says now beside what was kept.

    Raises:
        RunError: the file cannot be read.
    """
    try:
        values: Document = json.loads(path.read_text(encoding="utf-8"))
        return Same(_distance(model, values["rows"])[0], float(values["moved"]), float(values["bound"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise RunError(f"{path} cannot be read: {type(error).__name__} {error}.") from error


def _distance(model: Model, kept: Sequence[Document]) -> tuple[float, float]:
    """The largest difference from the logits that were kept, relative to the largest of these; and that one."""
    difference, largest = 0.0, 0.0
    for row in kept:
        was, tokens = torch.tensor(row["logits"]), torch.tensor(row["tokens"])
        now = logits_at(model, row["ids"], row["at"]).gather(1, tokens.to(model.device)).cpu()
        difference = max(difference, float((now - was).abs().nan_to_num(torch.inf).max()))
        largest = max(largest, float(was.abs().max()))
    return difference / largest if largest else difference, largest


def logits_at(model: Model, ids: Sequence[int], at: Sequence[int]) -> torch.Tensor:
    """(positions, vocabulary) fp32, of one row in evaluation."""
    was_training = model.training
    model.eval()
    where = torch.tensor(list(at), device=model.device)
    try:
        with torch.no_grad():
            row = torch.tensor([list(ids)], device=model.device)
            if keeps_some(model):
                return model(input_ids=row, logits_to_keep=where).logits[0].float()
            logits = model(input_ids=row).logits[0]
            return logits.index_select(0, where.to(logits.device)).float().to(where.device)
    finally:
        model.train(was_training)

"""Whether a saved adapter says what it said when it was trained: a few logits are kept in the run, and looked at again.

Why: an adapter that loads zero tensors, or onto another base, answers fluently. PEFT tells of neither.
What: of three rows, the logits at some labelled tokens, each of the token itself and of the likeliest others; and how
far the adapter has moved them, so that a small difference can be told from an adapter that is not there. Of a long row
a part, around its first labelled token.
Cost: two forwards of three rows of up to 1,024 tokens, once at the end of a run, and again at each `halfbyte verify`.
"""

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from halfbyte.data import collate
from halfbyte.data.encoding.examples import IGNORED, Example
from halfbyte.errors import RunError
from halfbyte.layers import fuse, heads, packing
from halfbyte.layers.loss import every_hidden, keeps_some
from halfbyte.models import structure
from halfbyte.proofs.setting import small_chunks
from halfbyte.system import files
from halfbyte.types import Document, Model

ROWS, TOKENS = 3, 16
REACH = 512  # tokens of a row before its first labelled one, and from there on
LIKELIEST = 5
# What another order of the same sums may do, in units of the dtype's rounding and relative to the largest logit. In
# fp32 each sum has thousands of terms; in 16 bits sums are in fp32, and what is rounded is a few results in a row.
ROUNDINGS = {"float32": 128, "bfloat16": 4, "float16": 4}


@dataclass(frozen=True)
class AdapterCheck:
    """How far logits are from those of the training, and how far the adapter had moved these, each relative to the
    largest; `bound` is what rounding may make of it."""

    difference: float
    moved: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.difference <= self.bound

    def __str__(self) -> str:
        return f"logits differ by {self.difference:.1e} of the largest; the adapter moves them by {self.moved:.1e}"


def keep_logits(
    path: Path, model: Model, rows: Sequence[Example], alone: AbstractContextManager[None], saved: torch.dtype
) -> None:
    """Write what an adapter says of the first rows to a JSON file. `alone`: in which the model is the base without its
    adapter. `saved`: the dtype of the adapter's file."""
    samples: list[Document] = []
    texts = (text for row in rows[: 4 * ROWS] for text in row.texts)  # a pair's, an anchor's: none sees another
    chosen = [text for text in texts if any(label != IGNORED for label in text.labels[1:])][:ROWS]
    for row in chosen:
        first = next(i for i, label in enumerate(row.labels) if label != IGNORED)
        part = slice(max(0, first - REACH), first + REACH)
        ids, labels = row.input_ids[part], row.labels[part]
        before = int(_predicts_tokens(model))  # the next one
        positions = [i - before for i, label in enumerate(labels) if label != IGNORED]
        positions = positions[:: -(-len(positions) // TOKENS)]
        logits = logits_at(model, ids, positions)
        tokens = logits.topk(min(LIKELIEST, logits.shape[1])).indices
        if _predicts_tokens(model):
            following = torch.tensor([[ids[i + 1]] for i in positions], device=logits.device)
            tokens = torch.cat([following, tokens], 1)
        samples.append(
            {
                "where": row.where, "ids": ids, "at": positions, "tokens": tokens.tolist(),
                "logits": logits.gather(1, tokens).tolist(),
            }
        )  # fmt: skip
    with alone:
        moved = _largest_difference(model, samples)
    frozen = next(p.dtype for p in model.parameters() if not p.requires_grad and p.is_floating_point())
    name = str(frozen).removeprefix("torch.")
    # rounding both matrices of an adapter changes what it adds by up to twice a rounding, which is `eps`
    bound = ROUNDINGS[name] * torch.finfo(frozen).eps + (torch.finfo(saved).eps * moved if saved != frozen else 0.0)
    # one of few steps moves logits by less than that: then one that is there comes at least half as near
    bound = min(bound, max(moved / 2, torch.finfo(frozen).eps))
    files.write(path, files.as_json({"dtype": name, "moved": moved, "bound": bound, "rows": samples}))


def compare_logits(path: Path, model: Model) -> AdapterCheck:
    """What an adapter says now beside what it said when it was trained. Raises RunError: the file cannot be read."""
    try:
        values: Document = json.loads(path.read_text(encoding="utf-8"))
        difference = _largest_difference(model, values["rows"])
        return AdapterCheck(difference, float(values["moved"]), float(values["bound"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise RunError(f"{path} cannot be read: {type(error).__name__} {error}.") from error


def _largest_difference(model: Model, samples: Sequence[Document]) -> float:
    """The largest difference from the logits of these samples, relative to the largest of them."""
    difference, largest = 0.0, 0.0
    for row in samples:
        before, tokens = torch.tensor(row["logits"]), torch.tensor(row["tokens"])
        now = logits_at(model, row["ids"], row["at"]).gather(1, tokens.to(model.device)).cpu()
        difference = max(difference, float((now - before).abs().nan_to_num(torch.inf).max()))
        largest = max(largest, float(before.abs().max()))
    return difference / largest if largest else difference


def _predicts_tokens(model: Model) -> bool:
    """Whether it is a language model: no head of a task, and no encoder, whose vectors are all that it has."""
    return not heads.has_head(model) and not structure.is_encoder(structure.causal_lm(model).config)


def logits_at(model: Model, ids: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
    """(positions, vocabulary) fp32, of one row in evaluation; of a model with a head its scores of the row up to each
    position: (positions, labels); of an encoder without one its vectors: (positions, D)."""
    at = torch.tensor(list(positions), device=model.device)
    with structure.evaluating(model), fuse.as_trained(), small_chunks(model):
        if heads.has_head(model):
            rows = (Example(tuple(ids[: p + 1]), (IGNORED,) * (p + 1)) for p in positions)
            return torch.cat([heads.scores(model, collate.collate_texts([row])) for row in rows])
        batch = collate.collate_texts([Example(tuple(ids), (IGNORED,) * len(ids))])
        if not _predicts_tokens(model):
            return every_hidden(model, batch).index_select(0, at).float()
        inputs = packing.forward_inputs(model, batch)
        inputs.pop("labels", None)
        if keeps_some(model):
            return model(**inputs, logits_to_keep=at).logits[0].float()
        logits = model(**inputs).logits[0]
        return logits.index_select(0, at.to(logits.device)).float().to(at.device)

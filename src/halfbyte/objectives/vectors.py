"""Vectors of texts that are near where texts fit: sentence-transformers' losses of whole steps.

What: `MultipleNegativesRankingLoss` takes every other passage of the step as a negative, `CoSENTLoss` compares all
pairs of rows; so a row's loss depends on all. The trainer first asks for the step's vectors without gradients
(`row_vectors`), `couple` says what each vector's gradient is, and `loss` sends it through each text: exact over any
split into micro-batches. Source: GradCache, arXiv:2101.06983; sentence-transformers' `losses/`.
Cost: a forward more of each text, but for `TripletLoss`, whose rows are apart.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from halfbyte.data import collate, pack
from halfbyte.data.encoding.encoder import EncodedRows
from halfbyte.data.encoding.examples import IGNORED, Example
from halfbyte.errors import DataError, RecipeError
from halfbyte.objectives.objective import Objective, OfAll, Sums
from halfbyte.plan.job import ObjectiveCost
from halfbyte.recipe import task
from halfbyte.scoring import retrieval
from halfbyte.types import Batch, Model

_ROWS = "correct the rows, or --set vectors.loss=... of what they have"


@dataclass(frozen=True)
class TextVectors(Objective):
    """`groups`: the labels of rows that have one, by their numbers."""

    settings: task.VectorFields
    groups: tuple[str, ...] = ()

    name: ClassVar[str] = task.EMBED
    sum_names: ClassVar[tuple[str, ...]] = ("loss", "rows", "asked", *retrieval.NAMES)
    together: ClassVar[bool] = True

    @property
    def cost(self) -> ObjectiveCost:
        return ObjectiveCost(forwards=float(self.coupled))

    @property
    def coupled(self) -> bool:
        """Whether a row's loss depends on the other rows of its step."""
        return self.settings.loss != task.TRIPLET

    def check(self, *every: EncodedRows | None) -> TextVectors:
        """Itself, with the labels of these rows. Raises DataError: names the first row without what the loss reads."""
        loss, labels = self.settings.loss, set[str]()
        needs = {task.TRIPLET: "a negative", task.GROUPS: "a label"}.get(loss, "a passage")
        some = (zip(rows.labelled.tolist(), rows.examples.completions(), strict=True) for rows in every if rows)
        for count, (text, where) in (row for part in some for row in part):  # a text has one labelled token
            labels.add(text)
            if loss not in (fitting := _fitting(count, text)):
                needs = "a score" if loss == task.COSENT and text == "null" else needs
                fix = f"--set vectors.loss={' or '.join(fitting)}, which these columns fit; or data.fields names others"
                raise DataError(f"{where}: {loss} needs {needs} in each row.", fix=fix)
        return replace(self, groups=tuple(sorted(labels)) if loss == task.GROUPS else ())

    def check_teaches(self, rows: EncodedRows) -> None:
        """Raises DataError: the loss learns nothing of these rows together."""
        if not self.of_set:
            return
        counts, loss = Counter(text for text, _ in rows.examples.completions()), self.settings.loss
        if loss == task.COSENT and len(counts) < 2:
            raise DataError(f"{loss} compares rows with other scores, and all have {next(iter(counts))}.", fix=_ROWS)
        if loss == task.GROUPS and (len(counts) < 2 or max(counts.values()) < 2):
            raise DataError(f"{loss} needs two labels, one of them of two rows; they have {len(counts):,}.", fix=_ROWS)

    def unread(self, rows: EncodedRows) -> list[str]:
        """What is told of scores that differ and that the loss does not read."""
        if self.settings.loss != task.RANKING or len({text for text, _ in rows.examples.completions()} - {"null"}) < 2:
            return []
        return [f"{task.RANKING} takes each passage as one that fits, whatever its score; {task.COSENT} reads scores"]

    def fits(self, scores: Sequence[float]) -> NDArray[np.bool_]:
        """Which rows' passages fit what asks: with CoSENTLoss those in the upper half of the scores' range."""
        every = np.asarray(scores, float)
        return (every >= (every.max() + every.min()) / 2) | (self.settings.loss != task.COSENT)

    @property
    def of_set(self) -> bool:
        """Whether the loss is one number of all rows."""
        return self.settings.loss in (task.COSENT, task.GROUPS)

    def check_width(self, width: int) -> None:
        """Raises RecipeError: more numbers are asked for than a vector has."""
        if (most := max(self.settings.matryoshka_dims, default=0)) > width:
            raise RecipeError(f"vectors.matryoshka_dims has {most:,}, and vectors have {width:,} numbers.")

    def weights(self, rows: EncodedRows) -> pack.Weights:
        return np.ones(len(rows.examples), np.int64)

    def collate(self, examples: Sequence[Example]) -> Batch:
        ends = [ends_of(example) for example in examples]
        batch = collate.collate_texts([replace(e, starts=(0, *at[:-1])) for e, at in zip(examples, ends, strict=True)])
        scores = [self.number_of(e.completion) for e in examples]
        return {**batch, "targets": torch.tensor(scores), "row_texts": [len(at) for at in ends]}

    def number_of(self, text: str) -> float:
        """A row's score, or the number of its label; a row without, as proofs make them, has 0."""
        return float(self._number_of.get(text, 0) if self.groups else json.loads(text or "0") or 0)

    @cached_property
    def _number_of(self) -> dict[str, int]:
        return {label: number for number, label in enumerate(self.groups)}

    def weight(self, batch: Batch) -> float:
        return len(batch["row_texts"])

    def row_vectors(self, model: Model, batch: Batch) -> list[Tensor]:
        """The vectors of each row's texts: (k, D) fp32."""
        from halfbyte.layers import heads

        return list(heads.vectors(model, batch, self.settings.pooling).split(batch["row_texts"]))

    def step_of(
        self, model: Model, parts: Iterable[tuple[pack.MicroBatch, Batch]],
        same: Callable[..., AbstractContextManager[None]], of_all: OfAll,
    ) -> dict[int, tuple[float, Tensor]]:  # fmt: skip
        """The loss of each row, and the gradient of the step's by its vectors."""
        numbers, every = list[int](), list[Tensor]()
        scores = [torch.empty(0)]
        for rows, batch in parts:
            with torch.no_grad(), same(rows, batch):
                every += self.row_vectors(model, batch)
            numbers += rows
            scores.append(batch["targets"])
        vectors, of_rows, ours = of_all(every, torch.cat(scores))
        return dict(zip(numbers, self.couple(vectors, of_rows)[ours], strict=True))

    def couple(self, step: Sequence[Tensor], scores: Tensor) -> list[tuple[float, Tensor]]:
        """The loss of each row of a step, and the gradient of all by the row's vectors."""
        with torch.enable_grad():
            leaves = [vectors.detach().requires_grad_() for vectors in step]
            losses = self.losses(leaves, scores)
            gradients = torch.autograd.grad(losses.sum(), leaves, allow_unused=True, materialize_grads=True)
        return list(zip(losses.tolist(), gradients, strict=True))

    def loss(self, model: Model, batch: Batch) -> Tensor:
        """Of rows whose step is coupled (`batch["step"]`) their share of it; of others as if they were a step."""
        vectors, step = self.row_vectors(model, batch), batch.get("step")
        if step is None:
            return self.losses(vectors, batch["targets"]).sum()
        rows = [step[row] for row in batch["row_numbers"]]
        through = (torch.cat(vectors) * torch.cat([gradient for _, gradient in rows])).sum()
        return through - through.detach() + sum(loss for loss, _ in rows)

    def losses(self, rows: Sequence[Tensor], scores: Tensor) -> Tensor:
        """The loss of each row of a step, whose mean is sentence-transformers' loss of the batch: (rows,). Each row is
        (k, D): what asks, what fits it, and what does not. With `matryoshka_dims` a weighted sum of those of the first
        numbers of each, as `MatryoshkaLoss`."""
        if not (dims := self.settings.matryoshka_dims):
            return self._losses(rows, scores)
        every, counts = torch.cat([*rows]), [len(row) for row in rows]
        cut = (F.normalize(every[:, :d], dim=-1).split(counts) for d in dims)
        weights = self.settings.matryoshka_weights or (1.0,) * len(dims)
        return torch.stack([w * self._losses(part, scores) for w, part in zip(weights, cut, strict=True)]).sum(0)

    def _losses(self, rows: Sequence[Tensor], scores: Tensor) -> Tensor:
        first, second = torch.stack([row[0] for row in rows]), torch.stack([row[min(1, len(row) - 1)] for row in rows])
        if self.settings.loss == task.TRIPLET:
            apart = [F.pairwise_distance(row[:1], row[1:]) for row in rows]  # of a row of two the last: as if 0 away
            each = [F.relu(d[:1] - d[1:] + self.settings.margin).mean() if len(d) > 1 else d.sum() for d in apart]
            return torch.stack(each)
        if self.settings.loss == task.COSENT:
            alike = F.cosine_similarity(first, second) * self.settings.scale
            truth = scores.to(alike.device)
            wrong = (alike[:, None] - alike[None, :])[truth[:, None] < truth[None, :]]
            return torch.logsumexp(torch.cat([wrong.new_zeros(1), wrong]), 0).expand(len(rows))
        if self.settings.loss == task.GROUPS:
            return _triplets(first, scores.to(first.device), self.settings.margin).expand(len(rows))
        others = [row[2:] for row in rows if len(row) > 2]
        candidates = F.normalize(torch.cat([second, *others]), dim=-1)
        alike = F.normalize(first, dim=-1) @ candidates.T * self.settings.scale
        return F.cross_entropy(alike, torch.arange(len(rows), device=alike.device), reduction="none")

    def text_sums(self, model: Model, batch: Batch) -> list[Sums]:
        return self.all_sums(self.row_vectors(model, batch), batch["targets"])

    def all_sums(self, vectors: Sequence[Tensor], scores: Tensor) -> list[Sums]:
        """Of each row of an evaluation, among the passages of all: its loss, and how near its own passage is; of a
        text with a label, among the others, how near one with the same label is."""
        both = (torch.stack([row[at] for row in vectors]) for at in (0, int(not self.groups)))
        queries, passages = (F.normalize(texts, dim=-1).cpu().numpy() for texts in both)
        labels, fit = scores.cpu().numpy(), self.fits(scores.tolist())
        sums: list[Sums] = []
        for n, loss in enumerate(self.losses(vectors, scores).tolist()):
            alike, fits = passages @ queries[n], np.array([n] * int(fit[n]), int)
            if self.groups:
                fits, alike[n] = np.flatnonzero((labels == labels[n]) & (np.arange(len(labels)) != n)), -np.inf
            none = dict.fromkeys(retrieval.NAMES, 0.0)
            values = retrieval.values(retrieval.places(alike, fits)) if len(fits) else none
            sums.append({"loss": loss, "rows": 1.0, "asked": float(len(fits) > 0), **values})
        return sums

    def scores(self, sums: Sums) -> dict[str, float]:
        """`loss`; and what is found, as `scoring.retrieval` has it, of the rows for which something fits."""
        means = {name: sums[name] / max(sums["asked"], 1.0) for name in retrieval.NAMES}
        return {"loss": sums["loss"] / max(sums["rows"], 1.0), **means}


def _fitting(count: int, text: str) -> list[str]:
    """The losses that read a row of so many texts. `text`: its label or score."""
    if count == 1:
        return [task.GROUPS]
    return [task.RANKING, *[task.COSENT] * (text != "null"), *[task.TRIPLET] * (count > 2)]


def _triplets(vectors: Tensor, labels: Tensor, margin: float) -> Tensor:
    """The mean over all triplets that are not far enough apart, a scalar: `BatchAllTripletLoss`, Euclidean. One anchor
    at a time, and of all of them how often each distance counts: what is kept is quadratic in texts, not in triplets.
    """
    products = vectors @ vectors.T
    squares = (products.diag()[:, None] - 2 * products + products.diag()).clamp_min(0)
    apart = torch.where(squares > 0, (squares + (squares == 0) * 1e-16).sqrt(), 0.0)
    times, total, count = torch.zeros_like(apart), vectors.new_zeros(()), 0
    with torch.no_grad():
        for anchor, distances in enumerate(apart):
            alike = labels == labels[anchor]
            other, alike[anchor] = ~alike, False
            short = (distances[alike][:, None] - distances[other] + margin).clamp_min(0)  # (near, far)
            wrong = short > 1e-16
            times[anchor, alike], times[anchor, other] = wrong.sum(1).to(times), -wrong.sum(0).to(times)
            total, count = total + short.sum(), count + int(wrong.sum())
    through = (times * apart).sum()
    return (total + (through - through.detach())) / (count + 1e-16)


def ends_of(example: Example) -> list[int]:
    """Where each text of a row ends; a row without marks, as proofs make them, is one text."""
    ends = [i + 1 for i, label in enumerate(example.labels) if label != IGNORED]
    return ends if ends and ends[-1] == len(example.labels) else [*ends, len(example.labels)]

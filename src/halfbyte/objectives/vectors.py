"""Vectors of texts that are near where texts fit: sentence-transformers' losses of whole steps.

What: `MultipleNegativesRankingLoss` takes every other passage of the step as a negative, `CoSENTLoss` compares all
pairs of rows; so a row's loss depends on all. The trainer first asks for the step's vectors without gradients
(`row_vectors`), `couple` says what each vector's gradient is, and `loss` sends it through each text: exact over any
split into micro-batches. Source: GradCache, arXiv:2101.06983; sentence-transformers' `losses/`.
Cost: a forward more of each text, but for `TripletLoss`, whose rows are apart.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from halfbyte.data import collate, pack
from halfbyte.data.encoding.encoder import EncodedRows
from halfbyte.data.encoding.examples import IGNORED, Example
from halfbyte.errors import DataError
from halfbyte.plan.job import ObjectiveCost
from halfbyte.recipe import task
from halfbyte.types import Batch, Model

if TYPE_CHECKING:
    from torch import Tensor

    from halfbyte.objectives.objective import Sums

NEAREST = 10


@dataclass(frozen=True)
class TextVectors:
    settings: task.VectorFields

    name: ClassVar[str] = task.EMBED
    sum_names: ClassVar[tuple[str, ...]] = ("loss", "rows", "first", "nearest", "reciprocal")

    @property
    def cost(self) -> ObjectiveCost:
        return ObjectiveCost(forwards=float(self.coupled))

    @property
    def coupled(self) -> bool:
        """Whether a row's loss depends on the other rows of its step."""
        return self.settings.loss != task.TRIPLET

    def check(self, *every: EncodedRows | None) -> TextVectors:
        """Itself. Raises DataError: names the first row without what the loss reads."""
        needs = {task.COSENT: "a score", task.TRIPLET: "a negative"}.get(self.settings.loss)
        for example in (e for rows in every if rows is not None and needs for e in rows.examples):
            there = len(_ends(example)) > 2 if needs == "a negative" else json.loads(example.completion) is not None
            if not there:
                raise DataError(f"{example.where}: {self.settings.loss} needs {needs} in each row.", fix="data.fields")
        return self

    def weights(self, rows: EncodedRows) -> pack.Weights:
        return np.ones(len(rows.examples), np.int64)

    def collate(self, examples: Sequence[Example]) -> Batch:
        import torch

        ends = [_ends(example) for example in examples]
        batch = collate.collate_texts([replace(e, starts=(0, *at[:-1])) for e, at in zip(examples, ends, strict=True)])
        scores = [json.loads(e.completion or "null") or 0.0 for e in examples]
        return {**batch, "targets": torch.tensor(scores), "row_texts": [len(at) for at in ends]}

    def weight(self, batch: Batch) -> float:
        return len(batch["row_texts"])

    def row_vectors(self, model: Model, batch: Batch) -> list[Tensor]:
        """The vectors of each row's texts: (k, D) fp32."""
        from halfbyte.layers import heads

        return list(heads.vectors(model, batch, self.settings.pooling).split(batch["row_texts"]))

    def step_of(
        self,
        model: Model,
        parts: Iterable[tuple[pack.MicroBatch, Batch]],
        same: Callable[..., AbstractContextManager[None]],
    ) -> dict[int, tuple[float, Tensor]]:
        """As `couple`, of micro-batches and their rows' numbers; `same`: in which dropout is that of the loss."""
        import torch

        step: dict[int, tuple[Tensor, float]] = {}
        for rows, batch in parts:
            with torch.no_grad(), same(rows, batch):
                vectors = self.row_vectors(model, batch)
            step |= dict(zip(rows, zip(vectors, batch["targets"].tolist(), strict=True), strict=True))
        return self.couple(step)

    def couple(self, step: Mapping[int, tuple[Tensor, float]]) -> dict[int, tuple[float, Tensor]]:
        """The loss of each row of a step, and the gradient of all by the row's vectors, by its number. `step`: the
        vectors and the score of each row."""
        import torch

        with torch.enable_grad():
            leaves = [vectors.detach().requires_grad_() for vectors, _ in step.values()]
            losses = self.losses(leaves, torch.tensor([score for _, score in step.values()]))
            gradients = torch.autograd.grad(losses.sum(), leaves, allow_unused=True, materialize_grads=True)
        return dict(zip(step, zip(losses.tolist(), gradients, strict=True), strict=True))

    def loss(self, model: Model, batch: Batch) -> Tensor:
        """Of rows whose step is coupled (`batch["step"]`) their share of it; of others as if they were a step."""
        import torch

        vectors, step = self.row_vectors(model, batch), batch.get("step")
        if step is None:
            return self.losses(vectors, batch["targets"]).sum()
        rows = [step[row] for row in batch["row_numbers"]]
        through = (torch.cat(vectors) * torch.cat([gradient for _, gradient in rows])).sum()
        return through - through.detach() + sum(loss for loss, _ in rows)

    def losses(self, rows: Sequence[Tensor], scores: Tensor) -> Tensor:
        """The loss of each row of a step, whose mean is sentence-transformers' loss of the batch: (rows,). Each row is
        (k, D): what asks, what fits it, and what does not."""
        import torch
        from torch.nn import functional as F

        first, second = torch.stack([row[0] for row in rows]), torch.stack([row[min(1, len(row) - 1)] for row in rows])
        if self.settings.loss == task.TRIPLET:
            apart = [
                F.pairwise_distance(row[:1], row[1:]) for row in rows
            ]  # the last one of a row of two: as if 0 away
            each = [F.relu(d[:1] - d[1:] + self.settings.margin).mean() if len(d) > 1 else d.sum() for d in apart]
            return torch.stack(each)
        if self.settings.loss == task.COSENT:
            alike = F.cosine_similarity(first, second) * self.settings.scale
            truth = scores.to(alike.device)
            wrong = (alike[:, None] - alike[None, :])[truth[:, None] < truth[None, :]]
            return torch.logsumexp(torch.cat([wrong.new_zeros(1), wrong]), 0).expand(len(rows))
        others = [row[2:] for row in rows if len(row) > 2]
        candidates = F.normalize(torch.cat([second, *others]), dim=-1)
        alike = F.normalize(first, dim=-1) @ candidates.T * self.settings.scale
        return F.cross_entropy(alike, torch.arange(len(rows), device=alike.device), reduction="none")

    def text_sums(self, model: Model, batch: Batch) -> list[Sums]:
        return self.all_sums(self.row_vectors(model, batch), batch["targets"])

    def all_sums(self, vectors: Sequence[Tensor], scores: Tensor) -> list[Sums]:
        """Of each row of an evaluation, among the passages of all: its loss, and how near its own passage is."""
        import torch
        from torch.nn import functional as F

        queries, passages = (F.normalize(torch.stack([row[i] for row in vectors]), dim=-1) for i in (0, 1))
        near = (queries * passages).sum(1, keepdim=True)
        before = torch.cat(
            [(q @ passages.T > o + 1e-6).sum(1) for q, o in zip(queries.split(512), near.split(512), strict=True)]
        )
        every = zip(self.losses(vectors, scores).tolist(), before.tolist(), strict=True)
        return [
            {"loss": loss, "rows": 1.0, "first": float(n < 1), "nearest": float(n < NEAREST), "reciprocal": 1 / (n + 1)}
            for loss, n in every
        ]

    def scores(self, sums: Sums) -> dict[str, float]:
        """`loss`; `recall_1`, `recall_10` and `mrr` of a query's own passage among those of all rows."""
        rows = max(sums["rows"], 1.0)
        names = {"loss": "loss", "first": "recall_1", "nearest": f"recall_{NEAREST}", "reciprocal": "mrr"}
        return {shown: sums[name] / rows for name, shown in names.items()}


def _ends(example: Example) -> list[int]:
    """Where each text of a row ends; a row without marks, as proofs make them, is one text."""
    ends = [i + 1 for i, label in enumerate(example.labels) if label != IGNORED]
    return ends if ends and ends[-1] == len(example.labels) else [*ends, len(example.labels)]

"""A toy objective: the loss of each label counts by a weight that its row gives it.

All of it is here: no file of the package knows it. Use: `finetune.train(loaded, objective=Weighted())`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from halfbyte.data.collate import collate
from halfbyte.data.encoding.examples import IGNORED, Example
from halfbyte.layers import loss
from halfbyte.objectives.objective import Objective
from halfbyte.plan.job import ObjectiveCost


@dataclass(frozen=True)
class Weighted(Objective):
    """The mean of cross-entropy, weighted label by label."""

    shift: int = 0

    name: ClassVar[str] = "weighted"
    cost: ClassVar[ObjectiveCost] = ObjectiveCost(whole_logits=3)
    sum_names: ClassVar[tuple[str, ...]] = ("loss", "weight", "tokens")

    def weights_of(self, row: Example) -> list[float]:
        """Of each token: from 0.5 to 4.5 by its id where it is labelled, else 0."""
        return [0.0 if label == IGNORED else 0.5 + (label + self.shift) % 5 for label in row.labels]

    def weights(self, rows: Any) -> Any:
        return np.array([sum(self.weights_of(row)) for row in rows.examples])

    def collate(self, examples: Sequence[Example]) -> Any:
        batch: Any = collate(examples)
        weights = torch.tensor([w for row in examples for w in self.weights_of(row)])
        return {**batch, "weights": weights[batch["keep"] + 1]}

    def loss(self, model: Any, batch: Any) -> torch.Tensor:
        logits, targets = loss.labelled_logits(model, batch)
        each = F.cross_entropy(logits.float(), targets, reduction="none")
        return (each * batch["weights"].to(each)).sum()

    def weight(self, batch: Any) -> float:
        return float(batch["weights"].sum())

    def text_sums(self, model: Any, batch: Any) -> list[dict[str, float]]:
        logits, targets = loss.labelled_logits(model, batch)
        each = F.cross_entropy(logits.float(), targets, reduction="none") * batch["weights"].to(logits.device)
        spans = zip(loss.labels_of_texts(batch), batch["cu_seq_lens_q"].diff().tolist(), strict=True)
        return [
            {"loss": float(each[span].sum()), "weight": float(batch["weights"][span].sum()), "tokens": tokens}
            for span, tokens in spans
        ]

    def scores(self, sums: dict[str, float]) -> dict[str, float]:
        return {"loss": sums["loss"] / sums["weight"], "weight": sums["weight"], "tokens": int(sums["tokens"])}

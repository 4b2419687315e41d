"""Classification and regression: a head's scores of a text beside its label, its labels or its number.

What: the mean over texts of cross-entropy (one label), of binary cross-entropy over all labels (several), or of the
squared error (a number), each as transformers' `ForSequenceClassificationLoss` has it of a whole step.
Cost: a forward and a backward of the text; no logits of a vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from halfbyte.data import collate, pack
from halfbyte.data.encoding.encoder import EncodedRows
from halfbyte.data.encoding.examples import Example
from halfbyte.data.reading.problems import near, some
from halfbyte.errors import AdapterError, DataError, first_line
from halfbyte.plan.job import ObjectiveCost
from halfbyte.recipe.adapter import HEAD, MOST_BYTES
from halfbyte.recipe.schema import Recipe
from halfbyte.recipe.task import CLASSIFY, REGRESS
from halfbyte.system import limits
from halfbyte.types import Batch, Document, Model

if TYPE_CHECKING:
    from torch import Tensor

    from halfbyte.objectives.objective import Sums

_UNNAMED = {"0": "LABEL_0", "1": "LABEL_1"}  # what a config leaves out
KINDS = ("regression", "single_label_classification", "multi_label_classification")


@dataclass(frozen=True)
class Labels:
    """`names`: the labels, in the order of the head's scores; none for a number. `several`: a text may have any number
    of them. `label_smoothing`: as `TrainingArguments.label_smoothing_factor`, of one label; evaluations are without."""

    names: tuple[str, ...] = ()
    several: bool = False
    label_smoothing: float = 0.0

    cost: ClassVar[ObjectiveCost] = ObjectiveCost()
    of_base: ClassVar[str] = ", where the base has a head drawn at random"
    sum_names: ClassVar[tuple[str, ...]] = ("loss", "texts", "right", "tokens")

    @classmethod
    def of(cls, recipe: Recipe, train: EncodedRows, evaluation: EncodedRows | None) -> Labels:
        """With the recipe's labels, or those of the training rows, sorted. Raises DataError: fewer than two;
        rows with others, which are named; no numbers for task regress."""
        objective = cls()
        if recipe.task == CLASSIFY:
            values = [json.loads(text) for text in {text for text, _ in train.examples.completions()}]
            known = recipe.labels or sorted({name for value in values for name in _texts(value)})
            if len(known) < 2:
                fix = "data.fields.label names the column; task: regress takes numbers"
                raise DataError(f"task classify needs two labels or more, and the rows have {list(known)}.", fix=fix)
            several = any(isinstance(value, list) for value in values)
            objective = cls(tuple(known), several, recipe.train.label_smoothing_factor)
        for rows, which in ((train, "training"), (evaluation, "held-out")):
            if rows is not None:
                objective.check(rows, which)
        return objective

    @classmethod
    def at(cls, adapter: Path) -> Labels:
        """Those that a saved adapter was trained with, by the config of its head. Raises AdapterError: it has none."""
        path = adapter / HEAD / "config.json"
        try:
            values: Document = limits.read_json(path, MOST_BYTES)  # type: ignore[assignment]
            kind, every = KINDS.index(values["problem_type"]), values.get("id2label", _UNNAMED)
            return cls(tuple(every[i] for i in sorted(every, key=int)) if kind else (), kind == 2)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"{path}, which names the labels, cannot be read: {first_line(error)}."
            raise AdapterError(what, fix="copy the adapter's folder again, with the folders in it") from None

    def check(self, rows: EncodedRows, which: str = "held-out") -> None:
        """Raise a DataError that names labels of rows that are none of these, or are no numbers. `which` rows."""
        wrong = dict[str, str]()
        for text, where in rows.examples.completions():
            for name in _texts(json.loads(text)):
                if name not in self._number_of if self.names else _number(name) is None:
                    wrong.setdefault(name, where)
        if wrong:
            shown = some([f"{name!r} ({where})" for name, where in wrong.items()], len(wrong))
            what = f"are not among {some(self.names, len(self.names))}" if self.names else "are no numbers"
            fix = "correct the rows, or name all labels in the recipe: labels: [...]"
            hint = near(next(iter(wrong)), self.names)
            raise DataError(f"{len(wrong):,} labels of the {which} rows {what}: {shown}{hint}.", fix=fix)

    @property
    def name(self) -> str:
        return CLASSIFY if self.names else REGRESS

    @property
    def width(self) -> int:
        """How many scores a text gets."""
        return len(self.names) or 1

    @property
    def config(self) -> Document:
        """What transformers' config says of a head like this."""
        names = self.names or ("score",)
        kind = KINDS[bool(self.names) + self.several]
        return {"id2label": dict(enumerate(names)), "label2id": dict(zip(names, range(len(names)), strict=True)),
                "problem_type": kind}  # fmt: skip

    @cached_property
    def _number_of(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    def weights(self, rows: EncodedRows) -> pack.Weights:
        return np.ones(len(rows.examples), np.int64)

    def collate(self, examples: Sequence[Example]) -> Batch:
        return {**collate.collate_texts(examples), "targets": self.targets([e.completion for e in examples])}

    def targets(self, completions: Sequence[str]) -> Tensor:
        """What rows are labelled with: (n,) int64; (n, L) fp32 of several labels; (n,) fp32 of numbers. A row without,
        as proofs make them, has the first label, or 0."""
        import torch

        values = [_texts(json.loads(text)) if text else [] for text in completions]
        if not self.names:
            return torch.tensor([_number(value[0]) if value else 0.0 for value in values])
        if not self.several:
            return torch.tensor([self._number_of[value[0]] if value else 0 for value in values])
        hot = torch.zeros(len(values), len(self.names))
        for row, value in enumerate(values):
            hot[row, [self._number_of[name] for name in value]] = 1.0
        return hot

    def losses(self, scores: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """The loss of each text: (n,)."""
        from torch.nn import functional as F

        if not self.names:
            return (scores[:, 0] - targets).square()
        if self.several:
            return F.binary_cross_entropy_with_logits(scores, targets, reduction="none").mean(1)
        return F.cross_entropy(scores, targets, reduction="none", label_smoothing=smoothing)

    def loss(self, model: Model, batch: Batch) -> Tensor:
        return self.losses(*_scores(model, batch), self.label_smoothing).sum()

    def weight(self, batch: Batch) -> float:
        return len(batch["keep"])

    def text_sums(self, model: Model, batch: Batch) -> list[Sums]:
        scores, targets = _scores(model, batch)
        if self.several:
            right = ((scores > 0) == (targets > 0)).all(1)
        else:
            right = scores.argmax(1) == targets if self.names else (scores[:, 0] - targets).abs()
        columns = self.losses(scores, targets), right.float(), batch["cu_seq_lens_q"].diff()
        every = zip(*(column.tolist() for column in columns), strict=True)
        return [{"loss": a, "texts": 1.0, "right": b, "tokens": c} for a, b, c in every]

    def scores(self, sums: Sums) -> dict[str, float]:
        """`loss`; `accuracy` (of all labels of a text together), or `mean_absolute_error` of numbers."""
        second, texts = "accuracy" if self.names else "mean_absolute_error", max(sums["texts"], 1.0)
        return {"loss": sums["loss"] / texts, second: sums["right"] / texts, "tokens": int(sums["tokens"])}


def _scores(model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
    from halfbyte.layers import heads

    scores = heads.scores(model, batch)
    return scores, batch["targets"].to(scores.device)


def _texts(value: object) -> list[str]:
    every = value if isinstance(value, list) else [value]
    return [one if isinstance(one, str) else json.dumps(one) for one in every]


def _number(value: str) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return number if np.isfinite(number) else None

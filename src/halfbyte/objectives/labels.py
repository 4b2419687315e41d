"""Classification, regression and tagging: a head's scores beside a text's label, labels or number, or its tokens' tags.

What: the mean over texts of cross-entropy (one label), of binary cross-entropy over all labels (several), or of the
squared error (a number); over tagged tokens of cross-entropy. Each as transformers' `ForSequenceClassificationLoss` and
`ForTokenClassification` have it of a whole step.
Cost: a forward and a backward of the text; no logits of a vocabulary.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from halfbyte.data import collate, pack
from halfbyte.data.encoding.encoder import EncodedRows
from halfbyte.data.encoding.examples import IGNORED, Example
from halfbyte.data.reading import read
from halfbyte.data.reading.problems import near, some
from halfbyte.errors import AdapterError, DataError, first_line
from halfbyte.objectives.objective import Objective, Sums
from halfbyte.plan.job import ObjectiveCost
from halfbyte.recipe.adapter_folder import HEAD, MOST_BYTES
from halfbyte.recipe.schema import Recipe
from halfbyte.recipe.task import CLASSIFY, REGRESS, TAG
from halfbyte.system import limits
from halfbyte.types import Batch, Document, Model

_WORDS = "tags_of_words"  # of a head's config
_UNNAMED = {"0": "LABEL_0", "1": "LABEL_1"}  # what a config leaves out
KINDS = ("regression", "single_label_classification", "multi_label_classification")


@dataclass(frozen=True)
class Labels(Objective):
    """`names`: the labels, in the order of the head's scores; none for a number. `several`: a text may have any number
    of them. `label_smoothing`: as `TrainingArguments.label_smoothing_factor`, of one label; `class_weight`: what each
    label counts for, none: 1. Evaluations are without both."""

    names: tuple[str, ...] = ()
    several: bool = False
    label_smoothing: float = 0.0
    class_weight: tuple[float, ...] = ()

    kind: ClassVar[str] = "SEQ_CLS"
    cost: ClassVar[ObjectiveCost] = ObjectiveCost()
    of_base: ClassVar[str] = ", where the base has a head drawn at random"
    sum_names: ClassVar[tuple[str, ...]] = ("loss", "texts", "right", "tokens")

    @classmethod
    def of(cls, recipe: Recipe, train: EncodedRows, evaluation: EncodedRows | None) -> Labels:
        """With the recipe's labels, or those of the training rows, sorted. Raises DataError: fewer than two;
        rows with others, which are named; no numbers for task regress."""
        objective = cls()
        if recipe.task != REGRESS:
            values = [json.loads(text) for text in {text for text, _ in train.examples.completions()}]
            names = {name for value in values for name in _texts(value)}
            names |= {f"I{name[1:]}" for name in names if recipe.task == TAG and name[:2] == "B-"}
            known = recipe.labels or in_order(names)
            if len(known) < 2:
                fix = "data.fields.label names the column; task: regress takes numbers"
                raise DataError(f"task {recipe.task} needs two labels, and the rows have {list(known)}.", fix=fix)
            several = recipe.task == CLASSIFY and any(isinstance(value, list) for value in values)
            objective = cls(tuple(known), several, recipe.train.label_smoothing_factor)
            if recipe.task == TAG:
                columns = read.columns(recipe.data.train)  # of the hub's none are known, and its rows mostly give words
                words = not columns or recipe.data.fields.tokens in columns
                objective = Tags(tuple(known), False, objective.label_smoothing, words=words)
        for rows, which in ((train, "training"), (evaluation, "held-out")):
            if rows is not None:
                objective.check(rows, which)
        return objective if recipe.class_weight is None else objective.weighted(recipe.class_weight, train)

    def weighted(self, asked: str | Mapping[str, float], train: EncodedRows) -> Labels:
        """Itself with what labels count for. `balanced`: rows / (labels x rows of a label), as scikit-learn has it.
        Raises DataError: a label that is none of these; several labels a text."""
        if self.several:
            raise DataError("class_weight is for one label a text, and these rows have several.", fix="leave it out")
        if isinstance(asked, str):
            counts = Counter(name for text, _ in train.examples.completions() for name in _texts(json.loads(text)))
            every = [counts.total() / (len(self.names) * max(1, counts[name])) for name in self.names]
        else:
            if strange := [name for name in asked if name not in self._number_of]:
                what = f"class_weight has {strange[0]!r}, which is not among {some(self.names, len(self.names))}"
                raise DataError(f"{what}{near(strange[0], self.names)}.", fix="name labels of the rows")
            every = [float(asked.get(name, 1.0)) for name in self.names]
        return replace(self, class_weight=tuple(every))

    @classmethod
    def at(cls, adapter: Path) -> Labels:
        """Those that a saved adapter was trained with, by the config of its head. Raises AdapterError: it has none."""
        path = adapter / HEAD / "config.json"
        try:
            values: Document = limits.read_json(path, MOST_BYTES)  # type: ignore[assignment]
            every = values.get("id2label", _UNNAMED)
            names = tuple(every[i] for i in sorted(every, key=int))
            if values["architectures"][0].endswith("ForTokenClassification"):
                return Tags(names, words=bool(values.get(_WORDS)))
            kind = KINDS.index(values["problem_type"])
            return cls(names if kind else (), kind == 2)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"{path}, which names the labels, cannot be read: {first_line(error)}."
            raise AdapterError(what, fix="copy the adapter's folder again, with the folders in it") from None

    def check(self, rows: EncodedRows, which: str = "held-out") -> None:
        """Raise a DataError that names labels of rows that are none of these, or are no numbers. `which` rows."""
        wrong = dict[str, str]()
        for text, where in rows.examples.completions():
            names = _texts(json.loads(text))
            if len(names) != 1 and not self.several and not isinstance(self, Tags):
                wrong.setdefault(text, where)
            for name in names:
                if name not in self._number_of if self.names else _number(name) is None:
                    wrong.setdefault(name, where)
        if wrong:
            shown = some([f"{name!r} ({where})" for name, where in wrong.items()], len(wrong))
            what = f"are not among {some(self.names, len(self.names))}" if self.names else "are no numbers"
            fix = "correct the rows, or name all labels in the recipe: labels: [...]"
            fix = fix if self.names else "write numbers in that column (data.fields.label), or task: classify"
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
        if self.class_weight:
            names = (_texts(json.loads(text)) for text, _ in rows.examples.completions())
            return np.array([sum(self.class_weight[self._number_of[name]] for name in of_row) for of_row in names])
        return np.ones(len(rows.examples), np.int64)

    def collate(self, examples: Sequence[Example]) -> Batch:
        return {**collate.collate_texts(examples), "targets": self.targets([e.completion for e in examples])}

    def targets(self, completions: Sequence[str]) -> Tensor:
        """What rows are labelled with: (n,) int64; (n, L) fp32 of several labels; (n,) fp32 of numbers. A row without,
        as proofs make them, has the first label, or 0."""
        values = [_texts(json.loads(text)) if text else [] for text in completions]
        if not self.names:
            return torch.tensor([_number(value[0]) if value else 0.0 for value in values])
        if not self.several:
            return torch.tensor([self._number_of[value[0]] if value else 0 for value in values])
        hot = torch.zeros(len(values), len(self.names))
        for row, value in enumerate(values):
            hot[row, [self._number_of[name] for name in value]] = 1.0
        return hot

    def losses(
        self, scores: Tensor, targets: Tensor, smoothing: float = 0.0, class_weight: Sequence[float] = ()
    ) -> Tensor:
        """The loss of each text, or tag: (n,)."""
        if not self.names:
            return (scores[:, 0] - targets).square()
        if self.several:
            return F.binary_cross_entropy_with_logits(scores, targets, reduction="none").mean(1)
        weight = torch.tensor(class_weight, device=scores.device) if class_weight else None
        return F.cross_entropy(scores, targets, weight, reduction="none", label_smoothing=smoothing)

    def loss(self, model: Model, batch: Batch) -> Tensor:
        return self.losses(*_scores(model, batch), self.label_smoothing, self.class_weight).sum()

    def weight(self, batch: Batch) -> float:
        if self.class_weight:
            return sum(self.class_weight[target] for target in batch["targets"].tolist())
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


@dataclass(frozen=True)
class Tags(Labels):
    """A tag for each word, or each token, of a text: `names` in the order of the head's scores. `words`: the rows gave
    words, so that of each one the first token alone has learned a tag."""

    words: bool = False

    kind: ClassVar[str] = "TOKEN_CLS"
    sum_names: ClassVar[tuple[str, ...]] = ("loss", "tags", "right", "found", "said", "there", "tokens")

    @property
    def name(self) -> str:
        return TAG

    @property
    def config(self) -> Document:
        return {name: value for name, value in super().config.items() if name != "problem_type"} | {_WORDS: self.words}

    def weights(self, rows: EncodedRows) -> pack.Weights:
        return super().weights(rows) if self.class_weight else rows.labelled

    @staticmethod
    def kept(examples: Sequence[Example]) -> Tensor:
        """The places of the tokens that get a tag, in rows laid end to end: (K,)."""
        marks = [label != IGNORED for example in examples for label in example.labels]
        return torch.tensor(marks).nonzero().squeeze(1)

    def collate(self, examples: Sequence[Example]) -> Batch:
        batch = collate.collate(examples)
        tags = [self._number_of[tag] for e in examples for tag in json.loads(e.completion or "[]")]
        keep = self.kept(examples)
        # rows that proofs make have no tags
        return {**batch, "keep": keep, "targets": torch.tensor(tags) if tags else torch.zeros_like(keep)}

    def of_texts(self, scores: Tensor, batch: Batch) -> list[Tensor]:
        """Of each text what `scores` has of its tokens: (k, L), or (k,)."""
        ends = np.searchsorted(batch["keep"].numpy(), batch["cu_seq_lens_q"][1:].numpy())
        return list(scores.tensor_split(ends[:-1].tolist()))

    def text_sums(self, model: Model, batch: Batch) -> list[Sums]:
        scores, targets = _scores(model, batch)
        losses = self.losses(scores, targets)
        sums: list[Sums] = []
        columns = (self.of_texts(x, batch) for x in (losses, scores.argmax(1), targets, scores.argmax(1) == targets))
        lengths = batch["cu_seq_lens_q"].diff().tolist()
        for loss, predicted, there, right, tokens in zip(*columns, lengths, strict=True):
            ours, theirs = (entities([self.names[i] for i in tags.tolist()]) for tags in (predicted, there))
            counts = {"found": len(ours & theirs), "said": len(ours), "there": len(theirs), "tokens": tokens}
            sums.append({"loss": float(loss.sum()), "tags": len(loss), "right": float(right.sum()), **counts})
        return sums

    def scores(self, sums: Sums) -> dict[str, float]:
        """`loss`, `accuracy` of tags, and `f1` of entities: each whole, with its kind."""
        tags, f1 = max(sums["tags"], 1.0), 2 * sums["found"] / max(sums["said"] + sums["there"], 1.0)
        return {"loss": sums["loss"] / tags, "accuracy": sums["right"] / tags, "f1": f1, "tokens": int(sums["tokens"])}


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(kind, first, last) of each entity that tags name, as seqeval has it: a run of tags of one kind, which a B- or an
    S- begins anew, and an E- or an S- ends. A tag without a mark is one of its own kind (IO)."""
    spans = set[tuple[str, int, int]]()
    kind, first, ends = "", 0, True
    for i, tag in enumerate([*tags, "O"]):
        mark, _, rest = tag.partition("-") if tag[1:2] == "-" and tag[0] in "BIES" else ("", "", tag)
        here = "" if tag == "O" else rest
        if kind and (here != kind or ends or mark in ("B", "S")):
            spans.add((kind, first, i - 1))
            kind = ""
        if here and not kind:
            kind, first = here, i
        ends = mark in ("E", "S")
    return spans


def in_order(names: set[str]) -> list[str]:
    """Sorted; numbers by their size."""
    return sorted(names, key=(lambda x: (float(x), x)) if all(_number(x) is not None for x in names) else None)


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

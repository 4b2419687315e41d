"""Vectors of texts by a run of task embed: of any texts, and of held-out rows, scored by what is found.

Cost: one forward a text, each text once, texts of like length together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfbyte.data import collate
from halfbyte.data.encoding import texts as encoding
from halfbyte.data.encoding.examples import IGNORED, Example
from halfbyte.data.reading import records
from halfbyte.data.reading.files import find
from halfbyte.data.reading.problems import BadRow, text_in
from halfbyte.errors import DataError
from halfbyte.models.context import context_of
from halfbyte.objectives.vectors import TextVectors, ends_of
from halfbyte.recipe.evaluation import Eval
from halfbyte.recipe.task import COSENT
from halfbyte.scoring import labels as scoring
from halfbyte.scoring import retrieval
from halfbyte.types import Batch, Document, Model

if TYPE_CHECKING:
    from halfbyte.inference.load import Opened

WORST, NEAREST = 10, 3  # queries that are shown, and what is near
Vectors = NDArray[np.float32]
Tell = Callable[[int], None]


def read(
    opened: Opened, rows: Sequence[Example], of: Callable[[Model, Batch], Tensor], tell: Tell = lambda done: None
) -> NDArray[np.float32]:
    """What is read of each text, in their order: (n, numbers of a text)."""
    return np.stack(read_each(opened, rows, of, tell))


def read_each(
    opened: Opened, rows: Sequence[Example], of: Callable[[Model, Batch], Tensor | Sequence[Tensor]],
    tell: Tell = lambda done: None, lay_out: Callable[[Sequence[Example]], Batch] = collate.collate_texts,
) -> list[NDArray[np.float32]]:  # fmt: skip
    """The same, where texts may have numbers of other shapes."""
    from halfbyte.layers import fuse

    done = 0
    most = max(1, len(rows) if opened.job.packed else 1)
    batches = collate.Batches.of_rows(rows, opened.plan.max_tokens_per_micro_batch, most)
    every: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(rows)
    with torch.no_grad(), fuse.as_trained():
        for numbers in batches.micro_batches:
            values = of(opened.model, lay_out([rows[n] for n in numbers]))
            for number, value in zip(numbers, values, strict=True):
                every[number] = value.float().cpu().numpy()
            tell(done := done + len(numbers))
    return every


def of_rows(opened: Opened, rows: Sequence[Example], tell: Tell = lambda done: None) -> Vectors:
    """The vectors of texts, as the body and its pooling have them: (n, D)."""
    from halfbyte.layers import heads

    pooling = opened.recipe.vectors.pooling
    return read(opened, rows, lambda model, batch: heads.vectors(model, batch, pooling), tell)


def of_texts(opened: Opened, texts: Sequence[str]) -> Vectors:
    """The vectors of texts, of unit length: (n, D). A text is cut where training, or the model, allows no more."""
    return unit(of_rows(opened, rows_of(opened, [(text,) for text in texts])))


def rows_of(opened: Opened, texts: Sequence[tuple[str, ...]], *, whole: bool = False) -> list[Example]:
    """Texts and pairs as rows, each cut where it is longer than what training, or unless `whole` the model, allows.
    Raises DataError: of one the tokenizer leaves nothing."""
    data, context = opened.recipe.data, context_of(opened.model.config)
    cut = data.max_length if data.overlong == "truncate" else None if whole or context is None else context.tokens
    every = encoding.tokens_of(opened.tokenizer, texts, cut)
    if (empty := next((text for text, (_, marks) in zip(texts, every, strict=True) if not marks), None)) is not None:
        raise DataError(f"{encoding.NO_TOKEN}: {', '.join(map(repr, empty))}.")
    return [row(ids, marks) for ids, marks in every]


def row(ids: Sequence[int], marks: Sequence[int] = ()) -> Example:
    """`marks`: tokens that are marked, as `encoding.tokens_of` has them."""
    labels = [IGNORED] * len(ids)
    for mark in marks:
        labels[mark] = ids[mark]
    return Example(tuple(ids), tuple(labels))


def text_of_row(opened: Opened, record: Document) -> str:
    """The text of a row that gets a vector, behind its prompt: of the column of texts, of passages or of queries, the
    first that it has. Raises BadRow."""
    data, fields = opened.recipe.data, opened.recipe.data.fields
    columns = {fields.passage: data.passage_prompt, fields.query: data.query_prompt}
    name = next((name for name in (fields.text, *columns) if name in record), fields.text)
    return columns.get(name, "") + text_in(record, name)


def unit(vectors: Vectors) -> Vectors:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def corpus_of(opened: Opened, path: Path) -> list[str]:
    """More passages to look among, of a file. Raises DataError: a row has none."""
    passages = list[str]()
    for source in find(str(path)):
        for number, raw in records.records(source):
            try:
                passages.append(text_of_row(opened, records.parse(raw)))
            except BadRow as wrong:
                raise DataError(f"{source.where(number)}: {wrong}.", fix="data.fields.passage") from None
    return passages


def side(
    opened: Opened, objective: TextVectors, rows: Sequence[Example], corpus: Sequence[str], settings: Eval, tell: Tell
) -> Document:
    """`scores` of what vectors find for the rows' queries among the passages of all rows and of a corpus; and the
    `neighbours` of the queries that find the least."""
    number = dict[tuple[int, ...], int]()  # of each text, by its tokens
    spans = ((one.input_ids, pairwise((0, *ends_of(one)))) for one in rows)
    texts = [[number.setdefault(ids[a:b], len(number)) for a, b in ends] for ids, ends in spans]
    more = rows_of(opened, [(text,) for text in corpus]) if corpus else []
    beside = [number.setdefault(one.input_ids, len(number)) for one in more]
    vectors = of_rows(opened, [row(ids) for ids in number], lambda done: tell(done * len(rows) // len(number)))
    numbers, near = [objective.number_of(one.completion) for one in rows], unit(vectors)
    losses = objective.losses([torch.from_numpy(vectors[some]) for some in texts], torch.tensor(numbers))
    asked, candidates = _asked(objective, texts, beside, numbers)
    pool = near[candidates]
    columns, tokens = {"loss": losses.double().numpy()}, list(number)
    every = list[tuple[NDArray[np.int64], int, int, list[tuple[int, float]]]]()
    for text, fitting, itself in asked:
        alike = pool @ near[text]
        alike[itself] = -np.inf
        order = np.argsort(-alike, kind="stable")[: min(NEAREST, len(alike) - len(itself))]
        nearest = [(candidates[n], float(alike[n])) for n in order]
        every.append((retrieval.places(alike, fitting), text, candidates[fitting[0]], nearest))
    scores = [retrieval.values(places) for places, *_ in every]
    columns |= {name: np.array([row[name] for row in scores]) for name in (scores[0] if scores else ())}
    result = scoring.of_values(columns, settings)
    if objective.of_set:
        result["scores"]["loss"]["interval"] = None
    if objective.settings.loss == COSENT:
        alike = np.array([near[a] @ near[b] for a, b, *_ in texts], float)
        result["scores"]["spearman"] = scoring.spearman(alike, np.array(numbers), settings)

    def words(text: int) -> str:
        return str(opened.tokenizer.decode(tokens[text], skip_special_tokens=True))

    worst = sorted(every, key=lambda one: -int(one[0][0]))[:WORST]
    return result | {"neighbours": [
        {"place": int(places[0]) + 1, "query": words(text), "expected": words(fits),
         "nearest": [{"text": words(n), "similarity": alike} for n, alike in near]}
        for places, text, fits, near in worst
    ]}  # fmt: skip


def _asked(
    objective: TextVectors, texts: Sequence[Sequence[int]], corpus: Sequence[int], labels: Sequence[float]
) -> tuple[list[tuple[int, list[int], list[int]]], list[int]]:
    """The texts that ask, each with the numbers of what fits it and of itself among those looked among; and these. Rows
    with the same query want the passages of all of them; a text with a label wants the others that have it."""
    if objective.groups:
        like = [[i for i, other in enumerate(labels) if other == label and i != n] for n, label in enumerate(labels)]
        firsts = [some[0] for some in texts]
        return [(firsts[n], fitting, [n]) for n, fitting in enumerate(like) if fitting], firsts
    candidates, wanted = list(dict.fromkeys([*(some[1] for some in texts), *corpus])), dict[int, dict[int, None]]()
    place = {text: i for i, text in enumerate(candidates)}
    for (query, passage, *_), fits in zip(texts, objective.fits(labels), strict=True):
        if fits:
            wanted.setdefault(query, {})[place[passage]] = None
    return [(query, [*fitting], []) for query, fitting in wanted.items()], candidates

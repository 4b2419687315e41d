"""Labels and numbers of texts by a run with a head: its held-out rows scored, and any file of rows.

`predict`: rows come in chunks. What is said of a chunk is appended to `OUT.partial`, JSON lines behind a first line
that names adapter and rows, and is on disk before the next chunk begins. A call that was ended is gone on with behind
the last whole line, so no row is there twice and none is missing. At the end the lines become JSONL, CSV or Parquet.
Cost: one forward a text, texts of like length together; one chunk of rows in memory, each line written twice.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from halfbyte.data import collate
from halfbyte.data.encoding import texts as encoding
from halfbyte.data.encoding.examples import IGNORED, Example
from halfbyte.data.reading import records
from halfbyte.data.reading.files import find
from halfbyte.data.reading.formats import texts_of
from halfbyte.data.reading.problems import BadRow
from halfbyte.errors import DataError, typed
from halfbyte.inference import evaluate
from halfbyte.models.context import context_of
from halfbyte.objectives import objective as objectives
from halfbyte.objectives.labels import Labels
from halfbyte.objectives.vectors import TextVectors
from halfbyte.recipe.adapter import ADAPTER_FILES, folder_of
from halfbyte.recipe.task import EMBED
from halfbyte.scoring import labels as scoring
from halfbyte.scoring import sheet
from halfbyte.scoring.labels import Floats
from halfbyte.system import files
from halfbyte.types import Document

if TYPE_CHECKING:
    from halfbyte.inference.load import Opened

CHUNK_ROWS = 1024
SUFFIXES = (".jsonl", ".csv", ".parquet")
ERROR = "error"  # in the place of a prediction, where a row cannot be read


def score(
    opened: Opened, options: sheet.EvalOptions, *, data: Path | None = None,
    progress: evaluate.Progress = lambda what, done, of: None,
) -> Document:  # fmt: skip
    """Score the held-out rows, or those of `data`: `sides` (adapter, and base where it is asked for) as
    `scoring.labels` has them, and `labels`. Raises DataError: no rows, or labels that the head does not have."""
    began, (encoded, source) = time.monotonic(), evaluate.rows_to_score(opened, data)
    examples, settings = encoded.examples[: options.limit], options.settings
    sides: dict[str, Document] = {}
    objective = TextVectors(opened.recipe.vectors) if opened.recipe.task == EMBED else Labels.at(folder_of(opened.run))
    objective.check(encoded)
    for name in opened.sides(with_base=options.with_base):

        def tell(done: int, name: str = name) -> None:
            progress(f"{name}: scores", done, len(examples))

        with opened.using(base=name == "base"):
            if isinstance(objective, TextVectors):
                sides[name] = scoring.of_values(_near(opened, objective, examples), settings)
                continue
            scores = scores_of(opened, objective, examples, tell)
        truth = objective.targets([e.completion for e in examples]).numpy()
        if objective.names:
            have = truth > 0 if objective.several else truth[:, None] == np.arange(objective.width)
            every = scoring.probabilities(scores, several=objective.several)
            sides[name] = scoring.of_labels(every, have, settings, several=objective.several)
        else:
            sides[name] = scoring.of_numbers(scores[:, 0], truth, settings)
    metrics = [
        {"name": name, "rows": len(examples), **{side: values["scores"][name] for side, values in sides.items()}}
        for name in sides["adapter"]["scores"]
    ]
    adapter, seconds = sheet.adapter_of(folder_of(opened.run)), time.monotonic() - began
    return {"data": source, "adapter": adapter, "rows": len(examples), "seconds": seconds, "metrics": metrics,
            "labels": getattr(objective, "names", ()), "sides": sides}  # fmt: skip


def _near(opened: Opened, objective: TextVectors, rows: Sequence[Example]) -> dict[str, Floats]:
    """How near each row's own passage is, by name: (rows,) each."""
    most = len(rows) if opened.job.packed else 1
    batches = collate.Batches.of_rows(rows, opened.plan.max_tokens_per_micro_batch, most)
    sums = objectives.evaluate(objective, opened.model, replace(batches, lay_out=objective.collate))
    names = dict(zip(objective.sum_names, sums.T, strict=True))
    return {
        "recall_1": names["first"],
        "recall_10": names["nearest"],
        "mrr": names["reciprocal"],
        "loss": names["loss"],
    }


def scores_of(
    opened: Opened, objective: Labels, rows: Sequence[Example], tell: Callable[[int], None] = lambda done: None
) -> Floats:
    """The head's scores of rows: (n, L)."""
    import torch

    from halfbyte.layers import heads

    scores, done = np.empty((len(rows), objective.width)), 0
    most = len(rows) if opened.job.packed else 1
    batches = collate.Batches.of_rows(rows, opened.plan.max_tokens_per_micro_batch, max(1, most))
    with torch.no_grad():
        for numbers in batches.micro_batches:
            batch = collate.collate_texts([rows[n] for n in numbers])
            scores[list(numbers)] = heads.scores(opened.model, batch).cpu().numpy()
            tell(done := done + len(numbers))
    return scores


def predictions(opened: Opened, objective: Labels, texts: Sequence[tuple[str, ...]]) -> list[Document]:
    """What is said of texts and of pairs of texts: `prediction`, and the `probabilities` of labels. A text is cut where
    it is longer than what training, or the model, allows."""
    data, context = opened.recipe.data, context_of(opened.model.config)
    cut = data.max_length if data.overlong == "truncate" else None if context is None else context.tokens
    ids = encoding.ids_of(opened.tokenizer, texts, cut)
    scores = scores_of(opened, objective, [Example(tuple(i), (IGNORED,) * len(i), "", (), "") for i in ids])
    if not objective.names:
        return [{"prediction": float(number)} for number in scores[:, 0]]
    answers = list[Document]()
    for every in scoring.probabilities(scores, several=objective.several).tolist():
        by_name = dict(zip(objective.names, every, strict=True))
        some = [name for name, p in by_name.items() if p > 0.5]
        best = some if objective.several else max(by_name, key=by_name.__getitem__)
        answers.append({"prediction": best, "probabilities": by_name})
    return answers


def check(data: Path, out: Path) -> None:
    """Raise a DataError where the rows are not there, or `out` is, or is of no known kind."""
    if out.suffix not in SUFFIXES:
        raise DataError(f"{out} must end in {', '.join(SUFFIXES)}.", fix=f"--out {typed(out.with_suffix('.jsonl'))}")
    if out.exists():
        raise DataError(f"{out} exists and is not overwritten.", fix="remove it, or --out ANOTHER")
    find(str(data))


def predict(opened: Opened, data: Path, out: Path, progress: Callable[[int], None] = lambda done: None) -> Document:
    """Say of each row of a file what the run says of it. Returns `rows`, of them `bad`, which have an `error`, and
    `resumed`, of an earlier call. Raises DataError: the file cannot be read, or the partial one is of other rows or of
    another adapter."""
    objective, partial = Labels.at(folder_of(opened.run)), out.with_name(f"{out.name}.partial")
    sizes = [[str(s.path), s.path.stat().st_size, s.path.stat().st_mtime_ns] for s in find(str(data))]
    done = resumed = _goes_on(partial, {"adapter": files.sha256(folder_of(opened.run) / ADAPTER_FILES[0]), "of": sizes})
    every = ((s.where(n), record) for s in find(str(data)) for n, record in records.records(s))
    bad, rows = 0, islice(every, done, None)
    with partial.open("ab") as file:
        while chunk := list(islice(rows, CHUNK_ROWS)):
            lines, texts = list[Document](), dict[int, tuple[str, ...]]()
            for where, raw in chunk:
                lines.append({})
                try:
                    lines[-1] |= records.parse(raw)
                    texts[len(lines) - 1] = texts_of(opened.recipe.data.fields, lines[-1])
                except BadRow as wrong:
                    lines[-1][ERROR], bad = f"{where}: {wrong}", bad + 1
            for place, answer in zip(texts, predictions(opened, objective, [*texts.values()]), strict=True):
                lines[place] |= answer
            file.write(b"".join(map(_line, lines)))
            file.flush()
            os.fsync(file.fileno())
            progress(done := done + len(chunk))
    _finish(partial, out)
    return {"out": str(out), "rows": done, "bad": bad, "resumed": resumed}


def _line(row: Document) -> bytes:
    return json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n"


def _goes_on(partial: Path, of: Document) -> int:
    """How many rows a partial file has, which is begun where there is none; a line that was cut short is cut off."""
    with partial.open("a+b") as file:
        file.seek(0)
        if not (begin := file.readline()).endswith(b"\n"):
            file.truncate(0)
            file.write(begin := _line(of))
        if begin != _line(of):
            fix = f"rm {typed(partial)}, or --out ANOTHER"
            raise DataError(f"{partial} is of other rows or of another adapter.", fix=fix)
        end, count = len(begin), 0
        for line in file:
            if line.endswith(b"\n"):
                end, count = end + len(line), count + 1
        file.truncate(end)
    return count


def _finish(partial: Path, out: Path) -> None:
    """The lines as the file that was asked for, whole or not at all; a column `p.LABEL` of each probability."""
    lines = files.beside(out)
    with partial.open("rb") as source, lines.open("wb") as file:
        for line in islice(source, 1, None):
            row = json.loads(line) if out.suffix != ".jsonl" else {}
            every = {f"p.{name}": p for name, p in (row.pop("probabilities", None) or {}).items()}
            file.write(_line({**row, **every}) if row else line)
    if out.suffix != ".jsonl":
        from datasets import Dataset, disable_progress_bars

        disable_progress_bars()
        with tempfile.TemporaryDirectory(dir=out.absolute().parent) as cache:
            rows = Dataset.from_json(str(lines), cache_dir=cache)
            (rows.to_csv if out.suffix == ".csv" else rows.to_parquet)(str(lines))
    files.put(lines, out)
    partial.unlink()

"""Labels and numbers of texts by a run with a head: its held-out rows scored, and any file of rows.

`predict`: rows come in chunks. What is said of a chunk is on disk, in a file that a later call goes on with
(`prediction_file`), before the next chunk begins; so no row is there twice and none is missing.
Cost: one forward a text, texts of like length together; one chunk of rows in memory.
"""

import json
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import accumulate, islice
from operator import itemgetter
from pathlib import Path

import numpy as np
from torch import Tensor

from halfbyte.data.encoding import texts as encoding
from halfbyte.data.encoding.encoder import EncodedRows, Encoder
from halfbyte.data.encoding.examples import Example, Examples
from halfbyte.data.reading import records
from halfbyte.data.reading.formats import Row, texts_of, words_of
from halfbyte.data.reading.problems import BadRow
from halfbyte.errors import DataError, typed
from halfbyte.inference import choices, evaluate, prediction_file, vectors
from halfbyte.inference.load import Opened
from halfbyte.inference.prediction_file import ERROR
from halfbyte.models import structure
from halfbyte.models.context import context_of
from halfbyte.objectives.labels import Labels, Tags, entities
from halfbyte.objectives.vectors import TextVectors
from halfbyte.recipe.adapter_folder import ADAPTER_FILES, folder_of
from halfbyte.recipe.evaluation import Eval
from halfbyte.recipe.task import EMBED
from halfbyte.runs.folder import read_json
from halfbyte.scoring import labels as scoring
from halfbyte.scoring import sheet
from halfbyte.scoring.labels import Floats
from halfbyte.system import files
from halfbyte.types import Batch, Document, Model

MISTAKES = 10  # rows that are shown
READS = {"data", "vectors", "quant", "model", "revision"}  # of a recipe: what decides what is said of a text
Asked = tuple[tuple[str, ...], bool]
"""A text, or a pair of them; or words, which is then True."""


def score(
    opened: Opened, options: sheet.EvalOptions, *, data: Path | None = None, corpus: Path | None = None,
    progress: evaluate.Progress = lambda what, done, of: None,
) -> Document:  # fmt: skip
    """Score the held-out rows, or those of `data`: `sides` (adapter, and base where it is asked for) as
    `scoring.labels` has them, and `labels`. A base without a head of its own chooses labels by their likelihood.
    `corpus`: more passages to look among. Raises DataError: no rows, or labels that the head does not have."""
    began, (encoded, source) = time.monotonic(), evaluate.rows_to_score(opened, data)
    examples, settings = encoded.examples[: options.limit], options.settings
    settings = settings if options.sure else settings.model_copy(update={"resamples": 0})
    sides: dict[str, Document] = {}
    for name in opened.sides(with_base=options.with_base):

        def tell(done: int, name: str = name) -> None:
            progress(f"{name}: scores", done, len(examples))

        with opened.using(base=name == "base"):
            if opened.recipe.task == EMBED:
                objective = TextVectors(opened.recipe.vectors).check(encoded)
                passages = vectors.corpus_of(opened, corpus) if corpus is not None else ()
                sides[name] = vectors.side(opened, objective, examples, passages, settings, tell)
            else:
                sides[name] = _side(opened, encoded, examples, settings, tell, base=name == "base")
    first = next(reversed(sides.values()))["scores"]
    metrics = [
        {"name": name, "rows": len(examples), **{side: values["scores"].get(name) for side, values in sides.items()}}
        for name in first
    ]
    labels = Labels.at(folder_of(opened.run)).names if opened.recipe.task != EMBED else ()
    labels = next(reversed(sides.values())).get("labels", labels)
    adapter, seconds = None if opened.alone else sheet.adapter_of(folder_of(opened.run)), time.monotonic() - began
    return {"data": source, "adapter": adapter, "rows": len(examples), "seconds": seconds, "metrics": metrics,
            "labels": labels, "sides": sides}  # fmt: skip


def _side(
    opened: Opened, encoded: EncodedRows, rows: Sequence[Example], settings: Eval, tell: vectors.Tell, *, base: bool
) -> Document:
    """Of labels and numbers, and the `mistakes`: rows that are the furthest from what is said of them."""
    objective = Labels.at(folder_of(opened.run))
    objective.check(encoded)
    if isinstance(objective, Tags):
        return _entities(objective, tag_scores(opened, objective, rows, tell), rows, settings)
    truth = objective.targets([e.completion for e in rows]).numpy()
    if not objective.names:
        answers = scores_of(opened, objective, rows, tell)[:, 0]
        result, off = scoring.of_numbers(answers, truth, settings), np.abs(answers - truth)
        replies, wanted = answers.tolist(), truth.tolist()
        sure = [None] * len(rows)
    else:
        several = objective.several
        have = truth > 0 if several else truth[:, None] == np.arange(objective.width)
        likely = _likelihoods(opened, objective, rows, tell) if base and not several else None
        scores, not_asked = (scores_of(opened, objective, rows, tell), 0) if likely is None else likely
        every = scoring.probabilities(scores, several=several)
        result = scoring.of_labels(every, have, settings, several=several)
        result |= {"by_likelihood": likely is not None, "not_asked": not_asked}
        off = np.abs(every - have).max(1) if several else 1 - (every * have).sum(1)
        replies = [answer_of(objective, p)["prediction"] for p in every]
        of_row = ([name for name, has in zip(objective.names, row, strict=True) if has] for row in have)
        wanted, sure = [every if several else every[0] for every in of_row], every.max(1).tolist()
    furthest = [n for n in np.argsort(-off).tolist() if replies[n] != wanted[n]][:MISTAKES]
    result["mistakes"] = [
        {
            "where": rows[n].where, "text": opened.tokenizer.decode(rows[n].input_ids, skip_special_tokens=True),
            "expected": wanted[n], "prediction": replies[n], "probability": sure[n],
        }
        for n in furthest
    ]  # fmt: skip
    return result


def tag_scores(
    opened: Opened, objective: Tags, rows: Sequence[Example], tell: vectors.Tell = lambda done: None
) -> list[Floats]:
    """The scores of each row's marked tokens: (k, L)."""
    from halfbyte.layers import heads

    def of(model: Model, batch: Batch) -> list[Tensor]:
        return objective.of_texts(heads.scores(model, batch), batch)

    return [each.astype(float) for each in vectors.read_each(opened, rows, of, tell, objective.collate)]


def _entities(objective: Tags, scores: Sequence[Floats], rows: Sequence[Example], settings: Eval) -> Document:
    texts = list[scoring.Tagged]()
    for row, of_row in zip(rows, scores, strict=True):
        there, predicted = json.loads(row.completion), [objective.names[i] for i in of_row.argmax(1)]
        right = sum(a == b for a, b in zip(predicted, there, strict=True))
        texts.append(scoring.Tagged(entities(predicted), entities(there), right, len(there)))
    return scoring.of_entities(texts, settings)


def tags_of(opened: Opened, objective: Tags, texts: Sequence[tuple[str, ...]], words: Sequence[bool]) -> list[Document]:
    """What is said of words: `tags`; of a text: `entities`, each with `start`, `end` (characters), `label`, `score`."""
    data, context = opened.recipe.data, context_of(opened.model.config)
    cut = data.max_length if data.overlong == "truncate" or context is None else context.tokens
    read = [t if w or not objective.words else tuple(t[0].split()) for t, w in zip(texts, words, strict=True)]
    how = [w or objective.words for w in words]
    tokens = [encoding.tagged(opened.tokenizer, t, words=w, cut=cut) for t, w in zip(read, how, strict=True)]
    if (empty := next((t for t, (ids, *_) in zip(texts, tokens, strict=True) if not ids), None)) is not None:
        raise DataError(f"{encoding.NO_TOKEN}: {', '.join(map(repr, empty))}.")
    answers = list[Document]()
    rows = tag_scores(opened, objective, [vectors.row(ids, marks) for ids, marks, _ in tokens])
    for parts, of_words, (_, _, places), scores in zip(texts, words, tokens, rows, strict=True):
        chances = scoring.probabilities(scores, several=False)
        tags = [objective.names[i] for i in chances.argmax(1)]
        if of_words:
            by_start = dict(zip((start for start, _ in places), tags, strict=True))
            begins = accumulate((len(part) + 1 for part in parts[:-1]), initial=0)
            answers.append({"tags": [by_start.get(at, "O") for at in begins]})
            continue
        places = _in_text(parts[0], places) if objective.words else places
        answers.append({"entities": [
            {"start": places[a][0], "end": places[b][1], "label": kind, "text": parts[0][places[a][0] : places[b][1]],
             "score": float(chances[a : b + 1].max(1).mean())}
            for kind, a, b in sorted(entities(tags), key=itemgetter(1))
        ]})  # fmt: skip
    return answers


def _in_text(text: str, places: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The characters, in a text, of its words that have these when one space joins them."""
    words = [word.span() for word in re.finditer(r"\S+", text)]
    begins = accumulate((end - start + 1 for start, end in words[:-1]), initial=0)
    by_start = dict(zip(begins, words, strict=True))
    return [by_start[start] for start, _ in places]


def _likelihoods(
    opened: Opened, objective: Labels, rows: Sequence[Example], tell: vectors.Tell
) -> tuple[Floats, int] | None:
    """The log-likelihood of each label as the answer to a question for it, (n, L), by a language model without its
    head; and of how many rows it reads less than that: there labels are alike. None of one that writes nothing."""
    if structure.causal_lm(opened.model).get_output_embeddings() is None:
        return None
    longest = max(objective.names, key=lambda name: len(opened.tokenizer(name, add_special_tokens=False).input_ids))
    asks = f"Which of these fits it best: {', '.join(objective.names)}? Answer with that alone."
    asking = [
        Row(row.where, prompt=f"{opened.tokenizer.decode(row.input_ids, skip_special_tokens=True)}\n\n{asks}",
            completion=longest)
        for row in rows
    ]  # fmt: skip
    context, recipe = context_of(opened.model.config), opened.recipe.data
    most = {"max_length": context.tokens if context is not None else 10**9, "overlong": "skip"}
    encoder = Encoder(opened.tokenizer, recipe.model_copy(update={
        "format": "prompt_completion", "mask": "completion", **most
    }))  # fmt: skip
    of_row = [Examples([encoder.encode([one])[0]])[:] for one in asking]
    read = [number for number, some in enumerate(of_row) if some]
    every = np.zeros((len(rows), len(objective.names)))
    every[read] = -np.array(choices.losses(
        opened.model, opened.tokenizer, [of_row[n][0] for n in read], objective.names,
        lambda what, done, of: tell(done), shares=recipe.share_prefixes == "auto",
    )).reshape(len(read), len(objective.names))  # fmt: skip
    return every, len(rows) - len(read)


def scores_of(
    opened: Opened, objective: Labels, rows: Sequence[Example], tell: vectors.Tell = lambda done: None
) -> Floats:
    """The head's scores of rows: (n, L)."""
    from halfbyte.layers import heads

    return vectors.read(opened, rows, heads.scores, tell).reshape(len(rows), objective.width).astype(float)


def temperature_of(run: Path) -> float:
    """The temperature that `halfbyte eval` has fitted on the run's held-out rows. Raises DataError: there is none of
    this adapter."""
    scores = read_json(run / "eval" / sheet.SCORES)
    heat = (side := (scores.get("sides") or {}).get("adapter", {})).get("temperature")
    if "temperature" in side and heat is None:
        what = f"its {scores['rows']:,} held-out rows are too few for one: it takes {scoring.LEAST_ROWS}"
        raise DataError(f"{run} has no temperature: {what}.", fix="hold out more rows (data.eval) in another run")
    if heat is None or sheet.other_adapter(scores, folder_of(run)):
        raise DataError(f"{run} has no temperature of its adapter.", fix=f"halfbyte eval {typed(run)}, which fits one")
    return float(heat)


def answer_of(objective: Labels, every: Floats) -> Document:
    """What is said of a text by the probabilities of its labels: (L,)."""
    by_name = dict(zip(objective.names, every.tolist(), strict=True))
    some = [name for name, p in by_name.items() if p > 0.5]
    best = some if objective.several else max(by_name, key=by_name.__getitem__)
    return {"prediction": best, "probabilities": by_name}


def predictions(
    opened: Opened, objective: Labels, texts: Sequence[tuple[str, ...]], temperature: float = 1.0
) -> list[Document]:
    """What is said of texts and of pairs of texts: `prediction`, and the `probabilities` of labels. A text is cut where
    it is longer than what training, or the model, allows."""
    scores = scores_of(opened, objective, vectors.rows_of(opened, texts))
    if not objective.names:
        return [{"prediction": float(number)} for number in scores[:, 0]]
    every = scoring.probabilities(scores, several=objective.several, temperature=temperature)
    return [answer_of(objective, p) for p in every]


def objective_of(opened: Opened) -> Labels | None:
    """What labels texts; None of a run that gives vectors."""
    return None if opened.recipe.task == EMBED else Labels.at(folder_of(opened.run))


def answers_of(
    opened: Opened, objective: Labels | None, texts: Sequence[tuple[str, ...]], words: Sequence[bool] = (),
    temperature: float = 1.0,
) -> list[Document]:  # fmt: skip
    """What is said of texts and pairs, or their vectors. `words`: whether a text is given as words, none is by default.
    Raises DataError: of one the tokenizer leaves nothing."""
    if objective is None:
        return [{"vector": vector.tolist()} for vector in vectors.of_texts(opened, [text for text, *_ in texts])]
    if isinstance(objective, Tags):
        return tags_of(opened, objective, texts, words or [False] * len(texts))
    return predictions(opened, objective, texts, temperature)


def _each(say: Callable[[Sequence[Asked]], list[Document]], asked: Sequence[Asked]) -> list[Document]:
    """What is said of rows; of one that cannot be read an error, while the others get their answers."""
    try:
        return say(asked) if asked else []
    except DataError as error:
        if len(asked) == 1:
            return [{ERROR: error.message}]
    half = len(asked) // 2
    return _each(say, asked[:half]) + _each(say, asked[half:])


def predict(
    opened: Opened, data: Path, out: Path, progress: vectors.Tell = lambda done: None, *, temperature: float = 1.0
) -> Document:
    """Say of each row of a file what the run says of it, or give it the vector of its text. Returns `rows`, of them
    `bad`, which have an `error`, with the `first_error`, and `resumed`, of an earlier call. Raises DataError: as
    `prediction_file.check`, or the partial file is of other rows, of another adapter or of other settings."""
    sources, partial = prediction_file.check(data, out), out.with_name(f"{out.name}.partial")
    objective, fields = objective_of(opened), opened.recipe.data.fields
    sizes = [[str(s.path), s.path.stat().st_size, s.path.stat().st_mtime_ns] for s in sources]
    by = str(opened.run) if opened.alone else files.sha256(folder_of(opened.run) / ADAPTER_FILES[0])
    of: Document = {"adapter": by, "of": sizes, "temperature": temperature}
    asked_for = opened.recipe.model_dump(mode="json", include=READS, exclude={"data": {"train", "eval"}})
    resumed = (done := prediction_file.goes_on(partial, of | asked_for)).rows
    rows = islice(((s.where(n), record) for s in sources for n, record in records.records(s)), resumed, None)
    reads = words_of if isinstance(objective, Tags) else texts_of

    def say(some: Sequence[Asked]) -> list[Document]:
        return answers_of(opened, objective, [text for text, _ in some], [words for _, words in some], temperature)

    with partial.open("ab") as file:
        while chunk := list(islice(rows, prediction_file.CHUNK_ROWS)):
            lines, asked = list[Document](), dict[int, Asked]()
            for where, raw in chunk:
                lines.append({})
                try:
                    lines[-1] |= prediction_file.of_input(row := records.parse(raw))
                    text = (vectors.text_of_row(opened, row),) if objective is None else reads(fields, row)
                    asked[len(lines) - 1] = text, row.get(fields.tokens) is not None
                except BadRow as wrong:
                    lines[-1][ERROR] = f"{where}: {wrong}"
            for place, answer in zip(asked, _each(say, [*asked.values()]), strict=True):
                lines[place] |= {ERROR: f"{chunk[place][0]}: {answer[ERROR]}"} if ERROR in answer else answer
            file.write(b"".join(map(prediction_file.line, lines)))
            file.flush()
            os.fsync(file.fileno())
            for one in lines:
                done.add(one)
            progress(done.rows)
    prediction_file.finish(partial, out)
    return {"out": str(out), **asdict(done), "resumed": resumed}

"""Score a model on held-out rows: loss and perplexity of the labelled tokens, and what it writes, by any metrics.

Why: a loss curve alone does not say whether the adapter does the task, nor whether the base did it already.
What: base and adapter are scored on the same rows in one process, the base with its adapter switched off; so their
difference is paired, row by row.
With the base the model as it came is asked for its losses too: what is won over it is what a run is worth.
Cost: for each side one forward over the rows, and one answer each (`batch.py`) where a metric reads answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from halfbyte.data import base_text, blocks, collate, split
from halfbyte.data.encoding import encode
from halfbyte.data.encoding.encoder import EncodedRows
from halfbyte.data.encoding.examples import Example
from halfbyte.errors import DataError
from halfbyte.inference import batch, choices, target
from halfbyte.inference.load import Opened
from halfbyte.layers import loss, packing
from halfbyte.layers.kernels.pool import POOL
from halfbyte.models.context import context_of
from halfbyte.models.sources.lookup import find_model
from halfbyte.models.structure import evaluating
from halfbyte.objectives import objective as objectives
from halfbyte.objectives import preference
from halfbyte.objectives.causal_lm import CausalLM
from halfbyte.plan import InferencePlan, Rows, plan_inference, sequences_beside
from halfbyte.proofs import sharing
from halfbyte.recipe.adapter_folder import folder_of
from halfbyte.recipe.evaluation import Eval
from halfbyte.runs.folder import RunFolder, read_json
from halfbyte.scoring import intervals, metrics, sheet
from halfbyte.system import device, usage
from halfbyte.training import source as unquantised

if TYPE_CHECKING:
    from halfbyte.training.fit import PlannedRun
    from halfbyte.types import Model, Tokenizer


@dataclass(frozen=True)
class PreferenceScoring:
    """Rows of which answer is better, with what their reference gives them, and the objective that they are scored by.
    The reference is that of the run: the base, or the adapter that it began with, of which the run has kept what it
    gives its own held-out rows."""

    opened: Opened
    objective: preference.Preference
    batches: collate.Batches

    @classmethod
    def of(cls, opened: Opened, batches: collate.Batches) -> PreferenceScoring | None:
        """None where rows are not of which answer is better. Raises DataError: their reference is an adapter that is
        not open here, and they are others than the run held out."""
        objective, adapter = preference.of(opened.recipe.train), opened.recipe.lora.adapter
        if not isinstance(objective, preference.Preference):
            return None
        values: Sequence[Sequence[float]] = [()] * len(batches.examples)
        if objective.asks.referenced and adapter is None:
            with opened.using(base=True):
                values = _rows(opened, preference.LogLikelihoods(objective.asks), batches).tolist()
        elif objective.asks.referenced:
            values = read_json(RunFolder(opened.run).reference).get("eval") or []
        if len(values) != len(batches.examples):
            raise DataError(
                f"the reference is {adapter}, and what it gives is known of the run's own held-out rows alone.",
                fix="halfbyte eval RUN, without --data and --limit",
            )
        rows = [replace(e, reference=tuple(v)) for e, v in zip(batches.examples, values, strict=True)]
        return cls(opened, objective, replace(batches, examples=rows))

    @property
    def names(self) -> list[tuple[str, bool]]:
        """Each score's name, and whether its values are 0 and 1; a tie counts half."""
        return [(name, False) for name in self.objective.sum_names[2:]]

    def side(self, answers: Sequence[sheet.Answer]) -> sheet.Side:
        """The rows' losses and figures of the model as it is now, beside the scores of its answers."""
        rows = _rows(self.opened, self.objective, self.batches)
        figures = [dict(zip(self.objective.sum_names[2:], row[2:], strict=True)) for row in rows.tolist()]
        answers = answers or [sheet.Answer("", {})] * len(rows)
        scored = [replace(a, scores={**a.scores, **more}) for a, more in zip(answers, figures, strict=True)]
        return sheet.Side(tuple(rows[:, 0].tolist()), (1,) * len(rows), tuple(scored))


def _rows(opened: Opened, objective: preference.Preference, batches: collate.Batches) -> NDArray[np.float64]:
    """The sums of each row: (rows, names)."""
    texts = objectives.evaluate(objective, opened.model, replace(batches, lay_out=objective.collate))
    rows = np.zeros((len(batches.examples), texts.shape[1]))
    np.add.at(rows, batches.text_rows, texts)
    return rows


# (what is being done, how much of it is done, of how much)
Progress = Callable[[str, int, int], None]


def evaluate(
    opened: Opened, options: sheet.EvalOptions | None = None, *, data: Path | None = None,
    progress: Progress = lambda what, done, of: None,
) -> sheet.Sheet:  # fmt: skip
    """Score the adapter, and with `with_base` the base alone, on the same rows. Raises DataError: no rows, rows that
    the model cannot read, or a metric that has nothing to compare with in them."""
    began = time.monotonic()
    options = options or sheet.EvalOptions.of(opened.recipe.eval)
    settings, (encoded, source) = options.settings, rows_to_score(opened, data)
    examples = encoded.examples[: options.limit]
    names = options.names
    if names is None:
        answers = opened.recipe.train.method == "sft" and any(e.completion for e in examples)
        names = ("exact_match",) if answers else ()
    shares = opened.recipe.data.share_prefixes == "auto"
    scoring = Scoring.of(opened.model, opened.tokenizer, settings, names, examples, shares=shares)
    asking = scoring.asking
    longest = max((len(e.prompt_ids) for e in asking), default=0)
    batches, plan = micro_batches(opened, examples, generated_tokens=longest + settings.max_new_tokens)
    compares = PreferenceScoring.of(opened, batches)
    order = opened.sides(with_base=options.with_base)
    adapter = None if opened.alone else sheet.adapter_of(folder_of(opened.run))
    sides = {}
    for name in order:

        def tell(what: str, done: int, of: int, name: str = name) -> None:
            progress(f"{name}: {what}", done, of)

        with opened.using(base=name == "base"):
            sides[name] = scoring.side(examples, batches, plan, tell, compares)
    text, text_sides = _on_base_text(opened, order, progress)
    asks = options.with_base and not opened.alone and compares is None
    as_came = _source(opened, (examples, text), progress) if asks else ""
    of_source, of_text = (None, None) if isinstance(as_came, str) else as_came
    scored, ratio = [("loss", False), *scoring.names], [] if compares else [("perplexity", False)]
    scored[1:1] = compares.names if compares else []
    scores = tuple(
        sheet.score(name, sides, settings, yes_no=yes_no, sure=options.sure, source=of_source)
        for name, yes_no in scored[:1] + ratio + scored[1:]
    )
    answered = [number for number, e in enumerate(examples) if e.completion or compares]
    for of, rows in _rows_of_sources(encoded, len(examples)).items():
        parts = {side: value.take(rows, answered) for side, value in sides.items()}
        as_source = of_source and of_source.take(rows, ())
        each = [sheet.score(n, parts, settings, yes_no=y, sure=options.sure, source=as_source) for n, y in scored]
        scores += tuple(replace(score, name=f"{of}_{score.name}") for score in each if score.rows)
    scores += (sheet.score(sheet.BASE_TEXT, text_sides, settings, yes_no=False, sure=options.sure, source=of_text),)
    questions = tuple(
        sheet.Question(e.where, opened.tokenizer.decode(e.prompt_ids, skip_special_tokens=True), e.completion)
        for e in asking
    )
    seconds, why = time.monotonic() - began, as_came if isinstance(as_came, str) else ""
    return sheet.Sheet(source, len(examples), seconds, scores, questions, sides, adapter, of_source, why)


def _rows_of_sources(encoded: EncodedRows, count: int) -> dict[str, list[int]]:
    """Of the first `count` rows those of each source that has any."""
    every = encoded.sources.numbers() if encoded.sources is not None else {}
    return {name: some for name, rows in every.items() if (some := rows[rows < count].tolist())}


def _on_base_text(
    opened: Opened, order: Sequence[str], tell: Progress
) -> tuple[Sequence[Example], dict[str, sheet.Side]]:
    """The text of the base's kind, and what each side loses on it: what an adapter makes the base forget."""
    context = context_of(opened.model.config)
    rows = base_text.encode(opened.tokenizer, base_text.LONGEST if context is None else context.tokens)
    text, sides = rows.examples[:], dict[str, sheet.Side]()
    batches, _ = micro_batches(opened, text)
    for name in order:
        with opened.using(base=name == "base"):
            losses = row_losses(opened.model, batches, tell, f"{name}: base text")
        sides[name] = sheet.Side(tuple(losses), tuple(rows.labelled.tolist()), ())
    return text, sides


def _source(
    opened: Opened, every: tuple[Sequence[Example], Sequence[Example]], tell: Progress
) -> tuple[sheet.Side, sheet.Side] | str:
    """The losses of the model as it came, on both; or why there are none of its own."""
    examples, first = [row for rows in every for row in rows], len(every[0])
    recipe, machine = opened.recipe, device.detect()
    checkpoint = find_model(recipe)
    if unquantised.is_the_base(recipe, checkpoint):
        return "the base is the model as it came"
    tell("source: losses", 0, len(examples))
    most = machine.cards[0].free_bytes if machine.on_card else machine.ram_available_bytes
    layout = packing.installed(opened.model)
    sums = unquantised.sums(recipe, checkpoint, CausalLM(), examples, machine=machine, most_bytes=most, layout=layout)
    if isinstance(sums, str):
        return f"the source model was not measured: {sums}"
    tell("source: losses", len(examples), len(examples))
    losses, tokens = tuple(sums[:, 0].tolist()), tuple(sums[:, 1].tolist())
    return sheet.Side(losses[:first], tokens[:first], ()), sheet.Side(losses[first:], tokens[first:], ())


def answer_scores(run: PlannedRun, model: Model, tokens: int) -> Callable[[], dict[str, float]]:
    """What scores the answers to held-out rows in each evaluation of a training, by `eval.metrics`: as many answers at
    once as a micro-batch leaves memory for. Nothing where no metric is asked for. `tokens`: of a micro-batch.
    Raises DataError: a metric that has nothing to compare with in these rows."""
    prepared, plan = run.prepared, run.plan
    settings = prepared.recipe.eval
    if prepared.evaluation is None or not settings.metrics:
        return dict
    examples = prepared.evaluation.examples[: settings.rows]
    longest = max(len(e.prompt_ids) for e in examples) + settings.max_new_tokens
    at_once = sequences_beside(run.job, plan.micro_batch_bytes, longest)
    scoring = Scoring.of(model, prepared.tokenizer, settings, settings.metrics, examples, shares=prepared.shares)
    of, asks = prepared.evaluation.sources, [number for number, e in enumerate(examples) if e.completion]
    of_row = [] if of is None else [of.names[of.of_row[number]] for number in asks]
    of_sources = {f"{name}_": [n for n, source in enumerate(of_row) if source == name] for name in of_row}

    def scores() -> dict[str, float]:
        POOL.give_back()  # what a micro-batch had is for answers now
        usage.trim()
        answers = scoring.answers(at_once, tokens, lambda what, done, of: None)
        means = dict[str, float]()
        for source, numbers in {"": range(len(answers)), **of_sources}.items():
            for name, _ in scoring.names:
                values = intervals.RowSums.mean([answers[number].scores.get(name) for number in numbers])
                means |= {source + name: values.value} if len(values.numerators) or not source else {}
        return means

    return scores


def rows_to_score(opened: Opened, data: Path | None) -> tuple[EncodedRows, str]:
    """The rows to score, and what they are called."""
    recipe = opened.recipe
    names = target.held_out(recipe, opened.run, data)
    if names is None:
        source = str(target.rows_kept(opened.run))
        encoded = split.load(target.rows_kept(opened.run))
    else:
        source = ", ".join(map(str, names)) if isinstance(names, tuple | list) else str(names)
        encoded = encode.encode(names, opened.tokenizer, recipe.data, cores=device.cores())
        encoded = split.told_apart(encoded, names, recipe.train.order_seed)
    encoded.tally.check_length(recipe.data)
    if recipe.data.packing == "stream":
        encoded = blocks.stream(encoded, recipe.data.max_length)
    if not len(encoded.examples):
        raise DataError(f"{source} has no rows to score.")
    return encoded, source


@dataclass(frozen=True)
class Scoring:
    """Metrics with the model that is scored, and the rows that ask for an answer. `chooses`: the choice by likelihood
    is among the metrics. `shares`: choices may share their prompts."""

    model: Model
    tokenizer: Tokenizer
    settings: Eval
    metrics: Sequence[metrics.Metric]
    chooses: bool
    asking: Sequence[Example]
    shares: bool

    @classmethod
    def of(
        cls, model: Model, tokenizer: Tokenizer, settings: Eval, names: Sequence[str], examples: Sequence[Example],
        *, shares: bool,
    ) -> Scoring:  # fmt: skip
        """By the metrics of these names; a DataError where one has nothing to compare with in the rows."""
        asking = [e for e in examples if e.completion]  # a plain text asks nothing
        expected = [e.completion for e in asking]
        return cls(model, tokenizer, settings, metrics.of(settings, names, expected), "choice" in names, asking, shares)

    @property
    def names(self) -> list[tuple[str, bool]]:
        """Each score's name, and whether its values are 0 and 1."""
        names = [(name, m.yes_no or name != m.name) for m in self.metrics for name in m.names]
        return names + [("choice", True)] * self.chooses

    def side(
        self, examples: Sequence[Example], batches: collate.Batches, plan: InferencePlan, tell: Progress,
        compares: PreferenceScoring | None = None,
    ) -> sheet.Side:  # fmt: skip
        """Losses of all rows, and answers with their scores of those that ask; of rows that say which answer is better
        also what the model makes of that."""
        tokens = [e.label_weight for e in examples]
        read: dict[int, float] = {}  # where every row is answered, one forward is enough
        at_once, limit = plan.sequences, plan.max_tokens_per_micro_batch
        reads = len(self.asking) == len(examples) and compares is None
        answers = self.answers(at_once, limit, tell, read if reads else None)
        if compares is not None:
            return compares.side(answers if self.metrics else ())
        losses = [read[i] for i in range(len(examples))] if read else row_losses(self.model, batches, tell)
        return sheet.Side(tuple(losses), tuple(tokens), tuple(answers))

    def answers(
        self, at_once: int, tokens: int, tell: Progress, losses: dict[int, float] | None = None
    ) -> list[sheet.Answer]:
        """What the model writes for each row, and its scores; `losses` gets those of the rows where it can be had."""
        texts, chosen = [""] * len(self.asking), list[str]()
        context, limit = context_of(self.model.config), self.settings.max_new_tokens
        if self.metrics:
            texts = batch.answers(
                self.model,
                self.tokenizer,
                [e.prompt_ids for e in self.asking],
                [limit if context is None else context.fitting(len(e.prompt_ids), limit) for e in self.asking],
                at_once=at_once,
                tokens_at_once=tokens,
                rows=self.asking if losses is not None else (),
                losses=losses,
                progress=lambda done, of: tell("answers", done, of),
            )
        if self.chooses:
            chosen = choices.choose(self.model, self.tokenizer, self.asking, self.settings, tell, shares=self.shares)
        answers = []
        for number, (example, text) in enumerate(zip(self.asking, texts, strict=True)):
            scores: metrics.Scores = {"choice": float(chosen[number] == example.completion)} if chosen else {}
            for metric in self.metrics:
                scores |= metric.score(example.completion, text)
            answers.append(sheet.Answer(text, scores, chosen[number] if chosen else None))
        return answers


def row_losses(model: Model, batches: collate.Batches, tell: Progress, what: str = "losses") -> list[float]:
    """Summed loss of the labelled tokens of each row, in the rows' order; eval mode, which is put back."""
    losses, done = [0.0] * len(batches.examples), 0
    with evaluating(model):
        for rows in batches.micro_batches:
            each = iter(loss.text_losses(model, batches.of(rows)))
            for row in rows:
                losses[row] = sum(next(each) for _ in batches.examples[row].pieces)
            done += len(rows)
            tell(what, done, len(losses))
    return losses


def micro_batches(
    opened: Opened, examples: Sequence[Example], *, generated_tokens: int = 1
) -> tuple[collate.Batches, InferencePlan]:
    """Rows in micro-batches as planned for them; the base stays where it is. `generated_tokens`: of a sequence: its
    prompt and what is written. Raises DataError: a row is longer than what the model reads."""
    lengths, texts = [len(e.input_ids) for e in examples], [max(e.pieces) for e in examples]
    labelled = [e.labelled for e in examples]
    context = context_of(opened.model.config)
    if context is not None and max(texts) > context.tokens:
        longest = examples[texts.index(max(texts))]
        reads = f"the model reads {context.tokens:,} ({context.why})"
        raise DataError(f"{longest.where} has {max(texts):,} tokens; {reads}.", fix="shorter rows")
    plan = plan_inference(
        replace(opened.job, rows=Rows(lengths, labelled, lengths)),
        opened.machine,
        opened.trained,
        placement=opened.plan.placement,
        generated_tokens=generated_tokens,
    )
    max_rows = opened.recipe.train.per_device_eval_batch_size if opened.job.packed else 1
    asked = opened.job.packed and opened.recipe.data.share_prefixes == "auto"
    shares = asked and sharing.shares(opened.model, examples, opened.memory)
    return collate.Batches.of_rows(examples, plan.max_tokens_per_micro_batch, max_rows, shares=shares), plan

"""What a recipe names, before a weight is loaded: the checkpoint, its tokenizer, every row as tokens, and the gates.

Why: a missing file, a bad row or wrong labels must be reported in seconds, not after the base is loaded.
Cost: tokenising, about 3,000 rows of 200 tokens a second a core; once, then their pages.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Self

import numpy as np

from halfbyte.base.config import check_task, open_config, open_tokenizer
from halfbyte.data import blocks, gates, prefixes, split
from halfbyte.data.encoding import chatml, encode
from halfbyte.data.encoding.encoder import EncodedRows
from halfbyte.data.encoding.examples import Example, Examples
from halfbyte.data.mixture import Mixture
from halfbyte.data.reading import read
from halfbyte.data.streaming import Flow
from halfbyte.errors import DataError, HalfbyteError
from halfbyte.models.context import context_of
from halfbyte.models.sources.checkpoint import Checkpoint
from halfbyte.models.sources.lookup import find_model
from halfbyte.models.tensors import is_embedding
from halfbyte.objectives import preference
from halfbyte.objectives.labels import Labels
from halfbyte.objectives.objective import Objective
from halfbyte.objectives.vectors import TextVectors
from halfbyte.recipe.schema import Recipe
from halfbyte.recipe.task import CAUSAL_LM, EMBED
from halfbyte.scoring import metrics
from halfbyte.system import device
from halfbyte.training import preflight
from halfbyte.types import Batch, Config, Document, Tokenizer

COLLATE_TREE = "collate_tree"  # of an objective that counts a label as often as rows share it


@dataclass(frozen=True)
class Prepared:
    recipe: Recipe
    objective: Objective
    checkpoint: Checkpoint
    config: Config
    tokenizer: Tokenizer
    train: EncodedRows
    evaluation: EncodedRows | None
    findings: tuple[gates.Finding, ...]
    chatml: "chatml.ChatmlMarks | None" = None
    """Where the model has no chat template of its own; then `recipe` trains the rows of its new tokens."""
    held_out: Examples | None = None  # the rows (texts, not blocks of them) that were taken out of the training rows
    mixture: Mixture | None = None  # how the sources of `data.train` are mixed; None where they are not
    shares: bool = False  # whether rows share their beginnings (`data/prefixes.py`), as far as is known
    flow: Flow | None = None  # where rows are read while training goes on; `train` is then the first of its windows

    @property
    def epoch_rows(self) -> int:
        return len(self.train.examples) if self.mixture is None else self.mixture.epoch_rows

    def ids_of(self, rows: EncodedRows) -> prefixes.IdsOf | None:
        """The tokens of a row, where rows share their beginnings."""
        return rows.examples.ids if self.shares and rows.shared is None else None

    @property
    def apart(self) -> Self:
        """The same where rows and texts share nothing."""
        held_out = None if self.evaluation is None else replace(self.evaluation, shared=None)
        return replace(self, shares=False, train=replace(self.train, shared=None), evaluation=held_out)

    @property
    def lay_out(self) -> Callable[[Sequence[Example]], Batch]:
        """A micro-batch of some rows."""
        return getattr(self.objective, COLLATE_TREE) if self.shares else self.objective.collate


def prepare(recipe: Recipe, objective: Objective | None = None) -> Prepared:
    """Find the model, read its tokenizer, turn every row into tokens and labels, and let the gates judge them. A
    HalfbyteError tells of no model, no rows or bad rows, a DataError of all that the gates refuse."""
    prepared = look(recipe, objective)
    for rows in (prepared.train, prepared.evaluation):
        if rows is not None:
            rows.tally.check_length(recipe.data)
    gates.refuse(prepared.findings)
    return prepared


def look(recipe: Recipe, objective: Objective | None = None) -> Prepared:
    """As `prepare`, and what the gates refuse is only among the findings."""
    preflight.check_rows(recipe)
    checkpoint = find_model(recipe)
    config = open_config(checkpoint.path, trust_remote_code=recipe.trust_remote_code)
    check_task(config, recipe.task)
    if recipe.task == EMBED:
        recipe = recipe.model_copy(update={"vectors": recipe.vectors.of_folder(checkpoint.path)})
    tokenizer = open_tokenizer(checkpoint, trust_remote_code=recipe.trust_remote_code)
    data, cores = recipe.data, device.cores()
    text, settled = config.get_text_config(), None
    rows = text.vocab_size
    if chatml.is_needed(data.train, tokenizer, data):
        tied = bool(getattr(text, "tie_word_embeddings", False))
        settled = chatml.install(tokenizer, data, embedding_rows=rows, tied=tied)
        recipe = with_trained(recipe, settled.new_tokens)
    flow = Flow(data.train, tokenizer, data, recipe.train.order_seed) if data.streaming else None
    every = encode.encode(data.train, tokenizer, data, cores=cores) if flow is None else flow.first()
    if flow is None:
        every = split.told_apart(every, data.train, recipe.train.order_seed)
    train, evaluation, held_out = _held_out(recipe, every, tokenizer)
    objective = objective or _objective(recipe, config, every, evaluation)
    if recipe.train.method != "sft" and train.label_weights is not train.labelled:
        raise DataError(f"rows give messages or parts weights, which train.method {recipe.train.method} does not read.")
    of = train.sources
    mixture = None if of is None else Mixture.of(data.sources, of.of_row, recipe.train.rows_per_step)
    trained = frozenset(recipe.lora.trainable_token_indices or (settled.new_tokens if settled else ()))
    findings = gates.check(
        train, evaluation, tokenizer, recipe.data, embedding_rows=rows, trained=trained, context=context_of(config)
    )
    findings += _metrics(recipe, evaluation)
    if data.packing == "stream":
        train = blocks.stream(train, data.max_length)
        evaluation = blocks.stream(evaluation, data.max_length) if evaluation is not None else None
    shares = not why_not_shared(recipe, objective)
    if shares and train.examples.seconds() is not None:
        train, evaluation = _together(train), None if evaluation is None else _together(evaluation)
    return Prepared(
        recipe, objective, checkpoint, config, tokenizer, train, evaluation, findings, settled, held_out, mixture,
        shares, flow,
    )  # fmt: skip


def _together(rows: EncodedRows) -> EncodedRows:
    """Rows of several texts that share their beginnings."""
    return replace(rows, shared=np.array([prefixes.worth(n) for n in rows.examples.alike().tolist()], np.int64))


def _objective(recipe: Recipe, config: Config, train: EncodedRows, evaluation: EncodedRows | None) -> Objective:
    """By the task; a DataError where rows lack what it reads. `train`: those that are held out of them included."""
    if recipe.task == CAUSAL_LM:
        return preference.of(recipe.train)
    if recipe.task == EMBED:
        vectors = TextVectors(recipe.vectors)
        vectors.check_width(config.get_text_config().hidden_size)
        vectors.check_teaches(train)
        return vectors.check(train, evaluation)
    return Labels.of(recipe, train, evaluation)


def why_not_shared(recipe: Recipe, objective: Objective) -> str:
    """Why rows do not share their beginnings, by what is asked for; empty if they may."""
    if recipe.data.share_prefixes == "off":
        return "as the recipe says"
    if recipe.data.streaming:
        return "rows are not known ahead (data.streaming)"
    if recipe.data.packing != "rows":
        return "a block of several texts is one row (data.packing: stream)"
    # a subclass with a batch or a loss of its own may count a label once
    members = (COLLATE_TREE, "collate", "loss", "text_sums")
    owners = {next((c for c in type(objective).__mro__ if name in vars(c)), None) for name in members}
    return "" if len(owners) == 1 else f"the objective {objective.name} counts each label once"


def _held_out(
    recipe: Recipe, train: EncodedRows, tokenizer: Tokenizer
) -> tuple[EncodedRows, EncodedRows | None, Examples | None]:
    """The rows that train, those that are held out, and these again where they were taken out of the training rows."""
    data, asks = recipe.data, recipe.train
    if data.eval_names is not None:
        other = encode.encode(data.eval_names, tokenizer, data, cores=device.cores())
        return train, split.told_apart(other, data.eval_names, asks.order_seed), None
    stops = asks.early_stopping_patience is not None
    wanted = True if stops or asks.eval_on_start or asks.eval_strategy in ("steps", "epoch") else None
    wanted = False if asks.eval_strategy == "no" else wanted
    wanted = False if data.streaming else wanted
    train, evaluation = split.split(train, data, asks.order_seed, wanted=wanted)
    return train, evaluation, evaluation.examples if evaluation is not None else None


def _metrics(recipe: Recipe, evaluation: EncodedRows | None) -> tuple[gates.Finding, ...]:
    """Whether the held-out rows have what `eval.metrics` compares."""
    settings = recipe.eval
    if not settings.metrics:
        return ()
    listed = ", ".join(settings.metrics)
    if evaluation is None:
        found = f"eval.metrics asks for {listed}, and no rows are held out"
        return (gates.Finding("metrics", "warning", found, "data.eval: 10%, or a file of other rows"),)
    expected = [e.completion for e in evaluation.examples[: settings.rows] if e.completion]
    try:
        metrics.of(settings, settings.metrics, expected)
    except HalfbyteError as error:
        return (gates.Finding("metrics", "refused", error.message.rstrip("."), error.fix),)
    return (gates.Finding("metrics", "ok", f"{len(expected):,} held-out rows have what {listed} compares", None),)


def with_trained(recipe: Recipe, tokens: tuple[int, ...]) -> Recipe:
    """A recipe that also trains the embedding's rows of these tokens, where it does not train all of it."""
    if not tokens or any(is_embedding(name) for name in recipe.lora.modules_to_save or ()):
        return recipe
    every = tuple(sorted({*(recipe.lora.trainable_token_indices or ()), *tokens}))
    return recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"trainable_token_indices": every})})


def data_note(prepared: Prepared) -> str:
    stats, texts = prepared.train.stats, prepared.train.texts
    rows = f"{stats.rows:,} rows" if texts is None else f"{texts:,} texts in {stats.rows:,} blocks"
    held_out = f"; {prepared.evaluation.stats.rows:,} rows held out" if prepared.evaluation else ""
    if prepared.flow is not None:
        rows = f"the first {rows}, of more that are read while training goes on"
    mixed = f"; {prepared.mixture.note(prepared.recipe.train.order_seed)}" if prepared.mixture else ""
    if (train := prepared.recipe.train).draws:
        answers = min(train.rows_per_step, stats.rows) * (train.num_generations or 1)
        written, trained = (f"{answers * n / stats.rows:,.0f}" for n in (stats.labelled_tokens, stats.tokens))
        of = f"answers, {train.num_generations} to a prompt, of {written} tokens if they are as the expected ones"
        held_out += f"; a step writes {answers} {of}, and trains {trained} with their prompts"
    return (
        f"{rows}, {stats.tokens:,} tokens ({stats.min_length} to {stats.max_length} a row), "
        f"{stats.labelled_share:.0%} of them trained{held_out}{mixed}"
    )


def data_report(prepared: Prepared) -> Document:
    """The rows and what the gates found, as `report.json` has them."""

    def counts(encoded: EncodedRows) -> Document:
        stats, tally = encoded.stats, encoded.tally
        used = stats.rows if encoded.texts is None else encoded.texts
        return {
            "rows": tally.seen, "used": used, "skipped": tally.skipped.count, "truncated": tally.truncated,
            "tokens": stats.tokens, "labelled_tokens": stats.labelled_tokens, "labelled_share": stats.labelled_share,
            "longest": stats.max_length, "mean_length": stats.mean_length,
            **({} if encoded.texts is None else {"blocks": stats.rows}),
        }  # fmt: skip

    return {
        "train": counts(prepared.train),
        "eval": None if prepared.evaluation is None else counts(prepared.evaluation),
        "gates": [asdict(finding) for finding in prepared.findings],
    }


def fingerprints(prepared: Prepared) -> Document:
    """How many rows `train` and `eval` have, and a hash of their tokens and weights in their order."""

    def of(encoded: EncodedRows | None) -> Document | None:
        if encoded is None:
            return None
        columns = [encoded.examples.digests(), encoded.lengths, encoded.labelled]
        if prepared.recipe.task != CAUSAL_LM:  # what a text is labelled with is none of its tokens
            columns.append(np.array([text for text, _ in encoded.examples.completions()]))
        weights = prepared.objective.weights(encoded)
        digest = hashlib.sha256()
        for column in columns if weights is encoded.labelled else [*columns, weights]:
            digest.update(column.tobytes())
        if prepared.mixture is not None and encoded is prepared.train:
            digest.update(prepared.mixture.content)
        if prepared.flow is not None and encoded is prepared.train:
            digest.update(prepared.flow.content)
        return {"rows": len(encoded.examples), "digest": digest.hexdigest()}

    return {"train": of(prepared.train), "eval": of(prepared.evaluation)}


def notices(prepared: Prepared) -> list[str]:
    """What the user should know of the rows, beside the gates."""
    first = [prepared.chatml.notice] if prepared.chatml else []
    if prepared.held_out is not None:
        count, asked = len(prepared.held_out), prepared.recipe.data.eval
        off = "; data.eval: none trains on them too" if asked == "auto" else ""
        total, why = prepared.train.tally.kept, ""
        if prepared.mixture is not None:
            total, why = len(prepared.train.examples) + count, " of each source"
            if asked != "auto" and not str(asked).endswith("%"):
                why = " over all sources, at least one of each, rows with the same tokens together"
        elif count != prepared.recipe.data.held_out_of(total):
            again = total - len(np.unique(Examples(prepared.held_out.batches).digests()))
            why = f"; of rows with the same tokens all are or none, and {again:,} rows are another one again"
        first.append(f"{count:,} of {total:,} rows are held out (data.eval: {asked}{why}){off}")
    first += read.unread(prepared.recipe.data.train, prepared.recipe.data)
    if isinstance(prepared.objective, TextVectors):
        first += prepared.objective.unread(prepared.train)
    return first + [m for rows in (prepared.train, prepared.evaluation) if rows for m in rows.tally.messages()]

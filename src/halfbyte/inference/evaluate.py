"""Score a model on held-out rows: loss and perplexity of the labelled tokens, and exact match of what it writes.

Why: a loss curve alone does not say whether the adapter does the task.
Cost: one forward over the rows, and one generation each.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from halfbyte.data import blocks, collate, pack, split
from halfbyte.data.encoding import encode
from halfbyte.data.encoding.examples import IGNORED, Example
from halfbyte.errors import DataError
from halfbyte.inference import target
from halfbyte.inference.generate import Sampling, generate
from halfbyte.inference.load import Opened
from halfbyte.layers.loss import mean_loss
from halfbyte.models.context import Context, context_of
from halfbyte.plan import InferencePlan, Rows, plan_inference
from halfbyte.runs.folder import RunFolder
from halfbyte.system import device
from halfbyte.types import Document


@dataclass(frozen=True)
class Sample:
    where: str
    prompt: str
    reference: str
    output: str

    @property
    def exact(self) -> bool:
        return self.output.strip() == self.reference.strip()


@dataclass(frozen=True)
class Score:
    """`exact_match` is the share of `samples`, the rows that ask for an answer, equal to their reference up to
    surrounding white space; None where no row asks, as in plain text."""

    loss: float
    perplexity: float
    labelled_tokens: int
    rows: int
    exact: int
    samples: tuple[Sample, ...]

    @property
    def exact_match(self) -> float | None:
        return self.exact / len(self.samples) if self.samples else None

    def to_json(self) -> Document:
        return {**asdict(self), "exact_match": self.exact_match}


def evaluate(
    opened: Opened,
    *,
    data: Path | None = None,
    limit: int | None = None,
    with_base: bool = False,
    max_new_tokens: int = 256,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Score]:
    """Score the adapter, and with `with_base` the base alone, on the same rows. Keys: `base`, `adapter`."""
    recipe = opened.recipe
    names = target.held_out(recipe, opened.run, data)
    if names is None:
        encoded = split.load(RunFolder(opened.run).held_out)
    else:
        encoded = encode.encode(names, opened.tokenizer, recipe.data, cores=device.cores())
    encoded.tally.check_length(recipe.data)
    if recipe.data.packing == "stream":
        encoded = blocks.stream(encoded, recipe.data.max_length)
    examples = encoded.examples[:limit]
    asking = [e for e in examples if e.completion]  # a plain text asks nothing
    context = context_of(opened.model.config)
    written = max((len(e.prompt_ids) for e in asking), default=0) + max_new_tokens
    batches, plan = micro_batches(opened, examples, generated_tokens=written)
    scores = {}
    for name in ("base",) if opened.alone else ("base", "adapter") if with_base else ("adapter",):
        with opened.using(base=name == "base"):
            loss = mean_loss(opened.model, batches)
            outputs = _written(opened, asking, context, max_new_tokens, plan.sequences, progress)
        samples = tuple(
            Sample(e.where, opened.tokenizer.decode(e.prompt_ids, skip_special_tokens=True), e.completion, output)
            for e, output in zip(asking, outputs, strict=True)
        )
        exact, tokens = sum(s.exact for s in samples), int(loss["labelled_tokens"])
        scores[name] = Score(loss["loss"], loss["perplexity"], tokens, len(examples), exact, samples)
    return scores


def micro_batches(
    opened: Opened, examples: Sequence[Example], *, generated_tokens: int = 1
) -> tuple[collate.Batches, InferencePlan]:
    """Rows in micro-batches as planned for them; the base stays where it is.

    Args:
        generated_tokens: of a sequence: its prompt and what is written.

    Raises:
        DataError: a row is longer than what the model reads.
    """
    lengths = [len(e.input_ids) for e in examples]
    labelled = [sum(label != IGNORED for label in e.labels) for e in examples]
    context = context_of(opened.model.config)
    if context is not None and max(lengths) > context.tokens:
        longest = max(examples, key=lambda e: len(e.input_ids))
        reads = f"the model reads {context.tokens:,} ({context.why})"
        raise DataError(
            f"{longest.where} has {len(longest.input_ids):,} tokens; {reads}.",
            fix="shorter rows",
        )
    plan = plan_inference(
        replace(opened.job, rows=Rows(lengths, labelled, lengths)),
        opened.machine,
        opened.trained,
        placement=opened.plan.placement,
        generated_tokens=generated_tokens,
    )
    most = opened.recipe.train.per_device_eval_batch_size if opened.job.packed else 1
    return collate.Batches(examples, pack.eval_micro_batches(lengths, plan.max_tokens_per_micro_batch, most)), plan


def _written(
    opened: Opened,
    examples: Sequence[Example],
    context: Context | None,
    max_new_tokens: int,
    at_once: int,
    progress: Callable[[int, int], None],
) -> list[str]:
    """What the model writes for each row, as far as it reads; from short to long, so that a batch pads little."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt_ids))
    outputs: dict[int, str] = {}
    for start in range(0, len(order), at_once):
        chunk = order[start : start + at_once]
        prompts = [examples[i].prompt_ids for i in chunk]
        room = max_new_tokens if context is None else max(1, context.tokens - max(map(len, prompts)))
        texts = generate(opened.model, opened.tokenizer, prompts, Sampling(min(max_new_tokens, room)))
        outputs.update(zip(chunk, texts, strict=True))
        progress(len(outputs), len(order))
    return [outputs[i] for i in range(len(examples))]

"""Score a model on held-out rows: loss and perplexity of the labelled tokens, and exact match of what it writes.

Why: a loss curve alone does not say whether the adapter does the task; base and adapter are scored by one function.
Cost: one forward over the rows, and one generation each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from halfbyte.inference.generate import Sampling, generate
from halfbyte.layers.loss import mean_loss

if TYPE_CHECKING:
    from halfbyte.data.encoding.examples import Example
    from halfbyte.types import Batch, Document, Model, Tokenizer


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
    """`exact_match` is the share of generated rows equal to their reference up to surrounding white space."""

    loss: float
    perplexity: float
    labelled_tokens: int
    rows: int
    exact: int
    samples: tuple[Sample, ...]

    @property
    def exact_match(self) -> float:
        return self.exact / self.rows if self.rows else 0.0

    def to_json(self) -> Document:
        return {**asdict(self), "exact_match": self.exact_match}


def score(
    model: Model,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    batches: Sequence[Batch],
    *,
    sampling: Sampling,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Evaluate on `examples` (for generation) and their packed `batches` (for the loss).

    Rows are generated from short to long, so that a batch pads little; samples come back in the rows' order.
    """
    loss = mean_loss(model, batches)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt_ids))
    outputs: dict[int, str] = {}
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        texts = generate(model, tokenizer, [examples[i].prompt_ids for i in chunk], sampling)
        outputs.update(zip(chunk, texts, strict=True))
        if progress is not None:
            progress(len(outputs), len(order))
    samples = tuple(
        Sample(
            where=example.where,
            prompt=tokenizer.decode(example.prompt_ids, skip_special_tokens=True),
            reference=example.completion,
            output=outputs[i],
        )
        for i, example in enumerate(examples)
    )
    return Score(
        loss=loss["loss"],
        perplexity=loss["perplexity"],
        labelled_tokens=int(loss["labelled_tokens"]),
        rows=len(samples),
        exact=sum(s.exact for s in samples),
        samples=samples,
    )

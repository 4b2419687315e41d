"""Choice by likelihood: which of a row's choices the model finds the most likely answer.

Why: a small model that writes around the answer still knows which one it is; and a label needs no writing.
What: each choice takes the place of the answer, with the token that ends the turn, as training has it; the sum of its
tokens' log-likelihoods counts.
Source: lm-evaluation-harness calls it `acc` of a multiple-choice task; there the turn's end does not count.
Cost: a forward of the row for each choice, of its prompt once where that is proven.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from halfbyte.data import collate
from halfbyte.data.encoding.examples import IGNORED, Example
from halfbyte.errors import DataError
from halfbyte.inference.generate import stop_ids
from halfbyte.layers import loss, packing
from halfbyte.models.structure import evaluating
from halfbyte.proofs import sharing
from halfbyte.recipe.evaluation import Eval
from halfbyte.scoring.metrics import choices
from halfbyte.types import Model, Tokenizer

# Tokens of a row's choices in one forward, but for a longer one; less than a training's micro-batch takes. Not the
# plan's, which differs between training and evaluation: in 16 bits what lies beside a choice tips near ties.
TOGETHER = 512


def choose(
    model: Model, tokenizer: Tokenizer, asking: Sequence[Example], settings: Eval,
    tell: Callable[[str, int, int], None], *, shares: bool = False,
) -> list[str]:  # fmt: skip
    """For each row the choice that is the most likely answer. `shares`: its prompt may be computed once for all."""
    named = choices(settings, [e.completion for e in asking])
    every = losses(model, tokenizer, asking, named, tell, shares=shares)
    return [named[min(range(len(named)), key=row.__getitem__)] for row in every]


def losses(
    model: Model, tokenizer: Tokenizer, asking: Sequence[Example], named: Sequence[str],
    tell: Callable[[str, int, int], None], *, shares: bool = False,
) -> list[list[float]]:  # fmt: skip
    """For each row what each of the choices loses as its answer. Raises DataError: one cannot take its place."""
    stops = set(stop_ids(model, tokenizer))
    ids = {name: tokenizer(name, add_special_tokens=False)["input_ids"] for name in named}
    every = list[list[float]]()
    packed = packing.installed(model) != "single"
    for done, example in enumerate(asking, 1):
        rows = [with_answer(example, ids[name], stops) for name in named]
        expected = rows[named.index(example.completion)]
        if expected.input_ids != example.input_ids[: len(expected.input_ids)]:
            raise DataError(
                f"{example.where}: the metric choice cannot put another answer in the place of {example.completion!r}, "
                "as this tokenizer reads it in one piece with what stands before it.",
                fix="--metric exact_match",
            )
        once = shares and packed and sharing.shares(model, rows)
        batches = collate.Batches.of_rows(rows, TOGETHER, len(rows) if packed else 1, shares=once)
        of_row = dict[int, float]()
        with evaluating(model):
            for together in batches.micro_batches:
                of_row |= zip(together, loss.text_losses(model, batches.of(together)), strict=True)
        every.append([of_row[number] for number in range(len(rows))])
        tell("choices", done, len(asking))
    return every


def with_answer(example: Example, ids: Sequence[int], stops: set[int]) -> Example:
    """The row with another answer, which alone is labelled, with the token that ends the turn where the row has one."""
    labelled = [label for label in example.labels if label != IGNORED]
    answer = (*ids, *(labelled[-1:] if labelled and labelled[-1] in stops else []))
    prompt = example.prompt_ids
    return replace(example, input_ids=(*prompt, *answer), labels=(*[IGNORED] * len(prompt), *answer), weights=())

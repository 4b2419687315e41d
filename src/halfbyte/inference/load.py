"""A finished run opened again: its adapter on its base, ready to answer and to be scored beside the base alone.

Cost: loading the base once; the base alone is the same model with its adapter switched off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte import plan
from halfbyte.adapters import lora
from halfbyte.adapters.assembly import assembled
from halfbyte.base import load, stream
from halfbyte.base.store import supply
from halfbyte.data import blocks, collate, pack
from halfbyte.data.encoding import chat_template, encode
from halfbyte.errors import DataError
from halfbyte.inference import evaluate as scoring
from halfbyte.inference.generate import Sampling
from halfbyte.layers import packing
from halfbyte.models.sources.lookup import find_model
from halfbyte.recipe.file import load_recipe
from halfbyte.recipe.schema import Recipe
from halfbyte.runs.folder import RunFolder
from halfbyte.system import device, threads

if TYPE_CHECKING:
    from halfbyte.types import Model, Tokenizer


@dataclass(frozen=True)
class Opened:
    """A trained adapter on its base, ready to answer."""

    run: Path
    recipe: Recipe
    model: Model
    tokenizer: Tokenizer
    own_biases: lora.Saved

    def adapted(self) -> AbstractContextManager[None]:
        return nullcontext()

    @contextmanager
    def base_only(self) -> Iterator[None]:
        with lora.base_alone(self.model, self.own_biases):
            yield


def open_run(path: Path, tell: supply.Tell | None = None) -> Opened:
    """The adapter of a finished run on its base, whose store is built if it is not there any more."""
    run = RunFolder.open(path)
    # where the run was trained an integration was installed that need not be here
    recipe = load_recipe(run.recipe, ["train.report_to=none"]).recipe
    checkpoint, machine = find_model(recipe), device.detect()
    threads.settle(machine.cores)
    base = load.open_base(checkpoint, recipe.quant, machine, trust_remote_code=recipe.trust_remote_code, tell=tell)
    tokenizer = base.tokenizer
    if (run.adapter / "tokenizer_config.json").is_file():  # ChatML, with tokens that the base's own does not have
        tokenizer = load.open_tokenizer(replace(checkpoint, path=run.adapter), base.model)
    elif recipe.data.chat_template is not None:
        tokenizer.chat_template = chat_template.chat_template(tokenizer, recipe.data)

    def place(model: Model) -> stream.Placed:
        return stream.place(model, stream.choose(recipe.quant.placement, model, machine.ram_available_bytes)[0])

    made = assembled(base, recipe, adapter=run.adapter, place=place)
    return Opened(path, recipe, made.model, tokenizer, made.own_biases)


def evaluate(
    opened: Opened,
    *,
    data: Path | None = None,
    limit: int | None = None,
    with_base: bool = False,
    max_new_tokens: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, scoring.Score]:
    """Score the adapter, and with `with_base` the base alone, on the same rows. Keys: `base`, `adapter`."""
    path = data or opened.recipe.data.eval
    if path is None:
        raise DataError(
            "the run has no held-out rows (data.eval).", fix=f"halfbyte eval {opened.run} --data ROWS.jsonl"
        )
    encoded = encode.encode(path, opened.tokenizer, opened.recipe.data, cores=device.cores())
    if opened.recipe.data.packing == "stream":
        encoded = blocks.stream(encoded, opened.recipe.data.max_length)
    examples = encoded.examples[:limit]
    per_micro_batch = 1 if packing.installed(opened.model) == "single" else None
    micro_batches = pack.eval_micro_batches(
        [len(e.input_ids) for e in examples], plan.MAX_TOKENS_PER_MICRO_BATCH, per_micro_batch
    )
    batches = collate.Batches(examples, micro_batches)
    sampling = Sampling(max_new_tokens=max_new_tokens)
    scores: dict[str, scoring.Score] = {}
    for name, mode in [*([("base", opened.base_only)] if with_base else []), ("adapter", opened.adapted)]:
        with mode():
            scores[name] = scoring.score(
                opened.model, opened.tokenizer, examples, batches, sampling=sampling, progress=progress
            )
    return scores

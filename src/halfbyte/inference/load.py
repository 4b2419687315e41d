"""A finished run opened again: its adapter on its base, ready to answer and to be scored beside the base alone.

Cost: loading the base once; the base alone is the same model with its adapter switched off.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.adapters import lora
from halfbyte.adapters.assembly import assembled
from halfbyte.base import load, stream
from halfbyte.base.store import supply
from halfbyte.base.tokenizer import open_tokenizer
from halfbyte.data import blocks, collate, pack
from halfbyte.data.encoding import chat_template, encode
from halfbyte.data.encoding.examples import IGNORED
from halfbyte.errors import DataError
from halfbyte.inference import evaluate as scoring
from halfbyte.inference.generate import Sampling
from halfbyte.models.sources.lookup import find_model
from halfbyte.plan import GENERATED_TOKENS, InferencePlan, Job, Rows, Trained, plan_inference
from halfbyte.recipe.file import load_recipe
from halfbyte.recipe.schema import Recipe
from halfbyte.runs.folder import RunFolder
from halfbyte.system import device, threads

if TYPE_CHECKING:
    from halfbyte.data.encoding.examples import Example
    from halfbyte.types import Model, Tokenizer


@dataclass(frozen=True)
class Opened:
    """A trained adapter on its base, ready to answer."""

    run: Path
    recipe: Recipe
    model: Model
    tokenizer: Tokenizer
    own_biases: lora.Saved
    machine: device.Device
    """As it was before the base was opened."""
    job: Job
    trained: Trained | None
    plan: InferencePlan

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
        tokenizer = open_tokenizer(replace(checkpoint, path=run.adapter), base.model)
    elif recipe.data.chat_template is not None:
        tokenizer.chat_template = chat_template.chat_template(tokenizer, recipe.data)

    trained = Trained.of(json.loads(run.plan.read_text())) if run.plan.is_file() else None
    longest = (trained.max_tokens_per_micro_batch if trained else GENERATED_TOKENS,)
    rows = Rows(longest, evaluated=longest)
    job = Job.of_checkpoint(recipe, checkpoint, base.model, rows, machine)
    chosen = plan_inference(job, machine, trained)

    def place(model: Model) -> stream.Placed:
        return stream.place_as_planned(model, chosen.placement, asked=recipe.quant.placement != "auto")[0]

    made = assembled(base, recipe, adapter=run.adapter, place=place)
    job = replace(job, packed=made.packed.ok)
    return Opened(path, recipe, made.model, tokenizer, made.own_biases, machine, job, trained, chosen)


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
    chosen = planned_for(opened, examples, max_new_tokens)
    most = opened.recipe.train.per_device_eval_batch_size if opened.job.packed else 1
    lengths = [len(e.input_ids) for e in examples]
    batches = collate.Batches(examples, pack.eval_micro_batches(lengths, chosen.max_tokens_per_micro_batch, most))
    sampling = Sampling(max_new_tokens=max_new_tokens)
    scores: dict[str, scoring.Score] = {}
    for name, mode in [*([("base", opened.base_only)] if with_base else []), ("adapter", opened.adapted)]:
        with mode():
            scores[name] = scoring.score(
                opened.model,
                opened.tokenizer,
                examples,
                batches,
                sampling=sampling,
                batch_size=chosen.sequences,
                progress=progress,
            )
    return scores


def planned_for(opened: Opened, examples: Sequence[Example], max_new_tokens: int) -> InferencePlan:
    """The plan of an evaluation of these rows; the base stays where it is."""
    lengths = [len(e.input_ids) for e in examples]
    labelled = [sum(label != IGNORED for label in e.labels) for e in examples]
    longest_prompt = max((len(e.prompt_ids) for e in examples), default=0)
    job = replace(opened.job, rows=Rows(lengths, labelled, lengths))
    return plan_inference(
        job,
        opened.machine,
        opened.trained,
        placement=opened.plan.placement,
        generated_tokens=longest_prompt + max_new_tokens,
    )

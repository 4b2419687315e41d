"""A finished run opened again: its adapter on its base, ready to answer and to be scored beside the base alone.

Cost: loading the base once; the base alone is the same model with its adapter switched off.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from halfbyte.adapters import lora, passport
from halfbyte.adapters.assembly import assemble, memory_of
from halfbyte.base import load, stream
from halfbyte.base.config import check_task, check_vocabulary, open_config, open_tokenizer
from halfbyte.base.store import supply
from halfbyte.data.encoding.chatml import chat_template
from halfbyte.inference import target
from halfbyte.layers import heads
from halfbyte.layers.kernels import cpu
from halfbyte.layers.kernels.cpu import ahead
from halfbyte.models.context import Context, context_of
from halfbyte.models.sources.checkpoint import Checkpoint
from halfbyte.models.sources.lookup import find_model
from halfbyte.objectives.labels import Labels
from halfbyte.plan import GENERATED_TOKENS, InferencePlan, Job, Rows, RunChoices, plan_inference
from halfbyte.plan.timing import compiling
from halfbyte.proofs.memory import Proofs, RememberedProofs
from halfbyte.recipe.schema import Recipe
from halfbyte.recipe.task import CAUSAL_LM, EMBED, TASKS
from halfbyte.runs.folder import read_json
from halfbyte.system import device, threads
from halfbyte.types import Document, Model, Tokenizer


@dataclass(frozen=True)
class Opened:
    """A trained adapter on its base, ready to answer."""

    run: Path  # the folder, or the name of a base
    recipe: Recipe
    model: Model
    tokenizer: Tokenizer
    own_biases: lora.Saved
    machine: device.Device  # as it was before the base was opened
    job: Job
    trained: RunChoices | None
    plan: InferencePlan
    alone: bool = False  # there is no adapter but the base alone
    base: load.Base | None = None
    memory: RememberedProofs | None = None  # of its proofs

    @property
    def store(self) -> Path | None:
        """The folder of the base's store, if it has one."""
        return None if self.base is None else self.base.store

    def sides(self, *, with_base: bool) -> tuple[str, ...]:
        """What is scored: `base`, `adapter`."""
        return ("base",) if self.alone else ("base", "adapter") if with_base else ("adapter",)

    def using(self, *, base: bool) -> AbstractContextManager[None]:
        """The base alone, or with its adapter."""
        return lora.base_alone(self.model, self.own_biases) if base or self.alone else nullcontext()


def open_run(
    path: Path, tell: supply.Tell | None = None, overrides: Sequence[str] = (), *, force: bool = False
) -> Opened:
    """A finished run, an adapter or a base, as `target.find` tells them; a store that is not there any more is built.

    A base alone gets fresh adapters, which are switched off: it then gives the same numbers as beside an adapter.

    Args:
        force: use an adapter also where its passport says that it belongs to another base or tokenizer.

    Raises:
        AdapterError: it belongs to another; names both sides.
    """
    return open_target(target.find(path, overrides, TASKS), tell, force=force)


def open_target(
    subject: target.Target, tell: supply.Tell | None = None,
    check: Callable[[Tokenizer, Context | None], None] = lambda tokenizer, context: None, *,
    beside: Mapping[str, target.Target] = MappingProxyType({}), force: bool = False, lasting: bool = False,
    alone: bool = False, proofs: Proofs = "every",
) -> Opened:  # fmt: skip
    """`open_run` of what has been found already. `check`: may refuse what will be asked, before the base is opened.
    `beside`: more adapters on the same base, by PEFT's names. `lasting`: many answers will be written. `alone`: no two
    texts will share a forward. `proofs`: which of them are made."""
    recipe, run = subject.recipe, subject.run
    checkpoint, machine = find_model(recipe), device.detect()
    if recipe.task == EMBED:
        recipe = recipe.model_copy(update={"vectors": recipe.vectors.of_folder(checkpoint.path)})
    threads.configure(machine.cores)
    tokenizer = tokenizer_of(subject, checkpoint)
    foreign = recipe.trust_remote_code
    config = open_config(checkpoint.path, trust_remote_code=foreign)
    check_task(config, recipe.task)
    check(tokenizer, context_of(config))
    base = load.open_base(checkpoint, recipe.quant, machine, trust_remote_code=foreign, tell=tell)
    check_vocabulary(checkpoint, tokenizer, base.model)
    for one in (subject, *beside.values()):
        words = tokenizer if one is subject else tokenizer_of(one, checkpoint)
        for text in check_belongs(one, base, words, force=force):
            (tell or supply.Tell()).say(text, label="note")
    trained = RunChoices.from_json(read_json(run.plan)) if run is not None else None
    if recipe.task != CAUSAL_LM and subject.adapter is not None:
        head = None if recipe.task == EMBED else Labels.at(subject.adapter)
        names = [spec.name for spec in base.specs]
        heads.attach(base.model, *heads.wanted(head), seed=recipe.train.seed, names=names)
    longest = (trained.evaluation_tokens if trained else GENERATED_TOKENS,)
    rows = Rows(longest, evaluated=longest)
    job = Job.of_checkpoint(recipe, checkpoint, base.model, rows, machine)
    missing = replace(job, integers=False).kernels_to_compile(writes=recipe.task == CAUSAL_LM)
    if missing and cpu.enabled():
        (tell or supply.Tell()).say(compiling(missing), "machine")
        ahead.begin(missing, machine.cores, job.dtype)()
        job = replace(job, uncompiled=())
    chosen = plan_inference(job, machine, trained, lasting=lasting)
    placed, _ = stream.place_as_planned(
        base.model, chosen.placement, asked=recipe.quant.placement not in ("auto", "sharded")
    )
    more = {name: one.adapter for name, one in beside.items() if one.adapter is not None}
    settings: Document = {"used": True, "alone": alone, "placement": str(placed)}
    memory = memory_of(base, recipe, {"adapter": subject.adapter}, "every" if more else proofs, **settings)
    assembly = assemble(
        base, recipe, adapter=subject.adapter, beside=more, alone=alone, memory=memory,
        note=lambda label, text: (tell or supply.Tell()).say(text, label=label) if label == "proofs" else None,
    )  # fmt: skip
    assembly.model.eval().requires_grad_(False)
    job = replace(job, packed=assembly.packed.ok)
    return Opened(
        subject.path, recipe, assembly.model, tokenizer, assembly.own_biases, machine, job, trained, chosen,
        alone=subject.adapter is None, base=base, memory=memory,
    )  # fmt: skip


def check_belongs(subject: target.Target, base: load.Base, tokenizer: Tokenizer, *, force: bool = False) -> list[str]:
    """What is to be told of an adapter on a base, as `passport.check` has it; and its AdapterErrors."""
    if subject.adapter is None:
        return []
    here = passport.belongs_to(base, subject.recipe.quant, tokenizer, chat_template(tokenizer, subject.recipe.data))
    assumed = [subject.assumed] if subject.assumed else []
    return assumed + passport.check(subject.adapter, here, force=force)


def tokenizer_of(subject: target.Target, checkpoint: Checkpoint) -> Tokenizer:
    recipe = subject.recipe
    if subject.adapter is not None and (subject.adapter / "tokenizer_config.json").is_file():
        # ChatML, with tokens that the base's own does not have
        return open_tokenizer(replace(checkpoint, path=subject.adapter), trust_remote_code=recipe.trust_remote_code)
    tokenizer = open_tokenizer(checkpoint, trust_remote_code=recipe.trust_remote_code)
    if recipe.data.chat_template is not None or recipe.data.template_args:
        tokenizer.chat_template = chat_template(tokenizer, recipe.data)
    return tokenizer

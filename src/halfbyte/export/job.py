"""What every export shares: what is asked for, whether the adapter belongs to the base that is here, what the run says
(its witness), which base is merged into, and the folder that appears when it is whole.

Which base: a QLoRA adapter was trained on the 4-bit weights, and has learned to make up for some of what they lost.
Into the 16-bit weights it carries that along, where nothing was lost; into the dequantised ones the model stays the one
that was trained, with what 4 bits have lost. Neither is always better, so `auto` writes both and measures.
Cost: hashing the adapter and reading the base's headers; a child process that opens the run, and one for each proof.
"""

import json
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from halfbyte.adapters import passport
from halfbyte.base import load
from halfbyte.base.config import open_config
from halfbyte.base.store import supply
from halfbyte.data.encoding.chatml import chat_template
from halfbyte.errors import ExportError
from halfbyte.export import folder, hub, inputs
from halfbyte.export.weights import BaseKind, MergedModel, starts_residual
from halfbyte.export.witness import PROMPTS, WITNESS, RunQuestions, ask_run
from halfbyte.inference.load import tokenizer_of
from halfbyte.inference.target import Target
from halfbyte.models import tensors
from halfbyte.models.sources.lookup import find_model
from halfbyte.models.structure import meta_model
from halfbyte.proofs.export import Exported, Proof, ask_program, prove_export
from halfbyte.proofs.programs import LOSSES
from halfbyte.recipe.adapter import read_config
from halfbyte.recipe.adapter_folder import read_passport
from halfbyte.recipe.task import CAUSAL_LM
from halfbyte.report import page
from halfbyte.runs.folder import EXPORT
from halfbyte.scoring.intervals import Interval, RowSums, interval, interval_of_difference
from halfbyte.scoring.sheet import adapter_of
from halfbyte.system import device, files
from halfbyte.types import Document

RESAMPLES, SEED = 2000, 0
WARN_BELOW = 0.9
HELP = "more keep --repair, the adapter beside its base (halfbyte export RUN --gguf-lora) and wider formats (Q8_0)"


@dataclass(frozen=True)
class HeldOut:
    """Losses of an export beside the run's, on held-out rows where there are some. `source`: the model as it came,
    without an adapter; None where it was not asked. `base`: what the run was trained on, without its adapter.
    `compared_on`: what the rows are.

    A run has won over the model that it came from, not over its quantised base, which has lost something first. Gain
    kept = (source - export) / (source - run), each a sum over the labelled tokens of the rows, as each program's own
    logits have them.
    """

    export: RowSums
    run: RowSums
    base: RowSums
    source: RowSums | None
    compared_on: str = "held-out rows"

    @classmethod
    def read(cls, export: Path, run: Path, source: Path | None) -> "HeldOut":
        """From the folders of an export's answers, of the run's, and of the run's on 16-bit weights."""
        alone = None if source is None else _sums(source / f"base-{LOSSES}")
        rows = json.loads((run / WITNESS).read_text(encoding="utf-8"))["compared_on"]
        return cls(_sums(export / LOSSES), _sums(run / LOSSES), _sums(run / f"base-{LOSSES}"), alone, rows)

    @property
    def won(self) -> Interval | None:
        """The interval of what the run has won over its source model; None where the model was not asked."""
        return None if self.source is None else difference(self.source, self.run)

    @property
    def kept(self) -> tuple[float, Interval] | None:
        """The share of that gain, and its interval; None where no gain is measured."""
        if self.source is None or self.won is None or self.won[0] <= 0:
            return None
        left, won = (self.source.numerators - each.numerators for each in (self.export, self.run))
        share = RowSums(left, won)
        limits = interval(share, resamples=RESAMPLES, seed=SEED)
        return None if limits is None else (share.value, limits)

    @property
    def text(self) -> str:
        """What was measured, in a line; and what would help, where little is left."""
        rows = f"on {len(self.run.numerators)} {self.compared_on}"
        losses = f"loss {self.export.value:.4f}; the run {self.run.value:.4f}, its base alone {self.base.value:.4f}"
        if self.source is None:
            return f"{losses}, {rows}"
        losses = f"{losses}, the source model {self.source.value:.4f}, {rows}"
        if self.kept is None:
            worse = self.won is not None and self.won[1] < 0
            return f"{losses}: the run is {'worse' if worse else 'not measurably better'} than its source model"
        share, (low, high) = self.kept
        return f"gain kept {share:.0%} ({low:.0%} to {high:.0%}): {losses}"

    @property
    def advice(self) -> str:
        """What would help, where little is left; else empty."""
        if self.kept is None or self.kept[0] >= WARN_BELOW:
            return ""
        return f"{self.kept[0]:.0%} of the run's gain is left; {HELP}"

    def to_json(self) -> Document:
        """Losses a token; `kept` and `interval` are shares."""
        sums = {"export": self.export, "run": self.run, "base": self.base, "source": self.source}
        losses = {name: each and each.value for name, each in sums.items()}
        share, limits = self.kept or (None, None)
        return {"rows": len(self.run.numerators), "compared_on": self.compared_on, "loss": losses, "kept": share,
                "interval": limits, "text": self.text, "advice": self.advice}  # fmt: skip


def difference(one: RowSums, other: RowSums) -> Interval | None:
    """The interval of what `one` loses more than `other`, of the same rows."""
    return interval_of_difference(one, other, resamples=RESAMPLES, seed=SEED)


def _sums(path: Path) -> RowSums:
    losses, tokens = np.load(path).T
    return RowSums(losses, tokens)


BaseChoice = Literal["16bit", "4bit", "auto"]


@dataclass(frozen=True)
class ExportJob:
    """What is asked of any export."""

    run: Path  # a run folder, or an adapter's
    out: Path | None = None  # None takes a folder in the run
    overrides: Sequence[str] = ()
    force: bool = False
    data: Path | None = None  # rows to compare on
    prove: bool = True  # False writes it unproven, and says so in it
    prompts: int = PROMPTS  # at most so many are answered for the proof
    tell: supply.Tell = field(default_factory=supply.Tell)

    def target(self, tasks: Collection[str] = (CAUSAL_LM,)) -> Target:
        """The run or adapter, on this machine."""
        return inputs.adapter_of(self.run, self.overrides, tasks)

    def checked_target(self, tasks: Collection[str] = (CAUSAL_LM,)) -> Target:
        """The same, once its passport says that it belongs to the base that is here."""
        run = self.target(tasks)
        check_passport(run, self.tell, force=self.force)
        return run

    def out_folder(self, name: str) -> Path:
        """Where the export goes; nothing is there yet."""
        return inputs.out_folder(self.run, self.out, name)

    @contextmanager
    def draft(
        self, run: Target, out: Path, *, prove: bool = True, copies: int = 0, window: int | None = None
    ) -> "Iterator[DraftExport]":
        """An export in the making: `out` appears when the block ends, and nothing after an error. `copies` of the
        merged model must have room there. `window`: tokens of the longest text that both are asked of."""
        if copies:
            folder.check_space(out, copies * folder.nbytes(MergedModel(run, "16bit", self.tell)))
        with self._witness(run, out, window, prove=prove) as witness, folder.whole_or_absent(out) as temporary:
            yield DraftExport(run, out, temporary, witness)
        if run.run is not None:
            page.renew(run.run.path)

    @contextmanager
    def _witness(self, run: Target, out: Path, window: int | None, *, prove: bool) -> "Iterator[RunWitness | None]":
        """The run's answers, in a folder that goes with them; None where nothing is proven."""
        above, name = next(p for p in out.absolute().parents if p.exists()), f"{out.name}-asked"
        files.clear_dead(above, name)
        if not (prove and self.prove):
            yield None
            return
        place = files.beside(above / name)
        place.mkdir()
        try:
            yield RunWitness(self, run, place, window)
        finally:
            shutil.rmtree(place, ignore_errors=True)


class RunWitness:
    """What a run says, for exports to be compared with. Run and export are each opened in a process of their own."""

    def __init__(self, job: ExportJob, run: Target, place: Path, window: int | None = None) -> None:
        self.job, self.run = job, run
        self.place, self.window = place, window
        job.tell.say("the run is asked, to be compared with", label="proof")
        self.path = self._ask("run")

    def _ask(self, name: str, *, unquantised: bool = False) -> Path:
        out, job = self.place / name, self.job
        out.mkdir()
        data = str(job.data) if job.data is not None else None
        overrides = tuple(job.overrides)
        run, most = str(job.run), job.prompts
        return ask_run(RunQuestions(run, str(out), overrides, job.force, unquantised, data, most, self.window))

    def unquantised(self) -> Path | None:
        """The folder of what base and adapter say in 16 bits: the run's own where it was trained on those, or on its
        file's own values; None where an adapter holds a part of what quantising lost."""
        assert self.run.adapter is not None
        if not self.run.recipe.quant.quantises or self.run.recipe.quant.in_file:
            return self.path.parent
        if starts_residual(self.run.adapter):
            return None
        if not (self.place / "unquantised" / WITNESS).is_file():
            self._ask("unquantised", unquantised=True)
        return self.place / "unquantised"

    def prove(
        self, path: Path, program: str, kind: str, name: str, *, base: BaseKind, others: Sequence[str] = (),
        adapter: Path | None = None, bounded: bool = True,
    ) -> tuple[Proof, HeldOut]:  # fmt: skip
        """Open an export by a program and compare it with the run; a difference is in the proof, not raised."""
        assert self.run.adapter is not None
        self.job.tell.say(f"{path.name} is opened by {program}", label="proof")
        ask_program(program, path, self.path, self.place / name, adapter)
        quant = self.run.recipe.quant
        on_16_bits = base == "16bit" and quant.quantises and not quant.in_file
        # what these would be on 16-bit weights no run can say
        answers, source = self.place / name, self.unquantised()
        unlike = on_16_bits and (source is None or read_config(self.run.adapter).get("use_dora"))
        bounded = bounded and not unlike
        reference = source if on_16_bits and bounded else None
        proof = prove_export(self.path, answers, program, kind, others=others, reference=reference, bounded=bounded)
        return proof, HeldOut.read(answers, self.path.parent, source)


@dataclass
class DraftExport:
    """An export while it is written."""

    run: Target
    out: Path
    folder: Path  # gets the name `out` when it is whole
    witness: RunWitness | None  # None where nothing is proven
    proofs: dict[str, Proof] = field(default_factory=dict)  # by the base that was merged into
    losses: dict[str, HeldOut] = field(default_factory=dict)  # alike

    def result(self, kind: str, base: str, notes: Sequence[str]) -> Exported:
        """The result. Raises ExportError where it does not say what the run says."""
        losses = self.losses[base].to_json() if base in self.losses else None
        result = Exported(self.out, kind, base, dict(self.proofs), tuple(notes), losses)
        result.check()
        return result

    def keep(self, base: str) -> None:
        """Of the folders of several bases move one's files up, and remove the others."""
        for place in [path for path in self.folder.iterdir() if path.is_dir()]:
            for path in place.iterdir() if place.name == base else ():
                path.rename(self.folder / path.name)
            shutil.rmtree(place)

    def finish(self, result: Exported) -> Exported:
        """Write the figures and the card beside what was written."""
        adapter = None if self.run.adapter is None else adapter_of(self.run.adapter)
        figures = result.to_json() | {"path": self.out.name, "adapter": adapter}
        files.write(self.folder / EXPORT, files.as_json(figures))
        hub.write(self.folder, self.run, result)
        return result


def check_passport(run: Target, tell: supply.Tell, *, force: bool = False) -> None:
    """Whether an adapter belongs to the base that is here, without opening it; one without a passport passes, and what
    is assumed of it is told.

    Opening a run checks this too, but an export may be unproven, and an adapter's folder is never opened here.

    Raises:
        AdapterError: it belongs to another base, quantiser, tokenizer or chat template, or is not the file that was
            trained.
    """
    if run.assumed:
        tell.say(run.assumed, label="note")
    if run.adapter is None or read_passport(run.adapter) is None:
        return
    recipe, machine = run.recipe, device.detect()
    checkpoint = find_model(recipe)
    config = open_config(checkpoint.path, trust_remote_code=recipe.trust_remote_code)
    specs = tuple(tensors.read_checkpoint(checkpoint.path)) if not checkpoint.pickle else ()
    name, why = device.compute_dtype(machine, recipe.quant.compute_dtype)
    store = None
    own = checkpoint.blocks or tensors.is_quantised(config.to_dict()) or hasattr(config, "auto_map")
    if recipe.quant.quantises and not own:
        store, _ = load.stored_base(load.store_spec(checkpoint, config, recipe.quant, machine, specs), machine, tell)
    tokenizer = tokenizer_of(run, checkpoint)
    base = load.Base(meta_model(config), checkpoint, specs, name, why, 0, 0, store=store)
    here = passport.belongs_to(base, recipe.quant, tokenizer, chat_template(tokenizer, recipe.data))
    for text in passport.check(run.adapter, here, force=force):
        tell.say(text, label="note")


def describe(base: str) -> str:
    return "the 16-bit weights" if base == "16bit" else "the dequantised weights that were trained on"


def bases(run: Target, choice: BaseChoice) -> list[BaseKind]:
    """What is merged into: the base asked for, or those to choose among."""
    if not run.recipe.quant.quantises or run.recipe.quant.in_file:
        if choice == "4bit":
            what = "a file's own blocks" if run.recipe.quant.in_file else "16-bit weights"
            raise ExportError(f"the run was trained on {what}, so there are no others.", fix="--base 16bit")
        return ["16bit"]
    return ["16bit", "4bit"] if choice == "auto" else [choice]


def better(proofs: dict[str, Proof], losses: dict[str, HeldOut], kinds: Sequence[BaseKind]) -> BaseKind:
    """Of the sound ones the base with the lower held-out loss, where their difference is measured, else the one nearer
    to the run, by KL; what was trained where nothing is measured."""
    sound = [kind for kind in kinds if kind in proofs and not proofs[kind].problems]
    if not proofs and len(kinds) > 1:
        return "4bit"
    apart = difference(*(losses[kind].export for kind in sound)) if len(sound) == 2 else None
    if apart is not None and not apart[0] <= 0 <= apart[1]:
        return sound[apart[0] > 0]
    return min(sound or kinds, key=lambda kind: proofs[kind].kl if kind in proofs else 0.0)


def notes(kinds: Sequence[str], proofs: dict[str, Proof], losses: dict[str, HeldOut], base: str) -> Iterator[str]:
    """Why a base was chosen, and what its proof cannot see."""
    if len(kinds) > 1 and proofs:
        figures = "; ".join(
            f"{kind}: loss {p.loss:.4f}, KL {p.kl:.4f}, exact {p.exact} of {p.references}" for kind, p in proofs.items()
        )
        run, (one, other) = proofs[base], (losses[kind].export for kind in kinds)
        apart = difference(one, other)
        decided = apart is not None and not apart[0] <= 0 <= apart[1]
        yield (
            f"into {describe(base)}, {'of lower loss' if decided else 'the nearer to the run by KL'} "
            f"({figures}; the run: loss {run.run_loss:.4f}, exact {run.run_exact} of {run.references}; the base alone "
            f"is {run.base_kl:.4f} away)"
        )
    if not proofs:
        yield "not proven: it was not asked for (--no-proof)"
    if blind := next((proof for proof in proofs.values() if proof.moved < proof.bound), None):
        yield (
            f"the adapter moves logits by {blind.moved:.3g} of their spread, and rounding may by "
            f"{blind.bound:.3g}: an adapter that is not there would not be seen"
        )

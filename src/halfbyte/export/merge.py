"""`halfbyte merge RUN`: base and adapter as one folder of weights, and what it says beside what the run says.

Which base: a QLoRA adapter was trained on the 4-bit weights, and has learned to make up for some of what they lost.
Into the 16-bit weights it carries that along, where nothing was lost; into the dequantised ones the model stays the one
that was trained, with what 4 bits have lost. Neither is always better, so `auto` writes both and measures.
Cost: disk for one folder, for two with `auto`; time to read the source and write the result, and to ask each.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from halfbyte.base.store import supply
from halfbyte.errors import ExportError, HalfbyteError
from halfbyte.export import belongs, folder, hub
from halfbyte.export.weights import BaseKind, Merged, starts_residual
from halfbyte.export.witness import PROMPTS, WITNESS, RunQuestions, ask_run
from halfbyte.inference import target
from halfbyte.inference.target import Target
from halfbyte.proofs.export import Exported, Proof, ask_program, prove_export
from halfbyte.recipe.adapter import read_config
from halfbyte.system import files
from halfbyte.types import Document

Base = Literal["16bit", "4bit", "auto"]
EXPORT, DEFAULT = "export.json", "merged"
FORMATS = {"BF16": "BF16", "F16": "F16", "F32": "F32"}


@dataclass(frozen=True)
class Wish:
    """What is asked of any export.

    Args:
        run: a run folder, or an adapter's. out: None takes a folder in the run. data: rows to compare on.
        prove: False writes it unproven, and says so in it. prompts: most that are answered for the proof.
    """

    run: Path
    out: Path | None = None
    overrides: Sequence[str] = ()
    force: bool = False
    data: Path | None = None
    prove: bool = True
    prompts: int = PROMPTS
    tell: supply.Tell = field(default_factory=supply.Tell)

    def found(self) -> Target:
        """The run or adapter, on this machine."""
        found = target.find(self.run, self.overrides)
        if found.adapter is None:
            raise ExportError(f"{self.run} is a base without an adapter: there is nothing to ship.")
        return found

    def checked(self) -> Target:
        """The same, which belongs to the base that is here (AdapterError if not)."""
        belongs.check(found := self.found(), self.tell, force=self.force)
        return found

    def place(self, name: str) -> Path:
        """Where the export goes; nothing is there yet."""
        out = self.out or (self.run / name if (self.run / "recipe.yaml").is_file() else Path(f"{self.run}-{name}"))
        folder.check_free(out)
        return out

    @contextmanager
    def asking(self, out: Path) -> Iterator[Asking | None]:
        """The run's answers, while they are needed."""
        if not self.prove:
            yield None
            return
        above, name = next(p for p in out.absolute().parents if p.exists()), f"{out.name}-asked"
        files.clear_dead(above, name)
        place = files.beside(above / name)
        place.mkdir()
        try:
            yield Asking(self, place)
        finally:
            shutil.rmtree(place, ignore_errors=True)


class Asking:
    """What a run says, and programs beside it."""

    def __init__(self, wish: Wish, place: Path) -> None:
        self.wish, self.place = wish, place
        wish.tell.say("the run is asked, to be compared with", label="proof")
        self.witness = self._ask("run")

    def _ask(self, name: str, *, unquantised: bool = False) -> Path:
        out, wish = self.place / name, self.wish
        out.mkdir()
        data = str(wish.data) if wish.data is not None else None
        return ask_run(
            RunQuestions(str(wish.run), str(out), tuple(wish.overrides), wish.force, unquantised, data, wish.prompts)
        )

    def document(self) -> Document:
        said: Document = json.loads(self.witness.read_text(encoding="utf-8"))
        return said

    def unquantised(self) -> Path:
        """The folder of what base and adapter say in 16 bits."""
        if not (self.place / "unquantised" / WITNESS).is_file():
            self._ask("unquantised", unquantised=True)
        return self.place / "unquantised"

    def prove(
        self, path: Path, program: str, kind: str, name: str, *, base: BaseKind, others: Sequence[str] = (),
        adapter: Path | None = None, bounded: bool = True,
    ) -> Proof:  # fmt: skip
        """Open an export by a program and compare; raises nothing of what it sees."""
        found = self.wish.found()
        self.wish.tell.say(f"{path.name} is opened by {program}", label="proof")
        ask_program(program, path, self.witness, self.place / name, adapter)
        quantised = base == "16bit" and found.recipe.quant.quantises
        assert found.adapter is not None
        # what these would be on 16-bit weights no run can say
        unlike = quantised and (read_config(found.adapter).get("use_dora") or starts_residual(found.adapter))
        reference = self.unquantised() if quantised and not unlike and bounded else None
        bounded = bounded and not unlike
        said = self.place / name
        return prove_export(
            self.witness, said, program, kind, others=others, reference=reference, bounded=bounded
        )  # fmt: skip


def merge(wish: Wish, base: Base = "auto", *, quantise: bool = False) -> Exported:
    """Write base and adapter as one model that plain transformers opens.

    Args:
        quantise: quantise it again, as the run's base is; what that costs is measured.

    Raises:
        ExportError: no space, or what was written does not say what the run says; nothing is left then.
    """
    out = wish.place(DEFAULT)
    found = wish.checked()
    kinds = bases(found, base)
    with wish.asking(out) as asking, folder.whole_or_absent(out) as temporary:
        tried: dict[str, Proof] = {}
        for kind in kinds:
            (place := temporary / kind).mkdir()
            dtype = write(wish, found, kind, place, copies=len(kinds))
            if asking is not None:
                tried[kind] = asking.prove(place, "transformers", dtype, f"merged-{kind}", base=kind, others=(dtype,))
        taken = better(tried, kinds)
        for kind in kinds:
            if kind != taken:
                shutil.rmtree(temporary / kind)
        made = Exported(out, "merged model", taken, tried, tuple(notes(found, kinds, tried, taken)))
        made.check()
        if quantise:
            made = _quantised(wish, found, made, temporary / taken, temporary, asking)
        else:
            lift(temporary / taken, temporary)
        finish(temporary, found, made)
    return made


def write(wish: Wish, found: Target, kind: BaseKind, place: Path, *, copies: int = 1) -> str:
    """The merged folder; returns the dtype of its matrices."""
    merged = Merged(found, kind, wish.tell)
    folder.check_space(place, copies * folder.nbytes(merged))
    wish.tell.say(f"into {describe(kind)}: {folder.nbytes(merged) / 1e9:.2f} GB", label="merge")
    folder.write(merged, place)
    dtypes = [item.source.dtype for item in merged.items if len(item.source.shape) > 1]
    del merged
    gc.collect()
    return max(set(dtypes), key=dtypes.count) if dtypes else "F32"


def describe(kind: str) -> str:
    return "the 16-bit weights" if kind == "16bit" else "the dequantised weights that were trained on"


def bases(found: Target, base: Base) -> list[BaseKind]:
    """What is written: the base asked for, or those to choose among."""
    if not found.recipe.quant.quantises:
        if base == "4bit":
            raise ExportError("the run was trained on 16-bit weights, so there are no others.", fix="--base 16bit")
        return ["16bit"]
    return ["16bit", "4bit"] if base == "auto" else [base]


def better(tried: dict[str, Proof], kinds: Sequence[BaseKind]) -> BaseKind:
    """The one nearer to what was trained, by the divergence from it; both are sound."""
    sound = [kind for kind in kinds if kind in tried and not tried[kind].problems]
    if not tried and len(kinds) > 1:
        return "4bit"  # what was trained, when nothing is measured
    return min(sound or kinds, key=lambda kind: tried[kind].kl if kind in tried else 0.0)


def notes(found: Target, kinds: Sequence[str], tried: dict[str, Proof], taken: str) -> Iterator[str]:
    """What is to be said of a choice."""
    if len(kinds) > 1 and tried:
        figures = "; ".join(
            f"{kind}: KL {p.kl:.4f}, loss {p.loss:.4f}, exact {p.exact} of {p.references}" for kind, p in tried.items()
        )
        run = tried[taken]
        yield (
            f"into {describe(taken)}, the nearer to the run by KL ({figures}; the run: loss {run.run_loss:.4f}, exact "
            f"{run.run_exact} of {run.references}; the base alone is {run.base_kl:.4f} away)"
        )
    if not tried:
        yield "not proven: it was not asked for (--no-proof)"
    for proven in tried.values():
        if proven.moved < proven.bound:
            yield (
                f"the adapter moves logits by {proven.moved:.3g} of their spread, and rounding may by "
                f"{proven.bound:.3g}: an adapter that is not there would not be seen"
            )
            return


def lift(inner: Path, outer: Path) -> None:
    """Move what is in a folder up into the one around it."""
    for path in inner.iterdir():
        path.rename(outer / path.name)
    inner.rmdir()


def finish(place: Path, found: Target, made: Exported) -> None:
    """The figures and the card, beside what was written."""
    files.write(place / EXPORT, files.as_json(made.to_json()))
    hub.write(place, found, made)


def _quantised(wish: Wish, found: Target, made: Exported, merged: Path, outer: Path, asking: Asking | None) -> Exported:
    """The merged folder quantised again, in its place."""
    from halfbyte.base.quantize import quantize

    if not found.recipe.quant.quantises:
        raise ExportError("the run's base is in 16 bits: it says no format to quantise to.", fix="--set quant.type=nf4")
    recipe = found.recipe.model_copy(update={"model": str(merged), "revision": None})
    store = outer / "store"
    try:
        quantize(recipe, out=store, tell=wish.tell)
    except HalfbyteError as error:
        raise ExportError(f"the merged model cannot be quantised: {error.message}", fix=error.fix) from error
    tried = dict(made.tried)
    if asking is not None:
        name = f"{found.recipe.quant.type} of {made.base}"
        tried[name] = asking.prove(
            store, "transformers", "Q4_0", "quantised", base="4bit", bounded=False
        )  # fmt: skip
        made = Exported(made.path, f"merged model in {found.recipe.quant.type}", name, tried, made.notes)
        made.check()
    shutil.rmtree(merged)
    lift(store, outer)
    return made

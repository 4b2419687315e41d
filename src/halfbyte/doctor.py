"""`halfbyte doctor`: what this machine is and does in a second; with a model, whether what halfbyte claims holds here.

What: a few layers of the model at their true width, with adapters; each `Check` names a claim.
Cost: a few seconds; building the base's store first, if there is none.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from halfbyte import plan
from halfbyte.adapters.assembly import assemble
from halfbyte.base import load, stream
from halfbyte.base.store import supply
from halfbyte.errors import BaseModelError
from halfbyte.layers.kernels.cpu import ahead
from halfbyte.models import structure
from halfbyte.models.sources.lookup import find_model
from halfbyte.plan import calibrate
from halfbyte.plan import scaling as on_cores
from halfbyte.proofs.fusing import sample_gradients
from halfbyte.recipe.schema import Recipe
from halfbyte.system import device, threads, topology
from halfbyte.system.files import cache_dir, free_bytes, why_unwritable
from halfbyte.system.libraries import outside_ranges, versions
from halfbyte.system.platforms import table
from halfbyte.types import Check, Document, Model
from halfbyte.upstream import bitsandbytes, peft, transformers
from halfbyte.upstream import torch as of_torch

SEAMS = (*transformers.SEAMS, *peft.SEAMS, *bitsandbytes.SEAMS, *of_torch.SEAMS)


@dataclass(frozen=True)
class Diagnosis:
    """What `doctor` saw. `threads` say how many there are, and how they wait; `cache_problem` why the cache cannot be
    written, if so; `outside_ranges` names installed versions that halfbyte does not allow; `platform` is this machine's
    row of docs/machines.md; `model` is its id; `checks` are empty without one."""

    machine: device.Device
    compute_dtype: str
    compute_dtype_reason: str
    rates: plan.Rates
    cache: Path
    cache_free_bytes: int
    versions: dict[str, str]
    threads: str
    cache_problem: str = ""
    outside_ranges: dict[str, str] = field(default_factory=dict)
    platform: dict[str, str] = field(default_factory=dict)
    model: str | None = None
    layers: int = 0
    checks: tuple[Check, ...] = ()
    lacking: dict[str, str] = field(default_factory=dict)
    scaling: on_cores.Scaling | None = None
    topology: str = ""

    @property
    def ok(self) -> bool:
        return not self.cache_problem and not self.outside_ranges and all(check.ok for check in self.checks)

    def to_json(self) -> Document:
        return {**asdict(self), "machine": self.machine.to_json(), "cache": str(self.cache), "ok": self.ok}


def lacking() -> dict[str, str]:
    """What the installed versions have no seam for -> what is done without."""
    return {seam.reason: seam.without for seam in SEAMS if seam.reason}


def compile_kernels() -> None:
    """All kernels of this machine's dtypes that are not in the cache yet."""
    machine = device.detect()
    ahead.begin(ahead.FILES, machine.cores, device.compute_dtype(machine)[0])()


def examine(recipe: Recipe | None = None, *, tell: Callable[[str], None] = lambda text: None) -> Diagnosis:
    """Look at the machine, measured anew and kept for later plans; and at a model, if a recipe names one. A
    HalfbyteError tells of a model that is not there or cannot be opened."""
    machine = device.detect()
    asked = recipe.quant.compute_dtype if recipe is not None else "auto"
    dtype, why = device.compute_dtype(machine, asked)
    process = threads.configure(machine.cores)
    rates = calibrate.ensure(machine, dtype, say=tell, anew=True)
    scales = None if machine.on_card else on_cores.measure(machine, dtype)
    if scales is not None and not rates.busy:
        on_cores.keep(machine, dtype, scales)
    cache, free = cache_dir(), free_bytes(cache_dir())
    row = table.here(machine.kind, [(card.name, card.multiplies_bf16) for card in machine.cards], machine.isa)
    seen = Diagnosis(
        machine, dtype, why, rates, cache, free, versions(), process.line, why_unwritable(cache), outside_ranges(),
        row.to_json(), lacking=lacking(), scaling=scales, topology=topology.read().words,
    )  # fmt: skip
    return seen if recipe is None else _with_model(seen, recipe, tell)


def _with_model(seen: Diagnosis, recipe: Recipe, tell: Callable[[str], None]) -> Diagnosis:
    checkpoint = find_model(recipe)
    tell(f"opening {checkpoint.id}")
    base = load.open_base(
        checkpoint,
        recipe.quant,
        seen.machine,
        trust_remote_code=recipe.trust_remote_code,
        tell=supply.Tell(note=lambda _, text: tell(text)),
    )
    sizes = f"{base.resident_bytes:,} bytes, {base.expected_bytes:,} by its list of tensors"
    tell("proving on its first layers")
    assembly = assemble(base, recipe)
    with structure.shallow(assembly.model):
        wherever = _same_wherever(assembly.model, packed=assembly.packed.ok)
    learns = "the engine learns what PEFT's own forward learns, also after an evaluation"
    checks = (
        Check("resident as the policy says", base.resident_bytes == base.expected_bytes, sizes),
        Check("weights are dequantised as their format defines", assembly.dequantised.ok, assembly.dequantised.reason),
        Check("packed examples do not see each other", assembly.packed.ok, assembly.packed.reason),
        Check(learns, assembly.fused.ok, assembly.fused.reason),
        wherever,
    )
    return replace(seen, model=checkpoint.id, layers=assembly.layers, checks=checks)


def _same_wherever(model: Model, *, packed: bool) -> Check:
    """The same gradients to the bit from a base that is mapped, streamed, and in private memory."""
    claim = "the same gradients wherever the base lies"
    if not stream.is_mapped(model):
        return Check(claim, True, "not applicable: the base was quantised while loading, so it can only be resident")
    expected = sample_gradients(model, packed=packed)
    differing = []
    for placement in ("streamed", "resident"):
        try:
            placed = stream.place(model, placement)
        except BaseModelError as error:
            return Check(claim, False, f"{placement}: {error}")
        try:
            got = sample_gradients(model, packed=packed)
        finally:
            placed.remove()
        if got.keys() != expected.keys() or any(not torch.equal(got[name], expected[name]) for name in expected):
            differing.append(f"{placement} differs from mapped")
    return Check(claim, not differing, "; ".join(differing) or "mapped, streamed and resident are equal to the bit")

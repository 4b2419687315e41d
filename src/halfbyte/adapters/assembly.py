"""Adapters on an open base, and what was proven of both: where a run, an evaluation and `doctor` begin.

Why: whoever uses a model begins here, so no one can forget a proof.
Cost: a second or two of proofs, on the first layers alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch

from halfbyte.adapters import first_step, lora
from halfbyte.base import load, residual
from halfbyte.layers import fuse, heads, loss, packing
from halfbyte.layers.kernels.cpu.integer import products as integer
from halfbyte.models import structure
from halfbyte.proofs.dequantising import prove_dequantised
from halfbyte.proofs.fusing import prove_fused
from halfbyte.proofs.heads import prove_pooling
from halfbyte.proofs.memory import Proofs, RememberedProofs
from halfbyte.proofs.packing import prove_packing
from halfbyte.proofs.setting import StartProof
from halfbyte.recipe.schema import Recipe
from halfbyte.recipe.task import CAUSAL_LM
from halfbyte.types import Model


@dataclass(frozen=True)
class AdaptedBase:
    """A base with its adapters."""

    base: load.Base
    model: Model
    dequantised: StartProof
    packed: StartProof
    fused: StartProof
    engine: str  # whether the adapters run our fused layers, or PEFT's own forward
    layers: int  # how many layers the proofs ran through; 0 for all of a model without a list of layers
    own_biases: lora.Saved  # the base's own, where a loaded adapter has replaced them
    memory: RememberedProofs = field(default_factory=RememberedProofs)  # of these proofs


def assemble(
    base: load.Base, recipe: Recipe, *, adapter: Path | None = None, beside: Mapping[str, Path] = MappingProxyType({}),
    start: Path | None = None, factors: Path | None = None, alone: bool = False, memory: RememberedProofs | None = None,
    note: Callable[[str, str], None] = lambda label, text: None,
) -> AdaptedBase:  # fmt: skip
    """Put adapters on an open base, and prove on its first layers what is used from then on.

    Args:
        adapter: a folder with a trained one, to be used and not trained; None puts on fresh ones as the recipe says.
        beside: more trained ones, by the names that PEFT shall have for them; the first stays the active one.
        start: a folder with a trained one, whose weights the fresh ones begin with.
        factors: the file of a residual start (`base/residual.py`), at which the fresh ones begin.
        alone: no two texts will share a forward.
        memory: of proofs that need not be made again; None makes all.

    Raises:
        AdapterError: the targets match nothing, or the adapter is of another base.
    """
    own_biases: lora.Saved = lora.biases(base.model) if recipe.lora.bias != "none" else []
    if adapter is None:
        targets, modules = lora.choose_targets(base.model, recipe.lora)
        begin = residual.read(factors, modules) if factors is not None else None
        model = lora.add(base.model, recipe.lora, targets, seed=recipe.train.seed)
        if start is not None:
            lora.start_from(model, start)
            note("adapters", f"begin with the weights of {start}")
        if begin is not None:
            lora.start_at(model, begin)
        note("adapters", f"{lora.summary(model)} ({targets.reason})")
    else:
        model = lora.load(base.model, adapter).eval()
        for name, folder in beside.items():
            lora.load_beside(model, folder, name)
    first_step.SEEN.add(model)
    memory = memory or RememberedProofs()
    if memory.changed:
        note("proofs", f"made again, since this has changed: {', '.join(memory.changed)}")
    dequantised = memory.recall("dequantised") or memory.keep("dequantised", prove_dequantised(model))
    with structure.shallow(model) as layers:
        if (packed := memory.recall("packing")) is not None:
            packing.install(structure.causal_lm(model), packed.layout)
        else:
            packed = memory.keep("packing", prove_packing(model, recipe.data.max_length, alone=alone))
        loss.head_of(model)  # seen here, on few layers
        if heads.task_type(model) is not None:
            note("pooling", prove_pooling(model, packed=packed.ok, pooling=recipe.vectors.pooling))
    fused, engine = _fused(model, recipe, memory, packed=packed.ok)
    return AdaptedBase(base, model, dequantised, packed, fused, engine, layers, own_biases, memory)


def memory_of(
    base: load.Base, recipe: Recipe, adapters: Mapping[str, Path | None], proofs: Proofs, **settings: object
) -> RememberedProofs:
    """What is remembered of the proofs of a base with adapters. On a card, whose driver nobody asks here, and for a
    task with a head of its own, that is nothing. `adapters`: their folders; `settings`: what else is as it was."""
    if proofs == "every" or base.model.device.type != "cpu" or recipe.task != CAUSAL_LM:
        return RememberedProofs()
    fields = {"quant", "lora", "trust_remote_code"}
    subject = {**recipe.model_dump(mode="json", include=fields), "longest": recipe.data.max_length, **settings}
    folders = {name: folder for name, folder in adapters.items() if folder is not None}
    subject |= {"base": str(base.checkpoint.path), **{name: str(folder) for name, folder in folders.items()}}
    weights = base.checkpoint.blocks if base.store is None else sorted(base.store.glob("*.safetensors"))
    paths = folders | {"base": base.checkpoint.path} | {f"base, {path.name}": path for path in weights}
    return RememberedProofs.of(subject, paths, torch.get_num_threads(), prove=proofs == "again")


def _fused(model: Model, recipe: Recipe, memory: RememberedProofs, *, packed: bool) -> tuple[StartProof, str]:
    """Fused layers where they are proven, and what runs."""
    if (proof := memory.recall("fused")) is None:
        with structure.shallow(model):
            proof = memory.keep("fused", prove_fused(model, packed=packed, longest=recipe.data.max_length))
    if proof.ok:
        return proof, f"{fuse.install(model)}; {proof.reason}"  # on the layers that the proof has not seen too
    fuse.remove(model)
    return proof, proof.reason


def take_off(assembled: AdaptedBase) -> load.Base:
    """The base as it was before it got its adapters."""
    integer.set_products(fuse.frozen_layers(assembled.model), None)
    fuse.remove(assembled.model)
    assembled.model.unload()
    for parameter, value in assembled.own_biases:
        parameter.data.copy_(value)
    return assembled.base


def put_beside(model: Model, recipe: Recipe, folder: Path, name: str, *, packed: bool) -> None:
    """One more trained adapter on an assembled model, by the name that PEFT shall have for it. Raises AdapterError: it
    does not fit; the model is as it was."""
    fuse.remove(model)
    try:
        lora.load_beside(model, folder, name)
    except Exception:
        take_away(model, name)
        raise
    finally:
        _fused(model, recipe, RememberedProofs(), packed=packed)


def take_away(model: Model, name: str) -> None:
    """An adapter of PEFT's name, if it is there and not the only one, which PEFT cannot do without."""
    if name in model.peft_config and len(model.peft_config) > 1:
        model.delete_adapter(name)
        model.requires_grad_(False)

"""The tensors of any module, each with how it is to be held: quantised, in the rest's dtype, or in fp32.

What is quantised: `nn.Linear` itself, GPT-2's Conv1D, the plain subclasses of `quant/loader.py`, and stacks of
experts that run through transformers' experts interface. A subclass of nn.Linear may be used in another way:
`nn.MultiheadAttention` never calls its `out_proj`, it takes its weight.
What stays: routers of experts; tied parameters, since the embedding that shares them needs numbers; output layers,
found by what they are (`get_output_embeddings`, or outside of a transformers model's body); what transformers itself
keeps in fp32; names.
Cost: no weight is read.
"""

from __future__ import annotations

import difflib
import math
import re
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from halfbyte.base.modules.settings import Settings
from halfbyte.errors import BaseModelError
from halfbyte.quant import bnb, experts, formats
from halfbyte.quant.loader import PLAIN_LINEARS
from halfbyte.quant.policy import matches

# Matrices that nobody asked to keep may be this share of all numbers before it is said.
_UNSAID_SHARE = 0.02


@dataclass(frozen=True)
class Site:
    """One tensor of a module's state dict. `names`: every place that shares it; `dtype`: what its numbers are cast to,
    before they are quantised too; `transposed`: held (in, out); `stack`: experts of one layer, (experts, out, in)."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    quantised: bool
    transposed: bool = False
    stack: bool = False

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def held_shape(self) -> tuple[int, ...]:
        """(out, in), or (experts, out, in)."""
        return self.shape[::-1] if self.transposed else self.shape

    def nbytes(self, settings: Settings) -> int:
        """Bytes in memory, or on disk but for headers."""
        if self.quantised:
            return formats.of(settings.quant).nbytes(self.held_shape, settings.quant)
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Survey:
    """`fp32`: the modules whose own tensors are fp32, with whether their output stays so (output layers)."""

    sites: tuple[Site, ...]
    fp32: tuple[tuple[str, bool], ...]

    def bytes(self, settings: Settings) -> int:
        return sum(site.nbytes(settings) for site in self.sites)


def survey(root: nn.Module, settings: Settings) -> Survey:
    """Decide about every tensor.

    Raises:
        BaseModelError: a name that is not there; nothing that could be quantised; quantised already.
    """
    modules = dict(root.named_modules(remove_duplicate=False))
    state = tensors_of(root)
    if bnb.quantised_linears(root):
        raise BaseModelError(f"{type(root).__name__} is quantised already: {bnb.quantised_linears(root)[0][0]}.")
    _check_names(settings, modules, state)
    shared: dict[int, list[str]] = {}
    for name, tensor in state.items():
        shared.setdefault(id(tensor), []).append(name)
    fp32 = _fp32(modules, state, shared, settings)
    heads = _heads(root, modules)
    kept_by_class = (*(getattr(root, "_keep_in_fp32_modules", None) or ()),
                     *(getattr(root, "_keep_in_fp32_modules_strict", None) or ()))  # fmt: skip
    plan = _dtype_plan(root, settings.rest)
    named = (*(settings.skip or ()), *settings.fp32)
    stacks, routers = _stacks(root, state, settings), set(experts.routers(root))
    sites, unasked = [], []
    for names in shared.values():
        tensor = state[names[0]]
        owners = {id(modules[_owner(name)]): modules[_owner(name)] for name in names}
        module = next(iter(owners.values()))
        kind = _linear_kind(root, module) if names[0].endswith("weight") and tensor.is_floating_point() else ""
        head = any(id(m) in heads for m in owners.values()) and settings.skip != ()
        asked = any(matches(name, named) for name in names)
        stack = names[0] in stacks
        kept = head or asked or len(owners) > 1 or matches(names[0], kept_by_class) or _owner(names[0]) in routers
        quantised = (bool(kind) or stack) and not kept and settings.quant.quantises
        if (
            tensor.is_floating_point()
            and tensor.ndim > 1
            and not (quantised or kept or isinstance(module, nn.Embedding))
        ):
            unasked.append((names[0], tensor))
        dtype = settings.compute if quantised else _dtype(names, tensor, fp32, plan, settings.rest)
        turned = kind == "Conv1D"
        sites.append(Site(tuple(names), tuple(tensor.shape), dtype, quantised, turned, quantised and stack))
    if settings.quant.quantises:
        _check_any(root, sites, unasked)
    out = tuple((name, id(modules[name]) in heads) for name in dict.fromkeys(_owner(n) for n in fp32))
    return Survey(tuple(sites), out)


def _stacks(root: nn.Module, state: dict[str, Tensor], settings: Settings) -> set[str]:
    """Parameters of experts that can be held in few bits: each expert is whole blocks, its input is not rounded."""
    quant, found = settings.quant, set()
    for place in experts.expert_parameters(root):
        shape = tuple(state[place.path].shape)
        if not formats.of(quant).rounds_inputs(quant) and not math.prod(shape[1:]) % formats.of(quant).unit(
            shape, quant
        ):
            found.add(place.path)
    return found


def nearest(name: str, known: Iterable[str], *, whole: bool = False) -> str:
    """The known name, or (unless `whole`) run of its dotted parts, that is most like `name`; empty if none is.

    Of names that differ in their numbers alone one is looked at: that with the numbers of `name`, or the first.
    """
    numbers = re.findall(r"\d+", name)
    once: dict[str, str] = {}
    for each in filter(None, known):
        pattern = re.sub(r"\d+", "#", each)
        if pattern not in once or re.findall(r"\d+", each) == numbers:
            once[pattern] = each
    parts = [each.split(".") for each in once.values()]
    runs = {".".join(p[-n:]): None for p in parts for n in ({len(p)} if whole else {1, 2, 3, len(p)}) if n <= len(p)}
    return next(iter(difflib.get_close_matches(name, [r for r in runs if not r.isdigit()], 1, cutoff=0.5)), "")


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _check_names(settings: Settings, modules: dict[str, nn.Module], state: dict[str, Tensor]) -> None:
    every = (
        (settings.skip or (), [*modules, *state], "skip_modules"),
        (settings.fp32, modules, "keep_in_fp32_modules"),
    )
    problems = []
    for patterns, known, argument in every:
        for pattern in patterns:
            if not any(matches(name, (pattern,)) for name in known):
                near = nearest(pattern, known)
                problems.append(
                    f"{argument} {pattern!r} names no module" + (f"; did you mean {near!r}?" if near else "")
                )
    if problems:
        raise BaseModelError(
            "; ".join(problems) + ".",
            fix="a name is one or several whole parts of a name in `module.named_modules()`, such as `mlp.down_proj`",
        )


def _heads(root: nn.Module, modules: dict[str, nn.Module]) -> set[int]:
    """Output layers: the output embeddings, and the linears beside the body of a transformers model."""
    get = getattr(root, "get_output_embeddings", None)
    try:
        head = get() if callable(get) else None
    except NotImplementedError:
        head = None
    body = getattr(root, getattr(root, "base_model_prefix", "") or "", None)
    inside = {id(m) for m in body.modules()} if isinstance(body, nn.Module) else {id(m) for m in modules.values()}
    beside = {id(m) for m in modules.values() if isinstance(m, nn.Linear) and id(m) not in inside}
    return beside | ({id(head)} if isinstance(head, nn.Module) else set())


def _linear_kind(root: nn.Module, module: nn.Module) -> str:
    """Linear, Conv1D, or the name of a subclass whose forward is the plain product; empty for anything else."""
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    plain = PLAIN_LINEARS.get(getattr(getattr(root, "config", None), "model_type", ""))
    kinds = ((nn.Linear, "Linear"), (conv1d, "Conv1D"))
    if "weight" not in dict(module.named_parameters(recurse=False)):  # made in a hook, as by `nn.utils.weight_norm`
        return ""
    return next((name for kind, name in kinds if type(module) is kind), plain if type(module).__name__ == plain else "")


def _fp32(
    modules: dict[str, nn.Module], state: dict[str, Tensor], shared: dict[int, list[str]], settings: Settings
) -> set[str]:
    """Names of tensors in fp32: what is asked for, what is tied to it, and all that its modules hold themselves."""
    chosen = {name for name in state if matches(_owner(name), settings.fp32)} if settings.fp32 else set()
    size = -1
    while size != len(chosen):
        size = len(chosen)
        chosen |= {tied for name in chosen for tied in shared[id(state[name])]}
        owners = {id(modules[_owner(name)]) for name in chosen}
        chosen |= {name for name in state if id(modules[_owner(name)]) in owners}
    return {name for name in chosen if state[name].is_floating_point()}


def _dtype(
    names: Iterable[str], tensor: Tensor, fp32: set[str], plan: dict[str, torch.dtype], rest: torch.dtype
) -> torch.dtype:
    if not tensor.is_floating_point():
        return tensor.dtype
    if fp32.intersection(names):
        return torch.float32
    return _planned(next(iter(names)), plan) or rest


def _dtype_plan(root: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """transformers' own exceptions from a dtype, by pattern."""
    own = getattr(root, "_get_dtype_plan", None)
    return dict(own(dtype)) if callable(own) else {}


def _planned(name: str, plan: dict[str, torch.dtype]) -> torch.dtype | None:
    if not plan:
        return None
    from transformers.core_model_loading import build_glob_alternation

    return next((t for p, t in plan.items() if build_glob_alternation([p])[0].search(name)), None)


def _check_any(root: nn.Module, sites: list[Site], unasked: list[tuple[str, Tensor]]) -> None:
    name, left = type(root).__name__, sorted(unasked, key=lambda item: -item[1].numel())
    listed = ", ".join(f"{n} {tuple(t.shape)}" for n, t in left[:3])
    if not any(site.quantised for site in sites):
        raise BaseModelError(
            f"{name} has no linear layer that could be quantised"
            + (f"; its largest matrices are {listed}." if left else "."),
            fix="skip fewer modules; what is quantised is nn.Linear and transformers' Conv1D, not subclasses of them",
        )
    if [site for site in sites if site.quantised and site.name == "weight"]:
        raise BaseModelError(
            f"{name} is a layer itself and cannot be replaced in place.", fix="wrap it: nn.Sequential(layer)"
        )
    numbers = sum(t.numel() for _, t in left)
    if numbers > _UNSAID_SHARE * sum(site.numel for site in sites):
        warnings.warn(
            f"{len(left)} matrices with {numbers / 1e6:.1f} M numbers stay as they are, being no plain linear "
            f"layers; the largest: {listed}.",
            stacklevel=4,
        )


def tensors_of(root: nn.Module, *, persistent: bool = True) -> dict[str, Tensor]:
    """Parameters and buffers under every name that they have; or the buffers that no state dict holds."""
    every: dict[str, Tensor] = {}
    for path, module in root.named_modules(remove_duplicate=False):
        lead = f"{path}." if path else ""
        aside = module._non_persistent_buffers_set
        if persistent:
            every |= {lead + name: p for name, p in module.named_parameters(recurse=False, remove_duplicate=False)}
        buffers = module.named_buffers(recurse=False, remove_duplicate=False)
        every |= {lead + name: b for name, b in buffers if (name in aside) != persistent}
    return every

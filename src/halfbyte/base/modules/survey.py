"""The tensors of any module, each with how it is to be held: quantised, in the rest's dtype, or in fp32.

What is quantised: `nn.Linear` itself, GPT-2's Conv1D, the plain subclasses of `quant/loader.py`, and stacks of experts
that run through transformers' experts interface. A subclass of nn.Linear may be used in another way:
`nn.MultiheadAttention` never calls its `out_proj`, it takes its weight.
What stays: routers of experts; tied parameters, since the embedding that shares them needs numbers; output layers,
found by what they are (`get_output_embeddings`, or outside of a transformers model's body); what transformers itself
keeps in fp32; names.
Cost: no weight is read.
"""

import difflib
import math
import re
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from halfbyte.base.modules.settings import ModuleSettings
from halfbyte.base.store.conversion import planned_dtype
from halfbyte.errors import BaseModelError
from halfbyte.quant import bnb, experts, formats
from halfbyte.quant.loader import PLAIN_LINEARS
from halfbyte.quant.policy import matches

# Matrices that nobody asked to keep may be this share of all numbers before it is said.
_UNSAID_SHARE = 0.02


@dataclass(frozen=True)
class ModuleTensor:
    """One tensor of a module's state dict."""

    names: tuple[str, ...]  # every place that shares it
    shape: tuple[int, ...]  # as the module has it
    dtype: torch.dtype  # what its numbers are cast to, before they are quantised too
    quantised: bool
    transposed: bool = False  # it is quantised, and the module has it (in, out)
    stack: bool = False  # it is quantised, and is the experts of a layer, (experts, out, in)

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def held_shape(self) -> tuple[int, ...]:
        """(out, in), or (experts, out, in), of what is quantised."""
        return self.shape[::-1] if self.transposed else self.shape

    def nbytes(self, settings: ModuleSettings) -> int:
        """Bytes in memory, or on disk but for headers."""
        if self.quantised:
            return formats.of(settings.quant).nbytes(self.held_shape, settings.quant)
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Survey:
    """`fp32`: the modules whose own tensors are fp32, with whether their output stays so (output layers)."""

    tensors: tuple[ModuleTensor, ...]
    fp32: tuple[tuple[str, bool], ...]


def survey(root: nn.Module, settings: ModuleSettings) -> Survey:
    """Decide about every tensor. Raises BaseModelError: a name that is not there; nothing that could be quantised;
    quantised already."""
    modules = dict(root.named_modules(remove_duplicate=False))
    state = tensors_of(root)
    if bnb.quantised_linears(root):
        raise BaseModelError(f"{type(root).__name__} is quantised already: {bnb.quantised_linears(root)[0][0]}.")
    _check_names(settings, modules, state)
    shared: dict[int, list[str]] = {}
    for name, tensor in state.items():
        shared.setdefault(id(tensor), []).append(name)
    fp32, heads = _fp32(modules, state, shared, settings), _heads(root, modules)
    plan = root._get_dtype_plan(settings.rest) if callable(getattr(root, "_get_dtype_plan", None)) else {}
    by_class = [getattr(root, f"_keep_in_fp32_modules{strict}", None) or () for strict in ("", "_strict")]
    stay = (*(settings.skip or ()), *settings.fp32, *by_class[0], *by_class[1])
    stacks, routers = _stacks(root, settings), set(experts.routers(root))
    tensors, unasked = [], []
    for names in shared.values():
        name, tensor = names[0], state[names[0]]
        owners = {id(modules[owner_of(n)]): modules[owner_of(n)] for n in names}
        module = next(iter(owners.values()))
        stays = len(owners) > 1 or owner_of(name) in routers or any(matches(n, stay) for n in names)
        stays = stays or (settings.skip != () and any(id(owner) in heads for owner in owners.values()))
        floats = tensor.is_floating_point()
        kind = _linear_kind(root, module) if name.endswith("weight") and floats else ""
        quantised = (bool(kind) or name in stacks) and not stays and settings.quant.quantises
        if floats and tensor.ndim > 1 and not (quantised or stays or isinstance(module, nn.Embedding)):
            unasked.append((name, tensor))
        dtype = settings.compute if quantised else tensor.dtype
        if floats and not quantised:
            dtype = torch.float32 if fp32.intersection(names) else planned_dtype(plan, name) or settings.rest
        turned, stack = quantised and kind == "Conv1D", quantised and name in stacks
        tensors.append(ModuleTensor(tuple(names), tuple(tensor.shape), dtype, quantised, turned, stack))
    if settings.quant.quantises:
        _check_any(root, tensors, unasked)
    owners_in_fp32 = dict.fromkeys(owner_of(name) for name in fp32)
    return Survey(tuple(tensors), tuple((name, id(modules[name]) in heads) for name in owners_in_fp32))


def _stacks(root: nn.Module, settings: ModuleSettings) -> set[str]:
    """Parameters of experts that can be held in few bits: each expert is whole blocks, its input is not rounded."""
    number_format, quant = formats.of(settings.quant), settings.quant
    if not quant.quantises or number_format.rounds_inputs(quant):
        return set()
    every = [(each.path, tuple(each.parameter.shape)) for each in experts.expert_parameters(root)]
    return {path for path, shape in every if not math.prod(shape[1:]) % number_format.unit(shape, quant)}


def nearest(name: str, known: Iterable[str], *, whole_names: bool = False) -> str:
    """The known name, or (unless `whole_names`) run of its dotted parts, that is most like `name`; empty if none is. Of
    names that differ in their numbers alone one is looked at: that with the numbers of `name`, or the first."""
    numbers = re.findall(r"\d+", name)
    once: dict[str, str] = {}
    for each in filter(None, known):
        pattern = re.sub(r"\d+", "#", each)
        if pattern not in once or re.findall(r"\d+", each) == numbers:
            once[pattern] = each
    parts = [each.split(".") for each in once.values()]
    ends = [(p, {len(p)} if whole_names else {1, 2, 3, len(p)}) for p in parts]
    runs = {".".join(p[-n:]): None for p, lengths in ends for n in lengths if n <= len(p)}
    return next(iter(difflib.get_close_matches(name, [r for r in runs if not r.isdigit()], 1, cutoff=0.5)), "")


def owner_of(name: str) -> str:
    """The module of a tensor."""
    return name.rpartition(".")[0]


def _check_names(settings: ModuleSettings, modules: dict[str, nn.Module], state: dict[str, Tensor]) -> None:
    every = ("skip_modules", settings.skip or (), [*modules, *state]), ("keep_in_fp32_modules", settings.fp32, modules)
    unknown = [
        (argument, pattern, nearest(pattern, known))
        for argument, patterns, known in every
        for pattern in patterns
        if not any(matches(name, (pattern,)) for name in known)
    ]
    if unknown:
        hints = [(f"{argument} {name!r} names no module", near) for argument, name, near in unknown]
        raise BaseModelError(
            "; ".join(text + (f"; did you mean {near!r}?" if near else "") for text, near in hints) + ".",
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
    if "weight" not in dict(module.named_parameters(recurse=False)):  # made in a hook, as by `nn.utils.weight_norm`
        return ""
    name = type(module).__name__
    return name if type(module) in (nn.Linear, conv1d) or name == plain else ""


def _fp32(
    modules: dict[str, nn.Module], state: dict[str, Tensor], shared: dict[int, list[str]], settings: ModuleSettings
) -> set[str]:
    """Names of tensors in fp32: what is asked for, what is tied to it, and all that its modules hold themselves."""
    chosen = {name for name in state if matches(owner_of(name), settings.fp32)} if settings.fp32 else set()
    size = -1
    while size != len(chosen):
        size = len(chosen)
        chosen |= {tied for name in chosen for tied in shared[id(state[name])]}
        owners = {id(modules[owner_of(name)]) for name in chosen}
        chosen |= {name for name in state if id(modules[owner_of(name)]) in owners}
    return {name for name in chosen if state[name].is_floating_point()}


def _check_any(root: nn.Module, tensors: list[ModuleTensor], unasked: list[tuple[str, Tensor]]) -> None:
    name, left = type(root).__name__, sorted(unasked, key=lambda item: -item[1].numel())
    listed = ", ".join(f"{n} {tuple(t.shape)}" for n, t in left[:3])
    quantised = [tensor.name for tensor in tensors if tensor.quantised]
    if not quantised:
        raise BaseModelError(
            f"{name} has no linear layer that could be quantised"
            + (f"; its largest matrices are {listed}." if left else "."),
            fix="skip fewer modules; what is quantised is nn.Linear and transformers' Conv1D, not subclasses of them",
        )
    if "weight" in quantised:
        raise BaseModelError(
            f"{name} is a layer itself and cannot be replaced in place.", fix="wrap it: nn.Sequential(layer)"
        )
    numbers = sum(t.numel() for _, t in left)
    if numbers > _UNSAID_SHARE * sum(math.prod(tensor.shape) for tensor in tensors):
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

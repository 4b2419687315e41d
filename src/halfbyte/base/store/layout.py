"""What a store holds: for every tensor of a source its name, its encoding, its dtype and its file.

Why: opening the store must give, bit for bit, what transformers gives when it quantises while loading. So nothing is
decided here that it decides itself: its own quantiser prepares the (empty) model, its own rules rename the tensors, and
what a store's tensors would be called when it is opened is tried out before anything is written.
Source: transformers, `convert_and_load_state_dict_in_model` in core_model_loading.py; quantizers/quantizer_bnb_4bit.py.
"""

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from transformers.quantizers import AutoHfQuantizer

from halfbyte.base.store import conversion, mxfp4
from halfbyte.base.store.encode import slots
from halfbyte.base.store.reading import FLOATS, SourceTensor, TensorPlan
from halfbyte.base.store.shelf import CannotHold, StoreSpec
from halfbyte.models.structure import auto_class
from halfbyte.models.tensors import spec_of
from halfbyte.plan.store_build import OWN_FILE_BYTES
from halfbyte.quant import experts, formats, loader
from halfbyte.recipe.schema import Quant


@dataclass(frozen=True)
class FilePlan:
    """One file: every tensor of a decoder layer, one large tensor, or the small rest."""

    name: str
    tensors: tuple[TensorPlan, ...]

    @property
    def source_bytes(self) -> int:
        return sum(plan.source_bytes for plan in self.tensors)


@dataclass(frozen=True)
class StoreLayout:
    """`marked`: transformers knows its format, but it opens with `quant.loader.opening_config` only."""

    files: tuple[FilePlan, ...]
    marked: bool

    @property
    def source_bytes(self) -> int:
        return sum(file.source_bytes for file in self.files)

    @property
    def parameters(self) -> int:
        return sum(plan.numel for file in self.files for plan in file.tensors)


def lay_out(tensors: dict[str, SourceTensor], spec: StoreSpec) -> StoreLayout:
    """Decide everything about a store of these tensors. Raises CannotHold: transformers merges or splits matrices that
    are to be quantised, or would not find them again."""
    empty = _EmptyModel(spec, pre_quantised=False)
    plans: list[tuple[TensorPlan, str]] = []
    wrong: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
    stacked: dict[str, list[conversion.Member]] = {}
    tensors, halves = mxfp4.joined(tensors)
    for name, target, rule in empty.targets(tensors):
        if target not in empty.state:
            continue  # a buffer or a tower that this class does not read
        source, quantised = tensors[name], empty.quantises(target)
        if target in empty.stacks:
            stacked.setdefault(target, []).append((source, rule))
            continue
        if rule is not None and quantised:
            raise CannotHold(f"transformers merges or splits {name} while it loads")
        dtype = empty.dtype_of(target, quantised=quantised)
        module = empty.original[target.rpartition(".")[0]]
        turned = quantised and type(module).__name__ == "Conv1D"  # GPT-2's holds (in, out)
        if quantised and source.dtype not in FLOATS:
            raise CannotHold(f"{name} is {source.dtype}, which is not quantised")
        if quantised and source.shape != tuple(module.weight.shape):
            wrong.append((name, source.shape, tuple(module.weight.shape)))
        shape = source.shape[::-1] if turned else source.shape
        plan = TensorPlan(name, (source,), shape, "quantised" if quantised else "copy", dtype, turned, target=target)
        plans.append((plan, target))
    for target, members in stacked.items():
        shape, dtype = tuple(empty.stacks[target].shape), empty.dtype_of(target, quantised=True)
        plans.append((conversion.stack_plan(target, shape, dtype, members, spec.quant, halves), target))
    if spec.check is not None:
        missing = empty.missing({target for _, target in plans})
        spec.check(empty.model, {"missing_keys": missing, "mismatched_keys": wrong})
    named = _names(_without_repeated(plans, empty.tied), _EmptyModel(spec, pre_quantised=True), spec.quant)
    return StoreLayout(_files(named, spec.config.model_type), empty.marked)


class _EmptyModel:
    """transformers' own view of a load: the empty model, prepared by its quantiser, and how tensors are renamed."""

    def __init__(self, spec: StoreSpec, *, pre_quantised: bool) -> None:
        quant, dtype = spec.quant, spec.dtype
        self.compute_dtype = dtype
        with torch.device("meta"):
            self.model = auto_class(spec.config).from_config(copy.deepcopy(spec.config), dtype=dtype)
        self.original = dict(self.model.named_modules())
        settings = loader.load_config(self.model, quant, dtype, spec.head_names)
        known = formats.of(quant).load_config(quant, dtype) is not None
        self.marked, self.quantiser = known and loader.is_own(settings), None
        if settings is not None:  # None copies a model in the compute dtype
            self.quantiser = AutoHfQuantizer.from_config(settings, pre_quantized=pre_quantised)
            self.quantiser.preprocess_model(
                model=self.model, dtype=dtype, device_map={"": "cpu"}, checkpoint_files=[], use_kernels=False
            )
        self.state = self.model.state_dict()
        self.stacks = dict(experts.stacks(self.model))
        self.dtype_plan = self.model._get_dtype_plan(dtype)
        self.tied = dict(self.model.all_tied_weights_keys)

    def quantises(self, target: str) -> bool:
        return self.quantiser is not None and self.quantiser.param_needs_quantization(self.model, target)

    def targets(self, names: Iterable[str]) -> list[tuple[str, str, conversion.Rule | None]]:
        """(name, what the model calls it, the rule by which it is changed on the way), in the loader's own order."""
        targets = conversion.renamed(self.model, names, self.state, self.quantiser)
        return [(name, target, rule) for name, (target, rule) in targets.items()]

    def missing(self, covered: set[str]) -> list[str]:
        """Parameters that no tensor of the checkpoint reaches, neither by name nor through a tie."""
        ties: dict[str, set[str]] = {}
        for a, b in self.tied.items():
            ties.setdefault(a, set()).add(b)
            ties.setdefault(b, set()).add(a)
        ignored = [re.compile(pattern) for pattern in self.model._keys_to_ignore_on_load_missing or ()]
        return [
            name
            for name, _ in self.model.named_parameters()
            if name not in covered
            and not ties.get(name, set()) & covered
            and not any(pattern.search(name) for pattern in ignored)
        ]

    def dtype_of(self, target: str, *, quantised: bool) -> torch.dtype:
        """What the loader casts a tensor to."""
        usual = self.compute_dtype if quantised else self.state[target].dtype
        return conversion.planned_dtype(self.dtype_plan, target) or usual


def _without_repeated(plans: list[tuple[TensorPlan, str]], tied: dict[str, str]) -> list[tuple[TensorPlan, str]]:
    """Without a tied tensor that a pickle holds twice in one storage; loading ties it again."""
    by_target = {target: plan for plan, target in plans}

    def repeated(plan: TensorPlan, target: str) -> bool:
        first = by_target.get(tied.get(target, ""), plan)
        return first is not plan and replace(first.sources[0], name=plan.sources[0].name) == plan.sources[0]

    return [(plan, target) for plan, target in plans if not repeated(plan, target)]


def _names(plans: list[tuple[TensorPlan, str]], empty: _EmptyModel, quant: Quant) -> list[TensorPlan]:
    """The plans under names by which transformers will find them in the store: the source's, or else the model's."""
    for use_target in (False, True):
        named = [
            (replace(plan, name=target) if use_target and target not in empty.stacks else plan, target)
            for plan, target in plans
        ]
        expected = {slot.name: target for plan, target in named for slot in slots([plan], quant)}
        if {name: target for name, target, _ in empty.targets(expected)} == expected:
            return [plan for plan, _ in named]
    raise CannotHold("transformers would not find its tensors again by their names")


def _files(plans: list[TensorPlan], model_type: str) -> tuple[FilePlan, ...]:
    groups: dict[str, list[TensorPlan]] = {}
    for plan in plans:
        layer = spec_of(plan.name, plan.shape, "BF16", {"model_type": model_type}).layer
        if layer is not None:
            name = f"model-layer-{layer:04d}.safetensors"
        elif plan.source_bytes >= OWN_FILE_BYTES:
            name = f"model-{re.sub(r'[^A-Za-z0-9_]+', '-', plan.name)}.safetensors"
        else:
            name = "model-rest.safetensors"
        groups.setdefault(name, []).append(plan)
    files = (FilePlan(name, tuple(members)) for name, members in groups.items())
    # The largest first, so that no thread begins a long file when the others are done.
    return tuple(sorted(files, key=lambda file: -file.source_bytes))

"""How transformers renames and merges a checkpoint's tensors while it loads: the names, and stacks of experts, of which
nothing is merged in memory.

What: of each expert parameter of the model, the tensors that transformers would stack and concatenate, in the order in
which their numbers follow each other in the result: expert after expert, and of one expert gate before up. So a stack
is written front to back, quantised in chunks, with one tensor's chunk in memory.
Source: transformers, `conversion_mapping.py`; `rename_source_key`, `MergeModulelist`, `Concatenate`, `Transpose` in
`core_model_loading.py`. A conversion that is none of these is refused.
"""

import math
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import NamedTuple

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping

from transformers.core_model_loading import (  # isort: skip
    WeightConverter, WeightRenaming, build_glob_alternation, dot_natural_key, rename_source_key,
)  # fmt: skip
from transformers.quantizers import HfQuantizer

from halfbyte.base.store import mxfp4
from halfbyte.base.store.reading import FLOATS, SourceTensor, TensorPlan
from halfbyte.errors import BaseModelError
from halfbyte.quant import experts, formats
from halfbyte.recipe.schema import Quant


class Rule(NamedTuple):
    """How tensors become another one."""

    pattern: str  # which of the converter's patterns a tensor's name holds
    converter: WeightConverter  # its patterns, in the order in which their tensors are taken, and its operations


def renamed(
    model: nn.Module, names: Iterable[str], state: Mapping[str, object], quantiser: HfQuantizer | None = None
) -> dict[str, tuple[str, Rule | None]]:
    """Name in a checkpoint -> (the model's name, the rule that changes the tensor on the way if any); in the order in
    which transformers loads them.

    Args:
        model: any module; the names of one that is not transformers' stay as they are.
        state: the names of the model's tensors, with values that are not None.
        quantiser: one that has prepared the model, which may have rules of its own.
    """
    if not hasattr(model, "base_model_prefix") or not hasattr(model, "config"):
        return {name: (name, None) for name in names}
    mapping = get_model_conversion_mapping(model, None, quantiser)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix, targets = model.base_model_prefix, {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=state)
        targets[name] = (target, None if pattern is None else Rule(pattern, by_pattern[pattern]))
    return targets


def planned_dtype(plan: Mapping[str, torch.dtype], name: str) -> torch.dtype | None:
    """transformers' own exception from a model's dtype for a tensor; `plan` has patterns, as `_get_dtype_plan`."""
    return next((dtype for p, dtype in plan.items() if build_glob_alternation([p])[0].search(name)), None)


# A tensor of the source, and the rule that takes it.
Member = tuple[SourceTensor, Rule | None]


def stack_plan(
    target: str, shape: tuple[int, ...], dtype: torch.dtype, members: list[Member], quant: Quant, halves: mxfp4.Halves
) -> TensorPlan:
    """The expert parameter `target` of the model from the tensors that transformers would make it of.

    Args:
        shape: of the parameter, (experts, out, in). dtype: what its values are cast to.
        halves: of a tensor in MXFP4 its blocks and scales.

    Raises:
        BaseModelError: they are merged in a way that is not known here, or are not what the model needs.
    """
    sources = in_order(target, members)
    packed = sources[0].dtype == mxfp4.DTYPE
    turned = is_transposed(target, sources, shape)
    if math.prod(shape) != sum(math.prod(source.shape) for source in sources) or (packed and sources[0].shape != shape):
        shapes = ", ".join(sorted({f"{source.shape}" for source in sources}))
        raise BaseModelError(
            f"{target} needs {shape}, and the checkpoint's {len(sources)} tensors for it are of shape {shapes}.",
            fix="download the checkpoint again, or check that config.json belongs to it",
        )
    unit = formats.of(quant).unit(shape, quant)
    for source in sources:
        if source.dtype not in FLOATS and not packed:
            raise BaseModelError(f"{source.name} is {source.dtype}; experts are quantised from {', '.join(FLOATS)}.")
        if math.prod(source.shape[-2:]) % unit:
            raise BaseModelError(
                f"{source.name}: an expert's matrix {source.shape[-2:]} is not whole blocks of {unit} numbers, so one "
                "expert could not be read without its neighbour.",
                fix="a smaller quant.block_size, or leave experts in 16 bits: --set 'quant.skip_modules=[experts]'",
            )
    name = experts.stored_name(target)
    return TensorPlan(name, halves[sources[0].name] if packed else sources, shape, "quantised", dtype, turned, packed)


def in_order(target: str, members: list[Member]) -> tuple[SourceTensor, ...]:
    """Sources in the order in which their numbers follow each other in the result. A converter takes a list for each of
    its patterns."""
    lists: dict[str, list[SourceTensor]] = {}
    for source, rule in members:
        lists.setdefault(rule.pattern if rule else "", []).append(source)
    converter = next((rule.converter for _, rule in members if rule is not None), None)
    operations = converter.operations if converter is not None else []
    steps, dims = [type(step).__name__ for step in operations], [getattr(step, "dim", None) for step in operations]
    if steps in ([], ["Transpose"]) and len(members) == 1:
        return (members[0][0],)
    together = [lists[pattern] for pattern in converter.source_patterns if pattern in lists] if converter else []
    known = steps == ["MergeModulelist"] or (steps == ["MergeModulelist", "Concatenate"] and dims[1] == 1)
    if not known or dims[0] != 0 or len({len(each) for each in together}) != 1:
        counts = ", ".join(f"{len(each)} of {pattern}" for pattern, each in lists.items())
        raise BaseModelError(
            f"the layout of the experts in {target} is not known: {counts}; transformers would apply "
            f"{' and '.join(steps) or 'nothing'}.",
            fix="leave experts in 16 bits: --set 'quant.skip_modules=[experts]'",
        )
    return tuple(chain.from_iterable(zip(*together, strict=True)))


def is_transposed(target: str, sources: tuple[SourceTensor, ...], shape: tuple[int, ...]) -> bool:
    """Whether one tensor holds all experts, each transposed: then transformers turns them (`Transpose`, check_dims)."""
    if len(sources) > 1:
        return False
    given = sources[0].shape
    return given != shape and given == (shape[0], shape[2], shape[1])

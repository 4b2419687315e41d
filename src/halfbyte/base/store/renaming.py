"""What a transformers model calls the tensors of a checkpoint: its own rules of renaming and merging at load.

Source: transformers, `conversion_mapping.py` and `rename_source_key` in `core_model_loading.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import nn
    from transformers.core_model_loading import WeightConverter
    from transformers.quantizers import HfQuantizer


class Rule(NamedTuple):
    """How tensors become another one.

    Args:
        pattern: which of the converter's patterns a tensor's name holds.
        converter: its patterns, in the order in which their tensors are taken, and its operations.
    """

    pattern: str
    converter: WeightConverter


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
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

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

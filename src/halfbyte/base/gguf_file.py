"""A GGUF file opened as a base in its own blocks (`quant/gguf_blocks.py`), through `from_pretrained`.

What: a state dict whose quantised weights are views of the mapped file, and a config that asks for our quantiser.
Embeddings, heads, norms and what else is no matrix of a layer are made of their values, in the compute dtype. So is a
matrix whose values a converter has changed, or whose file has it in 16 or 32 bits.
Cost: the file's header, and the embeddings' values; no page of a block is read.
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from halfbyte.base import residency
from halfbyte.base.store import conversion
from halfbyte.base.store.in_file import FileParameters
from halfbyte.base.store.reading import SourceTensor
from halfbyte.models.sources.checkpoint import Checkpoint
from halfbyte.quant import experts, loader, policy
from halfbyte.recipe.schema import Quant
from halfbyte.types import Config


@dataclass
class InBlocks:
    """What `from_pretrained` is given. `dense`: modules and stacks of experts that are made of their values."""

    config: Config
    state: dict[str, Tensor] = field(default_factory=dict)
    dense: list[str] = field(default_factory=list)


def open_blocks(checkpoint: Checkpoint, config: Config, quant: Quant, dtype: torch.dtype) -> InBlocks:
    """The base of a checkpoint whose weights stay in its GGUF file. Raises SourceError: the file is not what it was
    when its manifest was written."""
    there, opened = FileParameters(checkpoint, config), InBlocks(copy.deepcopy(config))
    modules = dict(there.model.named_modules())
    stacks = {each.path: each for each in experts.expert_parameters(there.model, quant.exempt)}
    linear = {name for name, module in modules.items() if type(module) in (nn.Linear, Conv1D)}
    linear |= {name for name, _ in loader.plain_linears(there.model, ())}
    of_stack: dict[str, list[conversion.Member]] = {}
    for name, (target, rule) in conversion.renamed(there.model, there.sources, there.model.state_dict()).items():
        home = target.rpartition(".")[0]
        if target in stacks:
            source = SourceTensor(name, "BF16", there.shapes[name], 0, Path(), 0)
            of_stack.setdefault(target, []).append((source, rule))
        elif home in linear and rule is None and policy.encoding(there.spec(name), quant) == "quantised":
            opened.state |= {f"{name}{suffix}": part for suffix, part in there.matrix(there.sources[name]).items()}
        else:
            opened.state[name] = there.values(name, dtype)
            opened.dense += [home] if home in linear and target.endswith(".weight") else []
    for target, members in of_stack.items():
        ordered = conversion.in_order(target, members)
        parts = there.stack(there.sources[source.name] for source in ordered)
        if parts is None:
            opened.dense.append(target)
            opened.state |= {source.name: there.values(source.name, dtype) for source in ordered}
        else:
            opened.state |= {f"{experts.stored_name(target)}{suffix}": part for suffix, part in parts.items()}
    as_stored = quant.model_copy(update={"skip_modules": (*quant.skip_modules, *opened.dense)})
    opened.config.quantization_config = loader.stored_config(
        as_stored, dtype, residency.heads_to_skip(config, as_stored), marked=False
    )
    return opened

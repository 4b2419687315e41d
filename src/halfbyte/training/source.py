"""What the model as it came loses on some rows: in 16 bits, or on the values of its file, before it was quantised.

Why: an adapter also repairs what its own base has lost by quantising. Beside that base alone this counts as a gain,
while the run may be worse than the model that was there before.
What: the source is opened beside the base for a moment, and reads texts by its own forward, in the base's layout.
Cost: its weights in memory, and a forward of the rows. Where they are more than may be taken it is left out, with the
reason; a base that is its source costs nothing.
"""

import gc
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from halfbyte.base import load
from halfbyte.base.config import is_quantised_already, open_config
from halfbyte.data.collate import Batches
from halfbyte.data.encoding.examples import Example
from halfbyte.layers import packing
from halfbyte.models import tensors
from halfbyte.models.sources.checkpoint import Checkpoint
from halfbyte.objectives import objective as objectives
from halfbyte.objectives.objective import Objective
from halfbyte.recipe.schema import Recipe
from halfbyte.system import accelerator, usage
from halfbyte.system.device import Device, compute_dtype
from halfbyte.training.comparison import SOURCE_SHARE, source_bytes

TOKENS = 1024  # that are read at once


def is_the_base(recipe: Recipe, checkpoint: Checkpoint) -> bool:
    """Whether the base is the model as it came: in 16 bits, in its file's own blocks, or quantised by others."""
    if not recipe.quant.quantises or recipe.quant.in_file:
        return True
    config = open_config(checkpoint.path, trust_remote_code=recipe.trust_remote_code)
    return is_quantised_already(config, checkpoint.path) or tensors.is_quantised(config.to_dict())


def costs_nothing(checkpoint: Checkpoint) -> str:
    """The number format whose base is the model as it came, in words."""
    return f"quant.type: {'gguf' if checkpoint.kind in ('gguf', 'packaged') else 'none'} would cost nothing"


def sums(
    recipe: Recipe, checkpoint: Checkpoint, objective: Objective, examples: Sequence[Example], *, machine: Device,
    most_bytes: int, layout: packing.Layout,
) -> NDArray[np.float64] | str:  # fmt: skip
    """What the source loses on rows: (rows, names), the sums that the objective's evaluation adds up; or why that was
    not measured. `most_bytes`: what its weights may take, where the base lies; `layout`: that of the base, proven."""
    if checkpoint.pickle:
        return "its weights are not in safetensors"
    quant = recipe.quant.in_type("none")
    itemsize = load.DTYPES[compute_dtype(machine, quant.compute_dtype)[0]].itemsize
    if (nbytes := source_bytes(recipe, checkpoint, itemsize)) > SOURCE_SHARE * most_bytes:
        left = f"{max(0, most_bytes) / 1e9:.2f} GB of what this run may take are left"
        return f"to open it takes {nbytes / 1e9:.2f} GB, and {left}"
    model = load.open_base(checkpoint, quant, machine, trust_remote_code=recipe.trust_remote_code).model
    packing.install(model, layout)
    texts = [(row, text) for row, example in enumerate(examples) for text in example.texts]
    most = 1 if layout == "single" else len(texts)
    batches = replace(Batches.of_rows([text for _, text in texts], TOKENS, most), lay_out=objective.collate)
    of_texts = objectives.evaluate(objective, model, batches)
    rows = np.zeros((len(examples), of_texts.shape[1]))
    np.add.at(rows, [texts[text][0] for text in batches.text_rows], of_texts)
    del model
    gc.collect()
    usage.trim()
    accelerator.reset_peaks()
    return rows

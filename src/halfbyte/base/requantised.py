"""What it costs to quantise a GGUF file that is in few bits already: told when its store is built.

Why: the file's weights lie on a grid of their own. Another grid moves them once more, on top of what the file has lost
against the model it was made from; who has that model in 16 bits should take it.
Cost: a sample of each matrix, 65,536 weights, quantised and dequantised once more: about a second for 7 billion.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import torch

from halfbyte.base.store import reading, shelf, supply
from halfbyte.models import tensors
from halfbyte.models.sources.gguf_file import NOTE
from halfbyte.quant import formats, policy

SAMPLE = 1 << 16
_PLAIN = ("F32", "F16", "BF16")


def telling(wanted: shelf.Wanted, tell: supply.Tell) -> supply.Tell:
    """`tell`, which is also told what requantising has cost, once the store of a GGUF is built."""
    kind = _file_type(wanted)
    if kind in (None, *_PLAIN):
        return tell

    def built() -> None:
        if tell.built is not None:
            tell.built()
        error, count = sampled_error(wanted)
        tell.say(
            f"its weights are in {kind}; {wanted.quant.type} changes them by {100 * error:.2f}% (relative error of "
            f"{count:,} of them), on top of what {kind} has lost; the model in 16 bits would lose only once",
            label="gguf",
        )

    return replace(tell, built=built)


def sampled_error(wanted: shelf.Wanted) -> tuple[float, int]:
    """(norm of the difference over norm of the weights, how many weights) of a sample of each matrix to be quantised.

    The weights are the checkpoint's in the compute dtype, as they are quantised.
    """
    config, held = wanted.config.to_dict(), formats.of(wanted.quant)
    lost = whole = 0.0
    count = 0
    with reading.Source(shelf.source_files(wanted.checkpoint)) as source:
        for tensor in source.tensors.values():
            spec = tensors.spec_of(tensor.name, tensor.shape, tensor.dtype, config)
            if policy.encoding(spec, wanted.quant) != "quantised":
                continue
            unit = held.unit(tensor.shape, wanted.quant)
            numel = min(max(SAMPLE // unit, 1) * unit, spec.numel)
            kind = reading.torch_dtypes()[tensor.dtype]
            raw = np.empty(numel * kind.itemsize, np.uint8)
            source.read(tensor, 0, raw.data)
            values = torch.from_numpy(raw).view(kind).to(wanted.dtype)
            encoder = held.encoder(wanted.quant, tensor.shape, wanted.dtype, tensor.name)
            again = encoder.decoded(encoder.codes(0, values), 0, torch.empty_like(values)).double()
            exact = values.double()
            lost += float((again - exact).square().sum())
            whole += float(exact.square().sum())
            count += numel
    return math.sqrt(lost / whole) if whole else 0.0, count


def _file_type(wanted: shelf.Wanted) -> str | None:
    """The type that holds most of a GGUF's weights; None for another source."""
    note = wanted.checkpoint.path / NOTE
    if wanted.checkpoint.kind not in ("gguf", "packaged") or not note.is_file():
        return None
    kind = json.loads(note.read_text(encoding="utf-8")).get("type")
    return kind if isinstance(kind, str) else None

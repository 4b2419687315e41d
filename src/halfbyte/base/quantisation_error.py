"""What quantising changes: each matrix of a source beside what its store holds, one at a time; and a quick sample.

The sample is for a GGUF file that is in few bits already: its weights lie on a grid of their own, and another grid
moves them once more, on top of what the file has lost against the model that it was made from.
Cost: the source is read once, front to back, past the page cache; memory of the largest matrix, a few times. The sample
takes 65,536 weights of each matrix: about a second for 7 billion.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from halfbyte.base.store import layout, shelf, supply
from halfbyte.base.store.encode import TensorReader
from halfbyte.base.store.reading import Source, TensorPlan
from halfbyte.errors import StoreError
from halfbyte.models import tensors
from halfbyte.models.sources.gguf_file import NOTE
from halfbyte.quant import experts, formats, policy
from halfbyte.quant.number_format import torch_dtypes
from halfbyte.system import pages
from halfbyte.types import Model

SAMPLE = 1 << 16
_16_BITS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Matrix:
    """One quantised matrix."""

    name: str  # its module's full name; an expert's with its number at the end
    source: Tensor  # (out, in) in the compute dtype; an expert's in its stack's order
    quantised: Tensor  # the same as training multiplies with it. It lies in memory that the next matrix overwrites

    def difference(self) -> Tensor:
        """source - quantised: (out, in) fp32."""
        return self.source.to(torch.float32, copy=True).sub_(self.quantised)


def matrices(model: Model, spec: shelf.StoreSpec, *, with_experts: bool = False) -> Iterator[Matrix]:
    """Every matrix of an open base that is quantised, in the order of the source's files.

    Args:
        model: opened from the store of `spec`, without adapters, mapped or not. Pages of a mapped one are let go.
        with_experts: each expert of a stack too.

    Raises:
        CannotHold: the source's matrices are not the model's: transformers merges or splits them.
        StoreError: the source has changed while it was read.
    """
    source, modules = supply.open_source(spec), dict(model.named_modules())
    stacks = {experts.stored_name(path): (path, stack) for path, stack in experts.stacks(model)}
    plans = [plan for file in layout.lay_out(source.tensors, spec).files for plan in file.tensors]
    plans = [plan for plan in plans if plan.encoding == "quantised" and (plan.target or with_experts)]
    maps = pages.FileMaps.read()
    with source:
        for plan in sorted(plans, key=lambda plan: (plan.sources[0].file, plan.sources[0].start)):
            for e, matrix in enumerate(_sources(source, spec, plan)):
                if not plan.target:
                    path, stack = stacks[plan.name]
                    yield Matrix(f"{path}.{e}", matrix, stack.expert(e, spec.dtype).to("cpu"))
                    pages.let_go([stack.of_expert(e)[0]], maps)
                    continue
                name = plan.target.removesuffix(".weight")
                module = modules[name]
                yield Matrix(name, matrix, formats.of_module(module).weight(module, spec.dtype).to("cpu"))
                pages.let_go([module.weight.data], maps)
    if changed := source.changed():
        raise StoreError(
            f"{changed[0]} was changed while it was read.", fix="run the same command again when the file is complete"
        )


def _sources(source: Source, spec: shelf.StoreSpec, plan: TensorPlan) -> Iterator[Tensor]:
    """A matrix of the source as it was quantised, or each expert of a stack: (out, in), in the dtype that is computed
    in. What is yielded is not used again."""
    rows, columns = plan.shape[-2:]
    matrix, filled = torch.empty(rows * columns, dtype=plan.dtype), 0
    for _, values in TensorReader(source, spec.quant).chunks(plan):
        while len(values):
            some = values[: len(matrix) - filled]
            matrix[filled : filled + len(some)] = some
            filled, values = filled + len(some), values[len(some) :]
            if filled == len(matrix):
                yield matrix.view(rows, columns)
                matrix, filled = torch.empty_like(matrix), 0


def tell_gguf_error(spec: shelf.StoreSpec, tell: supply.Tell) -> supply.Tell:
    """`tell`, which also says what quantising has cost once the store of a GGUF in few bits is built."""
    file_type = _gguf_type(spec)
    if file_type in (None, *_16_BITS):
        return tell

    def built() -> None:
        if tell.built is not None:
            tell.built()
        error, count = sampled_error(spec)
        tell.say(
            f"its weights are in {file_type}; {spec.quant.type} changes them by {100 * error:.2f}% (relative error of "
            f"{count:,} of them), on top of what {file_type} has lost; the model in 16 bits would lose only once",
            label="gguf",
        )

    return replace(tell, built=built)


def sampled_error(spec: shelf.StoreSpec) -> tuple[float, int]:
    """(norm of the difference over norm of the weights, how many weights) of a sample of each matrix to be quantised.
    The weights are the checkpoint's in the compute dtype, as they are quantised."""
    config, number_format = spec.config.to_dict(), formats.of(spec.quant)
    lost = whole = 0.0
    count = 0
    with Source(shelf.source_files(spec.checkpoint)) as source:
        for tensor in source.tensors.values():
            tensor_spec = tensors.spec_of(tensor.name, tensor.shape, tensor.dtype, config)
            if policy.encoding(tensor_spec, spec.quant) != "quantised":
                continue
            unit = number_format.unit(tensor.shape, spec.quant)
            numel = min(max(SAMPLE // unit, 1) * unit, tensor_spec.numel)
            kind = torch_dtypes()[tensor.dtype]
            raw = np.empty(numel * kind.itemsize, np.uint8)
            source.read(tensor, 0, raw.data)
            values = torch.from_numpy(raw).view(kind).to(spec.dtype)
            encoder = number_format.encoder(spec.quant, tensor.shape, spec.dtype, tensor.name)
            decoded = encoder.decoded(encoder.codes(0, values), 0, torch.empty_like(values)).double()
            exact = values.double()
            lost += float((decoded - exact).square().sum())
            whole += float(exact.square().sum())
            count += numel
    return math.sqrt(lost / whole) if whole else 0.0, count


def _gguf_type(spec: shelf.StoreSpec) -> str | None:
    """The type that holds most of a GGUF's weights; None for another source."""
    note = spec.checkpoint.path / NOTE
    if spec.checkpoint.kind not in ("gguf", "packaged") or not note.is_file():
        return None
    kind = json.loads(note.read_text(encoding="utf-8")).get("type")
    return kind if isinstance(kind, str) else None

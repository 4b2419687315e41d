"""What a number format of frozen weights has to say: its bytes, its tensors on disk, its layer and how that is read.

Planning, storing, loading and computing ask the same object, so that a new format is a new file, a line in
`formats.py` and one in `recipe/number_formats.py` (what a recipe and a plan say of it), and no new `if`.
`NumberFormat` itself is the format `none`: weights in 16 bits, in plain layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from halfbyte.recipe.schema import Quant
from halfbyte.types import Config, Document

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn
    from transformers.utils.quantization_config import QuantizationConfigMixin

    from halfbyte.models.tensors import TensorSpec


@dataclass(frozen=True)
class StoredPart:
    """One tensor that a quantised matrix becomes on disk; dtypes as in safetensors. `nbytes`: None where it is known
    only when the matrix is encoded; `likely_bytes` is then what to plan with."""

    suffix: str  # what its name adds to the matrix's name: `.absmax`; with `beside_weight` it replaces `weight`: `SCB`
    dtype: str
    shape: tuple[int, ...]
    nbytes: int | None
    likely_bytes: int = 0
    beside_weight: bool = False

    def name(self, matrix: str) -> str:
        """The tensor's name, for a matrix's."""
        return (matrix.removesuffix("weight") if self.beside_weight else matrix) + self.suffix


@dataclass(frozen=True)
class Nested:
    """Scales in 8 bits: values[code] x scales[number // block] + offset. values: (256,), scales: fp32."""

    values: Tensor
    scales: Tensor
    block: int
    offset: float


@dataclass(frozen=True)
class Codes:
    """A weight in 4 bits as a kernel takes it.

    Args:
        packed: two codes a byte, the earlier in its upper half, (n / 2,) uint8. scales: (n / block,) fp32, or uint8
        where they are nested. values: of the 16 codes, fp32. shape: (out, in). dtype: what a value times its scale is
        rounded to.
    """

    packed: Tensor
    scales: Tensor
    values: Tensor
    shape: tuple[int, int]
    block: int
    dtype: torch.dtype
    nested: Nested | None = None


@dataclass(frozen=True)
class BlockRows:
    """A weight in GGUF's blocks as a kernel takes it: codes (rows, bytes of a row), their type's number, weights
    of a block, (out, in); `order`: which of the rows each one is, int32."""

    codes: Tensor
    kind: int
    weights: int
    shape: tuple[int, int]
    order: Tensor | None


class MatrixEncoder(Protocol):
    """One matrix on its way into a format, in chunks of whole `NumberFormat.unit`s."""

    def codes(self, first: int, values: Tensor) -> np.ndarray:
        """The bytes of the codes of `values`, the elements from `first` on. Raises BaseModelError: NaN or Inf among the
        values: they would turn a whole block into nonsense."""

    def decoded(self, codes: np.ndarray, first: int, out: Tensor) -> Tensor:
        """Fill `out` with what the codes just made of the elements from `first` on stand for, in scales of full
        precision."""

    def code_bytes(self, first: int) -> int:
        """Where the codes of element `first` begin."""

    def parts(self) -> dict[str, Tensor]:
        """What is stored beside the codes, by suffix, once all are made."""


@dataclass(frozen=True)
class NumberFormat:
    """A format by its name in a recipe. A matrix's `shape` is (out, in), or (experts, out, in)."""

    name: str
    source: str = "itemsize x weights"  # where its bytes come from, as a plan says it
    speed: float = 1.0  # of dequantising, in weights a second, beside that of NF4, which a machine is measured with

    def nbytes(self, shape: tuple[int, ...], quant: Quant) -> int:
        """Bytes of one quantised matrix in memory."""
        raise NotImplementedError(self.name)

    def takes(self, spec: TensorSpec) -> bool:
        """Whether a tensor of a checkpoint can be held in this format."""
        return True

    def nbytes_of(self, spec: TensorSpec, quant: Quant) -> int:
        """`nbytes` of a tensor of a checkpoint, where it says more than its shape."""
        return self.nbytes(spec.out_in, quant)

    def parts(self, shape: tuple[int, ...], quant: Quant) -> tuple[StoredPart, ...]:
        """The tensors of one quantised matrix on disk, the codes first."""
        raise NotImplementedError(self.name)

    def unit(self, shape: tuple[int, ...], quant: Quant) -> int:
        """How many weights are encoded together: those that share a scale."""
        raise NotImplementedError(self.name)

    def encoding_bytes(self, count: int, shape: tuple[int, ...], quant: Quant) -> int:
        """Bytes that encoding holds beside `count` weights of a matrix, while they are encoded at once."""
        raise NotImplementedError(self.name)

    def encoder(self, quant: Quant, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> MatrixEncoder:
        """For a matrix whose weights are later dequantised to `dtype`; `name` is what an error calls it."""
        raise NotImplementedError(self.name)

    def layer(self, parts: Mapping[str, Tensor], shape: tuple[int, int], quant: Quant, dtype: torch.dtype) -> nn.Module:
        """A layer without a bias that holds one quantised matrix, right in training and evaluation. All that belongs
        to the matrix is the layer's `weight` or an attribute of that, so that a loader can put it into another layer.

        Args:
            parts: the tensors of `parts`, by suffix, where they are to stay: nothing is copied.
            shape: (out, in). dtype: what it multiplies in.
        """
        raise NotImplementedError(self.name)

    def empty_layer(self, shape: tuple[int, int], quant: Quant, dtype: torch.dtype) -> nn.Module:
        """The same on the meta device, whose weight a loader fills in."""
        import torch

        kinds = torch_dtypes()
        parts = self.parts(shape, quant)
        empty = {part.suffix: torch.empty(part.shape, dtype=kinds[part.dtype], device="meta") for part in parts}
        return self.layer(empty, shape, quant, dtype)

    def stack(
        self, parts: Mapping[str, Tensor], shape: tuple[int, ...], quant: Quant, dtype: torch.dtype
    ) -> nn.Parameter:
        """The same for the experts of a layer, (experts, a, b), as one parameter (`stack.py`). `dtype`: what an expert
        is dequantised to."""
        raise NotImplementedError(self.name)

    def expert(self, module: nn.Module, e: int, out: Tensor) -> Tensor:
        """Dequantise one expert of the stack that a module has as its weight into `out`, (a, b) contiguous."""
        raise NotImplementedError(self.name)

    def divided(self, module: nn.Module) -> tuple[Tensor, ...]:
        """What grows with the number of a stack's experts, in their order: codes, and a scale for each row or block."""
        raise NotImplementedError(self.name)

    def load_config(
        self, quant: Quant, dtype: torch.dtype, head_names: Iterable[str] = ()
    ) -> QuantizationConfigMixin | None:
        """What `from_pretrained` needs to quantise while it loads; None if nothing is quantised, and for a format that
        transformers does not know: then our own quantiser does it (`loader.py`).

        Args:
            head_names: modules that transformers would skip by default (the output head); naming any module of one's
                own replaces that default (`transformers/quantizers/base.py`, `get_modules_to_not_convert`), so both
                are given.
        """
        return None

    def settings_of(self, config: Config) -> Document | None:
        """The fields of `Quant` that stand for a `BitsAndBytesConfig`, but modules; None for one of another format."""
        return None

    def rounds_inputs(self, quant: Quant) -> bool:
        """Whether a layer's input is rounded. Experts are no layers: theirs never is."""
        return False

    def without_rounding(self, model: nn.Module) -> AbstractContextManager[None]:
        """A model whose inputs are not rounded, for comparisons that a rounding the other way would drown."""
        return nullcontext()

    def settle(self, model: nn.Module) -> None:
        """Make upstream's layers in this format safe to train and evaluate in turns, whoever made the model."""

    def holds(self, module: nn.Module) -> bool:
        """Whether a layer's weight is there, in this format."""
        return False

    def weight(self, module: nn.Module, dtype: torch.dtype) -> Tensor:
        """The (out, in) matrix that a layer multiplies with. To be used at once: a dequantised one is in memory that
        the next call overwrites. `dtype`: what it will be multiplied in. A format whose layers have a dtype of their
        own returns that."""
        return module.weight

    def pieces(self, module: nn.Module, dtype: torch.dtype, rows: int) -> Iterator[Tensor]:
        """`weight`, perhaps `rows` of it at a time, in their order; each to be used before the next is asked for."""
        yield self.weight(module, dtype)

    def codes(self, module: nn.Module) -> Codes | None:
        """A layer's weight in 4 bits; None in another format."""
        return None

    def block_rows(self, module: nn.Module) -> BlockRows | None:
        """A layer's weight in a file's blocks; None in another format, or where its columns are in another order."""
        return None

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        """What a layer's weight is multiplied with for an input x (..., in); x itself unless it is rounded."""
        return x

    def multiplies_in(self, module: nn.Module, dtype: torch.dtype) -> bool:
        """Whether a layer multiplies in `dtype` in its own forward, so that no cast is left out."""
        return bool(module.weight.dtype == dtype)

    def upstream_is_right(self, module: nn.Module) -> bool:
        """Whether a layer's own forward computes with the right weights on this machine."""
        return True

    def beside(self, module: nn.Module) -> Iterator[tuple[object, str]]:
        """(owner, attribute) of each tensor that a layer's weight needs and that is no parameter."""
        return iter(())

    def definition(self, module: nn.Module, positions: np.ndarray) -> np.ndarray:
        """The numbers at these positions of a layer's flat weight, as the format defines them: (n,) fp64."""
        raise NotImplementedError(self.name)

    def kind_of(self, module: nn.Module) -> tuple[object, ...]:
        """What a proof must see one of: layers that are dequantised in the same way. Begins with the shape."""
        raise NotImplementedError(self.name)

    def distrust(self, module: nn.Module) -> None:
        """Dequantise what is held as this layer in a slower way from now on, where there is one."""


def torch_dtypes() -> dict[str, torch.dtype]:
    """safetensors' names of the dtypes that a checkpoint may hold, and torch's."""
    import torch

    return {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
        "BOOL": torch.bool,
    }  # fmt: skip


def own_weight(module: nn.Module) -> object:
    """The weight that a layer holds itself, or None. Not by attribute: PEFT's wrapper of trained rows would make its
    whole matrix for the question."""
    attributes = vars(module)
    return attributes["weight"] if "weight" in attributes else attributes.get("_parameters", {}).get("weight")

"""One object for each number format: its bytes are those on disk and in memory, and no caller needs to know which."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import TrainableTokensWrapper
from torch import nn

from halfbyte.layers.lora_linear import frozen_linear
from halfbyte.quant import formats, policy
from halfbyte.quant.number_format import NumberFormat
from halfbyte.recipe import number_formats
from halfbyte.recipe.schema import Quant
from tests.quant.test_dequantise import layer


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(
    ("numel", "block_size"), [(64, 64), (64 * 256 * 3, 64), (64 * 256 + 1, 64), (4097, 128), (12345, 64)]
)
def test_4bit_bytes_are_those_of_bitsandbytes(numel: int, block_size: int, double_quant: bool) -> None:
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(
        torch.randn(numel), blocksize=block_size, quant_type="nf4", compress_statistics=double_quant
    )
    held = [packed, state.absmax, state.code]
    if double_quant:
        held += [state.state2.absmax, state.state2.code, state.offset]
    quant = Quant(double_quant=double_quant).model_copy(update={"block_size": block_size})
    assert formats.of(quant).nbytes((numel,), quant) == sum(t.numel() * t.element_size() for t in held)


def test_no_matrix_is_made_to_see_which_format_it_is_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's wrapper of trained rows merges them into a copy of the whole embedding for whoever reads its `weight`."""
    wrapper = TrainableTokensWrapper(nn.Embedding(8, 4), "default", [1, 2])
    monkeypatch.setattr(TrainableTokensLayer, "get_merged_weights", lambda *args: pytest.fail("a copy was made"))
    assert [formats.of_module(m) for m in wrapper.modules()] == [formats.NONE] * len(list(wrapper.modules()))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("numel", [64 * 256, 12345, 7])
def test_on_disk_a_matrix_is_what_it_is_in_memory_and_its_state(numel: int, double: bool, kind: str) -> None:
    quant = Quant(type=kind, double_quant=double)
    parts = formats.of(quant).parts((numel,), quant)
    offset = 4 if double else 0  # in memory a tensor; on disk a number of the state
    assert sum(part.nbytes or 0 for part in parts) == formats.of(quant).nbytes((numel,), quant) - offset
    assert [part.suffix for part in parts if part.nbytes is None] == [f".quant_state.bitsandbytes__{kind}"]
    values = torch.randn(numel)
    encoder = formats.of(quant).encoder(quant, (numel,), values.dtype, "x")
    encoder.codes(0, values)
    made = {name: tuple(value.shape) for name, value in encoder.parts().items()}
    assert made.keys() == {part.suffix for part in parts[1:]}
    assert all(made[part.suffix] == part.shape for part in parts[1:] if part.nbytes is not None)


def test_every_type_of_a_recipe_has_a_format() -> None:
    assert set(formats.FORMATS) == set(number_formats.FORMATS)
    assert [name for name in formats.FORMATS if Quant(type=name).quantises] == [f.name for f in formats.QUANTISING]
    assert formats.of(Quant(type="none")).load_config(Quant(type="none"), torch.bfloat16) is None


def test_the_format_of_a_layer_is_read_off_it() -> None:
    for kind in ("nf4", "fp4"):
        assert formats.of_module(layer((64, 64), kind, True)).name == kind
    plain = nn.Linear(4, 4)
    assert not formats.is_quantised(plain) and not formats.is_quantised(nn.Identity())
    assert formats.of_module(plain).weight(plain, torch.float32) is plain.weight


@dataclass(frozen=True)
class Halved(NumberFormat):
    """A format of this test: a layer that holds half of its weights."""

    def nbytes(self, shape: tuple[int, ...], quant: Quant) -> int:
        return 3 * math.prod(shape)

    def holds(self, module: nn.Module) -> bool:
        return getattr(module, "halved", False)

    def weight(self, module: nn.Module, dtype: torch.dtype) -> torch.Tensor:
        return 2 * module.weight


def test_a_new_format_is_a_class_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Policy and layers ask the registry alone."""
    halved = Halved("halved")
    monkeypatch.setattr(formats, "QUANTISING", (*formats.QUANTISING, halved))
    monkeypatch.setitem(formats.FORMATS, "halved", halved)
    made, x = nn.Linear(6, 3).requires_grad_(False), torch.randn(2, 6)
    right = made(x)
    with torch.no_grad():
        made.weight /= 2
    made.halved = True
    assert torch.allclose(frozen_linear(x, made), right, atol=1e-6)
    from halfbyte.models.tensors import TensorSpec

    quant = Quant().model_copy(update={"type": "halved"})
    assert policy.encoded_bytes(TensorSpec("a.weight", (3, 6), "BF16", "linear", 0), quant, 2) == 54

"""The proof of dequantising passes on what is right, catches what is wrong, and leaves the right way in its place."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from halfbyte.errors import BaseModelError
from halfbyte.proofs.dequantising import prove_dequantised
from halfbyte.quant import dequantise
from halfbyte.quant.number_format import Codes
from tests.quant.test_dequantise import assert_is, by_definition, layer, needs_avx512


@pytest.fixture(autouse=True)
def trusting() -> Iterator[None]:
    dequantise._distrusted.clear()
    yield
    dequantise._distrusted.clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_what_is_right_passes(kind: str, dtype: torch.dtype) -> None:
    shapes = ((64, 96), (7, 33), (5, 2), (512, 4544), (64, 96))
    model = nn.Sequential(*(layer(shape, kind, double, dtype) for shape in shapes for double in (True, False)))
    proof = prove_dequantised(model)
    assert proof.ok and proof.reason.startswith("8 shapes"), proof
    assert not dequantise.is_distrusted(kind, dtype)


def test_a_model_without_quantised_layers_passes() -> None:
    assert prove_dequantised(nn.Sequential(nn.Linear(8, 8))).ok


@needs_avx512
@pytest.mark.parametrize("double", [True, False])
def test_the_fault_of_bitsandbytes_is_caught_and_goes_round(double: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The C function called as bitsandbytes calls it, with the rows of the matrix."""
    made = layer((64, 96), "nf4", double)
    native = dequantise.c_dequantise("nf4", "bf16")
    assert native is not None

    def by_rows(codes: Any, scales: Any, out: Any, block: Any, rows: Any, columns: Any) -> None:
        native(codes, scales, out, block, ctypes.c_longlong(64), ctypes.c_longlong(96))

    monkeypatch.setattr(dequantise, "c_dequantise", lambda kind, dtype: by_rows if kind else None)
    model = nn.Sequential(layer((64, 64), "nf4", double), made)
    proof = prove_dequantised(nn.Sequential(made))
    assert not proof.ok and "(64, 96)" in proof.reason and "slower" in proof.reason
    for module in model:
        assert_is(dequantise.dequantised(module), by_definition(module))
    assert dequantise.upstream_is_wrong(model[0].weight.quant_state)


def test_a_wrong_scale_is_caught_and_goes_round(monkeypatch: pytest.MonkeyPatch) -> None:
    made = layer((64, 96), "nf4", True)
    native = dequantise.c_dequantise("", "fp32")
    assert native is not None

    def nearly(table: Any, codes: Any, outer: Any, out: Any, *sizes: Any) -> None:
        native(table, codes, outer, out, *sizes)
        ctypes.c_float.from_address(out.value + 4 * 50).value += 0.1

    monkeypatch.setattr(dequantise, "c_dequantise", lambda kind, dtype: None if kind else nearly)
    assert not prove_dequantised(nn.Sequential(made)).ok
    assert_is(dequantise.dequantised(made), by_definition(made))


@needs_avx512
def test_a_wrong_number_of_our_kernel_is_caught_and_goes_round(monkeypatch: pytest.MonkeyPatch) -> None:
    from halfbyte.quant import four_bit_cpu as codes

    right, made = codes.write, layer((64, 128), "nf4", True)

    def nearly(given: Codes, out: Tensor) -> Tensor:
        right(given, out).view(-1)[70] += 0.5
        return out

    monkeypatch.setattr(codes, "write", nearly)
    proof = prove_dequantised(nn.Sequential(made))
    assert not proof.ok and "(64, 128)" in proof.reason
    assert_is(dequantise.dequantised(made), by_definition(made))


@pytest.mark.parametrize("place", [0, 64 * 96 // 2, 64 * 96 - 1])
def test_one_wrong_number_is_caught(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = layer((64, 96), "nf4", True)
    native = dequantise.c_dequantise("nf4", "bf16")
    assert native is not None

    def nearly(codes: Any, scales: Any, out: Any, *sizes: Any) -> None:
        native(codes, scales, out, *sizes)
        number = ctypes.c_uint16.from_address(out.value + 2 * place)
        number.value += 2  # two units in the last place

    monkeypatch.setattr(dequantise, "c_dequantise", lambda kind, dtype: nearly if kind else None)
    assert not prove_dequantised(nn.Sequential(made)).ok
    assert_is(dequantise.dequantised(made), by_definition(made))


def test_weights_that_cannot_be_read_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = layer((64, 96), "nf4", True)

    def wrong(codes: Any, scales: Any, out: torch.Tensor, block_size: int, kind: str) -> None:
        out.fill_(float("nan"))

    monkeypatch.setattr(dequantise, "c_dequantise", lambda kind, dtype: None)
    monkeypatch.setattr(dequantise, "write_by_table", wrong)
    with pytest.raises(BaseModelError, match=r"\(64, 96\) cannot be dequantised"):
        prove_dequantised(nn.Sequential(made))

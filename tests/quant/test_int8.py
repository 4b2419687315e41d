"""LLM.int8's weights: bits, bytes and products against the definition in numpy and against bitsandbytes itself."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from halfbyte.errors import BaseModelError
from halfbyte.layers.lora_linear import frozen_linear, lora_linear
from halfbyte.proofs.dequantising import prove_dequantised
from halfbyte.quant import formats, int8
from halfbyte.quant.bnb import held_tensors, resident_bytes, state_tensors
from halfbyte.recipe.schema import Quant

QUANT = Quant(type="int8")
HELD = formats.of(QUANT)
# Half a unit in the last place, relative; beside it three roundings in fp32 (1 / 127, scale and product).
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(64, 96), (1, 1), (7, 33), (5, 2), (3, 4544), (513, 300), (2, 150_000)]


def weights(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    values = torch.randn(shape, generator=generator)
    if shape[0] > 2:
        values[1] *= 30.0
        values[2] = 0.0
    return values.to(dtype)


def upstream(shape: tuple[int, int], threshold: float = int8.EVERY_COLUMN, *, bias: bool = False) -> Any:
    """bitsandbytes' own layer, quantised by itself."""
    made = bnb.nn.Linear8bitLt(shape[1], shape[0], bias, has_fp16_weights=False, threshold=threshold)
    made.weight = bnb.nn.Int8Params(weights(shape), requires_grad=False).to("cpu")
    return made.requires_grad_(False)


def layer(shape: tuple[int, int], threshold: float = int8.EVERY_COLUMN, *, bias: bool = False) -> Any:
    made = upstream(shape, threshold, bias=bias)
    formats.settle(nn.Sequential(made))
    return made


def by_definition(made: Any) -> np.ndarray:
    """LLM.int8, equation 3 by rows: code x absmax / 127, in fp64."""
    codes = made.weight.data.numpy().astype(np.float64)
    return codes * made.weight.SCB.numpy().astype(np.float64)[:, None] / 127


def rounded_by_definition(x: np.ndarray, threshold: float) -> np.ndarray:
    made = np.empty_like(x)
    for i, row in enumerate(x):
        small = np.abs(row) < threshold if threshold else np.ones(len(row), bool)
        step = np.abs(row[small]).max(initial=0.0) / 127
        made[i] = np.where(small, np.rint(row / step) * step if step else row, row)
    return made


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_dequantised_rightly(shape: tuple[int, int], dtype: torch.dtype) -> None:
    made = layer(shape)
    got, wanted = HELD.weight(made, dtype), by_definition(made)
    assert got.dtype == dtype and got.shape == torch.Size(shape)
    subnormal = 2.0**-25 if dtype == torch.float16 else 0.0
    allowed = np.abs(wanted) * (ROUNDING[dtype] + 3 * 2.0**-24) + subnormal
    assert (np.abs(got.double().numpy() - wanted) <= allowed).all()
    assert np.allclose(HELD.definition(made, np.arange(wanted.size)), wanted.reshape(-1), rtol=1e-15, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 96), (7, 33), (1, 1)])
def test_codes_and_scales_are_those_of_bitsandbytes_in_any_chunks(shape: tuple[int, int], dtype: torch.dtype) -> None:
    values = weights(shape, dtype)
    theirs = bnb.nn.Int8Params(values.clone(), requires_grad=False).to("cpu")
    encoder, unit = HELD.encoder(QUANT, shape, dtype, "x"), HELD.unit(shape, QUANT)
    codes = np.empty(shape[0] * shape[1], np.int8)
    for first in range(0, values.numel(), 5 * unit):
        part = encoder.codes(first, values.view(-1)[first : first + 5 * unit]).reshape(-1)
        codes[encoder.code_bytes(first) :][: len(part)] = part
    assert torch.equal(torch.from_numpy(codes).view(shape), theirs.data)
    assert torch.equal(encoder.parts()["SCB"], theirs.SCB)


def test_bytes_in_memory_and_on_disk() -> None:
    made = layer((7, 33))
    assert resident_bytes(made) == HELD.nbytes((7, 33), QUANT) == 7 * 33 + 4 * 7
    state = made.state_dict()
    parts = {part.name("weight"): part for part in HELD.parts((7, 33), QUANT)}
    assert parts.keys() == state.keys()
    assert all(parts[n].shape == tuple(t.shape) and parts[n].nbytes == t.nbytes for n, t in state.items())
    assert [part.name("a.up_proj.weight") for part in parts.values()] == [
        "a.up_proj.weight", "a.up_proj.SCB", "a.up_proj.weight_format",
    ]  # fmt: skip


@pytest.mark.parametrize(("value", "words"), [(float("nan"), "holds nan"), (1e5, "whose largest number is 65504")])
def test_a_weight_that_fp16_does_not_hold_is_refused_by_its_place(value: float, words: str) -> None:
    values = weights((8, 64))
    values[5, 3] = value
    encoder = HELD.encoder(QUANT, (8, 64), values.dtype, "layers.2.up_proj.weight")
    with pytest.raises(BaseModelError, match=r"layers\.2\.up_proj\.weight holds .* at \(5, 3\)") as error:
        encoder.codes(2 * 64, values[2:].reshape(-1))
    assert words in error.value.message


def test_plain_bitsandbytes_evaluates_another_function_than_it_trains() -> None:
    """Why there is a layer of ours. When it fails, upstream has mended it."""
    plain, x = upstream((64, 96), threshold=6.0), torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
    trained, evaluated = plain.train()(x), plain.eval()(x)
    assert float((trained - evaluated).abs().max()) > 1e-3 * float(trained.abs().max())


@pytest.mark.parametrize("threshold", [int8.EVERY_COLUMN, 2.0, 0.0])
def test_ours_evaluates_what_it_trains_whatever_is_beside_it(threshold: float) -> None:
    made, x = layer((64, 96), threshold), torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(1))
    trained = made.train()(x)
    assert torch.equal(trained, made.eval()(x))
    beside = torch.cat([x, 100 * x], 1)
    torch.testing.assert_close(made(beside)[:, :5], trained, rtol=1e-5, atol=1e-5)


def test_without_a_threshold_ours_is_upstreams_training_bit_for_bit() -> None:
    plain = upstream((64, 96), bias=True)
    ours = copy.deepcopy(plain)
    formats.settle(nn.Sequential(ours))
    x = torch.randn(2, 5, 96, dtype=torch.bfloat16, requires_grad=True)
    theirs, y = plain.train()(x), ours.eval()(x)
    assert torch.equal(theirs, y)
    dy = torch.randn_like(y)
    assert torch.equal(*(torch.autograd.grad(each, x, dy)[0] for each in (theirs, y)))


@pytest.mark.parametrize("threshold", [0.0, 0.5, 2.0, 6.0])
def test_rounding_of_activations_is_llm_int8s_for_a_token_alone(threshold: float) -> None:
    x = 2 * torch.randn(40, 96, generator=torch.Generator().manual_seed(3))
    x[7] = 0.0
    x[8, 1:] = 0.0
    got = int8.rounded(x, threshold).double().numpy()
    wanted = rounded_by_definition(x.double().numpy(), threshold)
    # a number half way between two steps may fall to either side in fp32
    step = np.abs(np.where(np.abs(wanted) < (threshold or np.inf), wanted, 0)).max(1, keepdims=True) / 127
    over = np.abs(got - wanted)
    assert (over <= step * 1.001 + 1e-30).all() and (over > 1e-5 * np.abs(wanted) + 1e-30).mean() < 1e-3
    plain = upstream((64, 96), threshold=threshold).eval()
    ours = copy.deepcopy(plain)
    formats.settle(nn.Sequential(ours))
    for row in x[:6].half().float():  # upstream casts to fp16 first
        theirs = plain(row[None])
        # a number half way between two steps, rounded the other way, moves an output by a hundredth of one term
        atol = 2e-3 * theirs.abs().max().item()
        torch.testing.assert_close(ours(row[None]), theirs, rtol=0, atol=atol)


def test_a_threshold_changes_what_is_computed_and_nan_is_not_hidden() -> None:
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
    near, far = (layer((64, 96), threshold)(x) for threshold in (int8.EVERY_COLUMN, 0.0))
    assert not torch.equal(near, far)
    with formats.without_rounding(made := nn.Sequential(layer((64, 96), 0.0))):
        assert torch.equal(made(x), near)
    assert torch.equal(made(x), far)
    x[2, 3] = float("nan")
    assert bool(made(x)[2].isnan().all())


@pytest.mark.parametrize("threshold", [int8.EVERY_COLUMN, 1.0])
@pytest.mark.parametrize("shape", [(64, 96), (7, 33)])
def test_fused_lora_on_8_bits(shape: tuple[int, int], threshold: float) -> None:
    made = layer(shape, threshold, bias=True)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(9, shape[1], generator=generator).requires_grad_()
    a = torch.randn(4, shape[1], generator=generator).requires_grad_()
    b = torch.randn(shape[0], 4, generator=generator).requires_grad_()
    dy = torch.randn(9, shape[0], generator=generator)
    w = torch.from_numpy(by_definition(made))
    wide = [t.detach().double().requires_grad_() for t in (x, a, b)]
    limit = 0.0 if threshold == int8.EVERY_COLUMN else threshold
    base = rounded_by_definition(int8.rounded(x, threshold).detach().double().numpy(), limit) if limit else None
    through = wide[0] if base is None else wide[0] + (torch.from_numpy(base) - wide[0]).detach()  # straight through
    wanted = F.linear(through, w, made.bias.double()) + 0.5 * wide[0] @ wide[1].T @ wide[2].T
    got = lora_linear(x, made, a, b, 0.5, 0.0)
    atol = 1e-4 * wanted.detach().abs().max().item()
    torch.testing.assert_close(got.detach().double(), wanted.detach(), rtol=1e-4, atol=atol)
    ours, theirs = torch.autograd.grad(got, (x, a, b), dy), torch.autograd.grad(wanted, wide, dy.double())
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
    with torch.no_grad():
        torch.testing.assert_close(frozen_linear(x, made), made(x))


def test_a_layer_that_has_run_is_settled_too_and_its_copies_hold_all() -> None:
    plain, x = upstream((64, 96), threshold=6.0), torch.randn(3, 96)
    plain.train()(x)  # from now on upstream holds its scales in `state`
    assert plain.weight.SCB is None and not HELD.holds(plain)
    model = nn.Sequential(plain)
    formats.settle(model)
    assert HELD.holds(plain) and plain.state.SCB is None
    assert [name for _, name in state_tensors(model)] == ["SCB"]
    assert sum(t.nbytes for t in held_tensors(model)) == 64 * 96 + 4 * 64
    again = copy.deepcopy(model)
    assert torch.equal(again(x), model(x))
    assert {"0.weight", "0.SCB", "0.weight_format"} == set(model.state_dict())


def test_the_proof_sees_one_wrong_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(layer((64, 96)), layer((64, 96)), layer((7, 33)))
    proof = prove_dequantised(model)
    assert proof.ok and proof.reason.startswith("2 shapes")
    right = int8.write

    def wrong(codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        right(codes, scales, out)[-1] *= 1.02
        return out

    monkeypatch.setattr(int8, "write", wrong)
    with pytest.raises(BaseModelError, match=r"\(64, 96\), \(7, 33\) cannot be dequantised"):
        prove_dequantised(model)

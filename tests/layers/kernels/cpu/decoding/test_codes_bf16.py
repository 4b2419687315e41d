"""Products in bf16 beside fp64 sums over the format's definition; a vector has the same bits alone as among several."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from halfbyte.layers.decoding import linears
from halfbyte.layers.decoding.tape import Tape, isa
from halfbyte.layers.kernels.cpu.decoding import code_tables
from tests.layers.decoding.test_tape import SUMS, definition, multiplied, quantised, seen_by

pytestmark = pytest.mark.skipif(isa(torch.bfloat16) is None, reason="no kernels for this processor")


@pytest.mark.parametrize(("o", "d"), [(77, 192), (1, 64), (17, 576), (40, 1536), (33, 128), (250, 320)])
@pytest.mark.parametrize("nested", [True, False])
def test_a_vector_has_the_same_bits_whatever_stands_beside(o: int, d: int, nested: bool) -> None:
    layer, x = quantised(o, d, "nf4", nested, bias=o % 2 == 0), torch.randn(19, d)
    alone = np.concatenate([multiplied(layer, x[m : m + 1], torch.bfloat16) for m in range(19)])
    add = layer.bias.detach().double().numpy() if layer.bias is not None else 0.0
    wanted = seen_by(x, torch.bfloat16) @ definition(layer, torch.bfloat16).T + add
    assert np.linalg.norm(alone - wanted) < SUMS * np.linalg.norm(wanted)
    for count in (2, 3, 4, 5, 7, 8, 9, 15, 16, 19):
        assert np.array_equal(multiplied(layer, x[:count], torch.bfloat16), alone[:count])


@pytest.mark.parametrize("m", [1, 5, 8])
def test_scales_without_tables_of_bytes_in_registers_are_the_same(m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = quantised(250, 576, "nf4", True, False), torch.randn(m, 576)
    wanted = multiplied(layer, x, torch.bfloat16)
    monkeypatch.setattr(code_tables, "has_planes", lambda: False)
    assert np.array_equal(multiplied(layer, x, torch.bfloat16), wanted)


@pytest.mark.parametrize("m", [8, 11])
def test_a_product_and_lora_are_added_onto_what_is_there(m: int) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = quantised(45, 192, "nf4", True, True)

    model = get_peft_model(Holder(), LoraConfig(r=5, lora_alpha=24, target_modules=["one"]))
    layer = model.base_model.model.one
    nn.init.normal_(layer.lora_B["default"].weight)
    x, before = torch.randn(m, 192), torch.randn(m, 45)
    tape = Tape(torch.bfloat16, m)
    to, out = tape.vectors(192), tape.buffer(m, 50)[:, :45]  # rows that are further apart than they are long
    tape.norm(x, to, None)
    tape.then()
    linears.write(tape, to, [(layer, out)], add=True)
    out.copy_(before)
    tape.run()
    alone = multiplied(layer, x, torch.bfloat16)
    assert np.array_equal(out.double().numpy(), (torch.from_numpy(alone).float() + before).double().numpy())


@pytest.mark.parametrize(("o", "d"), [(77, 192), (1, 64), (17, 576), (40, 1536), (95, 320)])
@pytest.mark.parametrize("rank", [3, 16, 40])
def test_lora_has_the_same_bits_in_one_text_as_among_several(o: int, d: int, rank: int) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = quantised(o, d, "nf4", True, True)

    model = get_peft_model(Holder(), LoraConfig(r=rank, lora_alpha=24, target_modules=["one"]))
    layer = model.base_model.model.one
    nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(3, d)
    together = multiplied(layer, x, torch.bfloat16)
    for text in range(3):
        assert np.array_equal(multiplied(layer, x[text : text + 1], torch.bfloat16)[0], together[text])


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(("o", "d", "nested"), [(1, 64, True), (16, 128, False), (333, 192, True), (250, 2048, True)])
def test_each_row_is_there_on_any_number_of_threads(o: int, d: int, nested: bool, threads: int) -> None:
    layer, x, before = quantised(o, d, "nf4", nested, False), torch.randn(1, d), torch.get_num_threads()
    wanted = seen_by(x, torch.bfloat16) @ definition(layer, torch.bfloat16).T
    try:
        torch.set_num_threads(threads)
        got = multiplied(layer, x, torch.bfloat16)
    finally:
        torch.set_num_threads(before)
    assert np.linalg.norm(got - wanted) < SUMS * np.linalg.norm(wanted)


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 3)])
def test_another_number_of_threads_within_a_token(first: int, then: int) -> None:
    layer, x, before = quantised(96, 192, "nf4", True, False), torch.randn(1, 192), torch.get_num_threads()
    tape = Tape(torch.bfloat16, 1)
    to, out = tape.vectors(192), tape.buffer(1, 96)
    tape.norm(x, to, None)
    tape.then()
    linears.write(tape, to, [(layer, out)])
    try:
        torch.set_num_threads(first)
        tape.run(0, 1)
        torch.set_num_threads(then)
        tape.run(1)
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(out.double().numpy(), multiplied(layer, x, torch.bfloat16))

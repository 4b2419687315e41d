"""Holes of the heap while layers are recomputed: given back beyond a budget, and gradients stay the same bits."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from peft import LoraConfig

from halfbyte.adapters.dropin import get_peft_model, prepare_model_for_kbit_training
from halfbyte.base import heap
from halfbyte.layers import loss, packing_proof
from halfbyte.models import structure
from halfbyte.system import usage
from halfbyte.training.pace import recompute_as
from tests import tiny

pytestmark = pytest.mark.skipif(usage.heap_in_use() is None, reason="needs glibc 2.33")
MB = 1_000_000


def adapted(name: str) -> Any:
    torch.manual_seed(1)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(tiny.model(name), lora)
    packing_proof.prove(model)
    return model.train()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    model.zero_grad()
    loss.micro_batch_loss(model, tiny.batch((40, 17, 23), 256)).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What a look sees, in MB: private, in use; and how often holes were given back."""
    state = [0, 0, 0]

    def trim() -> None:
        state[0], state[2] = 100 + state[1], state[2] + 1  # 100 MB are not the heap's

    monkeypatch.setattr(usage, "now", lambda: usage.Usage(state[0] * MB, 0))
    monkeypatch.setattr(usage, "heap_in_use", lambda: state[1] * MB)
    monkeypatch.setattr(usage, "trim", trim)
    return state


def test_holes_beyond_the_budget_are_given_back_and_use_is_not_taken_for_holes(watched: list[int]) -> None:
    seen = heap.Holes()

    def look(private: int, in_use: int) -> int:
        watched[:2] = private, in_use
        seen.look()
        return watched[2]

    assert look(300, 150) == 1  # the first look begins from what cannot be given back: 100 MB beside the heap
    assert look(340, 160) == 1  # 80 MB of holes are let be
    assert look(600, 480) == 1  # more is held, and it is in use
    assert look(360, 150) == 2  # 110 MB of holes are not
    assert look(2400, 2150) == 2  # nor 150 beside 2.3 GB, of which they are a small part
    assert look(2500, 2150) == 3


def test_a_budget_that_one_layer_passes_grows(watched: list[int]) -> None:
    """Else what a layer takes and frees would be given back, and taken again page by page, after every layer."""
    seen = heap.Holes()
    for _ in range(8):  # of 250 MB freed each time
        watched[:2] = 450, 100
        seen.look()
    assert 2 <= watched[2] <= 5
    watched[:2] = 900, 100  # holes that are more than that are still given back
    seen.look()
    assert watched[0] == 200


def test_a_heap_that_is_full_of_holes_shrinks() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes, libc.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    seen = heap.Holes()
    seen.look()
    before, used = usage.now().private, usage.heap_in_use()
    blocks = [libc.malloc(100_000) for _ in range(8000)]
    for block in blocks:
        libc.memset(block, 1, 100_000)
    full = usage.heap_in_use()
    assert used is not None and full is not None and full - used > 0.9 * 800 * MB
    seen.look()
    assert usage.now().private - before > 0.9 * 800 * MB
    for block in blocks[::2]:
        libc.free(block)
    seen.look()
    left = usage.now().private - before
    for block in blocks[1::2]:
        libc.free(block)
    usage.trim()
    assert 0.45 * 800 * MB < left < 0.6 * 800 * MB


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_gradients_are_the_same_bits_where_every_look_gives_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(name)
    plain = gradients(model)
    monkeypatch.setattr(heap.Holes, "look", every := Every())
    recompute_as(model, "full")
    trimmed = gradients(model)
    layers = len(structure.decoder_layers(model))
    assert every.looks == 2 * layers  # forward and backward
    assert plain.keys() == trimmed.keys() and all(torch.equal(plain[n], trimmed[n]) for n in plain)
    recompute_as(model, "none")
    gradients(model)
    assert every.looks == 2 * layers


class Every:
    """In place of `Holes.look`: gives back whenever it is called."""

    looks = 0

    def __call__(self) -> None:
        self.looks += 1
        usage.trim()


def test_it_is_installed_once_and_by_our_import_line_too() -> None:
    model = tiny.model("llama")
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
    layer = structure.decoder_layers(model)[0]
    hooks = len(layer._forward_hooks)
    assert hooks == 2  # after its forward, and before its backward
    heap.install(model)
    assert len(layer._forward_hooks) == hooks
    heap.remove(model)
    assert not layer._forward_hooks


def test_a_model_without_a_list_of_layers_is_left_as_it_is() -> None:
    class Plain(torch.nn.Linear):
        device = torch.device("cpu")

    plain = Plain(2, 2)
    heap.install(plain)
    assert not plain._forward_hooks


def test_room_that_a_micro_batch_is_planned_to_take_is_not_given_back_after_each(watched: list[int]) -> None:
    seen = heap.Holes(room=300 * MB)
    looks = []
    for private in (350, 440, 460):  # 100 MB are not the heap's, 50 are in use
        watched[:2] = private, 50
        seen.look()
        looks.append(watched[2])
    assert looks == [1, 1, 2], "the first look begins from what cannot be given back; then 300 MB may come and go"

"""Gradients of an input that several linears read, summed in one place: against autograd's own sums, in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from halfbyte.layers import fuse, shared_input
from tests import plain_peft, tiny

TOKENS = 70


def attention_block(dtype: torch.dtype, names: list[str]) -> tuple[Any, list[nn.Module]]:
    """A model with LoRA of no dropout on some of an attention's projections, fused, and the first three of these."""
    model = plain_peft.adapt(tiny.model("llama", dtype=dtype), names)
    fuse.install(model)
    block = model.get_base_model().model.layers[0].self_attn
    return model, [block.q_proj, block.k_proj, block.v_proj]


def plain(linear: Any, x: Tensor) -> Tensor:
    """What a projection computes, by its definition in fp64."""
    base = getattr(linear, "base_layer", linear)
    y = x @ base.weight.detach().double().T
    if base is linear:
        return y
    a, b = (part["default"].weight.detach().double() for part in (linear.lora_A, linear.lora_B))
    return y + linear.scaling["default"] * (x @ a.T) @ b.T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("names", [["o_proj"], ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj"]], ids=len)
def test_the_gradient_is_the_sum_of_all_that_read(names: list[str], dtype: torch.dtype) -> None:
    _, linears = attention_block(dtype, names)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, linears[0].in_features, generator=draw).to(dtype).requires_grad_()
    outs = shared_input.read(x, linears)
    assert not hasattr(x, shared_input.SHARED)
    grads = [torch.randn(y.shape, generator=draw).to(dtype) for y in outs]
    exact = x.detach().double().requires_grad_()
    torch.autograd.backward([plain(linear, exact) for linear in linears], [g.double() for g in grads])
    assert exact.grad is not None
    for _ in range(2):  # a second time through the same graph
        x.grad = None
        torch.autograd.backward(outs, grads, retain_graph=True)
        assert x.grad is not None
        off = float((x.grad.double() - exact.grad).norm() / exact.grad.norm())
        assert off <= 8 * torch.finfo(dtype).eps, off  # each of three layers rounds the sum at most twice


@pytest.mark.parametrize("some", [0, 1, 2])
def test_a_pass_for_one_reader_alone_leaves_nothing_behind(some: int) -> None:
    _, linears = attention_block(torch.float32, ["q_proj", "k_proj", "v_proj"])
    x = torch.randn(TOKENS, linears[0].in_features, requires_grad=True)
    wanted = torch.autograd.grad(sum(linear(x).sum() for linear in linears), x)[0]
    outs = shared_input.read(x, linears)
    alone: Any = linears[some]
    torch.autograd.grad((7 * outs[some]).sum(), alone.lora_B["default"].weight, retain_graph=True)
    got = torch.autograd.grad(sum(y.sum() for y in outs), x)[0]
    torch.testing.assert_close(got, wanted)


def test_what_a_hook_may_leave_out_is_not_shared() -> None:
    _, linears = attention_block(torch.float32, ["q_proj", "v_proj"])
    x = torch.randn(1, TOKENS, linears[0].in_features, requires_grad=True)
    wanted = torch.autograd.grad(sum(linear(x).sum() for linear in linears[:2]), x)[0]
    linears[2].register_forward_hook(lambda module, given, out: out.detach())
    got = torch.autograd.grad(sum(y.sum() for y in shared_input.read(x, linears)), x)[0]
    torch.testing.assert_close(got, wanted)


def test_one_reader_after_another_adds_to_one_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    shared, seen = shared_input.SharedGradient(), list[Tensor | None]()

    def add_to(total: Tensor | None) -> Tensor:
        seen.append(total)
        return torch.ones(3) if total is None else total.add_(1)

    for _ in range(3):
        shared.join()
    for number in (4, 5):
        monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda n=number: n)
        assert [shared.give(add_to) is None for _ in range(2)] == [True, True]
        assert shared.give(add_to).tolist() == [3, 3, 3]  # type: ignore[union-attr]
    assert [total is None for total in seen] == [True, False, False] * 2

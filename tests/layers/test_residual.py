"""Decoder layers with their sums and norms in one, and the last one on labelled rows alone: against the model's own
forward on all rows, whose gradients torch adds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from halfbyte.layers import fuse, loss, norm_gate, packing
from halfbyte.layers.kernels import cpu, dropout, last_layer
from halfbyte.proofs.fusing import prove_fused
from halfbyte.proofs.packing import prove_packing
from tests import plain_peft, small_models, tiny
from tests.layers.test_fuse import LENGTHS, adapted, apart, batch, gradients

pytestmark = pytest.mark.skipif(not cpu.enabled(), reason="numba does not work here")
LAYERS = ["llama", "mistral", "qwen3", "qwen2", "gemma"]
ROWS = tuple(range(3, 3 + len(LENGTHS)))


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(rows, of how many) that layers were asked for and took out."""
    found: list[tuple[int, int]] = []
    real = last_layer.LastLayerRows.select

    def spy(self: last_layer.LastLayerRows, x: Tensor) -> Tensor:
        found.append((self.count, x.shape[1]))
        return real(self, x)

    monkeypatch.setattr(last_layer.LastLayerRows, "select", spy)
    return found


@pytest.mark.parametrize("name", LAYERS)
def test_every_gradient_is_that_of_all_rows(name: str, taken: list[tuple[int, int]]) -> None:
    if name in tiny.ARCHITECTURES:
        model = adapted(name, target_modules="all-linear")
    else:
        model = plain_peft.adapt(small_models.build(name, vocab_size=256, max_position_embeddings=256), "all-linear")
        prove_packing(model)
    model.eval()
    own = gradients(model, fused=False)
    assert fuse.install(model).counts["layers"] == 2
    assert apart(gradients(model), own) < 1e-5
    labelled, tokens = len(batch()["keep"]), packing.up_to(sum(LENGTHS))
    assert taken == [(packing.up_to(labelled), tokens)] * 2, "the attention's output, and the residual"


@pytest.mark.parametrize("again", ["none", "selective", "full"])
def test_dropout_meets_the_same_numbers(
    again: str, taken: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted("llama", target_modules="all-linear", lora_dropout=0.3)
    fuse.install(model)
    fuse.recompute_cheap(model, on=again == "selective")
    if again == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    sites = dropout.sites_of(model)

    def made() -> dict[str, Tensor]:
        with dropout.row_masks(sites, torch.arange(sum(LENGTHS)), seed=1, step=2):
            return gradients(model)

    some = made()
    assert bool(taken) == (again != "full"), "a forward that is done again makes all rows"
    monkeypatch.setattr(last_layer, "rows_for", lambda module: None)
    assert apart(made(), some) < 1e-6


def test_all_labelled_and_none_labelled(taken: list[tuple[int, int]]) -> None:
    model = adapted("llama")
    fuse.install(model)
    model.eval()
    given, tokens = batch(), sum(LENGTHS)
    given["keep"] = torch.arange(tokens)
    given["targets"] = given["input_ids"][0].roll(-1)
    own = loss.micro_batch_loss(model, given, fused=False)
    torch.testing.assert_close(loss.micro_batch_loss(model, given), own, rtol=1e-5, atol=0)
    given["keep"], given["targets"] = given["keep"][:0], given["targets"][:0]
    assert float(loss.micro_batch_loss(model, given).detach()) == 0.0
    with torch.no_grad():
        assert float(loss.micro_batch_loss(model, batch())) > 0.0
    assert not taken


def test_a_hook_on_a_norm_is_called(taken: list[tuple[int, int]]) -> None:
    model = adapted("llama").eval()
    own = gradients(model, fused=False)
    fuse.install(model)
    gradients(model)  # the head is looked at once
    assert taken
    taken.clear()
    seen: list[Any] = []
    norms = [m for n, m in model.named_modules() if n.endswith("1.input_layernorm")]
    handle = norms[0].register_forward_hook(lambda *args: seen.append(args[0]))
    assert apart(gradients(model), own) < 1e-5
    assert len(seen) == 1 and not taken
    handle.remove()


def test_hidden_states_of_a_forward_are_all_there() -> None:
    model = adapted("llama")
    fuse.install(model)
    ids = batch()["input_ids"]
    states = model(input_ids=ids, output_hidden_states=True).hidden_states
    fuse.remove(model)
    plain = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert [s.shape for s in states] == [s.shape for s in plain]
    assert all(float((got - own).norm()) <= 1e-5 * float(own.norm()) for got, own in zip(states, plain, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("one_plus", [False, True])
@pytest.mark.parametrize("used", ["both", "the norm", "the sum"])
def test_a_norm_beside_its_input(dtype: torch.dtype, one_plus: bool, used: str) -> None:
    draw = torch.Generator().manual_seed(0)
    x, dx, dy, w = (torch.randn(s, generator=draw).to(dtype) for s in ((3, 7, 48), (3, 7, 48), (3, 7, 48), (48,)))
    x.requires_grad_()
    kept, y = norm_gate.residual_and_norm(x, w, 1e-5, norm_gate.NormKind(one_plus))
    assert torch.equal(kept, x)
    parts = {"both": ((kept, dx), (y, dy)), "the norm": ((y, dy),), "the sum": ((kept, dx),)}[used]
    torch.autograd.backward([p for p, _ in parts], [g for _, g in parts])
    x64 = x.detach().double().requires_grad_()
    y64 = x64 * torch.rsqrt(x64.square().mean(-1, keepdim=True) + 1e-5) * (w.double() + one_plus)
    sizes = {"both": (x64, y64), "the norm": (y64,), "the sum": (x64,)}[used]
    torch.autograd.backward(list(sizes), [g.double() for _, g in parts])
    assert x.grad is not None and x64.grad is not None
    # rounded once to the dtype; inside it is fp32
    off = float((x.grad.double() - x64.grad).norm() / x64.grad.norm())
    assert off < (2e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("n", [1, 5, 400])
def test_a_sum_in_memory_of_the_pool(n: int) -> None:
    x, y = (torch.randn(n, 64, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in (0, 1))
    made = norm_gate.residual_sum(x, y)
    assert torch.equal(made, x + y)
    made.backward(torch.full_like(made, 3.0))
    assert x.grad is not None and y.grad is not None
    assert bool((x.grad == 3).all()) and bool((y.grad == 3).all())
    assert x.grad.data_ptr() != y.grad.data_ptr(), "who adds to one must not add to the other"


def rows_of_others(patch: pytest.MonkeyPatch) -> None:
    real = last_layer.SelectRows.forward
    before = lambda ctx, x, rows, count: real(ctx, x, (rows - 1).clamp(min=0), count)  # noqa: E731
    patch.setattr(last_layer.SelectRows, "forward", before)


def lost_gradient(patch: pytest.MonkeyPatch) -> None:
    from halfbyte.layers.kernels.cpu import norm

    real = norm.norm_backward
    patch.setattr(norm, "norm_backward", lambda *args, beside=None, **kwargs: real(*args, **kwargs))


def lost_sum(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(norm_gate, "residual_sum", lambda x, y, *factor: y)


def gradient_of_a_sum_for_one(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(norm_gate.ResidualSum, "backward", lambda ctx, grad: (None, grad, None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("put_in", [rows_of_others, lost_gradient, lost_sum, gradient_of_a_sum_for_one])
def test_a_fault_here_is_seen_by_the_proof_at_start(
    put_in: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted("llama", dtype, target_modules="all-linear")
    assert prove_fused(model, packed=True).ok
    fuse.remove(model)
    put_in(monkeypatch)
    proof = prove_fused(model, packed=True)
    assert not proof.ok and "gradients differ" in proof.reason
    assert not any(isinstance(module, fuse._Fast) for module in model.modules())

"""The fast forward of experts beside transformers' own eager code under torch's autograd, in fp32."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig

from halfbyte.layers.experts import forward, sizes
from halfbyte.layers.experts.by_definition import experts_by_definition
from halfbyte.layers.experts.layout import LoraOfExperts, is_experts, stacks_of
from tests.layers.experts.stacks import hide_stacks

E, D, K, R = 5, 24, 3, 2
SIZES = {
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), E),
    **dict.fromkeys(("hidden_size", "moe_hidden_size"), D),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), 20),
}
# One of each way that a file of transformers lays its experts out.
LAYOUTS = {
    "gate and up": ("mixtral", "MixtralExperts"),
    "gelu": ("gemma4_text", "Gemma4TextExperts"),
    "clamped": ("deepseek_v4", "DeepseekV4Experts"),
    "no gate": ("nemotron_h", "NemotronHExperts"),
    "transposed": ("aria_text", "AriaExperts"),
    "transposed, interleaved, biased, clamped": ("gpt_oss", "GptOssExperts"),
    "a norm after": ("muse_spark_text", "MuseSparkExperts"),
}
ROUTES: dict[str, Callable[[], Tensor]] = {
    "odd counts": lambda: torch.stack([torch.randperm(E)[:K] for _ in range(13)]),
    "one expert has all": lambda: torch.cat([torch.full((7, 1), 3), torch.randint(3, (7, 1))], 1),
    "k = 1, some have none": lambda: torch.tensor([[1], [4], [1], [1]]),
    "one token": lambda: torch.tensor([[4, 0]]),
}


def experts_of(kind: str) -> Any:
    model_type, cls = LAYOUTS[kind]
    config = AutoConfig.for_model(model_type)
    for name, size in SIZES.items():
        if hasattr(config, name):
            setattr(config, name, size)
    config._experts_implementation = "eager"
    folder = model_type.removesuffix("_text")
    module = getattr(importlib.import_module(f"transformers.models.{folder}.modeling_{folder}"), cls)(config)
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4).requires_grad_(False)
    return module


def results(forward: Callable[..., Tensor], index: Tensor, *trained: Tensor, **kwargs: Any) -> list[Tensor]:
    """The output, and the gradients of input, routing weights and `trained`."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(len(index), D, generator=draw).requires_grad_()
    weights = torch.rand(index.shape, generator=draw).requires_grad_()
    y = forward(x, index, weights, **kwargs)
    grads = torch.autograd.grad((y * torch.randn(y.shape, generator=draw)).sum(), (x, weights, *trained))
    return [y.detach(), *grads]


def same(got: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-5) -> None:
    for number, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert float((a - b).norm()) <= tolerance * float(b.norm()), number


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("function", [forward.experts, experts_by_definition])
def test_each_layout_is_as_in_transformers(kind: str, route: str, function: Callable[..., Tensor]) -> None:
    module = experts_of(kind)
    assert is_experts(module)
    index = ROUTES[route]()
    wanted = results(module, index)
    same(results(lambda *args: function(module, *args), index), wanted)
    hide_stacks(module, stacks_of(module))
    same(results(lambda *args: function(module, *args), index), wanted)


def lora(module: Any, names: tuple[str, ...]) -> dict[str, LoraOfExperts]:
    made = {}
    for name in names:
        wide, narrow = getattr(module, name).shape[1:]
        out, into = (narrow, wide) if module.is_transposed else (wide, narrow)
        a, b = torch.randn(E * R, into) * 0.3, torch.randn(out, R * E) * 0.3
        made[name] = LoraOfExperts(a.requires_grad_(), b.requires_grad_(), 0.7)
    return made


def with_delta(module: Any, loras: dict[str, LoraOfExperts]) -> Any:
    """The module with what LoRA means in its weights: W + s B A, by PEFT's own einsum."""
    changed = copy.deepcopy(module)
    for name, one in loras.items():
        a, b = one.a.reshape(E, -1, one.a.shape[-1]), one.b.reshape(one.b.shape[0], -1, E)  # type: ignore[union-attr]
        delta = torch.einsum("o r e, e r i -> " + ("e i o" if module.is_transposed else "e o i"), b, a) * one.scale
        weight = changed._parameters.pop(name)
        setattr(changed, name, weight + delta)
    return changed


@pytest.mark.parametrize("which", ["both", "first", "second"])
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("function", [forward.experts, experts_by_definition])
def test_lora_is_what_a_changed_weight_computes(kind: str, which: str, function: Callable[..., Tensor]) -> None:
    module = experts_of(kind)
    index = ROUTES["odd counts"]()
    loras = lora(
        module, {"both": stacks_of(module), "first": stacks_of(module)[:1], "second": stacks_of(module)[1:]}[which]
    )
    trained = [part for one in loras.values() for part in (one.a, one.b) if part is not None]
    wanted = results(with_delta(module, loras), index, *trained)
    hide_stacks(module, stacks_of(module))
    same(results(lambda *args: function(module, *args, loras=loras), index, *trained), wanted)


def test_biases_that_train_get_their_gradients() -> None:
    module = experts_of("transposed, interleaved, biased, clamped")
    biases = [module.gate_up_proj_bias.requires_grad_(), module.down_proj_bias.requires_grad_()]
    index = ROUTES["one expert has all"]()
    wanted = results(module, index, *biases)
    same(results(lambda *args: forward.experts(module, *args), index, *biases), wanted)


def test_stacks_that_train_go_the_slow_way() -> None:
    module = experts_of("gate and up")
    module.down_proj.requires_grad_()
    index = ROUTES["odd counts"]()
    wanted = results(module, index, module.down_proj)
    same(results(lambda *args: forward.experts(module, *args), index, module.down_proj), wanted)


def test_only_routed_experts_are_asked_for_forward_and_backward() -> None:
    module = experts_of("gate and up")
    stacks = hide_stacks(module, stacks_of(module))
    results(lambda *args: forward.experts(module, *args), ROUTES["k = 1, some have none"]())
    assert [sorted(stack.asked) for stack in stacks] == [[1, 1, 4, 4]] * 2


def test_backward_keeps_no_weight_and_no_copy_for_each_expert() -> None:
    """Kept: the input, the inner product of each pair and of the rows that the last products are filled with, A, B and
    x A in the compute dtype, the routing weights."""
    module = experts_of("gate and up")
    loras = lora(module, stacks_of(module))
    index = ROUTES["odd counts"]()
    x, weights = torch.randn(13, D, requires_grad=True), torch.rand(13, K, requires_grad=True)
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        forward.experts(module, x, index, weights, loras=loras)
    counts = torch.bincount(index.reshape(-1), minlength=E)
    filled = torch.where(counts > 0, -(-counts // 16) * 16, 0)
    rows = int((counts.cumsum(0) - counts + filled).max())
    assert 13 * K <= rows < 13 * K + 16
    parameters = sum(t.numel() for one in loras.values() for t in (one.a, one.b))  # type: ignore[union-attr]
    turned = sum(one.b.numel() for one in loras.values())  # type: ignore[union-attr]
    assert (
        sum(t.numel() for t in kept.values()) == x.numel() + rows * (40 + 2 * R) + weights.numel() + parameters + turned
    )


def test_in_bf16_it_is_as_near_to_the_truth_as_transformers() -> None:
    module = experts_of("gate and up")
    index = torch.stack([torch.randperm(E)[:K] for _ in range(200)])
    truth = results(module, index)
    half = copy.deepcopy(module).bfloat16()

    def off(forward: Callable[..., Tensor]) -> list[float]:
        got = results(lambda x, i, w: forward(x.bfloat16(), i, w.bfloat16()).float(), index)
        return [float((a - b).norm() / b.norm()) for a, b in zip(got, truth, strict=True)]

    own, ours = off(half), off(lambda *args: forward.experts(half, *args))
    assert all(a < 1.2 * b for a, b in zip(ours, own, strict=True)), (ours, own)


@pytest.mark.parametrize("kind", ["gate and up", "transposed, interleaved, biased, clamped", "a norm after"])
def test_an_expert_with_many_tokens_is_taken_in_parts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "LEAST_AT_ONCE", 2)
    monkeypatch.setattr(sizes, "BUSIEST", 1)
    module = experts_of(kind)
    index = ROUTES["one expert has all"]()
    groups = forward.Groups.of(index, E)
    assert groups.span_rows == 16 and max(last - first for _, first, last in groups.spans) == 3
    assert [span for span in groups.spans if span[0] == 3][-1][2] == 14
    loras = lora(module, stacks_of(module))
    trained = [part for one in loras.values() for part in (one.a, one.b) if part is not None]
    wanted = results(with_delta(module, loras), index, *trained)
    same(results(lambda *args: forward.experts(module, *args, loras=loras), index, *trained), wanted)


class Products(TorchDispatchMode):
    """The sizes of every matrix product, but for the model's own."""

    def __init__(self, own: set[int]) -> None:
        super().__init__()
        self.own, self.seen = own, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.seen |= {size for part in args if isinstance(part, Tensor) for size in part.shape} - self.own
        return func(*args, **(kwargs or {}))


def test_products_have_few_shapes_however_tokens_are_spread() -> None:
    """oneDNN compiles each, and an expert with another number of tokens in each micro-batch would be another shape."""
    module = experts_of("gate and up")
    loras = lora(module, stacks_of(module))
    draw = torch.Generator().manual_seed(0)
    with Products({D, 20, 40, R}) as products:
        for tokens in (13, 40, 77, 131):
            index = torch.stack([torch.randperm(E, generator=draw)[:K] for _ in range(tokens)])
            x, weights = torch.randn(tokens, D, requires_grad=True), torch.rand(tokens, K)
            forward.experts(module, x, index, weights, loras=loras).sum().backward()
    assert products.seen <= {16, 32, 48, 64, 80, 96, 112, 128}, products.seen
    assert len(products.seen) > 2


def test_rows_are_filled_by_a_sixteenth_at_most() -> None:
    padded = [sizes.padded_rows(rows) for rows in range(1, 5000)]
    assert all(rows <= size < max(rows + 16, rows * 1.125) for rows, size in enumerate(padded, 1))
    assert len(set(padded)) < 60


def test_no_token_at_all() -> None:
    module = experts_of("gate and up")
    x, weights = torch.zeros(0, D, requires_grad=True), torch.zeros(0, K, requires_grad=True)
    y = forward.experts(module, x, torch.zeros(0, K, dtype=torch.long), weights)
    y.sum().backward()
    assert y.shape == (0, D) and x.grad is not None and weights.grad is not None

"""What the fused layers and kernels stand on in torch, peft, bitsandbytes and numba."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import numpy as np
import peft
import pytest
import torch
from torch import nn

from halfbyte.layers.kernels import cpu
from halfbyte.system import openmp


def test_a_hook_lends_a_parameter_another_dtype_and_takes_it_back_after_an_error() -> None:
    """`adapters/dropin.py`: the master gets the gradient, in its own dtype."""
    layer = nn.Linear(3, 2, bias=False)
    master = layer.weight

    def before(module: nn.Module, args: object) -> None:
        module._parameters["weight"] = master.to(torch.bfloat16)

    def after(module: nn.Module, args: object, output: object) -> None:
        module._parameters["weight"] = master

    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(after, always_call=True)
    y = layer(torch.ones(1, 3, dtype=torch.bfloat16))
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and master.grad is not None and master.grad.dtype == torch.float32
    with pytest.raises(RuntimeError):
        layer(torch.ones(1, 4, dtype=torch.bfloat16))
    assert layer.weight is master


def test_an_instance_takes_a_subclass_and_gives_it_back() -> None:
    layer = nn.Linear(3, 2)
    own = type(layer)
    cls = type(own.__name__, (own,), {"forward": lambda self, x: own.forward(self, x) * 2})
    x = torch.ones(1, 3)
    before = layer(x)
    layer.__class__ = cls
    assert torch.equal(layer(x), before * 2) and isinstance(layer, own)
    layer.__class__ = own
    assert torch.equal(layer(x), before)


def test_pefts_lora_layer_has_the_fields_that_the_fused_one_reads() -> None:
    model = nn.ModuleDict({"q": nn.Linear(4, 4)})
    layer = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q"], r=2), model)["q"]
    assert isinstance(layer, peft.tuners.lora.LoraLayer)
    for name in ("base_layer", "lora_A", "lora_B", "lora_dropout", "scaling", "active_adapters", "merged"):
        assert hasattr(layer, name), name
    assert layer.disable_adapters is False and layer.lora_variant == {} and not layer.lora_bias["default"]
    assert isinstance(layer.lora_dropout["default"], nn.Identity)


def test_torchs_flash_kernel_for_cpus_gives_the_log_sum_exp() -> None:
    q = torch.randn(1, 2, 7, 8)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q, 0.0, True, scale=0.5)
    hidden = torch.ones(7, 7, dtype=torch.bool).triu(1)
    scores = (q @ q.transpose(2, 3) * 0.5).masked_fill(hidden, float("-inf"))
    torch.testing.assert_close(out, scores.softmax(-1) @ q)
    torch.testing.assert_close(lse, scores.logsumexp(-1))


def test_torchs_openmp_runs_a_function_on_every_thread() -> None:
    torch.ones(100_000).sum()  # its OpenMP is in the process
    run = openmp.region()
    if run is None:
        pytest.skip("no OpenMP library that exports GOMP_parallel: kernels run on the calling thread")
    seen = np.zeros(1, dtype=np.int64)

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def count(_: int) -> None:
        seen[0] += 1  # under the interpreter's lock

    run(ctypes.cast(count, ctypes.c_void_p), None, 2, 0)
    assert seen[0] == 2


@pytest.mark.skipif(not cpu.enabled(), reason="numba does not work here")
def test_numba_has_the_instructions_that_the_tiles_need() -> None:
    from llvmlite import binding

    from halfbyte.layers.kernels.cpu import tiles

    assert tiles.available() == bool(binding.get_host_cpu_features().get("avx512bf16", False))


def test_torchs_integer_product_sums_exactly_into_a_given_tensor() -> None:
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-127, 128, shape, generator=draw).to(torch.int8) for shape in ((5, 77), (9, 77)))
    a[0], b[0] = 127, 127
    out = torch.empty(5, 9, dtype=torch.int32)
    assert torch._int_mm(a, b.T, out=out) is out
    assert torch.equal(out.double(), a.double() @ b.double().T)
    assert torch.equal(torch._int_mm(a, b.T.contiguous()), out)


GROWTH = """
import torch
from halfbyte.system import usage
weight, rows, out = (torch.ones(512, n).bfloat16() for n in (1024, 512, 1024))
for m in range(200, 240): torch.mm(rows[:m], weight, out=out[:m])
before = usage.now().private
for m in range(240, 440): torch.mm(rows[:m], weight, out=out[:m])
print(usage.now().private - before)
"""


@pytest.mark.skipif(
    not (sys.platform == "linux" and torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()),
    reason="products in bf16 are oneDNN's where the processor has them",
)
def test_torch_keeps_products_a_second_time_unless_it_is_told_not_to() -> None:
    """`system/threads.py`: 200 shapes, half a megabyte each, though oneDNN keeps sixteen."""

    def grown(capacity: str) -> int:
        asked = {**os.environ, "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16", "LRU_CACHE_CAPACITY": capacity}
        return int(subprocess.run([sys.executable, "-c", GROWTH], env=asked, check=True, capture_output=True).stdout)

    assert grown("1") < 30e6 < 50e6 < grown("1024")


def test_autograd_numbers_its_passes() -> None:
    """`layers/shared_input.py`: one number within a pass, another in the next over the same graph."""
    numbers: list[int] = []

    class Numbered(torch.autograd.Function):
        @staticmethod
        def forward(ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: torch.autograd.function.FunctionCtx, *grads: torch.Tensor) -> torch.Tensor:
            numbers.append(torch._C._current_graph_task_id())
            return grads[0]

    x = torch.ones(2, requires_grad=True)
    y = (Numbered.apply(x) + Numbered.apply(x)).sum()
    for _ in range(2):
        y.backward(retain_graph=True)
    assert numbers[0] == numbers[1] != numbers[2] == numbers[3] and min(numbers) >= 0

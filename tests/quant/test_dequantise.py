"""Every width is dequantised rightly: against the definition of the format in numpy, forward, backward and merged."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch

from halfbyte.layers.lora_linear import frozen_linear, lora_linear
from halfbyte.quant import dequantise
from tests import tiny

ROOT = Path(__file__).parents[2]
# The values of the 16 codes: QLoRA appendix E; for FP4 the sign, 2 bits of exponent and 1 of mantissa over its largest.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = tuple(sign * v / 12 for sign in (1, -1) for v in (0, 0.0625, 8, 12, 4, 6, 2, 3))
CODES = {"nf4": NF4, "fp4": FP4}
# Half a unit in the last place, relative; beside it three roundings in fp32 (scale, code and their product).
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}
WIDTHS = (48, 80, 96, 160, 4544)

needs_avx512 = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="only the AVX-512 function is wrong"
)


def layer(shape: tuple[int, int], kind: str, double: bool, dtype: torch.dtype = torch.bfloat16, block: int = 64) -> Any:
    generator = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(shape, generator=generator).to(dtype)
    made = bnb.nn.Linear4bit(shape[1], shape[0], False, dtype, compress_statistics=double, quant_type=kind)
    made.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=double, quant_type=kind, blocksize=block
    ).to("cpu")
    made.support_avx512bf16_for_cpu = False
    return made


def by_definition(made: Any) -> np.ndarray:
    """The weight in fp64, from its codes and scales alone."""
    state, packed = made.weight.quant_state, made.weight.data.numpy().reshape(-1)
    n = int(np.prod(state.shape))
    scales = state.absmax.numpy()
    if state.nested:
        outer = state.state2
        first = outer.code.numpy().astype(np.float64)[scales]
        each = outer.absmax.numpy().astype(np.float64)[np.arange(scales.size) // outer.blocksize]
        scales = first * each + float(state.offset)
    scales = scales.astype(np.float64)
    codes = np.empty(2 * packed.size, np.int64)
    codes[0::2], codes[1::2] = packed >> 4, packed & 15
    values = np.array(CODES[state.quant_type])[codes[:n]]
    return (values * scales[np.arange(n) // state.blocksize]).reshape(tuple(state.shape))


def assert_is(got: torch.Tensor, wanted: np.ndarray) -> None:
    allowed = np.abs(wanted) * (ROUNDING[got.dtype] + 3 * 2.0**-24) + (2.0**-25 if got.dtype == torch.float16 else 0)
    over = np.abs(got.double().numpy() - wanted) - allowed
    assert over.max() <= 0, f"{(over > 0).sum()} of {over.size} are wrong, by {over.max()}"


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "shape", [*((64, w) for w in WIDTHS), (5, 2), (123, 126), (7, 33), (1, 1), (3, 21), (256, 192)]
)
def test_every_width_is_right(shape: Any, dtype: torch.dtype, kind: str, double: bool) -> None:
    made = layer(shape, kind, double, dtype)
    got = dequantise.dequantised(made)
    assert got.dtype == dtype and got.shape == torch.Size(shape)
    assert_is(got, by_definition(made))


@pytest.mark.parametrize("block", [32, 128, 1024, 4096])
def test_other_blocks_than_64(block: int) -> None:
    made = layer((48, 176), "nf4", False, torch.float32, block)
    assert made.weight.quant_state.blocksize == block
    assert_is(dequantise.dequantised(made), by_definition(made))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_table_says_what_the_c_function_says(dtype: torch.dtype, kind: str) -> None:
    made = layer((70, 96), kind, True, dtype)
    state = made.weight.quant_state
    fast, slow = dequantise.dequantised(made), torch.empty(70 * 96, dtype=dtype)
    dequantise.write_by_table(made.weight.data.view(-1), dequantise.block_scales(state), slow, 64, kind)
    assert torch.equal(fast.view(-1), slow)


@needs_avx512
@pytest.mark.parametrize("width", [48, 80, 96, 160])
def test_plain_bitsandbytes_is_wrong(width: int) -> None:
    """Why this file is there. When it fails, upstream has repaired it, and the kernel of `bnb_backend` can go."""
    made = layer((64, width), "nf4", True)
    plain = bnb.functional.dequantize_4bit(made.weight.data, made.weight.quant_state)
    wanted = by_definition(made)
    assert np.abs(plain.double().numpy() - wanted).max() > 0.5  # of weights about 1
    assert np.abs(dequantise.dequantised(made).double().numpy() - wanted).max() < 2.0**-7


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("width", WIDTHS)
def test_forward_and_gradients(width: int, kind: str, double: bool) -> None:
    """In fp32 against fp64; an error of 1e-4 of the largest number is far above the rounding of 4544 products."""
    made = layer((32, width), kind, double, torch.float32)
    weight = torch.from_numpy(by_definition(made))
    generator = torch.Generator().manual_seed(0)
    x, a, b, dy = (torch.randn(s, generator=generator) for s in ((6, width), (4, width), (32, 4), (6, 32)))
    ours = [t.clone().requires_grad_() for t in (x, a, b)]
    exact = [t.double().requires_grad_() for t in (x, a, b)]
    y = lora_linear(ours[0], made, ours[1], ours[2], 0.5, 0.0)
    wanted = exact[0] @ weight.T + 0.5 * (exact[0] @ exact[1].T) @ exact[2].T
    y.backward(dy)
    wanted.backward(dy.double())
    for got, right in [(y, wanted), *((o.grad, e.grad) for o, e in zip(ours, exact, strict=True))]:
        assert got is not None and right is not None
        assert (got.double() - right).abs().max() < 1e-4 * right.abs().max()
    plain = frozen_linear(x, made).double()
    right = x.double() @ weight.T
    assert (plain - right).abs().max() < 1e-4 * right.abs().max()


# The classic script on a model of width 96 whose base it loads itself, in a process where halfbyte is installed.
SCRIPT = """
import copy, sys, warnings
warnings.simplefilter("error", UserWarning)
import bitsandbytes as bnb
from halfbyte.quant import bnb_backend
bnb_backend.register()  # as the entry point does
warnings.simplefilter("default")
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from halfbyte import LoraConfig, get_peft_model
from tests.quant.test_dequantise import by_definition

settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_type="nf4")
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, quantization_config=settings)
exact = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
for name, module in base.named_modules():
    if isinstance(module, bnb.nn.Linear4bit):
        exact.get_submodule(name).weight.data = torch.from_numpy(by_definition(module)).float()
ids = torch.arange(3, 40)[None]
lora = dict(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
def far(x, y):
    return float((x - y).abs().max() / y.abs().max())
with torch.no_grad():
    print("base", far(base.train()(input_ids=ids).logits, exact.eval()(input_ids=ids).logits))
    one = dict(input_ids=ids[:, :1])
    print("token", far(base(**one).logits, exact(**one).logits))
torch.manual_seed(0)
model = get_peft_model(base, LoraConfig(**lora))
torch.manual_seed(0)
from peft import get_peft_model as plain_get
right = plain_get(exact, LoraConfig(**lora))
right.load_state_dict({n: p for n, p in model.state_dict().items() if "lora_" in n}, strict=False)
for m in (model, right):
    m.train()(input_ids=ids, labels=ids).loss.backward()
wanted = {n: p.grad for n, p in right.named_parameters() if p.requires_grad}
print("gradients", max(far(p.grad, wanted[n]) for n, p in model.named_parameters() if p.requires_grad))
merged = model.merge_and_unload()
for name, module in merged.named_modules():
    if isinstance(module, bnb.nn.Linear4bit):
        old = right.base_model.model.get_submodule(name)
        delta = old.get_delta_weight("default") if hasattr(old, "get_delta_weight") else 0
        whole = (old.base_layer if hasattr(old, "base_layer") else old).weight.data + delta
        # what merging adds is quantised again: at most half the widest gap between two codes of NF4, 0.152
        gone = (torch.from_numpy(by_definition(module)).float() - whole).abs()
        print("merge", name, float((gone.view(-1, 64).amax(1) / whole.view(-1, 64).abs().amax(1)).max()))
"""


def test_a_base_that_a_script_loaded_itself(tmp_path: Path) -> None:
    """Forward, one token, gradients and merging in the drop-in, with the kernel that every script is offered."""
    tiny.model("llama", changes={"hidden_size": 96, "intermediate_size": 176, "head_dim": 24}).save_pretrained(tmp_path)
    env = {k: v for k, v in os.environ.items() if k != "HALFBYTE_BNB_KERNEL"}
    env |= {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "HALFBYTE_BNB_KERNEL": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    seen = {row[0]: float(row[-1]) for row in rows if row[0] != "merge"}
    assert set(seen) == {"base", "token", "gradients"} and max(seen.values()) < 1e-4, seen
    merges = {row[1]: float(row[2]) for row in rows if row[0] == "merge"}
    # 0.152 of the block's largest; and the block's scale, 8 bits with double quantisation, is up to 2% off
    assert len(merges) == 7 * tiny.LAYERS and max(merges.values()) < 0.18, merges


def test_reused_memory_is_that_of_the_largest_weight_and_of_one_thread() -> None:
    small, large = (layer((128, n), "nf4", True) for n in (64, 256))
    first = dequantise.dequantised(large).data_ptr()
    assert dequantise.dequantised(small).data_ptr() == first
    assert dequantise.dequantised(large).data_ptr() == first
    with ThreadPoolExecutor(1) as other:
        assert other.submit(lambda: dequantise.dequantised(large).data_ptr()).result() != first


@pytest.mark.parametrize("rows", [1, 7, 16, 48, 1000])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("o", "d"), [(50, 64), (33, 96), (48, 80)])
def test_pieces_are_the_weight(o: int, d: int, double: bool, rows: int) -> None:
    made = layer((o, d), "nf4", double)
    got = [piece.clone() for piece in dequantise.in_pieces(made, rows)]
    assert len(got) == (1 if rows >= o or rows * d % 64 else -(-o // rows))
    bound = ROUNDING[torch.bfloat16] + 3 * 2.0**-24
    wanted = by_definition(made).reshape(o, d)
    assert (np.abs(torch.cat(got).double().numpy() - wanted) <= bound * np.abs(wanted) + 1e-30).all()

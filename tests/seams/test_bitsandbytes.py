"""What quant.py stands on in bitsandbytes, and the danger that it is there for."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.cextension import lib
from bitsandbytes.nn import modules as bnb_modules
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests import tiny

needs_avx512_bf16 = pytest.mark.skipif(
    not bnb_modules.has_avx512bf16(), reason="only CPUs with AVX512-BF16 repack 4-bit weights"
)


def layer(double: bool = True) -> Any:
    torch.manual_seed(0)
    made = bnb.nn.Linear4bit(
        64, 64, bias=False, compute_dtype=torch.bfloat16, compress_statistics=double, quant_type="nf4"
    )
    made.weight = bnb.nn.Params4bit(
        torch.randn(64, 64, dtype=torch.bfloat16), requires_grad=False, compress_statistics=double, quant_type="nf4"
    ).to("cpu")
    return made


def stock_adapted(folder: Path) -> Any:
    """The plain stack: transformers' 4-bit loader and PEFT, nothing of ours."""
    tiny.save(folder, "llama", torch.bfloat16)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(base, lora)


def gradients(model: Any) -> dict[str, torch.Tensor | None]:
    ids = torch.arange(3, 23)[None]
    model.train()
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@needs_avx512_bf16
@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
def test_a_stock_layer_loses_gradients_after_an_eval_forward(tmp_path: Path) -> None:
    """The danger is real. When this fails, upstream has repaired it, and `quant.formats.settle` can go."""
    model = stock_adapted(tmp_path)
    assert all(m.support_avx512bf16_for_cpu for m in model.modules() if isinstance(m, bnb.nn.Linear4bit))
    assert all(g is not None and bool(g.any()) for g in gradients(model).values())
    with torch.no_grad():
        model.eval()(input_ids=torch.arange(3, 23)[None])
    assert all(gradient is None for gradient in gradients(model).values())  # and the loss is as healthy as before


@needs_avx512_bf16
def test_the_switch_and_the_mark_of_the_repacking() -> None:
    stock, safe = layer(), layer()
    safe.support_avx512bf16_for_cpu = False
    x = torch.ones(4, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        for made in (stock, safe):
            made.eval()(x)
    assert stock.weight.quant_state.packing_format_for_cpu
    assert not getattr(safe.weight.quant_state, "packing_format_for_cpu", False)
    stock.state_dict()  # upstream's own inverse, in place
    assert not getattr(stock.weight.quant_state, "packing_format_for_cpu", False)


def test_names_that_are_read_and_set() -> None:
    made = layer()
    assert {"support_avx512bf16_for_cpu", "compute_dtype", "compute_type_is_set"} <= vars(made).keys()
    state = made.weight.quant_state
    assert state.nested and state.blocksize == 64 and state.dtype == torch.bfloat16
    assert state.absmax.dtype == torch.uint8 and state.state2.blocksize == 256
    assert state.code.numel() == 16 and state.offset.numel() == 1
    assert layer(double=False).weight.quant_state.absmax.dtype == torch.float32


def test_the_backward_dequantises_to_the_dtype_of_the_state() -> None:
    made = layer()
    made.weight.quant_state.dtype = torch.float32
    assert bnb.functional.dequantize_4bit(made.weight.data, made.weight.quant_state).dtype == torch.float32


def test_the_kernel_before_ours_can_be_fetched_and_called() -> None:
    """`bnb_backend` hands on what it does not take; and bitsandbytes still calls what its entry point group names."""
    before = torch.library.get_kernel("bitsandbytes::quantize_4bit", "CPU")
    values = torch.randn(128)
    keys = torch._C._dispatch_keys(values)
    packed, absmax = before.call_boxed(keys, values, 64, "nf4", torch.uint8)
    wanted, state = bnb.functional.quantize_4bit(values, quant_type="nf4", compress_statistics=False)
    assert torch.equal(packed, wanted) and torch.equal(absmax, state.absmax)
    assert 'entry_points(group="bitsandbytes.backends")' in Path(bnb.__file__).read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_the_c_library_has_the_functions_behind_dequantize_4bit(kind: str, dtype: str) -> None:
    """`quant.dequantised` calls them with memory of its own; without them it is slower, not wrong."""
    assert hasattr(getattr(lib, f"cdequantize_blockwise_cpu_{kind}_{dtype}"), "argtypes")
    assert not hasattr(lib.there_is_no_such_function, "argtypes")


def test_the_command_line_loads_no_compiler() -> None:
    """bitsandbytes wraps functions in torch.compile as it is imported; `TORCHDYNAMO_DISABLE` keeps inductor away."""
    env = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    code = (
        "import sys\nfrom halfbyte.system import libraries\nwith libraries.loading():\n"
        "    from halfbyte import finetune\nprint('torch._inductor.compile_fx' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.split()[-1] == "False", done.stderr


def test_where_an_8_bit_layer_of_transformers_holds_what(tmp_path: Path) -> None:
    """`quant/int8.py` reads codes, scales and the threshold here, and gives the instance a class of its own."""
    tiny.save(tmp_path, "llama", torch.bfloat16)
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=3.0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=config)
    made: Any = model.model.layers[0].mlp.up_proj
    assert type(made) is bnb.nn.Linear8bitLt and type(made.weight) is bnb.nn.Int8Params
    assert made.weight.dtype == torch.int8 and made.weight.SCB.shape == (made.out_features,)
    assert made.state.threshold == 3.0 and not made.state.has_fp16_weights and made.state.SCB is None
    assert set(made.state_dict()) == {"weight", "SCB", "weight_format"}
    assert model.is_loaded_in_8bit  # by this PEFT chooses its layer
    made.eval()(torch.randn(2, made.in_features, dtype=torch.bfloat16))
    assert made.weight.SCB is None and made.state.SCB is not None  # the first forward moves them


def test_the_word_about_a_kernel_on_a_hub() -> None:
    """`system/hub_kernel.py`: the logger, the name of the kernel that was not found, and a word of the message."""
    from bitsandbytes.backends.cpu import ops

    from halfbyte.system import hub_kernel

    source = Path(ops.__file__).read_text(encoding="utf-8")
    assert ops.logger.name == hub_kernel.MODULE
    assert "gemm_4bit_forward_kernel = None" in source and "from kernels-community: %s" in source
    record = logging.makeLogRecord({"msg": "Failed to load it from kernels-community: %s", "args": ("no",)})
    assert not ops.logger.filter(record) and ops.logger.filter(logging.makeLogRecord({"msg": "another word"}))

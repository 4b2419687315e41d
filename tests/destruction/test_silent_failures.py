"""What the plain stack does wrong without a word: each is shown there, and caught or right here.

Some are shown at the seam that they come from, and not here again: an optimiser that is fresh after a resume in
`tests/seams/test_trainer.py`, wrong dequantising at odd widths in `tests/quant/test_dequantise.py`, and what is right
here in `tests/training/test_trainer.py` (resumed runs) and `tests/base/test_experts.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from halfbyte import finetune
from halfbyte.adapters import lora
from halfbyte.base import load
from halfbyte.errors import AdapterError
from halfbyte.layers import packing
from halfbyte.models.sources.checkpoint import Checkpoint
from halfbyte.proofs import setting
from halfbyte.proofs.packing import prove_packing
from halfbyte.quant import formats
from halfbyte.quant.stack import ExpertStack
from halfbyte.recipe.file import load_recipe
from halfbyte.recipe.schema import Quant
from halfbyte.runs.folder import RunFolder
from halfbyte.system import device
from tests import tiny, tiny_run
from tests.seams.test_bitsandbytes import gradients, needs_avx512_bf16, stock_adapted

IDS = torch.arange(3, 23)[None]


def base(folder: Path, kind: str = "nf4") -> Any:
    quant = Quant(type=kind, compute_dtype="bf16")  # type: ignore[arg-type]
    return load.open_base(Checkpoint(folder, "tiny", None, "folder"), quant, device.detect()).model


@needs_avx512_bf16
@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
def test_an_evaluation_ends_gradients(tmp_path: Path) -> None:
    there = stock_adapted(tmp_path / "m")
    here = get_peft_model(base(tmp_path / "m"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for model, ends in ((there, True), (here, False)):
        assert all(g is not None for g in gradients(model).values())
        with torch.no_grad():
            model.eval()(input_ids=IDS)
        assert all((g is None) == ends for g in gradients(model).values())


@needs_avx512_bf16
def test_a_merge_after_an_evaluation(tmp_path: Path) -> None:
    """Of an adapter that is 0: merging it must change next to nothing."""
    off = {}
    tiny.save(tmp_path / "m", "llama", torch.bfloat16)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16, quantization_config=config)
    for name, model in (("there", plain), ("here", base(tmp_path / "m"))):
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"])).eval()
        with torch.no_grad():
            before = adapted(input_ids=IDS).logits.float()
            after = adapted.merge_and_unload()(input_ids=IDS).logits.float()
        off[name] = float((after - before).norm() / before.norm())
    assert off["there"] > 0.5 and off["here"] < 0.1


def test_packed_rows_see_each_other() -> None:
    """By position_ids alone, as a padding-free collator hands them over, with use_cache left on."""
    model = tiny.model("llama")
    rows = setting.random_examples(model, (7, 6))
    batch = setting.pack(rows)
    with torch.no_grad():
        alone = torch.cat([model(input_ids=ids[None]).logits[0] for ids in rows])
        there = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=True).logits[0]
        assert prove_packing(model).ok
        here = model(**packing.forward_inputs(model, batch)).logits[0]
    assert float((there - alone).abs().max()) > 0.1 > 1e-4 > float((here - alone).abs().max())


def test_experts_are_left_in_16_bits(tmp_path: Path) -> None:
    tiny.save(tmp_path / "m", "mixtral", torch.bfloat16)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    there = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16, quantization_config=config)
    here = base(tmp_path / "m")
    stacks = [p for name, p in there.named_parameters() if ".experts." in name]
    assert stacks and all(p.dtype == torch.bfloat16 for p in stacks), "and attention is in 4 bits"
    assert any(isinstance(m, bnb.nn.Linear4bit) for m in there.modules())
    held = [p for name, p in here.named_parameters() if ".experts." in name]
    assert held and all(isinstance(p, ExpertStack) for p in held)


def test_an_adapter_that_loads_no_tensor(tmp_path: Path) -> None:
    """Saved under other names, as by another wrapper: plain PEFT warns, and says what the base says."""
    trained = get_peft_model(tiny.model("llama"), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name, p in trained.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    trained.save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    save_file({name.replace("model.layers", "module.layers"): t for name, t in load_file(file).items()}, file)
    plain = tiny.model("llama")
    with torch.no_grad():
        alone = plain(input_ids=IDS).logits
        with pytest.warns(UserWarning, match="missing adapter keys"):
            there = PeftModel.from_pretrained(plain, str(tmp_path)).eval()(input_ids=IDS).logits
    assert torch.equal(alone, there), "as if there were none"
    with pytest.raises(AdapterError):
        lora.load(tiny.model("llama"), tmp_path)


def test_a_buffer_that_is_used_again_under_checkpointing(tmp_path: Path) -> None:
    """bitsandbytes keeps a weight outside autograd's sight: what a streamer has written over it by then, backward
    multiplies with. The loss is right. Here a layer alone is kept, and its weight is looked up again."""
    tiny.save(tmp_path / "m", "llama", torch.bfloat16)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16, quantization_config=config)
    layer = next(m for m in plain.modules() if isinstance(m, bnb.nn.Linear4bit))
    own, x = layer.weight.data, torch.randn(3, layer.in_features, dtype=torch.bfloat16)

    def gradient(forward: Any, *, streamed: bool) -> torch.Tensor:
        """Of the input, where the weight is in a buffer that another has taken when backward begins."""
        given = x.clone().requires_grad_()
        buffer = own.clone()
        layer.weight.data = buffer
        y = forward(given)
        if streamed:
            buffer.copy_(own.flip(0))  # the next layer's weight comes into the pooled buffer
            layer.weight.data = own  # and this one's is fetched again for backward
        y.float().sum().backward()
        assert given.grad is not None
        return given.grad

    layer.support_avx512bf16_for_cpu = False
    from halfbyte.layers.lora_linear import frozen_linear

    for forward, wrong in ((layer, True), (lambda given: frozen_linear(given, layer), False)):
        still, moved = gradient(forward, streamed=False), gradient(forward, streamed=True)
        assert (float((still - moved).abs().max()) > 0.01) == wrong
    assert formats.is_quantised(layer)


def test_a_fresh_optimiser_after_a_resume(tmp_path: Path) -> None:
    """There (`tests/seams/test_trainer.py`) it is taken without a word; here a checkpoint without it is passed over."""
    loaded = tiny_run.recipe(tmp_path, train__save_strategy="steps", train__save_steps=2)
    finetune.train(loaded)
    run = RunFolder(tmp_path / "run")
    wanted = (run.adapter / "adapter_model.safetensors").read_bytes()
    (run.checkpoints / "step-000004" / "optimizer.safetensors").unlink()
    run.report.unlink()
    report = finetune.train(load_recipe(tmp_path / "recipe.yaml"), resume=True).report
    assert "optimizer.safetensors is missing" in json.dumps(report["notices"])
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == wanted

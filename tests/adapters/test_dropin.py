"""The classic QLoRA script with only its import line changed, on three architectures and on fp16 checkpoints."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte
from halfbyte.adapters import dropin, first_step
from halfbyte.errors import BaseModelError, RecipeError
from halfbyte.layers import fuse, lora_linear
from halfbyte.layers.kernels.cpu.integer import products as integer
from tests import plain_peft, tiny

SCRIPT = """
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments
from {module} import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training

bnb_config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float16, bnb_4bit_quant_type="nf4")
model = AutoModelForCausalLM.from_pretrained(model_id, quantization_config=bnb_config, device_map="auto")
model = prepare_model_for_kbit_training(model)
lora_config = LoraConfig(
    r=16, lora_alpha=32, target_modules=target_modules, lora_dropout=0.05, bias="none", task_type="CAUSAL_LM"
)
model = get_peft_model(model, lora_config)
training_args = TrainingArguments(
    per_device_train_batch_size=4, gradient_accumulation_steps=4, num_train_epochs=3, learning_rate=2e-4, fp16=True,
    output_dir="./lora_output", report_to="none", disable_tqdm=True, logging_steps=1,
)
trainer = Trainer(model=model, args=training_args, train_dataset=rows)
trainer.train()
model.save_pretrained("./lora_adapters")
base = AutoModelForCausalLM.from_pretrained(model_id, quantization_config=bnb_config, device_map="auto")
loaded = PeftModel.from_pretrained(base, "./lora_adapters")
generated = loaded.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=5, do_sample=False)
"""

TARGETS = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"], "bloom": ["query_key_value"]}


IN_4_BITS = 'load_in_4bit=True, bnb_4bit_compute_dtype=torch.float16, bnb_4bit_quant_type="nf4"'


def run_script(model_id: Path, targets: list[str], bits: str = IN_4_BITS) -> tuple[dict[str, Any], list[str]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 256, (32, 24), generator=generator)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    names: dict[str, Any] = {"model_id": str(model_id), "target_modules": targets, "rows": rows}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(SCRIPT.format(module="halfbyte").replace(IN_4_BITS, bits), names)
    return names, [str(w.message) for w in caught]


@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.bfloat16) for name in TARGETS), ("llama", torch.float16)])
def test_the_classic_script(name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dropin._say_once.cache_clear()
    tiny.save(tmp_path / "model", name, dtype=dtype)
    names, said = run_script(tmp_path / "model", TARGETS[name])
    log = [row["loss"] for row in names["trainer"].state.log_history if "loss" in row]
    assert len(log) == 6
    assert log[4] + log[5] < log[0] + log[1]  # two steps are one epoch: the same rows
    assert all(bool(p.detach().any()) for n, p in names["model"].named_parameters() if "lora_B" in n)
    model = names["model"]
    floating = {p.dtype for p in model.parameters() if p.is_floating_point()}
    assert torch.float16 not in floating
    about_dtype = [text for text in said if "float16 was asked for" in text]
    assert len(about_dtype) == 1
    assert "computing in" in about_dtype[0]
    assert names["generated"].shape == (1, 8)
    for path in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "lora_adapters" / path).is_file()


@pytest.mark.parametrize("bits", [IN_4_BITS, "load_in_8bit=True", "load_in_8bit=True, llm_int8_threshold=0.0"])
def test_the_reloaded_adapter_says_the_same(bits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.save(tmp_path / "model", "llama", dtype=torch.bfloat16)
    names, _ = run_script(tmp_path / "model", TARGETS["llama"], bits)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        trained = names["model"].eval()(input_ids=ids).logits.float()
        loaded = names["loaded"].eval()(input_ids=ids).logits.float()
        with names["loaded"].disable_adapter():
            bare = names["loaded"](input_ids=ids).logits.float()
    halves = any(p.dtype == torch.bfloat16 for p in names["loaded"].parameters())
    near = 2e-2 if halves else 1e-4  # a few units of bf16 at 3; in fp32 its gain in six steps is smaller than those
    torch.testing.assert_close(loaded, trained, rtol=near, atol=near)
    assert not torch.allclose(bare, trained, rtol=near, atol=near)


def test_autocast_of_a_caller_does_not_reach_the_layers(tmp_path: Path) -> None:
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    from halfbyte import get_peft_model

    tiny.save(tmp_path / "model", "llama", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model(input_ids=torch.tensor([[5, 6, 7]]))  # the first call of all looks at the model itself
    seen: list[torch.dtype] = []
    base.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(input_ids=torch.tensor([[5, 6, 7]]))
    assert seen == [torch.float32]


def test_names_that_are_offered() -> None:
    import halfbyte

    for name in halfbyte.__all__:
        assert getattr(halfbyte, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'LoraConfg'"):
        halfbyte.LoraConfg  # noqa: B018


def test_what_halfbyte_does_not_define_comes_from_peft() -> None:
    import peft

    import halfbyte

    ours = set(halfbyte.__all__) & set(peft.__all__)
    assert {name for name in peft.__all__ if getattr(halfbyte, name) is not getattr(peft, name)} == ours
    from halfbyte import PeftConfig, TaskType, get_peft_model_state_dict  # noqa: F401

    assert {"PeftConfig", "load_base"} <= set(dir(halfbyte))  # where Python looks for the nearest name


def test_a_name_of_neither_says_the_nearest() -> None:
    import halfbyte

    for name, near in (("PeftConfigs", "PeftConfig"), ("LoraConfg", "LoraConfig"), ("load_bas", "load_base")):
        with pytest.raises(AttributeError, match=f"no attribute '{name}'; did you mean {near}\\?"):
            getattr(halfbyte, name)
    assert not hasattr(halfbyte, "__wrapped__")
    with pytest.raises(ImportError, match="PeftConfigs"):
        from halfbyte import PeftConfigs  # noqa: F401


def test_a_module_of_the_package_is_not_asked_of_peft() -> None:
    code = "from halfbyte import cli, errors\nimport halfbyte.cli.main, sys; print('peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_load_base_is_the_classic_reload_line(tmp_path: Path) -> None:
    from halfbyte import load_base
    from halfbyte.quant.bnb import linears_4bit

    tiny.save(tmp_path / "model", "llama", dtype=torch.float16)
    model = load_base(str(tmp_path / "model"), load_in_4bit=True, device_map="auto", dtype="fp32")
    layers = linears_4bit(model)
    assert len(layers) == 14
    assert not any(layer.support_avx512bf16_for_cpu for _, layer in layers)
    assert {layer.weight.quant_state.quant_type for _, layer in layers} == {"nf4"}
    assert model.name_or_path == str(tmp_path / "model")


@pytest.mark.parametrize(("free_gb", "expected"), [(16, False), (0.001, True)])
def test_recomputation_is_prepared_where_memory_asks_for_it(
    free_gb: float, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from halfbyte import prepare_model_for_kbit_training
    from halfbyte.system import device

    machine = device.detect()
    monkeypatch.setattr(device, "detect", lambda: dataclasses.replace(machine, ram_available_bytes=int(free_gb * 1e9)))
    model = prepare_model_for_kbit_training(tiny.model("llama"))
    assert model.is_gradient_checkpointing is expected
    asked = prepare_model_for_kbit_training(tiny.model("llama"), use_gradient_checkpointing=not expected)
    assert asked.is_gradient_checkpointing is not expected
    assert not any(p.requires_grad for p in model.parameters())


def windowed() -> Any:
    return tiny.model("mistral", changes={"sliding_window": 8})


def adapted_by_name() -> Any:
    return plain_peft.adapt(windowed(), "all-linear", halfbyte.get_peft_model)


def batch_of_a_script() -> dict[str, Any]:
    ids = torch.stack(plain_peft.texts((20, 20), 256))
    return {"input_ids": ids, "labels": ids}


def test_fused_layers_that_are_wrong_are_taken_off_aloud_and_pefts_own_train(monkeypatch: pytest.MonkeyPatch) -> None:
    real = lora_linear.LoraLinear.forward
    plain = plain_peft.adapt(windowed(), "all-linear")
    plain(**batch_of_a_script()).loss.backward()
    wanted = plain_peft.gradients(plain)

    def twice_the_scale(ctx: Any, x: Any, a: Any, b: Any, bias: Any, layer: Any, scale: float, *rest: Any) -> Any:
        return real(ctx, x, a, b, bias, layer, 2 * scale, *rest)

    monkeypatch.setattr(lora_linear.LoraLinear, "forward", twice_the_scale)
    model = adapted_by_name()
    with pytest.warns(UserWarning, match="fused layers are not used on this model.*gradients differ"):
        model(**batch_of_a_script()).loss.backward()
    assert plain_peft.apart(plain_peft.gradients(model), wanted) < 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**batch_of_a_script()).loss.backward()  # said once
    assert plain_peft.apart(plain_peft.gradients(model), wanted) < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_proof_at_the_first_training_forward_leaves_no_trace(checkpointing: bool) -> None:
    model = adapted_by_name()
    model.base_model.model.model.layers[0].mlp.eval()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model.enable_input_require_grads()
    trained = next(p for n, p in model.named_parameters() if "lora_B" in n)
    trained.grad = torch.ones_like(trained)  # of a batch before
    modes, state = [m.training for m in model.modules()], torch.random.get_rng_state()
    weights = {n: (p.data_ptr(), p.detach().clone()) for n, p in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(**batch_of_a_script())
    assert model in first_step.SEEN
    assert any(isinstance(m, fuse._Fast) for m in model.modules())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [n for n, p in model.named_parameters() if p.grad is not None] == [
        n for n, p in model.named_parameters() if p is trained
    ]
    assert torch.equal(trained.grad, torch.ones_like(trained))
    for name, parameter in model.named_parameters():
        assert weights[name][0] == parameter.data_ptr() and torch.equal(weights[name][1], parameter)


def test_an_evaluation_proves_nothing() -> None:
    model = adapted_by_name().eval()
    model(**batch_of_a_script())
    model.train()
    with torch.no_grad():
        model(**batch_of_a_script())
    assert model not in first_step.SEEN


@pytest.mark.parametrize("compute", ["exact", "auto", "int8"])
def test_integer_products_are_asked_for_and_decided_at_the_first_training_forward(
    compute: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if integer.why_not():
        pytest.skip(integer.why_not())
    monkeypatch.setattr(integer, "times_as_fast", lambda dtype: 2.0)
    base = halfbyte.prepare_model_for_kbit_training(tiny.model("llama"), compute=compute)
    config = halfbyte.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = halfbyte.get_peft_model(base, config).train()
    ids = torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(22)).loss.backward()
    model(input_ids=ids, labels=ids).loss.backward()
    said = [record for record in caplog.records if "frozen base's products so: " in record.getMessage()]
    asked = [m for m in model.modules() if integer.NAME in m.__dict__]
    assert (len(said), bool(asked)) == ((0, False) if compute == "exact" else (1, True))
    with pytest.raises(RecipeError, match="compute must be auto, exact or int8, got 'fast'"):
        halfbyte.prepare_model_for_kbit_training(tiny.model("llama"), compute="fast")  # type: ignore[arg-type]


def test_a_model_that_a_script_compiles_computes_by_its_own_kernels_and_nothing_is_traced() -> None:
    def refuse(graph: Any, inputs: Any) -> Any:
        raise AssertionError("torch has traced a part of it")

    plain = plain_peft.adapt(windowed(), "all-linear")
    wanted = plain(**batch_of_a_script()).loss
    wanted.backward()
    model = adapted_by_name()
    compiled = torch.compile(model, backend=refuse)
    loss = compiled(**batch_of_a_script()).loss
    loss.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    assert plain_peft.apart(plain_peft.gradients(model), plain_peft.gradients(plain)) < 1e-5


def test_apples_gpu_is_refused_in_one_line() -> None:
    """Nothing of ours has run there: a model on it, or a batch that its Trainer has moved there."""

    class Apples(torch.Tensor):
        @property
        def device(self) -> torch.device:
            return torch.device("mps")

    lm = tiny.model("llama")
    adapted = dropin.get_peft_model(
        lm, halfbyte.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    ).train()
    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(BaseModelError, match=r"Apple's GPU \(mps\)") as told:
        adapted(input_ids=ids.as_subclass(Apples), labels=ids)
    assert "use_cpu=True" in str(told.value.fix)
    there = tiny.model("llama")
    there.model.embed_tokens.weight.__class__ = type("Weight", (torch.nn.Parameter,), {"device": Apples.device})
    adapt = functools.partial(dropin.get_peft_model, peft_config=halfbyte.LoraConfig(target_modules=["q_proj"]))
    for call in (dropin.prepare_model_for_kbit_training, adapt):
        with pytest.raises(BaseModelError, match="Apple"):
            call(there)

"""A seam that the installed version lacks turns its fast path off, and `doctor` lists it: a test for each takes the
thing itself away. Fields of a newer version are refused by name."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import bitsandbytes as bnb
import peft
import pytest
import torch
import transformers

from halfbyte import doctor
from halfbyte.adapters import lora, targets
from halfbyte.base.modules import settings
from halfbyte.distributed import shard
from halfbyte.errors import AdapterError, RecipeError
from halfbyte.layers import fuse, packing
from halfbyte.layers.experts import layout
from halfbyte.models.gguf import tokenizer as gguf_tokenizer
from halfbyte.proofs.packing import prove_packing
from halfbyte.quant import bnb_backend, dequantise
from halfbyte.recipe import messages
from halfbyte.recipe.schema import Data, Recipe, Train
from halfbyte.training import trainer
from halfbyte.upstream import bitsandbytes, seam
from halfbyte.upstream import peft as of_peft
from halfbyte.upstream import torch as of_torch
from halfbyte.upstream import transformers as of_transformers
from tests import small_models, tiny


def forget() -> None:
    for looked_up in (seam._is_there, bitsandbytes.c_dequantise, seam.fields_of):
        looked_up.cache_clear()


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    forget()
    yield
    forget()


def lacks(it: seam.Seam) -> None:
    """What every seam that is missing does."""
    forget()
    assert not it.there and it.reason.startswith(f"{it.library} ") and f" has no {it.thing}" in it.reason
    assert doctor.lacking()[it.reason] == it.without


def test_without_registries_of_attention_a_model_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    assert "cu_seq_lens" in packing.layouts(model)
    monkeypatch.setattr(transformers, "AttentionMaskInterface", object)
    lacks(of_transformers.PACKED_ATTENTION)
    assert "cu_seq_lens" not in packing.layouts(model)


def test_without_a_registry_of_experts_a_mixture_is_outside_the_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_models.build("mixtral")
    assert any(layout.experts_of(model)) and not layout.outside_interface(model)
    monkeypatch.delattr(transformers.integrations.moe, "ALL_EXPERTS_FUNCTIONS")
    lacks(of_transformers.EXPERTS)
    assert not any(layout.experts_of(model)) and layout.outside_interface(model)


def test_without_lengths_the_texts_of_a_hybrid_are_kept_apart_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_models.build("lfm2").eval()
    monkeypatch.delattr(transformers.masking_utils, "create_recurrent_attention_mask", raising=False)
    lacks(of_transformers.RECURRENT_LENGTHS)
    for layer in (part for part in model.modules() if type(part).__name__ == "Lfm2ShortConv"):
        layer.register_forward_pre_hook(  # as older versions call it
            lambda _, args, given: (args, {n: x for n, x in given.items() if "cu_seq_lens" not in n}), with_kwargs=True
        )
    assert prove_packing(model, 12).layout != "cu_seq_lens"


def test_without_its_rules_a_gguf_tokenizer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.integrations.gguf", None)
    lacks(of_transformers.GGUF_RULES)
    with pytest.raises(gguf_tokenizer.GgufError, match=r"has no table of rules.*pip install -U transformers"):
        gguf_tokenizer.tokenizer_of("folder", "name", None, None)  # type: ignore[arg-type]


def test_a_lora_layer_without_a_field_that_is_read_runs_pefts_own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model, ids = peft.get_peft_model(tiny.model("llama"), config), torch.arange(3, 9)[None]
    before = model(input_ids=ids).logits
    monkeypatch.setattr(of_peft, "_READ", (*of_peft._READ, "no_such_field"))
    lacks(of_peft.LORA_LAYER)
    fused = fuse.install(model)
    assert "LoRA linears" not in {name for name, count in fused.counts.items() if count}
    assert list(fused.unfused) == [of_peft.LORA_LAYER.reason]
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(2, layer.in_features)
    assert torch.equal(layer(x), super(type(layer).__mro__[0], layer).forward(x))
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-4, atol=1e-5)  # norms are fused


def test_without_pefts_names_of_experts_modules_are_found_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    conversion = importlib.import_module("peft.utils.transformers_weight_conversion")
    monkeypatch.delattr(conversion, "convert_peft_config_for_transformers")
    lacks(of_peft.EXPERT_NAMES)
    model = tiny.model("llama")
    assert len(targets.matched(model, targets.Targets(("q_proj",), ""))) == tiny.LAYERS


def test_without_pefts_layout_of_experts_they_get_no_lora(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft, "inject_adapter_in_model", lambda config, model: model)
    lacks(of_peft.EXPERT_LORA)
    with pytest.raises(AdapterError, match=r"target_parameters: peft .* has no LoRA whose A"):
        targets.matched_stacks(small_models.build("mixtral"), ("gate_up_proj",))


def test_without_pefts_loraplus_the_ratio_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(peft.optimizers, "create_loraplus_optimizer")
    lacks(of_peft.LORAPLUS)
    with pytest.raises(AdapterError, match=r"loraplus_lr_ratio: peft .* has no LoRA"):
        lora.loraplus_optimizer(torch.nn.Linear(1, 1), torch.optim.AdamW, 4.0, 0.0, {})


def test_without_its_c_functions_weights_go_through_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, scales = torch.arange(32, dtype=torch.uint8), torch.ones(1)
    expected, out = torch.empty(64), torch.empty(64)
    dequantise.write_by_table(packed, scales, expected, 64, "nf4")
    monkeypatch.setattr(bnb.cextension, "lib", object())
    lacks(bitsandbytes.C_DEQUANTISE)
    dequantise.write(packed, scales, out, 64, "nf4")
    assert torch.equal(out, expected)


def test_without_optimisers_for_a_cpu_they_are_refused_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    older = Path(bnb.__file__).with_name("backends") / "cuda"  # its operations are for cards

    class Spec:
        submodule_search_locations = (str(tmp_path),)

    shutil.copytree(older, tmp_path / "backends" / "cpu")
    operations = tmp_path / "backends" / "cpu" / "ops.py"
    operations.write_text(operations.read_text().replace("optimizer_update_8bit", "another"))
    with monkeypatch.context() as patch:
        patch.setattr(bitsandbytes.importlib.util, "find_spec", lambda name: Spec)
        lacks(bitsandbytes.CPU_OPTIMISERS)
    with pytest.raises(RecipeError, match=r"adamw_8bit needs a card here: bitsandbytes .* has no optimisers"):
        trainer.check_arguments(Train(optim="adamw_8bit"), total_steps=3)
    trainer.check_arguments(Train(optim="adamw_torch"), total_steps=3)


def test_without_kernels_to_hand_on_to_bitsandbytes_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bnb_backend, "_held", {})
    monkeypatch.delattr(torch.library, "get_kernel")
    lacks(of_torch.KERNELS)
    bnb_backend.register()
    assert not bnb_backend.active()


def test_without_biases_in_an_adapters_file_they_do_not_train(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Recipe(model="m", data=Data(train="t"), lora={"bias": "lora_only"}).lora  # type: ignore[arg-type]
    monkeypatch.setattr(peft, "get_peft_model_state_dict", lambda model: {"lora_A.weight": 0})
    lacks(of_peft.BIASES)
    with pytest.raises(AdapterError, match=r"bias lora_only: peft .* has no file of an adapter with the biases"):
        lora.choose_targets(tiny.model("gpt2"), asked)
    lora.choose_targets(tiny.model("gpt2"), asked.model_copy(update={"bias": "all"}))


def test_without_an_fsdp_that_takes_codes_a_base_is_not_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

    monkeypatch.setattr(FSDPParam, "_init_sharded_param", forget)  # of another source
    lacks(of_torch.SHARDS)
    asked = Recipe(model="m", data=Data(train="t"), quant={"placement": "sharded"})  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=r"quant\.placement sharded: torch .* has no FSDP2 that takes codes"):
        shard.check(asked, ranks=2)


def test_each_seam_has_its_test() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    for library in (of_transformers, of_peft, bitsandbytes, of_torch):
        names = [name for name, value in vars(library).items() if isinstance(value, seam.Seam)]
        assert {getattr(library, name) for name in names} == set(library.SEAMS)
        assert all(f"{name})\n" in source for name in names)


# --- fields of a version that is newer than this one ----------------------------------------------------------------


@pytest.mark.parametrize("section", ["lora", "train", "quant"])
def test_a_field_of_a_newer_library_is_refused_by_name(section: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(messages._UPSTREAM, section, lambda: frozenset({"use_new_thing"}))
    with pytest.raises(Exception) as refused:
        Recipe(model="m", data=Data(train="t"), **{section: {"use_new_thing": True}})
    sentences = [text for item in refused.value.errors() for text in messages.sentences(item, {}, {})]  # type: ignore[attr-defined]
    assert sentences == [
        f"{section}.use_new_thing is not known to this version of halfbyte; pip install -U halfbyte, or leave it out"
    ]


def test_fields_are_read_off_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "newer" / "inner").mkdir(parents=True)
    (tmp_path / "newer" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "newer" / "inner" / "config.py").write_text(
        "class Other:\n    z: int = 1\nclass Config:\n    a: int = 1\n    b: str\n    c = 2\n"
        "    def __init__(self, d, *, e=3): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert seam.fields_of("newer.inner.config", "Config") == {"a", "b", "d", "e"}
    assert seam.fields_of("newer.inner.gone", "Config") == seam.fields_of("no_such_library.x", "C") == frozenset()


def test_a_setting_of_a_newer_bits_and_bytes_config_is_refused_by_name() -> None:
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    settings.read(config)
    config.bnb_4bit_new_thing = True
    with pytest.raises(RecipeError, match="BitsAndBytesConfig: bnb_4bit_new_thing not known to this version"):
        settings.read(config)

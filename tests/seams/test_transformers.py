"""What base.py, loss.py and generate.py stand on in transformers' models and loader."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate.utils import convert_to_fp32
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.quantizers.base import get_keys_to_not_convert

from halfbyte.layers.loss import keeps_some
from halfbyte.models.structure import meta_model
from halfbyte.upstream.transformers import byte_letters
from tests import tiny

IDS = torch.arange(3, 15)[None]


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_logits_to_keep_takes_positions(name: str) -> None:
    model = tiny.model(name)
    assert keeps_some(model)
    keep = torch.tensor([1, 4, 5, 10])
    with torch.no_grad():
        whole = model(input_ids=IDS, use_cache=False).logits
        some = model(input_ids=IDS, use_cache=False, logits_to_keep=keep).logits
    assert some.shape == (1, 4, whole.shape[-1])
    torch.testing.assert_close(some, whole[:, keep], rtol=1e-5, atol=1e-5)


def test_the_loader_says_what_was_missing(tmp_path: Path) -> None:
    tiny.save(tmp_path, "llama")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, transformers.PreTrainedModel)
    assert {"missing_keys", "mismatched_keys", "unexpected_keys"} <= info.keys()
    assert not info["missing_keys"] and not info["mismatched_keys"]


def test_an_explicit_none_drops_the_quantisation_of_a_checkpoint(tmp_path: Path) -> None:
    """Why `open_base` passes no `quantization_config` at all for a checkpoint that is quantised already."""
    tiny.save(tmp_path / "plain", "llama")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config).save_pretrained(tmp_path / "q")
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    assert kept.is_loaded_in_4bit
    read = transformers.AutoConfig.from_pretrained(tmp_path / "q").quantization_config
    assert (read["quant_method"] if isinstance(read, dict) else read.quant_method) == "bitsandbytes"


def test_the_loader_leaves_falcons_own_linear_in_16_bits(tmp_path: Path) -> None:
    """Why `quant.loader` exists. When this fails, it can go."""
    tiny.save(tmp_path, "falcon")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    kinds = {type(m).__name__ for n, m in model.named_modules() if n.endswith(("dense", "dense_h_to_4h"))}
    assert kinds == {"FalconLinear"}


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_the_head_is_what_transformers_would_skip(name: str) -> None:
    names = get_keys_to_not_convert(meta_model(tiny.config(name)))
    model = tiny.model(name)
    head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    assert head in names


def test_naming_modules_to_skip_replaces_the_default(tmp_path: Path) -> None:
    """Why the head's name is always given along."""
    tiny.save(tmp_path, "llama")
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["down_proj"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert type(model.lm_head).__name__ == "Linear4bit"
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear


def test_which_configs_are_causal_language_models() -> None:
    mapping = AutoModelForCausalLM._model_mapping
    for name in tiny.ARCHITECTURES:
        assert type(tiny.config(name)) in mapping
    assert transformers.T5Config not in mapping
    assert transformers.ViTConfig not in mapping


def test_a_streamer_hands_on_text() -> None:
    source = inspect.signature(transformers.TextStreamer.on_finalized_text).parameters
    assert list(source) == ["self", "text", "stream_end"]


def test_generation_takes_what_generate_passes() -> None:
    model: Any = tiny.model("llama")
    out = model.generate(
        input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, do_sample=False, temperature=None,
        top_p=None, top_k=None, eos_token_id=[2, 5], pad_token_id=0, use_cache=True, streamer=None,
    )  # fmt: skip
    assert IDS.shape[1] < out.shape[1] <= IDS.shape[1] + 3


def test_recomputation_is_asked_for_by_name() -> None:
    model = tiny.model("llama")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.is_gradient_checkpointing


def test_generate_calls_a_loop_of_ones_own() -> None:
    """`writing/plain.py`: what `custom_generate` is called with; a streamer is not handed on, its prompt is put."""
    model = tiny.model("llama")
    put: list[list[int]] = []
    seen: dict[str, object] = {}

    class Streamer:
        def put(self, value: torch.Tensor) -> None:
            put.append(value.flatten().tolist())

        def end(self) -> None: ...

    def loop(lm: object, input_ids: torch.Tensor, **given: object) -> torch.Tensor:
        seen.update(given, lm=lm)
        return input_ids

    ids = torch.tensor([[5, 6]])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, custom_generate=loop, streamer=Streamer()
    )
    assert out.tolist() == [[5, 6]] and put == [[5, 6]]
    assert seen["lm"] is model and "streamer" not in seen
    assert seen["attention_mask"] is None or bool(seen["attention_mask"].all())  # type: ignore[attr-defined]
    assert seen["stopping_criteria"].max_length == 5  # type: ignore[attr-defined]
    config = seen["generation_config"]
    assert config.num_beams == 1 and not config.do_sample and not config.return_dict_in_generate  # type: ignore[attr-defined]
    assert hasattr(config, "_pad_token_tensor") and callable(seen["logits_processor"])


def test_what_a_scripts_forward_is_looked_at_for(tmp_path: Path) -> None:
    """`adapters/unpad.py`, `adapters/dropin.py`: a causal LM's loss function by name, where NEFTune's alpha stands
    while a Trainer adds noise, and that accelerate's conversion of an output keeps a loss in fp32 as the object."""
    model = tiny.model("llama")
    assert model.loss_function is LOSS_MAPPING["ForCausalLM"]
    seen: list[float | None] = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: seen.append(getattr(module, "neftune_noise_alpha", None))
    )
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}]
    more = {"report_to": "none", "use_cpu": True, "max_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    arguments = TrainingArguments(output_dir=str(tmp_path), neftune_noise_alpha=5.0, **more)
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    model(IDS)
    assert seen == [5.0, None]
    loss = torch.ones(())
    assert convert_to_fp32(CausalLMOutputWithPast(loss=loss)).loss is loss


def test_letters_that_stand_for_bytes() -> None:
    """`writing/text.py`: printed letters stand for themselves, the others from 256 on."""
    letters = byte_letters()
    assert sorted(letters.values()) == [*range(256)] and letters["a"] == 97 and letters["\u0120"] == 32

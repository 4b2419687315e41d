"""A base is in memory what the policy says, on every architecture; what cannot be held so is an error by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import halfbyte
from halfbyte.base.load import Base, open_base
from halfbyte.errors import BaseModelError
from halfbyte.models import tensors as shapes
from halfbyte.models.sources.checkpoint import Checkpoint
from halfbyte.quant import bnb as codec
from halfbyte.quant.dequantise import dequantised
from halfbyte.recipe.schema import Quant
from halfbyte.system import device
from tests import plain_peft, small_models, tiny, tiny_run

CHOICES = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False), ("none", True)]
# Matrices of a layer that are held in 4 bits; gpt2, bloom, gpt_neox, falcon, mpt and phi3 fuse q, k and v.
MATRICES = {"llama": 7, "qwen3": 7, "gemma3": 7, "mistral": 7, "opt": 6}


def opened(folder: Path, *, isa: tuple[str, ...] | None = None, **quant: Any) -> Base:
    machine = device.detect()
    if isa is not None:
        machine = dataclasses.replace(machine, isa=isa)
    found = Checkpoint(path=folder, id="org/name", revision=None, kind="folder")
    return open_base(found, Quant(**quant), machine)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 23)[None]).logits[0].float()


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_resident_is_what_the_policy_says(name: str, tmp_path: Path) -> None:
    tiny.save(tmp_path, name, torch.float16)
    for kind, double in CHOICES:
        base = opened(tmp_path, type=kind, double_quant=double, compute_dtype="bf16")
        assert base.resident_bytes == base.expected_bytes, (kind, double)
        layers = codec.linears_4bit(base.model)
        assert len(layers) == (0 if kind == "none" else tiny.LAYERS * MATRICES.get(name, 4))
        assert all(m.weight.quant_state.quant_type == kind for _, m in layers)
        assert all(m.weight.quant_state.nested is double for _, m in layers)
        assert not any(m.support_avx512bf16_for_cpu for _, m in layers)
        floating = {p.dtype for p in base.model.parameters() if p.is_floating_point()}
        assert floating == {torch.bfloat16}  # the checkpoint is fp16
        assert not getattr(base.model, "use_kernels", False)  # of a hub: transformers' default from 5.25 on


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_the_quantised_model_is_near_the_plain_one(name: str, tmp_path: Path) -> None:
    """Dequantised weights, put into a plain model, give the same logits; so nothing is transposed or misplaced."""
    tiny.save(tmp_path, name)
    base = opened(tmp_path, compute_dtype="fp32")
    plain = tiny.model(name)
    for path, layer in codec.linears_4bit(base.model):
        weight = dequantised(layer).clone()
        target = plain.get_submodule(path)
        conv = isinstance(target, transformers.pytorch_utils.Conv1D)
        original = target.weight.data.T if conv else target.weight.data
        assert (weight - original).norm() / original.norm() < 0.12  # NF4's error on normal weights is 9%
        target.weight.data = weight.T.contiguous() if conv else weight
    torch.testing.assert_close(logits(base.model), logits(plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["nf4", "none"])
def test_an_evaluation_leaves_the_weights_of_rwkv_as_they_are(kind: Any, tmp_path: Path) -> None:
    """transformers divides them for an evaluation and multiplies them for training: with bitsandbytes only divides,
    in a frozen file not at all, and beside adapters ends."""
    plain = small_models.build("rwkv", num_hidden_layers=3, rescale_every=1)
    plain.save_pretrained(tmp_path)
    base = opened(tmp_path, type=kind, compute_dtype="fp32")
    adapted = plain_peft.adapt(base.model, ["value", "output"])
    held = {n: p.clone() for n, p in adapted.named_parameters()}
    learning = logits(adapted)
    for training in (False, True, False):
        torch.testing.assert_close(logits(adapted.train(training)), learning, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(held[n], p) for n, p in adapted.named_parameters())
    if kind == "none":
        with adapted.disable_adapter():
            torch.testing.assert_close(logits(adapted), logits(plain.train()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("asked", "isa", "wanted"),
    [
        ("auto", ("avx2", "avx512f", "avx512_bf16"), torch.bfloat16),
        ("auto", ("avx2",), torch.float32),
        ("fp32", ("avx512_bf16",), torch.float32),
        ("fp16", ("avx512_bf16",), torch.bfloat16),
        ("fp16", ("avx2",), torch.float32),
    ],
)
def test_an_fp16_checkpoint_loads_in_the_compute_dtype(
    asked: str, isa: tuple[str, ...], wanted: torch.dtype, tmp_path: Path
) -> None:
    tiny.save(tmp_path, "llama", torch.float16)
    base = opened(tmp_path, isa=isa, compute_dtype=asked)
    for _, layer in codec.linears_4bit(base.model):
        assert layer.weight.quant_state.dtype == layer.compute_dtype == wanted
    assert base.model.model.norm.weight.dtype == base.model.lm_head.weight.dtype == wanted
    assert logits(base.model).isfinite().all()


@pytest.mark.parametrize(("name", "tied"), [("llama", False), ("llama", True), ("gpt2", True), ("gpt2", False)])
def test_head_and_embedding_stay_in_16_bits(name: str, tied: bool, tmp_path: Path) -> None:
    tiny.model(name, changes={"tie_word_embeddings": tied}).save_pretrained(tmp_path)
    base = opened(tmp_path, compute_dtype="bf16")
    head, embedding = base.model.get_output_embeddings(), base.model.get_input_embeddings()
    assert type(head) is torch.nn.Linear
    assert head.weight.dtype == embedding.weight.dtype == torch.bfloat16
    assert (head.weight.data_ptr() == embedding.weight.data_ptr()) is tied
    assert base.resident_bytes == base.expected_bytes


@pytest.mark.parametrize("name", ["llama", "falcon", "gpt2"])
def test_skipped_modules_are_in_the_compute_dtype_and_the_head_too(name: str, tmp_path: Path) -> None:
    skip = {"llama": "down_proj", "falcon": "dense_4h_to_h", "gpt2": "mlp.c_proj"}[name]
    tiny.save(tmp_path, name)
    base = opened(tmp_path, compute_dtype="bf16", skip_modules=(skip,))
    modules = dict(base.model.named_modules())
    chosen = [m for path, m in modules.items() if f".{path}".endswith(f".{skip}")]
    assert len(chosen) == tiny.LAYERS
    assert all(m.weight.dtype == torch.bfloat16 and not hasattr(m.weight, "quant_state") for m in chosen)
    assert base.model.get_output_embeddings().weight.dtype == torch.bfloat16
    assert len(codec.linears_4bit(base.model)) == tiny.LAYERS * (MATRICES.get(name, 4) - 1)
    assert base.resident_bytes == base.expected_bytes


@pytest.mark.parametrize("chosen", [("norm", "input_layernorm", "post_attention_layernorm"), ("o_proj",), ("lm_head",)])
def test_fp32_modules_leave_the_residual_stream_as_it_is(chosen: tuple[str, ...], tmp_path: Path) -> None:
    tiny.save(tmp_path, "llama")
    plain = opened(tmp_path, compute_dtype="bf16")
    base = opened(tmp_path, compute_dtype="bf16", fp32_modules=chosen)
    stream: list[torch.dtype] = []
    for layer in base.model.model.layers:
        layer.register_forward_hook(lambda module, args, out: stream.append(out.dtype))
    got = logits(base.model)
    assert stream == [torch.bfloat16] * tiny.LAYERS
    held = [m for path, m in base.model.named_modules() if path.rsplit(".", 1)[-1] in chosen]
    assert held and all(m.weight.dtype == torch.float32 for m in held)
    assert base.resident_bytes == base.expected_bytes > plain.expected_bytes
    wanted = logits(plain.model)
    # an attention projection in fp32 is also unquantised: nearer to the original, so further from the 4-bit one
    assert (got - wanted).norm() / wanted.norm() < (0.2 if chosen == ("o_proj",) else 0.02)


def test_fp32_modules_that_name_nothing_are_an_error(tmp_path: Path) -> None:
    tiny.save(tmp_path, "llama")
    with pytest.raises(BaseModelError, match="nrm"):
        opened(tmp_path, fp32_modules=("nrm",))


def test_missing_weights_are_an_error(tmp_path: Path) -> None:
    tiny.save(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"lacks 1 of the weights.*layers\.1\.mlp\.up_proj\.weight"):
        opened(tmp_path)


def test_weights_of_another_shape_are_an_error(tmp_path: Path) -> None:
    tiny.save(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(32)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"model\.norm\.weight|shape|size"):
        opened(tmp_path)


def test_a_model_that_is_no_causal_lm_is_an_error(tmp_path: Path) -> None:
    transformers.T5Config().save_pretrained(tmp_path)
    with pytest.raises(BaseModelError, match="'t5' is not a causal language model"):
        opened(tmp_path)


def test_a_prequantised_checkpoint_opens_as_it_is(tmp_path: Path) -> None:
    tiny.save(tmp_path / "plain", "llama", torch.bfloat16)
    first = opened(tmp_path / "plain", compute_dtype="bf16")
    first.model.save_pretrained(tmp_path / "quantised")
    second = opened(tmp_path / "quantised", compute_dtype="bf16")
    assert len(codec.linears_4bit(second.model)) == 14
    assert not any(m.support_avx512bf16_for_cpu for _, m in codec.linears_4bit(second.model))
    assert torch.equal(logits(first.model), logits(second.model))


def test_biases_of_attention_projections_are_counted(tmp_path: Path) -> None:
    tiny.save(tmp_path, "gpt2")
    names = {spec.name for spec in shapes.read_checkpoint(tmp_path)}
    assert "transformer.h.0.attn.c_attn.bias" in names


def test_the_tokenizer_of_whatever_a_base_can_be(tmp_path: Path) -> None:
    """`AutoTokenizer` would look for a packaged name on the hub."""
    tokenizer = halfbyte.load_tokenizer("smollm2-135m")
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == 2 and tokenizer.chat_template
    tiny_run.checkpoint(tmp_path / "model")
    assert halfbyte.load_tokenizer(str(tmp_path / "model")).get_vocab() == tiny_run.tokenizer().get_vocab()

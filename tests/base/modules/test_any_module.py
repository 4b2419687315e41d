"""Any module in few bits: what is quantised, what is not, and that it computes as the formats' definitions say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import halfbyte
from halfbyte.quant import formats
from tests.base.modules import helpers
from tests.base.modules.helpers import LAYERS, empty, made, output, quantised, reference, save

pytestmark = pytest.mark.filterwarnings("ignore:.*stay as they are, being no plain linear layers")
NAMES = tuple(helpers.MAKE)
KINDS = ("nf4", "fp4", "int8")
# Half of the widest gap between two codes, in shares of a block's largest number: NF4 0.152, FP4 0.167, int8 1/254; for
# 4 bits 8-bit scales add less than 0.02, for int8 fp16 adds 2^-11.
WIDEST = {"nf4": 0.172, "fp4": 0.187, "int8": 1 / 254 + 2.0**-10}


def close(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """fp32 sums of at most 80 terms through a dozen layers: a few hundred roundings of 6e-8 relative to the largest."""
    return bool((got - wanted).abs().max() <= 2e-5 * wanted.abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_module_computes_what_its_dequantised_weights_say(name: str, kind: str, tmp_path: Path) -> None:
    original = made(name)
    held = halfbyte.quantize_model(empty(name), save(original, tmp_path), quant=kind, dtype="fp32")
    layers = quantised(held)
    plain = {p: m for p, m in original.named_modules() if type(m) is nn.Linear}
    kept = {"encoder": {"output"}, "vit": {"classifier"}, "llama": {"lm_head"}, "whisper": {"proj_out"}}[name]
    assert set(layers) == set(plain) - kept
    errors = [helpers.error_of(layer, plain[path].weight) for path, layer in layers.items()]
    assert 0 < max(errors) <= WIDEST[kind]
    assert all(formats.of_module(layer).name == kind for layer in layers.values())
    wanted = output(reference(original, held), name)
    assert close(output(held, name), wanted) and not close(output(original, name), wanted)
    with torch.no_grad():  # evaluation and training compute one function
        assert close(output(held, name), wanted)
    assert torch.equal(output(held.train(), name), output(held.eval(), name))


@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_module_gives_the_same_bytes_as_one_from_a_file(name: str, tmp_path: Path) -> None:
    original = made(name)
    streamed = halfbyte.quantize_model(empty(name), save(original, tmp_path, files=3), dtype="fp32")
    loaded = halfbyte.quantize_model(original, dtype="fp32")
    ours, theirs = streamed.state_dict(), loaded.state_dict()
    assert set(ours) == set(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert not any(t.is_meta for t in (*streamed.parameters(), *streamed.buffers()))
    assert torch.equal(output(streamed, name), output(loaded, name))


@pytest.mark.parametrize("name", NAMES)
def test_skipped_modules_stay_as_they_are(name: str, tmp_path: Path) -> None:
    original, first = made(name), f"{LAYERS[name]}.0"
    held = halfbyte.quantize_model(empty(name), save(original, tmp_path), dtype="fp32", skip_modules=[first])
    assert quantised(held) and not any(path.startswith(f"{first}.") for path in quantised(held))
    for key, value in original.get_submodule(first).state_dict().items():
        assert torch.equal(held.get_submodule(first).state_dict()[key], value)
    assert close(output(held, name), output(reference(original, held), name))


@pytest.mark.parametrize("name", NAMES)
def test_modules_in_fp32_are_so_from_the_file_on(name: str, tmp_path: Path) -> None:
    """With bf16 around them: their numbers are the file's to the bit, and they multiply in fp32."""
    original, first = made(name), f"{LAYERS[name]}.0"
    held = halfbyte.quantize_model(
        empty(name),
        save(original, tmp_path),
        dtype="bf16",
        keep_in_fp32_modules=[first, *({"encoder": ["embedding"]}.get(name, ()))],
    )
    part = held.get_submodule(first)
    assert {p.dtype for p in part.parameters()} == {torch.float32} and not quantised(part)
    for key, value in original.get_submodule(first).state_dict().items():
        assert torch.equal(part.state_dict()[key], value)
    others = [
        p.dtype for n, p in held.named_parameters() if not n.startswith((first, "embedding")) and p.is_floating_point()
    ]
    assert set(others) == {torch.bfloat16}
    seen: list[torch.dtype] = []
    inner = next(m for m in part.modules() if type(m) is nn.Linear)
    inner.register_forward_hook(lambda _m, args, out: seen.append(args[0].dtype))
    got = output(held, name, torch.bfloat16)
    assert seen == [torch.float32]
    if name == "encoder":  # the output layer shares the embedding's fp32 numbers
        assert held.output.weight is held.embedding.weight and held.output.weight.dtype == torch.float32
    wanted = output(reference(original, held), name)
    assert (got.float() - wanted).abs().max() <= 0.06 * wanted.abs().max()  # a dozen roundings of 2^-8 through 3 layers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_layers_on_disk_give_the_same_output(name: str, kind: str, tmp_path: Path) -> None:
    folder = save(made(name), tmp_path / "weights")
    there = halfbyte.quantize_model(empty(name), folder, quant=kind, dtype="fp32")
    off = tmp_path / "off"
    part = f"{LAYERS[name]}.1"
    away = halfbyte.quantize_model(
        empty(name), folder, quant=kind, dtype="fp32", device_map={"": "cpu", part: "disk"}, offload_folder=off
    )
    assert [p.name for p in off.iterdir()] == [f"{part}.safetensors"]
    assert quantised(away.get_submodule(part))
    assert torch.equal(output(away, name), output(there, name))
    assert torch.equal(output(away, name), output(there, name))


def test_everything_on_disk(tmp_path: Path) -> None:
    folder = save(made("llama"), tmp_path / "weights")
    away = halfbyte.quantize_model(
        empty("llama"), folder, dtype="fp32", device_map={"": "disk"}, offload_folder=tmp_path / "off"
    )
    names = sorted(p.stem for p in (tmp_path / "off").iterdir())
    assert names == ["lm_head", "model.embed_tokens", *(f"model.layers.{n}" for n in range(3)), "model.norm"]
    assert torch.equal(
        output(away, "llama"), output(halfbyte.quantize_model(empty("llama"), folder, dtype="fp32"), "llama")
    )


def test_tied_weights_are_one_tensor_and_the_right_one(tmp_path: Path) -> None:
    original = made("encoder")
    held = halfbyte.quantize_model(empty("encoder"), save(original, tmp_path), dtype="fp32", skip_modules=[])
    assert held.output.weight is held.embedding.weight
    assert torch.equal(held.output.weight, original.embedding.weight)


def test_an_empty_list_of_skipped_modules_quantises_the_output_layer_too() -> None:
    assert "lm_head" not in quantised(halfbyte.quantize_model(made("llama")))
    assert "lm_head" not in quantised(halfbyte.quantize_model(made("llama"), skip_modules=["mlp"]))
    assert "lm_head" in quantised(halfbyte.quantize_model(made("llama"), skip_modules=[]))


def test_a_layer_in_two_places_is_quantised_once() -> None:
    shared = nn.Linear(64, 64)
    held = halfbyte.quantize_model(nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(64, 8)))
    assert held[0] is held[2] and set(quantised(held)) == {"0", "3"}


@pytest.mark.parametrize("kind", KINDS)
def test_torchs_encoder_in_evaluation_calls_its_quantised_layers(kind: str) -> None:
    """Its fast path takes the weights of its linears; with a padding mask it makes nested tensors before."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True, dropout=0.0)
    original = nn.TransformerEncoder(layer, 2).eval()
    wanted = halfbyte.quantize_model(nn.TransformerEncoder(layer, 2).eval(), quant=kind, dtype="fp32")
    x, mask = torch.randn(2, 7, 64), torch.zeros(2, 7, dtype=torch.bool)
    mask[1, 5:] = True
    plain = reference(original, wanted).train()  # no fast path
    with torch.no_grad():
        assert close(wanted(x), plain(x))
        assert close(wanted(x, src_key_padding_mask=mask)[~mask], plain(x, src_key_padding_mask=mask)[~mask])


def test_conv1d_is_turned(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=70, n_positions=32, attn_implementation="eager")
    torch.manual_seed(0)
    original = GPT2LMHeadModel(config).eval()
    with torch.device("meta"):
        module = GPT2LMHeadModel(config).eval()
    held = halfbyte.quantize_model(module, save(original, tmp_path), dtype="fp32")
    assert len(quantised(held)) == 8 and held.transformer.h[0].mlp.c_fc.in_features == 48
    assert close(output(held, "llama"), output(reference(original, held), "llama"))


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_int8_rounds_activations_in_training_and_evaluation_alike(threshold: float | None) -> None:
    held = halfbyte.quantize_model(made("llama"), quant={"type": "int8", "llm_int8_threshold": threshold}, dtype="fp32")
    assert torch.equal(output(held.eval(), "llama"), output(held.train(), "llama"))
    exact = close(output(held, "llama"), output(reference(made("llama"), held), "llama"))
    assert exact is (threshold is None)


def test_a_configuration_of_transformers_is_taken() -> None:
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_storage=torch.float32,
    )
    before = config.to_dict()
    held: Any = halfbyte.quantize_model(made("llama"), quant=config, dtype="fp32")
    weight = held.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.float32 and weight.quant_state.nested and weight.numel() == 48 * 80 // 8
    assert close(output(held, "llama"), output(reference(made("llama"), held), "llama"))
    assert config.to_dict() == before

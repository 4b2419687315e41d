"""plan/layer.py against the engine: what autograd keeps for one layer of every family, byte for byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from halfbyte.adapters import lora as adapters
from halfbyte.adapters import targets
from halfbyte.base import load
from halfbyte.layers import attention, fuse, packed_attention, packing, recurrent
from halfbyte.layers.kernels import cpu, pool
from halfbyte.layers.kernels.cpu import tiles
from halfbyte.models import structure
from halfbyte.models.families import FAMILIES
from halfbyte.models.lora_sites import Site, sites
from halfbyte.models.sources.lookup import resolve
from halfbyte.models.tensors import Facts, facts_of, read_checkpoint, read_config, spec_of
from halfbyte.plan.layer import Layer, layer_of, pairs_of
from halfbyte.plan.memory import recurrent_lines
from halfbyte.proofs.fusing import prove_fused
from halfbyte.proofs.packing import prove_packing
from halfbyte.recipe.schema import Lora, Quant
from halfbyte.system import device as machine
from tests import small_models, tiny

LENGTHS = (40, 56)
TOKENS = sum(LENGTHS)
RANK = 8
MORE = {
    "gemma": "GemmaConfig", "gemma2": "Gemma2Config", "granite": "GraniteConfig", "smollm3": "SmolLM3Config",
    "qwen2": "Qwen2Config", "olmo2": "Olmo2Config", "olmo3": "Olmo3Config", "starcoder2": "Starcoder2Config",
    "nemotron": "NemotronConfig", "stablelm": "StableLmConfig",
}  # fmt: skip


# The model's own dropout, which tiny.py sets to 0.
OWN = {
    "gpt2": {"attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1},
    "opt": {"attention_dropout": 0.1, "dropout": 0.1},
}


def build(name: str, layers: int, folder: Path, changed: dict[str, Any] | None = None) -> Path:
    """A checkpoint of `layers` layers; the MLP's width is no other tensor's, so that nothing is right by accident."""
    import transformers

    count = {"gpt2": "n_layer", "bloom": "n_layer", "mpt": "n_layers", "gptj": "n_layer"}.get(name, "num_hidden_layers")
    if name in tiny.ARCHITECTURES:
        inner = {"gpt2": "n_inner", "opt": "ffn_dim", "falcon": "ffn_hidden_size"}.get(name, "intermediate_size")
        changes: dict[str, Any] = {count: layers} | ({inner: 192} if name not in ("bloom", "mpt") else {})
        if name == "gemma3":
            changes |= {"layer_types": ["full_attention"] * layers}
        changes |= changed or {}
        tiny.model(name, dtype=torch.bfloat16, changes=changes).save_pretrained(folder)
        return folder
    sizes: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 256, "pad_token_id": 0}
    if name in ("phi", "gptj"):
        old = {"n_embd": 64, "n_head": 4, "n_inner": 192, "rotary_dim": 8, "vocab_size": 256, "resid_pdrop": 0.0}
        config = (
            transformers.PhiConfig(**sizes, intermediate_size=192, num_hidden_layers=layers)
            if name == "phi"
            else transformers.GPTJConfig(**old, n_layer=layers)
        )
    else:
        kind = getattr(transformers, MORE[name])
        # the proofs go through a row longer than every window, and gemma2's own is of 4,096 tokens
        window = {"sliding_window": 2 * TOKENS} if name in ("gemma2", "olmo3", "starcoder2") else {}
        sizes |= {"residual_dropout": 0.0, "embedding_dropout": 0.0} if name == "starcoder2" else {}
        sizes |= {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 192, **window}
        config = kind(**sizes, num_hidden_layers=layers)
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def kept_bytes(
    folder: Path, asked: str, dropout: float, *, cheap: bool = False, quant: str = "nf4", parameters: Any = None,
    prove: bool = False,
) -> tuple[int, tuple[Site, ...], Facts]:  # fmt: skip
    """Bytes that backward keeps in a micro-batch through the body, without the model's own weights."""
    how = Quant(compute_dtype="bf16", type=quant)
    opened = load.open_base(resolve(str(folder)), how, machine.detect())
    lora = Lora(r=RANK, lora_dropout=dropout, target_modules=asked, target_parameters=parameters)
    config, specs = read_config(folder), read_checkpoint(folder)
    if parameters:
        specs = [spec_of(name, tuple(p.shape), "BF16", config) for name, p in opened.model.named_parameters()]
    resolved = targets.resolve_targets(opened.model, asked)
    model = adapters.add(opened.model, lora, resolved, seed=0)
    packing.install(structure.causal_lm(model))
    fuse.install(model)
    assert not prove or (prove_packing(model).ok and prove_fused(model, packed=True).ok)
    fuse.recompute_cheap(model, on=cheap)
    model.train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    starts = torch.tensor([0, LENGTHS[0], TOKENS], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    batch = {"input_ids": torch.randint(0, 256, (1, TOKENS)), "position_ids": positions[None], "cu_seq_lens_q": starts}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        structure.body(structure.causal_lm(model))(**packing.forward_inputs(model, batch))
    total = sum(t.untyped_storage().nbytes() for t in kept.values())
    return total, sites(specs, lora, resolved.names), facts_of(config, specs)


def measured_and_planned(
    name: str, root: Path, asked: str, dropout: float, *, kernels: bool, cheap: bool = False,
    changed: dict[str, Any] | None = None, prove: bool = False,
) -> tuple[float, float]:  # fmt: skip
    """Bytes of one layer: the difference between three layers and two (which are `prove`n), and the formula's."""
    two, _, _ = kept_bytes(build(name, 2, root / "2", changed), asked, dropout, cheap=cheap, prove=prove)
    three, found, facts = kept_bytes(build(name, 3, root / "3", changed), asked, dropout, cheap=cheap)
    windows = cpu.whole_attention(torch.empty(0, dtype=torch.bfloat16))  # a kernel has them, as a job asks
    longest = 0 if kernels and windows else max(LENGTHS)
    layer = layer_of(facts, found, 2, kernels=kernels, dropout=dropout > 0, longest=longest)
    copies = 2 * sum(site.parameters for site in found) / facts.layers  # LoRA's weights in bf16
    return three - two, TOKENS * (layer.selective if cheap else layer.kept) + layer.pair * pairs_of(
        layer, LENGTHS
    ) + copies


# One of each way that mixtures differ: norms of q and k, a shared expert, biases and sinks.
MIXTURES = {
    "mixtral": {"sliding_window": None},
    "qwen2_moe": {"use_sliding_window": False, "layer_types": ["full_attention"] * 3},
    "qwen3_moe": {"use_sliding_window": False},
    "olmoe": {},
    "gpt_oss": {"layer_types": ["full_attention"] * 3},
}


@pytest.mark.parametrize("parameters", [None, ("gate_up_proj", "down_proj")])
@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_keeps_what_the_formula_says(name: str, parameters: Any, tmp_path: Path) -> None:
    kept, found, facts = [], (), None
    for layers in (2, 3):
        changed = {key: value[:layers] if isinstance(value, list) else value for key, value in MIXTURES[name].items()}
        model = small_models.build(name, num_hidden_layers=layers, vocab_size=256, **changed).bfloat16()
        model.save_pretrained(tmp_path / str(layers))
        nbytes, found, facts = kept_bytes(tmp_path / str(layers), "auto", 0.0, quant="none", parameters=parameters)
        kept.append(nbytes)
    layer = layer_of(facts, found, 2, kernels=True, dropout=False, longest=max(LENGTHS))
    planned = TOKENS * layer.kept + layer.pair * pairs_of(layer, LENGTHS)
    planned += 2 * sum(site.parameters for site in found) / facts.layers  # LoRA's weights in bf16
    assert kept[1] - kept[0] == pytest.approx(planned, rel=0.15 if name == "gpt_oss" else 0.03)


# Two layers each: one with a recurrence and one with attention, or both in each.
HYBRIDS: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "num_local_experts": 0},
    "falcon_h1": {},
}


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_hybrid_keeps_what_the_formula_says(name: str, tmp_path: Path) -> None:
    kept, found, facts = [], (), None
    for times in (1, 2):
        changed = {key: value * times if isinstance(value, list) else value for key, value in HYBRIDS[name].items()}
        model = small_models.build(name, num_hidden_layers=2 * times, vocab_size=256, **changed).bfloat16()
        model.save_pretrained(tmp_path / str(times))
        nbytes, found, facts = kept_bytes(tmp_path / str(times), "all-linear", 0.05, quant="none")
        kept.append(nbytes)
    layer = layer_of(facts, found, 2, kernels=True, dropout=True, longest=max(LENGTHS))
    planned = 2 * (TOKENS * layer.kept + 2 * sum(site.parameters for site in found) / facts.layers)
    assert kept[1] - kept[0] == pytest.approx(planned, rel=0.05), (kept[1] - kept[0], planned)


@pytest.mark.skipif(not cpu.enabled() or not tiles.available32(), reason="these kernels do not run here")
@pytest.mark.parametrize("longest", [40, 500])
@pytest.mark.parametrize("name", ["granitemoehybrid", "falcon_h1", "qwen3_5_text"])
def test_threads_of_a_recurrence_ask_for_what_is_planned(
    name: str, longest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_models.build(name, **HYBRIDS[name]).requires_grad_(False)
    model.save_pretrained(tmp_path)
    facts = facts_of(read_config(tmp_path), read_checkpoint(tmp_path))
    job: Any = SimpleNamespace(facts=facts, kernels=True, recurrent=True, rows=SimpleNamespace(longest=longest))
    (planned,) = recurrent_lines(job, torch.get_num_threads())
    asked: list[int] = []
    real = pool.empty

    def seen(shape: Any, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        asked.extend([shape[0]] if dtype is torch.uint8 else [])
        return real(shape, like, dtype)

    monkeypatch.setattr(pool, "empty", seen)
    prove_packing(model)
    starts = torch.tensor([0, longest], dtype=torch.int32)
    x = torch.randn(1, longest, facts.hidden, requires_grad=True)
    for mixer in (m for m in model.modules() if isinstance(m, recurrent._ChunkMixer)):
        asked.clear()
        mixer(x, cu_seq_lens_q=starts).sum().backward()
        assert len(asked) == 2 and max(asked) <= planned.bytes
        assert max(asked) == planned.bytes or tiles.LANES32 < 16  # it counts the largest tile


@pytest.mark.parametrize("name", [*tiny.ARCHITECTURES, *MORE, "phi", "gptj"])
@pytest.mark.parametrize(("asked", "dropout"), [("auto", 0.0), ("all-linear", 0.05)])
def test_a_layer_keeps_what_the_formula_says(name: str, asked: str, dropout: float, tmp_path: Path) -> None:
    measured, planned = measured_and_planned(name, tmp_path, asked, dropout, kernels=True, prove=dropout > 0)
    # GPT-J keeps its rotary tables once a layer, as wide as a setting of its own says
    assert planned == pytest.approx(measured, rel=0.05 if name == "gptj" else 0.01)


# Of examples of 40 and 56 tokens both, one or none is longer than the window. gemma3: every layer has it.
WINDOWS = {
    "mistral": {},
    "phi3": {},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 0},
    "gemma3": {"layer_types": None},
}


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize(
    ("window", "asked", "kernel"),
    [(8, "auto", True), (8, "auto", False), (48, "auto", False), (48, "all-linear", False), (56, "auto", False)],
)
def test_a_window_shorter_than_an_example_keeps_a_mask_and_a_copy_without_a_kernel(
    name: str, window: int, asked: str, kernel: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernel:
        for module in (cpu, attention, packed_attention):
            monkeypatch.setattr(module, "whole_attention", lambda _: False)
    changed = {**WINDOWS[name], "sliding_window": window}
    measured, planned = measured_and_planned(name, tmp_path, asked, 0.0, kernels=True, changed=changed)
    assert planned == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("name", OWN)
def test_a_model_that_drops_in_training_keeps_no_scores_and_no_mask_of_its_modules(name: str, tmp_path: Path) -> None:
    measured, planned = measured_and_planned(name, tmp_path, "auto", 0.0, kernels=True, changed=OWN[name])
    assert planned == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("name", [*tiny.ARCHITECTURES, *MORE])
def test_a_layer_keeps_less_where_the_cheap_is_made_again(name: str, tmp_path: Path) -> None:
    measured, planned = measured_and_planned(name, tmp_path, "all-linear", 0.05, kernels=True, cheap=True)
    assert planned == pytest.approx(measured, rel=0.01)


def test_without_kernels_as_on_a_card(tmp_path: Path) -> None:
    code = (
        "import json, sys\nfrom pathlib import Path\nfrom tests.plan.test_layer import measured_and_planned\n"
        "print(json.dumps({n: measured_and_planned(n, Path(sys.argv[1]) / n, 'all-linear', 0.05, kernels=False)"
        " for n in ('llama', 'qwen3', 'gemma3', 'gpt2')}))"
    )
    env = {**os.environ, "HALFBYTE_KERNELS": "0"}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    for name, (measured, planned) in json.loads(done.stdout.splitlines()[-1]).items():
        assert planned == pytest.approx(measured, rel=0.03), name


def test_every_family_is_measured() -> None:
    types = {"gemma3": "gemma3_text"}
    assert {types.get(n, n) for n in (*tiny.ARCHITECTURES, *MORE, "phi", "gptj", *MIXTURES, *HYBRIDS)} == {
        name for name, family in FAMILIES.items() if not family.encoder
    }


def test_an_unknown_architecture_is_counted_as_the_stock_gated_kind() -> None:
    facts = Facts("novel", 64, 128, 2, 100, heads=4, key_heads=2, head_size=16)
    assert facts.model_type not in FAMILIES
    known = layer_of(
        Facts("llama", 64, 128, 2, 100, heads=4, key_heads=2, head_size=16), (), 2, kernels=True, dropout=False
    )
    assert layer_of(facts, (), 2, kernels=True, dropout=False).kept > known.kept


def test_policies_keep_less_and_less() -> None:
    facts = Facts("llama", 64, 128, 2, 100, heads=4, key_heads=2, head_size=16)
    layer: Layer = layer_of(facts, (), 2, kernels=True, dropout=False)
    assert layer.of("none") >= layer.of("selective") > layer.of("full") == 2 * 64

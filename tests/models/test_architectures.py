"""architectures.py and the references of describe.py: a config's tensors, against the real modules of transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.errors import SourceError
from halfbyte.models.describe import describe, reference_tensors, references, tensors_of
from halfbyte.models.families import FAMILIES, layout_of
from tests import tiny

REFERENCES = {name: values["config"] for name, values in references().items() if "tensors" not in values}
MIXTURES = sorted(set(references()) - set(REFERENCES))
# As their authors publish them (a tied head counted once).
PUBLISHED = {
    "llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320, "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248, "llama-3.1-70b": 70_553_706_496, "llama-3.2-1b": 1_235_814_400,
    "qwen2.5-0.5b": 494_032_768, "qwen2.5-7b": 7_615_616_512, "qwen3-8b": 8_190_735_360, "mistral-7b": 7_241_732_096,
    "smollm2-135m": 134_515_008, "gemma-2b": 2_506_172_416, "phi-2": 2_779_683_840, "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200, "bloom-7b1": 7_069_016_064, "gpt-neox-20b": 20_554_567_680, "falcon-7b": 6_921_720_704,
    "opt-6.7b": 6_658_473_984, "mpt-7b": 6_649_286_656, "gpt-j-6b": 6_050_882_784,
}  # fmt: skip


def real(config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the modules that transformers builds, without storage; a tied head once."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    # transformers 5 calls GPT-NeoX's head lm_head in memory, and embed_out in the files that it writes and reads
    files = {"lm_head.weight": "embed_out.weight"} if config.model_type == "gpt_neox" else {}
    return {files.get(name, name): tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_a_reference_has_the_tensors_of_the_real_architecture(name: str) -> None:
    from transformers import AutoConfig

    values = REFERENCES[name]
    layers = {k: 2 for k in ("num_hidden_layers", "n_layer", "n_layers") if k in values}
    config = AutoConfig.for_model(**{**values, **layers})
    assert {s.name: s.shape for s in tensors_of({**values, **layers})} == real(config)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_bundled_mixture_has_the_tensors_of_the_real_architecture(name: str) -> None:
    """At its true width, with all of its layers, on no storage."""
    from transformers import AutoConfig

    assert dict(reference_tensors(name) or ()) == real(AutoConfig.for_model(**references()[name]["config"]))


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_a_saved_config_gives_the_tensors_of_its_checkpoint(tmp_path: Path, name: str) -> None:
    from halfbyte.models.tensors import read_checkpoint, read_config

    tiny.save(tmp_path, name, torch.float32)
    assert sorted(tensors_of(read_config(tmp_path)), key=str) == sorted(read_checkpoint(tmp_path), key=str)


@pytest.mark.parametrize(("name", "published"), PUBLISHED.items())
def test_parameters_are_as_many_as_published(name: str, published: int) -> None:
    assert sum(s.numel for s in tensors_of(REFERENCES[name])) == published


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("mixtral-8x7b", 46_702_792_704),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("gpt-oss-20b", 20_914_757_184),
        ("deepseek-v3", 671_026_419_200 - 58 * 256),  # without what balances its experts, which is no parameter
    ],
)
def test_a_mixture_has_as_many_parameters_as_published(name: str, published: int) -> None:
    shape = describe(name)
    assert shape.parameters == published and shape.facts.experts_per_token > 1
    assert shape.facts.intermediate == references()[name]["config"].get(
        "moe_intermediate_size", shape.facts.intermediate
    )


def test_every_family_has_a_reference_or_a_tiny_model() -> None:
    met = {str(values["model_type"]) for values in REFERENCES.values()} | {"granite"}
    assert met == set(filter(layout_of, FAMILIES))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "rwkv"},
            r"architecture 'rwkv' are not known.*Known: bloom.*\n.*download the model's .safetensors",
        ),
        ({}, r"config.json has no model_type"),
        ({"model_type": "llama", "hidden_size": 64, "vocab_size": 9, "num_attention_heads": 2}, r"gives no layers"),
        ({"model_type": "llama", "num_hidden_layers": 0, "hidden_size": 64}, r"gives no layers, vocab, heads"),
    ],
)
def test_what_does_not_follow_is_said(config: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=f"(?s){message}"):
        tensors_of(config)


def test_the_list_of_a_70b_takes_no_torch() -> None:
    code = (
        "import sys\nfrom halfbyte.models.describe import tensors_of\n"
        "from halfbyte.models.describe import references\n"
        "tensors_of(references()['llama-2-70b']['config'])\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

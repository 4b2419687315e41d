"""The language model of a checkpoint with towers, opened alone: names, logits and tensors are those of the whole class,
which transformers opens itself."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from halfbyte.adapters import lora, targets
from halfbyte.base.config import open_config
from halfbyte.base.store import conversion
from halfbyte.models import tensors, text_half
from halfbyte.models.structure import meta_model
from halfbyte.recipe.schema import Lora
from tests import small_models

KINDS = small_models.WHOLE
MOST_PARAMETERS = 20_000_000
IDS = torch.arange(3, 43).view(2, 20)


@pytest.fixture(scope="module", params=KINDS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """(the folder of a small checkpoint, the whole model in it)."""
    whole = small_models.whole(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    whole.save_pretrained(folder)
    return folder, whole


def opened(folder: Path) -> Any:
    config = open_config(folder)
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()


def test_its_tensors_have_the_names_of_the_whole_class(saved: tuple[Path, Any]) -> None:
    folder, whole = saved
    half = opened(folder)
    mine, all_ = dict(half.named_parameters()), dict(whole.named_parameters())
    assert set(mine) <= set(all_) and len(mine) < len(all_)
    assert all(torch.equal(value, all_[name]) for name, value in mine.items())
    decoder = next(name for name, module in whole.named_modules() if module is whole.get_decoder())
    assert {name for name in all_ if name.startswith((f"{decoder}.", "lm_head."))} == set(mine)


def test_it_says_what_the_whole_class_says(saved: tuple[Path, Any]) -> None:
    folder, whole = saved
    with torch.no_grad():
        wanted, got = (model(input_ids=IDS).logits for model in (whole, opened(folder)))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_of_before_is_renamed_as_for_the_whole_class(saved: tuple[Path, Any]) -> None:
    """By every name that a tensor of the language model may have in a file."""
    folder, whole = saved
    half = meta_model(open_config(folder))
    state = half.state_dict()
    old = (
        "language_model.model.{}",
        "model.language_model.{}",
        "model.{}",
        "text_model.model.{}",
        "model.text_model.{}",
    )
    body = [name.split(".", 2)[2] for name in state if name.startswith("model.")]
    names = [form.format(name) for form in old for name in body] + ["language_model.lm_head.weight", "lm_head.weight"]
    wanted = conversion.renamed(whole, names, whole.state_dict())
    got = conversion.renamed(half, names, state)
    assert {n: to[0] for n, to in got.items() if to[0] in state} == {
        n: to[0] for n, to in wanted.items() if to[0] in state
    }


def test_the_headers_list_what_it_reads(saved: tuple[Path, Any]) -> None:
    """Without transformers: the tensors and sizes of a plan are those of the model that is opened."""
    folder, _ = saved
    config, half = tensors.read_config(folder), meta_model(open_config(folder))
    specs = tensors.read_checkpoint(folder)
    state = {name: tuple(value.shape) for name, value in half.state_dict().items()}
    for tied in half.all_tied_weights_keys:
        del state[tied]
    assert sorted((s.name, s.shape) for s in specs) == sorted(state.items())
    facts, real = tensors.facts_of(config, specs), half.config
    assert (facts.model_type, facts.hidden, facts.layers) == (real.model_type, real.hidden_size, real.num_hidden_layers)
    assert (facts.heads, facts.key_heads) == (real.num_attention_heads, real.num_key_value_heads)


def test_an_adapter_of_the_half_works_on_the_whole(saved: tuple[Path, Any], tmp_path: Path) -> None:
    """Keys are those that plain PEFT gives an adapter of the whole class; loaded there it says the same."""
    folder, whole = saved
    half = opened(folder)
    config = peft.LoraConfig(target_modules=targets.resolve_targets(half, "auto").for_peft, init_lora_weights=False)
    mine = peft.get_peft_model(half, config)
    mine.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")  # of a tower's layers
        again = peft.PeftModel.from_pretrained(whole, tmp_path)
    with torch.no_grad():
        got, wanted = again(input_ids=IDS).logits, mine(input_ids=IDS).logits
        alone = again.unload()(input_ids=IDS).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert (got - alone).abs().max() > 0.01


@pytest.mark.parametrize("asked", ["auto", ["q_proj", "k_proj"]])
def test_only_some_layers_of_the_half_get_an_adapter(asked: Any, saved: tuple[Path, Any]) -> None:
    half = opened(saved[0])
    settings = Lora(target_modules=asked, layers_to_transform=(1,))
    chosen, modules = lora.choose_targets(half, settings)
    every = [n for n, m in half.named_modules() if isinstance(m, torch.nn.Linear) and ".layers.1." in n]
    if asked != "auto":
        assert modules == [name for name in every if name.endswith(tuple(asked))]
    adapted = lora.add(half, settings, chosen, seed=0)
    layers = {n.removesuffix(".lora_A") for n, _ in adapted.named_modules() if n.endswith(".lora_A")}
    assert modules and layers == {f"base_model.model.{name}" for name in modules} and set(modules) <= set(every)


def test_sizes_that_a_file_leaves_out_are_those_of_the_config_class() -> None:
    for kind, values in text_half._DEFAULTS.items():
        real = AutoConfig.for_model(kind)
        assert {name: getattr(real, name) for name in values} == values


@pytest.mark.slow
def test_every_type_with_towers_that_opens_says_what_its_whole_class_says() -> None:
    wrong, opens = {}, []
    for kind in small_models.WHOLE_TYPES:
        try:
            half = text_half.half_of(small_models.config(kind))
            whole = None if half is None else small_models.whole(kind, most=MOST_PARAMETERS)
        except Exception:  # of any kind: a type that cannot be built small
            continue
        if whole is None:
            continue
        model = AutoModelForCausalLM.from_config(half, dtype=torch.float32).eval()
        model.load_state_dict(whole.state_dict(), strict=False)
        with torch.no_grad():
            apart = (whole(input_ids=IDS).logits - model(input_ids=IDS).logits).abs().max()
        opens.append(kind)
        if apart > 1e-4:
            wrong[kind] = float(apart)
    assert wrong == {}
    assert len(opens) >= 20

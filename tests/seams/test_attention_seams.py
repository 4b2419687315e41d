"""The upstream seams that packed attention stands on. One that moves fails here, by name."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.falcon.modeling_falcon import FalconAttention

from halfbyte.layers import packed_attention
from tests import tiny

INTERFACE = [name for name in tiny.ARCHITECTURES if name not in {"bloom", "mpt", "falcon"}]


@pytest.fixture(autouse=True)
def _registered() -> None:
    packed_attention.register()


def test_both_registries_know_the_name() -> None:
    assert packed_attention.NAME in AttentionInterface() and packed_attention.NAME in AttentionMaskInterface()


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_the_flags_that_choose_a_layout(name: str) -> None:
    cls = type(tiny.model(name))
    takes_positions = "position_ids" in inspect.signature(cls.forward).parameters
    got = (cls._can_set_attn_implementation(), bool(cls._supports_flash_attn), takes_positions)
    alone = "alibi" in inspect.signature(FalconAttention.forward).parameters  # until transformers 5.25
    wanted = {"bloom": (False, False, False), "mpt": (False, False, False), "falcon": (not alone, True, True)}
    assert got == wanted.get(name, (True, True, True))


@pytest.mark.parametrize("name", INTERFACE)
def test_lengths_windows_and_scale_reach_the_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keyword arguments travel from the model's forward to every attention call; gemma3 says its window there."""
    seen: list[dict[str, Any]] = []

    def spy(module: Any, q: Any, k: Any, v: Any, mask: Any, **kwargs: Any) -> Any:
        seen.append({"mask": mask, **kwargs})
        return packed_attention.attention(module, q, k, v, mask, **kwargs)

    AttentionInterface.register("halfbyte_spy", spy)
    AttentionMaskInterface.register("halfbyte_spy", AttentionMaskInterface()[packed_attention.NAME])
    model = tiny.model(name)
    model.set_attn_implementation("halfbyte_spy")
    starts = torch.tensor([0, 3, 8], dtype=torch.int32)
    mask = packed_attention.no_mask("cpu")
    model(
        input_ids=torch.arange(8)[None],
        position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]),
        attention_mask=mask,
        cu_seq_lens_q=starts,
        cu_seq_lens_k=starts,
        max_length_q=5,
        max_length_k=5,
    )
    assert len(seen) == tiny.LAYERS
    assert all(call["cu_seq_lens_q"] is starts and call["mask"].numel() == 0 for call in seen)
    if name == "gemma3":
        assert [call["sliding_window"] for call in seen] == [tiny.SLIDING_WINDOW, None]


def test_a_four_dimensional_mask_is_handed_through() -> None:
    config = tiny.config("gemma3")
    config._attn_implementation = packed_attention.NAME
    mask = packed_attention.no_mask("cpu")
    cache = {"cache", "past_key_values"} & inspect.signature(create_causal_mask).parameters.keys()  # new name, and old
    arguments = {"inputs_embeds": torch.zeros(1, 4, 64), "attention_mask": mask, **dict.fromkeys(cache)}
    assert create_causal_mask(config, **arguments) is mask
    assert create_sliding_window_causal_mask(config, **arguments) is mask


def test_the_implementation_can_be_set_after_loading_and_taken_back() -> None:
    model = tiny.model("llama")
    model.set_attn_implementation(packed_attention.NAME)
    assert model.config._attn_implementation == packed_attention.NAME
    assert packed_attention.NAME not in model.config.to_json_string()  # never saved with the model
    model.set_attn_implementation(None)
    assert model.config._attn_implementation == "sdpa"


def test_falcon_builds_a_block_mask_from_positions_only_without_a_cache() -> None:
    """Why `use_cache=False` is always passed: with a cache the examples see each other, silently. Without one too in
    older versions, where the proof of packing says so."""
    model = tiny.model("falcon")
    ids = torch.arange(3, 11)[None]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        alone = model(input_ids=ids[:, 3:], use_cache=False).logits
        apart, together = (
            model(input_ids=ids, position_ids=positions, use_cache=cache).logits[:, 3:] for cache in (False, True)
        )
    if "cache" in inspect.signature(model.forward).parameters:
        torch.testing.assert_close(apart, alone, rtol=1e-4, atol=1e-5)
    assert (together - alone).abs().max() > 0.1


@pytest.mark.parametrize("name", ["bloom", "mpt"])
def test_the_body_is_called_as_a_module_with_the_mask_by_name(name: str) -> None:
    model = tiny.model(name)
    seen: list[Any] = []
    model.get_decoder().register_forward_pre_hook(
        lambda _m, _a, kw: seen.append(kw["attention_mask"]), with_kwargs=True
    )
    mask = torch.ones(1, 4, dtype=torch.long)
    model(input_ids=torch.arange(4)[None], attention_mask=mask)
    assert len(seen) == 1 and seen[0] is mask and model.get_decoder() is model.base_model


def test_modules_keep_their_hooks_where_we_look_for_them() -> None:
    module = torch.nn.Linear(1, 1)
    hook = module.register_forward_pre_hook(lambda *_: None)
    assert len(module._forward_pre_hooks) == 1
    hook.remove()
    assert not module._forward_pre_hooks


def test_stock_sdpa_still_refuses_softcap_or_passes_it_over() -> None:
    """If this fails, the branch for softcap without lengths may go."""
    x, nn, stock = torch.randn(1, 1, 2, 4) * 9, torch.nn.Identity(), AttentionInterface()["sdpa"]
    with contextlib.suppress(ValueError):  # later versions refuse it
        assert torch.equal(stock(nn, x, x, x, None, softcap=1.0)[0], stock(nn, x, x, x, None)[0])

"""What layers see is what transformers shows them: windows and chunks, wherever an architecture keeps them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.masking_utils import chunked_causal_mask_function, sliding_window_causal_mask_function

import halfbyte
from halfbyte.layers import fuse, loss, packing, sight
from halfbyte.layers.kernels import ALL_TOKENS, CAUSAL
from halfbyte.models import structure
from halfbyte.proofs.packing import prove_packing
from tests import plain_peft, tiny
from tests.models.gguf import files, test_architectures

WINDOW = 8
LENGTHS = (5, 40, 1, 23, 9)
WINDOWED: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "mistral without": ("mistral", {"sliding_window": None}),
    "phi3": ("phi3", {"sliding_window": WINDOW}),
    "qwen3": ("qwen3", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "gemma3": ("gemma3", {"sliding_window": WINDOW}),
}
SEEN = {
    "mistral": [WINDOW, WINDOW],
    "mistral without": [None, None],
    "phi3": [WINDOW, WINDOW],
    "qwen3": [None, WINDOW],
    "gemma3": [WINDOW, None],
}


@pytest.mark.parametrize("case", WINDOWED)
def test_rows_longer_than_the_window_learn_what_plain_peft_learns(case: str) -> None:
    """A Mistral once trained with full attention here: its window is in its config alone."""
    name, changes = WINDOWED[case]
    rows = plain_peft.texts(LENGTHS, 256)
    targets = "all-linear"
    wanted_loss, wanted = plain_peft.learn(plain_peft.adapt(tiny.model(name, changes=changes), targets), rows)

    model = plain_peft.adapt(tiny.model(name, changes=changes), targets)
    assert prove_packing(model).layout == "cu_seq_lens"
    assert name not in ("mistral", "gemma3", "qwen3") or fuse.install(model).counts["attentions"] == tiny.LAYERS
    summed = loss.micro_batch_loss(model, tiny.batch_of(rows))
    summed.backward()
    assert summed.item() == pytest.approx(wanted_loss, rel=1e-5)
    assert plain_peft.apart(plain_peft.gradients(model), wanted) < 1e-5  # fp32: other orders of the same sums

    dropin = plain_peft.adapt(tiny.model(name, changes=changes), targets, halfbyte.get_peft_model)
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    real = torch.arange(ids.shape[1]) < torch.tensor(LENGTHS)[:, None]
    labels = ids.where(real, -100)
    items = sum(LENGTHS) - len(LENGTHS)
    given = {"input_ids": ids, "attention_mask": real.long(), "labels": labels, "num_items_in_batch": items}
    (dropin(**given).loss * items).backward()
    assert plain_peft.apart(plain_peft.gradients(dropin), wanted) < 1e-5


@pytest.mark.parametrize("case", WINDOWED)
def test_each_layer_is_told_apart_from_its_own_mask(case: str) -> None:
    name, changes = WINDOWED[case]
    model = tiny.model(name, changes=changes)
    packing.install(model, "cu_seq_lens")
    sight.look(structure.body(model), 40)
    for layer, window in zip(structure.decoder_layers(model), SEEN[case], strict=True):
        seen = sight.of(layer)
        assert seen is not None and seen == sight.of(layer.self_attn)
        assert seen.is_window(window) and not seen.is_window(None if window else WINDOW)
        beyond = CAUSAL if window is None else (WINDOW - 1, 0)
        assert [seen.reach(n) for n in (WINDOW, WINDOW + 1, 40, 41)] == [CAUSAL, beyond, beyond, None]


def test_masks_are_described_as_they_are() -> None:
    def described(function: Any, length: int = 40) -> sight.Sight:
        return sight._describe(function, length, "cpu")

    assert described(sliding_window_causal_mask_function(8)) == sight.Sight(40, 8, slides=True)
    assert described(sliding_window_causal_mask_function(40)) == sight.Sight(40, 40)
    chunks = described(chunked_causal_mask_function(8, torch.zeros(1, dtype=torch.int64)))
    assert chunks == sight.Sight(40, 8) and not chunks.is_window(8) and not chunks.is_window(None)
    assert described(lambda b, h, q, k: (k <= q) | (k == q + 1)).causal == 0
    assert described(lambda b, h, q, k: (k <= q) & (k != 3)).causal == 0
    assert described(lambda b, h, q, k: k >= 0) == sight.Sight(40, 40, ahead=True)
    both = described(lambda b, h, q, k: abs(q - k) <= 7)
    assert both == sight.Sight(40, 8, slides=True, ahead=True) and both.is_window(8)
    assert both.reach(5) == (ALL_TOKENS, ALL_TOKENS) and both.reach(9) == (7, 7)
    assert [chunks.reach(n) for n in (8, 9)] == [CAUSAL, None]
    assert described(lambda b, h, q, k: (abs(q - k) <= 7) & (k != 3)).causal == 0


def test_looking_leaves_no_trace() -> None:
    model = tiny.model("gpt2", changes={"embd_pdrop": 0.5}).train()
    packing.install(model, "cu_seq_lens")
    layers, state = structure.decoder_layers(model), torch.random.get_rng_state()
    sight.look(structure.body(model), 40)
    assert structure.decoder_layers(model) == layers
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(sight.of(layer) == sight.Sight(40, 40) for layer in layers)


def test_a_rotary_table_that_grows_with_texts_is_as_before_afterwards() -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}
    model = tiny.model("llama", changes={"rope_parameters": rope, "max_position_embeddings": 16})
    packing.install(model, "cu_seq_lens")
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    sight.look(structure.body(model), 40)
    assert model.model.rotary_emb.max_seq_len_cached == 16
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_a_window_that_the_mask_does_not_have_is_not_packed() -> None:
    model = tiny.model("gemma3", changes={"layer_types": ["sliding_attention", "full_attention"]})
    model.model.layers[0].self_attn.sliding_window = 3  # the attention says 3, the mask says SLIDING_WINDOW
    proof = prove_packing(model)
    assert proof.layout == "rows" and "sliding_window=3" in proof.reason


def test_layers_that_share_keys_see_a_slice_of_the_mask() -> None:
    """Gemma 4 hands its later layers a view of the mask; they would be of no known kind, and training would end."""
    _, kind, values, _ = test_architectures.CASES["gemma4"]
    model = files.model_of(kind, **{**test_architectures.SIZES, **values})
    assert prove_packing(model).layout == "cu_seq_lens"
    sight.look(structure.body(model), 40)
    seen = [sight.of(layer) for layer in structure.decoder_layers(model)]
    windows = [s is not None and s.is_window(4) for s in seen]
    assert windows == ([True] * 5 + [False]) * 2
    assert all(s is not None and s.is_window(None) for s in (seen[5], seen[11]))

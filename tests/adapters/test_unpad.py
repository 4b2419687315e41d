"""Padded batches at the door: what a script sees of them is what the plain model would have shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import halfbyte
from halfbyte.adapters import targets, unpad
from halfbyte.models import structure
from tests import tiny, tiny_run

LENGTHS = (9, 4, 1, 12)


def pair(name: str) -> tuple[Any, Any]:
    """(plain PEFT, ours by the drop-in) with the same weights."""
    models = []
    for package in (peft, halfbyte):
        base = tiny.model(name)
        names = list(targets.auto_targets(base).names)
        torch.manual_seed(0)
        model = package.get_peft_model(base, LoraConfig(r=4, target_modules=names, task_type="CAUSAL_LM"))
        torch.manual_seed(1)
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.data = torch.randn_like(p) * 0.2
        models.append(model.train())
    return models[0], models[1]


def padded(side: str = "right") -> dict[str, torch.Tensor]:
    draw, width = torch.Generator().manual_seed(2), max(LENGTHS)
    ids = torch.zeros(len(LENGTHS), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, n in enumerate(LENGTHS):
        where = slice(0, n) if side == "right" else slice(width - n, width)
        row = torch.randint(3, 250, (n,), generator=draw)
        ids[i, where], mask[i, where] = row, 1
        labels[i, where] = torch.where(torch.arange(n) > n // 2, row, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert a.keys() == b.keys() and a
    for name in a:
        assert float((a[name] - b[name]).norm()) <= tolerance * float(b[name].norm()) + 1e-7, name


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_loss_and_gradients_of_a_trainers_batch(name: str, side: str) -> None:
    plain, ours = pair(name)
    batch, items = padded(side), torch.tensor(17)
    wanted = plain(**batch, num_items_in_batch=items).loss
    got = ours(**batch, num_items_in_batch=items).loss
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    same(gradients(ours, got), gradients(plain, wanted))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_logits_have_their_places(name: str) -> None:
    plain, ours = pair(name)
    batch = padded()
    del batch["labels"]
    wanted, got = plain(**batch).logits, ours(**batch).logits
    assert got.shape == wanted.shape
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(got[real], wanted[real], rtol=1e-4, atol=1e-4)


def spy(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of ids that reach the body."""
    seen: list[tuple[int, ...]] = []
    embed = structure.causal_lm(model).get_input_embeddings()
    embed.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    return seen


def test_padding_is_really_gone_and_only_where_it_is_surely_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = pair("llama")
    model(**padded(), num_items_in_batch=torch.tensor(3))  # looks at the model first
    seen = spy(model, monkeypatch)
    ids = {k: v for k, v in padded().items() if k != "labels"}
    whole = (len(LENGTHS), max(LENGTHS))

    def shape_of(**more: Any) -> tuple[int, ...]:
        seen.clear()
        model(**more)
        return seen[-1]

    assert shape_of(**padded(), num_items_in_batch=torch.tensor(3)) == (1, sum(LENGTHS))
    assert shape_of(**ids) == (1, sum(LENGTHS))
    assert shape_of(**{k: v for k, v in padded("left").items() if k != "labels"}) == whole
    assert shape_of(**ids, output_hidden_states=True) == whole
    assert shape_of(**ids, position_ids=torch.arange(max(LENGTHS)).expand(whole)) == whole
    with torch.no_grad():
        assert shape_of(**ids) == (1, sum(LENGTHS)), "as of DPO's reference"
        assert shape_of(**{**ids, "use_cache": True}) == whole
    model.eval()
    assert shape_of(**ids) == whole


@pytest.mark.parametrize(
    ("mask", "lengths"),
    [
        (None, [4, 4]),
        ([[1, 1, 0, 0], [1, 1, 1, 1]], [2, 4]),
        ([[0, 1, 1, 1], [1, 1, 1, 1]], None),
        ([[1, 0, 1, 0], [1, 1, 1, 1]], None),
        ([[0, 0, 0, 0], [1, 1, 1, 1]], None),
    ],
)
def test_lengths_of_rows(mask: list[list[int]] | None, lengths: list[int] | None) -> None:
    found = unpad.lengths_of(None if mask is None else torch.tensor(mask), 2, 4)
    assert (None if found is None else found.tolist()) == lengths


def test_labels_on_padding_go_the_ordinary_way() -> None:
    plain, ours = pair("llama")
    batch, items = padded(), torch.tensor(5)
    batch["labels"][1, -1] = 7
    wanted = plain(**batch, num_items_in_batch=items).loss
    torch.testing.assert_close(ours(**batch, num_items_in_batch=items).loss, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2"])
def test_a_reference_without_gradients_is_computed_as_its_policy(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """DPO's first loss is ln 2 only if policy and reference have the same log-probabilities while B is 0."""
    quantisation = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    folder = tiny_run.checkpoint(tmp_path / "model", name, dtype=dtype)
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map={"": "cpu"}, quantization_config=quantisation
    )
    base = halfbyte.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    config = LoraConfig(r=4, target_modules=list(targets.auto_targets(base).names), task_type="CAUSAL_LM")
    model = halfbyte.get_peft_model(base, config).train()
    batch = {name: value for name, value in padded().items() if name != "labels"}
    real = batch["attention_mask"].bool()
    policy = model(**batch, use_cache=False).logits
    assert policy.requires_grad and unpad.why_padded(model) == ""
    with torch.no_grad(), model.disable_adapter():
        reference = model(**batch, use_cache=False).logits
    with torch.no_grad():
        again = model(**batch, use_cache=False).logits
    assert torch.equal(policy[real], reference[real]) and torch.equal(policy[real], again[real])

"""Padded batches at the door: what a script sees of them is what the plain model would have shown."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate.utils import convert_to_fp32
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import halfbyte
from halfbyte.adapters import targets, unpad
from halfbyte.errors import BaseModelError
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
    model(**padded()).loss.backward()
    assert seen[-1] == whole, "until it is seen that the loss does not read padding"

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


def every_label(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tutorials' line, which labels padding too."""
    return {**batch, "labels": batch["input_ids"].clone()}


def of_all_logits(model: Any) -> torch.Tensor:
    loss: torch.Tensor = model(**{k: v for k, v in padded().items() if k != "labels"}).logits.logsumexp(-1).mean()
    return loss


READS: dict[str, Any] = {
    "a loop": lambda model: model(**every_label(padded())).loss,
    "a trainer": lambda model: model(**every_label(padded()), num_items_in_batch=torch.tensor(40)).loss,
    "a loss of its own": of_all_logits,
}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gemma3"])
@pytest.mark.parametrize("reads", READS)
def test_a_loss_that_reads_padding_is_the_plain_models(name: str, reads: str) -> None:
    plain, ours = pair(name)
    for _ in range(2):
        wanted, got = READS[reads](plain), READS[reads](ours)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
        same(gradients(ours, got), gradients(plain, wanted))
    assert unpad.why_padded(ours) == unpad.READ or reads == "a trainer"


def test_a_loss_that_begins_to_read_padding_ends_the_step_and_is_right_from_then_on() -> None:
    plain, ours = pair("llama")
    gradients(ours, ours(**padded()).loss)
    with pytest.raises(BaseModelError, match="the loss reads what stands at padding"):
        gradients(ours, of_all_logits(ours))
    same(gradients(ours, of_all_logits(ours)), gradients(plain, of_all_logits(plain)))


def test_labels_that_come_to_lie_on_padding_are_seen_before_the_forward() -> None:
    plain, ours = pair("llama")
    gradients(ours, ours(**padded()).loss)
    same(gradients(ours, READS["a loop"](ours)), gradients(plain, READS["a loop"](plain)))


def test_noise_on_embeddings_is_that_of_padded_rows() -> None:
    """NEFTune's, as transformers' Trainer adds it: a hook that takes the second axis for a row's length."""
    _, ours = pair("llama")
    gradients(ours, ours(**padded()).loss)
    embedding, widths = structure.causal_lm(ours).get_input_embeddings(), []
    embedding.neftune_noise_alpha = 5.0
    embedding.register_forward_hook(lambda module, args, output: widths.append(output.shape[1]))
    for more in ({}, {"num_items_in_batch": torch.tensor(9)}):
        ours(**padded(), **more)
    assert widths == [max(LENGTHS)] * 2


def test_a_models_own_loss_function_is_used() -> None:
    plain, ours = pair("llama")
    for model in (plain, ours):
        structure.causal_lm(model).loss_function = lambda logits, labels, **_: logits.square().mean()
    batch = {**padded(), "num_items_in_batch": torch.tensor(9)}
    torch.testing.assert_close(ours(**batch).loss, plain(**batch).loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("converted", [False, True])
def test_logits_of_a_loss_alone_are_made_when_they_are_read(converted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, ours = pair("llama")
    batch = {**padded(), "num_items_in_batch": torch.tensor(9)}
    ours(**batch)
    seen = spy(ours, monkeypatch)
    out = ours(**batch)
    assert len(seen) == 1
    out = convert_to_fp32(out) if converted else out
    assert out["loss"] is out[0] is out.loss and len(seen) == 1
    real = batch["attention_mask"].bool()
    wanted = plain(**batch).logits
    first, made = out.logits, len(seen)
    for logits in (first, out["logits"], out[1]):
        torch.testing.assert_close(logits[real], wanted[real], rtol=1e-4, atol=1e-4)
    assert len(seen) == made > 1
    assert isinstance(ours(**batch, return_dict=False), tuple)


@pytest.mark.parametrize("more", [{}, {"num_items_in_batch": torch.tensor(9)}])
def test_an_adapter_that_begins_within_rows_learns_there(more: dict[str, torch.Tensor]) -> None:
    """PEFT's aLoRA: its forward counts from each row's end, padding and all, where the layers begin to add."""
    batch = padded()
    batch["input_ids"][:, 2] = 250
    found = []
    for model in pair("llama"):
        config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[250])
        gradients(model, model(**batch, **more).loss)
        torch.manual_seed(0)
        model.add_adapter("late", config)
        model.set_adapter("late")
        torch.nn.init.constant_(
            model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj.lora_B.late").weight, 0.1
        )
        loss = model(**batch, **more).loss
        found.append({"loss": loss.detach(), **gradients(model, loss)})
    same(found[1], found[0])
    assert any(bool(gradient.any()) for name, gradient in found[0].items() if "lora_" in name)


def test_a_learned_prompt_comes_before_the_rows() -> None:
    losses = []
    for package in (peft, halfbyte):
        torch.manual_seed(0)
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        model = package.get_peft_model(tiny.model("llama"), config).train()
        loss = model(**padded(), num_items_in_batch=torch.tensor(9)).loss
        loss.backward()
        losses.append((loss.detach(), model.get_prompt_embedding_to_save("default")))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)


def test_rows_longer_than_those_that_were_looked_at() -> None:
    """What a layer sees of longer rows is looked up while the hooks are there; so it is of a copy, which knows none."""
    plain, ours = pair("llama")
    gradients(ours, ours(**padded()).loss)
    ids = torch.randint(3, 250, (2, 300), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    long = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    for model in (ours, copy.deepcopy(ours)):
        for more in ({}, {"num_items_in_batch": torch.tensor(305)}):
            wanted, got = plain(**long, **more).loss, model(**long, **more).loss
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
            same(gradients(model, got), gradients(plain, wanted))


def test_a_model_is_saved_whole_and_opened_again() -> None:
    _, ours = pair("llama")
    gradients(ours, ours(**padded()).loss)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert [type(m).__mro__ for m in again.modules()] == [type(m).__mro__ for m in ours.modules()]
    same(gradients(again, again(**padded()).loss), gradients(ours, ours(**padded()).loss))
    torch.save(ours.merge_and_unload(), io.BytesIO())


@pytest.mark.parametrize(
    "where",
    [
        "lm_head", "model.layers.0.mlp.act_fn", "model.layers.0.mlp.gate_proj",
        *(f"model.layers.0.self_attn.q_proj.{part}" for part in (
            "base_layer", "lora_A.default", "lora_B.default", "lora_dropout.default"
        )),
    ],
)  # fmt: skip
def test_a_hook_of_a_script_is_called_after_the_first_step(where: str) -> None:
    plain, ours = pair("llama")
    gradients(ours, ours(**padded()).loss)
    for more in ({}, {"num_items_in_batch": torch.tensor(9)}):
        losses = []
        for model in (plain, ours):
            module = structure.causal_lm(model).get_submodule(where)
            handle = module.register_forward_hook(lambda module, args, output: output * 0.5)
            losses.append(model(**padded(), **more).loss)
            handle.remove()
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)


def test_an_activation_that_a_script_changes_after_the_first_step_is_the_one_that_is_computed() -> None:
    """By one that is known, and by one that is not."""
    for activation in (torch.nn.GELU(), torch.nn.Softplus()):
        losses = []
        for model in pair("llama"):
            gradients(model, model(**padded()).loss)
            structure.causal_lm(model).get_submodule("model.layers.0.mlp").act_fn = activation
            losses.append(model(**padded()).loss)
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)


def test_attention_maps_are_shown_after_a_step() -> None:
    maps = []
    for model in pair("llama"):
        structure.causal_lm(model).set_attn_implementation("eager")
        gradients(model, model(**padded()).loss)
        with torch.no_grad():
            maps.append(
                [model.train(training)(**padded(), output_attentions=True).attentions for training in (False, True)]
            )
    torch.testing.assert_close(maps[1], maps[0], rtol=1e-4, atol=1e-5)
    assert len(maps[0][0]) == 2


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

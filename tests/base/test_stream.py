"""Placements: gradients equal to the bit wherever the base lies, and memory bounded where it is streamed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from halfbyte import finetune
from halfbyte.adapters.dropin import get_peft_model
from halfbyte.base import load, stream
from halfbyte.errors import BaseModelError
from halfbyte.inference import load as opened_run
from halfbyte.layers import fuse, loss, packing
from halfbyte.models import structure
from halfbyte.models.sources.checkpoint import Checkpoint
from halfbyte.objectives.causal_lm import CausalLM
from halfbyte.objectives.objective import mean_scores
from halfbyte.proofs.packing import prove_packing
from halfbyte.quant import bnb
from halfbyte.recipe.schema import Quant
from halfbyte.system import device, pages
from halfbyte.training import run
from tests import mapped, tiny, tiny_run
from tests.present import present_bytes

pytestmark = pytest.mark.skipif(not pages.supported(), reason="needs Linux and /proc/self/pagemap")
VOCAB = 256


@pytest.fixture(scope="module", params=tiny.ARCHITECTURES)
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mapped.save(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mapped.save(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of 5 MB, far more than the edges of a few pages."""
    changes = {"hidden_size": 1024, "intermediate_size": 2048}
    return mapped.save(tmp_path_factory.mktemp("wide"), "llama", changes=changes)


def adapted(folder: Path, *, fused: bool, dropout: float = 0.05, **config: Any) -> Any:
    """The checkpoint with adapters whose B is not zero, ready for packs."""
    torch.manual_seed(1)
    lora = LoraConfig(
        **{"r": 4, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM", **config},
        lora_dropout=dropout,
    )
    model = get_peft_model(mapped.open_model(folder), lora)
    prove_packing(model)
    if not fused:
        fuse.remove(model)
    return model


def gradients(model: Any, lengths: tuple[int, ...], *, fused: bool) -> dict[str, Tensor]:
    torch.manual_seed(3)
    model.train()
    loss.micro_batch_loss(model, tiny.batch(lengths, VOCAB), fused=fused).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    for parameter in model.parameters():
        parameter.grad = None
    return found


def equal(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys() and wanted
    wrong = [n for n in wanted if got[n] is None or not torch.equal(got[n], wanted[n])]
    assert not wrong, wrong[:5]
    assert any(float(g.abs().sum()) > 0 for g in wanted.values())


class Poison:
    """A mover whose dropped layers are garbage: only what is computed between `need` and `drop` can be right."""

    def __init__(self, model: Any) -> None:
        maps = pages.FileMaps.read()
        self.tensors = [
            [t for t in bnb.held_tensors(layer) if stream._is_mapped(t, maps)]
            for layer in structure.decoder_layers(model)
            for layer in structure.decoder_layers(model)
        ]
        assert all(self.tensors)
        self.copies = [[t.clone() for t in group] for group in self.tensors]
        self.log: list[str] = []

    def fetch(self, group: int) -> None:
        self.log.append(f"fetch {group}")

    def need(self, group: int) -> None:
        for tensor, copy in zip(self.tensors[group], self.copies[group], strict=True):
            tensor.copy_(copy)

    def drop(self, group: int) -> None:
        self.log.append(f"drop {group}")
        if group < len(self.tensors):
            for tensor in self.tensors[group]:
                tensor.view(torch.uint8).fill_(255) if tensor.dim() else None

    def close(self) -> None:
        for group in range(len(self.tensors)):
            self.need(group)


@pytest.mark.parametrize(("fused", "recompute"), [(True, False), (False, True)], ids=["fused-keep", "peft-recompute"])
def test_gradients_with_the_other_two_pairings(llama: Path, fused: bool, recompute: bool) -> None:
    gradients_are_the_same(llama, fused=fused, recompute=recompute)


@pytest.mark.parametrize(("fused", "recompute"), [(True, True), (False, False)], ids=["fused-recompute", "peft-keep"])
def test_gradients_are_the_same_to_the_bit_wherever_the_base_lies(folder: Path, fused: bool, recompute: bool) -> None:
    gradients_are_the_same(folder, fused=fused, recompute=recompute)


def gradients_are_the_same(folder: Path, *, fused: bool, recompute: bool) -> None:
    model = adapted(folder, fused=fused)
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    packs = [(9, 5, 14), (11,)] if packing.installed(model) != "single" else [(11,)]
    placed = stream.place(model, "mapped")
    wanted = [gradients(model, lengths, fused=fused) for lengths in packs]
    placed.remove()

    placed = stream.place(model, "streamed")
    for _ in range(2):
        for lengths, grads in zip(packs, wanted, strict=True):
            equal(gradients(model, lengths, fused=fused), grads)
    placed.remove()

    poison = Poison(model)
    placed = stream.place(model, "streamed", mover=poison)
    for lengths, grads in zip(packs, wanted, strict=True):
        equal(gradients(model, lengths, fused=fused), grads)
    assert "drop 0" in poison.log
    placed.remove()

    assert stream.place(model, "resident").placement == "resident"
    for lengths, grads in zip(packs, wanted, strict=True):
        equal(gradients(model, lengths, fused=fused), grads)


@pytest.mark.parametrize("reentrant", [True, False])
def test_both_kinds_of_recomputation_go_through_the_seam(llama: Path, reentrant: bool) -> None:
    model = adapted(llama, fused=True)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    wanted = gradients(model, (9, 5), fused=True)
    placed = stream.place(model, "streamed", mover=Poison(model))
    equal(gradients(model, (9, 5), fused=True), wanted)
    placed.remove()


def test_the_order_is_up_and_down_and_the_next_layers_come_ahead(llama: Path) -> None:
    model = adapted(llama, fused=True)
    poison = Poison(model)
    placed = stream.place(model, "streamed", mover=poison)
    gradients(model, (9, 5), fused=True)  # the loss looks at the head once, with a forward of its own
    poison.log.clear()
    before = placed.stream.visits if placed.stream else 0
    gradients(model, (9, 5), fused=True)
    fetched = [int(line.split()[1]) for line in poison.log if line.startswith("fetch")]
    assert fetched == [0, 1, 2, 1, 2, 3, 2, 3, 4, 3, 4, 3, 2, 1, 2, 1, 0, 1, 0, 0]
    dropped = [int(line.split()[1]) for line in poison.log if line.startswith("drop")]
    assert dropped == [0, 1, 2, 4, 3, 2, 1]
    assert placed.stream is not None and placed.stream.visits - before == 2 * mapped.LAYERS
    placed.remove()


def test_evaluation_and_generation_are_the_same_and_leave_the_gradients_alone(folder: Path) -> None:
    model = adapted(folder, fused=True, dropout=0.0)
    inputs = {"input_ids": tiny.batch((9,), VOCAB)["input_ids"], "attention_mask": torch.ones(1, 9, dtype=torch.int64)}
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}

    def run() -> tuple[Any, ...]:
        before = gradients(model, (9,), fused=True)
        score = mean_scores(CausalLM(), model, [tiny.batch((9,), VOCAB)])["loss"]
        model.eval()
        with torch.no_grad():
            text = model.generate(**inputs, **options)
            logits = model(**inputs).logits
        return before, score, text, logits, gradients(model, (9,), fused=True)

    wanted = run()
    for mover in (None, Poison(model)):
        placed = stream.place(model, "streamed", mover=mover)
        got = run()
        equal(got[0], wanted[0])
        equal(got[4], wanted[0])
        assert got[1] == wanted[1]
        assert torch.equal(got[2], wanted[2]) and torch.equal(got[3], wanted[3])
        placed.remove()


def _watch(model: Any, look: Callable[[], None]) -> Iterator[None]:
    """Call `look` before every module inside a layer, forward, and before every parameter's gradient."""
    handles = []
    for layer in structure.decoder_layers(model):
        handles += [m.register_forward_pre_hook(lambda *_: look()) for m in layer.modules() if m is not layer]
        handles += [p.register_hook(lambda _: look()) for p in layer.parameters() if p.requires_grad]
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(("fused", "recompute"), [(True, True), (False, False)], ids=["fused-recompute", "peft-keep"])
def test_at_most_two_layers_are_in_memory_at_any_time(wide: Path, fused: bool, recompute: bool) -> None:
    """The real resident set of the mapped layers, read at every module; unstreamed it is all of them."""
    model = adapted(wide, fused=fused)
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    maps = pages.FileMaps.read()
    layers = [
        pages.whole_pages(stream._areas(t for t in bnb.held_tensors(layer) if stream._is_mapped(t, maps)))
        for layer in structure.decoder_layers(model)
    ]
    sizes = [sum(span.bytes for span in spans) for spans in layers]
    seen: list[int] = []

    def peak() -> int:
        seen.clear()
        watch = _watch(model, lambda: seen.append(sum(present_bytes(spans) for spans in layers)))
        next(watch)
        gradients(model, (9, 5), fused=fused)
        mean_scores(CausalLM(), model, [tiny.batch((9, 5), VOCAB)])
        next(watch, None)
        return max(seen)

    assert peak() == sum(sizes)
    placed = stream.place(model, "streamed")
    # the kernel maps the 16 pages around one that is touched, so the edges of neighbours in the file may be there too
    assert peak() <= 2 * max(sizes) + 2 * 16 * pages.PAGE * sum(len(spans) for spans in layers)
    assert peak() < 0.7 * sum(sizes)
    placed.remove()
    assert peak() == sum(sizes)


def test_a_bias_that_was_trained_in_the_mapping_is_not_lost(tmp_path: Path) -> None:
    """`lora.bias: all` trains the base's own biases, which lie in the file's pages; so does loading such an adapter."""
    model = adapted(mapped.save(tmp_path, "gpt2"), fused=True)
    placed = stream.place(model, "streamed")
    bias = next(p for n, p in model.named_parameters() if n.endswith("c_attn.base_layer.bias"))
    with torch.no_grad():
        bias.add_(1.0)
    kept = bias.clone()
    for _ in range(2):
        gradients(model, (9, 5), fused=True)
    assert torch.equal(bias, kept)
    placed.remove()


def test_resident_is_private_memory_and_keeps_the_numbers(llama: Path) -> None:
    model = mapped.open_model(llama)
    before = [t.clone() for t in bnb.held_tensors(model)]
    mapped_bytes = stream.place(model, "mapped").mapped_bytes
    assert mapped_bytes > 0.9 * stream._bytes(before)
    placed = stream.place(model, "resident")
    after = bnb.held_tensors(model)
    assert placed.mapped_bytes == 0 and placed.total_bytes == stream._bytes(after)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    maps = pages.FileMaps.read()
    assert not any(stream._is_mapped(t, maps) for t in after)


def test_a_tied_head_stays_tied_when_it_is_copied(tmp_path: Path) -> None:
    model = mapped.open_model(mapped.save(tmp_path, "gpt2"))
    stream.place(model, "resident")
    assert model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


@pytest.mark.parametrize("placement", ["mapped", "streamed"])
def test_a_base_that_was_quantised_while_loading_cannot_be_on_disk(tmp_path: Path, placement: Any) -> None:
    tiny.save(tmp_path, "llama", torch.bfloat16)
    checkpoint = Checkpoint(path=tmp_path, id="x", revision=None, kind="folder")
    model = load.open_base(checkpoint, Quant(compute_dtype="bf16"), device.detect(), use_store=False).model
    with pytest.raises(BaseModelError, match=r"quant.placement .* needs a base whose weights are opened from a file"):
        stream.place(model, placement)
    embedding = model.get_input_embeddings().weight
    before = embedding.data_ptr()
    assert stream.place(model, "resident").mapped_bytes > 0  # what is around the layers is left where it is
    assert embedding.data_ptr() == before


def test_a_base_that_no_file_holds_stays_resident_unless_the_recipe_asks_otherwise(llama: Path) -> None:
    model = mapped.open_model(llama)
    placed, why = stream.place_as_planned(model, "streamed", asked=False)
    assert (placed.placement, why) == ("streamed", "")
    placed.remove()
    stream.place(model, "resident")
    for wanted in ("mapped", "streamed"):
        placed, why = stream.place_as_planned(model, wanted, asked=False)
        assert placed.placement == "resident" and why.startswith(f"planned {wanted}, but its weights are not on disk")
        with pytest.raises(BaseModelError, match="private memory"):
            stream.place_as_planned(model, wanted, asked=True)
    assert stream.place_as_planned(model, "resident", asked=False)[1] == ""


def test_without_pagemap_streaming_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mapped.open_model(llama)
    monkeypatch.setattr(pages, "_PAGEMAP", "/nowhere/pagemap")
    with pytest.raises(BaseModelError, match="pagemap"):
        stream.place(model, "streamed")


def test_removed_means_no_hooks(llama: Path) -> None:
    model = mapped.open_model(llama)
    placed = stream.place(model, "streamed")
    assert "4 layers come and go" in str(placed)
    placed.remove()
    placed.remove()
    assert placed.placement == "mapped"
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in structure.decoder_layers(model))


def test_a_shallow_model_is_that_of_its_first_layers_and_whole_again_afterwards(folder: Path) -> None:
    model = adapted(folder, fused=True)
    layers = structure.decoder_layers(model)
    ids = tiny.batch((9,), VOCAB)["input_ids"]
    whole = model.eval()(input_ids=ids, use_cache=False).logits
    seen: list[int] = []
    hooks = [layer.register_forward_hook(lambda *_, n=n: seen.append(n)) for n, layer in enumerate(layers)]
    with structure.shallow(model) as count:
        assert count == 2 and structure.decoder_layers(model) == layers[:2]
        short = model(input_ids=ids, use_cache=False).logits
    assert seen == [0, 1]
    assert structure.decoder_layers(model) == layers
    assert not torch.equal(short, whole)
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, whole)
    assert [hook.remove() for hook in hooks]


def test_a_shallow_model_reaches_down_to_a_layer_that_trains_and_to_every_kind(llama: Path, tmp_path: Path) -> None:
    model = adapted(llama, fused=True, target_modules=["q_proj"], layers_to_transform=[2])
    with structure.shallow(model) as count:
        assert count == 3
    kinds = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
    mixed = mapped.open_model(mapped.save(tmp_path, "gemma3", changes={"layer_types": kinds}))
    with structure.shallow(mixed) as count:
        assert count == 4
    with pytest.raises(RuntimeError), structure.shallow(model):
        raise RuntimeError
    assert len(structure.decoder_layers(model)) == mapped.LAYERS


def test_proofs_of_a_streamed_run_read_two_layers_and_the_engine_is_on_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole run from a 4-bit checkpoint in each placement: the same losses; the proofs see the first layers only."""
    made = mapped.save(tmp_path, "llama", changes={"vocab_size": tiny_run.VOCAB})
    made.rename(tmp_path / "model")
    tiny_run.tokenizer().save_pretrained(tmp_path / "model")
    trainers: list[Any] = []
    make = run.StepTrainer

    def keep(*args: Any, **kwargs: Any) -> Any:
        trainers.append(make(*args, **kwargs))
        return trainers[-1]

    monkeypatch.setattr(run, "StepTrainer", keep)
    losses, fused = {}, {}
    for placement in ("resident", "mapped", "streamed"):
        loaded = tiny_run.recipe(
            tmp_path, quant__placement=placement, quant__compute_dtype="bf16", output=tmp_path / placement
        )
        finetune.train(loaded)
        rows = (tmp_path / placement / "metrics.jsonl").read_text().splitlines()
        losses[placement] = [json.loads(row)["loss"] for row in rows]
        fused[placement] = sum(isinstance(m, fuse._Fast) for m in trainers[-1].model.modules())
    assert losses["streamed"] == losses["mapped"] == losses["resident"]
    assert fused["streamed"] == fused["mapped"] == fused["resident"] > 4 * mapped.LAYERS
    opened = opened_run.open_run(tmp_path / "streamed")
    assert packing.installed(opened.model) == "cu_seq_lens"

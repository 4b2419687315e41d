"""The whole job on cards that are not there (`fake_card.py`): split over two, a script's own Trainer, and memory as
planned. What one card computes and learns is in test_fake_card.py."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft import LoraConfig
from transformers import Trainer, TrainingArguments

import halfbyte
from halfbyte import finetune
from halfbyte.adapters import dropin
from halfbyte.base import load, stream
from halfbyte.errors import BaseModelError
from halfbyte.inference import generate
from halfbyte.inference import load as opened
from halfbyte.models.sources.lookup import find_model
from halfbyte.objectives.causal_lm import CausalLM
from halfbyte.objectives.objective import mean_scores
from halfbyte.plan import choose
from halfbyte.quant import bnb as codec
from halfbyte.system import device
from halfbyte.writing.sampling import SamplingParams
from tests import fake_card, tiny, tiny_run
from tests.test_fake_card import DROPIN, Notes, losses, machine, of_cpu, on, padded

WITHOUT_DEVICE = ("CUDA context", "cuBLAS workspace", "allocator")  # of a plan: nothing of it is a tensor


def stopped_after_two(run: Path) -> None:
    (run / "report.json").unlink()
    shutil.rmtree(run / "checkpoints/step-000004")


def test_a_run_that_is_split_over_two_cards_learns_what_it_learns_on_the_cpu(tmp_path: Path) -> None:
    """Load, proofs, train, save, resume, evaluate, generate: half of the layers a card; at most two waits a step."""
    options = {"quant__type": "nf4", "train__max_steps": 4, "train__save_strategy": "steps", "train__save_steps": 2}
    wanted = of_cpu(tmp_path / "cpu", **options)
    recipe = tiny_run.recipe(tmp_path / "card", **options)
    with machine(2) as cards, mock.patch.object(choose, "placements", return_value=("split",)):
        told = Notes(cards)
        out = finetune.train(recipe, listener=told)
        assert losses(told.rows) == pytest.approx(wanted, rel=1e-5)
        assert "cu_seq_lens: packed = alone" in told.said("packing") and "gradients as PEFT's" in told.said("engine")
        assert max(len(told.waits[n]) for n in (1, 3)) <= 2, told.waits  # before the others a checkpoint is written
        layer = 4 * 64 * 64 // 2  # a layer's projections in 4 bits, and more
        assert all(cards.peak[n] > layer for n in (0, 1)) and out.report["peak_device_bytes"] >= max(
            cards.peak.values()
        )
        stopped_after_two(tmp_path / "card/run")
        resumed = finetune.train(recipe, resume=True, listener=(again := Notes()))
        assert (resumed.step, losses(again.rows)) == (4, pytest.approx(wanted[2:], rel=1e-5))
        used = opened.open_run(tmp_path / "card/run")
        prompt = generate.chat_ids(used.tokenizer, [{"role": "user", "content": "red green"}])
        answer = generate.generate(used.model, used.tokenizer, [prompt], SamplingParams(4))
        scored = mean_scores(CausalLM(), used.model, [tiny.batch((5, 9), tiny_run.VOCAB)])["loss"]
    there = opened.open_run(tmp_path / "cpu/run")
    assert answer == generate.generate(there.model, there.tokenizer, [prompt], SamplingParams(4))
    there_scored = mean_scores(CausalLM(), there.model, [tiny.batch((5, 9), tiny_run.VOCAB)])["loss"]
    assert scored == pytest.approx(there_scored, 1e-5)


def test_a_run_from_one_card_goes_on_on_two(tmp_path: Path) -> None:
    """A checkpoint has the random states of the cards that there were."""
    options = {"quant__type": "nf4", "train__max_steps": 4, "train__save_strategy": "steps", "train__save_steps": 2}
    recipe, told, again = tiny_run.recipe(tmp_path, **options), Notes(), Notes()
    with machine(1):
        finetune.train(recipe, listener=told)
    stopped_after_two(tmp_path / "run")
    with machine(2):
        finetune.train(recipe, resume=True, listener=again)
    assert losses(again.rows) == pytest.approx(losses(told.rows)[2:], rel=1e-5)


@pytest.mark.parametrize("count", [1, 2])
def test_a_scripts_own_trainer_runs_on_cards(count: int, tmp_path: Path) -> None:
    """The drop-in under transformers' Trainer: prepare, train, evaluate, save, open again, generate; as on the CPU."""
    rows = [{name: x[n] for name, x in padded().items()} for n in (0, 1)] * 2

    def script(places: list[str] | None, folder: Path) -> tuple[list[float], float, list[int]]:
        lm = tiny.model("llama", changes={"initializer_range": 0.05})
        lm = halfbyte.prepare_model_for_kbit_training(on(lm, places) if places else lm)
        torch.manual_seed(0)
        model = halfbyte.get_peft_model(lm, LoraConfig(target_modules=["q_proj", "v_proj"], **DROPIN))
        args = TrainingArguments(
            str(folder), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1, report_to=[],
            save_strategy="no", disable_tqdm=True, use_cpu=places is None, data_seed=0, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        told = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        scored = trainer.evaluate()["eval_loss"]
        model.save_pretrained(folder / "adapter")
        base = tiny.model("llama", changes={"initializer_range": 0.05})
        again = halfbyte.PeftModel.from_pretrained(on(base, places[:1]) if places else base, folder / "adapter").eval()
        ids = padded()["input_ids"][:1].to(places[0] if places else "cpu")
        said = again.generate(input_ids=ids, attention_mask=ids * 0 + 1, max_new_tokens=4, do_sample=False)
        return told, scored, said.tolist()

    wanted = script(None, tmp_path / "cpu")
    with machine(count):
        got = script([f"{fake_card.KIND}:{n}" for n in range(count)], tmp_path / "card")
    assert got[0] == pytest.approx(wanted[0], rel=2e-4)  # the Trainer tells four digits
    assert got[1] == pytest.approx(wanted[1], rel=1e-4) and got[2] == wanted[2]


def medium(folder: Path, words: int = 60) -> None:
    """A checkpoint and rows large enough that what is not a tensor's size does not count."""
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 8}
    more = {"num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 1024, "vocab_size": tiny_run.VOCAB}
    tiny.model("llama", changes=sizes | more).save_pretrained(folder / "model")
    tiny_run.tokenizer().save_pretrained(folder / "model")
    draw = random.Random(0)
    texts = [[" ".join(draw.choices(tiny_run._WORDS, k=count)) for count in (words, words * 2 // 3)] for _ in range(12)]
    lines = [json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in texts]
    (folder / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")


ALL = {"lora__target_modules": "all-linear"}


def slow(*values: object) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (1, {"quant__compute_dtype": "bf16"}),
        slow(1, {"quant__compute_dtype": "fp32"}),
        slow(1, {"quant__compute_dtype": "bf16", "train__gradient_checkpointing": True}),
        slow(1, {"quant__compute_dtype": "bf16", "lora__lora_dropout": 0.1, **ALL}),
        slow(1, {"quant__compute_dtype": "bf16", "train__gradient_checkpointing": True, **ALL}),
        (2, {"quant__compute_dtype": "bf16"}),
    ],
)
def test_memory_of_a_card_is_as_planned(count: int, options: dict[str, Any], tmp_path: Path) -> None:
    """The plan's lines that are tensors, against every byte that the card has seen: within 5%."""
    medium(tmp_path)
    recipe = tiny_run.recipe(tmp_path, quant__type="nf4", train__max_steps=2, data__max_length=512, **options)
    places = ("resident",) if count == 1 else ("split",)
    with machine(count) as cards, mock.patch.object(choose, "placements", return_value=places):
        told = Notes()
        told.begin = lambda *_: cards.reset()  # type: ignore[method-assign]
        finetune.train(recipe, listener=told)
        seen = max(cards.peak.values())
    plan = json.loads((tmp_path / "run/plan.json").read_text())
    lines = {line["name"]: line["bytes"] for line in plan["lines"] if line["where"] == "device"}
    assert set(WITHOUT_DEVICE) <= set(lines)
    planned = sum(size for name, size in lines.items() if name not in WITHOUT_DEVICE)
    assert seen > 9_000_000 and planned == pytest.approx(seen, rel=0.05), (planned, seen, lines)


@pytest.mark.parametrize(("capability", "wanted"), [((9, 0), torch.bfloat16), ((7, 5), torch.float16)])
def test_a_scripts_base_is_in_the_dtype_that_its_card_multiplies(
    capability: tuple[int, int], wanted: torch.dtype, tmp_path: Path
) -> None:
    """A script that asks for fp16 over a bf16 model had no fused layers on any card, and a T4 stayed in bf16."""
    tiny_run.checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    recipe = tiny_run.recipe(tmp_path, quant__type="nf4", quant__compute_dtype="bf16").recipe
    with machine(), mock.patch.object(fake_card._Module, "get_device_capability", return_value=capability):
        lm = load.open_base(find_model(recipe), recipe.quant, device.detect()).model
        codec.set_compute_dtype(lm, torch.float16)  # bnb_4bit_compute_dtype
        assert lm.dtype == torch.bfloat16
        dropin._say_once.cache_clear()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            assert not dropin.make_ready(lm)
        assert any("no bf16 multiply: computing in float16" in str(w.message) for w in told) == (capability < (8, 0))
        dtypes = {layer.compute_dtype for _, layer in codec.linears_4bit(lm)}
        assert dtypes | {p.dtype for p in lm.parameters() if p.dtype.is_floating_point} == {wanted}


def test_a_base_on_a_card_is_told_what_placements_there_are() -> None:
    """Not to set what it is."""
    with fake_card.cards():
        lm = tiny.model("llama").to(f"{fake_card.KIND}:0")
        for placement in ("mapped", "streamed"):
            with pytest.raises(BaseModelError, match="keeps the base in RAM, and this one is on a card") as told:
                stream.place(lm, placement)
            assert "quant.placement=auto" in str(told.value.fix)

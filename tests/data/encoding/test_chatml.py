"""ChatML where a base has no template: which rows of the embedding it takes, what trains, and that it comes back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from halfbyte import finetune
from halfbyte.data.encoding import chatml
from halfbyte.errors import DataError, TrainError
from halfbyte.inference import load
from halfbyte.inference.generate import chat_ids, end_of_turn_id
from halfbyte.recipe.schema import Loaded
from halfbyte.training import preview
from halfbyte.training.events import Listener
from halfbyte.training.prepare import prepare
from tests import tiny, tiny_run

PLAIN = ("<pad>", "<s>", "</s>")
RESERVED = (*PLAIN, "<|reserved_special_token_0|>", "<|reserved_special_token_1|>")
STAND = "reserved tokens stand for its marks,"
ENDS = "; a turn ends with </s>"
SIZE = 319  # tokens of the tokenizer here
TALK = [
    {"role": "user", "content": "red cup"},
    {"role": "assistant", "content": "blue box"},
    {"role": "user", "content": "old road"},
    {"role": "assistant", "content": "new tree"},
]


def fresh(special: tuple[str, ...]) -> Any:
    """A tokenizer without a chat template, that may be changed."""
    tiny_run.tokenizer.cache_clear()
    return tiny_run.tokenizer(special, "</s>", None)


S, E = "<|im_start|>", "<|im_end|>"
# what the tokenizer has, rows behind it, tied -> start, end, new tokens, what is told
CASES: dict[str, tuple[tuple[str, ...], int, bool, str, str, tuple[str, ...], str]] = {
    "known": ((*PLAIN, S, E), 0, False, S, E, (), "its tokenizer knows both tokens"),
    "spare rows, tied": (PLAIN, 64, True, S, E, (S, E), f"{S} and {E} are new tokens"),
    "spare rows": (PLAIN, 64, False, S, "</s>", (S,), f"{S} is a new token{ENDS}"),
    "one spare row, tied": (PLAIN, 1, True, S, "</s>", (), f"{S} is written as plain text, and a turn ends with </s>"),
    "reserved, tied": (RESERVED, 0, True, *RESERVED[3:], RESERVED[3:], f"{STAND} {RESERVED[3]} and {RESERVED[4]}"),
    "reserved": (
        RESERVED,
        0,
        False,
        RESERVED[3],
        "</s>",
        RESERVED[3:4],
        f"{STAND} {RESERVED[3]}; a turn ends with </s>",
    ),
    "none to spare": (PLAIN, 0, False, S, "</s>", (), f"{S} is written as plain text, and a turn ends with </s>"),
}


@pytest.mark.parametrize("case", CASES)
def test_marks_take_rows_that_are_there(case: str, make_data: Any) -> None:
    special, behind, tied, start, end, new, told = CASES[case]
    tokenizer = fresh(special)
    rows = len(tokenizer) + behind
    settled = chatml.install(tokenizer, make_data(), embedding_rows=rows, tied=tied)
    ids = tuple(tokenizer.convert_tokens_to_ids(list(new)))
    trained = f"; rows {', '.join(map(str, ids))} of the embedding are trained" if ids else ""
    notice = f"ChatML, the model has no chat template: {told}{trained}"
    assert (settled.new_tokens, settled.notice) == (ids, notice)
    assert len(tokenizer) <= rows
    text = tokenizer.apply_chat_template(TALK[:1], tokenize=False, add_generation_prompt=True)
    assert text == f"{start}user\nred cup{end}\n{start}assistant\n"
    assert end_of_turn_id(tokenizer) == tokenizer.convert_tokens_to_ids(end)
    if new:
        assert tokenizer(start, add_special_tokens=False).input_ids == [ids[0]]


def test_it_is_asked_for_or_met(tmp_path: Path, make_data: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": TALK}) + "\n")
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    bare, dressed = fresh(PLAIN), tiny_run.tokenizer()
    pairs = str(tmp_path / "pairs.jsonl")
    assert chatml.is_needed(str(path), bare, make_data())
    assert not chatml.is_needed(pairs, bare, make_data())
    lists = {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}
    (tmp_path / "lists.jsonl").write_text(json.dumps(lists))
    assert chatml.is_needed(str(tmp_path / "lists.jsonl"), bare, make_data())
    assert chatml.is_needed([pairs, str(path)], bare, make_data())
    assert not chatml.is_needed(str(path), dressed, make_data())
    assert not chatml.is_needed(str(path), bare, make_data(chat_template=tiny_run.CHATML))
    assert chatml.is_needed(pairs, dressed, make_data(chat_template="chatml"))


def test_no_end_token_and_no_row(make_data: Any) -> None:
    tokenizer = fresh(PLAIN)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="has 319 rows for 319 tokens, none to spare, and it is not resized"):
        chatml.install(tokenizer, make_data(), embedding_rows=SIZE, tied=True)


def run(folder: Path, special: tuple[str, ...], *, tied: bool, **values: Any) -> Loaded:
    """A run over conversations on a base of 384 rows whose tokenizer has 319 tokens and no chat template."""
    model = tiny.model("llama", vocab_size=384, changes={"tie_word_embeddings": tied})
    model.save_pretrained(folder / "model")
    fresh(special).save_pretrained(folder / "model")
    rows = [{"messages": [{**m, "content": f"{m['content']} {n}"} for m in TALK]} for n in range(16)]
    (folder / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tiny_run.recipe(folder, data__train=folder / "talk.jsonl", **values)


@pytest.mark.parametrize("tied", [True, False])
def test_a_run_trains_its_rows_and_opens_with_plain_peft(tied: bool, tmp_path: Path) -> None:
    loaded = run(tmp_path, PLAIN, tied=tied, data__mask="assistant")
    lines: list[tuple[str, str]] = []

    class Ears(Listener):
        def note(self, label: str, text: str) -> None:
            lines.append((label, text))

    report = finetune.train(loaded, listener=Ears()).report
    notice = prepare(loaded.recipe).chatml.notice  # type: ignore[union-attr]
    assert ("note", notice) in lines and notice in report["notices"]
    adapter = Path(loaded.recipe.output) / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == ([SIZE, SIZE + 1] if tied else [SIZE])

    tokenizer = AutoTokenizer.from_pretrained(adapter)
    plain = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
        dtype=torch.float32,
    )
    untouched = plain.get_input_embeddings().weight.detach().clone()
    # in training mode (there is no dropout): without, bitsandbytes takes another path for a 4-bit base on a CPU
    peft = PeftModel.from_pretrained(plain, adapter).train()
    ours = load.open_run(Path(loaded.recipe.output))
    ours.model.train()
    ids = chat_ids(ours.tokenizer, TALK[:1])
    assert ids == tokenizer.apply_chat_template(TALK[:1], add_generation_prompt=True, return_dict=False)
    assert SIZE in ids
    with torch.no_grad():
        theirs, mine = (m(input_ids=torch.tensor([ids]), use_cache=False).logits for m in (peft, ours.model))
        base = ours.model.get_base_model().get_input_embeddings()
        rows = base(torch.tensor([[SIZE, 5]]))
    assert torch.allclose(theirs, mine, atol=1e-4)
    assert not torch.allclose(rows[0, 0], untouched[SIZE]) and torch.equal(rows[0, 1], untouched[5])


def test_the_plan_counts_the_rows_and_the_dry_run_shows_them(tmp_path: Path) -> None:
    loaded = run(tmp_path, PLAIN, tied=True)
    shown = {field: (value, origin.why) for field, value, origin in preview.resolve(loaded).rows}
    value, why = shown["lora.trainable_token_indices"]
    assert value == (SIZE, SIZE + 1) and why.startswith("ChatML, the model has no chat template")
    without = run(tmp_path, PLAIN, tied=True, data__chat_template=tiny_run.CHATML)
    extra = preview.check(loaded).plan.trainable - preview.check(without).plan.trainable
    assert extra == 2 * tiny.HIDDEN


def test_a_resumed_run_ends_in_the_same_bytes(tmp_path: Path) -> None:
    values = {"train__save_strategy": "steps", "train__save_steps": 2, "train__max_steps": 5}
    whole = run(tmp_path, PLAIN, tied=True, **values)
    finetune.train(whole)

    class Cut(Listener):
        def step(self, row: dict[str, Any]) -> None:
            if row["step"] == 3:
                raise RuntimeError("power cut")

    cut = run(tmp_path, PLAIN, tied=True, **values, output=tmp_path / "cut")
    with pytest.raises(TrainError, match="power cut"):
        finetune.train(cut, listener=Cut())
    finetune.train(cut, resume=True)
    one, other = (Path(x.recipe.output) / "adapter" / "adapter_model.safetensors" for x in (whole, cut))
    assert one.read_bytes() == other.read_bytes()

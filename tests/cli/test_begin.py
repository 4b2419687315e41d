"""`halfbyte init`: what it writes passes `plan` and `data check`, by options and by three answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from halfbyte.cli import begin, show
from halfbyte.plan import estimate
from halfbyte.recipe.data import DataEntry, Fields
from halfbyte.recipe.file import load_recipe
from halfbyte.recipe.method import METHODS
from halfbyte.recipe.schema import Recipe
from tests.in_process import Cli


def rows(path: Path, asking: str, answering: str, *, words: int = 4, n: int = 16) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [{asking: f"red {i} " * words, answering: f"blue {i}"} for i in range(n)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def passes(halfbyte: Cli, *, device: str | None = None) -> None:
    planned = halfbyte("plan", "recipe.yaml", *(("--device", device) if device else ()))
    assert planned.code == 0, planned
    checked = halfbyte("data", "check", "recipe.yaml")
    assert checked.code == 0, checked


def test_the_columns_and_the_held_out_rows_are_found(halfbyte: Cli) -> None:
    rows(Path("data/my train.jsonl"), "question", "answer")
    rows(Path("data/my test.jsonl"), "question", "answer", n=3, words=2)
    ended = halfbyte("init", "--model", "model", "--data", "data/my train.jsonl")
    assert ended.code == 0, ended
    assert (
        "data/my train.jsonl: the column question asks, answer answers" in ended.out
        and "data/my test.jsonl is held out" in ended.out
    )
    recipe = load_recipe(Path("recipe.yaml")).recipe
    assert (recipe.data.fields.prompt, recipe.data.fields.completion) == ("question", "answer")
    assert (recipe.data.eval, recipe.output) == ("data/my test.jsonl", "runs/my train")
    text = Path("recipe.yaml").read_text()
    assert "# planned for this machine: " in text and "learning_rate: auto    # the highest learning rate" in text
    passes(halfbyte)


def test_as_json_it_says_what_it_wrote_and_planned(halfbyte: Cli) -> None:
    rows(Path("train.jsonl"), "question", "answer")
    begun = json.loads(halfbyte("init", "r.yaml", "--model", "model", "--json").out)
    assert begun["recipe"] == "r.yaml" and begun["plan"]["peak_bytes"] > 0
    assert any("the column question asks" in remark for remark in begun["remarks"])
    refused = halfbyte("init", "r.yaml", "--json")
    assert refused.code == 2 and "is not overwritten" in json.loads(refused.out)["error"]["message"]


def test_a_long_row_gets_its_room(halfbyte: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    rows(Path("train.jsonl"), "prompt", "completion", words=9)
    monkeypatch.setattr(begin, "COUNTED_WRONG", 20.0)  # this model reads 256 tokens, the default allows 1024
    assert halfbyte("init", "--model", "model").code == 0
    assert load_recipe(Path("recipe.yaml")).recipe.data.max_length == 256
    passes(halfbyte)


def test_a_machine_that_is_short_gets_what_makes_it_fit(halfbyte: Cli) -> None:
    """Between the least that the defaults fit and the least that anything fits; where that is, the plan decides."""
    rows(Path("train.jsonl"), "prompt", "completion", words=40)
    fits, short = 1200, 500  # MB, of the defaults; a torch that is built for cards takes more
    while fits - short > 10:
        machine = f"cpu:{(size := (fits + short) // 2)}MB"
        ended = halfbyte("init", "--model", "smollm2-135m", "--data", "train.jsonl", "--machine", machine)
        Path("recipe.yaml").unlink(missing_ok=True)
        if ended.code != 0 or "as memory is short" in ended.out:
            short = size
        else:
            fits = size
    machine = f"cpu:{short}MB"
    ended = halfbyte("init", "--model", "smollm2-135m", "--data", "train.jsonl", "--machine", machine)
    assert ended.code == 0 and f"planned for {machine}" in ended.out and "as memory is short" in ended.out, ended
    planned = halfbyte("plan", "recipe.yaml", "--device", machine)
    assert planned.code == 0, planned


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--machine", "cpu:0.2GB"), "smollm2-135m does not fit cpu:0.2GB"),
        (("--machine", "a fast one"), "--machine 'a fast one' is not a machine; allowed: 24GB"),
        (("--machine", "24"), "\n  fix: --machine 24GB"),
        (("--data", "none.jsonl"), "none.jsonl"),
        (("--data", "odd.jsonl"), "cannot tell the format"),
    ],
)
def test_what_cannot_be_is_an_error_and_nothing_is_written(halfbyte: Cli, words: tuple[str, ...], said: str) -> None:
    rows(Path("train.jsonl"), "prompt", "completion")
    rows(Path("odd.jsonl"), "x", "y")
    ended = halfbyte("init", "--model", "smollm2-135m", *words)
    assert ended.code == 2 and said in ended.err, ended
    assert not Path("recipe.yaml").exists()


def test_a_folder_of_rows_is_named_as_the_option_has_it(halfbyte: Cli) -> None:
    Path("mix").mkdir()
    rows(Path("mix/a.jsonl"), "prompt", "completion")
    ended = halfbyte("init", "--model", "model", "--data", "mix")
    assert ended.code == 2 and "\n  fix: --data mix/a.jsonl" in ended.err, ended
    Path("mix/b.md").write_text("text")
    ended = halfbyte("init", "--model", "model", "--data", "mix")
    assert ended.code == 2 and "\n  fix: --data 'mix/*'" in ended.err, ended
    assert halfbyte("init", "--model", "model", "--data", "mix/*").code == 0


@pytest.mark.parametrize("asking", ["body", "issue"])
def test_a_label_answers_the_longest_text(halfbyte: Cli, asking: str) -> None:
    line = {"ticket_id": "T-1", asking: "the screen stays black, whatever I do", "priority": "high", "label": "screen"}
    Path("train.jsonl").write_text(f"{json.dumps(line)}\n" * 4)
    ended = halfbyte("init", "--model", "model")
    assert ended.code == 0 and f"train.jsonl: the column {asking} asks, label answers" in ended.out, ended
    assert load_recipe(Path("recipe.yaml")).recipe.data.fields.completion == "label"


def test_without_rows_a_recipe_is_written_that_says_so(halfbyte: Cli) -> None:
    ended = halfbyte("init")
    assert ended.code == 0 and "train.jsonl is not here yet" in ended.out
    assert load_recipe(Path("recipe.yaml")).recipe.model == "smollm2-135m"


@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_of_a_method_has_what_the_method_takes(halfbyte: Cli, method: str) -> None:
    """And is read as it is written."""
    more = ["--set", "train.rewards=exact_match", "--set", "train.per_device_train_batch_size=8"]
    ended = halfbyte("init", "--set", f"train.method={method}", *more * (method in ("grpo", "rloo")))
    assert ended.code == 0, ended.err
    wanted = Recipe.model_validate({"model": "m", "data": {"train": "t"}, "train": {"method": method, **{
        name.partition("=")[0].removeprefix("train."): name.partition("=")[2] for name in more[1::2]
        if method in ("grpo", "rloo")
    }}})  # fmt: skip
    written = load_recipe(Path("recipe.yaml")).recipe
    for section, name in (("train", "learning_rate"), ("lora", "lora_dropout"), ("data", "mask"), ("data", "format")):
        assert getattr(getattr(written, section), name) == getattr(getattr(wanted, section), name), name


def test_a_folder_that_is_taken_gets_another_name(halfbyte: Cli) -> None:
    rows(Path("train.jsonl"), "prompt", "completion")
    for name in ("train", "train-2"):
        (Path("runs") / name).mkdir(parents=True)
    assert halfbyte("init", "--model", "model").code == 0
    assert load_recipe(Path("recipe.yaml")).recipe.output == "runs/train-3"


def test_three_questions_are_asked_until_their_answers_can_be(halfbyte: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    rows(Path("some train.jsonl"), "question", "answer")
    offered: list[str] = []
    answers: Iterator[str] = iter(
        ["nothing here", "model", "none.jsonl", "some train.jsonl", "cpu:0.1GB", "a fast one", "here"]
    )

    def ask(default: str) -> str:
        offered.append(default)
        return next(answers)

    at_a_terminal(monkeypatch)
    monkeypatch.setattr(show, "questioner", lambda: ask)
    ended = halfbyte("init")
    assert ended.code == 0, ended
    assert next(answers, None) is None
    assert offered == ["smollm2-135m"] * 2 + ["some train.jsonl"] * 2 + ["here"] * 3
    assert ended.err.count("warning: ") == 4
    recipe = load_recipe(Path("recipe.yaml")).recipe
    assert (recipe.model, recipe.data.train, recipe.data.fields.prompt) == ("model", "some train.jsonl", "question")
    passes(halfbyte)


def test_files_that_differ_are_read_each_in_its_own_way(halfbyte: Cli) -> None:
    rows(Path("a.jsonl"), "prompt", "completion")
    rows(Path("b.jsonl"), "question", "answer")
    ended = halfbyte("init", "--model", "model", "--data", "[ab].jsonl")
    assert ended.code == 0 and "b.jsonl: the column question asks, answer answers" in ended.out, ended
    fields = Fields(prompt="question", completion="answer")
    assert load_recipe(Path("recipe.yaml")).recipe.data.train == ("a.jsonl", DataEntry(path="b.jsonl", fields=fields))
    passes(halfbyte)


def test_a_label_beside_a_text_is_its_answer_unless_somebody_says_no(
    halfbyte: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows(Path("train.jsonl"), "text", "label")
    ended = halfbyte("init", "--model", "model")
    assert "train.jsonl: the column text asks, label answers; to learn text alone: data.format: text" in ended.out
    assert load_recipe(Path("recipe.yaml")).recipe.data.fields.completion == "label"
    passes(halfbyte)
    Path("recipe.yaml").unlink()
    for said, written in (("no", "text"), ("yes", "auto")):
        answers: Iterator[str] = iter(["train.jsonl", "perhaps", said, "here"])
        at_a_terminal(monkeypatch)
        monkeypatch.setattr(show, "questioner", lambda answers=answers: lambda default: next(answers))
        ended = halfbyte("init", "--model", "model")
        assert ended.code == 0 and "yes or no is needed, got 'perhaps'" in ended.err, ended
        assert "is text to be answered with label?" in " ".join(ended.out.split())
        assert load_recipe(Path("recipe.yaml")).recipe.data.format == written
        passes(halfbyte)
        Path("recipe.yaml").unlink()


@pytest.mark.parametrize(("typed", "taken"), [("mine.jsonl\r", "mine.jsonl"), ("\r", "")])
def test_what_is_typed_stands_alone_and_nothing_is_the_answer_shown(typed: str, taken: str) -> None:
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text(typed)
        assert show.questioner()("train.jsonl") == taken


def test_leaving_a_question_writes_nothing(halfbyte: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(default: str) -> str:
        raise EOFError

    at_a_terminal(monkeypatch)
    monkeypatch.setattr(show, "questioner", lambda: leave)
    assert halfbyte("init").code == 130
    assert not Path("recipe.yaml").exists()


def test_what_is_given_is_not_asked(halfbyte: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    rows(Path("train.jsonl"), "prompt", "completion")
    at_a_terminal(monkeypatch)
    monkeypatch.setattr(show, "questioner", lambda: pytest.fail("asked"))
    assert halfbyte("init", "--model", "model", "--data", "train.jsonl", "--machine", "cpu:16GB").code == 0


def at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(begin.sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(type(show.out), "is_terminal", property(lambda console: True))


def test_the_longest_row_is_that_of_any_length(halfbyte: Cli) -> None:
    rows(Path("train.jsonl"), "prompt", "completion", words=2000)
    recipe = load_of("train.jsonl")
    assert estimate.longest_row(recipe) > recipe.data.max_length


def load_of(names: str):  # type: ignore[no-untyped-def]
    from halfbyte.recipe.file import recipe_from

    return recipe_from("smollm2-135m", names).recipe

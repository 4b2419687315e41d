"""The commands that the pages show: each is one that the command line takes, and `make test-slow` runs them.

What: lines of code blocks, whole, and `halfbyte ...` in the text, whose arguments may be left out. They are read by the
command line's own parser; values of `--set` by the recipe. The slow test runs the blocks' lines in a folder that has
what they name, with a tiny model.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from halfbyte.cli import main, show
from halfbyte.cli.main import app
from halfbyte.cli.options import one_each
from halfbyte.errors import RecipeError
from halfbyte.recipe.file import recipe_from
from tests import tiny_run

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")),
         *sorted((ROOT / "examples").rglob("*.md"))]  # fmt: skip
PLACEHOLDER = re.compile(r"[A-Z][A-Z0-9_]*(\.\w+)?|\.\.\.|N|.*\.\.\..*")
COMMANDS: Any = typer.main.get_command(app)


def blocks(text: str) -> Iterator[str]:
    """The lines of code blocks that are commands: after `$`, or in a block of `sh`; continued ones joined."""
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            found = re.match(r"(\$ )?((?:halfbyte|python|make|torchrun|pip|curl|bash) .*)", line)
            if found and (found[1] or kind == "sh"):
                yield found[2]


def mentions(text: str) -> Iterator[str]:
    """`halfbyte ...` within the text."""
    plain = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from re.findall(r"`(halfbyte [a-z-][^`]*)`", plain.replace("\n", " "))


def of_pages(take: Any) -> list[Any]:
    return [
        pytest.param(command, id=f"{page.relative_to(ROOT)}: {command}"[:90])
        for page in PAGES
        for command in dict.fromkeys(take(page.read_text(encoding="utf-8")))
    ]


def wrong(words: list[str], *, whole: bool) -> str:
    """What the command line would refuse of a command's words; empty if nothing. `whole`: arguments are needed too."""
    command, context, words = COMMANDS, typer.Context(COMMANDS), one_each(words)
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        command, name = command.get_command(context, words[0]), words[0]
        if command is None:
            return f"there is no command {name}"
        words, context = words[1:], typer.Context(command, info_name=name, parent=context)
    if command is COMMANDS:  # options of halfbyte itself
        return (
            ""
            if {*words} <= {"--help", *(o for param in command.params for o in param.opts)}
            else f"{words[0]} is no option"
        )
    try:
        values, rest, _ = command.make_parser(context).parse_args(args=words)
        if {*rest} - {"..."}:
            return f"{rest[0]} is one argument too many"
        for param in command.params:
            given = values.get(param.name)
            missing = given in (None, ()) or type(given).__name__ == "Sentinel"
            if missing and param.required and whole:
                return f"{param.name} is missing"
            if not missing and not any(PLACEHOLDER.fullmatch(str(v)) for v in (given if param.multiple else [given])):
                param.process_value(context, given)
    except Exception as error:
        said = str(getattr(error, "message", error)) or type(error).__name__
        return said if whole or "requires an argument" not in said else ""
    finally:
        show.as_json(False)  # `--json` says so when it is read
    return ""


def wrong_sets(words: list[str]) -> str:
    """What a recipe would refuse of the values of `--set`."""
    words = one_each(words)
    sets = [w.removeprefix("--set=") for b, w in pairwise(["", *words]) if b == "--set" or w.startswith("--set=")]
    try:
        recipe_from("smollm2-135m", "rows.jsonl", [s for s in sets if not PLACEHOLDER.fullmatch(s.partition("=")[2])])
    except RecipeError as error:
        return error.message
    return ""


@pytest.mark.parametrize("command", of_pages(blocks))
def test_a_line_of_a_block_is_a_command(command: str) -> None:
    program, *words = shlex.split(command, comments=True)
    if program == "halfbyte":
        assert wrong(words, whole=True) == "" and wrong_sets(words) == ""
    elif program in ("python", "bash") and words[0] not in ("-m", "-c"):
        source = (ROOT / words[0]).read_text(encoding="utf-8")
        assert not [word for word in words if word.startswith("--") and f'"{word.partition("=")[0]}"' not in source]
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{words[0]}:", makefile, re.M)
    elif program == "pip":
        extras = re.findall(r"halfbyte\[([\w,]+)\]", command)
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        assert all(re.search(rf"^{extra} = \[", project, re.M) for names in extras for extra in names.split(","))


@pytest.mark.parametrize("command", of_pages(mentions))
def test_a_command_in_the_text_is_one(command: str) -> None:
    words = shlex.split(command)[1:]
    assert wrong(words, whole=False) == "" and wrong_sets(words) == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("trian recipe.yaml", "no command trian"),
        ("train recipe.yaml --nothing", "--nothing"),
        ("eval", "is missing"),
        ("export RUN --base 3bit", "3bit"),
        ("report RUN one", "too many"),
        ("train recipe.yaml --set lora.rank=3", "lora.rank"),
    ],
)
def test_the_check_sees_a_fault(words: str, said: str) -> None:
    assert said in wrong(words.split(), whole=True) + wrong_sets(words.split())


# --------------------------------------------------------------------------------------- the blocks' lines, run
NAMES = {"smollm2-135m": "model", "RUN": "runs/a", "30m": "100s"}
ELSEWHERE = {
    "torchrun": "tests/distributed/test_launch.py", "pip": "tests/test_wheel.py", "make": "tests/test_wheel.py",
    "curl": "tests/serving/http/test_adapters.py", "python": "tests/test_docs.py", "bash": "tests/test_docs.py",
    "--task": "tests/inference/test_harness.py", "--repair": "tests/export/test_repair.py",
    "Q4_K_M": "tests/export/test_llama_cpp.py",
}  # fmt: skip
RUN_PAGES = [page for page in PAGES if page.parent.name == "docs" or page == ROOT / "README.md"]


def runnable() -> list[Any]:
    commands = {
        " ".join(shlex.quote(NAMES.get(word, word)) for word in words)
        for page in RUN_PAGES
        for line in blocks(page.read_text(encoding="utf-8"))
        if not {*(words := shlex.split(line, comments=True))} & {*ELSEWHERE}
    }
    return sorted(commands)


ENVIRONMENT = {**os.environ, "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}


def halfbyte(*words: str) -> int:
    """The exit code of a command in this process and folder."""
    try:
        return main._guard(lambda: app(list(words)), words)
    except SystemExit as left:
        return int(left.code or 0)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages name: a model, rows, recipes, and runs of two steps."""
    here = tmp_path_factory.mktemp("docs")
    tiny_run.recipe(here, train__max_steps=2, train__save_strategy="steps", output="runs/orders")
    rows = (here / "train.jsonl").read_text(encoding="utf-8")
    (here / "gsm8k").mkdir()
    for name in ("orders.jsonl", "test.jsonl", "eval.jsonl"):
        shutil.copy(here / "train.jsonl", here / name)
    (here / "gsm8k.jsonl").write_text(rows.replace('"prompt"', '"question"').replace('"completion"', '"answer"'))
    (here / "gsm8k" / "test.jsonl").write_text('{"prompt": "two and two?", "completion": "#### 4"}\n' * 4)
    with (here / "test.jsonl").open("a") as file:
        file.write('{"prompt": "a cup", "completion": "{\\"cup\\": 1}"}\n')
    (here / "passages.jsonl").write_text("".join(f'{{"passage": "cup {n}"}}\n' for n in range(4)))
    (here / "train.csv").write_text("text,label\n" + "".join(f"red cup {n},{'ab'[n % 2]}\n" for n in range(16)))
    shutil.copy(here / "train.csv", here / "mails.csv")
    pairs = "".join(f'{{"query": "red {n}", "passage": "cup {n}"}}\n' for n in range(16))
    (here / "questions.jsonl").write_text(pairs)
    recipe = yaml.safe_load((here / "recipe.yaml").read_text())
    recipe["data"]["eval"] = "test.jsonl"
    (here / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for name, task, file in (("tickets", "classify", "train.csv"), ("questions", "embed", "questions.jsonl")):
        of_task = {**recipe, "task": task, "output": f"runs/{name}", "data": {"train": file, "eval": file}}
        (here / f"{name}.yaml").write_text(yaml.safe_dump(of_task))
    with contextlib.chdir(here):
        for name in ("tickets", "questions", "recipe"):
            assert halfbyte("train", f"{name}.yaml", "-q") == 0
    for name in ("gsm8k", "quickstart", "letters", "orders-2026-11-26", "a", "b"):
        shutil.copytree(here / "runs" / "orders", here / "runs" / name)
    return here


@pytest.mark.slow
@pytest.mark.parametrize("line", runnable())
def test_a_line_of_a_block_runs(
    here: Path, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(here)
    words = shlex.split(line)[1:]
    if words[0] in ("serve", "studio"):
        process = subprocess.Popen(
            [sys.executable, "-m", "halfbyte", *words, "--port", "0"], cwd=here, env=ENVIRONMENT, text=True,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None and "http://127.0.0.1:" in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        return
    if words[0] == "train":
        words += ["--output", f"runs/{abs(hash(line))}", "--set", "train.max_steps=1"]
    if words[0] == "init":
        words[1] = f"{abs(hash(line))}.yaml"
    for name in ("merged", "gguf", "peft"):
        shutil.rmtree(here / "runs" / "a" / name, ignore_errors=True)
        shutil.rmtree(here / "runs" / "quickstart" / name, ignore_errors=True)
    if "--within" in words:  # a time counts from the process's begin
        subprocess.run([sys.executable, "-m", "halfbyte", *words], cwd=here, env=ENVIRONMENT, check=True)
        return
    code = halfbyte(*words)
    assert code == 0, "".join(capsys.readouterr())


SHORT = {
    "train": ("--set", "train.max_steps=1"), "eval": ("--limit", "2"),
    "rewards": ("--set", "train.per_device_train_batch_size=8", "--set", "train.max_completion_length=8"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("example", ["orders", "tickets"])
def test_the_lines_of_an_examples_page_run_one_after_another(
    example: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the packaged base; trainings of one step, scores of two rows."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    for line in blocks((tmp_path / "examples" / example / "README.md").read_text(encoding="utf-8")):
        program, *words = shlex.split(line.replace("/tmp/", f"{tmp_path}/"), comments=True)
        if program == "python":
            subprocess.run([sys.executable, *words], check=True, env=ENVIRONMENT)
            continue
        more = [*SHORT.get(words[0], ()), *(SHORT["rewards"] if words[-1].endswith("rewards.yaml") else ())]
        if words[:2] == ["eval", "runs/orders-preferences"]:  # what a reference gives is known of all its rows
            more = []
        assert program == "halfbyte" and halfbyte(*words, *more) == 0, (line, "".join(capsys.readouterr()))


def test_what_is_run_elsewhere_is() -> None:
    assert not [file for file in ELSEWHERE.values() if not (ROOT / file).is_file()]

"""The command line as its user sees it: what each command prints, its exit code, chat on a terminal, and signals."""

from __future__ import annotations

import errno
import json
import logging
import os
import pty
import re
import select
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from halfbyte import finetune
from halfbyte.base import load
from halfbyte.cli import conversation, progress, show, show_plan
from halfbyte.errors import HalfbyteError
from halfbyte.inference import generate
from halfbyte.models.sources.lookup import resolve
from halfbyte.objectives import objective
from halfbyte.plan import estimate
from halfbyte.recipe.command import recipe_or_model
from halfbyte.recipe.file import load_recipe
from halfbyte.recipe.schema import leaves
from halfbyte.runs import points
from halfbyte.runs.folder import RunFolder
from halfbyte.system import files
from halfbyte.upstream.transformers import GGUF_RULES
from tests import tiny_run
from tests.forked import Forked
from tests.in_process import Cli, Ended, runner

ADAPTER = "adapter/adapter_model.safetensors"
LEAF = {"value", "from", "why"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model, rows, held-out rows, a recipe, and the run `done` of it; all paths relative."""
    folder = tmp_path_factory.mktemp("world")
    before = Path.cwd()
    os.chdir(folder)
    try:
        tiny_run.checkpoint(folder / "model")
        tiny_run.rows(folder / "test.jsonl", n=5, seed=1)
        tiny_run.recipe(
            Path("."),
            lora__r=8,
            lora__lora_alpha=64,
            lora__use_rslora=True,
            lora__lora_dropout=0.05,
            data__eval="test.jsonl",
            train__learning_rate=1e-3,
        )
        finetune.train(load_recipe(Path("recipe.yaml"), ["output=done"]))
        yield folder
    finally:
        os.chdir(before)


@pytest.fixture
def here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(world, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    return tmp_path / "w"


@pytest.fixture
def halfbyte(here: Path, capsys: pytest.CaptureFixture[str]) -> Cli:
    return runner(here, capsys)


# --- train -----------------------------------------------------------------------------------------------------------

STEP = r"step {}/4  loss \d+\.\d{{4}}  \d+ tokens/s  memory \d+\.\d\d GB  ETA \d+:\d\d"


def score_of(ended: Ended, name: str, side: str = "adapter") -> float:
    """A score in what `halfbyte eval --json` has printed."""
    return next(score for score in json.loads(ended.out)["metrics"] if score["name"] == name)[side]["value"]


def test_train_says_what_it_does(halfbyte: Cli) -> None:
    ended = halfbyte("train", "recipe.yaml")
    assert (ended.code, ended.err) == (0, "")
    lines = [
        r"data      16 rows, 334 tokens \(17 to 24 a row\), 29% of them trained; 5 rows held out",
        r"base      .*/model: nf4, 0\.000 GB resident \(0\.000 planned\), computing in fp32 \(.*\)",
        r"adapters  k_proj x2, o_proj x2, q_proj x2, v_proj x2; 7,168 of 122,176 parameters train .*",
        r"packing   packed: cu_seq_lens: packed = alone",
        r"plan      memory at most \d+\.\d\d GB of \d+\.\d GB free \(\d+\.\d\d expected; .* pages of files, .*",
        r"plan      time about \d+:\d\d: steps \d+:\d\d, opening .*, saving .*, evaluations .*\)",
        *(STEP.format(n) for n in (1, 2, 3, 4)),
        r"eval at step 4: loss \d+\.\d{4}  perplexity \d+\.\d{3}  \(best so far\)",
        r"4 steps, 334 tokens in \d+:\d\d \(\d+ tokens/s\)   loss \d+\.\d{4} -> \d+\.\d{4}   eval loss \d+\.\d{4}",
        r"peak memory \d+\.\d\d GB \(at most \d+\.\d\d GB planned\); \d+:\d\d from the plan on \(\d+:\d\d planned\)",
        r"adapter  run/adapter",
        r"  next: halfbyte eval run --base   or   halfbyte chat run",
    ]
    for line in lines:
        assert re.search(f"^{line}$", ended.out, re.MULTILINE), (line, ended.out)
    assert "\x1b" not in ended.out
    assert Path("run", ADAPTER).read_bytes() == Path("done", ADAPTER).read_bytes()


def test_quiet_is_few_lines(halfbyte: Cli) -> None:
    ended = halfbyte("train", "recipe.yaml", "--quiet", "--set", "train.max_steps=20")
    assert (ended.code, ended.err) == (0, "")
    steps = [int(found) for found in re.findall(r"^step (\d+)/20 ", ended.out, re.MULTILINE)]
    assert steps == list(range(2, 21, 2))
    assert "data   " not in ended.out and "checkpoint" not in ended.out
    assert ended.out.startswith("training: 20 steps\n"), "said before the first step"


def test_quiet_is_never_silent_for_long(halfbyte: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "QUIET_SECONDS", 1e-3)
    ended = halfbyte("train", "recipe.yaml", "--quiet", "--set", "train.max_steps=20", "--output", "told")
    assert (ended.code, ended.err) == (0, "")
    assert [int(found) for found in re.findall(r"^step (\d+)/20 ", ended.out, re.MULTILINE)] == list(range(1, 21))


def test_json_is_the_report_and_nothing_else(halfbyte: Cli) -> None:
    ended = halfbyte("train", "recipe.yaml", "--json", "--output", "here/it/is")
    assert (ended.code, ended.err) == (0, "")
    assert json.loads(ended.out) == json.loads(Path("here/it/is/report.json").read_text())


def test_long_lines_go_on_under_their_beginning(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal("train", "recipe.yaml", "--set", "train.max_steps=6", columns=80)
    said = terminal.read("halfbyte chat run")
    assert terminal.wait() == 0
    assert (
        "\nadapters  k_proj x2, o_proj x2, q_proj x2, v_proj x2; 7,168 of 122,176\n          parameters train" in said
    )
    bars = [line for line in re.split(r"[\r\n]", said) if line.startswith("training ")]
    assert bars and all(len(line) <= 80 for line in bars)
    assert re.search(r"^training ━+ 6/6 loss \d+\.\d{4}  \d+ tokens/s  \d+\.\d\d GB  ETA 0:00 *$", bars[-1]), bars[-1]


def test_the_reported_evaluation_is_that_of_the_kept_adapter(halfbyte: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = ("train.max_steps=20", "train.learning_rate=0.1", "train.eval_strategy=steps", "train.eval_steps=5")
    scores, numbers = objective.scores_of, count(1)

    def rises(*given: Any) -> dict[str, float]:  # from the third evaluation on, whatever this machine's rounding does
        seen = scores(*given)  # asked here by evaluations alone: the module that measures the base has its own name
        return {**seen, "loss": seen["loss"] + (next(numbers) >= 3)}

    with monkeypatch.context() as patched:
        patched.setattr(objective, "scores_of", rises)
        ended = halfbyte("train", "recipe.yaml", "--json", *(part for value in changes for part in ("--set", value)))
    assert ended.code == 0
    losses = [row["eval_loss"] for row in RunFolder(Path("run")).read_metrics() if "eval_loss" in row]
    assert json.loads(ended.out)["eval_loss"] == min(losses[:2]) < losses[-1]
    kept = score_of(halfbyte("eval", "run", "--json", "--max-new-tokens", "1"), "loss")
    assert kept == pytest.approx(min(losses), rel=1e-5)


def test_a_model_and_rows_print_the_recipe_that_is_used(halfbyte: Cli) -> None:
    ended = halfbyte("train", "model", "train.jsonl", "--set", "train.max_steps=1", "--set", "quant.compute_dtype=fp32")
    assert (ended.code, ended.err) == (0, "")
    head, _, rest = ended.out.partition("\n\n")
    printed = yaml.safe_load(rest.partition("\n\n")[0])
    assert head == "No recipe given; the defaults are used, and:"
    assert rest.partition("\n\n")[2].startswith("the whole recipe: runs/model-train/recipe.yaml\n\n")
    kept = yaml.safe_load(Path("runs/model-train/recipe.yaml").read_text())
    assert (kept["model"], kept["data"]["train"]) == ("../../model", "../../train.jsonl"), "as seen from the run"
    given: dict[str, Any] = {"data": {"train": "train.jsonl"}, "lora": {"target_modules": "all-linear"}}
    given["quant"] = {"type": "auto", "double_quant": False, "compute_dtype": "fp32", "compute": "auto"}
    given["quant"]["block_size"] = None
    given["train"] = {"gradient_accumulation_steps": 1, "max_steps": 1, "learning_rate": "auto"}
    assert printed == {"model": "model", **given, "output": "runs/model-train"}
    assert (kept["train"]["learning_rate"], kept["quant"]["type"]) == (0.003, "none"), "what auto became"
    quiet = halfbyte("train", "model", "train.jsonl", "-q", "--set", "train.max_steps=1", "-o", "two")
    assert quiet.code == 0 and "No recipe given" not in quiet.out


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ((), "--gguf FORMAT, --gguf-lora, --peft or --ollama is needed"),
        (("--peft", "--ollama"), "--peft and --ollama exclude each other"),
        (("--gguf", "Q9"), "fix: one of F32, "),
    ],
)
def test_an_export_that_is_none_is_wrong_usage(halfbyte: Cli, asked: tuple[str, ...], said: str) -> None:
    ended = halfbyte("export", "done", *asked)
    assert ended.code == 2 and said in ended.err, ended


def test_an_unusual_value_is_a_warning(halfbyte: Cli) -> None:
    ended = halfbyte("train", "recipe.yaml", "-q", "--set", "lora.lora_dropout=0.5", "--set", "train.max_steps=1")
    assert ended.code == 0
    assert ended.err == "warning: lora.lora_dropout 0.5 is outside the usual 0.05 to 0.1\n"


def test_a_run_that_diverges_is_no_success(halfbyte: Cli) -> None:
    changes = ("train.learning_rate=5", "train.max_steps=6", "train.eval_steps=3", "lora.modules_to_save=[lm_head]")
    wild = [part for value in (*changes, "train.lr_scheduler_type=constant") for part in ("--set", value)]
    warned = "warning: train.learning_rate 5 is outside the usual 1e-05 to 0.003\n"
    dry = halfbyte("train", "recipe.yaml", "--dry-run", *wild)
    assert dry.code == 0 and warned.removeprefix("warning: ").strip() in dry.out + dry.err
    ended = halfbyte("train", "recipe.yaml", *wild)
    assert ended.code == 1
    assert re.search(
        f"^{warned}warning: diverged, far worse than the base: loss .* beside .*; lower train.learning_rate$",
        ended.err,
        re.M,
    )
    assert "(best so far)" not in ended.out and "(best so far, but diverged, far worse than the base: " in ended.out
    assert "next: halfbyte" not in ended.out and "verdict  diverged, far worse than the base: " in ended.out
    verdict = json.loads(Path("run", "report.json").read_text())["verdict"]
    assert (verdict["name"], verdict["rows"]) == ("diverged", "5 held-out rows")
    assert verdict["adapter"] > 3 * verdict["base"]
    assert verdict["adapter_sha256"] == files.sha256(Path("run", ADAPTER))
    assert "run diverged 6/6" in " ".join(halfbyte("runs", ".").out.split())


def test_a_dry_run_tells_every_value_and_trains_nothing(here: Path, halfbyte: Cli) -> None:
    before = sorted(here.rglob("*"))
    ended = halfbyte("train", "recipe.yaml", "--dry-run", "--set", "train.seed=7")
    assert (ended.code, ended.err) == (0, "")
    for line in (
        r"lora\.r +8 +recipe.*",
        r"lora\.bias +none +default *",
        r"train\.seed +7 +set *",
        r"lora\.target_modules +\[\"q_proj\", \"k_proj\", \"v_proj\", \"o_proj\"\] +auto +the attention projections.*",
        r"model     .*/model",
        r"data      16 rows, .*; 4 steps of 4 rows",
        r"adapters  on 8 modules, 7,168 parameters train",
        r"memory +at most \d+\.\d\d GB of \d+\.\d GB free.*",
    ):
        assert re.search(f"^{line}$", ended.out, re.MULTILINE), (line, ended.out)
    assert sorted(here.rglob("*")) == before


def test_a_dry_run_as_json_has_an_origin_for_every_leaf(here: Path, halfbyte: Cli) -> None:
    ended = halfbyte("train", "recipe.yaml", "--dry-run", "--json", "--set", "train.seed=7")
    assert (ended.code, ended.err) == (0, "")
    shown = json.loads(ended.out)
    values = shown["values"]
    assert all(set(leaf) == LEAF for leaf in values.values())
    assert {leaf["from"] for leaf in values.values()} == {"set", "recipe", "default", "auto"}
    assert values["train.seed"] == {"value": 7, "from": "set", "why": values["train.seed"]["why"]}
    assert values["lora.target_modules"]["value"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert values["lora.target_modules"]["why"] == "the attention projections of llama"
    assert set(values) == {field for field, _ in leaves(load_recipe(Path("recipe.yaml")).recipe)}
    assert {"label": "adapters", "text": "on 8 modules, 7,168 parameters train"} in shown["notes"]
    assert shown["plan"]["peak_bytes"] > 0


def test_init_writes_a_recipe_that_loads(halfbyte: Cli) -> None:
    ended = halfbyte("init", "mine.yaml", "--model", "model", "--data", "train.jsonl")
    assert (ended.code, ended.err) == (0, "")
    wrote, *_, planned, after = ended.out.splitlines()
    assert (wrote, after) == (
        "wrote mine.yaml",
        "  next: halfbyte data check mine.yaml   then   halfbyte train mine.yaml",
    )
    assert planned.startswith("  planned for this machine: ") and "16 rows of about" in planned
    text = Path("mine.yaml").read_text()
    assert halfbyte("train", "mine.yaml", "--dry-run").code == 0
    again = halfbyte("init", "mine.yaml")
    assert again.code == 2
    assert again.err.startswith("error: mine.yaml exists and is not overwritten.\n  fix: ")
    assert Path("mine.yaml").read_text() == text


# --- what was trained ------------------------------------------------------------------------------------------------


def test_generate_and_its_base(halfbyte: Cli) -> None:
    answers = {}
    for name, flags in (("adapter", ()), ("base", ("--base",))):
        asked = ("generate", "done", "-p", "red cup", "--prompt", "old box", "--max-new-tokens", "6", *flags)
        ended = halfbyte(*asked, "--json")
        assert (ended.code, ended.err) == (0, "")
        shown = json.loads(ended.out)
        assert (shown["run"], shown["with_adapter"]) == ("done", name == "adapter")
        assert [a["prompt"] for a in shown["answers"]] == ["red cup", "old box"]
        answers[name] = [a["output"] for a in shown["answers"]]
        plain = halfbyte(*asked)
        assert (plain.code, plain.err) == (0, "")
        first, second = map(show.visible, answers[name])  # streamed, and the same text, each under its prompt
        assert plain.out == f"prompt 1: red cup\n{first}\n\nprompt 2: old box\n{second}\n"
        alone = halfbyte("generate", "done", "-p", "red cup", "--max-new-tokens", "6", *flags)
        assert alone.out == f"{first}\n"
    assert answers["adapter"] != answers["base"]


@pytest.mark.parametrize(("what", "flags"), [("done/adapter", []), ("model", ["--base"])])
def test_an_adapter_or_a_base_alone_answers_as_in_its_run(halfbyte: Cli, what: str, flags: list[str]) -> None:
    asked = ("-p", "red cup", "--max-new-tokens", "4", "--json")
    alone = halfbyte("generate", what, *asked, "--set", "quant.compute_dtype=fp32")
    wanted = json.loads(halfbyte("generate", "done", *asked, *flags).out)
    assert (alone.code, alone.err) == (0, "")
    assert json.loads(alone.out) == {**wanted, "run": what}


def test_generate_streams(halfbyte: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[str] = []
    monkeypatch.setattr(show, "stream", pieces.append)
    halfbyte("generate", "done", "-p", "red cup", "--max-new-tokens", "20")
    assert len([piece for piece in pieces if piece]) > 1


def test_sampling_repeats_with_its_seed(halfbyte: Cli) -> None:
    def sample(seed: int) -> str:
        flags = ("--max-new-tokens", "12", "--temperature", "1.5", "--seed", str(seed))
        return halfbyte("generate", "done", "-p", "red cup", *flags).out

    assert sample(1) == sample(1) != sample(2)


def test_eval_puts_base_and_adapter_side_by_side(halfbyte: Cli) -> None:
    ended = halfbyte("eval", "done", "--base", "--max-new-tokens", "4", "--samples", "1")
    assert ended.code == 0 and ended.err == ""
    for line in (
        r"┃ +┃ +source ┃ +base ┃ +adapter ┃ +difference ┃ +p ┃",
        r"│ loss +(│ +\d+\.\d{4} \[.*\] ){3}│ +[-+]\d+\.\d{4} \[.*\] │ +│",
        r"│ perplexity +(│ +[\d.]+.* ){3}│ +[-+][\d.]+.* │ +│",
        r"│ exact_match +│ +│ +0\.0%.* │ +0\.0%.* │ +\+0\.0%.* │.*│",
        r"5 rows in 0:\d\d.*",
        r"the source model has \d\.\d{4}, so quantising costs [-+].*\]; the run is .*than it, [-+].*\]",
        r"test\.jsonl:1",
        r" expected: .*",
        r"     base: .*not exact_match",
        r"  adapter: .*not exact_match",
        r"every answer: done/eval/answers.jsonl",
    ):
        assert re.search(f"^{line}$", ended.out, re.MULTILINE), (line, ended.out)
    assert "test.jsonl:2" not in ended.out


def test_scores_are_shown_on_a_full_disk_too(halfbyte: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "put", full)
    ended = halfbyte("eval", "done", "--max-new-tokens", "4", "--out", "scores")
    assert ended.code == 1 and "answers.jsonl: No space left on device" in ended.err
    assert re.search(r"^│ loss +│ +\d", ended.out, re.MULTILINE) and "every answer" not in ended.out
    assert list(Path("scores").iterdir()) == []


def test_eval_as_json_agrees_with_the_run(halfbyte: Cli) -> None:
    ended = halfbyte("eval", "done", "--base", "--json", "--max-new-tokens", "4")
    report = json.loads(Path("done/report.json").read_text())
    assert score_of(ended, "loss") == pytest.approx(report["eval_loss"], rel=1e-5)  # fp32, one micro-batch or several
    assert score_of(ended, "loss") < score_of(ended, "loss", "base")
    shown = json.loads(ended.out)
    assert shown.pop("folder") == "done/eval" and json.loads(Path("done/eval/scores.json").read_text()) == shown
    assert (shown["rows"], len(Path("done/eval/answers.jsonl").read_text().splitlines())) == (5, 5)
    few = ("--limit", "3", "--max-new-tokens", "4")
    limited = json.loads(halfbyte("eval", "done", "--data", "train.jsonl", "--json", *few).out)
    assert limited["metrics"][0]["base"] is None and limited["folder"] == "done/eval/train"
    lines = [json.loads(line) for line in Path("done/eval/train/answers.jsonl").read_text().splitlines()]
    assert [line["where"] for line in lines] == ["train.jsonl:1", "train.jsonl:2", "train.jsonl:3"]
    assert json.loads(Path("done/eval/scores.json").read_text()) == shown


def test_scores_stay_those_of_the_adapter_that_gave_them(halfbyte: Cli) -> None:
    steps = ("--set", "train.eval_strategy=no", "--set", "train.save_strategy=steps", "--set", "train.save_steps=2")
    assert halfbyte("train", "recipe.yaml", *steps, "--set", "train.max_steps=2").code == 0
    scored = json.loads(halfbyte("eval", "run", "--json", "--max-new-tokens", "1").out)
    assert scored["adapter"] == {"sha256": files.sha256(Path("run", ADAPTER)), "step": 2}
    words, page = "of an earlier adapter (step 2)", Path("run/report.html")
    assert words not in page.read_text()
    assert halfbyte("train", "run", "--resume", "--set", "train.max_steps=3").code == 0
    assert words in page.read_text(), "the page that the training leaves"
    compared = halfbyte("compare", "done", "run", "--json")
    assert f"The scores of run are {words}, not of the one that the run has now." in json.loads(compared.out)["notes"]
    halfbyte("eval", "run", "--json", "--max-new-tokens", "1")
    assert words not in page.read_text() and words not in halfbyte("compare", "done", "run").out


class Terminal:
    """A command on a pseudo-terminal of its own."""

    def __init__(self, *args: str, columns: int = 100) -> None:
        self.descriptor, self.other_end = pty.openpty()
        env = {"COLUMNS": str(columns), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
        self.command = Forked("halfbyte", *args, terminal=os.ttyname(self.other_end), **env)
        self.raw, self.seen = b"", 0

    def read(self, until: str, seconds: float = 240) -> str:
        """What appears next, up to the end of `until`, without colours and with plain line ends."""
        end = time.monotonic() + seconds
        while until not in plain(self.raw)[self.seen :]:
            left = end - time.monotonic()
            assert left > 0 and select.select([self.descriptor], [], [], left)[0], plain(self.raw)
            try:
                chunk = os.read(self.descriptor, 65536)
            except OSError:  # the other end is closed
                chunk = b""
            assert chunk, plain(self.raw)
            self.raw += chunk
            if self.other_end is not None:  # the command has it
                os.close(self.other_end)
                self.other_end = None
        text = plain(self.raw)
        start, self.seen = self.seen, text.index(until, self.seen) + len(until)
        return text[start : self.seen]

    def say(self, line: str) -> None:
        os.write(self.descriptor, line.encode() + b"\n")

    def wait(self) -> int:
        code = self.command.end().code
        os.close(self.descriptor)
        return code


def plain(raw: bytes) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", raw.decode(errors="replace")).replace("\r\n", "\n")


def test_chat_on_a_terminal(here: Path, halfbyte: Cli) -> None:
    def alone(prompt: str, *flags: str) -> str:
        return halfbyte("generate", "done", "-p", prompt, "--max-new-tokens", "8", *flags).out

    terminal = Terminal("chat", "done", "--max-new-tokens", "8")
    assert "/base [TEXT]   the base alone answers" in terminal.read("you>")

    def says(line: str, answer: str) -> None:
        terminal.say(line)
        terminal.read(f"\n{answer}")
        terminal.read("you>")

    says("/base", "say something first\n")
    says("/nonsense", "no such command /nonsense; there are /base, /both, /save, /reset, /quit\n")
    says("red cup", alone("red cup"))
    says("/base", alone("red cup", "--base"))
    terminal.say("red cup")
    terminal.say("/nonsense")
    assert f"\n{alone('red cup')}" not in terminal.read("no such command"), "it depends on what was said before"
    says("/reset", "")
    says("red cup", alone("red cup"))
    says("/reset", "")
    says("\x1b[A\x1b[A", alone("red cup"))  # two lines up
    says("/reset", "")
    says("\x1b[200~red\ncup\x1b[201~", alone("red\ncup"))  # pasted lines stay together
    says("/reset", "")
    long = "red cup " * 700  # more than the 4,096 bytes of a line that a terminal edits
    terminal.say(long)
    terminal.read("tokens are taken. /reset begins anew")
    terminal.read("you>")
    terminal.say("/quit")
    assert terminal.wait() == 0


# --- signals: a real process, stopped in the middle ------------------------------------------------------------------

STEPS = 150
LONG = (f"train.max_steps={STEPS}", "train.save_strategy=steps", "train.save_steps=25", "train.eval_strategy=no")


@pytest.fixture(scope="module")
def uninterrupted(world: Path) -> Iterator[bytes]:
    """The adapter of a run of STEPS steps from beginning to end. Sums on one thread, as in the other processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    finetune.train(load_recipe(world / "recipe.yaml", [*LONG, "output=whole"]))
    yield Path("whole", ADAPTER).read_bytes()
    torch.set_num_threads(threads)


def stopped(number: signal.Signals, after: int) -> tuple[int, str, str]:
    """Start the long run and send it a signal once it has made `after` steps."""
    metrics = Path("run/metrics.jsonl")
    changes = [part for value in LONG for part in ("--set", value)]
    command = Forked("halfbyte", "train", "recipe.yaml", *changes)
    end = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= after):
        assert time.monotonic() < end and command.running
        time.sleep(0.005)
    command.send(number)
    ended = command.end()
    return ended.code, ended.out, ended.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_resume_ends_in_the_same_bytes(
    number: signal.Signals, code: int, here: Path, halfbyte: Cli, uninterrupted: bytes
) -> None:
    returned, out, err = stopped(number, after=30)
    assert returned == code, err
    again = "again " if number == signal.SIGINT else ""
    said = re.fullmatch(
        rf"{number.name}: finishing this micro-batch; Ctrl-C {again}to stop now\n"
        rf"warning: stopped by {number.name} after step (\d+); nothing is lost\.\n"
        r"  continue: halfbyte train run --resume\n",
        err,
    )
    assert said, err
    step = int(said[1])
    assert 30 <= step < STEPS
    assert f"checkpoint run/checkpoints/step-{step:06d} ({number.name} received)\n" in out
    run = RunFolder(Path("run"))
    assert points.newest(run.checkpoints).step == step
    assert not run.adapter.exists()
    early = halfbyte("generate", "run", "-p", "x")
    assert early.code == 2
    assert early.err == (
        f"error: the run run has no adapter yet: it got to step {step}, with a checkpoint at step {step}.\n"
        "  fix: halfbyte train run --resume; or give its checkpoint in the place of the run: "
        f"run/checkpoints/step-{step:06d}\n"
    )
    words = ("train", "run", "--resume", "--quiet")
    resumed = Forked("halfbyte", *words).end() if number == signal.SIGINT else halfbyte(*words)
    assert (resumed.code, resumed.err) == (0, "")
    check_whole(run, uninterrupted)


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (25, "stopped at once; the last checkpoint is that of step 25.\n  continue: halfbyte train run --resume\n"),
        (0, "stopped by SIGINT before the first checkpoint.\n  continue: halfbyte train run --resume\n"),
    ],
)
def test_a_second_interrupt_tells_how_to_go_on(
    halfbyte: Cli, monkeypatch: pytest.MonkeyPatch, step: int, said: str
) -> None:
    ended = finetune.Outcome(Path("run"), {}, step, signal.SIGINT, at_once=True)
    monkeypatch.setattr(finetune, "train", lambda *args, **kwargs: ended)
    got = halfbyte("train", "recipe.yaml")
    assert (got.code, got.err) == (130, f"warning: {said}")


def test_an_interrupt_stops_an_answer_and_not_the_chat(
    halfbyte: Cli, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter(["red cup", "/base", "red cup", "/base", "/quit"])
    answers: Iterator[str | BaseException] = iter(["one", KeyboardInterrupt(), KeyboardInterrupt(), "two"])

    def say(*args: object, **kwargs: object) -> list[str]:
        said = next(answers)
        if isinstance(said, BaseException):
            raise said
        return [said]

    monkeypatch.setattr(show, "asker", lambda: lambda: next(typed))
    monkeypatch.setattr(generate, "generate", say)
    ended = halfbyte("chat", "done")
    assert (ended.code, ended.err, ended.out.count("(stopped)")) == (0, "", 2)
    assert [*typed, *answers] == []


def test_a_killed_run_goes_on_from_its_checkpoint(here: Path, halfbyte: Cli, uninterrupted: bytes) -> None:
    returned, _, err = stopped(signal.SIGKILL, after=60)
    assert returned == -signal.SIGKILL and err == ""
    run = RunFolder(Path("run"))
    assert points.newest(run.checkpoints).step >= 50
    ended = halfbyte("train", "run", "--resume", "--quiet")
    assert (ended.code, ended.err) == (0, "")
    check_whole(run, uninterrupted)


def check_whole(run: RunFolder, wanted: bytes) -> None:
    assert (run.path / ADAPTER).read_bytes() == wanted
    assert [row["step"] for row in run.read_metrics()] == list(range(1, STEPS + 1))


def test_a_run_that_was_moved_resumes_where_it_lies(here: Path, halfbyte: Cli) -> None:
    ended = halfbyte("train", "recipe.yaml", "-q", "--set", "train.save_strategy=steps", "--set", "train.save_steps=2")
    assert ended.code == 0
    Path("elsewhere").mkdir()
    Path("run").rename("elsewhere/moved")
    adapter = Path("elsewhere/moved", ADAPTER)
    wanted = adapter.read_bytes()
    shutil.rmtree(adapter.parent)
    shutil.rmtree("elsewhere/moved/checkpoints/step-000004")
    ended = halfbyte("train", "elsewhere/moved", "--resume", "-q")
    assert (ended.code, ended.err) == (0, "")
    assert adapter.read_bytes() == wanted and not Path("run").exists()


def test_a_plan_that_does_not_fit_ends_with_3(halfbyte: Cli) -> None:
    ended = halfbyte("plan", "llama-2-70b", "--device", "4GB")
    assert ended.code == 3
    (least,) = re.findall(r"the least that would hold it as it is: ([\d.]+) GB, and [\d.]+ GB of RAM", ended.out)
    asked = halfbyte("plan", "llama-2-70b", "--device", "4GB", "--json")
    assert asked.code == 3 and json.loads(asked.out)["plan"]["short_bytes"] > 0
    # and it would: a card of that size holds it
    assert halfbyte("plan", "llama-2-70b", "--device", f"{float(least) + 0.01:.2f}GB").code == 0
    assert halfbyte("plan", "llama-2-70b", "--device", f"{float(least) - 0.1:.2f}GB").code == 3


def test_a_full_disk_is_told_before_a_run_starts(here: Path, halfbyte: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda path: 1000 if "cache" not in str(path) else 10**12)
    monkeypatch.setattr(load, "open_base", lambda *args, **kwargs: pytest.fail("the base is opened"))
    ended = halfbyte("train", "recipe.yaml", "--output", "new", "-q")
    assert ended.code == 2 and "no space left for the run new: its checkpoints and adapter take 0.0" in ended.err
    assert not Path("new").exists()


def test_what_comes_next_can_be_done(halfbyte: Cli) -> None:
    """An evaluation needs rows that were held out."""
    with_rows = halfbyte("train", "recipe.yaml", "--output", "new", "-q").out
    assert "next: halfbyte eval new --base   or   halfbyte chat new" in with_rows
    without = halfbyte("train", "recipe.yaml", "--output", "blind", "-q", "--set", "data.eval=null").out
    assert 'next: halfbyte generate blind --prompt "..."   or   halfbyte chat blind' in without
    assert halfbyte("eval", "blind", "--base").code == 2
    Path("labels.csv").write_text("text,label\n" + "red cup,a\nold road,b\n" * 4)
    named = ("--set", "task=classify", "--set", "data.train=labels.csv", "--set", "data.eval=none")
    of_labels = halfbyte("train", "recipe.yaml", "--output", "named", "-q", *named).out
    assert 'next: halfbyte predict named --text "..."   or   halfbyte predict named ROWS.csv' in of_labels


def test_an_adapter_is_used_with_other_rows_and_elsewhere(halfbyte: Cli) -> None:
    Path("other.jsonl").write_text('{"question": "red cup", "completion": "w1"}\n')
    asked = ("eval", "done", "--data", "other.jsonl", "--json", "--max-new-tokens", "2")
    told = halfbyte(*asked)
    assert told.code == 2 and "--set data.fields.prompt=question" in told.err
    ended = halfbyte(*asked, "--set", "data.fields.prompt=question", "--set", "quant.placement=resident")
    assert json.loads(ended.out)["rows"] == 1


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("command", ["", "train", "store", "store gc", "data check"])
def test_help_has_a_short_form(halfbyte: Cli, command: str, flag: str) -> None:
    ended = halfbyte(*command.split(), flag)
    assert ended.code == 0 and "Usage" in ended.out


def test_an_error_is_json_too_where_json_was_asked_for(halfbyte: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = halfbyte("eval", "nope", "--json")
    assert json.loads(ended.out)["error"] == {
        "message": "there is no run folder nope.",
        "fix": "give the `output:` of a run, such as runs/quickstart",
        "kind": "RunError",
        "exit_code": 2,
    }
    assert ended.err.startswith("error: there is no run folder nope.") and ended.code == 2
    assert halfbyte("chat", "nope").out == halfbyte("eval", "nope").out == ""

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EIO, "Input/output error", "/somewhere")

    monkeypatch.setattr(finetune, "train", refuse)
    error = json.loads(halfbyte("train", "recipe.yaml", "--json", "--set", "output=new").out)["error"]
    assert (error["message"], error["exit_code"]) == ("/somewhere: Input/output error", 1)


def test_a_full_disk_is_told_with_its_file_and_what_helps(halfbyte: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    assert halfbyte("report", "done").code == 0
    monkeypatch.setattr(files, "put", full)
    ended = halfbyte("report", "done", "--out", "x.html")
    what = "error: x.html: No space left on device\n  fix: free some space, or write elsewhere\n"
    assert (ended.code, ended.err) == (1, what)


@pytest.mark.parametrize("words", [["--json", "--bogus"], ["--json", "--max-new-tokens", "0"], ["--bogus", "--json"]])
def test_what_the_parser_refuses_is_json_too(halfbyte: Cli, words: list[str]) -> None:
    said = halfbyte("eval", "done", *words)
    error = json.loads(said.out)["error"]
    assert (said.code, error["exit_code"], error["kind"]) == (2, 2, "UsageError")
    assert next(word for word in words if word not in ("--json", "0")) in error["message"] and said.err
    assert halfbyte("eval", "done", "--bogus").out == ""


def test_a_run_is_used_from_any_folder(here: Path, halfbyte: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its relative paths go from its own folder; files of the same names elsewhere are none of its own."""
    values = ("--set", "data.eval=test.jsonl", "--set", "train.save_strategy=epoch")
    assert halfbyte("train", "recipe.yaml", *values, "--output", "runs/one").code == 0
    wanted = score_of(halfbyte("eval", "runs/one", "--json"), "loss")
    elsewhere = here / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "test.jsonl").write_text('{"prompt": "other", "completion": "rows"}\n')
    monkeypatch.chdir(elsewhere)
    assert score_of(halfbyte("eval", "../runs/one", "--json"), "loss") == wanted
    again = halfbyte("train", "../runs/one", "--resume", "--set", "train.max_steps=5")
    assert again.code == 0, again.err
    kept = yaml.safe_load((here / "runs/one/recipe.yaml").read_text())
    assert (kept["data"]["eval"], kept["data"]["train"]) == ("../../test.jsonl", "../../train.jsonl")
    moved = here / "moved"
    moved.mkdir()
    for name in ("runs", "model", "train.jsonl", "test.jsonl"):
        (here / name).rename(moved / name)
    try:
        assert halfbyte("eval", str(moved / "runs/one"), "--limit", "1").code == 0
    finally:
        for name in ("runs", "model", "train.jsonl", "test.jsonl"):
            (moved / name).rename(here / name)


def test_a_prompt_that_is_too_long_is_refused_before_the_base_is_opened(
    halfbyte: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "open_base", lambda *args, **kwargs: pytest.fail("the base was opened"))
    refused = halfbyte("generate", "done", "--prompt", "hi", "--prompt", "red " * 300)
    assert refused.code == 2 and "the model reads 256" in refused.err


def test_control_characters_of_rows_do_not_reach_the_terminal(halfbyte: Cli) -> None:
    """An ESC would be obeyed: it can clear the screen, or rename the window."""
    nasty = "red \x1b]0;owned\x07cup\x9b2J\x7f"
    Path("test.jsonl").write_text(json.dumps({"prompt": nasty, "completion": nasty}) + "\n")
    Path("bad.jsonl").write_text(json.dumps({"prompt": nasty, "completion": 5, nasty: 1}) + "\n")
    ended = [
        halfbyte("data", "check", "test.jsonl", "--model", "model"),
        halfbyte("eval", "done", "--max-new-tokens", "2"),
        halfbyte("data", "check", "bad.jsonl", "--model", "model"),
        halfbyte("train", "recipe.yaml", "--set", f"data.train={nasty}"),
    ]
    for each in ended:
        assert not set(each.out + each.err) & {chr(c) for c in (*range(32), *range(127, 160)) if chr(c) not in "\n\t"}
    assert "␛]0;owned␇" in ended[0].out and "␛]0;owned␇" in ended[1].out


def test_how_a_model_is_made_ready_is_told(halfbyte: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the rooms log is shown, as it comes, beside the output."""

    def told(*args: object, **kwargs: object) -> None:
        logging.getLogger("halfbyte").info("converting model.gguf: dequantising")
        logging.getLogger("halfbyte").warning("only what is cached is used")
        raise HalfbyteError("enough")

    monkeypatch.setattr(finetune, "train", told)
    ended = halfbyte("train", "recipe.yaml", "--json", "--set", "output=new")
    said = "converting model.gguf: dequantising\nwarning: only what is cached is used\nerror: enough\n"
    assert ended.err == said and "converting" not in ended.out


def test_a_finished_run_is_told_at_once_and_goes_on_when_asked(here: Path, halfbyte: Cli) -> None:
    changes = [part for value in ("train.save_strategy=steps", "output=run") for part in ("--set", value)]
    assert halfbyte("train", "recipe.yaml", "-q", *changes).code == 0
    shutil.rmtree("model")  # nothing is loaded
    ended = halfbyte("train", "run", "--resume")
    report = json.loads(Path("run/report.json").read_text())
    loss = report["loss"]
    said = f"run is already complete: 4 steps, loss {loss['first']:.4f} -> {loss['last']:.4f}\n  to go on: halfbyte "
    command = "train run --resume --set train.max_steps=8"
    assert (ended.code, ended.out, ended.err) == (0, f"{said}{command}\n", "")
    assert json.loads(halfbyte("train", "run", "--resume", "--json").out) == report
    assert halfbyte("train", "run", "--resume", "--set", "train.num_train_epochs=9").out == f"{said}{command}\n"
    tiny_run.checkpoint(Path("model"))
    ended = halfbyte(*command.split(), "-q")
    assert (ended.code, ended.err) == (0, "") and ended.out.startswith("going on from step 4/8\n")
    assert [row["step"] for row in RunFolder(Path("run")).read_metrics() if "loss" in row] == [*range(1, 9)]


@pytest.mark.parametrize("how", ["its time is over", "without a checkpoint"])
def test_what_a_finished_run_advises_is_a_run_from_its_weights(how: str, here: Path, halfbyte: Cli) -> None:
    values = ["train.save_strategy=steps", "output=run", "lora.target_modules=all-linear"]
    values += ["train.within=30m", "train.learning_rate=0.001"] if "time" in how else []
    changes = [part for value in values for part in ("--set", value)]
    assert halfbyte("train", "recipe.yaml", "-q", *changes).code == 0
    said = "to go on: halfbyte "
    if "time" not in how:
        shutil.rmtree("run/checkpoints")
        said = "it has no checkpoint to go on from; a new run from its weights: halfbyte "
    command = halfbyte("train", "run", "--resume").out.partition(said)[2].strip()
    assert command.startswith("train run/recipe.yaml --output run-2 --set lora.adapter=run/adapter")
    ended = halfbyte(*command.split(), "-q")
    assert ended.code == 0, (command, ended.out, ended.err)
    assert json.loads(Path("run-2/report.json").read_text())["steps"] == 4


def test_a_finished_run_without_checkpoints_is_a_run_and_says_that_it_cannot_go_on(here: Path, halfbyte: Cli) -> None:
    assert halfbyte("train", "recipe.yaml", "-q", "--set", "output=run").code == 0
    shutil.rmtree("run/checkpoints")
    assert "run" in [entry["run"] for entry in json.loads(halfbyte("runs", ".", "--json").out)]
    assert halfbyte("generate", "run", "--prompt", "w1", "--max-new-tokens", "1").code == 0
    ended = halfbyte("train", "run", "--resume", "--set", "train.max_steps=6")
    said = "error: the run run is complete, with 4 steps, and has no checkpoint to go on from.\n"
    assert ended.code == 2 and ended.err.startswith(f"{said}  fix: a new run from its weights: halfbyte ")
    command = ended.err.partition("weights: halfbyte ")[2].split()
    assert halfbyte(*command, "-q").code == 0
    assert json.loads(Path("run-2/report.json").read_text())["steps"] == 6


def test_the_best_is_counted_over_all_processes(here: Path, halfbyte: Cli) -> None:
    changes = ("train.save_strategy=steps", "train.save_steps=2", "train.eval_strategy=steps", "train.eval_steps=1")
    assert halfbyte("train", "recipe.yaml", "-q", *(part for value in changes for part in ("--set", value))).code == 0
    shutil.rmtree("run/adapter")
    ended = halfbyte("train", "run", "--resume")
    assert "adapter   the best of 4 evaluations, from step " in ended.out


def test_a_dry_run_refuses_a_folder_that_cannot_be_made_and_shows_one_that_is_there(halfbyte: Cli) -> None:
    ended = halfbyte("train", "recipe.yaml", "--dry-run", "--output", "/proc/nope")
    assert ended.code == 2 and "/proc/nope cannot be made" in ended.err
    assert halfbyte("train", "recipe.yaml", "--dry-run", "--output", "done").code == 0


def test_a_plan_of_a_run_is_that_of_its_recipe(halfbyte: Cli) -> None:
    run, recipe = (halfbyte("plan", name, "--json", "--device", "cpu:8GB").out for name in ("done", "done/recipe.yaml"))
    assert run == recipe != ""


def test_json_says_text_as_it_is(halfbyte: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation, "answer", lambda *_, **__: "Straße 你好")
    ended = halfbyte("generate", "done", "-p", "日本", "--json", "--max-new-tokens", "2")
    assert "Straße 你好" in ended.out and json.loads(ended.out)["answers"][0]["prompt"] == "日本"


@pytest.mark.parametrize("words", [("train.jsonl",), ("train.jsonl", "smollm2-135m")])
def test_rows_before_the_model_are_told_as_such(halfbyte: Cli, words: tuple[str, ...]) -> None:
    ended = halfbyte("train", *words)
    assert ended.code == 2 and "train.jsonl holds rows; a model comes first" in ended.err
    assert f"fix: halfbyte train {(*words, 'MODEL')[1]} train.jsonl" in ended.err


@pytest.mark.skipif(not GGUF_RULES.there, reason=GGUF_RULES.reason or "there")
def test_a_plan_of_a_model_reads_the_rows_that_are_set(halfbyte: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("halfbyte.models.sources.lookup.at_hand", lambda recipe: False)
        ended = halfbyte("plan", "smollm2-135m", "--set", "data.train=train.jsonl")
        assert re.search(r"\d+ rows of about \d+ tokens", ended.out) and "are assumed" not in ended.out
    resolve("smollm2-135m", in_blocks=True)  # converted, wherever this test runs first
    ended = halfbyte("plan", "smollm2-135m", "--set", "data.train=train.jsonl")
    assert re.search(r"\d+ rows, \d+ tokens \(", ended.out) and "are assumed" not in ended.out


def test_a_plan_says_where_training_fits_and_generating_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    made = estimate.plan_model(recipe_or_model("llama-2-7b", ()), device="cpu:64GB").plan
    show_plan.verdict(made)
    assert "it fits" in (fits := capsys.readouterr().out) and "but not" not in fits
    show_plan.verdict(replace(made, generating_bytes=made.available_bytes + 1))
    assert "but not generating 1,024 tokens at once, which takes 64.00 GB" in capsys.readouterr().out


def test_force_uses_an_adapter_on_another_base(halfbyte: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree("model")
    tiny_run.checkpoint(Path("model"), seed=1)  # the same shapes
    monkeypatch.setattr(show, "asker", lambda: lambda: "/quit")
    few = ("--max-new-tokens", "2")
    commands = (("generate", "done", "-p", "w1", *few), ("eval", "done", "--limit", "2", *few), ("chat", "done", *few))
    for command in commands:
        refused, forced = halfbyte(*command), halfbyte(*command, "--force")
        assert refused.code == 2 and "- base: trained on" in refused.err, command
        assert forced.code == 0 and "used all the same: base: trained on" in forced.err, (command, forced)


def test_version_names_the_libraries(halfbyte: Cli) -> None:
    ended = halfbyte("version")
    assert ended.code == 0
    assert [line.split()[0] for line in ended.out.splitlines()][:3] == ["python", "halfbyte", "torch"]
    short = halfbyte("--version")
    assert (short.code, short.out) == (0, ended.out.splitlines()[1] + "\n")


def test_chat_begins_with_the_system_message(halfbyte: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[list[dict[str, str]]] = []
    own = generate.chat_ids

    def listen(tokenizer: object, messages: list[dict[str, str]]) -> list[int]:
        heard.append([dict(m) for m in messages])
        return own(tokenizer, messages)

    typed = iter(["red " * 400, "w1", "/reset", "w2", "/quit"])
    monkeypatch.setattr(show, "asker", lambda: lambda: next(typed))
    monkeypatch.setattr(generate, "chat_ids", listen)
    ended = halfbyte("chat", "done", "--system", "be brief", "--max-new-tokens", "2")
    assert re.match(r"\S*model with the adapter of done\n", ended.out), ended.out
    assert ended.code == 0 and "tokens are taken. /reset begins anew" in ended.err
    assert heard.pop(0)[1]["content"] == "red " * 400, "what it cannot read is told, and forgotten"
    system = {"role": "system", "content": "be brief"}
    asked = [[system, {"role": "user", "content": "w1"}], [system, {"role": "user", "content": "w2"}]]
    talks = [talk for talk in heard if talk[-1]["content"] in ("w1", "w2")]  # a tape is kept with a text of its own
    assert talks[::2] == talks[1::2] == asked  # once for the room that is left, once for the answer

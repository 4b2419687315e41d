"""`train.within` on a tiny model: it probes, trains, ends with the time; killed at any moment it ends in the same
bytes.

The clock is a number that grows by one with each look, so that what is decided by it is the same in every run.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from halfbyte import finetune
from halfbyte.errors import HalfbyteError, RecipeError, TrainError
from halfbyte.recipe.file import load_recipe
from halfbyte.recipe.schema import Loaded
from halfbyte.report import page, record
from halfbyte.runs.folder import VERIFIED_FROM_S, RunFolder
from halfbyte.training.deadline import Clock
from halfbyte.training.events import Listener
from halfbyte.tuning import budget, fits
from tests import tiny_run

ROOT = Path(__file__).parents[2]


class Ticks:
    def __init__(self) -> None:
        self.t = 0.0

    def __call__(self) -> float:
        self.t += 1.0
        return self.t


def recipe(folder: Path, **more: Any) -> Loaded:
    folder.mkdir(exist_ok=True)
    values: dict[str, Any] = {
        "train__learning_rate": None,
        "train__max_steps": 30,
        "train__within": "40s",
        "train__save_strategy": "steps",
        "train__save_steps": 4,
        "lora__lora_dropout": 0.1,
        "data__eval": tiny_run.rows(folder / "eval.jsonl", 12, seed=5),
    }
    return tiny_run.recipe(folder, **{**values, **more})


class Heard(Listener):
    def __init__(self) -> None:
        self.notes: list[tuple[str, str]] = []
        self.warnings: list[str] = []
        self.rates: list[float] = []

    def note(self, label: str, text: str) -> None:
        self.notes.append((label, text))

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def step(self, row: dict[str, Any]) -> None:
        self.rates.append(row["learning_rate"])

    def of(self, label: str) -> list[str]:
        return [text for name, text in self.notes if name == label]


def train(loaded: Loaded, listener: Listener | None = None, *, resume: bool = False, **more: Any) -> finetune.Outcome:
    return finetune.train(loaded, resume=resume, listener=listener, clock=Clock(Ticks()), **more)


def adapter(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[finetune.Outcome, Heard]:
    """The recipe run in one go, and what it said; several tests look at it."""
    heard = Heard()
    return train(recipe(tmp_path_factory.mktemp("whole")), heard), heard


def test_it_probes_trains_and_ends_with_the_time(whole: tuple[finetune.Outcome, Heard]) -> None:
    outcome, heard = whole
    run, report = RunFolder(outcome.run), outcome.report
    (fits,) = heard.of("within")
    assert fits.startswith("0:40 are about 120 rows (7.5 passes over 16), ")
    assert not [text for text in heard.of("plan") if text.startswith("time ")], "it would be that of all passes"
    probes, within = heard.of("probe"), report["within"]
    assert 2 <= len(probes) == len(within["probes"]) <= 6
    rate = within["winner"]["train.learning_rate"]
    assert heard.rates[0] == pytest.approx(rate) and heard.rates[-1] < 0.12 * rate
    assert all(a > b for a, b in itertools.pairwise(heard.rates))
    assert 15 < report["steps"] == len(heard.rates) < 30, "the time was over, not the steps"
    assert within["more"].startswith("another 0:40: ")
    assert report["eval_loss"] == [r["eval_loss"] for r in run.read_metrics() if "eval_loss" in r][-1]
    recipe_now = load_recipe(run.recipe, of_run=True).recipe
    assert recipe_now.train.learning_rate == rate
    text = page.html(record.read(run.path))
    assert "What was tried" in text and within["verdicts"][0].split(":")[0] in text
    again = load_recipe(run.path / "repeat.yaml", of_run=True).recipe.train
    assert (again.within, again.learning_rate, again.max_steps) == (None, rate, report["steps"])
    assert train(load_recipe(run.recipe, of_run=True), resume=True).report == report, "it is complete"


class Crash(Heard):
    """Ends the run at an event, as a power cut would; each event once."""

    def __init__(self, label: str, at: int, how: str) -> None:
        super().__init__()
        self.label, self.at, self.how = label, at, how

    def _happen(self) -> None:
        if self.how == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            raise RuntimeError("power cut")

    def note(self, label: str, text: str) -> None:
        super().note(label, text)
        if label == self.label and len(self.of(label)) == self.at:
            self._happen()

    def step(self, row: dict[str, Any]) -> None:
        if self.label == "step" and row["step"] == self.at:
            self._happen()


@pytest.mark.parametrize(
    "kills",
    [
        [("probe", 2, "signal"), ("step", 6, "crash")],
        pytest.param([("probe", 1, "crash"), ("step", 3, "crash")], marks=pytest.mark.slow),
        pytest.param([("step", 5, "crash"), ("step", 7, "crash")], marks=pytest.mark.slow),
        pytest.param([("step", 2, "signal"), ("step", 11, "signal")], marks=pytest.mark.slow),
    ],
)
def test_killed_twice_it_ends_in_the_same_bytes(
    kills: list[tuple[str, int, str]], whole: tuple[finetune.Outcome, Heard], tmp_path: Path
) -> None:
    wanted, loaded = whole[0], recipe(tmp_path)
    for number, kill in enumerate(kills):
        if kill[2] == "signal":
            assert train(loaded, Crash(*kill), resume=number > 0).stopped_by is not None
            continue
        with pytest.raises(TrainError, match="power cut"):
            train(loaded, Crash(*kill), resume=number > 0)
    outcome = train(loaded, resume=True)
    assert outcome.report["steps"] == wanted.report["steps"]
    assert outcome.report["within"]["probes"] == wanted.report["within"]["probes"]
    assert adapter(tmp_path / "run") == adapter(wanted.run)


def test_killed_inside_a_probe_only_that_one_is_made_again(
    whole: tuple[finetune.Outcome, Heard], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, run_steps = list[str](), budget.run_steps

    def cut(setup: Any, folder: Any, *rest: Any) -> Any:
        calls.append(str(setup.start.recipe.train.learning_rate))
        if len(calls) == 2:
            raise RuntimeError("power cut")
        return run_steps(setup, folder, *rest)

    monkeypatch.setattr(budget, "run_steps", cut)
    loaded = recipe(tmp_path)
    with pytest.raises(TrainError, match="power cut"):
        train(loaded)
    outcome = train(loaded, resume=True)
    assert len(calls) == 1 + len(outcome.report["within"]["probes"]) and calls[1] == calls[2]
    assert adapter(outcome.run) == adapter(whole[0].run)


def first_step(run: Path) -> tuple[float, float]:
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    return row["loss"], row["grad_norm"]


def test_a_probe_leaves_nothing_in_the_run(whole: tuple[finetune.Outcome, Heard], tmp_path: Path) -> None:
    """Adapters and dropout of the run begin as those of a run without probes."""
    probed = whole[0]
    rate = probed.report["within"]["winner"]["train.learning_rate"]
    plain = train(recipe(tmp_path, train__learning_rate=rate))
    assert plain.report["within"]["probes"] == []
    assert first_step(plain.run) == first_step(probed.run)


def test_a_given_rate_is_not_probed(tmp_path: Path) -> None:
    heard = Heard()
    outcome = train(recipe(tmp_path, train__learning_rate=3e-3), heard)
    assert heard.of("probe") == [] and heard.rates[0] == pytest.approx(3e-3)
    assert outcome.report["within"]["verdicts"] == []


def test_a_set_that_holds_nothing_out_says_what_it_does_instead(tmp_path: Path) -> None:
    heard = Heard()
    train(recipe(tmp_path, data__eval=None), heard)
    (said,) = heard.of("probes")
    assert said.startswith("rate was not probed: no rows are held out that would tell a better one")


def test_a_time_too_short_says_the_least_and_leaves_nothing(tmp_path: Path) -> None:
    loaded = recipe(tmp_path, train__within="1s")
    with pytest.raises(RecipeError, match=r"(?s)0:01 are too short: .*--within \d+s would do for 6 steps") as error:
        train(loaded)
    assert "one pass over 16 rows" in str(error.value) and not Path(loaded.recipe.output).exists()


def test_less_than_a_pass_is_said_before_a_model_is_built(tmp_path: Path) -> None:
    tiny_run.rows(tmp_path / "train.jsonl", 400)
    given = {"train__max_steps": None, "train__learning_rate": 1e-3}
    whole = fits.forecast(recipe(tmp_path, train__within="59s", **given), 5.0)
    assert whole is not None and whole.passes == 3 and "3 passes leave about " in whole.remark
    half = f"{whole.before_s + whole.tail_s + 50 * whole.step_s:.3f}s"
    fit = fits.forecast(recipe(tmp_path, train__within=half, **given), 5.0)
    assert fit is not None and 0 < fit.trained_rows < 400
    assert "are too short for one pass over 400 rows: that takes at least --within " in fit.remark
    assert fits.forecast(recipe(tmp_path, train__within=None), 0.0) is None


@pytest.mark.parametrize("spent_s", [5.0, 45.0, 52.0, 300.0])  # about the minute from which a second process looks, too
def test_a_time_that_is_advised_does(spent_s: float, tmp_path: Path) -> None:
    tiny_run.rows(tmp_path / "train.jsonl", 400)
    given = {"train__max_steps": None, "train__num_train_epochs": 1}
    with pytest.raises(RecipeError) as refused:
        fits.forecast(recipe(tmp_path, train__within="1s", **given), spent_s)
    few, steps, whole = re.findall(r"--within (\w+) would do for (\d+) steps, --within (\w+) ", str(refused.value.fix))[
        0
    ]
    fit = fits.forecast(recipe(tmp_path, train__within=few, **given), 1.05 * spent_s)
    assert fit is not None and fit.steps >= int(steps)
    fit = fits.forecast(recipe(tmp_path, train__within=whole, **given), 1.05 * spent_s)
    assert fit is not None and fit.passes == 1 and "too short" not in fit.remark


def test_where_starting_took_long_a_second_process_is_given_as_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Enough(Exception):
        pass

    tails, real = list[float](), fits.fit

    def and_no_more(*of: Any, **more: Any) -> fits.Fit:
        tails.append(real(*of, **more).tail_s)
        raise Enough

    monkeypatch.setattr(fits, "fit", and_no_more)
    for started_s in (0.0, 2.0, 20.0):
        with pytest.raises(Enough):
            finetune.train(recipe(tmp_path / str(started_s), train__within="600s"), clock=Clock(lambda: 0.0, started_s))
    assert tails[1] == pytest.approx(tails[0]), "the least that it is given"
    assert tails[2] - tails[0] == pytest.approx(1.3 * 20.0 - 5.0)


def test_a_second_process_looks_where_time_was_left_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, fitted, real = list[float](), list[fits.Fit](), fits.fit

    def after(run: Path, run_s: float, *_: object) -> dict[str, object]:
        asked.append(run_s)
        return {"ok": None, "seen": ""}

    monkeypatch.setattr("halfbyte.inference.verify.after", after)

    def and_keep(*of: Any, **more: Any) -> fits.Fit:
        fitted.append(real(*of, **more))
        return fitted[-1]

    monkeypatch.setattr(fits, "fit", and_keep)
    for within in ("59s", "60s"):  # steps take less: those of the first part, too
        train(recipe(tmp_path / within, train__within=within, train__max_steps=6, train__learning_rate=1e-3))
    assert [run_s >= VERIFIED_FROM_S for run_s in asked] == [False, True]
    assert fitted[1].tail_s - fitted[0].tail_s == pytest.approx(fitted[1].verified_s, abs=1.0)
    assert fitted[1].verified_s >= fits.PROCESS_S


def test_steps_that_are_given_are_said_to_be_the_limit(tmp_path: Path) -> None:
    tiny_run.rows(tmp_path / "train.jsonl", 400)
    fit = fits.forecast(recipe(tmp_path, train__max_steps=2, train__within="59s", train__learning_rate=1e-3), 5.0)
    assert fit is not None and fit.passes < 1
    assert re.fullmatch(r"train.max_steps 2 is the limit, and leaves about 0:\d\d of the time; .*=-1", fit.remark)


def test_a_search_in_too_short_a_time_says_the_least_and_leaves_nothing(tmp_path: Path) -> None:
    loaded = recipe(tmp_path, train__max_steps=12, train__within="1s")
    said = (
        r"(?s)0:01 are too short: .* two short runs .*--within \d+[sm] would do for one setting, --within \d+[sm] for"
    )
    with pytest.raises(RecipeError, match=said):
        train(loaded, alone=True)
    assert not Path(loaded.recipe.output).exists()


@pytest.mark.parametrize("text", ["soon", "0m", "30", "", "-5m"])
def test_no_time_is_refused_at_once(text: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="a time such as 30m, 1h30m or 90s"):
        recipe(tmp_path, train__within=text)


def test_a_search_alone_leaves_a_recipe_and_a_page(tmp_path: Path) -> None:
    heard = Heard()
    outcome = train(recipe(tmp_path, train__max_steps=12, train__within="100s"), heard, alone=True)
    folder = outcome.run
    whats = {row["what"] for row in outcome.report["probes"]}
    assert whats == {"rate", "targets", "rows a step", "rank"}
    assert not (folder / "adapter").exists() and not (folder / "metrics.jsonl").exists()
    found = yaml.safe_load((folder / "repeat.yaml").read_text())
    assert found["train"]["learning_rate"] == outcome.report["winner"]["train.learning_rate"]
    assert sorted(found["lora"]["target_modules"]) == sorted(outcome.report["winner"]["lora.target_modules"])
    assert "What was tried" in (folder / "report.html").read_text()
    assert record.read(folder).state.name == "finished"
    with pytest.raises(HalfbyteError, match="is a search"):
        train(load_recipe(folder / "recipe.yaml", of_run=True), resume=True)
    trained = finetune.train(load_recipe(folder / "repeat.yaml", of_run=True))
    assert trained.report["steps"] == 12


def with_the_same_end(fit: Callable[..., fits.Fit]) -> Callable[..., fits.Fit]:
    """A run keeps as much for its end as it measures of this machine; two runs are compared here."""
    return lambda *of, **more: replace(fit(*of, **more), tail_s=0.5)


CHILD = """
import sys
from pathlib import Path
from halfbyte import finetune
from halfbyte.recipe.file import load_recipe
from halfbyte.training.deadline import Clock
from halfbyte.tuning import fits
from tests.tuning.test_within import Ticks, with_the_same_end
fits.fit = with_the_same_end(fits.fit)
path = Path(sys.argv[1])
loaded = load_recipe(path)
print("ready", flush=True)
finetune.train(loaded, resume=Path(loaded.recipe.output).exists(), clock=Clock(Ticks()))
"""


@pytest.mark.slow
def test_kill_9_at_random_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fits, "fit", with_the_same_end(fits.fit))
    train(recipe(tmp_path / "whole"))
    recipe(tmp_path)
    draw, killed = random.Random(7), 0
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", CHILD, str(tmp_path / "recipe.yaml")]
    for most in (8.0, 4.0, 8.0, 3.0, 6.0, None):
        child = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        if most is not None:
            time.sleep(draw.uniform(0.5, most))
            killed += child.poll() is None
            child.kill()
        _, errors = child.communicate(timeout=300)
        assert most is not None or child.returncode == 0, errors.decode()[-2000:]
    assert killed
    assert adapter(tmp_path / "run") == adapter(tmp_path / "whole" / "run")

"""An end that nobody foresaw leaves a page in the run folder, one line on the screen, and a run that goes on."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from halfbyte import finetune
from halfbyte.cli import main
from halfbyte.errors import TrainError
from halfbyte.runs import crash
from halfbyte.runs.folder import RunFolder
from halfbyte.training.trainer import StepTrainer
from tests import tiny_run
from tests.in_process import runner


def test_a_run_that_breaks_leaves_its_page_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = StepTrainer._run_micro_batch
    loaded = tiny_run.recipe(tmp_path, train__save_strategy="steps", train__save_steps=2)

    def breaks(trainer: StepTrainer, *given: object) -> object:
        if trainer.state.global_step == 3:
            raise LookupError("a library's own words\nand more of them")
        return own(trainer, *given)  # type: ignore[arg-type]

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with monkeypatch.context() as broken:
        broken.setattr(StepTrainer, "_run_micro_batch", breaks)
        with pytest.raises(TrainError, match=r"not foreseen: LookupError: a library's own words \(all of it: ") as e:
            finetune.train(loaded)
    assert f"Go on: halfbyte train {tmp_path / 'run'} --resume" in str(e.value)
    page = (tmp_path / "run/crash.txt").read_text()
    for part in ("and more of them", "in breaks", "torch ", "learning_rate: 0.01", '"placement"', "it got to step 3"):
        assert part in page, part
    assert "hf_secret" not in page
    finetune.train(loaded, resume=True)
    assert json.loads((tmp_path / "run/report.json").read_text())["steps"] == 4
    assert not (tmp_path / "run/crash.txt").exists(), "of a process that is over"


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOMEM, "Cannot allocate memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_missing_memory_is_called_so(error: Exception, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    with pytest.raises(TrainError, match="memory ran out: ") as told, crash.reporting(run, {}):
        raise error
    assert f"`halfbyte plan {run.recipe}` lists what fits" in str(told.value)


def test_a_users_mistake_leaves_no_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_run.recipe(tmp_path)

    def fails(*_: object) -> object:
        raise TrainError("the loss is nan at step 1.")

    monkeypatch.setattr(StepTrainer, "_run_micro_batch", fails)
    with pytest.raises(TrainError, match="the loss is nan"):
        finetune.train(loaded)
    assert not (tmp_path / "run/crash.txt").exists()


def test_another_command_says_it_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def breaks(*_: object) -> object:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(main.show, "built_store", breaks)
    monkeypatch.setattr("halfbyte.base.quantize.quantize", lambda *_, **__: None)
    ended = runner(tmp_path, capsys)("quantize", "smollm2-135m")
    assert ended.code == 1 and "Traceback" not in ended.err + ended.out
    assert "something that was not foreseen: ZeroDivisionError: division by zero" in ended.err
    assert "report it with TMP/cache/crash.txt" in " ".join(ended.err.split())
    assert "in breaks" in (tmp_path / "cache/crash.txt").read_text()
    ended = runner(tmp_path, capsys)("quantize", "smollm2-135m", "--json")
    assert json.loads(ended.out)["error"]["kind"] == "Unforeseen"

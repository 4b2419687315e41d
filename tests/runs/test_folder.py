"""A run folder is made whole, locked, never overwritten, and readable after a crash at any moment."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from halfbyte.errors import RunError, TrainError
from halfbyte.runs.folder import RunFolder, write_json
from halfbyte.system import files

RECIPE = "model: smollm2-135m\n"


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    with RunFolder.create(tmp_path / "runs" / "a", RECIPE).lock() as run:
        pass
    return run


def test_create_makes_the_folder_whole_with_its_recipe(folder: RunFolder) -> None:
    assert folder.recipe.read_text() == RECIPE
    assert folder.checkpoints.is_dir()
    assert [p.name for p in folder.path.parent.iterdir()] == ["a"]  # nothing temporary is left


@pytest.mark.parametrize("kind", ["run", "empty", "file", "dangling"])
def test_nothing_that_exists_is_overwritten(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a"
    if kind == "run":
        with RunFolder.create(path, RECIPE).lock():
            pass
    elif kind == "empty":
        path.mkdir()
    elif kind == "file":
        path.write_text("mine")
    else:
        path.symlink_to(tmp_path / "nowhere")
    with (
        pytest.raises(RunError, match=r"(--resume, or|a run needs a new folder.\n  fix:) give another output:"),
        RunFolder.create(path, "x").lock(),
    ):
        pass
    with pytest.raises(RunError, match=r"exists already|a run needs a new folder"):
        RunFolder.check_free(path)
    if kind == "run":
        assert (path / "recipe.yaml").read_text() == RECIPE


def test_of_two_that_create_at_once_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    with RunFolder.create(path, RECIPE).lock():
        monkeypatch.setattr(RunFolder, "check_free", lambda path: None)  # looked before the other one renamed
        with pytest.raises(RunError, match="exists already"), RunFolder.create(path, "other").lock():
            pass
    assert (path / "recipe.yaml").read_text() == RECIPE
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_place_that_cannot_be_written_is_an_error_without_leftovers(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(RunError, match=r"cannot be made: .*/file is a file\."),
        RunFolder.create(tmp_path / "file" / "run", "x").lock(),
    ):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_place_where_not_even_root_can_write_is_told_at_once() -> None:
    with pytest.raises(RunError, match=r"the run folder /proc/nope cannot be made: /proc"):
        RunFolder.check_free(Path("/proc/nope"))


def test_open_says_what_is_wrong(tmp_path: Path, folder: RunFolder) -> None:
    with pytest.raises(RunError, match="there is no run folder"):
        RunFolder.open(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is a file, not a run folder"):
        RunFolder.open(tmp_path / "file")
    with pytest.raises(RunError, match=r"is not a run folder: it has no recipe\.yaml and no checkpoints/\.$"):
        RunFolder.open(tmp_path)
    folder.adapter.mkdir()
    (folder.adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(RunError, match="It is an adapter: give the run folder that it lies in"):
        RunFolder.open(folder.adapter)
    assert RunFolder.open(folder.path) == folder
    folder.checkpoints.rmdir()
    assert RunFolder.open(folder.path) == folder
    (folder.adapter / "adapter_config.json").unlink()
    with pytest.raises(RunError, match=r"is not a run folder: it has no checkpoints/\.$"):
        RunFolder.open(folder.path)


def test_open_without_an_adapter_says_how_far_it_got(folder: RunFolder) -> None:
    with pytest.raises(RunError, match="it ended before its first step, without a checkpoint"):
        RunFolder.open(folder.path)
    folder.append_metrics({"step": 41, "loss": 1.0})
    folder.append_metrics({"step": 42, "loss": 1.0})
    for name in ("step-000020", "step-000040", ".step-000041.77", "best"):
        (folder.checkpoints / name).mkdir()
    expected = "no adapter yet: it got to step 42, with a checkpoint at step 40.\n  fix: halfbyte train "
    with pytest.raises(RunError, match=re.escape(f"{expected}{folder.path} --resume")):
        RunFolder.open(folder.path)
    with RunFolder.open(folder.path, need_adapter=False).lock() as again:
        assert again == folder
        with pytest.raises(RunError, match=rf"fix: wait for process {os.getpid()}$"):
            RunFolder.open(folder.path)


HOLD = """
import sys
from pathlib import Path
from halfbyte.runs.folder import RunFolder
with RunFolder.open(Path(sys.argv[1]), need_adapter=False).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_run_is_written_by_one_process_and_a_killed_one_leaves_no_lock(folder: RunFolder) -> None:
    command = [sys.executable, "-c", HOLD, str(folder.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(RunError, match=f"is being written by process {other.pid}"),
            RunFolder.open(folder.path, need_adapter=False).lock(),
        ):
            pass
        with pytest.raises(RunError, match=f"is being written by process {other.pid}"):  # by a second run that begins
            RunFolder.check_free(folder.path)
        other.kill()
    with pytest.raises(RunError, match="exists already"):
        RunFolder.check_free(folder.path)
    with RunFolder.open(folder.path, need_adapter=False).lock():
        assert (folder.path / "lock").read_text() == str(os.getpid())


def test_who_looks_whether_a_run_is_written_keeps_nobody_from_writing_it(folder: RunFolder) -> None:
    with (folder.path / "lock").open("r+") as stream:
        assert files.lock(stream, shared=True, wait=False)  # as `writer` has it, for some microseconds
        end = threading.Timer(0.2, stream.close)
        end.start()
        with folder.lock():
            assert folder.writer() == str(os.getpid())
        end.join()


def test_create_holds_the_lock(tmp_path: Path) -> None:
    with (
        RunFolder.create(tmp_path / "a", RECIPE).lock() as run,
        pytest.raises(RunError, match="is being written"),
        RunFolder.open(run.path, need_adapter=False).lock(),
    ):
        pass


def test_metrics_are_one_object_a_line_and_read_back(folder: RunFolder) -> None:
    rows = [{"step": n, "loss": 1.5 / n, "note": "ä"} for n in (1, 2, 3)]
    for number, row in enumerate(rows, start=1):
        folder.append_metrics(row)
        assert len(folder.metrics.read_text().splitlines()) == number  # on disk at once, not at the end
    assert folder.read_metrics() == rows


def test_numbers_that_json_has_no_name_for_become_null(folder: RunFolder) -> None:
    folder.append_metrics({"step": 1, "loss": float("nan"), "more": [float("inf"), (1, Path("x"))]})
    assert "NaN" not in folder.metrics.read_text()
    assert folder.read_metrics() == [{"step": 1, "loss": None, "more": [None, [1, "x"]]}]


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3}', "{", "\x00\x00\x00"])
def test_a_torn_last_line_is_passed_over_and_cut_away_by_the_next_row(folder: RunFolder, torn: str) -> None:
    folder.append_metrics({"step": 1})
    folder.append_metrics({"step": 2})
    with folder.metrics.open("a") as stream:
        stream.write(torn)
    assert folder.read_metrics() == [{"step": 1}, {"step": 2}]
    folder.append_metrics({"step": 3, "again": True})
    assert folder.read_metrics() == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]
    assert all(json.loads(line) for line in folder.metrics.read_text().splitlines())


def test_a_damaged_line_in_the_middle_is_an_error_with_its_number(folder: RunFolder) -> None:
    folder.metrics.write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl:2: "):
        folder.read_metrics()
    folder.metrics.write_text('{"step": 1}\n[2]\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl:2: not a JSON object"):
        folder.read_metrics()


def test_rows_after_the_checkpoint_are_cut_off(folder: RunFolder) -> None:
    for n in range(1, 8):
        folder.append_metrics({"step": n})
    folder.append_metrics({"step": 5, "eval_loss": 1.0})
    folder.truncate_metrics(5)
    assert [row["step"] for row in folder.read_metrics()] == [1, 2, 3, 4, 5, 5]
    before = folder.metrics.stat().st_ino
    folder.truncate_metrics(5)
    assert folder.metrics.stat().st_ino == before  # nothing to cut: not written again
    folder.truncate_metrics(0)
    assert folder.read_metrics() == []


def test_json_is_replaced_whole(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(folder.plan, {"peak": 1})
    assert json.loads(folder.plan.read_text()) == {"peak": 1}

    def fail(source: Path, target: Path) -> None:
        raise PermissionError("no")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(PermissionError):
        write_json(folder.plan, {"peak": 2})
    assert json.loads(folder.plan.read_text()) == {"peak": 1}
    assert not list(folder.path.glob(".plan*"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device without space")
def test_a_full_disk_is_said_with_the_size_needed(folder: RunFolder) -> None:
    folder.report.write_text("old")
    (folder.path / f".report.json.{os.getpid()}").symlink_to("/dev/full")
    with pytest.raises(
        TrainError, match=r"no space left: writing .*report\.json needs 13 bytes, and .* bytes free\.\n.*--resume"
    ):
        write_json(folder.report, {"a": 1})
    assert folder.report.read_text() == "old"


def test_rows_that_find_no_room_wait_in_their_order(folder: RunFolder) -> None:
    assert folder.append_metrics({"step": 1})
    kept = folder.metrics.rename(folder.path / "kept")
    folder.metrics.symlink_to("/dev/full")
    assert not folder.append_metrics({"step": 2})
    assert not folder.append_metrics({"step": 3})
    folder.metrics.unlink()
    kept.rename(folder.metrics)
    assert [row["step"] for row in folder.read_metrics()] == [1, 2, 3]
    assert folder.append_metrics({"step": 4}) and not folder.unwritten
    assert [row["step"] for row in RunFolder(folder.path).read_metrics()] == [1, 2, 3, 4]

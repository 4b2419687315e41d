"""`halfbyte report`, `compare` and `runs` as they are typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from halfbyte.report import page
from halfbyte.system import files
from tests import in_process
from tests.report import made


@pytest.fixture
def cli(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> in_process.Cli:
    monkeypatch.chdir(tmp_path)
    return in_process.runner(tmp_path, capsys)


def test_a_page_is_made_anew(cli: in_process.Cli, tmp_path: Path) -> None:
    run = made.run(tmp_path / "runs/a", made.metrics(5))
    ended = cli("report", "runs/a")
    assert ended.code == 0 and ended.out.startswith("runs/a/report.html") and run.page.is_file()
    assert cli("report", "runs/a", "--out", "x.html").code == 0 and (tmp_path / "x.html").is_file()
    ended = cli("report", "runs/none")
    assert ended.code == 2 and "there is no run folder runs/none" in ended.err


def test_a_page_that_is_current_is_only_named(
    cli: in_process.Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made.finished(tmp_path / "runs/a", made.metrics(5))
    first, printed = cli("report", "runs/a"), run.page.read_bytes()
    run.page.write_bytes(printed.replace(b"</html>", b"<!-- not made again --></html>"))
    again = cli("report", "runs/a")
    assert again.code == 0 and again.out.startswith("runs/a/report.html") and first.code == 0
    assert b"not made again" in run.page.read_bytes()
    assert cli("report", "runs/a", "--out", "x.html").code == 0
    assert b"not made again" not in (tmp_path / "x.html").read_bytes()
    run.metrics.touch()
    assert cli("report", "runs/a").code == 0 and run.page.read_bytes().count(b"not made again") == 0


@pytest.mark.parametrize("command", ["runs runs", "report runs/a"])
def test_what_only_lists_and_names_imports_no_library(command: str, tmp_path: Path) -> None:
    run = made.finished(tmp_path / "runs/a", made.metrics(5), **made.verdict())
    page.write(run.path)
    code, found, printed = in_process.imported({"torch", "numpy", "jinja2"}, *command.split(), cwd=tmp_path)
    assert (code, found) == (0, []), printed


def test_a_folder_that_cannot_be_written_is_told_before_the_work(
    cli: in_process.Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.finished(tmp_path / "runs/a", made.metrics(5))
    made.run(tmp_path / "runs/b", made.metrics(5))
    allowed = tmp_path / "pages"
    monkeypatch.setattr(files, "why_unwritable", lambda folder: "" if folder == allowed else "Read-only file system")
    page, folder = "name another file: --out FILE.html", "name another one: --out DIR"
    refusals = {
        "report runs/a": f"error: runs/a cannot be written: Read-only file system.\n  fix: {page}\n",
        "compare runs/a runs/b": f"error: TMP/runs cannot be written: Read-only file system.\n  fix: {page}\n",
        "eval runs/a --data rows.jsonl": (
            f"error: runs/a/eval/rows cannot be written: Read-only file system.\n  fix: {folder}\n"
        ),
        "train runs/b --resume": (
            "error: runs/b cannot be written: Read-only file system.\n"
            "  fix: copy the run into a folder that can be written, and resume it there\n"
        ),
    }
    for command, line in refusals.items():
        ended = cli(*command.split())
        assert (ended.code, ended.out) == (2, "") and line in ended.err, ended
    allowed.mkdir()
    assert cli("report", "runs/a", "--out", "pages/x.html").code == 0


ANOTHER = "\n  fix: name another file: --out FILE.html"


@pytest.mark.parametrize("command", ["report runs/a", "compare runs/a runs/b"])
@pytest.mark.parametrize(
    ("out", "refusal"),
    [
        ("runs/b", "runs/b is a folder, and a page is a file.\n  fix: name another file: --out FILE.html"),
        (".", ". is a folder, and a page is a file.\n  fix: name another file: --out FILE.html"),
        ("..", ".. is a folder, and a page is a file.\n  fix: name another file: --out FILE.html"),
        ("rows.jsonl", "rows.jsonl does not end in .html, and a page does.\n  fix: name another file: --out FILE.html"),
        ("mine.html", "mine.html is not a page of halfbyte's, and nothing else is replaced." + ANOTHER),
        ("no/x.html", "there is no folder no for the page.\n  fix: mkdir -p no"),
        ("", "-o is given nothing.\n  fix: give it a value, or leave -o out"),
    ],
)
def test_a_page_takes_the_place_of_a_page_alone(
    command: str, out: str, refusal: str, cli: in_process.Cli, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        made.run(tmp_path / f"runs/{name}", made.metrics(5))
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "mine.html").write_text("<title>mine</title>\n")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    ended = cli(*command.split(), "-o", out)
    assert (ended.code, ended.out, ended.err) == (2, "", f"error: {refusal}\n")
    assert before == {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}


def test_runs_are_listed(cli: in_process.Cli, tmp_path: Path) -> None:
    ended = cli("runs")
    assert ended.code == 2 and "there is no folder runs" in ended.err
    (tmp_path / "runs").mkdir()
    assert cli("runs").out == "no runs in runs\n"
    made.finished(tmp_path / "runs/[a]", made.metrics(5))
    made.finished(
        tmp_path / "runs/c", made.metrics(5), **made.verdict("better", "better than the base: loss 1 beside 2")
    )
    made.run(tmp_path / "runs/b", made.metrics(7), steps=9)
    lines = cli("runs").out.splitlines()
    assert len(lines) == 4 and any("runs/[a]" in line and "finished" in line for line in lines)
    assert any(line.split()[:3] == ["runs/c", "better", "5/5"] for line in lines), lines
    assert any(line.split()[:6] == ["runs/b", "crashed", "at", "step", "7", "7/9"] for line in lines), lines
    rows = json.loads(cli("runs", "--json").out)
    assert {row["state"] for row in rows} == {"finished", "crashed"}
    assert {"killed after no checkpoint", "better than the base: loss 1 beside 2"} <= {row["why"] for row in rows}


def test_runs_are_compared(cli: in_process.Cli, tmp_path: Path) -> None:
    for name in ("a", "b"):
        run = made.run(tmp_path / f"runs/{name}", made.metrics(5))
        run.recipe.write_text(run.recipe.read_text().replace("r: 8", f"r: {len(name) + ord(name)}"))
    ended = cli("compare", "runs/a", "runs/b")
    assert ended.code == 0 and "lora.r" in ended.out and "98" in ended.out and "99" in ended.out
    assert "a is not finished: crashed" in ended.err
    assert (tmp_path / "runs/compare.html").is_file()
    document = json.loads(cli("compare", "runs/a", "runs/b", "--json", "--out", "c.html").out)
    assert document["recipe"]["lora.r"] == {"a": "98", "b": "99"} and document["page"] == "c.html"
    ended = cli("compare", "runs/a")
    assert ended.code == 2 and "halfbyte compare RUN RUN" in ended.err

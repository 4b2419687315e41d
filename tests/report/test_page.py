"""The page of a run: nothing of its rows is markup, gaps and long runs are drawn, what happened is told."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from halfbyte.errors import RunError
from halfbyte.report import compare, page, record
from halfbyte.runs.folder import RunFolder
from tests.report import made

BAD = "</pre></script><script>alert('x')</script><img src=x onerror=alert(1)>\" onmouseover=\"alert(2)"
VOID = {"meta", "link", "br", "img"}


class Seen(HTMLParser):
    """Every tag of a page with its attributes; whether each is closed; its text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def seen(text: str) -> Seen:
    parser = Seen()
    parser.feed(text)
    assert not parser.open
    return parser


def started(**changes: Any) -> dict[str, Any]:
    """`started.json` of a small run."""
    read = {"labelled": False, "special": False}
    return {
        "processes": [{"step": 0, "time": 1.7e9}],
        "model": {"id": "tiny", "revision": None},
        "values": {
            "lora.r": {"value": 8, "from": "recipe", "why": "line 3"},
            "lora.bias": {"value": "none", "from": "default", "why": ""},
        },
        "data": {
            "train": {
                "used": 16,
                "skipped": 0,
                "truncated": 0,
                "tokens": 900,
                "labelled_tokens": 300,
                "labelled_share": 1 / 3,
            },
            "eval": None,
            "gates": [{"gate": "lengths", "level": "ok", "found": "all fit", "fix": None}],
        },
        "lengths": {
            "train": {"shortest": 20, "quarter": 30, "median": 40, "three_quarters": 50, "longest": 90},
            "eval": None,
        },
        "histogram": [{"least": 0, "most": 63, "rows": 10}, {"least": 64, "most": 127, "rows": 6}],
        "examples": [
            {
                "row": 1,
                "where": "rows.jsonl:1",
                "tokens": 40,
                "labelled": 3,
                "pieces": [{"text": "user: hi", **read}, {"text": "yes", **read, "labelled": True}],
                "cut": False,
            }
        ],
        "proofs": [{"name": "packing", "ok": True, "said": "proven"}],
        "notices": [],
        "versions": {"torch": "2.13"},
        "machine": {"kind": "cpu", "cpu": "a CPU", "cores": 2, "ram_bytes": 8e9, "cards": []},
        **changes,
    }


def everywhere(value: Any) -> Any:
    """The same document with every text replaced by one that would run if it were markup."""
    if isinstance(value, dict):
        return {key: everywhere(item) for key, item in value.items()}
    if isinstance(value, list):
        return [everywhere(item) for item in value]
    return BAD if isinstance(value, str) else value


def scored(run: RunFolder, scores: dict[str, Any], answers: list[dict[str, Any]]) -> None:
    """Scores of the adapter that the run has, unless `scores` names another."""
    folder, weights = run.path / "eval", run.adapter / "adapter_model.safetensors"
    folder.mkdir()
    run.adapter.mkdir(exist_ok=True)
    weights.write_bytes((2).to_bytes(8, "little") + b"{}")  # of no tensor
    adapter = {"sha256": hashlib.sha256(weights.read_bytes()).hexdigest(), "step": 20}
    (folder / "scores.json").write_text(json.dumps({"adapter": adapter, **scores}))
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))


def score(value: float, *interval: float, **more: float) -> dict[str, Any]:
    return {"value": value, "interval": list(interval) or None, **more}


SCORES = {
    "data": "test.jsonl",
    "rows": 48,
    "seconds": 9.0,
    "metrics": [
        {
            "name": "exact_match",
            "adapter": score(0.9583, 0.86, 0.99),
            "base": score(0.0, 0.0, 0.07),
            "difference": score(0.9583, 0.85, 1.0, p_value=1e-9),
        },
        {"name": "loss", "adapter": score(0.21), "base": None, "difference": None},
    ],
}


def answer(text: str, base: str | None = None, *, same: bool = False) -> dict[str, Any]:
    right = {"text": text, "scores": {"exact_match": 1.0}}
    return {"prompt": "what?", "expected": text, "adapter": right,
            "base": None if base is None else {"text": base, "scores": {"exact_match": float(same)}}}  # fmt: skip


def test_a_page_holds_what_the_folder_says(tmp_path: Path) -> None:
    run = made.finished(tmp_path / "run", made.metrics(60, evals=3), verified={"ok": True, "seen": "the same"})
    (run.started).write_text(json.dumps(started()))
    scored(run, SCORES, [answer("blue", "red")])
    parser = seen(page.html(record.read(run.path)))
    words = " ".join(parser.words)
    for said in (
        *("finished", "held-out rows", "Learning rate", "Gradient norm", "Speed", "Memory", "planned, at most"),
        *("exact_match", "[0.86, 0.99]", "lengths: all fit", "rows.jsonl:1", "proven", "lora.r", "torch 2.13"),
        *("1 values are defaults", "blue", "red", "smoothed over"),
    ):
        assert said in words, said
    labelled = [attrs for tag, attrs in parser.tags if tag == "span" and attrs.get("class") == "piece on"]
    assert len(labelled) == 2  # the legend's, and the answer's


def losses(base: float, adapter: float | None, rows: str = "", source: float | None = None) -> dict[str, Any]:
    """Of a verdict, or of the text of the base's kind, what a report keeps."""
    return {"base": base, "adapter": adapter, "rows": rows, "source": None if source is None else {"loss": source}}


@pytest.mark.parametrize(
    ("seen", "text", "said"),
    [
        (
            losses(3.6564, 0.0206, "31 held-out rows", 3.00198),
            losses(3.45574, 4.17196, source=3.26016),
            {
                "loss on 31 held-out rows": "0.0206 (3.6564 of the base, 3.0020 of the source)",
                "loss on base text": "4.1720 (3.4557 of the base, 3.2602 of the source)",
            },
        ),
        (
            losses(1.5, 1.0, "12 training rows that it did not reach"),
            {"text": "not read: its 9,000 tokens would take 0:40"},
            {
                "loss on 12 training rows that it did not reach": "1.0000 (1.5000 of the base)",
                "loss on base text": "not read: its 9,000 tokens would take 0:40",
            },
        ),
        # of a base that is the source
        (losses(1.5, 1.0, "2 held-out rows", 1.5), {}, {"loss on 2 held-out rows": "1.0000 (1.5000 of the base)"}),
        (losses(1.5, None, "2 held-out rows"), {}, {}),  # not a number: null in a report
    ],
)
def test_losses_beside_the_base_are_on_the_page_and_in_comparisons(
    tmp_path: Path, seen: dict[str, Any], text: dict[str, Any], said: dict[str, str]
) -> None:
    verdict = made.verdict()["verdict"] | seen
    runs = [made.finished(tmp_path / name, made.metrics(9), verdict=verdict, base_text=text) for name in ("a", "b")]
    assert {k: v for k, v in page.facts(record.read(runs[0].path)) if k.startswith("loss on")} == said
    figures = dict(compare.compare([run.path for run in runs]).figures)
    assert {name: cells for name, cells in figures.items() if name.startswith("loss on")} == {
        name: (value, value) for name, value in said.items()
    }


def test_nothing_of_a_run_is_markup(tmp_path: Path) -> None:
    """Every text of every file that a page is made of tries to run; the tags stay those of a harmless run."""
    pages = []
    for name, change in (("plain", lambda value: value), ("bad", everywhere)):
        rows = made.metrics(20, evals=2)
        rows[2]["stepped_down"] = [change("text")]
        report = {
            "notices": ["text"],
            "verified": {"ok": True, "seen": "text"},
            "lines": [{"name": "base", "planned": 2e9, "measured": 1e9, "error": 1.0}],
        }
        run = made.finished(tmp_path / name, rows, **change(report))
        run.started.write_text(json.dumps(change(started(notices=["x"]))))
        scored(run, change(SCORES), [change(answer("blue", "red"))])
        (run.path / "crash.txt").write_text("== traceback\n" + change("text"))
        run.recipe.write_text(f"model: {json.dumps(change('text'))}\n")
        text = page.html(record.read(run.path))
        pages.append([(tag, sorted(attrs)) for tag, attrs in seen(text).tags])
    # values that are not "default" stand in the first table: one table fewer, with its summary
    plain, bad = pages
    assert {tag for tag, _ in bad} <= {tag for tag, _ in plain}
    assert [tag for tag, _ in bad].count("script") == 1 and "img" not in [tag for tag, _ in bad]
    assert not [attrs for _, attrs in bad if any(name.startswith("on") for name in attrs)]
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text


def test_the_page_fetches_nothing_and_names_its_script_by_hash(tmp_path: Path) -> None:
    run = made.run(tmp_path / "run", made.metrics(10))
    text = page.html(record.read(run.path))
    assert not re.findall(r"(?:src|href)\s*=|url\(|@import", text)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src &#39;sha256-{digest}&#39;" in text and "default-src &#39;none&#39;" in text


def test_a_long_run_with_gaps_is_a_small_page_and_its_spike_is_on_it(tmp_path: Path) -> None:
    run = made.run(
        tmp_path / "run",
        made.metrics(20_000, evals=50, loss=lambda step: math.nan if step % 997 == 0 else 2.0 + 50.0 * (step == 7777)),
    )
    text = page.html(record.read(run.path))
    assert len(text.encode()) < 250_000
    assert "20 steps have no number for their loss" in " ".join(seen(text).words)
    assert 'data-yh="59.8"' in text  # 52 x 1.15: the axis reaches the spike


def goes_on(run: RunFolder) -> None:
    run.started.write_text(json.dumps(started(processes=[{"step": 0, "time": 1e9}, {"step": 12, "time": 1.7e9}])))


def steps_down(run: RunFolder) -> None:
    run.append_metrics({"step": 21, "loss": 1.0, "stepped_down": ["micro-batches of 900 -> 450 tokens: 0.1 GB"]})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (goes_on, "Resumed at step 12 on 2023-11-1"),
        (steps_down, "Stepped down at step 21: micro-batches of 900 -> 450 tokens"),
        (lambda run: (run.path / "crash.txt").write_text("Boom"), "The run crashed at step 20 of 20: see crash.txt"),
        (
            lambda run: (run.checkpoints / "step-000020").mkdir(),
            "The run was stopped at step 20 of 20: with a checkpoint at step 20",
        ),
        (lambda run: run.metrics.open("a").write("torn\n"), "metrics.jsonl that could not be read: 1"),
        (lambda run: run.metrics.unlink(), "The run never began at step 0 of 20: it ended before its first step"),
    ],
)
def test_what_happened_is_told(tmp_path: Path, change: Any, said: str) -> None:
    run = made.run(tmp_path / "run", made.metrics(20))
    change(run)
    assert said in " ".join(page.summary(record.read(run.path)))


def test_a_run_that_was_stopped_early_says_so(tmp_path: Path) -> None:
    run = made.finished(tmp_path / "run", made.metrics(20, evals=4), stopped_early=True)
    read = record.read(run.path)
    assert "Stopped early at step 20 of 20" in page.summary(read)[0]
    assert "stopped early" in " ".join(seen(page.html(read)).words)


def test_rows_on_which_base_and_adapter_differ_come_first(tmp_path: Path) -> None:
    run = made.run(tmp_path / "run", made.metrics(3))
    scored(run, SCORES, [answer(f"same {i}", f"same {i}", same=True) for i in range(8)] + [answer("better", "worse")])
    read = record.read(run.path)
    assert [row["expected"] for row in read.answers[:2]] == ["better", "same 0"]
    assert len(read.answers) == record.MAX_ANSWERS


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ({"sha256": "0" * 64, "step": 20}, "an earlier adapter (step 20)"),
        ({"sha256": "0" * 64, "step": None}, "an earlier adapter"),
        (None, "an adapter that is not known"),  # scores of a version that did not keep it
    ],
)
def test_scores_of_another_adapter_are_not_shown_as_the_runs(tmp_path: Path, adapter: Any, words: str) -> None:
    run = made.finished(tmp_path / "run", made.metrics(30))
    scored(run, {**SCORES, "adapter": adapter}, [answer("blue", "red")])
    text = " ".join(seen(page.html(record.read(run.path))).words)
    assert f"These scores and answers are of {words}, not of the one that the run has now." in text
    assert f" {words} difference" in text, "the column's head"
    assert "exact_match" in text and "blue" in text
    scores_now = json.loads((run.path / "eval" / "scores.json").read_text())
    digest = hashlib.sha256((run.adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
    (run.path / "eval" / "scores.json").write_text(json.dumps(scores_now | {"adapter": {"sha256": digest, "step": 30}}))
    assert words not in " ".join(seen(page.html(record.read(run.path))).words)


def test_files_that_cannot_be_read_leave_a_page(tmp_path: Path) -> None:
    run = made.finished(tmp_path / "run", made.metrics(5))
    for file in (run.report, run.plan, run.started, run.recipe, run.adapter / "adapter_config.json"):
        file.write_text("{torn")
    scored(run, SCORES, [])
    (run.path / "eval" / "answers.jsonl").write_text('{"adapter"\n')
    read = record.read(run.path)
    assert read.report == read.plan == read.started == read.recipe == {}
    assert (read.state.name, read.state.step, read.state.steps) == ("crashed", 5, 0)  # nothing says that it ended
    assert read.answers == () and read.update_norms is None and read.adapter_step is None
    words = " ".join(seen(page.html(read)).words)
    assert "The run crashed at step 5: killed after no checkpoint." in words  # metrics and scores are whole, and shown
    assert f"loss, first to last {read.metrics.steps['loss'][0]:.4f}" in words and "exact_match" in words
    assert "No notice." in words and "Planned and measured" not in words and "What the adapter changed" not in words


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a run folder"):
        page.write(tmp_path)


def test_a_page_that_cannot_be_made_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = made.run(tmp_path / "run", made.metrics(5))

    def fails(*args: object, **more: object) -> str:
        raise ValueError("no page today")

    monkeypatch.setattr(page, "html", fails)
    with caplog.at_level(logging.WARNING, logger="halfbyte"), page.at_end(run):
        pass
    assert "no page today" in caplog.text and not run.page.exists()
    with pytest.raises(KeyError), page.at_end(run):
        raise KeyError("the run's own error")


def test_what_was_measured_stands_beside_its_plan_in_words() -> None:
    lines = [{"planned": 2e9, "measured": size} for size in (2.4e9, 1.6e9, 2.001e9, "much")]
    said = ["20% more than planned", "20% less than planned", "as planned", ""]
    assert [page.beside(line) for line in lines] == said


def test_a_column_of_tests_is_there_only_where_something_was_tested(tmp_path: Path) -> None:
    untested = {
        **SCORES,
        "metrics": [{"name": "loss", "adapter": score(0.2), "base": score(0.9), "difference": score(-0.7)}],
    }
    for name, scores, there in (("tested", SCORES, True), ("untested", untested, False)):
        run = made.finished(tmp_path / name, made.metrics(20), started=started())
        scored(run, scores, [])
        text = page.write(run.path).read_text()
        table = text[text.index('<table class="scores">') :]
        table = table[: table.index("</table>")]
        assert (">p</th>" in table, "McNemar" in text) == (there, there)
        cells = {row.count("<th") + row.count("<td") for row in table.split("<tr>")[1:]}
        assert cells == {5 if there else 4}


def test_the_source_model_has_a_column_where_it_was_asked(tmp_path: Path) -> None:
    loss = {"name": "loss", "adapter": score(0.2), "base": score(0.9), "difference": score(-0.7), "source": score(0.4)}
    words = "the source model has 0.4000, so quantising costs +0.5000 [0.4000, 0.6000]"
    run = made.finished(tmp_path / "run", made.metrics(20), started=started())
    scored(run, {**SCORES, "metrics": [SCORES["metrics"][0], loss], "source": {"text": words}}, [])
    text = page.write(run.path).read_text()
    table = text[text.index('<table class="scores">') :]
    head, *rows = table[: table.index("</table>")].split("<tr>")[1:]
    assert ">source</th>" in head and {row.count("<th") + row.count("<td") for row in (head, *rows)} == {6}
    assert f"T{words[1:]}. The source is the model as it came." in text


def test_exports_stand_on_the_page_with_what_is_left_of_the_gain(tmp_path: Path) -> None:
    run = made.finished(tmp_path / "run", made.metrics(20), started=started())
    assert "Merged and exported" not in page.write(run.path).read_text()
    held = {"kept": 0.61, "interval": [0.5, 0.7], "loss": {"export": 1.09}, "advice": "61% of <b> is left"}
    for name, more in (
        ("gguf-q4_0", {"held_out": held}),
        ("merged", {"held_out": None, "adapter": {"sha256": "0" * 64, "step": 7}}),
        ("torn", {}),
    ):
        (run.path / name).mkdir()
        document = {"kind": f"a {name}", "path": name, **more}
        (run.path / name / "export.json").write_text(json.dumps(document) if name != "torn" else '{"kind": "a')
    text = page.write(run.path).read_text()
    rows = text[text.index("Merged and exported") :].split("<tr>")[2:4]
    assert "61%<small> [50%, 70%]</small>" in rows[0] and "1.09" in rows[0]
    assert "a merged, of an earlier adapter (step 7)" in rows[1] and "<small>" not in rows[1]
    assert "61% of &lt;b&gt; is left" in text and "a torn" not in text

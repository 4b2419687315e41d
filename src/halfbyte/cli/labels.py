"""`halfbyte predict`, the tables of `halfbyte eval`, and the server of a run that labels texts or gives vectors."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.markup import escape

from halfbyte.cli import progress, show
from halfbyte.cli.options import Force, Json, Run, Set, argument, flag, open_run, option
from halfbyte.cli.show import out, visible
from halfbyte.errors import RunError, typed
from halfbyte.system import files, libraries
from halfbyte.system.words import duration
from halfbyte.types import Document

if TYPE_CHECKING:
    from socket import socket

    from halfbyte.inference.target import Target
    from halfbyte.serving.settings import Settings

TASKS = ("classify", "regress", "tag", "embed")
SHOWN, SHOWN_ROWS = 30, 3  # labels, and rows, the worst first


def predict(
    run: Run,
    data: Path | None = argument(None, "[FILE]", "CSV, JSONL, JSON or Parquet."),
    text: list[str] = option([], "--text -t", "A text instead of a file; repeatable."),
    pair: list[str] = option([], "--text-pair", "The second text of each --text."),
    to: Path | None = option(None, "--out", "A .jsonl, .csv or .parquet file.", metavar="FILE"),
    calibrated: bool = flag("--calibrated", "Probabilities at the temperature that an evaluation has fitted."),
    set_: Set = [],  # noqa: B006
    force: Force = False,
    json_: Json = False,
) -> None:
    """Labels with probabilities, numbers, tags or vectors, of texts. Goes on where an earlier call was ended. Exit code
    1 if rows could not be read."""
    from halfbyte.inference import prediction_file, target

    if (data is None) == (not text) or (pair and len(pair) != len(text)):
        raise RunError("predict takes a file of rows, or --text.", fix="halfbyte predict RUN FILE.csv")
    if any(not one.strip() for one in (*text, *pair)):
        raise RunError("a --text or --text-pair is empty.")
    if text and to is not None:
        fix = "halfbyte predict RUN FILE.csv --out FILE; or --json, and > FILE"
        raise RunError("--out is for a file of rows: what is said of a --text is printed.", fix=fix)
    task = target.find(run, set_, TASKS).recipe.task
    for name, given, tasks in (("--text-pair", pair, ("classify", "regress")), ("--calibrated", calibrated, TASKS[:1])):
        if given and task not in tasks:
            raise RunError(f"{name} is for task {' and '.join(tasks)}, and {run} is of task {task}.")
    if data is not None:
        kind = data.suffix if data.suffix in prediction_file.SUFFIXES else prediction_file.SUFFIXES[0]
        prediction_file.check(data, to := to or data.with_name(f"{data.stem}.predictions{kind}"))
    with libraries.loading():
        from halfbyte.inference import labels
    heat = labels.temperature_of(run) if calibrated else 1.0
    ready = open_run(run, set_, silent=json_, force=force, tasks=TASKS)
    if data is None or to is None:
        texts = list(zip(text, pair, strict=True)) if pair else [(one,) for one in text]
        answers = labels.answers_of(ready, labels.objective_of(ready), texts, temperature=heat)
        if json_:
            show.document({"run": str(run), "texts": answers})
        for one, row in zip(text, answers if not json_ else (), strict=False):
            if "entities" in row:
                each = (f"{e['label']} {e['text']!r} ({e['score']:.1%})" for e in row["entities"])
                show.text(f"{', '.join(map(visible, each)) or 'nothing'}: {visible(one)}")
                continue
            best, every = row.get("prediction", row.get("vector")), row.get("probabilities", {})
            show.text(f"{best}{f' ({every[best]:.1%})' if isinstance(best, str) else ''}: {visible(one)}")
        return
    with progress.counting("rows", silent=json_) as tell, files.naming(to):
        done = labels.predict(ready, data, to, lambda rows: tell(rows, rows), temperature=heat)
    more = f", {done['resumed']:,} of them by an earlier call" if done["resumed"] else ""
    bad = f"; {done['bad']:,} could not be read (column error)" if done["bad"] else ""
    show.document(done) if json_ else show.text(f"{done['rows']:,} rows{more}{bad}: {done['out']}")
    if done["bad"] == done["rows"] and not json_:
        fix = "\n  fix: --set data.fields.text=NAME, and another --out"
        show.text(f"the first: {visible(done['first_error'])}{fix if ': missing;' in done['first_error'] else ''}")
    if done["bad"]:
        raise typer.Exit(1)


def table(scored: Document, folder: Path | None, run: Path) -> None:
    sides, names = scored["sides"], scored["labels"]
    one = sides.get("adapter") or sides["base"]
    lines = show.table("", *sides, right=[*sides])
    for name in one["scores"]:
        values = (side["scores"].get(name) for side in sides.values())
        lines.add_row(name, *(escape(show.estimate(v["value"], v["interval"])) if v else "" for v in values))
    out.print(lines)
    sure = "; [..]: 95% interval" if any(value["interval"] for value in one["scores"].values()) else ""
    show.text(f"{scored['rows']:,} rows in {duration(scored['seconds'])}{sure}")
    if (base := sides.get("base", {})).get("by_likelihood"):
        rest = f"; {base['not_asked']:,} rows were too long to be asked" * bool(base["not_asked"])
        show.text(f"base: the label that it finds the likeliest answer to a question for it{rest}")
    if names:
        _labels(one, names)
    if one.get("temperature"):
        other = f" of these rows; --calibrated divides scores by that of: halfbyte eval {typed(run)}"
        counts = ", which --calibrated divides scores by" if folder == run / "eval" else other
        show.text(f"temperature {one['temperature']:.3f}{counts}")
    elif "temperature" in one:
        from halfbyte.scoring.labels import LEAST_ROWS

        show.text(f"no temperature is fitted on {scored['rows']:,} rows: it takes {LEAST_ROWS}")
    for row in one.get("mistakes", ())[:SHOWN_ROWS]:
        show.text(f"  {row['expected']}, not {row['prediction']}: {visible(row['text'])}")
    for row in one.get("neighbours", ())[:SHOWN_ROWS]:
        show.text(f"  {visible(row['query'])}\n    nearest  {visible(row['nearest'][0]['text'])}")
        show.text(f"    place {row['place']}  {visible(row['expected'])}")


def _labels(one: Document, names: Sequence[str]) -> None:
    """Each label, the worst first, and what it is taken for."""
    numbers = ("rows", "precision", "recall", "F1", "AUROC")
    lines, rows = show.table("label", *numbers, "taken for", right=numbers), one.get("confusion") or [()] * len(names)
    every = zip(names, one["by_label"], rows, strict=False)
    for name, label, row in sorted(every, key=lambda each: float(each[1]["f1"]))[:SHOWN]:
        others = sorted(((n, other) for n, other in zip(row, names, strict=False) if other != name and n), reverse=True)
        rates = ("" if label.get(r) is None else f"{label[r]:.3f}" for r in ("precision", "recall", "f1", "auroc"))
        taken = ", ".join(f"{other} {n}" for n, other in others[:3])
        lines.add_row(escape(visible(name)), f"{label['rows']:,}", *rates, escape(visible(taken)))
    out.print(lines)


def check_served(one: "tuple[str, Target]", options: Document) -> None:
    """Raises RunError: options are given that a run that only reads does not have."""
    if unread := [name for name, given in options.items() if given]:
        what = f"{one[1].path} is of task {one[1].recipe.task}, and writes no texts: {', '.join(unread)}"
        raise RunError(f"{what} would change nothing.", fix=f"halfbyte serve {typed(one[1].path)}")


def serve(
    one: "tuple[str, Target]", where: "tuple[Settings, socket, str]", *, waiting: int, force: bool, quiet: bool
) -> None:
    """The server of one run, until a signal."""
    with progress.waiting("opening base and adapter", silent=quiet) as tell, libraries.loading():
        from halfbyte.inference import load
        from halfbyte.serving.http import app, pages
        from halfbyte.serving.reader import TextReader

        reader = TextReader(load.open_target(one[1], tell, force=force), one[0], waiting)
    ways = {"embed": "/v1/embeddings, /rerank", "classify": "/classify", "regress": "/rerank"}[one[1].recipe.task]
    lines = [f"serving {one[0]} at {where[2]}: {ways}", "  Ctrl-C ends it when what was asked is answered"]
    ready = partial(show.text, "\n".join(lines[: 1 if quiet else 2]))
    pages.run(app.build_reader(reader, where[0]), where[1], ready)

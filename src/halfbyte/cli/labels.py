"""`halfbyte predict`, and the tables of `halfbyte eval` of a run with a head."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from halfbyte.cli import progress, show
from halfbyte.cli.options import Force, Json, Run, Set, open_run
from halfbyte.cli.show import out, visible
from halfbyte.errors import RunError
from halfbyte.system import libraries
from halfbyte.system.words import duration
from halfbyte.types import Document

TASKS = ("classify", "regress")
SHOWN = 30  # labels, the worst first


def predict(
    run: Run,
    data: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="CSV, JSONL, JSON or Parquet.")] = None,
    text: Annotated[list[str], typer.Option("--text", "-t", help="A text instead of a file; repeatable.")] = [],  # noqa: B006
    to: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="A .jsonl, .csv or .parquet file.")] = None,
    set_: Set = [],  # noqa: B006
    force: Force = False,
    json_: Json = False,
) -> None:
    """Labels with probabilities, or numbers, of texts, by a run of task classify or regress. Goes on where an earlier
    call was ended. Exit code 1 if rows could not be read."""
    from halfbyte.inference import target

    if (data is None) == (not text):
        raise RunError("predict takes a file of rows, or --text.", fix="halfbyte predict RUN FILE.csv")
    target.find(run, set_, TASKS)
    with libraries.loading():
        from halfbyte.inference import labels
        from halfbyte.objectives.labels import Labels
        from halfbyte.recipe.adapter import folder_of
    if data is not None:
        kind = data.suffix if data.suffix in labels.SUFFIXES else labels.SUFFIXES[0]
        labels.check(data, to := to or data.with_name(f"{data.stem}.predictions{kind}"))
    ready = open_run(run, set_, silent=json_, force=force, tasks=TASKS)
    if data is None or to is None:
        answers = labels.predictions(ready, Labels.at(folder_of(run)), [(one,) for one in text])
        if json_:
            show.document({"run": str(run), "texts": answers})
        for one, row in zip(text, answers if not json_ else (), strict=False):
            best, every = row["prediction"], row.get("probabilities", {})
            show.text(f"{best}{f' ({every[best]:.1%})' if isinstance(best, str) else ''}: {visible(one)}")
        return
    with progress.counting("rows", silent=json_) as tell:
        done = labels.predict(ready, data, to, lambda rows: tell(rows, rows))
    more = f", {done['resumed']:,} of them by an earlier call" if done["resumed"] else ""
    bad = f"; {done['bad']:,} could not be read (column error)" if done["bad"] else ""
    show.document(done) if json_ else show.text(f"{done['rows']:,} rows{more}{bad}: {done['out']}")
    if done["bad"]:
        raise typer.Exit(1)


def table(scored: Document, folder: Path | None) -> None:
    sides, names = scored["sides"], scored["labels"]
    adapter = sides["adapter"]
    lines = show.table("", *sides, right=[*sides])
    for name in adapter["scores"]:
        values = (side["scores"][name] for side in sides.values())
        lines.add_row(name, *(escape("{:.4f} [{:.4f}, {:.4f}]".format(v["value"], *v["interval"])) for v in values))
    out.print(lines)
    show.text(f"{scored['rows']:,} rows in {duration(scored['seconds'])}; [..]: 95% interval")
    numbers = ("rows", "precision", "recall", "F1")
    lines, rows = (
        show.table("label", *numbers, "taken for", right=numbers),
        adapter.get("confusion") or [()] * len(names),
    )
    every = zip(names, adapter.get("by_label", ()), rows, strict=False)
    for name, label, row in sorted(every, key=lambda each: float(each[1]["f1"]))[:SHOWN]:
        others = sorted(((n, other) for n, other in zip(row, names, strict=False) if other != name and n), reverse=True)
        rates = (f"{label[rate]:.3f}" for rate in ("precision", "recall", "f1"))
        taken = ", ".join(f"{other} {n}" for n, other in others[:3])
        lines.add_row(escape(visible(name)), f"{label['rows']:,}", *rates, escape(visible(taken)))
    if names:
        out.print(lines)
    if folder is not None:
        show.text(f"scores and confusion matrix: {folder}")

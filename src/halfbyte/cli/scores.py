"""`halfbyte eval`: scores as a table, and samples of answers; and what each number format costs a base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from halfbyte.cli import labels, progress, show
from halfbyte.cli.options import Force, Json, Prove, Run, Set, flag, open_run, option
from halfbyte.cli.show import field, out, text, visible
from halfbyte.errors import RunError, typed
from halfbyte.system.words import duration

if TYPE_CHECKING:
    from halfbyte.inference.load import Opened
    from halfbyte.inference.quality import Report
    from halfbyte.scoring.sheet import EvalOptions, Score, Sheet, Value
    from halfbyte.types import Document


def evaluate(
    run: Run,
    base: bool = flag("--base", "Score the base alone too, on the same rows."),
    data: Path | None = option(None, "--data", "Rows to score; default: the recipe's data.eval."),
    corpus: Path | None = option(None, "--corpus", "Task embed: a file of more passages to look among."),
    metric: list[str] = option([], "--metric -m", "Instead of eval.metrics; repeatable.", metavar="NAME"),
    task: list[str] = option([], "--task", "A task of lm-evaluation-harness instead; repeatable.", metavar="NAME"),
    task_path: Path | None = option(None, "--task-path", "With --task: where own tasks are.", metavar="DIR"),
    limit: int | None = option(None, "--limit", "Only the first rows.", min=1),
    samples: int = option(3, "--samples", "How many outputs to show.", min=0),
    max_new_tokens: int | None = option(
        None, "--max-new-tokens", "The longest answer; default: eval.max_new_tokens.", min=1
    ),
    sure: bool = option(True, "--intervals/--no-intervals", "With intervals and tests, or scores alone."),
    to: Path | None = option(None, "--out", "Keep scores and answers there.", metavar="DIR"),
    set_: Set = [],  # noqa: B006
    force: Force = False,
    prove: Prove = False,
    json_: Json = False,
) -> None:
    """Loss, perplexity and what answers are worth, on held-out rows; with --base beside base and source model."""
    from halfbyte.inference import target
    from halfbyte.recipe.task import TASKS
    from halfbyte.runs.folder import check_writable
    from halfbyte.scoring import sheet

    overrides = [*set_, *([f"eval.max_new_tokens={max_new_tokens}"] if max_new_tokens is not None else [])]
    subject = target.find(run, overrides, TASKS if not (task or metric or max_new_tokens) else ("causal_lm",))
    if corpus is not None and subject.recipe.task != "embed":
        raise RunError(f"--corpus is of task embed, and {run} is of task {subject.recipe.task}.")
    folder = to or (sheet.folder_of(run, None if task else data) if subject.run is not None else None)
    if folder is not None:
        check_writable(folder, "name another one: --out DIR")
    if task:
        sheet.need_harness()
        ready = open_run(run, overrides, silent=json_, force=force, prove=prove)
        return _harness(ready, task, task_path, folder, limit=limit, with_base=base, json_=json_)
    target.held_out(subject.recipe, run, data)
    wanted = sheet.EvalOptions.of(subject.recipe.eval, metric, limit=limit, with_base=base, sure=sure)
    ready = open_run(run, overrides, silent=json_, force=force, prove=prove, tasks=TASKS)
    if subject.recipe.task != "causal_lm":
        return _score_task(ready, wanted, (data, corpus), folder, json_=json_)
    from halfbyte.inference import evaluate as scoring

    with progress.scoring(silent=json_) as tell:
        scored = scoring.evaluate(ready, wanted, data=data, progress=tell)
    try:  # what took its time is shown on a full disk, too, and kept where a pipe is closed
        show.document(scored.to_json() | {"folder": folder and str(folder)}) if json_ else table(scored, samples)
    finally:
        if folder is not None:
            _keep(scored, folder, run if subject.run is not None else None)
    if folder is not None and not json_:
        out.print(f"\nevery answer: {escape(str(folder / 'answers.jsonl'))}", style="dim", soft_wrap=True)
    return None


def _harness(
    ready: Opened, names: list[str], path: Path | None, folder: Path | None, *, limit: int | None, with_base: bool,
    json_: bool,
) -> None:  # fmt: skip
    from halfbyte.inference import harness
    from halfbyte.scoring import sheet

    with progress.scoring(silent=json_) as tell:
        results = harness.run(ready, names, path, limit=limit, with_base=with_base, progress=tell)
    try:
        show.document(results) if json_ else tasks(results)
    finally:
        sheet.write_harness(results, folder)


def _score_task(
    ready: Opened, wanted: EvalOptions, rows: tuple[Path | None, Path | None], folder: Path | None, *, json_: bool
) -> None:
    """The same of a run with a head, or with vectors. `rows`: those to score, and a corpus."""
    from halfbyte.inference import labels as scoring
    from halfbyte.report import page
    from halfbyte.scoring import sheet
    from halfbyte.system import files

    with progress.scoring(silent=json_) as tell:
        scored = scoring.score(ready, wanted, data=rows[0], corpus=rows[1], progress=tell)
    try:
        show.document(scored) if json_ else labels.table(scored, folder, ready.run)
    finally:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            files.write(folder / sheet.SCORES, files.as_json(scored))
            if folder == ready.run / "eval":
                page.renew(ready.run)
    if folder is not None and not json_:
        then = f"halfbyte predict {typed(ready.run)} ROWS.csv   or   halfbyte serve {typed(ready.run)}"
        show.text(f"scores   {folder}\n  next: {then}")


def _keep(scored: Sheet, folder: Path, run: Path | None) -> None:
    """Scores and answers on disk; the page of a run has those of its own rows."""
    from halfbyte.report import page

    scored.write(folder)
    if run is not None and folder == run / "eval":
        page.renew(run)


def tasks(results: dict[str, Document]) -> None:
    """What lm-evaluation-harness found, side by side, with its standard errors."""
    lines = Table(header_style="bold")
    for column in ("task", "metric", *results):
        lines.add_column(column, justify="right" if column in results else "left")
    for name, scores in next(iter(results.values())).items():
        for metric in (m for m, value in scores.items() if isinstance(value, float) and "_stderr," not in m):
            name_, _, of = metric.partition(",")
            each = [(side[name][metric], side[name].get(f"{name_}_stderr,{of}")) for side in results.values()]
            shown = [f"{v:.4f}" + (f" ± {e:.4f}" if isinstance(e, float) else "") for v, e in each]
            lines.add_row(escape(name), escape(metric), *shown)
    out.print(lines)


def table(scored: Sheet, samples: int) -> None:
    lines = Table(header_style="bold")
    lines.add_column("")
    columns = [*(["source"] if scored.source is not None else []), *scored.sides]
    for name in columns:
        lines.add_column(name, justify="right")
    both = len(scored.sides) > 1
    if both:
        lines.add_column("difference", justify="right")
        lines.add_column("p", justify="right")
    for score in scored.scores:
        sides = [_shown(score, getattr(score, name)) for name in columns]
        p = "" if score.p_value is None else f"{score.p_value:{'.3f' if score.p_value >= 0.001 else '.0e'}}"
        lines.add_row(score.name, *sides, *([_shown(score, score.difference, sign=True), p] if both else []))
    out.print(lines)
    from halfbyte.scoring.intervals import CONFIDENCE

    sure = f"; [..]: {CONFIDENCE:.0%} interval" if any(s.adapter and s.adapter.interval for s in scored.scores) else ""
    out.print(f"{scored.rows:,} rows in {duration(scored.seconds)}{sure}", style="dim")
    if scored.why or scored.beside_source is not None:
        show.paragraph(scored.beside_source.text if scored.beside_source is not None else scored.why)
    _samples(scored, samples)


def _samples(scored: Sheet, samples: int) -> None:
    for number, asked in enumerate(scored.questions[:samples]):
        out.print(f"\n[bold]{escape(visible(asked.where))}[/bold]")
        out.print(escape(visible(asked.prompt.strip())), style="dim")
        out.print(f"{'expected':>9}: {escape(visible(asked.expected))}")
        for name, side in scored.sides.items():
            answer = side.answers[number]
            marks = "  ".join(_mark(metric, value) for metric, value in answer.scores.items() if "." not in metric)
            text = (answer.choice or "") if answer.scores.keys() == {"choice"} else answer.text.strip()
            out.print(f"{name:>9}: {escape(visible(text))}  {marks}")


def _mark(metric: str, value: float | None) -> str:
    from halfbyte.recipe.evaluation import OF_PAIRS

    if value is None:
        return ""
    if value in (0.0, 1.0) and metric not in OF_PAIRS:
        return f"[green]{metric}[/green]" if value else f"[red]not {metric}[/red]"
    return f"[yellow]{metric} {value:.2f}[/yellow]"


def _shown(score: Score, value: Value | None, *, sign: bool = False) -> str:
    if value is None:
        return ""
    from halfbyte.recipe.evaluation import LOSSES, OF_PAIRS

    plain = score.name.endswith((*LOSSES, *OF_PAIRS))  # with the name of a source in front
    times, kind, unit = (1, ".4f", "") if plain else (100, ".1f", "%")
    limits = ""
    if value.interval is not None:
        limits = escape(" [{}, {}]".format(*(f"{times * limit:{kind}}" for limit in value.interval)))
    return f"{times * value.value:{'+' * sign}{kind}}{unit}{limits}"


def quality(report: Report) -> None:
    from halfbyte.inference.quality import kind_of, layer_of

    field("text", f"{report.text}: {report.rows:,} rows, {report.labelled_tokens:,} tokens that count")
    for note in report.notes:
        field("note", note)
    first = report.formats[0]
    columns = ("bits a parameter", "GB", "relative error", "SQNR dB", "loss", "more", "perplexity")
    table = show.table("format", *columns, right=columns)
    for row in report.formats:
        error = (f"{row.error.relative:.4f}", f"{row.error.sqnr_db:.1f}") if row.errors else ("-", "-")
        bits, size = ("-", "-") if not row.parameters else (f"{row.bits:.3f}", f"{row.nbytes / 1e9:.3f}")
        more = "" if row is first else f"{row.loss - first.loss:+.4f}"
        table.add_row(escape(visible(row.name)), bits, size, *error, f"{row.loss:.4f}", more, f"{row.perplexity:.3f}")
    out.print(table)
    _errors(report, "kind of module", kind_of)
    _errors(report, "layer", layer_of)
    if report.path is not None:
        text(f"kept     {report.path}")


def _errors(report: Report, what: str, key: Callable[[str], str | None]) -> None:
    rows = {row.name: row.by(key) for row in report.formats if row.errors}
    groups = next(iter(rows.values()), {})
    if not groups:
        return
    table = show.table(what, *rows, right=rows)
    for group in groups:
        table.add_row(escape(visible(group)), *(f"{each[group].relative:.4f}" for each in rows.values()))
    out.print("\nrelative error (Frobenius norm of what is lost, over the source's)")
    out.print(table)

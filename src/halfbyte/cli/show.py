"""How the command line looks: text, tables, JSON, questions, warnings, errors, what the log says and a command's last
words. What a command shows meanwhile is in `progress.py`."""

from __future__ import annotations

import io
import json
import logging
import sys
import textwrap
import time
from collections.abc import Callable, Container, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from halfbyte.errors import HalfbyteError, typed, without_secrets
from halfbyte.system.words import duration

if TYPE_CHECKING:
    from halfbyte.base.quantize import BuildResult
    from halfbyte.base.store.shelf import CacheEntry
    from halfbyte.doctor import Diagnosis
    from halfbyte.finetune import Outcome
    from halfbyte.types import Check, Document

LABEL_WIDTH = 10
# a pipe has no width; there tables are as wide as they need
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
err = Console(stderr=True, highlight=False, soft_wrap=True)
_as_json = False


def gb(count: float) -> str:
    """Bytes as GB (1e9) with two or three digits: `0.27 GB`."""
    return f"{count / 1e9:.2f} GB"


def date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def text(value: str) -> None:
    out.print(escaped(value))


def table(*columns: str, right: Container[str] = (), **looks: Any) -> Table:
    """A table without lines, with bold heads; numbers are in the columns that `right` names."""
    lines = Table(box=None, pad_edge=False, header_style="bold", **looks)
    for column in columns:
        lines.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return lines


def field(label: str, value: str, *, width: int = LABEL_WIDTH) -> None:
    """A label and its text; on a terminal a long line is wrapped and goes on under its beginning."""
    first, *rest = value.splitlines() or [""]
    for line in (f"{label:<{width}}{first}", *rest):
        paragraph(line, indent=width if width <= out.width // 2 else 2)


def paragraph(line: str, *, indent: int = 2) -> None:
    """A line; on a terminal a long one is wrapped between words."""
    if out.is_terminal:
        under = " " * indent
        line = textwrap.fill(line, out.width, subsequent_indent=under, break_long_words=False, break_on_hyphens=False)
    text(line)


def estimate(value: float, interval: Sequence[float | None] | None) -> str:
    """A value, and its interval where it has one."""
    limits = [f"{limit:.4f}" for limit in interval or () if limit is not None]
    return f"{value:.4f}" + (f" [{', '.join(limits)}]" if limits else "")


def warning(value: str) -> None:
    err.print(f"[yellow]warning:[/yellow] {escaped(value)}")


def aside(value: str) -> None:
    """What is being done now; not part of the output."""
    err.print(f"[dim]{escaped(value)}[/dim]")


class _LogHandler(logging.Handler):
    """Shows what halfbyte's rooms log: how a model is fetched or converted, and what is used instead of what."""

    def emit(self, record: logging.LogRecord) -> None:
        (warning if record.levelno >= logging.WARNING else aside)(record.getMessage())


def hear() -> None:
    """Show from now on what halfbyte's rooms log."""
    log = logging.getLogger("halfbyte")
    log.setLevel(logging.INFO)
    if not any(isinstance(handler, _LogHandler) for handler in log.handlers):
        log.addHandler(_LogHandler())


def document(value: object) -> None:
    ascii_only = "utf" not in (sys.stdout.encoding or "").lower()  # a pipe of another encoding gets escapes
    sys.stdout.write(json.dumps(value, indent=2, default=str, ensure_ascii=ascii_only) + "\n")


def as_json(asked: bool) -> bool:
    """Remember whether this command answers with one JSON document, for `failed`."""
    global _as_json
    _as_json = asked
    return asked


def failed(said: str, code: int, **more: str | None) -> None:
    """One message on stderr; where JSON was asked for, a document on stdout too."""
    sys.stderr.write(f"error: {visible(without_secrets(said))}\n")
    if _as_json:
        error(without_secrets(said), code, **{name: text and without_secrets(text) for name, text in more.items()})


def report_error(error: HalfbyteError) -> None:
    failed(str(error), error.exit_code, message=error.message, fix=error.fix, kind=type(error).__name__)


def error(said: str, code: int, **more: str | None) -> None:
    """An error as the JSON document of a command that was asked for one."""
    document({"error": {"message": said, "fix": None, "kind": "system", **more, "exit_code": code}})


_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
_CONTROLS |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def visible(value: str) -> str:
    """Text of rows and models for a terminal, which would obey its control characters: `ESC` as one sign."""
    return value.translate(_CONTROLS)


def escaped(value: str) -> str:
    """The same for rich, which then finds no markup in it."""
    return escape(visible(value))


def stream(piece: str) -> None:
    sys.stdout.write(visible(piece))
    sys.stdout.flush()


def questioner() -> Callable[[str], str]:
    """A function that asks for a line at a terminal; its default is shown in grey. Tab completes paths."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import PathCompleter
    from prompt_toolkit.formatted_text import FormattedText

    session: PromptSession[str] = PromptSession(
        FormattedText([("bold ansicyan", "  >"), ("", " ")]), completer=PathCompleter(expanduser=True)
    )
    return lambda default: session.prompt(placeholder=FormattedText([("ansibrightblack", default)])).strip()


def heading(who: str) -> None:
    """Whose answer follows, where there are two."""
    out.print(f"[bold]{escape(who)}>[/bold]")


def asker() -> Callable[[], str]:
    """A function that asks for a message; on a terminal with arrow keys, history, and several lines (Alt-Enter)."""
    if not (sys.stdin.isatty() and out.is_terminal):
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # what is no UTF-8 is told of line by line
        return lambda: out.input("you> ").strip()
    from prompt_toolkit import PromptSession
    from prompt_toolkit.formatted_text import FormattedText
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    @keys.add("c-j")  # sent by programs that type for a user
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(
        FormattedText([("bold ansicyan", "you>"), ("", " ")]),
        multiline=True,
        key_bindings=keys,
        prompt_continuation=lambda width, number, wrapped: " " * width,
    )
    return lambda: session.prompt().strip()


def report(outcome: Outcome) -> None:
    row = outcome.report
    loss = row["loss"]
    out.print()
    paragraph(
        f"{row['steps']} steps, {row['tokens']:,} tokens in {duration(row['train_seconds'])} "
        f"({row['tokens_per_second']:.0f} tokens/s)   loss {loss['first']:.4f} -> {loss['last']:.4f}"
        + (f"   eval loss {row['eval_loss']:.4f}" if row["eval_loss"] is not None else "")
    )
    measured, planned = row["measured"], row["planned"]
    if planned["peak_rss_bytes"] is not None:
        most = f"at most {gb(planned['peak_rss_bytes'])} planned"
        took = f"{duration(measured['seconds'])} from the plan on ({duration(planned['seconds'])} planned)"
        out.print(f"peak memory {gb(measured['peak_rss_bytes'])} ({most}); {took}")
    within(row.get("within") or {})
    verdict = row.get("verdict") or {}
    text(f"verdict  {verdict.get('text', 'not compared with the base')}")
    if reward := row.get("reward"):
        first, best = map(estimate, (reward["first"], reward["best"]), reward["intervals"])
        text(f"reward   {first} -> {best} on the held-out rows")
    if forgotten := row.get("base_text"):
        text(f"base text  {forgotten['text']}")
    if verdict.get("useless"):
        text(f"adapter  {outcome.run}/adapter\n  next: a lower train.learning_rate, in a new run")
        return
    held_out = row["data"]["eval"] is not None
    run = outcome.run
    embeds = (run / "sentence_transformer").is_dir()
    last, ask = f"chat {typed(run)}", f'generate {typed(run)} --prompt "..."'
    if embeds or (run / "adapter" / "head").is_dir():
        last, ask = f"predict {typed(run)} ROWS.csv", f'predict {typed(run)} --text "..."'
    first = f"halfbyte eval {typed(run)} --base" if held_out else f"halfbyte {ask}"
    text(f"page     {outcome.run}/report.html")
    text(f"adapter  {outcome.run}/adapter\n  next: {first}   or   halfbyte {last}")


def within(value: Document) -> None:
    """What a run in a given time has tried and what more time would bring."""
    for line in value.get("verdicts", ()):
        field("probes", line)
    if "more" in value:
        field("time", f"{duration(value['spent_s'])} of {duration(value['within_s'])}; {value['more']}")


def search(outcome: Outcome) -> None:
    """What `halfbyte tune` has come to."""
    within(outcome.report)
    text(f"page     {outcome.run}/report.html\n  next: halfbyte train {typed(outcome.run / outcome.report['repeat'])}")


def interruption(outcome: Outcome, command: str) -> None:
    name = outcome.stopped_by.name if outcome.stopped_by is not None else ""
    what = f"stopped by {name} after step {outcome.step}; nothing is lost."
    if not outcome.step:
        what = f"stopped by {name} before the first checkpoint."
    elif outcome.at_once:
        what = f"stopped at once; the last checkpoint is that of step {outcome.step}."
    warning(f"{what}\n  continue: halfbyte {command} {typed(outcome.run)} --resume")


def complete(run: Path, report: Document, more: str) -> None:
    """A run that has made all its steps; `more` says how it goes on."""
    loss = report["loss"]
    text(
        f"{run} is already complete: {report['steps']} steps, loss {loss['first']:.4f} -> {loss['last']:.4f}\n  {more}"
    )


def built_store(store: BuildResult) -> None:
    base, how = store.manifest, f"built in {store.seconds:.1f} s" if store.built else "was there already"
    size = f"{base.nbytes / 1e9:.3f} GB for {base.parameters:,} parameters"
    text(f"store    {store.path}\n         {base.source['id']} in {base.quant['type']}: {size}; {how}")


def stores(folder: Path, entries: list[CacheEntry]) -> None:
    if not entries:
        out.print(f"nothing in {folder}")
        return
    lines = table("store", "source", "GB", "state", "last used", right=("GB",))
    for entry in entries:
        source = entry.manifest.source if entry.manifest else {}
        revision = f"@{source['revision'][:8]}" if source.get("revision") else ""
        state = f"{entry.state}, in use" if entry.in_use else entry.state
        name, size = escape(f"{source.get('id', '-')}{revision}"), f"{entry.nbytes / 1e9:.2f}"
        lines.add_row(entry.key, name, size, state, date(entry.last_used))
    out.print(lines)
    out.print(f"{len(entries)} in {folder}, {gb(sum(entry.nbytes for entry in entries))}")


def checks(values: Iterable[Check]) -> None:
    """Lines of `ok` or `FAILED`: whether something holds, what it is, and what was seen of it."""
    for check in values:
        line = Text("ok      " if check.ok else "FAILED  ", "green" if check.ok else "bold red")
        out.print(line.append(f"{check.what}: {check.seen}", "default"))


def diagnosis(value: Diagnosis) -> None:
    machine, rates = value.machine, value.rates
    flags = " ".join(machine.isa) or "no flags"
    field("processor", f"{machine.cpu or 'unknown'}, {machine.cores} cores: {flags}")
    field("memory", f"{gb(machine.ram_available_bytes)} free of {gb(machine.ram_bytes)}")
    for card in machine.cards:
        field("card", f"{card.name}, {gb(card.free_bytes)} free of {gb(card.total_bytes)}")
    for note in machine.notes:
        field("note", note)
    row = value.platform
    field("platform", f"{row['platform']}: {row['runs']}")
    field("", f"executed: {row['executed']}; slow: {row['slow']} (docs/machines.md)")
    field("cache", f"{value.cache}, {gb(value.cache_free_bytes)} free")
    if value.cache_problem:
        warning(
            f"the cache cannot be written ({value.cache_problem}): nothing is converted, and bases are quantised anew "
            "for each command\n  fix: export HALFBYTE_CACHE=/path/with/space"
        )
    field("threads", value.threads)
    field("computes", f"in {value.compute_dtype} ({value.compute_dtype_reason})")
    eight = f" ({rates.integer_ops / 1e9:,.0f} in int8)" if rates.integer_ops else " (none in int8)"
    field(
        "rates",
        f"{rates.matmul_flops / 1e9:,.0f} GFLOP/s in matrix products{eight}, {rates.attention_flops / 1e9:,.0f} in "
        f"attention, {rates.dequant_elements / 1e9:.1f} G weights/s dequantised, memory "
        f"{rates.memory_bytes / 1e9:.1f} GB/s, disk {rates.disk_bytes / 1e9:.2f} GB/s ({rates.source})",
    )
    if value.topology:
        field("cores", value.topology)
    if value.scaling is not None:
        one, text_of = value.scaling.rows[0], "{}: {:.2f}, {:.2f}, {:.1f} us".format
        rows = ((r.threads, r.products / one.products, r.memory / one.memory, r.barrier_s) for r in value.scaling.rows)
        times = "; ".join(text_of(*row[:3], row[3] * 1e6) for row in rows)
        field("scaling", f"threads: products, memory, a region that does nothing; {times}")
    field("versions", ", ".join(f"{name} {version}" for name, version in value.versions.items()))
    for number, (lack, without) in enumerate(value.lacking.items()):
        field("" if number else "without", f"{lack}: {without}")
    for wanted, installed in value.outside_ranges.items():
        warning(f"{installed} is installed, and the tests cover {wanted}\n  fix: pip install '{wanted}'")
    if value.model is None:
        return
    text("")
    field("model", f"{value.model}, {value.layers} layers at their true width")
    checks(value.checks)

"""How the command line shows what each number format costs a base."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from halfbyte.cli.show import labelled, out, text, visible

if TYPE_CHECKING:
    from halfbyte.inference.quality import Report


def report(made: Report) -> None:
    """Loss by format, then what was lost by kind of module and by layer."""
    from halfbyte.inference.quality import kind_of, layer_of

    labelled("text", f"{made.text}: {made.rows:,} rows, {made.labelled_tokens:,} tokens that count")
    for note in made.notes:
        labelled("note", note)
    first = made.formats[0]
    table = _table("format", "bits a parameter", "GB", "relative error", "SQNR dB", "loss", "more", "perplexity")
    for row in made.formats:
        error = (f"{row.error.relative:.4f}", f"{row.error.sqnr_db:.1f}") if row.errors else ("-", "-")
        bits, size = ("-", "-") if not row.parameters else (f"{row.bits:.3f}", f"{row.nbytes / 1e9:.3f}")
        more = "" if row is first else f"{row.loss - first.loss:+.4f}"
        table.add_row(escape(visible(row.name)), bits, size, *error, f"{row.loss:.4f}", more, f"{row.perplexity:.3f}")
    out.print(table)
    _errors(made, "kind of module", kind_of)
    _errors(made, "layer", layer_of)
    if made.path is not None:
        text(f"kept     {made.path}")


def _errors(made: Report, what: str, key: Callable[[str], str | None]) -> None:
    rows = {row.name: row.by(key) for row in made.formats if row.errors}
    groups = next(iter(rows.values()), {})
    if not groups:
        return
    table = _table(what, *rows)
    for group in groups:
        table.add_row(escape(visible(group)), *(f"{each[group].relative:.4f}" for each in rows.values()))
    out.print("\nrelative error (Frobenius norm of what is lost, over the source's)")
    out.print(table)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table

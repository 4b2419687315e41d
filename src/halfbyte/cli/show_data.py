"""How `halfbyte data check` looks: the gates, a bar for each length, and rows with their labelled tokens in colour."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from halfbyte.cli import show

if TYPE_CHECKING:
    from halfbyte.training.preview import Checked, Shown

BAR = 40
STYLES = {"ok": "green", "warning": "yellow", "refused": "bold red"}


def checked(value: Checked) -> None:
    """Model, rows, gates, lengths, the run over these rows, and a few rows."""
    from halfbyte.training import prepare

    prepared = value.prepared
    show.labelled("model", prepared.checkpoint.id)
    show.labelled("data", prepare.data_note(prepared))
    for notice in prepare.notices(prepared):
        show.labelled("note", notice)
    show.text("")
    for finding in prepared.findings:
        line = Text(show.visible(finding.line))
        line.stylize(STYLES[finding.level], 0, len(finding.level))
        show.out.print(line)
    show.text("")
    most = max(part.rows for part in value.histogram)
    for part in value.histogram:
        bar = "█" * round(BAR * part.rows / most) or ("▏" if part.rows else "")
        show.out.print(Text(f"{part.least:>7,} to {part.most:>6,} tokens  {part.rows:>9,}  ").append(bar, "cyan"))
    show.text("")
    about, time = value.to_json()["run"], value.plan.time
    show.labelled(
        "run",
        f"{value.steps:,} steps of {about['rows_per_step']} rows, {value.tokens:,} tokens; "
        f"{about['micro_batches_per_step']:.1f} micro-batches a step, {about['rows_per_micro_batch']:.1f} rows in each "
        f"(at most {about['max_tokens_per_micro_batch']:,} tokens)",
    )
    show.labelled("time", f"about {show.duration(time.run_s)}{'' if time.measured else f' ({time.source})'}")
    for row in value.shown:
        show.text("")
        example(row)


def example(row: Shown) -> None:
    """One row: labelled and special tokens stand out; without colours, labels are put between ⟦ and ⟧."""
    colours = show.out.is_terminal and not show.out.no_color
    show.text(f"row {row.row} ({row.where}): {row.tokens:,} tokens, {row.labelled:,} labelled")
    text, inside = Text(), False
    for piece in row.pieces:
        if piece.labelled != inside and not colours:
            text.append("⟦" if piece.labelled else "⟧")
        inside = piece.labelled
        style = "bold green" if piece.labelled else "dim"
        text.append(show.visible(piece.text), f"{style} reverse" if piece.special else style)
    text.append("⟧" if inside and not colours else "")
    show.out.print(text)

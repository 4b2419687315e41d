"""How `halfbyte plan` looks: a bar for each line, the total against the machine, the choices and what would fit; and
`halfbyte data check`: the gates, a bar for each length, and rows with their labelled tokens in colour."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from halfbyte.cli import show
from halfbyte.system.words import duration

if TYPE_CHECKING:
    from halfbyte.distributed.scaling import ScalingEstimate
    from halfbyte.plan import Line, Plan
    from halfbyte.plan.alternatives import Method
    from halfbyte.plan.estimate import Estimate
    from halfbyte.plan.scaling import CoresForecast
    from halfbyte.system.device import Device
    from halfbyte.training.preview import DataCheck, Piece, Resolution, ShownRow

BAR = 30
LEVELS = {"ok": "green", "warning": "yellow", "refused": "bold red"}
ROWS_BAR = 40
STYLES = {"private": "cyan", "device": "cyan", "file": "blue", "disk": "dim"}


def estimate(value: Estimate) -> None:
    shape, plan = value.shape, value.plan
    show.text(f"{shape.name}: {shape.parameters / 1e9:.2f} B parameters, {shape.facts.layers} layers ({shape.origin})")
    show.field("machine", f"{machine(value.device)}, computing in {plan.compute_dtype}")
    percent = 100 * plan.trainable / max(1, plan.parameters)
    how = (
        f"r {value.recipe.lora.r}, {value.recipe.train.rows_per_step} rows a step, quant.type {value.recipe.quant.type}"
    )
    show.field("training", f"{plan.trainable:,} parameters ({percent:.2f}%), {how}")
    for note in value.notes:
        show.text(f"          {note}")
    show.text("")
    place = "a training step at its peak, on a card" if plan.host_lines else "a training step at its peak"
    show.out.print(table(place, plan.lines, plan.available_bytes, plan))
    if plan.host_lines:
        show.out.print(table("beside it, in RAM", plan.host_lines, plan.host_available_bytes))
    also = [("loading", plan.loading_bytes), ("an evaluation", plan.evaluating_bytes)]
    also += [("generating 1,024 tokens", plan.generating_bytes), ("building the base's store", plan.building_bytes)]
    show.field("also", ", ".join(f"{name} {show.gb(size)}" for name, size in also if size))
    show.field("disk", ", ".join(f"{line.name} {show.gb(line.bytes)} ({line.how})" for line in plan.disk))
    show.field("time", f"{times(plan)}{reading(plan)}")
    show.text("")
    for name, why in plan.reasons.items():
        show.field(name, f"{getattr(plan, name)}: {why}", width=len("max_tokens_per_micro_batch") + 1)
    verdict(plan)
    if value.methods:
        show.text("")
        show.out.print(ways(value.methods))


def scaling(value: ScalingEstimate) -> None:
    """A step on more machines: what each holds, what the sum of gradients takes, what it brings and where that ends."""
    asked, alone = value.asked, value.others[0].step_s
    link = f"{value.link.bytes_s * 8 / 1e9:g} Gb/s, {value.link.delay_s * 1e3:g} ms"
    memory = f"{show.gb(value.plan.private_bytes)} private, {show.gb(value.plan.file_bytes)} of pages of files"
    summed = f"{asked.reduce_s:.2f} s to sum {show.gb(value.wire_bytes)} of gradients over {link}"
    share = f"{asked.compute_s:.2f} s for the fullest share ({asked.balance:.2f} of the mean one)"
    show.text("")
    show.field("nodes", f"{asked.nodes}; each process holds {memory}")
    show.field("step", f"{share}, {summed}")
    show.field("speed-up", f"{asked.speed_up:.2f} times on {asked.nodes}, where one takes {alone:.2f} s a step")
    brought = ", ".join(f"{each.nodes}: {each.speed_up:.1f}" for each in value.others)
    show.field("", f"{brought}; beyond {value.last.nodes}, twice as many bring less than a tenth")


def cores(value: CoresForecast) -> None:
    """A step on other numbers of cores, what limits it, and one process a memory node beside one over all."""
    steps, last = ", ".join(f"{each.cores}: {each.speed_up:.1f}" for each in value.steps), value.steps[-1]
    beyond = f" (by formula beyond {value.measured})" if last.cores > value.measured else ""
    show.field("cores", f"times as fast as one: {steps}{beyond}; on {last.cores} limited by {last.limit}")
    if value.nodes is not None:
        count, one_s, each_s = value.nodes
        advice = f": torchrun --standalone --nproc-per-node {count} -m halfbyte train RECIPE" if each_s < one_s else ""
        each = f"{each_s:.2f} s with a process on each of {count} memory nodes"
        show.field("", f"a step takes {each}, {one_s:.2f} s with one over all{advice}")


def resolution(value: Resolution) -> None:
    table = show.table("field", "value", "from", "why")
    table.columns[0].no_wrap = True
    for field, given, origin in value.rows:
        shown = given if isinstance(given, str) else json.dumps(given, default=str)
        shown = shown if len(shown) <= 100 else shown[:97] + "..."
        style = {"default": "dim", "auto": "cyan"}.get(origin.kind, "")
        table.add_row(field, escape(shown), origin.kind, escape(origin.why), style=style)
    show.out.print(table)
    for label, note in value.notes:
        show.field(label, note)
    summary(value.plan)
    for warning in value.warnings:
        show.paragraph(f"warning: {warning}")


def summary(plan: Plan) -> None:
    for line in plan.lines:
        show.field(line.name, f"{line.bytes / 1e9:8.3f} GB  {line.how}", width=23)
    show.field("memory", plan.memory_line)
    show.field("time", plan.time.line)
    for name, why in plan.reasons.items():
        show.paragraph(f"{name} {getattr(plan, name)}: {why}")
    for warning in plan.warnings:
        show.paragraph(f"warning: {warning}")


def verdict(plan: Plan) -> None:
    for warning in plan.warnings:
        show.out.print(f"[yellow]{escape(warning)}[/yellow]")
    if plan.short_bytes:
        beside = sum(line.bytes for line in plan.host_lines)
        least = show.gb(plan.needed_bytes) + (f", and {show.gb(beside)} of RAM beside it" if beside else "")
        show.text(f"  the least that would hold it as it is: {least} free")
    for fix in plan.fixes:
        state = "fits" if not fix.short_bytes else f"still {show.gb(fix.short_bytes)} short"
        what = f"{fix.change}: {show.gb(fix.peak_bytes)}, {state}"
        show.text(f"  --set {fix.setting:<34} {what}; a step x{fix.slower:.2f}")
    if not plan.warnings:
        when = " (most of all while loading or in an evaluation)" if plan.peak_bytes > plan.step_bytes else ""
        show.out.print(f"[green]it fits[/green]: {escape(plan.memory_line)}{when}")
        if plan.generating_bytes > plan.available_bytes:
            show.paragraph(f"but not generating 1,024 tokens at once, which takes {show.gb(plan.generating_bytes)}")


def table(title: str, lines: tuple[Line, ...], available: int, plan: Plan | None = None) -> Table:
    """What must be in memory, with a bar for each line, against what is free; then pages of files, which may go.
    `plan`: says how much of the base's pages must be in memory at once, and what is read from disk."""
    busy_bytes, read_bytes = (plan.busy_file_bytes, plan.read_bytes) if plan else (0, 0)
    needed = sum(line.bytes for line in lines if line.where != "file") + busy_bytes
    most = needed - busy_bytes + sum(line.bytes for line in lines if line.where == "file")
    full_scale = max(needed, available, 1)
    rows = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, show_header=False)
    rows.add_column("name", no_wrap=True)
    rows.add_column("GB", justify="right", no_wrap=True)
    rows.add_column("bar", no_wrap=True)
    rows.add_column("how", overflow="fold", style="dim")

    def add(name: str, size: int, colour: str, how: str, style: str | None = None) -> None:
        rows.add_row(name, show.gb(size), bar(size, full_scale, colour), escape(how), style=style)

    for line in lines:
        if line.where != "file":
            add(line.name, line.bytes, STYLES[line.where], line.how)
    if busy_bytes:
        add("base in use", busy_bytes, STYLES["file"], "pages of the layers at work")
    for line in lines:
        rest = line.bytes - (busy_bytes if line.name == "base" else 0)
        if line.where == "file" and rest > 0:
            name = "base, the rest" if line.name == "base" else line.name
            add(name, rest, STYLES["file"], f"{line.how}; stays while there is room")
    add("at most", most, "red" if needed > available else "green", f"of {show.gb(available)} free", "bold")
    if read_bytes:
        rows.add_row("read from disk", show.gb(read_bytes), "", "of the base in a step, as it does not stay in memory")
    return rows


def bar(value: float, full_scale: float, style: str) -> str:
    """A bar in eighths of a character, so that small values differ."""
    full, rest = divmod(round(8 * BAR * value / full_scale), 8)
    blocks = "█" * full + ("▏▎▍▌▋▊▉"[rest - 1] if rest else "")
    return f"[{style}]{blocks or ('▏' if value else '')}[/{style}]"


def times(plan: Plan) -> str:
    time = plan.time
    step = f"{seconds(time.step_low_s)} to {seconds(time.step_high_s)} a step"
    return f"{step}; {time.line}" if time.steps > 1 else f"{step} ({time.source})"


def reading(plan: Plan) -> str:
    """How long a step takes to read the base from disk, where it does not stay in memory."""
    if not plan.read_bytes:
        return ""
    waits = plan.time.parts.get("waiting for disk", 0.0)
    meanwhile = "while it computes" if not waits else f"and it waits {seconds(waits)}"
    return f"; reading the base takes {seconds(plan.time.reading_s)} of it, {meanwhile}"


def seconds(value: float) -> str:
    return f"{value:.2g} s" if value < 10 else f"{value:.0f} s" if value < 120 else duration(value)


def ways(compared: tuple[Method, ...]) -> Table:
    rows = Table(header_style="bold", title="side by side, the same rows, no recomputation", title_justify="left")
    rows.add_column("")
    for name in ("memory", "trainable", "%", "time a step"):
        rows.add_column(name, justify="right")
    for method in compared:
        percent, time = f"{method.percent:.2f}", f"x{method.relative_time:.2f}"
        rows.add_row(method.name, show.gb(method.bytes), f"{method.trainable:,}", percent, time)
    return rows


def machine(device: Device) -> str:
    if device.cards:
        first, many = device.cards[0], f"{len(device.cards)} x " if len(device.cards) > 1 else ""
        free = f"{show.gb(device.ram_available_bytes)} RAM free"
        return f"{many}{first.name}, {show.gb(first.free_bytes)} free each; {free}"
    ram = f"{show.gb(device.ram_available_bytes)} of {show.gb(device.ram_bytes)} RAM free"
    return f"{device.cores} cores ({device.cpu or 'CPU'}), {ram}"


def data_check(value: DataCheck, within: Sequence[str] = ()) -> None:
    from halfbyte.training import prepare

    prepared = value.prepared
    show.field("model", prepared.checkpoint.id)
    show.field("data", prepare.data_note(prepared))
    for notice in prepare.notices(prepared):
        show.field("note", notice)
    show.text("")
    for finding in prepared.findings:
        line = Text(show.visible(finding.line))
        line.stylize(LEVELS[finding.level], 0, len(finding.level))
        show.out.print(line)
    show.text("")
    most = max(part.rows for part in value.histogram)
    for part in value.histogram:
        bar = "█" * round(ROWS_BAR * part.rows / most) or ("▏" if part.rows else "")
        show.out.print(Text(f"{part.least:>7,} to {part.most:>6,} tokens  {part.rows:>9,}  ").append(bar, "cyan"))
    show.text("")
    about, time = value.to_json()["run"], value.plan.time
    show.field(
        "run",
        f"{value.steps:,} steps of {about['rows_per_step']} rows, {value.tokens:,} tokens; "
        f"{about['micro_batches_per_step']:.1f} micro-batches a step, {about['rows_per_micro_batch']:.1f} rows in each "
        f"(at most {about['max_tokens_per_micro_batch']:,} tokens)",
    )
    show.field("", value.sharing["shared"])
    show.field("time", time.line)
    for fits in within:
        show.field("within", fits)
    for row in value.shown:
        show.text("")
        example(row)


def example(row: ShownRow) -> None:
    """One row: labelled and special tokens stand out; without colours, labels are put between ⟦ and ⟧."""
    colours = show.out.is_terminal and not show.out.no_color
    show.text(f"row {row.row} ({row.where}): {row.tokens:,} tokens, {row.labelled:,} labelled")
    if row.rejected:
        both = Table("chosen", "rejected", expand=True, header_style="bold")
        both.add_row(_marked(row.pieces, colours), _marked(row.rejected, colours))
        show.out.print(both)
    else:
        show.out.print(_marked(row.pieces, colours))


def _marked(pieces: Sequence[Piece], colours: bool) -> Text:
    text = Text()
    for (labelled, weight), group in groupby(pieces, key=lambda piece: (piece.labelled, piece.weight)):
        style, marks = "bold green" if labelled else "dim", labelled and not colours
        text.append("⟦" if marks else "")
        for piece in group:
            text.append(show.visible(piece.text), f"{style} reverse" if piece.special else style)
        text.append("⟧" if marks else "")
        text.append("" if weight == 1 else f"×{weight:g}", "yellow")
    return text

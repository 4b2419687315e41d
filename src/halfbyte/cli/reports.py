"""`halfbyte report`, `compare` and `runs`, and serving a run's page while it trains."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from halfbyte.cli import show
from halfbyte.cli.options import Json, argument

if TYPE_CHECKING:
    from halfbyte.report.compare import RunComparison
    from halfbyte.runs.listing import RunSummary

STYLES = {"running": "cyan", "finished": "green", "stopped": "yellow"}
STYLES |= dict.fromkeys(("crashed", "worse", "diverged"), "red")
TITLE_END = " · halfbyte</title>".encode()
Page = Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE.html", help="Where to write the page.")]


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, finished or not.")], out: Page = None
) -> None:
    """Make the page of a run anew: report.html in its folder, one file that opens without network."""
    from halfbyte.report.current import is_current
    from halfbyte.runs.folder import RunFolder

    folder = RunFolder.open(run, need_adapter=False)
    if out is not None or not is_current(folder):
        _check_page(out, folder.page)
        from halfbyte.report import page

        page.write(run, out)
    written = out or folder.page
    show.text(f"{written}  ({written.stat().st_size / 1e3:.0f} kB)")


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Two run folders or more.")],
    out: Page = None, json_: Json = False,
) -> None:  # fmt: skip
    """Runs side by side: figures, scores with intervals, what differs in their recipes; and a page of their curves."""
    from halfbyte.report import compare as comparing

    usual = runs[0].resolve().parent / "compare.html"
    _check_page(out, usual)
    value = comparing.compare(runs)
    written = comparing.write(value, out or usual)
    if json_:
        show.document({**value.to_json(), "page": str(written)})
    else:
        _side_by_side(value)
        show.text(f"\ncurves   {written}")


def _check_page(named: Path | None, usual: Path) -> None:
    """Raise a RunError for what is no place for a page: nothing but a page is replaced. `usual`: where it is written if
    nobody names a place."""
    from halfbyte.errors import RunError, typed
    from halfbyte.runs.folder import check_writable

    page, another = named or usual, "name another file: --out FILE.html"
    if page.is_dir():
        raise RunError(f"{page} is a folder, and a page is a file.", fix=another)
    if page.suffix != ".html":
        raise RunError(f"{page} does not end in .html, and a page does.", fix=another)
    if named is not None and named.is_file() and TITLE_END not in named.read_bytes():
        raise RunError(f"{page} is not a page of halfbyte's, and nothing else is replaced.", fix=another)
    if not page.parent.exists():
        raise RunError(f"there is no folder {page.parent} for the page.", fix=f"mkdir -p {typed(page.parent)}")
    check_writable(page.parent, another)


def runs(folder: Path = argument(Path("runs"), "[FOLDER]", "Where runs are."), json_: Json = False) -> None:
    """What is in runs/, a line each, the newest first."""
    from halfbyte.errors import RunError
    from halfbyte.runs import listing

    if not folder.is_dir():
        raise RunError(
            f"there is no folder {folder}.", fix="halfbyte runs FOLDER, with the folder that holds your runs"
        )
    entries = listing.runs_in(folder)
    show.document([entry.to_json() for entry in entries]) if json_ else _list(folder, entries)


@contextmanager
def live(run: Path, asked: bool) -> Iterator[None]:
    """While the block runs, serve the page of a run on 127.0.0.1, if that is asked for, and say where."""
    if not asked:
        yield
        return
    from halfbyte.report import live as serving

    with serving.serve(run) as address:
        show.aside(f"live     {address}")
        yield


def _list(folder: Path, entries: "list[RunSummary]") -> None:
    if not entries:
        show.text(f"no runs in {folder}")
        return
    columns = ("run", "state", "step", "loss", "held out", "model", "last written")
    table = show.table(*columns, right=("step", "loss", "held out"))
    for entry in entries:
        state = entry.state
        step = f"{state.step:,}" + (f"/{state.steps:,}" if state.steps else "")
        losses = ("" if value is None else f"{value:.4f}" for value in (entry.loss, entry.eval_loss))
        what = f"[{STYLES.get(state.name, 'dim')}]{state.short}[/]"
        run, model = show.escaped(str(entry.run)), show.escaped(entry.model)
        table.add_row(run, what, step, *losses, model, show.date(entry.changed))
    show.out.print(table)


def _side_by_side(value: "RunComparison") -> None:
    for title, rows in (("figures", value.figures), ("scores", value.scores), ("recipe, what differs", value.recipe)):
        if rows:
            names = tuple(map(show.escaped, value.names))
            table = show.table("", *names, right=names, title=title, title_justify="left")
            table.columns[0].overflow = "ellipsis"
            for name, cells in rows:
                table.add_row(escape(name), *map(show.escaped, cells))
            show.out.print(table)
            show.text("")
    for note in value.notes:
        show.warning(note)

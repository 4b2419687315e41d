"""`halfbyte store`: what is in the cache, whether it is whole, and what may go. Heavy imports are inside commands."""

import typer

from halfbyte.cli import progress, show
from halfbyte.cli.options import Json, argument, flag, option

stores = typer.Typer(help="The quantised bases in halfbyte's cache, and what else lies there.", no_args_is_help=True)


@stores.command(name="list")
def list_stores(json_: Json = False) -> None:
    """What is in the cache: source, size, state and last use of every store; conversions, packaged models, tokens."""
    from halfbyte.base.store import shelf

    entries = [*shelf.listing(), *shelf.listing_beside()]
    if json_:
        show.document([entry.to_json() for entry in entries])
    else:
        show.stores(shelf.folder().parent, entries)


@stores.command()
def verify(
    names: list[str] | None = argument(None, "[STORE]...", "Keys, sources or folders; all if none."),
    json_: Json = False,
) -> None:
    """Hash every byte of stores and compare with what was built. Exit code 1 if anything differs."""
    from halfbyte.base.store import shelf

    with progress.counting("stores", silent=json_) as count:
        wrong = shelf.verify(names or [], count)
    if json_:
        show.document({name: {"whole": not problems, "problems": problems} for name, problems in wrong.items()})
    else:
        show.text("\n".join(f"{name}: {'; '.join(p) or 'whole'}" for name, p in wrong.items()) or "there are no stores")
    if any(wrong.values()):
        raise typer.Exit(1)


@stores.command()
def gc(
    unused_days: float | None = option(
        None, "--unused-days", "Also whole stores and tokens that nobody has opened for so many days.", min=0
    ),
    everything: bool = flag(
        "--all",
        "Everything that no process uses: stores, conversions, packaged models, tokens. All of it can be made or "
        "fetched again, a packaged model by pip.",
    ),
    dry_run: bool = flag("--dry-run", "Only say what would go."),
    json_: Json = False,
) -> None:
    """Remove interrupted builds, conversions and downloads, damaged stores and old formats."""
    from halfbyte.base.store import shelf

    removed, in_use = shelf.collect(unused_days=unused_days, everything=everything, dry_run=dry_run)
    removed += shelf.collect_beside(unused_days=unused_days, everything=everything, dry_run=dry_run)
    if json_:
        names = {"removed": removed, "kept": in_use}
        show.document({"dry_run": dry_run, **{k: [entry.to_json() for entry in v] for k, v in names.items()}})
        return
    verb = "would be removed" if dry_run else "removed"
    show.text(f"{verb}: {len(removed)}, {show.gb(sum(entry.nbytes for entry in removed))}")
    for entry in removed:
        show.text(f"  {entry.key if '/' in entry.key else entry.path.name} ({entry.state})")
    for entry in in_use:
        show.text(f"  kept, in use: {entry.path.name}")

"""Whether a run's page is what would be made of its folder now, so that nothing is made. No library is imported."""

from pathlib import Path

from halfbyte.runs.folder import RunFolder

MAKERS = Path(__file__).parents[1]


def is_current(run: RunFolder) -> bool:
    """Whether the run is finished, and its page newer than what it is made of and the code that makes it."""
    if not run.page.is_file() or not run.report.is_file() or run.writer() is not None:
        return False
    made_of = {*run.path.iterdir(), *run.path.glob("*/*")} - {run.page, run.path / "lock"}
    newest = max(path.stat().st_mtime_ns for path in (*made_of, *MAKERS.glob("*/*.py"), *MAKERS.glob("**/web/*")))
    return run.page.stat().st_mtime_ns > newest

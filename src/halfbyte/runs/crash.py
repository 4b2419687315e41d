"""`crash.txt`: what an unexpected error leaves for whoever has to mend it. On the screen it is one line.

It holds no environment and no token: versions, machine, plan, recipe and traceback.
"""

import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from halfbyte.errors import HalfbyteError, TrainError, Unforeseen, first_line, typed, without_secrets
from halfbyte.runs.folder import RunFolder
from halfbyte.system import accelerator, files
from halfbyte.system.libraries import versions
from halfbyte.types import Document

NAME = "crash.txt"


def write(folder: Path, error: BaseException, parts: Document) -> Path | None:
    """Write `crash.txt` into `folder`; returns its path, or None where it cannot be written either. `parts`: title ->
    text, put between the versions and the traceback."""
    about = {
        "when": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "command": " ".join(sys.argv),
        "versions": "\n".join(f"{name} {value}" for name, value in versions().items()),
        **parts,
        "traceback": "".join(traceback.format_exception(error)),
    }
    text = without_secrets("\n\n".join(f"== {title}\n{str(part).rstrip()}" for title, part in about.items()))
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        files.write(folder / NAME, text.encode(errors="replace") + b"\n")
        return folder / NAME
    return None


@contextmanager
def reporting(run: RunFolder, machine: Document) -> Iterator[None]:
    """Turn an error that is not ours into a TrainError that names `crash.txt` and the command that goes on."""
    (run.path / NAME).unlink(missing_ok=True)  # of an earlier process of this run
    try:
        yield
    except HalfbyteError:
        raise
    except Exception as error:
        read = {path.name: path.read_text() for path in (run.recipe, run.plan) if path.is_file()}
        page = write(run.path, error, {"machine": files.as_json(machine).decode(), **read, "run": run.progress()})
        short = accelerator.out_of_memory(error)
        what = "memory ran out" if short else "the run ended at something that was not foreseen"
        again = f"`halfbyte plan {typed(run.recipe)}` lists what fits" if short else f"report it with {NAME}"
        raise TrainError(
            f"{what}: {type(error).__name__}: {first_line(error)}" + (f" (all of it: {page})" if page else ""),
            fix=f"if it ends there again, {again}. Go on: halfbyte train {typed(run.path)} --resume",
        ) from error


def unforeseen(error: Exception) -> Unforeseen:
    """The error to show for an unexpected one in a command without a run; its `crash.txt` is in halfbyte's cache."""
    page = write(files.cache_dir(), error, {})
    return Unforeseen(
        f"something that was not foreseen: {type(error).__name__}: {first_line(error)}",
        fix=f"report it with {page}" if page else None,
    )

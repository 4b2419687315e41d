"""Modules of ours in processes of their own: run, their refusals raised here as the same errors, ended with this one.

Why: what a child has opened is gone when it ends, and a library that ends its process takes no more with it. A child
that outlives a killed parent would keep its memory for nobody. (On Windows it does: a parent's number stays there.)
Cost: a start of Python; a look at the parent's number twice a second.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from halfbyte import errors
from halfbyte.errors import ExportError, HalfbyteError

_REFUSED, LOOK_S = "REFUSED ", 0.5


def run_child(arguments: Sequence[str], doing: str) -> None:
    """Run `python -m ARGUMENTS`. Raises what it refuses, as the same error; ExportError where it failed, with `doing`,
    what it did."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", *arguments], capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode == 0:
        return
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    last = lines[-1] if lines else f"it ended by signal {-done.returncode}"
    if last.startswith(_REFUSED):
        kind, message, fix = json.loads(last.removeprefix(_REFUSED))
        raise getattr(errors, kind)(message, fix=fix)
    why = last if done.returncode > 0 else f"ended by signal {-done.returncode}; {last}"
    raise ExportError(f"{doing} failed: {why[:400]}")


@contextmanager
def child() -> Iterator[None]:
    """Around what a child does: its refusals are told to the parent, and it ends when the parent does."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        yield
    except HalfbyteError as error:
        sys.exit(_REFUSED + json.dumps([type(error).__name__, error.message, error.fix]))


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    os._exit(1)

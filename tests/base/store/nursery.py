"""Processes that build and open stores and can be killed: forked from one that has imported everything, so that each is
at work at once and a random moment falls into the work, not into imports.

Use: `nursery.context().Process(target=nursery.build, args=(...))`.
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

# imported once, before children are forked
import bitsandbytes.functional  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

from halfbyte.base.store import supply
from halfbyte.quant.kernels import nf4_cpu_kernel  # noqa: F401
from tests.base.store.helpers import opened, wanted


def context() -> ForkServerContext:
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload([__name__])
    return found


def build(folder: Path, cache: Path) -> None:
    """`halfbyte quantize`, without its command line."""
    os.environ["HALFBYTE_CACHE"] = str(cache)
    supply.ensure(wanted(folder))


def open_first(folder: Path, cache: Path) -> None:
    """What train, eval and chat do first: build the store if there is none, and open it."""
    os.environ["HALFBYTE_CACHE"] = str(cache)
    assert opened(folder, compute_dtype="bf16").origin.startswith("store ")


def report(folder: Path, cache: Path, name: str, events: Any, go: Any) -> None:
    """Build or wait, telling `events` what happens; a build goes on when `go` is set."""
    os.environ["HALFBYTE_CACHE"] = str(cache)

    def progress(_: object) -> None:
        if not go.is_set():
            events.put((name, "building"))
            assert go.wait(60)

    tell = supply.Tell(progress, lambda _, text: events.put((name, text)), lambda: events.put((name, "built")))
    events.put((name, str(supply.ensure(wanted(folder), tell=tell))))


def running(target: Any, *args: Any) -> ForkServerProcess:
    """A started process."""
    process = context().Process(target=target, args=args)
    process.start()
    return process

"""Build a store: read, cast, quantise and write in parallel, in bounded memory, going on where an earlier try ended.

One thread a file, several files at once; a tensor goes through in chunks, so that memory does not grow with the model,
not even with its embedding. Reading, hashing, quantising and writing all run without Python's lock.
A finished file is durable and noted in a journal before it counts; the folder gets its manifest last, then its name.
"""

import json
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path

from halfbyte.base.store import manifest, shelf
from halfbyte.base.store.encode import TensorReader, slots
from halfbyte.base.store.layout import FilePlan, StoreLayout
from halfbyte.base.store.reading import Source
from halfbyte.base.store.writer import SafetensorsWriter
from halfbyte.errors import HalfbyteError, StoreError, typed
from halfbyte.models.sources.checkpoint import beside_bytes, beside_weights
from halfbyte.models.sources.safetensors import INDEX
from halfbyte.plan import store_build
from halfbyte.quant import loader
from halfbyte.recipe.schema import Quant
from halfbyte.system import files
from halfbyte.system.words import size
from halfbyte.types import Document

JOURNAL = "journal.jsonl"
POLL_SECONDS = 0.1
SPARE_BYTES = 1 << 20


@dataclass(frozen=True)
class Progress:
    """How far a build is: bytes of the source that are done, of all; `bytes_per_second` counts this try alone."""

    done_bytes: int
    total_bytes: int
    bytes_per_second: float
    seconds: float

    @property
    def eta_seconds(self) -> float | None:
        return (self.total_bytes - self.done_bytes) / self.bytes_per_second if self.bytes_per_second > 0 else None


@dataclass(frozen=True)
class BuildJob:
    spec: shelf.StoreSpec
    layout: StoreLayout
    key: str


def build(job: BuildJob, source: Source, target: Path, tell: Callable[[Progress], None] | None = None) -> None:
    """Make the folder `target`, which must not be there. Call it under the lock of `shelf.building`. Raises StoreError:
    no space, a source that changes or ends too early, a folder that cannot be written. BaseModelError: a weight that is
    not finite."""
    partial = target.with_name(target.name + shelf.PARTIAL)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        journal = _Journal(partial, job)
        _preflight(job, partial, journal)
        started = time.monotonic()
        _write_files(job, source, journal, tell)
        _finish(job, journal, time.monotonic() - started)
        files.put(partial, target)
    except OSError as error:
        where = error.filename or partial
        raise shelf.NotWritable(
            f"the store of {job.spec.checkpoint.id} cannot be written: {where}: {error.strerror or error}. "
            f"{size(files.free_bytes(partial))} are free there.",
            fix=_more_room(partial),
        ) from error


def _more_room(partial: Path) -> str:
    remove = "halfbyte store gc" if partial.parent == shelf.folder() else f"rm -r {typed(partial)}"
    return (
        "free some space, or name another folder (export HALFBYTE_CACHE=DIR, or `halfbyte quantize MODEL --out DIR`); "
        f"what is built already is kept and used again, and `{remove}` removes it"
    )


class _Journal:
    """The files that are finished, one JSON line each, written when the file is durable."""

    def __init__(self, folder: Path, job: BuildJob) -> None:
        self.folder, self.path = folder, folder / JOURNAL
        self.lock = threading.Lock()
        self.files: dict[str, manifest.Entry] = {}
        self.hashes: dict[str, dict[str, str]] = {}
        self.key = job.key
        known = {plan.name for plan in job.layout.files}
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.is_file() else ""
        for line in text.splitlines():
            try:
                value = json.loads(line)
                key, tensors = value["key"], dict(value["tensors"])
                entry = manifest.Entry(**value["entry"])
            except (ValueError, TypeError, KeyError):
                continue  # cut while it was written: that file is built again
            # Hashed again: what an interrupted process left behind is not believed.
            if entry.name in known and key == self.key and not manifest.problem(folder / entry.name, entry, full=True):
                self.files[entry.name], self.hashes[entry.name] = entry, tensors
        for path in folder.iterdir():
            if path.name not in self.files and path != self.path:
                path.unlink()

    def add(self, entry: manifest.Entry, tensors: dict[str, str]) -> None:
        line = json.dumps({"key": self.key, "entry": asdict(entry), "tensors": tensors})
        with self.lock:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n" + line + "\n")  # a cut line before this one ends here
                file.flush()
                os.fsync(file.fileno())
            self.files[entry.name], self.hashes[entry.name] = entry, tensors


def _preflight(job: BuildJob, partial: Path, journal: _Journal) -> None:
    need = beside_bytes(job.spec.checkpoint.path) + SPARE_BYTES
    for plan in job.layout.files:
        if plan.name not in journal.files:
            need += SafetensorsWriter(partial / plan.name, slots(plan.tensors, job.spec.quant)).max_bytes
    if (free := files.free_bytes(partial)) < need:
        raise shelf.NotWritable(
            f"no space left for the store of {job.spec.checkpoint.id}: it needs {size(need)} in "
            f"{partial.parent}, and {size(free)} are free",
            fix=_more_room(partial),
        )


def _write_files(job: BuildJob, source: Source, journal: _Journal, tell: Callable[[Progress], None] | None) -> None:
    layout = job.layout
    todo = [plan for plan in layout.files if plan.name not in journal.files]
    count = _Counter(layout.source_bytes - sum(plan.source_bytes for plan in todo), layout.source_bytes)
    stop = threading.Event()
    threads: set[threading.Thread] = set()

    def on_read(nbytes: int) -> None:
        count.add(nbytes)
        if stop.is_set():
            raise _Stopped("the build was stopped")

    def one(plan: FilePlan) -> None:
        threads.add(threading.current_thread())
        if not stop.is_set():
            _build_file(plan, job.spec.quant, source, journal, on_read)

    pool = ThreadPoolExecutor(job.spec.cores + store_build.EXTRA_THREADS, thread_name_prefix="store")
    pending: set[Future[None]] = set()
    try:
        with source:
            try:
                pending = {pool.submit(one, plan) for plan in todo}
                while pending:
                    done, pending = wait(pending, timeout=POLL_SECONDS, return_when=FIRST_EXCEPTION)
                    for future in done:
                        future.result()
                    if tell is not None:
                        tell(count.progress())
            finally:  # also at Ctrl-C: no thread may read on when the files are closed
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                for thread in tuple(threads):  # one that Ctrl-C kept the pool from noting as its own
                    thread.join()
    except MemoryError as error:
        raise StoreError(f"there is not enough memory to build the store of {job.spec.checkpoint.id}.") from error
    if changed := source.changed():
        for plan in todo:
            (journal.folder / plan.name).unlink(missing_ok=True)
        raise StoreError(
            f"{changed[0]} was changed while it was read, so the store would be a mixture of two models.",
            fix="run the same command again when the file is complete",
        )


class _Stopped(HalfbyteError):
    """Another thread has failed, or the process was interrupted."""


class _Counter:
    def __init__(self, done: int, total: int) -> None:
        self.lock, self.started = threading.Lock(), time.monotonic()
        self.before = self.done = done
        self.total = total

    def add(self, nbytes: int) -> None:
        with self.lock:
            self.done += nbytes

    def progress(self) -> Progress:
        seconds = time.monotonic() - self.started
        rate = (self.done - self.before) / seconds if seconds > 0 else 0.0
        return Progress(self.done, self.total, rate, seconds)


def _build_file(plan: FilePlan, quant: Quant, source: Source, journal: _Journal, read: Callable[[int], None]) -> None:
    """One file from its tensors, on one thread."""
    hashes: dict[str, str] = {}
    reader, late = TensorReader(source, quant, on_read=read, hashes=hashes), dict[str, bytes]()
    with SafetensorsWriter(journal.folder / plan.name, slots(plan.tensors, quant)) as out:
        for tensor in plan.tensors:
            late |= reader.write(tensor, out)
        entry = out.finish(late)
    journal.add(entry, hashes)


def _finish(job: BuildJob, journal: _Journal, seconds: float) -> None:
    """Everything but the weights, and the manifest last."""
    folder, origin = journal.folder, job.spec.checkpoint
    entries = dict(journal.files)
    for path in beside_weights(origin.path):
        files.write(folder / path.name, path.read_bytes())
        entries[path.name] = manifest.entry_of(folder / path.name)
    for name, content in (("config.json", _config(job)), (INDEX, _index(job, entries))):
        files.write(folder / name, json.dumps(content, indent=2).encode() + b"\n")
        entries[name] = manifest.entry_of(folder / name)
    journal.path.unlink()
    manifest.write(
        folder,
        manifest.Manifest(
            key=job.key,
            source={"id": origin.id, "kind": origin.kind, "revision": origin.revision, "path": str(origin.path)},
            content_sha256=manifest.tree_hash((t, h) for f in journal.hashes.values() for t, h in f.items()),
            quant=shelf.settings(job.spec.quant, job.spec.dtype_name),
            parameters=job.layout.parameters,
            seconds=round(seconds, 3),
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            files=tuple(entries[name] for name in sorted(entries)),
        ),
    )


def _config(job: BuildJob) -> Document:
    """The source's config.json with what makes it a pre-quantised bitsandbytes checkpoint."""
    spec = job.spec
    values: Document = json.loads((spec.checkpoint.path / "config.json").read_text(encoding="utf-8"))
    values.pop("torch_dtype", None)
    values["dtype"] = spec.dtype_name
    settings = loader.stored_config(spec.quant, spec.dtype, spec.head_names, marked=job.layout.marked)
    return {**values, "quantization_config": settings} if settings else values


def _index(job: BuildJob, entries: dict[str, manifest.Entry]) -> Document:
    weight_map = {slot.name: plan.name for plan in job.layout.files for slot in slots(plan.tensors, job.spec.quant)}
    total = sum(entries[plan.name].nbytes for plan in job.layout.files)
    return {"metadata": {"total_size": total}, "weight_map": weight_map}

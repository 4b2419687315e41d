"""What the benchmarks of bases on disk measure with: this process's memory, the disk, the rate of matrix products."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from halfbyte.system import pages, usage


@dataclass
class Memory:
    """The largest resident set while it was watched, split at that moment, and the largest of each part."""

    peak: usage.Usage = field(default_factory=lambda: usage.Usage(0, 0))
    anonymous: int = 0
    file: int = 0
    high_water: int = 0

    def to_json(self) -> dict[str, float]:
        return {
            "peak_gb": max(self.peak.total, self.high_water) / 1e9,
            "sampled_gb": self.peak.total / 1e9,
            "at_peak_private_gb": self.peak.private / 1e9,
            "at_peak_file_gb": self.peak.file / 1e9,
            "largest_private_gb": self.anonymous / 1e9,
            "largest_file_gb": self.file / 1e9,
        }


@contextmanager
def watched(every_s: float = 0.02) -> Iterator[Memory]:
    """Sample this process's resident set on a thread; the kernel's high-water mark begins anew."""
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
    seen, done = Memory(), threading.Event()

    def sample() -> None:
        while not done.is_set():
            now = usage.now()
            seen.peak = max(seen.peak, now, key=lambda r: r.total)
            seen.anonymous, seen.file = max(seen.anonymous, now.private), max(seen.file, now.file)
            done.wait(every_s)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()
        found = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        seen.high_water = int(found[1]) * 1024 if found else 0


def matmul_rate(size: int = 4096) -> float:
    """FLOP/s of bf16 products of two size x size matrices, the best of five."""
    a, b = (torch.randn(size, size).bfloat16() for _ in range(2))
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def cold(folder: Path) -> None:
    """Put a checkpoint's weights out of the page cache."""
    for path in folder.glob("*.safetensors"):
        number = os.open(path, os.O_RDONLY)
        os.fsync(number)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(number)


def disk_rate(folder: Path) -> float:
    """Bytes/s of reading a checkpoint's files one after the other, from cold; up to 4 GB of them."""
    cold(folder)
    done, began = 0, time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while part := file.read(1 << 24):
                done += len(part)
        if done > 4e9:
            break
    return done / (time.perf_counter() - began)


def read_from_disk() -> int:
    """Bytes that this process has made the disk read so far, by reads and by touched pages (`proc(5)`, `io`)."""
    found = re.search(r"^read_bytes: (\d+)$", Path("/proc/self/io").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


def arguments(text: str, folder: str) -> argparse.ArgumentParser:
    """What every benchmark of a base on disk can be told; `text` is its docstring."""
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(folder), help="for the base; removed afterwards")
    parser.add_argument("--layers", type=int, help="fewer layers of the same shape")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    return parser


def on_disk(args: argparse.Namespace, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The figures of a run whose base lies in a folder of its own, shown and kept; the folder goes in any case."""
    if not pages.supported():
        sys.exit("SKIPPED: Linux with a readable /proc/self/pagemap is needed")
    if args.folder.exists():
        sys.exit(f"{args.folder} exists; name another --folder")
    try:
        result = measure()
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)
    text = json.dumps(result, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")
    return result


def say(text: str) -> None:
    print(text, flush=True)


def verdict(name: str, value: float, limit: float, unit: str = "", *, at_least: bool = False) -> bool:
    fine = value >= limit if at_least else value <= limit
    say(f"{name}: {value:.3f}{unit}, at {'least' if at_least else 'most'} {limit:g}{unit}: {'yes' if fine else 'NO'}")
    return fine


def learning_parser(about: str | None, *, steps: int, rows: int) -> argparse.ArgumentParser:
    """What benchmarks of whole runs are asked: rows to train and to hold out, how many, and where the runs go."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--rows", type=int, default=rows, help="rows of a step")
    return parser

"""Whether all processes of a run have the same of everything that it learns from; and what they are given alike.

Why: `auto` differs by machine, files differ by disk, and a sum over different models is still a sum. It is seen before
the first step, with the ranks and the fields.
Cost: some kilobytes of digests; two all-reduces, the larger of 4 MB.
"""

import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from halfbyte.distributed.step import same_start
from halfbyte.distributed.world import World
from halfbyte.errors import WorldError
from halfbyte.runs import points
from halfbyte.types import Document, Model

MAX_SHOWN, MAX_CHARACTERS = 6, 24
MEASURED_BYTES, TRIES = 4_000_000, 3
PIECE_BYTES = 64_000_000  # of a checkpoint's file that is sent


def check(world: World, about: Document) -> None:
    """Compare what each process has. Raises WorldError: names the fields that differ, with each value and who has
    it."""
    if world.alone:
        return
    values_of = [dict(_leaves(each)) for each in world.gather(about)]
    known = dict.fromkeys(name for each in values_of for name in each)
    names = [name for name in known if len({str(each.get(name)) for each in values_of}) > 1]
    if not names:
        return
    lines = []
    for name in names[:MAX_SHOWN]:
        values = [str(each.get(name)) for each in values_of]
        (commonest, times), *_ = Counter(values).most_common(1)
        usual = commonest if times > 1 else values[0]
        others = [f"{_text(value)} ({world.names[rank]})" for rank, value in enumerate(values) if value != usual]
        rest = " ..." if len(others) > MAX_SHOWN else ""
        lines.append(f"  - {name}: {_text(usual)}, but {', '.join(others[:MAX_SHOWN])}{rest}")
    if len(names) > MAX_SHOWN:
        lines.append(f"  - and {len(names) - MAX_SHOWN} more")
    fix = "the same model, rows and versions on every machine"
    if any(name == "compute_dtype" for name in names):
        fix = "--set quant.compute_dtype=fp32 (or bf16), as auto differs by machine"
    raise WorldError("the processes of this run do not have the same:\n" + "\n".join(lines), fix=fix)


def _leaves(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(part, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _text(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]}..."


@dataclass(frozen=True)
class AllReduceSpeed:
    """What an all-reduce takes between these processes: seconds of a small one, and bytes a second of a large one (of
    the buffer, whatever goes over the wire)."""

    latency_s: float
    bytes_s: float

    def seconds(self, size: int) -> float:
        return self.latency_s + size / self.bytes_s


def measure(world: World) -> AllReduceSpeed:
    """Time all-reduces: the best of a few, as the slowest process has just arrived."""

    def best(count: int) -> float:
        flat, times = torch.zeros(count), []
        for _ in range(TRIES):
            began = time.perf_counter()
            world.sum_(flat)
            times.append(time.perf_counter() - began)
        return min(times)

    latency, total = best(1), best(MEASURED_BYTES // 4)
    return AllReduceSpeed(latency, MEASURED_BYTES / max(1e-6, total - latency))


def join(world: World, belongs: Document, model: Model, threads: int) -> str:
    """The last steps before training: the same base everywhere, the first process's adapters in all; returns the world
    in a line, nothing where this process is alone.

    Args:
        belongs: base, quantiser, tokenizer and chat template, as `adapters.passport` makes it. What a base is called is
            not compared: each machine may have it in a folder of its own.

    Raises:
        WorldError: not all processes have the same of these.
    """
    if world.alone:
        return ""
    check(world, {**belongs, "base": belongs["base"]["content"]})
    same_start(world, model.parameters())
    return describe(world, threads, measure(world))


def describe(world: World, threads: int, link: AllReduceSpeed) -> str:
    """The world in a line; how many machines, so that one that trains alone is missed."""
    where = "1 machine" if world.machines == 1 else f"{world.machines} machines"
    return (
        f"{world.size} processes on {where}, {threads} threads each; an all-reduce passes "
        f"{link.bytes_s / 1e6:.0f} MB/s, {link.latency_s * 1e3:.1f} ms at least"
    )


def share_checkpoint(world: World, path: Path, into: Path) -> Path:
    """The checkpoint at `path` of the first process, for machines that do not share a disk with it: at the same path
    where all of its files are the same, else received into the folder `into`. Returns where it is. Cost: its bytes once
    over the network, where some process cannot read the same files."""
    manifest = (path / points.MANIFEST).read_text() if (path / points.MANIFEST).is_file() else ""
    of_first = world.from_first(lambda: manifest)
    have = world.first or (manifest == of_first and points.is_whole(path, hashes=True))
    if all(world.gather(have)):
        return path
    sizes = world.from_first(lambda: {p.name: p.stat().st_size for p in sorted(path.iterdir()) if p.is_file()})
    target = path if have else into / path.name
    target.mkdir(parents=True, exist_ok=True)
    for name, size in sizes.items():
        if world.first:
            with (path / name).open("rb") as file:
                for _ in range(0, size, PIECE_BYTES):
                    world.broadcast_(torch.frombuffer(bytearray(file.read(PIECE_BYTES)), dtype=torch.uint8))
            continue
        with Path(os.devnull if have else target / name).open("wb") as file:
            for at in range(0, size, PIECE_BYTES):
                piece = torch.empty(min(PIECE_BYTES, size - at), dtype=torch.uint8)
                world.broadcast_(piece)
                file.write(piece.numpy().tobytes())
    return target

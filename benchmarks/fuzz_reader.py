"""Mutated files for the reader: no traceback, no hang, no row lost in silence.

    python benchmarks/fuzz_reader.py                    # 100,000 files, a few minutes
    python benchmarks/fuzz_reader.py --count 1 --seed 4711   # the one file of that number

Good files of every kind and format (JSON lines, JSON, CSV, Parquet, compressed ones) are cut, spliced, repeated, given
strange bytes or another ending, and read. Allowed are the rows, and halfbyte's own errors. For each file
rows = used + reported, and where the file can be counted without the reader (lines, a JSON list, Parquet's own count)
rows are that many. Each file has `LIMIT_S` seconds.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from halfbyte.data.reading import files
from halfbyte.data.reading.read import Reader
from halfbyte.errors import DataError
from halfbyte.recipe.data import Data

LIMIT_S = 10.0
ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".rows", ".jsonl.gz", ".json.gz", ".csv.gz")
STRANGE = (
    b"\xef\xbb\xbf", b"\xff\xfe", b"\x00", b"\r", b"\r\n", b"\n", b"\n\n", b"\xff", b"\xc3", b'"', b"'", b"\\", b"{",
    b"}", b"[", b"]", b",", b":", b"null", b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"\\ud800", b"\\u0000", b"true",
    b"[" * 3000, b'{"a":' * 3000, b"\x1f\x8b", b"PAR1", b"\xf0\x9f\x98\x80", b"\xe2\x80\xa8", b"\x85", b"\t", b" ",
    b'"prompt"', b'"messages"', b'"role"', b'"train": 1', b'{"prompt": "a", "completion": "b"}\n', b"x" * 70_000,
)  # fmt: skip


class Hang(Exception):
    """A file took longer than it may."""


def talk(n: int) -> list[dict[str, Any]]:
    return [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": f"what is {n}?"},
        {"role": "assistant", "content": f"a number: {n}", "train": True},
    ]


def records(kind: str) -> list[dict[str, Any]]:
    makers: dict[str, Callable[[int], dict[str, Any]]] = {
        "messages": lambda n: {"messages": talk(n), "tools": [{"type": "function", "function": {"name": "f"}}]},
        "sharegpt": lambda n: {"conversations": [{"from": "human", "value": f"é {n}"}, {"from": "gpt", "value": "b"}]},
        "alpaca": lambda n: {"instruction": f"say {n}", "input": "" if n % 2 else "x", "output": 'it, "said"\nso'},
        "prompt_completion": lambda n: {"prompt": f"a {n}", "completion": f"b {n}", "extra": None},
        "text": lambda n: {"text": f"some text, {n}\n日本"},
    }
    return [makers[kind](n) for n in range(5)]


def seeds() -> list[tuple[bytes, str]]:
    """Good files and their endings."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    made: list[tuple[bytes, str]] = []
    for kind in ("messages", "sharegpt", "alpaca", "prompt_completion", "text"):
        rows = records(kind)
        lines = "".join(json.dumps(row, ensure_ascii=kind == "text") + "\n" for row in rows).encode()
        listed = json.dumps(rows, indent=1).encode()
        made += [(lines, ".jsonl"), (listed, ".json"), (json.dumps({"data": rows, "n": 5}).encode(), ".json")]
        made += [(gzip.compress(lines, mtime=0), ".jsonl.gz"), (gzip.compress(listed, mtime=0), ".json.gz")]
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        made.append((sink.getvalue(), ".parquet"))
        if kind not in ("messages", "sharegpt"):
            names = list(rows[0])
            quoted = [['"' + str(row[name] or "").replace('"', '""') + '"' for name in names] for row in rows]
            for mark, ending in ((",", ".csv"), ("\t", ".tsv")):
                made.append((("\n".join(mark.join(row) for row in [names, *quoted]) + "\n").encode(), ending))
    return made


def mutated(good: list[tuple[bytes, str]], draw: random.Random) -> tuple[bytes, str]:
    """A file and its ending. Of compressed ones, the bytes inside or outside are changed."""
    data, ending = draw.choice(good)
    inside = ending.endswith(".gz") and draw.random() < 0.6
    data = gzip.decompress(data) if inside else data
    for _ in range(draw.choice((0, 1, 1, 1, 2, 3, 8))):
        at = draw.randrange(len(data) + 1)
        size = draw.choice((1, 1, 2, 5, 30, len(data)))
        what = draw.randrange(8)
        if what == 0:
            data = data[:at]
        elif what == 1:
            data = data[:at] + data[at + size :]
        elif what == 2:
            data = data[:at] + draw.choice(STRANGE) + data[at:]
        elif what == 3:
            data = data[:at] + draw.choice(STRANGE) + data[at + size :]
        elif what == 4:
            data = data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :]
        elif what == 5:
            data = data[:at] + data[at : at + size] * draw.choice((1, 2, 50)) + data[at:]
        elif what == 6:
            other = draw.choice(good)[0]
            data = data[:at] + other[draw.randrange(len(other)) :]
        else:
            data = data.replace(b"\n", draw.choice((b"\r\n", b"\r", b"", b"\n\n", b" \n")))
    data = gzip.compress(data, 1, mtime=0) if inside else data
    return data, ending if draw.random() < 0.9 else draw.choice(ENDINGS)


def counted(data: bytes, ending: str) -> int | None:
    """How many rows a file has, told without the reader; None where that is not plain."""
    try:
        data = gzip.decompress(data) if ending.endswith(".gz") else data
    except Exception:  # zlib's, gzip's or EOFError: it is damaged
        return None
    plain = data.removeprefix(b"\xef\xbb\xbf")
    ending = ending.removesuffix(".gz")
    if ending in (".jsonl", ".rows"):
        return sum(1 for line in plain.split(b"\n") if line.strip(b" \t\r\n"))
    if ending == ".json":
        try:
            found = json.loads(plain.decode("utf-8"))
        except (ValueError, RecursionError):
            return None
        return len(found) if isinstance(found, list) else None
    return None


def read(path: Path, draw: random.Random) -> tuple[Reader, int]:
    """Read one file as a recipe might ask for it; a `Reader` at its end and its rows, or halfbyte's own error."""
    asked = draw.choice(("auto", "auto", "auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"))
    reader = Reader(files.find(str(path)), Data(train=str(path), format=asked))
    return reader, sum(1 for _ in reader)


def one(number: int, good: list[tuple[bytes, str]], folder: Path) -> str:
    """What became of file `number`: `rows`, `reported` or `refused`.

    Raises:
        Exception: whatever it should not have been.
    """
    draw = random.Random(number)
    data, ending = mutated(good, draw)
    path = folder / f"rows{ending}"
    path.write_bytes(data)
    try:
        reader, used = read(path, draw)
    except DataError as error:
        if "Traceback" in str(error) or not str(error).strip():
            raise AssertionError(f"an error that says nothing: {error}") from error
        return "refused"
    finally:
        path.unlink()
    if reader.rows != used + reader.problems.count:
        raise AssertionError(f"{reader.rows} rows, {used} used, {reader.problems.count} reported")
    expected = counted(data, ending)
    if expected is not None and expected != reader.rows:
        raise AssertionError(f"{expected} rows in the file, {reader.rows} seen")
    return "reported" if reader.problems else "rows"


def fuzz(count: int, seed: int, folder: Path) -> tuple[Counter[str], list[tuple[int, str]], float]:
    """What became of `count` files; those that failed, with their number; the longest time of one."""
    good = seeds()
    outcomes: Counter[str] = Counter()
    failed: list[tuple[int, str]] = []
    longest = 0.0

    def late(*_: object) -> None:
        raise Hang(f"over {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, late)
    try:
        for number in range(seed, seed + count):
            began = time.perf_counter()
            signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
            try:
                outcomes[one(number, good, folder)] += 1
            except Exception:  # whatever it is, it is what is looked for
                outcomes["failed"] += 1
                failed.append((number, traceback.format_exc()))
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            longest = max(longest, time.perf_counter() - began)
    finally:
        signal.signal(signal.SIGALRM, before)
    return outcomes, failed, longest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        outcomes, failed, longest = fuzz(given.count, given.seed, Path(folder))
    for number, text in failed[:5]:
        print(f"--- file {number}\n{text}")
    told = ", ".join(f"{n:,} {name}" for name, n in sorted(outcomes.items()))
    print(f"{given.count:,} files in {time.perf_counter() - began:.0f} s: {told}; the slowest took {longest:.2f} s")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

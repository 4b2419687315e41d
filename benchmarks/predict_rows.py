"""`halfbyte predict` on very many short rows: memory, kills, and that each row is there once.

    python benchmarks/predict_rows.py                      # 1,000,000 rows, killed (SIGKILL) twice, to JSON lines
    python benchmarks/predict_rows.py --rows 20000 --kind parquet

A head on a tiny random Llama (two layers, 64 wide) labels texts of one to six words; what is measured is what a row
costs beside the model: reading, tokens, packing, writing. Each call is the command, in a process of its own; memory is
its resident set, a look every 0.2 s. At the end each row's number is there once and in its order, with a label.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
from tests import tiny_run

from halfbyte import finetune

KILLED_AT = (0.3, 0.6)  # of the rows
WORDS = ("red", "blue", "cup", "box", "old", "road")


def trained(folder: Path) -> Path:
    lines = [{"text": f"{word} {n}", "label": word} for word in WORDS for n in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = {"task": "classify", "data__train": folder / "rows.jsonl", "data__eval": "none", "quant__type": "none"}
    finetune.train(tiny_run.recipe(folder, **values, train__max_steps=2))
    return folder / "run"


def write(path: Path, count: int) -> None:
    draw = random.Random(0)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text"])
        writer.writerows((n, " ".join(draw.choices(WORDS, k=draw.randint(1, 6)))) for n in range(count))


def lines_of(path: Path) -> int:
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 24), b""))


def call(command: list[str], partial: Path, until: float) -> tuple[int, list[float]]:
    """One process, killed once `until` rows are written; its exit code, and the resident sets in MB."""
    process, sizes, looked = subprocess.Popen(command, stdout=subprocess.DEVNULL), list[float](), 0
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            sizes.append(watched.memory_info().rss / 1e6)
        except psutil.NoSuchProcess:
            break
        looked += 1
        if looked % 10 == 0 and lines_of(partial) > until:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.2)
    return process.wait(), sizes


def ids(path: Path) -> Iterator[int]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(columns=["id", "prediction"]):
            for number, label in zip(*(batch[name].to_pylist() for name in ("id", "prediction")), strict=True):
                assert label in WORDS
                yield int(number)
        return
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file) if path.suffix == ".csv" else map(json.loads, file)
        for row in rows:
            assert row["prediction"] in WORDS
            yield int(row["id"])


def measure(folder: Path, count: int, kind: str) -> str:
    run, data, out = trained(folder), folder / "many.csv", folder / f"out.{kind}"
    write(data, count)
    command = [sys.executable, "-m", "halfbyte", "predict", str(run), str(data), "--out", str(out), "--json"]
    partial, parts, began = out.with_name(f"{out.name}.partial"), list[str](), time.monotonic()
    for share in (*KILLED_AT, 2.0):
        code, sizes = call(command, partial, share * count)
        tenth = len(sizes) // 10 or 1
        ended = "killed" if code < 0 else f"exit code {code}"
        parts.append(f"{ended}, {sizes[tenth * 2]:.0f} MB early, {max(sizes):.0f} at most")
        if code >= 0:
            break
    seconds = time.monotonic() - began
    assert code == 0 and not partial.exists()
    assert all(number == n for n, number in enumerate(ids(out))) and sum(1 for _ in ids(out)) == count
    return f"{count:,} rows to {kind} in {seconds:.0f} s, each once and in order; calls: {'; '.join(parts)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--kind", choices=["jsonl", "csv", "parquet"], default="jsonl")
    parser.add_argument("--folder", help="for the rows; the system's temporary one if none")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as place:
        print(measure(Path(place), given.rows, given.kind), flush=True)


if __name__ == "__main__":
    main()

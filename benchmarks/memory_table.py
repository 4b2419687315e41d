"""The memory tables that people know, planned here line by line, and measured where this machine can.

    python benchmarks/memory_table.py                          # planned figures alone: a second
    python benchmarks/memory_table.py --measure FOLDER         # and runs of Llama-2-7B in 4 bits (its base is FOLDER,
                                                               # 3.9 GB, made if it is not) and of a 1.1B in 16 bits

The published figures are rounded and say little of batch, length and optimiser, so `ASSUMED` says what each row is
planned with here. Planned is a card's memory with all that is on it; `without states` leaves out the optimiser's, as
several published tables do. Measured is a step on this CPU, beside its own plan: private memory and the base's pages.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

GB, GIB = 1e9, 2**30
QV = ("q_proj", "v_proj")


@dataclass(frozen=True)
class Row:
    """One published figure and the setting that it is planned with here.

    `way`: index of full fine-tuning, LoRA on 16 bits, QLoRA on 4. `allocated`: the published figure counts what the
    framework has allocated, without the CUDA context.
    """

    name: str
    model: str
    way: int
    published: str
    low_gb: float
    high_gb: float
    tokens: int
    rows: int = 1
    cards: int = 1
    recompute: bool = False
    rank: int = 8
    targets: tuple[str, ...] | str = QV
    optim: str = "adamw_torch"
    allocated: bool = False
    note: str = ""

    @property
    def title(self) -> str:
        """With the model's size in front, where the name does not say it."""
        size = self.model.rpartition("-")[2]
        return self.name if size in self.name.lower() else f"{size.upper()} {self.name}"

    @property
    def assumed(self) -> str:
        where = "every linear" if self.targets == "all-linear" else "q, v"
        again = "full recomputation" if self.recompute else "nothing recomputed"
        lora = f", r {self.rank} on {where}" if self.way else ""
        return f"{self.rows} x {self.tokens} tokens{lora}, {again}, {self.optim}"


TABLES: dict[str, tuple[Row, ...]] = {
    "Llama-2-7B, one card": (
        Row("full, 16-bit", "llama-2-7b", 0, "~40 GB", 40, 40, 1024, optim="adamw_bnb_8bit"),
        Row("the same, states in fp32", "llama-2-7b", 0, "", 0, 0, 1024),
        Row("LoRA, 16-bit", "llama-2-7b", 1, "~20 GB", 20, 20, 1024),
        Row("QLoRA, 4-bit", "llama-2-7b", 2, "~9 GB", 9, 9, 1024),
    ),
    "Llama-2-70B": (
        Row("full, 16-bit, 8 cards", "llama-2-70b", 0, "~560 GB", 560, 560, 512, cards=8, recompute=True,
            note="560 GB are 8 bytes a parameter: 2 of weight, 2 of gradient, 4 of states in 16 bits"),
        Row("the same, 8-bit states", "llama-2-70b", 0, "", 0, 0, 512, cards=8, recompute=True, optim="adamw_bnb_8bit"),
        Row("QLoRA, 4-bit, one card", "llama-2-70b", 2, "~48 GB", 48, 48, 512),
    ),
    "QLoRA on one card, other published figures": (
        Row("Llama-2-7B", "llama-2-7b", 2, "5-6 GB", 5, 6, 512, recompute=True, rank=64, targets="all-linear",
            optim="paged_adamw_8bit"),
        Row("Llama-3.1-8B", "llama-3.1-8b", 2, "7.4 GiB", 7.4 * GIB / GB, 7.4 * GIB / GB, 2048, rows=2, recompute=True,
            allocated=True, note="allocated bytes, without the CUDA context"),
        Row("Llama-2-70B", "llama-2-70b", 2, "41-48 GB", 41, 48, 512, recompute=True, rank=64, targets="all-linear",
            optim="paged_adamw_8bit"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Planned:
    row: Row
    lines: tuple[Any, ...]
    trainable: int
    percent: float
    relative_time: float

    @property
    def bytes(self) -> int:
        """On all cards together; a published figure without the CUDA context is compared without it."""
        left_out = "CUDA context" if self.row.allocated else ""
        return sum(line.bytes for line in self.lines if line.name != left_out)

    @property
    def states(self) -> int:
        return sum(line.bytes for line in self.lines if line.name == "optimiser")

    @property
    def error(self) -> float | None:
        """(planned - published) / published, to the nearer end of a published range; None where none is published."""
        got = self.bytes / GB
        if not self.row.published:
            return None
        if self.row.low_gb <= got <= self.row.high_gb:
            return 0.0
        near = min((self.row.low_gb, self.row.high_gb), key=lambda gb: abs(gb - got))
        return got / near - 1


def planned(row: Row) -> Planned:
    from halfbyte import plan
    from halfbyte.models import describe
    from halfbyte.plan.alternatives import compare
    from halfbyte.plan.estimate import parse_device
    from halfbyte.recipe.schema import Recipe

    recipe = Recipe.model_validate({
        "model": row.model, "data": {"train": "none.jsonl"},
        "lora": {"r": row.rank, "target_modules": row.targets, "lora_dropout": 0.0},
        "train": {
            "per_device_train_batch_size": row.rows, "gradient_accumulation_steps": 1, "optim": row.optim,
            "gradient_checkpointing": row.recompute,
        },
    })  # fmt: skip
    shape = describe.describe(row.model)
    device = parse_device("80GB")
    job = plan.Job.of(
        recipe, shape.specs, shape.facts, plan.Rows.assume(row.tokens), device, targets=row.targets, mappable=False
    )
    ways = compare(job, device, tokens=row.rows * row.tokens, recompute="full" if row.recompute else "none")
    way = ways[row.way]
    context = sum(line.bytes for line in way.lines if line.name == "CUDA context")
    extra = tuple(line for line in way.lines if line.name == "CUDA context") * (row.cards - 1) if context else ()
    return Planned(row, (*way.lines, *extra), way.trainable, way.percent, way.relative_time)


def show(title: str, found: list[Planned]) -> None:
    print(f"\n**{title}**\n")
    print("| | published | planned | off | without states | trainable | time | planned with |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for one in found:
        off = "" if one.error is None else f"{one.error:+.0%}"
        bare = f"{(one.bytes - one.states) / GB:.1f} GB"
        row = one.row
        print(
            f"| {row.name} | {row.published} | {one.bytes / GB:.1f} GB | {off} | {bare} | "
            f"{one.trainable / 1e6:.1f}M, {one.percent:.2f}% | {one.relative_time:.2f}x | {row.assumed}"
            f"{'; ' + row.note if row.note else ''} |"
        )


def show_lines(found: list[Planned]) -> None:
    """Every line of every row, where a published figure is far off or not."""
    names = list(dict.fromkeys(line.name for one in found for line in one.lines))
    print("\n**Line by line, GB**\n")
    print("| | " + " | ".join(one.row.title for one in found) + " |")
    print("| --- " * (len(found) + 1) + "|")
    for name in names:
        cells = [sum(line.bytes for line in one.lines if line.name == name) / GB for one in found]
        print(f"| {name} | " + " | ".join(f"{cell:.2f}" if cell else "" for cell in cells) + " |")


def measured(folder: Path) -> None:
    """A QLoRA step of the 7B shape, mapped, and a LoRA step in 16 bits of a shape that fits; each beside its plan."""
    from benchmarks import make_random
    from benchmarks.plan_accuracy import Bench, Case

    small = {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": 32000,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="halfbyte-table-") as temporary:
        bench = Bench(Path(temporary))
        bench.seven_b(folder)
        one = Path(temporary) / "llama-1.1b"
        make_random.small(one, "llama", small)
        bench.models["llama-1.1b"] = str(one)
        cases = (
            ("QLoRA, Llama-2-7B", Case("llama-2-7b-nf4", 1024, 8, recompute=False, placement="mapped", batch=1)),
            (
                "LoRA in 16 bits, 1.1B",
                Case("llama-1.1b", 1024, 8, placement="resident", recompute=False, quant="none", batch=1),
            ),
        )
        print("\n**Measured: a step on this CPU**\n")
        print("| | planned | measured | off | planned with |\n| --- | --- | --- | --- | --- |")
        for number, (name, case) in enumerate(cases):
            found = bench.measure(case, number)
            planned, seen = found["expected"], found["peak"]
            print(
                f"| {name} | {planned / GB:.2f} GB | {seen / GB:.2f} GB | {planned / seen - 1:+.1%} | "
                f"{case.batch} x {case.length} tokens, r {case.rank} on q, v, nothing recomputed, {case.optim}; the "
                f"process with its libraries, and its base {case.placement} |",
                flush=True,
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", type=Path, metavar="FOLDER", help="also run; where the 7B base is, or is to be")
    args = parser.parse_args()
    every = []
    for title, rows in TABLES.items():
        found = [planned(row) for row in rows]
        every += found
        show(title, found)
    show_lines(every)
    if args.measure:
        measured(args.measure)
    return 0


if __name__ == "__main__":
    sys.exit(main())

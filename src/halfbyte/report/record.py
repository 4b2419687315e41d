"""Everything in a run's folder that its page shows, read once. What is missing or torn is empty, never an error.

Cost: one pass over the metrics; the adapter's weights, a pair of matrices at a time, only for `update_norms`.

What an adapter changed: LoRA's update of a weight is scale x B A (arXiv:2106.09685), and |BA|_F^2 =
trace((B^T B)(A A^T)), which needs no matrix of the weight's size; scale is alpha / r, or alpha / sqrt(r) with rsLoRA.
"""

import json
import math
import os
import re
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from halfbyte.recipe.adapter_folder import ADAPTER_FILES, read_passport
from halfbyte.report import series
from halfbyte.runs import crash, listing
from halfbyte.runs.folder import EXPORT, RunFolder, json_rows, read_json
from halfbyte.scoring.sheet import other_adapter
from halfbyte.system import limits
from halfbyte.tuning import results
from halfbyte.types import Document

Matrix = NDArray[np.float64]
# Of a safetensors file: a number's dtype, as numpy has it; bf16 as the upper half of an fp32.
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_LAYER = re.compile(r"^(.*?\.)(\d+)\.(.+)$")


@dataclass(frozen=True)
class UpdateNorms:
    """Frobenius norms of an adapter's updates: `norms[i][j]` of layer `layers[i]` and kind `kinds[j]`, NaN for none.
    `others`: the adapter's other tensors (name, shape)."""

    layers: tuple[str, ...]
    kinds: tuple[str, ...]
    norms: tuple[tuple[float, ...], ...]
    others: tuple[tuple[str, str], ...]

    @property
    def largest(self) -> tuple[str, str, float] | None:
        """Layer, kind and norm of the largest update."""
        cells = [
            (layer, kind, value)
            for layer, row in zip(self.layers, self.norms, strict=True)
            for kind, value in zip(self.kinds, row, strict=True)
            if math.isfinite(value)
        ]
        return max(cells, key=lambda cell: cell[2], default=None)


def read_norms(adapter: Path) -> UpdateNorms | None:
    """The norms of a PEFT folder; None where there is no adapter."""
    file, config = adapter / ADAPTER_FILES[0], read_json(adapter / ADAPTER_FILES[1])
    if not file.is_file() or not config:
        return None
    norms, others = dict[str, float](), list[tuple[str, str]]()
    with file.open("rb") as stream:
        tensors = json.loads(stream.read(min(int.from_bytes(stream.read(8), "little"), limits.MAX_JSON_BYTES)))
        for name in sorted(tensors.keys() - {"__metadata__"}):
            b_name = name.replace(".lora_A.", ".lora_B.")
            if name.endswith(".lora_A.weight") and b_name in tensors:
                module = name.removesuffix(".lora_A.weight").removeprefix("base_model.model.")
                a, b = (_matrix(stream, tensors[each]) for each in (name, b_name))
                norms[module] = abs(scale(config, module, a.shape[0])) * product_norm(a, b)
            elif ".lora_A." not in name and ".lora_B." not in name:
                shape = " x ".join(map(str, tensors[name]["shape"]))
                others.append((name.removeprefix("base_model.model."), shape))
    return by_layer(norms, others)


def _matrix(stream: BinaryIO, entry: Document) -> Matrix:
    """A tensor of a safetensors file, by its entry in the header: (first dimension, all others)."""
    begin, end = entry["data_offsets"]
    stream.seek(0)
    stream.seek(8 + int.from_bytes(stream.read(8), "little") + begin)
    numbers = np.frombuffer(stream.read(end - begin), DTYPES[entry["dtype"]])
    if entry["dtype"] == "BF16":
        numbers = (numbers.astype(np.uint32) << 16).view(np.float32)
    return numbers.reshape(entry["shape"][0], -1).astype(np.float64)


def product_norm(a: Matrix, b: Matrix) -> float:
    """|BA|_F; a: (R, D), b: (O, R)."""
    return math.sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum())))


def scale(config: Document, module: str, rank: int) -> float:
    """The factor of a module's update, with the module's own alpha where a pattern gives one."""
    pattern: dict[str, float] = config.get("alpha_pattern") or {}
    alpha = next((v for k, v in pattern.items() if re.match(rf"(.*\.)?({k})$", module)), config.get("lora_alpha", rank))
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def by_layer(norms: dict[str, float], others: list[tuple[str, str]]) -> UpdateNorms:
    """Norms by layer and kind of layer; modules outside the layers have the layer "-"."""
    cells = dict[tuple[str, str], float]()
    for module, value in norms.items():
        match = _LAYER.match(module)
        cell = (match[2], match[3].rpartition(".")[2]) if match else ("-", module.rpartition(".")[2])
        cells[cell] = math.hypot(cells.get(cell, 0.0), value)  # all experts of a layer together
    layers = sorted({layer for layer, _ in cells}, key=lambda name: (name == "-", int(name) if name != "-" else 0))
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    table = tuple(tuple(cells.get((layer, kind), math.nan) for kind in kinds) for layer in layers)
    return UpdateNorms(tuple(layers), tuple(kinds), table, tuple(others))


MAX_ANSWERS = 6  # shown, chosen from so many:
MAX_ANSWERS_READ = 2_000
CRASH_LINES = 12


@dataclass(frozen=True)
class Record:
    """A run as its folder describes it. `scores` and a few `answers` are from `halfbyte eval`, first answers whose
    scores differ between base and adapter."""

    run: RunFolder
    state: listing.State
    metrics: series.Metrics
    recipe: Document
    plan: Document
    report: Document
    started: Document
    scores: Document
    answers: tuple[Document, ...]
    crash: str

    @property
    def name(self) -> str:
        return self.run.path.resolve().name

    @property
    def model(self) -> str:
        name = str((self.started.get("model") or {}).get("id") or listing.model_of(self.run))
        return Path(name).name if name.startswith("/") else os.path.normpath(name)

    @property
    def learns(self) -> str:
        """The task; of one that writes the method, as sft."""
        task = str(self.recipe.get("task") or "causal_lm")
        return task if task != "causal_lm" else str((self.recipe.get("train") or {}).get("method") or "sft")

    @cached_property
    def update_norms(self) -> UpdateNorms | None:
        try:
            return read_norms(self.run.adapter)
        except Exception:  # of torn weights
            return None

    @cached_property
    def adapter_step(self) -> int | None:
        try:
            passport = read_passport(self.run.adapter) if self.run.adapter.is_dir() else None
        except Exception:  # a page does without it; `halfbyte verify` says what is wrong
            return None
        return None if passport is None else (passport.get("reached") or {}).get("steps")

    @cached_property
    def scored_adapter(self) -> str:
        """Which adapter the scores and answers are of, in words, where it is not the run's; else empty."""
        return other_adapter(self.scores, self.run.adapter)

    @cached_property
    def within(self) -> Document:
        """What was tried for a run in a given time, or by a search; empty for other runs."""
        return self.report.get("within") or results.document(self.run)

    @cached_property
    def verdict(self) -> Document:
        """The run's verdict, where it is on the adapter that the run has; else empty."""
        return listing.verdict(self.run, self.report)

    @cached_property
    def exports(self) -> list[Document]:
        """What `merge` and `export` have added to the folder, by name; `of`: of which adapter each is, in words, where
        that is not the run's."""
        every = [read_json(path) for path in sorted(self.run.path.glob(f"*/{EXPORT}"))]
        return [each | {"of": other_adapter(each, self.run.adapter)} for each in every if each.get("kind")]

    @property
    def resumed(self) -> list[tuple[int, float]]:
        """Each time that the run was resumed: (step, seconds since 1970)."""
        return [(int(p["step"]), float(p["time"])) for p in self.started.get("processes", []) if p.get("step")]

    @property
    def values(self) -> dict[str, Document]:
        """Every field of the recipe with value, origin and why; an older run has no origins."""
        known: dict[str, Document] = self.started.get("values") or {}
        return known or {name: {"value": v, "from": "", "why": ""} for name, v in flat(self.recipe)}


def read(path: Path, *, ours: bool = False) -> Record:
    """The record of a run folder, finished or not; `ours`: as `listing.state` has it. Raises RunError: it is none."""
    run = RunFolder.open(path, need_adapter=False)
    return Record(
        run,
        listing.state(run, ours=ours),
        series.read(run.metrics),
        listing.recipe_of(run),
        read_json(run.plan),
        read_json(run.report),
        read_json(run.started),
        read_json(path / "eval" / "scores.json"),
        answers(path / "eval" / "answers.jsonl"),
        _crash(run),
    )


def _crash(run: RunFolder) -> str:
    """The end of `crash.txt`, of a run that crashed."""
    try:
        lines = (run.path / crash.NAME).read_text(errors="replace").splitlines()
    except OSError:
        return ""
    begin = next((i for i, line in enumerate(lines) if line.startswith("== traceback")), 0)
    return "\n".join(lines[begin + 1 :][-CRASH_LINES:])


def answers(path: Path) -> tuple[Document, ...]:
    """A few rows of `answers.jsonl`, first those whose scores differ between base and adapter."""
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            first_rows = json_rows(islice(lines, MAX_ANSWERS_READ))
            rows = [row for row in first_rows if isinstance(row.get("adapter"), dict)]
    except OSError:
        return ()
    differ = [row for row in rows if row.get("base") and row["base"].get("scores") != row["adapter"].get("scores")]
    same = [row for row in rows if not any(row is one for one in differ)]
    first = differ[: MAX_ANSWERS - 1] if same else differ
    return tuple([*first, *same][:MAX_ANSWERS])


def flat(values: Document, prefix: str = "") -> list[tuple[str, object]]:
    """Every leaf of nested mappings with its dotted name."""
    pairs = list[tuple[str, object]]()
    for name, value in values.items():
        pairs += flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return pairs

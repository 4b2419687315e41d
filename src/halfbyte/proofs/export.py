"""Whether what was written says what the run says: opened by its own program, in a process of its own, and compared.

The bound is what rounding may make of logits. Each of L layers reads the residual stream through five products in a
row (scores, attention, output; gate or up; down), each with a relative error of one rounding; errors of different
products are independent and add in squares, and a norm keeps them relative: r sqrt(5 L), where r^2 is the sum over
what rounds (the file's weights, the program's numbers, the run's own). Twice that is the bound, half at most: logits
that have nothing to do with each other differ by 1.4 of their spread. In a mixture rounding also turns choices among
experts, of some tokens; so the median position is held against the bound, and answers against `setting.ROUTED`.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from halfbyte.errors import ExportError
from halfbyte.proofs.closeness import accumulated_rounding, centred, distance, row_distances
from halfbyte.proofs.programs import LOGITS, LOSSES, SAID
from halfbyte.proofs.setting import ROUTED
from halfbyte.system import files
from halfbyte.system.children import run_child
from halfbyte.system.libraries import versions
from halfbyte.types import Document

# The rms error of one number in each format, relative to the rms of normally distributed ones. Floats: half a unit in
# the last place, evenly spread. Blocks: range of a block over its levels, over sqrt(12); 32 normal numbers reach 2.07
# on either side, 16 reach 1.77.
_BLOCK32, _BLOCK16 = 2.07, 1.77
_EVEN = math.sqrt(12)
# Between fp32 numbers it is the sums that differ: some thousand terms, each rounded once more in another order.
_SUMMED = 32.0
ROUNDING = {
    "F32": 2**-24 * _SUMMED, "F16": 2**-11 / math.sqrt(3), "BF16": 2**-8 / math.sqrt(3),
    "Q8_0": _BLOCK32 / 127 / _EVEN, "Q6_K": _BLOCK16 / 31 / _EVEN, "Q5_0": _BLOCK32 / 16 / _EVEN,
    "Q5_1": 2 * _BLOCK32 / 31 / _EVEN, "Q4_0": _BLOCK32 / 8 / _EVEN, "Q4_1": 2 * _BLOCK32 / 15 / _EVEN,
    "Q5_K": 2 * _BLOCK32 / 31 / _EVEN, "Q4_K": 2 * _BLOCK32 / 15 / _EVEN, "Q3_K": _BLOCK16 / 4 / _EVEN,
    "Q2_K": 2 * _BLOCK16 / 3 / _EVEN,
}  # fmt: skip
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
PRODUCTS_OF_A_LAYER = 5
MARGIN, MAX_BOUND = 2.0, 0.5


@dataclass(frozen=True)
class Proof:
    """What an export says beside what the run says."""

    program: str
    format: str
    bound: float
    difference: float  # of logits, the rms over their spread, over all positions; of a mixture the median position's
    moved: float  # that of the base alone from the run
    kl: float  # mean Kullback-Leibler divergence from the run, in nats
    base_kl: float  # that of the base alone
    loss: float
    run_loss: float
    positions: int
    answers: int
    same_answers: int  # greedy answers alike, of `answers`
    unlike: int  # of the others those in which the run's choice, where they part, was clearer than rounding can turn
    exact: int
    run_exact: int
    references: int
    tokenized: int  # texts that become other tokens
    bounded: bool = True

    @property
    def problems(self) -> list[str]:
        """What rounding does not explain."""
        wrong = []
        if not math.isfinite(self.difference) or (self.bounded and self.difference > self.bound):
            wrong.append(f"logits differ by {self.difference:.3g} of their spread; rounding explains {self.bound:.3g}")
        if not self.bounded and not self.kl < max(self.base_kl, 1e-6):
            wrong.append(f"it is no nearer to the run (KL {self.kl:.3g}) than the base alone ({self.base_kl:.3g})")
        if self.bounded and self.unlike:
            wrong.append(f"{self.unlike} of {self.answers} answers part from the run's where its choice was clear")
        if self.tokenized:
            wrong.append(f"{self.tokenized} texts become other tokens")
        return wrong

    def to_json(self) -> Document:
        return {**vars(self), "ok": not self.problems, "problems": self.problems}


def ask_program(program: str, path: Path, witness: Path, out: Path, adapter: Path | None = None) -> None:
    """What a program says of an export; written into the folder `out`."""
    out.mkdir(exist_ok=True)
    values = {"path": str(path), "witness": str(witness), "out": str(out), "adapter": adapter and str(adapter)}
    files.write(out / "task.json", files.as_json(values))
    run_child(["halfbyte.proofs.programs", program, str(out / "task.json")], f"opening {path.name} by {program}")


def prove_export(
    witness: Path, said: Path, program: str, kind: str, *, others: Sequence[str] = (), reference: Path | None = None,
    bounded: bool = True,
) -> Proof:  # fmt: skip
    """What was said in the folder `said` beside a run's witness.

    Args:
        kind: the format of the export's weights. others: what else rounds, such as the program's own numbers.
        reference: the folder of another witness, whose logits are to be met instead of the run's; answers then differ.
        bounded: whether rounding alone makes the difference.
    """
    asked = json.loads(witness.read_text(encoding="utf-8"))
    heard = json.loads((said / SAID).read_text(encoding="utf-8"))
    run, alone, other = map(np.load, (witness.parent / LOGITS, witness.parent / f"base-{LOGITS}", said / LOGITS))
    expected = np.load(reference / LOGITS) if reference is not None else run
    formats = [_DTYPES.get(each, each) for each in (kind, *others, asked["dtype"])]
    bound = rounding_bound(formats, asked["layers"])
    routed = bool(asked.get("routed")) and set(formats) != {"F32"}
    parted = [_parted(a, b, c) for a, b, c in zip(asked["answers"], heard["answers"], asked["clear"], strict=True)]
    wanted = asked["references"]
    texts = [
        [text.strip() == reference.strip() for text, reference in zip(each, wanted, strict=False)]
        for each in (heard["texts"], asked["texts"])
    ]
    return Proof(
        program=program, format=kind, bound=bound, difference=_difference(other, expected, routed=routed),
        moved=_difference(alone, run, routed=routed), kl=_kl(run, other), base_kl=_kl(run, alone), loss=_loss(said),
        run_loss=_loss(witness.parent), positions=len(run), answers=len(parted),
        same_answers=sum(clear is None for clear in parted),
        # both logits may be off by the bound, which is an rms; four of it is beyond chance
        unlike=sum(
            clear is not None and clear > 8 * (max(bound, ROUTED) if routed else bound)
            for clear in parted
            if reference is None
        ),
        exact=sum(texts[0]), run_exact=sum(texts[1]), references=len(wanted),
        tokenized=sum(a["ids"] != b for a, b in zip(asked["tokenized"], heard["tokenized"], strict=True)),
        bounded=bounded,
    )  # fmt: skip


def rounding_bound(formats: Sequence[str], layers: int) -> float:
    """What rounding to these formats, or torch's dtypes by their names, explains."""
    squares = sum(ROUNDING[_DTYPES.get(each, each)] ** 2 for each in formats)
    return min(MAX_BOUND, accumulated_rounding(math.sqrt(squares), PRODUCTS_OF_A_LAYER * layers, margin=MARGIN))


def _parted(run: Sequence[int], other: Sequence[int], clear: Sequence[float]) -> float | None:
    """How clear the run's choice was where two answers part; None where they are alike."""
    if list(run) == list(other):
        return None
    at = next((i for i, (a, b) in enumerate(zip(run, other, strict=False)) if a != b), min(len(run), len(other)))
    return clear[min(at, len(clear) - 1)]


def _difference(got: np.ndarray, expected: np.ndarray, *, routed: bool) -> float:
    """`routed`: of the median position, as of the others rounding may turn a choice among experts."""
    a, b = centred(torch.from_numpy(got)), centred(torch.from_numpy(expected))
    return float(row_distances(a, b).median()) if routed else distance(a, b)


def _log_softmax(logits: np.ndarray) -> Iterator[torch.Tensor]:
    """In fp64, some rows at a time."""
    return (torch.log_softmax(rows.double(), -1) for rows in torch.from_numpy(logits).split(64))


def _kl(run: np.ndarray, other: np.ndarray) -> float:
    pairs = zip(_log_softmax(run), _log_softmax(other), strict=True)
    return sum(float(F.kl_div(q, p, reduction="sum", log_target=True)) for p, q in pairs) / len(run)


def _loss(answers: Path) -> float:
    """Of a token."""
    losses, tokens = np.load(answers / LOSSES).sum(axis=0)
    return float(losses / tokens)


@dataclass(frozen=True)
class Exported:
    """What was written, and what it says. `tried`: of each base what was measured, `base` the one taken. `held_out`:
    losses, and the share of the run's gain that is kept (`export/job.py`)."""

    path: Path
    kind: str
    base: str
    tried: dict[str, Proof]
    notes: tuple[str, ...] = ()
    held_out: Document | None = None

    @property
    def proven(self) -> Proof | None:
        return self.tried.get(self.base)

    def to_json(self) -> Document:
        return {
            "path": str(self.path), "kind": self.kind, "base": self.base, "notes": list(self.notes),
            "proof": self.proven.to_json() if self.proven is not None else None, "held_out": self.held_out,
            "tried": {name: each.to_json() for name, each in self.tried.items()}, "versions": versions(),
        }  # fmt: skip

    def check(self) -> None:
        """Raise an ExportError where rounding does not explain what was seen."""
        if self.proven is not None and self.proven.problems:
            raise ExportError(
                f"the {self.kind} does not say what the run says: {'; '.join(self.proven.problems)}. "
                "Nothing of it is left.",
                fix="halfbyte verify RUN; if that finds nothing, this is a fault of halfbyte: please report it",
            )

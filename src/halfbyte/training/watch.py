"""A run that watches itself: numbers that are not finite, spikes, the witness.

It stops at the first loss or gradient that is not finite, naming the rows and keeping the batch.
Why: a NaN in one step is in every weight after the next, and the loss of the step before it looked healthy.
Cost: nothing: the loss and the gradients' norm are read once a step for the metrics anyway.

Spikes: it notes a step whose loss, or whose gradients' norm, is far from what the steps before it had.

What: more than half above the median of the last steps, and further than chance explains: `SIGMAS` robust standard
deviations (1.4826 times the median distance from the median). A note, no more: rows differ.
Source: Rousseeuw and Croux, "Alternatives to the median absolute deviation", 1993.
Cost: a sort of 32 numbers a step.

The witness: whether this process still computes what was proven at its start: asked again before each checkpoint.

What: fixed adapters on the first layers, some fixed rows packed. Their logits and the gradients of every adapter there
are kept at the start, when the proofs have just compared the same functions with PEFT's and transformers' own; a
checkpoint is written only where they come out again. One matrix of each shape is dequantised and compared with the
format's definition, as at the start.
Why: memory that lost a bit, a machine that throttles into errors, a library that another package has patched or a
switch that an evaluation left on train on under a healthy loss curve, into checkpoints that look whole.
Cost: a forward of 15 tokens, one with its backward, through two layers; see docs/log.
"""

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median

import torch
from safetensors.torch import save_file
from torch import Tensor

from halfbyte.adapters import learning
from halfbyte.data import collate, pack
from halfbyte.data.encoding.examples import IGNORED, Example
from halfbyte.errors import TrainError, first_line, typed
from halfbyte.models import structure
from halfbyte.proofs import dequantising, setting
from halfbyte.proofs.closeness import distance
from halfbyte.system import files
from halfbyte.types import Batch, Document, Model

BATCH = "not_finite.safetensors"
MOST = 4  # names in a message


def check(
    model: Model, run: Path, step: int, batches: collate.Batches, parts: Sequence[tuple[pack.MicroBatch, torch.Tensor]],
    *, total: float, norm: float,
) -> None:  # fmt: skip
    """Whether a step's losses and gradients are finite.

    Args:
        run: the folder that the batch is saved into.
        parts: each micro-batch with its share of the loss, of which `total` is the sum.
        norm: of all gradients; 0 where it is not to be looked at.

    Raises:
        TrainError: names the rows, and the gradients.
    """
    if math.isfinite(total) and math.isfinite(norm):
        return
    bad = [i for i, (_, part) in enumerate(parts) if not math.isfinite(float(part))]
    what = f"the gradients' norm is {norm}" if math.isfinite(total) else f"the loss is {total}"
    where = [batches.examples[row].where for i in bad or range(len(parts)) for row in parts[i][0]]
    if math.isfinite(total):
        names = learning.not_finite(model)
        what += f", of {len(names)} tensors, {', '.join(names[:MOST])}"
    saved = save(run, step, [batches.of(parts[i][0]) for i in bad or range(len(parts))], where)
    raise TrainError(
        f"{what} at step {step} (rows {_some(where)})."
        + (f" The batch is in {saved}; nothing of this step was saved." if saved else ""),
        fix="lower train.learning_rate, set train.max_grad_norm, or look at those rows"
        if step > 1
        else "nothing has been trained yet: look at the base's weights and at those rows",
    )


def save(run: Path, step: int, batches: Sequence[Batch], where: Sequence[str]) -> Path | None:
    """Keep the micro-batches of a step, as they were computed, with the rows' names. None if nothing can be written."""
    tensors = {f"{i}.{n}": v for i, b in enumerate(batches) for n, v in b.items() if isinstance(v, torch.Tensor)}
    path = run / BATCH
    temporary = files.beside(path)
    with suppress(OSError):
        # clone: safetensors refuses tensors that share storage
        about = {"step": str(step), "rows": json.dumps(list(where))}
        save_file({n: v.contiguous().clone() for n, v in tensors.items()}, temporary, metadata=about)
        files.put(temporary, path)
        return path
    return None


def check_first(model: Model, longest: int) -> None:
    """Whether the first backward has reached every adapter.

    Args:
        longest: tokens of the step's longest row. In a row of two tokens the one that is learned from sees only itself,
            so what asks and what is asked for (Q and K) get gradients of zeros, rightly.

    Raises:
        TrainError: names those without a gradient, or with one of zeros.
    """
    dead = learning.without_gradient(model) if longest > 2 else []
    if dead:
        raise TrainError(
            f"{len(dead)} trained tensors or layers got no gradient in the first step, or one of zeros, so they would "
            f"never learn: {_some(dead)}.",
            fix="turn gradient_checkpointing off; if it stays, report it with the recipe",
        )


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:MOST])}{' ...' if len(names) > MOST else ''}"


LAST_STEPS, FEWEST_STEPS = 32, 8
SIGMAS = 8.0
ABOVE = {"loss": 1.5, "grad_norm": 5.0}  # times the median


class Spikes:
    """Looks at each step's row in turn. `earlier`: rows of the run's earlier processes."""

    def __init__(self, earlier: Iterable[Document] = ()) -> None:
        self._last = {name: deque[float](maxlen=LAST_STEPS) for name in ABOVE}
        for row in earlier:
            if "loss" in row:
                self.find(row)

    def find(self, row: Document) -> dict[str, float]:
        """What spikes in this step, each as a multiple of its median; empty in nearly all."""
        spikes = {}
        for name, times in ABOVE.items():
            last, value = self._last[name], row.get(name)
            if value is None or not math.isfinite(value):
                continue
            if len(last) >= FEWEST_STEPS:
                usual = median(last)
                spread = 1.4826 * median(abs(x - usual) for x in last)
                if value > times * usual and value > usual + SIGMAS * spread:
                    spikes[name] = value / usual if usual > 0 else math.inf
            last.append(float(value))
        return spikes


def notice(rows: Sequence[Document]) -> list[str]:
    """Lines for the report; none where no step spikes and nothing falls."""
    steps = [row["step"] for row in rows if row.get("spike")]
    if not steps:
        return falling(rows)
    some = f"{', '.join(map(str, steps[:8]))}{' ...' if len(steps) > 8 else ''}"
    return [
        f"{len(steps)} of {sum('loss' in row for row in rows)} steps spike in loss or gradient: {some}",
        *falling(rows),
    ]


def falling(rows: Sequence[Document]) -> list[str]:
    """A line for the report where a run of pairs makes its better answers less likely without end: in each quarter of
    its steps less than in the one before, and at the end half as fast as at first, or faster."""
    values = [row["chosen_reward"] for row in rows if row.get("chosen_reward") is not None]
    if len(values) < 2 * FEWEST_STEPS:
        return []
    first, second, third, last = (fmean(values[i * len(values) // 4 : (i + 1) * len(values) // 4]) for i in range(4))
    if not (first > second > third > last < 0 and 2 * (third - last) >= first - second):
        return []
    fix = "a lower train.learning_rate, a larger train.beta or train.rpo_alpha keep them up"
    return [f"the chosen answers became less likely without end (reward {first:.3f}, then {last:.3f}); {fix}"]


# Relative, of all logits or gradients together, in units of the dtype's epsilon. On one CPU the same sums come out to
# the bit; a card adds some of them in any order.
ALLOWED_EPS = 32
_SMALL = 1 << 22  # numbers that a fixed parameter is filled with; a larger one (an embedding) repeats one row


@dataclass
class Witness:
    """What a model computes of fixed rows with fixed adapters. `readable`: in which weights can be read without a
    forward."""

    model: Model
    packed: bool  # rows share a micro-batch
    readable: Callable[[], AbstractContextManager[object]] = nullcontext
    seen: dict[str, Tensor] = field(default_factory=dict)

    def begin(self) -> None:
        """Keep what the model computes now, after the proofs."""
        self.seen = self._compute()

    def changes(self) -> list[str]:
        """What is computed otherwise now, in words; empty where nothing is."""
        changes = []
        try:
            with self.readable():
                wrong = dequantising.wrong_shapes(self.model)
            if wrong:
                changes.append(f"dequantised weights of shape {', '.join(wrong[:3])}")
            now = self._compute()
        except Exception as error:  # of any kind, from the model's code or ours: at the start there was none
            return [*changes, f"{type(error).__name__}: {first_line(error)}"]
        lost = sorted(set(self.seen) - set(now))
        if lost:
            return [*changes, f"no gradient for {', '.join(lost[:3])}{' ...' if len(lost) > 3 else ''}"]
        eps = torch.finfo(structure.causal_lm(self.model).dtype).eps
        off = {name: distance(now[name], was) for name, was in self.seen.items()}
        logits = off.pop(_LOGITS)
        if not logits <= ALLOWED_EPS * eps:
            changes.append(f"logits of packed rows by {logits:.1e}")
        moved = [name for name, by in off.items() if not by <= ALLOWED_EPS * eps]
        if moved:
            worst = max(moved, key=lambda name: off[name])
            changes.append(f"gradients of {len(moved)} of {len(off)} adapters, {worst} by {off[worst]:.1e}")
        return changes

    def check(self, step: int, run: object) -> None:
        """Before a checkpoint of this step. Raises TrainError: names what has changed since the start."""
        if changes := self.changes():
            raise TrainError(
                f"since its start this process computes something else, seen at step {step}: {'; '.join(changes)}. "
                "Its memory, the machine or a library has changed under it; nothing was saved of it.",
                fix="look at the machine (heat, memory, dmesg), then go on from the last checkpoint: "
                f"halfbyte train {typed(run)} --resume",
            )

    def _compute(self) -> dict[str, Tensor]:
        model = self.model
        with structure.shallow(model), setting.as_given(model), setting.few_tokens(model, exact=False), _fixed(model):
            model.eval()
            lm = structure.causal_lm(model)
            rows = setting.random_examples(lm, setting.short_lengths(packed=self.packed))
            texts = [tuple(ids.tolist()) for ids in rows]
            batch = collate.collate([Example(ids, (IGNORED, IGNORED, *ids[2:])[: len(ids)]) for ids in texts])
            # the names of a layer's A and B are long
            parameters = {f"{name}.{i}": p for name, pair in learning.pairs(model).items() for i, p in enumerate(pair)}
            with torch.no_grad():
                logits = setting.logits(lm, rows).cpu()
            _, gradients = setting.loss_and_gradients(model, [batch], parameters=parameters)
        return {_LOGITS: logits} | {name: gradient.cpu() for name, gradient in gradients.items()}


_LOGITS = ""


@contextmanager
def _fixed(model: Model) -> Iterator[None]:
    """Everything that trains holds the same numbers at each call; afterwards, its own again."""
    trained = [p for p in model.parameters() if p.requires_grad]
    saved = [(p, p.data) for p in trained]
    generator = torch.Generator().manual_seed(2)
    try:
        for p in trained:
            shape = p.shape if p.numel() <= _SMALL else p.shape[-1:]
            noise = torch.randn(shape, generator=generator) / max(1, p.shape[-1]) ** 0.5
            p.data = noise.to(p.device, p.dtype).expand(p.shape)
        yield
    finally:
        for p, data in saved:
            p.data = data

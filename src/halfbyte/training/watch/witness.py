"""Whether this process still computes what was proven at its start: asked again before each checkpoint.

What: fixed adapters on the first layers, some fixed rows packed. Their logits and the gradients of every adapter there
are kept at the start, when the proofs have just compared the same functions with PEFT's and transformers' own; a
checkpoint is written only where they come out again. One matrix of each shape is dequantised and compared with the
format's definition, as at the start.
Why: memory that lost a bit, a machine that throttles into errors, a library that another package has patched or a
switch that an evaluation left on train on under a healthy loss curve, into checkpoints that look whole.
Cost: a forward of 15 tokens, one with its backward, through two layers; see docs/log.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from halfbyte.adapters import learning
from halfbyte.data import collate
from halfbyte.data.encoding.examples import IGNORED, Example
from halfbyte.errors import TrainError, first_line, typed
from halfbyte.models import structure
from halfbyte.proofs import dequantising, setting
from halfbyte.proofs.closeness import distance
from halfbyte.types import Model

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
            batch = collate.collate([_example(ids.tolist()) for ids in rows])
            # the names of a layer's A and B are long
            parameters = {f"{name}.{i}": p for name, pair in learning.pairs(model).items() for i, p in enumerate(pair)}
            with torch.no_grad():
                logits = setting.logits(lm, rows).cpu()
            _, gradients = setting.loss_and_gradients(model, [batch], parameters=parameters)
        return {_LOGITS: logits} | {name: gradient.cpu() for name, gradient in gradients.items()}


_LOGITS = ""


def _example(ids: list[int]) -> Example:
    """A row of these tokens, the first two without a label."""
    return Example(tuple(ids), (IGNORED, IGNORED, *ids[2:])[: len(ids)], "", (), "")


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

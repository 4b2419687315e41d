"""Holes in the C library's heap, given back to the system between micro-batches, or layers where these are recomputed.

Why: PyTorch asks glibc for aligned memory, and `memalign` cannot put a tensor where one of the same size was. So the
temporaries of each layer, and micro-batches of ever new lengths, split larger holes or go on top of the heap: SmolLM2,
800 tokens a step, grew from 1.0 to 1.5 GB in 14 steps (`docs/log.md`, "Holes under full recomputation").
What: a look at what is resident (/proc/self/statm). Where it grew by more than a budget, and the heap's own count says
that it is holes, `malloc_trim` gives them back, in a few milliseconds.
Source: malloc_trim(3), mallinfo(3), glibc `malloc/malloc.c` (`_int_memalign`). Nothing is done on a card, or where the
C library has no `mallinfo2` (glibc before 2.33, others).
"""

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from halfbyte.base import stream
from halfbyte.errors import BaseModelError
from halfbyte.models import structure
from halfbyte.system import usage
from halfbyte.types import Model

# Holes that are let be: giving back costs time, and taking it again a page at a time costs more.
BUDGET_BYTES, BUDGET_SHARE = 96_000_000, 0.1  # at least, and of what is private
# Where the budget is passed again at the next look, it is the layer's or micro-batch's own need that comes and goes:
# from then on the budget is this need and a tenth.
OVER_NEED = 1.1


@dataclass
class Holes:
    """Looks at the heap, and gives its holes back when they are more than the budget."""

    room: int = 0  # bytes that may come and go between two looks without being holes
    least: int = 0  # private bytes that are neither the heap's in use nor holes to give back
    seen: int = 0  # private bytes after the last time
    factor: float = 1.0
    just: bool = False  # whether the last look gave holes back

    def look(self) -> None:
        private = usage.now().private
        least = max(BUDGET_BYTES, BUDGET_SHARE * private, self.room)
        budget = self.factor * least
        before, self.just = self.just, False
        if private < self.seen + budget:
            return
        in_use = usage.heap_in_use()
        if in_use is None or (self.seen and private - in_use < self.least + budget):
            return
        usage.trim()
        if before:
            self.factor = max(self.factor, OVER_NEED * (private - self.seen) / least)
        self.just = True
        self.seen = usage.now().private
        self.least = self.seen - in_use


def install(model: Model) -> None:
    """Look after each decoder layer of a model (PEFT around it or not) from now on; nothing where that is of no use."""
    lm = structure.causal_lm(model)
    if lm in _INSTALLED or lm.device.type != "cpu" or usage.heap_in_use() is None:
        return
    try:
        layers = structure.decoder_layers(lm)
    except BaseModelError:  # no list of layers
        return
    holes = Holes()
    hooks = (lambda *_: holes.look(), stream.after(holes.look))
    _INSTALLED[lm] = [layer.register_forward_hook(hook) for layer in layers for hook in hooks]


def remove(model: Model) -> None:
    for handle in _INSTALLED.pop(structure.causal_lm(model), ()):
        handle.remove()


_INSTALLED: WeakKeyDictionary[Any, list[Any]] = WeakKeyDictionary()

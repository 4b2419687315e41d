"""Groups of answers to the prompts of a step: drawn with the adapter of that step, by all processes together.

What: up to 16 texts side by side, by a tape of the weights that train now (`inference.batch`); a prompt is read once
for its group. Of several processes each writes its share, and has all answers afterwards. Each text draws from its own
generator, seeded by (seed, step, row, number in the group): a resumed run, and any number of processes, write the same.
Cost: of writing, see `writing/`; a token reads the base once for all texts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from halfbyte.data.encoding.examples import Example
from halfbyte.distributed.world import World
from halfbyte.errors import TrainError
from halfbyte.inference import batch
from halfbyte.layers.kernels.pool import POOL
from halfbyte.system import usage
from halfbyte.training.trainer import StepInterrupted
from halfbyte.types import Model
from halfbyte.writing.sampling import SamplingParams
from halfbyte.writing.text import Text


@dataclass(frozen=True)
class TextSample:
    """A text that was drawn. `cut_off`: it is as long as may be. `drawn`: of each token, as of `Sampler`."""

    tokens: list[int]
    cut_off: bool
    drawn: list[tuple[float, float, float]]


@dataclass(frozen=True)
class GroupWriter:
    """`count`: answers to each prompt. `ends`: tokens that end one. `at_once`: most texts in one batch."""

    model: Model
    world: World
    params: SamplingParams
    count: int
    ends: Collection[int]
    at_once: int

    def write(self, asking: Sequence[Example], seeds: Sequence[int], look: batch.Progress) -> list[TextSample]:
        """An answer to each: prompts as often as their group is large, in a row. `seeds`: of each group, as often.
        Raises StepInterrupted: `look`, which is told after each token, has raised it, here or in another process."""
        make_room()
        share = np.array_split(np.arange(len(asking)), self.world.size)[self.world.rank].tolist()

        def begun(*, by_tape: bool) -> list[Text]:
            each = ((i, replace(self.params, seed=seeds[i])) for i in share)
            return [Text(asking[i].prompt_ids, params, self.ends, index=i % self.count) for i, params in each]

        answers: list[tuple[list[int], bool, list[tuple[float, float, float]]]] | None = None
        with suppress(StepInterrupted):
            # each prompt by itself, so that what is read of it is there for all of its group
            texts = batch.write(self.model, begun, at_once=self.at_once, packed=False, progress=look) if share else []
            if (error := next((text.error for text in texts if text.error is not None), None)) is not None:
                raise TrainError(f"an answer has failed: {error}.") from error
            answers = [(text.tokens, text.finish == "length", text.sampler.drawn) for text in texts]
        parts = self.world.gather(answers)
        if any(part is None for part in parts):
            raise StepInterrupted
        return [TextSample(*answer) for part in parts for answer in part or ()]


def make_room() -> None:
    """What a micro-batch had is for answers now."""
    POOL.give_back()
    usage.trim()

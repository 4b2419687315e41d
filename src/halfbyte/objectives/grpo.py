"""Learning from rewards: answers that the model has written, each pushed by how much better it is than its group.

What: GRPO and RLOO. An answer's advantage is its reward beside those of the other answers to its prompt; the loss is
PPO's clipped surrogate, by the ratio of each token (GRPO) or of the whole answer (RLOO) to what it was drawn by.
Why per row: what a token counts for is decided when a step's answers are written, over all of them. So a loss is a sum
over rows, and any split of a step trains the same.
Source: GRPO, arXiv:2402.03300; DAPO, arXiv:2503.14476; Dr. GRPO, arXiv:2503.20783; RLOO, arXiv:2402.14740. Formulas and
names as in TRL 1.16 (`_compute_loss` and `_generate_and_score_completions` of GRPOTrainer and RLOOTrainer).

Letters: P prompts of a step, G answers to each, L labelled tokens of a micro-batch's rows, one row after another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfbyte.data import collate
from halfbyte.data.encoding.examples import IGNORED, Example
from halfbyte.objectives.causal_lm import CausalLM
from halfbyte.recipe.schema import Train
from halfbyte.types import Batch, Model

Floats = NDArray[np.float64]
EPS = 1e-4  # TRL's, beside a standard deviation


def advantages(rewards: Floats, method: str, *, scales: bool = True) -> Floats:
    """How much better each answer is than its group: (P, G) -> (P, G); 0 where a reward is NaN. `scales`: of grpo, in
    standard deviations of the group."""
    known = ~np.isnan(rewards)
    values, counts = np.where(known, rewards, 0.0), known.sum(1, keepdims=True)
    sums = values.sum(1, keepdims=True)
    if method == "rloo":  # beside the mean of the others
        return np.where(known & (counts > 1), values - (sums - values) / np.maximum(counts - 1, 1), 0.0)
    apart = np.where(known, values - sums / np.maximum(counts, 1), 0.0)
    spread = np.sqrt((apart**2).sum(1, keepdims=True) / np.maximum(counts - 1, 1))
    return apart / (spread + EPS) if scales else apart


def token_weights(counts: Sequence[int], loss_type: str, *, most_tokens: int, batch: int) -> list[float]:
    """What each token of each answer counts for in the loss of a step.

    Args:
        counts: tokens of each answer; 0 of one that is left out.
        loss_type: `dapo` (each token alike), `grpo` (each answer alike), `dr_grpo` (each token alike, beside answers of
            `most_tokens`), `bnpo` (each token alike in its batch of `batch` answers, each batch alike).
    """
    n, size = len(counts), batch if loss_type == "bnpo" else len(counts)
    if loss_type == "grpo":
        return [1 / (n * max(1, count)) for count in counts]
    if loss_type == "dr_grpo":
        return [1 / (n * most_tokens)] * n
    sums = [max(1, sum(counts[start : start + size])) for start in range(0, n, size)]
    return [1 / (len(sums) * sums[i // size]) for i in range(n)]


@dataclass(frozen=True)
class WrittenRow(Example):
    """A prompt and an answer to it. `weight`: what each of its tokens counts for; `logps`: the log-probability of each
    when it was drawn."""

    advantage: float = 1.0
    weight: float = 1.0
    logps: tuple[float, ...] = ()


_PLAIN = WrittenRow((), (), "", (), "")


@dataclass(frozen=True)
class Grpo(CausalLM):
    """`epsilon`: the ratio of probabilities is clipped to 1 - low and 1 + high. `temperature`: of what is drawn, and so
    of the log-probabilities."""

    method: str = "grpo"
    temperature: float = 1.0
    epsilon: tuple[float, float] = (0.2, 0.2)

    watches: ClassVar[tuple[str, ...]] = ("clipped", "logp_error")
    """The share of tokens that was clipped; the mean square of a token's log-probability in training less that when it
    was drawn."""

    @classmethod
    def of(cls, train: Train) -> "Grpo":
        low = train.epsilon or 0.0
        return cls(0.0, train.method, train.temperature or 1.0, (low, train.epsilon_high or low))

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.method

    text_sums = CausalLM.text_sums  # of the expected answers; `prepare.why_not_shared` looks for whose it is

    def collate(self, examples: Sequence[Example]) -> Batch:
        return {**collate.collate(examples), "rows": _of_labels(examples)}

    def collate_tree(self, examples: Sequence[Example]) -> Batch:
        return {**collate.collate_tree(examples), "rows": _of_labels(examples)}

    def logps(self, model: Model, batch: Batch) -> Tensor:
        """The log-probability of each label, one row after another: (L,)."""
        from halfbyte.layers import loss

        losses = loss.label_losses(model, batch, temperature=self.temperature)  # (K,)
        return -(losses[batch["label_of"].to(losses.device)] if "label_of" in batch else losses)

    def loss(self, model: Model, batch: Batch) -> Tensor:
        logps = self.logps(model, batch)
        advantage, weight, row, drawn = batch["rows"].to(logps.device)
        logs = logps - torch.where(drawn.isnan(), logps.detach(), drawn)
        error = logs.detach()
        if self.method == "rloo":  # of a whole answer, at each of its tokens
            logs = logs.new_zeros(len(logs) + 1).index_add(0, row.long(), logs)[row.long()]
        ratio, (low, high) = torch.exp(logs), (1 - self.epsilon[0], 1 + self.epsilon[1])
        each = -torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
        if "watched" in batch:
            clipped = torch.where(advantage < 0, ratio < low, ratio > high)
            batch["watched"]["clipped"] = float(clipped.sum()), len(clipped)
            batch["watched"]["logp_error"] = float(error.double().square().sum()), len(error)
        return (each * weight).sum()


def _of_labels(examples: Sequence[Example]) -> Tensor:
    """Of each label its row's advantage and weight, the row's number, and the token's log-probability when it was
    drawn, NaN where it was not: (4, L) fp32."""
    columns = list[tuple[float, float, int, float]]()
    for number, e in enumerate(examples):
        row, count = e if isinstance(e, WrittenRow) else _PLAIN, len(e.labels) - e.labels.count(IGNORED)
        columns += [(row.advantage, row.weight, number, logp) for logp in row.logps or (float("nan"),) * count]
    return torch.tensor(columns).reshape(-1, 4).T

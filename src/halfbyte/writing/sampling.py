"""How the next token of a text is chosen: the likeliest one, or one that is drawn.

Why: each text has a random generator of its own and draws in fp64, so a seed gives the same text in `generate` and in
`serve`, alone or beside others.
Source: top-p sampling, arXiv:1904.09751; min-p, arXiv:2407.01082; penalties and biases, OpenAI's API reference.
Repetition penalties (arXiv:1909.05858) are transformers' own. The order is transformers': top-k, top-p of what is left,
min-p.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Generator, Tensor

_FIRST_LOOK = 512  # of the most likely tokens, for top_p; all are sorted only where these are not enough
# Logits (1, V) after the tokens (1, N) of a text -> logits (1, V): transformers' processors, of a generation_config.
Processors = Callable[["Tensor", "Tensor"], "Tensor"]


@dataclass(frozen=True)
class SamplingParams:
    """How a text is to be written."""

    max_tokens: int = 256  # the longest answer
    temperature: float = 0.0  # 0 takes the likeliest token
    top_p: float = 1.0  # draw only from the likeliest tokens that have this probability together
    seed: int | None = None  # makes what is drawn repeatable
    stop: tuple[str, ...] = ()  # strings that end an answer and are no part of it
    logprobs: int | None = None  # how many likely tokens are reported beside each one; None: none, nor the token's own
    top_k: int = 0  # draw only from so many likeliest tokens; 0: from all
    min_p: float = 0.0  # only from those that have at least this share of the likeliest one's probability
    repetition_penalty: float | None = None
    """Divides positive logits of what prompt or answer have, and multiplies negative ones; None: the model's own."""
    frequency_penalty: float = 0.0  # taken from a token's logit each time that the answer has it
    presence_penalty: float = 0.0  # taken once
    logit_bias: tuple[tuple[int, float], ...] = ()  # tokens, and what is added to their logits
    records: bool = False  # what each token was drawn from is kept (`Sampler.drawn`)


@dataclass(frozen=True)
class TokenLogprob:
    """A token with the logarithm of its probability, and the likeliest tokens there with theirs."""

    token: int
    logprob: float
    likely: tuple[tuple[int, float], ...] = ()


class Constraint(Protocol):
    """What one text may be: JSON of a schema, for example."""

    def allowed(self, size: int) -> Tensor:
        """Which of so many tokens may come next: (V,) bool."""

    def take(self, token: int) -> bool:
        """Go on by a token; whether the text is complete with it."""


class Sampler:
    """Chooses the tokens of one text. `index`: of texts after one prompt, which draw differently: its seed is the seed
    plus this. `constraint`: allows only some tokens."""

    def __init__(self, params: SamplingParams, index: int = 0, constraint: Constraint | None = None) -> None:
        self.params, self.constraint = params, constraint
        self.processors: Processors | None = None
        self._adjusts = bool(params.frequency_penalty or params.presence_penalty or params.logit_bias)
        self._largest = not self._adjusts and constraint is None and params.temperature <= 0 and params.logprobs is None
        self.drawn: list[tuple[float, float, float]] = []
        """Of each token its log-probability among what it was drawn from, the entropy there, and the standard deviation
        of the logits."""
        self.generator: Generator | None = None
        if params.temperature > 0:  # a greedy text needs no torch
            import torch

            self.generator = torch.Generator()
            self.generator.seed() if params.seed is None else self.generator.manual_seed(params.seed + index)

    @property
    def greedy(self) -> bool:
        """Whether the largest logit is all that matters."""
        return self._largest and self.processors is None

    def choose(self, logits: Tensor, prompt: Sequence[int], written: Sequence[int]) -> int:
        """The next token after a prompt and what is written after it, from logits (V,) in fp32 on the CPU."""
        if self.processors is not None:
            import torch

            logits = self.processors(torch.tensor([[*prompt, *written]]), logits[None].clone())[0]
        if self._adjusts:
            logits = adjusted(logits, written, self.params)
        if self.constraint is not None:
            logits = logits.masked_fill(~self.constraint.allowed(len(logits)), -math.inf)
        if self.params.temperature <= 0:
            return int(logits.numpy().argmax())  # numpy's is nine times as fast
        scaled = logits.double() / self.params.temperature
        probabilities = narrowed(scaled.softmax(-1), self.params)
        if not self.params.records:
            return int(probabilities.multinomial(1, generator=self.generator))
        import torch

        sums = probabilities.cumsum(-1)  # for one random number, where `multinomial` draws one for each token
        place = sums[-1] * torch.rand((), dtype=sums.dtype, generator=self.generator)
        token = int(torch.searchsorted(sums, place, right=True))
        logprob = float((probabilities[token] / sums[-1]).log())
        # entropy = log of the sum of exp - mean logit; the first is logit - logprob of any token
        entropy = float(scaled[token] - probabilities.dot(scaled) / sums[-1]) - logprob
        self.drawn.append((logprob, entropy, float(scaled.std())))
        return token


def adjusted(logits: Tensor, written: Sequence[int], params: SamplingParams) -> Tensor:
    """Logits (V,) with the penalties for what is written already, and the biases."""
    import torch

    counts = torch.bincount(torch.tensor(written, dtype=torch.int64), minlength=len(logits))
    logits = logits - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
    if params.logit_bias:
        tokens, biases = zip(*params.logit_bias, strict=True)
        logits[list(tokens)] += torch.tensor(biases)
    return logits


def narrowed(probabilities: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities (V,), zero where top_k, top_p or min_p leaves a token out; they need not sum to 1."""
    if 0 < params.top_k < len(probabilities):
        least = probabilities.topk(params.top_k).values[-1]
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
        probabilities = probabilities / probabilities.sum()
    if params.top_p < 1:
        probabilities = top_p_of(probabilities, params.top_p)
    if params.min_p > 0:
        probabilities = probabilities.masked_fill(probabilities < params.min_p * probabilities.max(), 0.0)
    return probabilities


def top_p_of(probabilities: Tensor, top_p: float) -> Tensor:
    """Probabilities (V,), zero but for the likeliest tokens that reach `top_p` together, the last of these included."""
    for count in (min(_FIRST_LOOK, len(probabilities)), len(probabilities)):
        likeliest, order = probabilities.topk(count)
        before = likeliest.cumsum(-1) - likeliest
        if float(before[-1] + likeliest[-1]) >= top_p:
            break
    nucleus = order[before < top_p]
    return probabilities.new_zeros(len(probabilities)).index_copy_(0, nucleus, probabilities[nucleus])


def logprob_of(logits: Tensor, token: int, count: int) -> TokenLogprob:
    """Of a token, and of the `count` likeliest ones, from logits (V,)."""
    logprobs = logits.double().log_softmax(-1)
    best, which = logprobs.topk(count)
    return TokenLogprob(token, float(logprobs[token]), tuple(zip(which.tolist(), best.tolist(), strict=True)))

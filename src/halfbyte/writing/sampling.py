"""How the next token of a text is chosen: the likeliest one, or one that is drawn.

Why: each text has a random generator of its own and draws in fp64, so a seed gives the same text in `generate` and in
`serve`, alone or beside others.
Source: top-p sampling, arXiv:1904.09751.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

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
        self.generator = torch.Generator() if params.temperature > 0 else None
        if self.generator is not None:
            self.generator.seed() if params.seed is None else self.generator.manual_seed(params.seed + index)

    @property
    def greedy(self) -> bool:
        """Whether the largest logit is all that matters."""
        params = self.params
        plain = self.constraint is None and self.processors is None
        return plain and params.temperature <= 0 and params.logprobs is None

    def choose(self, logits: Tensor, tokens: Sequence[int]) -> int:
        """The next token after `tokens`, from logits (V,) in fp32 on the CPU."""
        if self.processors is not None:
            logits = self.processors(torch.tensor([list(tokens)]), logits[None].clone())[0]
        if self.constraint is not None:
            logits = logits.masked_fill(~self.constraint.allowed(len(logits)), -torch.inf)
        if self.params.temperature <= 0:
            return int(logits.numpy().argmax())  # numpy's is nine times as fast
        probabilities = torch.softmax(logits.double() / self.params.temperature, -1)
        if self.params.top_p < 1:
            probabilities = top_p_of(probabilities, self.params.top_p)
        return int(torch.multinomial(probabilities, 1, generator=self.generator))


def top_p_of(probabilities: Tensor, top_p: float) -> Tensor:
    """Probabilities (V,), zero but for the likeliest tokens that reach `top_p` together, the last of these included."""
    for count in (min(_FIRST_LOOK, len(probabilities)), len(probabilities)):
        likeliest, order = torch.topk(probabilities, count)
        before = likeliest.cumsum(-1) - likeliest
        if float(before[-1] + likeliest[-1]) >= top_p or count == len(probabilities):
            nucleus = order[before < top_p]
            return torch.zeros_like(probabilities).index_copy_(0, nucleus, probabilities[nucleus])
    raise AssertionError


def logprob_of(logits: Tensor, token: int, count: int) -> TokenLogprob:
    """Of a token, and of the `count` likeliest ones, from logits (V,)."""
    logprobs = torch.log_softmax(logits.double(), -1)
    best, which = torch.topk(logprobs, count)
    return TokenLogprob(token, float(logprobs[token]), tuple(zip(which.tolist(), best.tolist(), strict=True)))

"""What answers cost, by method: formulas of log-probabilities, each with its paper.

Source: TRL 1.16, DPOTrainer, KTOTrainer, and the experimental trainers of ORPO and CPO, whose names these are.
Cost: a few numbers a pair.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from halfbyte.recipe.method import MethodFields


@dataclass(frozen=True)
class Answers:
    """An answer of each of n pairs: (n,) each. `ratio`: its log p; of methods with a reference less the reference's."""

    logp: Tensor
    ratio: Tensor
    tokens: Tensor

    @property
    def mean(self) -> Tensor:
        return self.ratio / self.tokens


def of_pairs(better: Answers, worse: Answers, asks: MethodFields) -> Tensor:
    """(n,). `label_smoothing`: the share of pairs that are thought to be the wrong way round (conservative DPO)."""
    beta, share = asks.beta or 0.0, torch.tensor(asks.label_smoothing or 0.0)
    a, b = beta * better.ratio, beta * worse.ratio
    gap, mean = a - b, better.mean - worse.mean

    def smooth(z: Tensor) -> Tensor:
        return -(1 - share) * logsigmoid(z) - share * logsigmoid(-z)

    losses: dict[str, Callable[[], Tensor]] = {  # by loss_type, else by method
        "sigmoid": lambda: smooth(gap),  # arXiv:2305.18290, equation 7; CPO: arXiv:2401.08417, equation 3
        "sigmoid_norm": lambda: -logsigmoid(beta * mean),
        "hinge": lambda: torch.relu(1 - gap),  # arXiv:2305.10425
        "ipo": lambda: (mean - 1 / (2 * beta)) ** 2,  # arXiv:2310.12036, equation 17, of mean tokens
        "robust": lambda: (  # arXiv:2403.00409, equation 9
            (share * logsigmoid(-gap) - (1 - share) * logsigmoid(gap)) / (1 - 2 * share)
        ),
        "exo_pair": lambda: (  # arXiv:2402.00856, equation 16
            torch.sigmoid(gap) * (logsigmoid(gap) - torch.log1p(-share))
            + torch.sigmoid(-gap) * (logsigmoid(-gap) - torch.log(share))
        ),
        "nca_pair": lambda: -logsigmoid(a) - 0.5 * logsigmoid(-a) - 0.5 * logsigmoid(-b),  # arXiv:2402.05369
        "bco_pair": lambda: -logsigmoid(a) - logsigmoid(-b),  # arXiv:2404.04656, without its shift
        "sppo_hard": lambda: (better.ratio - 0.5 / beta) ** 2 + (worse.ratio + 0.5 / beta) ** 2,  # arXiv:2405.00675
        "apo_zero": lambda: 1 - torch.sigmoid(a) + torch.sigmoid(b),  # arXiv:2408.06266, equation 7
        "apo_down": lambda: torch.sigmoid(a) + 1 - torch.sigmoid(gap),  # equation 8
        "discopop": lambda: torch.lerp(  # arXiv:2406.08414, equation 5
            -logsigmoid(gap), torch.exp(-gap), torch.sigmoid(gap / (asks.discopop_tau or 1.0))
        ),
        "orpo": lambda: (  # arXiv:2403.07691, equations 4 and 7: the odds of mean tokens
            -beta * logsigmoid(mean - torch.log(torch.expm1(better.mean) / torch.expm1(worse.mean)))
        ),
        "simpo": lambda: smooth(beta * mean - (asks.simpo_gamma or 0.0)),  # arXiv:2405.14734, equation 6
    }
    return losses[asks.loss_type or asks.method]()


def of_answers(ratio: Tensor, good: Tensor, kl: float, asks: MethodFields) -> Tensor:
    """KTO, arXiv:2402.01306, equation 7: of each answer, by whether it is a good one: (n,). `kl`: of model and
    reference, 0 for `apo_zero_unpaired`."""
    weights = torch.where(good, asks.desirable_weight or 0.0, asks.undesirable_weight or 0.0)
    return weights * (1 - torch.sigmoid((asks.beta or 0.0) * torch.where(good, ratio - kl, kl - ratio)))

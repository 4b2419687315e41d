"""Which answer is better: DPO and its kin, IPO, ORPO, CPO, SimPO of pairs, and KTO of answers with a verdict.

What: a row is two texts behind one prompt, which is computed once: the better and the worse answer; of KTO its answer
and another row's. A model gives each answer log p, the sum over its labels; what the reference gives it comes with the
row. The loss is a formula of these. What it needs of a whole step is taken before the step's first
micro-batch, so that any split trains the same: how many tokens the better answers have, whose own loss may be added
(ORPO, CPO, `rpo_alpha`); of KTO the mean log ratio of the mismatched answers, which TRL takes of a micro-batch.
Cost: a pass over both answers; of KTO a pass over one, and a forward of the other.
Source: TRL 1.16, DPOTrainer, KTOTrainer, and the experimental trainers of ORPO and CPO, whose names formulas have here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import logsigmoid

from halfbyte.data import collate, pack
from halfbyte.data.collate import Batches
from halfbyte.data.encoding.encoder import EncodedRows
from halfbyte.data.encoding.examples import IGNORED, Example
from halfbyte.objectives.causal_lm import CausalLM
from halfbyte.objectives.grpo import Grpo
from halfbyte.objectives.objective import Objective, Sums
from halfbyte.plan.job import ObjectiveCost
from halfbyte.recipe.method import MethodFields
from halfbyte.recipe.schema import Train
from halfbyte.types import Batch, Model


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


def of(train: Train) -> Objective:
    """The objective of a recipe."""
    if train.method == "sft":
        return CausalLM(train.label_smoothing_factor)
    if train.draws:
        return Grpo.of(train)
    asks = MethodFields(**{name: getattr(train, name) for name in MethodFields.model_fields})
    return Unpaired(asks) if train.method == "kto" else Preference(asks)


@dataclass(frozen=True)
class Preference(Objective):
    """Of pairs. `asks`: the method of a recipe's `train:`, and its fields."""

    asks: MethodFields

    figures: ClassVar[tuple[str, ...]] = ("accuracy", "margin", "chosen_reward", "chosen_logp", "rejected_logp")
    watches: ClassVar[tuple[str, ...]] = (*figures, "answer_tokens")
    sum_names: ClassVar[tuple[str, ...]] = ("loss", "pairs", *figures)

    @property
    def name(self) -> str:
        return self.asks.method

    @property
    def cost(self) -> ObjectiveCost:
        return ObjectiveCost()

    @property
    def own(self) -> float:
        """The weight of the better answers' own loss."""
        return 1.0 if self.name == "orpo" else self.asks.cpo_alpha or self.asks.rpo_alpha or 0.0

    @property
    def step_names(self) -> tuple[str, ...]:
        return ("pairs", "own_tokens") if self.own else ()

    def weights(self, rows: EncodedRows) -> pack.Weights:
        return np.ones(len(rows.examples), np.int64)

    def labels(self, rows: EncodedRows) -> NDArray[np.int64]:
        """How many tokens of each row its loss is made of, for the plan: of ORPO all of the better text."""
        both = rows.lengths + (0 if rows.shared is None else rows.shared)  # the prompt twice
        return rows.labelled + (both - rows.labelled) // 2 * (self.name == "orpo")

    def collate(self, examples: Sequence[Example]) -> Batch:
        return self.lay_out(collate.collate, examples)

    def collate_tree(self, examples: Sequence[Example]) -> Batch:
        return self.lay_out(collate.collate_tree, examples)

    def lay_out(self, lay_out: Callable[[Sequence[Example]], Batch], examples: Sequence[Example]) -> Batch:
        """Examples with what the reference gives them, where it is known. ORPO labels all of the better text, and
        `answers` says which of the labels are those of the answer."""
        more: Batch = {}
        if all(example.reference for example in examples):
            more["reference"] = torch.tensor([each for example in examples for each in example.reference])
        if self.name == "orpo":
            given = [label for example in examples for label in example.labels]
            whole = [(IGNORED, *e.input_ids[1 : e.starts[1]], *e.labels[e.starts[1] :]) for e in examples]
            examples = [replace(e, labels=labels) for e, labels in zip(examples, whole, strict=True)]
            every = (label for labels in whole for label in labels)
            more["answers"] = torch.tensor([a != IGNORED for a, b in zip(given, every, strict=True) if b != IGNORED])
        return {**lay_out(examples), **more}

    def weight(self, batch: Batch) -> float:
        return len(batch.get("text_lengths", batch["cu_seq_lens_q"][1:])) / 2

    def step_sums(self, model: Model, batches: Batches) -> Sums:
        from halfbyte.layers import loss

        counts = [len(b["targets"][part]) for b in batches for part in [*loss.labels_of_texts(b)][::2]]
        return {"pairs": float(len(counts)), "own_tokens": float(sum(counts))}

    def loss(self, model: Model, batch: Batch) -> Tensor:
        better, worse, whole = self._pairs(model, batch)
        losses = of_pairs(better, worse, self.asks)
        if "watched" in batch:
            seen = self._figures(better, worse) | {"answer_tokens": (better.tokens + worse.tokens) / 2}
            batch["watched"].update({name: (float(values.sum()), len(values)) for name, values in seen.items()})
        if not self.own:
            return losses.sum()
        step = batch.get("step", {"pairs": len(losses), "own_tokens": float(whole.tokens.sum())})
        return losses.sum() - self.own * step["pairs"] / step["own_tokens"] * whole.logp.sum()

    def text_sums(self, model: Model, batch: Batch) -> list[Sums]:
        better, worse, whole = self._pairs(model, batch)
        losses = of_pairs(better, worse, self.asks)
        losses = losses - self.own * whole.logp / whole.tokens  # the mean of each pair
        return self._by_text({"loss": losses, "pairs": torch.ones_like(losses), **self._figures(better, worse)})

    def _by_text(self, figures: dict[str, Tensor]) -> list[Sums]:
        """The figures of each row (n,) on its first text, and nothing on its second."""
        rows = zip(*(figures[name].tolist() for name in self.sum_names), strict=True)
        none = dict.fromkeys(self.sum_names, 0.0)
        return [sums for row in rows for sums in (dict(zip(self.sum_names, row, strict=True)), none)]

    def scores(self, sums: Sums) -> dict[str, float]:
        """`loss` and the others, of a row; and how many rows these are."""
        first, rows, *others = self.sum_names
        return {**{n: sums[n] / max(sums[rows], 1) for n in (first, *others)}, rows: int(sums[rows])}

    def _pairs(self, model: Model, batch: Batch) -> tuple[Answers, Answers, Answers]:
        """Of each pair the better and the worse answer; and all labels of the better text."""
        texts = _log_p(model, batch)
        all_labels = self._side(texts[::2], {})
        if "answers" in batch:
            parts = batch["answers"].to(all_labels.logp.device).split([len(text) for text in texts])
            texts = [text[part] for text, part in zip(texts, parts, strict=True)]
        shorter = [min(len(a), len(b)) for a, b in zip(texts[::2], texts[1::2], strict=True) for _ in range(2)]
        both = self._side(texts, batch, shorter)
        better, worse = (Answers(both.logp[i::2], both.ratio[i::2], both.tokens[i::2]) for i in (0, 1))
        return better, worse, all_labels

    def _side(self, texts: list[Tensor], batch: Batch, whole: Sequence[int] = ()) -> Answers:
        """`texts`: log p of the labels of each. `whole`: how many of them count as one; those after them `ld_alpha`.
        Where the reference is not known a model is its own."""
        alpha = 1.0 if self.asks.ld_alpha is None else self.asks.ld_alpha
        parts = zip(texts, whole or map(len, texts), strict=True)
        logp = torch.stack([text[:count].sum() + alpha * text[count:].sum() for text, count in parts])
        reference = batch["reference"].to(logp) if "reference" in batch else logp.detach()
        ratio = logp - reference if self.asks.referenced else logp
        return Answers(logp, ratio, logp.new_tensor([len(text) for text in texts]))

    def _figures(self, better: Answers, worse: Answers) -> dict[str, Tensor]:
        """What is watched of each pair: (n,)."""
        by_token, beta = self.name in ("orpo", "simpo"), self.asks.beta or 0.0
        a, b = (beta * (side.mean if by_token else side.ratio).detach() for side in (better, worse))
        logps = {"chosen_logp": better.logp.detach(), "rejected_logp": worse.logp.detach()}
        return {"accuracy": ((a - b).sign() + 1) / 2, "margin": a - b, "chosen_reward": a, **logps}


@dataclass(frozen=True)
class LogLikelihoods(Preference):
    """What a model gives the answers of both texts of a row, as its loss counts them: what a reference is asked for."""

    sum_names: ClassVar[tuple[str, ...]] = ("first", "second")

    def text_sums(self, model: Model, batch: Batch) -> list[Sums]:
        first, second, _ = self._pairs(model, batch)
        return self._by_text({"first": first.logp, "second": second.logp})


@dataclass(frozen=True)
class Unpaired(Preference):
    """Of answers that are good or bad. A batch is the first text of each row, its own; the second one is laid out where
    it is asked for. An evaluation takes KL as 0."""

    watches: ClassVar[tuple[str, ...]] = ("accuracy", "kl", "chosen_reward", "rejected_reward", "answer_tokens")
    sum_names: ClassVar[tuple[str, ...]] = ("loss", "answers", "accuracy")

    @property
    def cost(self) -> ObjectiveCost:
        return ObjectiveCost(forwards=1.0 if self.step_names else 0.0)

    @property
    def step_names(self) -> tuple[str, ...]:
        return ("kl", "answers") if self.asks.loss_type == "kto" else ()

    def lay_out(
        self, lay_out: Callable[[Sequence[Example]], Batch], examples: Sequence[Example], which: int = 0
    ) -> Batch:
        texts = [replace(e.texts[which], reference=e.reference[which : which + 1]) for e in examples]
        desirable = torch.tensor([bool(e.desirable) for e in examples])
        return {**super().lay_out(lay_out, texts), "desirable": desirable}

    def weight(self, batch: Batch) -> float:
        return float(len(batch["desirable"]))

    def step_sums(self, model: Model, batches: Batches) -> Sums:
        sums = {"kl": 0.0, "answers": 0.0}
        for batch in replace(batches, lay_out=lambda rows: self.lay_out(collate.collate, rows, 1)):
            sums["kl"] += float(self._side(_log_p(model, batch), batch).ratio.sum())
            sums["answers"] += self.weight(batch)
        return sums

    def loss(self, model: Model, batch: Batch) -> Tensor:
        step = batch.get("step", {"kl": 0.0, "answers": 1.0})
        side = self._side(_log_p(model, batch), batch)
        losses, good, ratio = self._losses(side, batch, kl := max(0.0, step["kl"] / step["answers"]))
        if "watched" in batch:
            reward, count = (self.asks.beta or 0.0) * ratio.detach(), len(good)
            seen = {"accuracy": (float(((ratio > 0) == good).sum()), count), "kl": (kl * count, count)}
            seen["answer_tokens"] = float(side.tokens.sum()), count
            for name, these in (("chosen_reward", good), ("rejected_reward", ~good)):
                seen[name] = float(reward[these].sum()), int(these.sum())
            batch["watched"].update(seen)
        return losses.sum()

    def _losses(self, side: Answers, batch: Batch, kl: float) -> tuple[Tensor, Tensor, Tensor]:
        """Of each answer its loss, whether it is good, and its log ratio: (n,)."""
        good = batch["desirable"].to(side.ratio.device)
        return of_answers(side.ratio, good, kl, self.asks), good, side.ratio

    def text_sums(self, model: Model, batch: Batch) -> list[Sums]:
        losses, good, ratio = self._losses(self._side(_log_p(model, batch), batch), batch, 0.0)
        accuracy = ((ratio > 0) == good).to(losses)
        return self._by_text({"loss": losses, "answers": torch.ones_like(losses), "accuracy": accuracy})


def _log_p(model: Model, batch: Batch) -> list[Tensor]:
    """Of each text what a model gives its labels, rounded the same with gradients and without."""
    from halfbyte.layers import fuse, loss

    with fuse.as_trained():
        each = -loss.label_losses(model, batch)
    return [each[labels] for labels in loss.labels_of_texts(batch)]

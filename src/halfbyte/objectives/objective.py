"""What is learned: the seam between a method of training and everything that runs one.

What: an `Objective` says of its rows what is laid out, what is labelled and how much each counts; of a micro-batch its
loss, as a sum; of an evaluation its scores, from sums; and what all of it costs. Trainer, pace, watch, plan and resume
ask it and know no method themselves. Supervised fine-tuning (`causal_lm.py`) is the first; `preference.py` learns of
pairs.
Why sums: the loss of a step is the sum over all its rows divided once by their weights, so any split into micro-batches
and over processes trains the same.
A new method is a subclass of `Objective` in a file of this room; `preference.of` makes it of a recipe, and
`finetune.train(..., objective=...)` takes any. A row may be several texts (`Example.starts`), as a pair of answers is;
what a reference gives them comes with the row (`training/reference.py`).
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfbyte.data import pack
from halfbyte.data.collate import Batches
from halfbyte.data.encoding.encoder import EncodedRows
from halfbyte.data.encoding.examples import Example
from halfbyte.models import structure
from halfbyte.plan.job import ObjectiveCost
from halfbyte.types import Batch, Model

Sums = dict[str, float]
"""What an evaluation adds up over micro-batches and processes, by name."""


class Objective(Protocol):
    """A method of training. Everything that is summed may be split at will."""

    @property
    def name(self) -> str:
        """Kept in checkpoints: a run goes on with the objective that it began with."""

    @property
    def cost(self) -> ObjectiveCost:
        """What it takes beside a forward and a backward, for the plan."""

    @property
    def sum_names(self) -> tuple[str, ...]:
        """What an evaluation adds up, by name: first the loss, then what it counts for, then anything else."""

    def weights(self, rows: EncodedRows) -> pack.Weights:
        """What each row counts for in the mean of its step: (rows,), each above 0."""

    def collate(self, examples: Sequence[Example]) -> Batch:
        """The batch of some rows: `data.collate.collate`, and whatever else the loss reads of them."""

    def loss(self, model: Model, batch: Batch) -> Tensor:
        """The loss of a micro-batch in training, summed and not yet divided: a scalar, fp32, with its graph."""

    def weight(self, batch: Batch) -> float:
        """What the loss of a micro-batch counts for: the sum of the weights of its rows."""

    def text_sums(self, model: Model, batch: Batch) -> list[Sums]:
        """What an evaluation adds up, of each text of a micro-batch, without gradients."""

    def scores(self, sums: Sums) -> dict[str, float]:
        """The scores of an evaluation from the sums over all of its rows; `loss` is one of them."""

    # What an objective may say beside these. `collate_tree`, as `data.collate.collate_tree`, has no default: without it
    # rows do not share their beginnings.

    watches: ClassVar[tuple[str, ...]] = ()
    """Figures of a step by name: `loss` puts (sum, what it is of) of each into `batch["watched"]`, a dict, where there
    is one; they come into the step's row of the metrics as means."""
    of_base: ClassVar[str] = ""
    """Words on what the base is that a run is compared with, where that is not the model as it came."""
    together: ClassVar[bool] = False
    """Whether a text's sums of an evaluation depend on all others: they are those of `row_vectors` and `all_sums`."""

    def labels(self, rows: EncodedRows) -> NDArray[np.int64]:
        """How many labels of each row its loss is made of, for the plan."""
        return rows.labelled

    @property
    def step_names(self) -> tuple[str, ...]:
        """What the loss of a micro-batch must know of its whole step, by name: sums over its rows and all processes,
        in `batch["step"]`. A batch without it counts as a step of its own."""
        return ()

    def step_sums(self, model: Model, batches: Batches) -> Sums:
        """These sums, of this process's micro-batches, in eval mode and without gradients."""
        return {}

    @property
    def coupled(self) -> bool:
        """Whether a row's loss depends on the other rows themselves: then `step_of` makes `batch["step"]`."""
        return False

    def step_of(
        self, model: Model, parts: Iterable[tuple[pack.MicroBatch, Batch]],
        same: Callable[..., AbstractContextManager[None]], of_all: "OfAll",
    ) -> dict[int, tuple[float, Tensor]]:  # fmt: skip
        """What each row of this process's micro-batches must know, by its number. `same`: in which dropout is that of
        the loss; `of_all`: this process's rows to those of all."""
        return {}

    def row_vectors(self, model: Model, batch: Batch) -> list[Tensor]:
        """What is read of each row."""
        return []

    def all_sums(self, vectors: Sequence[Tensor], scores: Tensor) -> list[Sums]:
        """As `text_sums`, of all rows of an evaluation, from their vectors and `batch["targets"]`."""
        return []


def micro_batch_loss(objective: Objective, model: Model, batch: Batch) -> Tensor:
    """The objective's loss of a micro-batch, and the model's auxiliary loss where its config asks for one.

    That one keeps a mixture's experts evenly used: with `output_router_logits` a model adds `router_aux_loss_coef`
    times a loss of its routers' logits to the mean. It is the model's own function, over the tokens of a micro-batch,
    which counts by its weight. Evaluations leave it out, as it says nothing of the text.
    Source: Switch Transformers, arXiv:2101.03961, section 2.2; `load_balancing_loss_func` in transformers' models.
    Cost: E numbers a token and layer.

    Returns:
        The sum, a scalar in fp32.
    """
    lm = structure.causal_lm(model)
    function = _auxiliary_loss(lm)
    if function is None:
        return objective.loss(model, batch)
    routed: list[tuple[Tensor, ...]] = []
    body = structure.body(lm)
    asks = body.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "output_router_logits": True}), with_kwargs=True
    )
    reads = body.register_forward_hook(lambda module, args, output: routed.append(output.router_logits))
    try:
        summed = objective.loss(model, batch)
    finally:
        asks.remove()
        reads.remove()
    logits = tuple(each for each in routed[-1] if each is not None)
    tokens = batch["input_ids"].shape[1]
    mask = None
    if logits[0].shape[0] > tokens or "sharers" in batch:  # filled up by `packing.aligned`; counts of tokens
        sharers = batch.get("sharers", torch.ones(tokens, dtype=torch.int64))
        mask = torch.nn.functional.pad(sharers, (0, logits[0].shape[0] - tokens))[None].to(logits[0].device)
    config = lm.config.get_text_config()
    coefficient = next(getattr(config, name) for name in _COEFFICIENTS if hasattr(config, name))
    auxiliary: Tensor = function(logits, logits[0].shape[-1], config.num_experts_per_tok, mask)
    return summed + coefficient * objective.weight(batch) * auxiliary.to(summed.device)


_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


def _auxiliary_loss(lm: Model) -> Callable[..., Any] | None:
    """The model's own function; None where the config does not ask for it, or the model has none."""
    config = lm.config.get_text_config()
    if not getattr(config, "output_router_logits", False) or not any(hasattr(config, n) for n in _COEFFICIENTS):
        return None
    return getattr(sys.modules.get(type(lm).__module__), "load_balancing_loss_func", None)


OfAll = Callable[[Sequence[Tensor], Tensor], tuple[list[Tensor], Tensor, slice]]
"""Vectors and numbers of rows to those of all processes, as `distributed.step.of_all`."""


def evaluate(
    objective: Objective, model: Model, batches: Iterable[Batch], of_all: OfAll | None = None
) -> NDArray[np.float64]:
    """The sums of each text of an evaluation, (texts, names) in the order of `sum_names`; in eval mode, without
    gradients. The mode is put back. `of_all`: where each text's sums depend on those of other processes too."""
    from halfbyte.layers import fuse

    sums, names = list[Sums](), objective.sum_names
    with structure.evaluating(model), fuse.as_trained():
        if objective.together:
            parts = [(objective.row_vectors(model, batch), batch["targets"]) for batch in batches]
            vectors, ours = [vector for part, _ in parts for vector in part], slice(None)
            numbers = torch.cat([torch.empty(0), *(t for _, t in parts)])
            if of_all is not None:
                vectors, numbers, ours = of_all(vectors, numbers)
            sums = objective.all_sums(vectors, numbers)[ours] if vectors else []
        else:
            sums = [each for batch in batches for each in objective.text_sums(model, batch)]
    return np.array([[each[name] for name in names] for each in sums], np.float64).reshape(-1, len(names))


def scores_of(objective: Objective, rows: NDArray[np.float64]) -> dict[str, float]:
    """The scores of an evaluation from the sums of its rows or texts, as `evaluate` has them."""
    return objective.scores(dict(zip(objective.sum_names, rows.sum(0).tolist(), strict=True)))


def mean_scores(objective: Objective, model: Model, batches: Iterable[Batch]) -> dict[str, float]:
    return scores_of(objective, evaluate(objective, model, batches))

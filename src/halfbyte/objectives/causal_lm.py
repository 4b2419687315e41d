"""Supervised fine-tuning: cross-entropy of the next token, the mean over labelled tokens.

`layers.loss`, and PEFT with it, is imported where a loss is taken: `data check` takes none.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from halfbyte.data import collate, pack
from halfbyte.data.encoding.encoder import EncodedRows
from halfbyte.data.encoding.examples import Example
from halfbyte.objectives.objective import Objective, Sums
from halfbyte.plan.job import ObjectiveCost
from halfbyte.runs import points
from halfbyte.types import Batch, Model


@dataclass(frozen=True)
class CausalLM(Objective):
    label_smoothing: float = 0.0  # as `TrainingArguments.label_smoothing_factor`; evaluations are without

    name: ClassVar[str] = points.CAUSAL_LM
    cost: ClassVar[ObjectiveCost] = ObjectiveCost()
    sum_names: ClassVar[tuple[str, ...]] = ("loss", "labelled_tokens", "tokens")

    def weights(self, rows: EncodedRows) -> pack.Weights:
        return rows.label_weights

    def collate(self, examples: Sequence[Example]) -> Batch:
        return collate.collate(examples)

    def collate_tree(self, examples: Sequence[Example]) -> Batch:
        return collate.collate_tree(examples)

    def loss(self, model: Model, batch: Batch) -> Tensor:
        from halfbyte.layers import loss

        return loss.micro_batch_loss(model, batch, label_smoothing=self.label_smoothing)

    def weight(self, batch: Batch) -> float:
        return float(batch["counts"].sum()) if "counts" in batch else len(batch["targets"])

    def text_sums(self, model: Model, batch: Batch) -> list[Sums]:
        from halfbyte.layers import loss

        lengths = batch.get("text_lengths", batch["cu_seq_lens_q"].diff()).tolist()
        each = zip(loss.labels_of_texts(batch), loss.weights_of_texts(batch), strict=True)
        labelled = [len(batch["targets"][at]) if w is None else float(w.sum()) for at, w in each]
        texts = zip(loss.text_losses(model, batch), labelled, lengths, strict=True)
        return [{"loss": a, "labelled_tokens": b, "tokens": c} for a, b, c in texts]

    def scores(self, sums: Sums) -> dict[str, float]:
        """`loss` and `perplexity` of a labelled token; `labelled_tokens` (what they count for together, rounded), and
        `tokens`."""
        counts = {"labelled_tokens": round(sums["labelled_tokens"]), "tokens": int(sums["tokens"])}
        mean = sums["loss"] / (sums["labelled_tokens"] or 1)
        return {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), **counts}

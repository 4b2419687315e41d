"""Lay examples end to end as one padding-free batch, and offer planned steps to the Trainer.

Why: no padding is computed. `cu_seq_lens` and the restarting positions keep attention inside each example, and the
first label of each example is -100, so that no prediction crosses from one into the next.
Source: the keys of transformers' `DataCollatorWithFlattening(return_flash_attn_kwargs=True)`, and two more for a loss
that makes logits only where there is a label.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Self, TypedDict

import numpy as np
import torch
from torch.utils.data import Dataset

from halfbyte.data import pack, prefixes
from halfbyte.data.encoding.examples import IGNORED, Example
from halfbyte.types import Batch


def collate(examples: Sequence[Example]) -> Batch:
    """One batch of T tokens from n texts (a block of several counts as so many), K of the tokens predicted.

    Returns:
        input_ids, position_ids, labels: (1, T) int64. Labels are not shifted; -100 at the start of each text.
        cu_seq_lens_q, cu_seq_lens_k: (n + 1,) int32, where each text starts, and T.
        max_length_q, max_length_k: the longest text, as an int.
        keep: (K,) int64, the positions p whose next token is labelled.
        targets: (K,) int64, `labels[0, keep + 1]`.
        beginnings: (T,) int64, see `prefixes.beginnings`.
        counts, label_weights: (K,) fp32, what each label counts for; absent where each counts once.
    """
    lengths = [n for e in examples for n in e.pieces]
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)  # (n + 1,)
    input_ids = torch.tensor(list(chain.from_iterable(e.input_ids for e in examples)))  # (T,)
    labels = torch.tensor(list(chain.from_iterable(e.labels for e in examples)))  # (T,)
    labels[starts[:-1].long()] = IGNORED
    position_ids = torch.cat([torch.arange(n) for n in lengths])  # (T,)
    keep = (labels[1:] != IGNORED).nonzero().squeeze(1)  # (K,)
    weighed: Batch = {}
    if any(e.weights for e in examples):
        every = torch.tensor([w for e in examples for w in e.weights or (1.0,) * len(e.labels)])  # (T,)
        weighed = {"counts": every[keep + 1], "label_weights": every[keep + 1]}
    return weighed | {
        "input_ids": input_ids[None],  # (1, T)
        "position_ids": position_ids[None],
        "labels": labels[None],
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "keep": keep,
        "targets": labels[keep + 1],  # (K,)
        "beginnings": torch.from_numpy(prefixes.beginnings(input_ids.numpy(), position_ids.numpy())),
    }


def collate_tree(examples: Sequence[Example]) -> Batch:
    """The same with what texts have in common at their beginnings once (`prefixes.Tree`), as `types.Batch` has it; a
    plain batch where nothing is."""
    texts = [text for example in examples for text in example.texts]
    rows = [np.array(text.input_ids, np.uint32) for text in texts]
    tree = prefixes.Tree.of(rows)
    if not any(tree.shared):
        return collate(examples)
    segments, tokens = tree.segments(), 0
    places = [np.empty(length, np.int64) for length in tree.lengths]  # of each row's tokens in the pack
    for row, start, stop, _ in segments:
        if start == tree.shared[row]:  # its first one
            places[row][:start] = places[row - 1][:start]
        places[row][start:stop] = np.arange(tokens, tokens + stop - start)
        tokens += stop - start
    of_texts = [places[row] for row in np.argsort(tree.order)]  # in the order of the texts
    labels = [np.array(text.labels) for text in texts]
    labelled = [np.flatnonzero(row[1:] != IGNORED) for row in labels]  # the token before each label
    every = np.concatenate([place[at] for place, at in zip(of_texts, labelled, strict=True)])
    tokens_of = np.concatenate([row[1:][at] for row, at in zip(labels, labelled, strict=True)])
    weights = [np.array(text.weights or (1.0,) * len(text.labels))[1:] for text in texts]
    of_labels = np.concatenate([row[at] for row, at in zip(weights, labelled, strict=True)])
    keep, first, label_of = np.unique(every, return_index=True, return_inverse=True)
    weighed: Batch = {"label_weights": torch.from_numpy(of_labels).float()} if any(e.weights for e in examples) else {}
    positions = np.concatenate([np.arange(len(row)) for row in rows])
    everywhere, ids = np.concatenate(of_texts), np.concatenate(rows).astype(np.int64)
    packed = np.empty((3, tokens), np.int64)
    packed[:, everywhere] = ids, positions, prefixes.beginnings(ids, positions)
    starts = torch.tensor([0, *accumulate(stop - start for _, start, stop, _ in segments)], dtype=torch.int32)
    input_ids, position_ids, beginnings = torch.from_numpy(packed)
    return weighed | {
        "input_ids": input_ids[None],
        "position_ids": position_ids[None],
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": max(tree.lengths),
        "max_length_k": max(tree.lengths),
        "keep": torch.from_numpy(keep),
        "targets": torch.from_numpy(tokens_of[first]),
        "beginnings": beginnings,
        "levels": torch.tensor([level for *_, level in segments]),
        "counts": torch.from_numpy(np.bincount(label_of, of_labels)).float(),
        "label_of": torch.from_numpy(label_of),
        "label_starts": torch.tensor([0, *accumulate(map(len, labelled))]),
        "text_lengths": torch.tensor([*map(len, rows)]),
        "sharers": torch.from_numpy(np.bincount(everywhere)),
    }


def collate_texts(examples: Sequence[Example]) -> Batch:
    """The batch of texts that are read whole: `keep` is each one's last token (`starts` of an example say where its
    texts begin); `targets` are zeros, (n,). `token_types` (1, T): 1 in the second text of a pair."""
    batch = collate(examples)
    batch["keep"] = batch["cu_seq_lens_q"][1:].long() - 1
    batch["targets"] = torch.zeros_like(batch["keep"])
    begins = batch["labels"][0] != IGNORED  # of a pair's second text, beside the last token
    begins[batch["keep"]] = False
    if bool(begins.any()):
        starts, seconds = batch["cu_seq_lens_q"].long(), begins.cumsum(0)
        before = (seconds - begins.long())[starts[:-1]].repeat_interleave(starts.diff())
        batch["token_types"] = (seconds - before).clamp_max(1)[None]
    return batch


@dataclass(frozen=True)
class Batches:
    """The batches of a step's micro-batches, or of an evaluation's (`pack.eval_micro_batches`), one after another."""

    examples: Sequence[Example]
    micro_batches: Sequence[pack.MicroBatch]
    lay_out: Callable[[Sequence[Example]], Batch] = collate

    def __len__(self) -> int:
        return len(self.micro_batches)

    def __iter__(self) -> Iterator[Batch]:
        return map(self.of, self.micro_batches)

    @classmethod
    def of_rows(cls, examples: Sequence[Example], tokens: int, most: int, *, shares: bool = False) -> Self:
        """All rows once, for an evaluation, in micro-batches of at most `tokens` and `most` rows. `shares`: what rows
        have in common at their beginnings is computed once."""
        rows = [np.array(e.input_ids, np.uint32) for e in examples]
        ids = rows.__getitem__ if shares else None
        planned = pack.eval_micro_batches([*map(len, rows)], tokens, most, ids)
        return cls(examples, planned, collate_tree if shares else collate)

    @property
    def text_rows(self) -> list[int]:
        """The row of each text, one micro-batch after another."""
        return [row for rows in self.micro_batches for row in rows for _ in self.examples[row].pieces]

    def of(self, rows: Sequence[int]) -> Batch:
        """The batch of other rows of the same examples: a step may be split anew while it runs."""
        return {**self.lay_out([self.examples[r] for r in rows]), "row_numbers": tuple(rows)}


class StepItem(TypedDict):
    step: pack.Step
    micro_batches: Batches


@dataclass(eq=False)
class StepDataset(Dataset[StepItem]):
    """Item i is optimiser step i and its micro-batches, each made when it is asked for. `arranged`: False where rows
    are known when the step begins, and arranged then."""

    examples: Sequence[Example]
    steps: pack.Steps
    lay_out: Callable[[Sequence[Example]], Batch] = collate
    arranged: bool = True

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> StepItem:
        step = self.steps[index] if self.arranged else pack.Step(index, (), 0, 0, 0.0, 0)
        return {"step": step, "micro_batches": Batches(self.examples, step.micro_batches, self.lay_out)}

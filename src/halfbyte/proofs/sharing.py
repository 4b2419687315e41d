"""The proof at start that rows which share their beginnings learn what each learns alone, on the user's own model.

What: some rows, the run's own, every token labelled: the loss of each and the gradients of every adapter, as a tree
(`data/prefixes.py`) and each row in a micro-batch of its own. In fp32 they must agree to 1e-3; in a 16-bit dtype the
tree's gradients must come as near to the truth, the fp32 ones, as those of the rows alone do (`fusing.py`). Where that
fails, rows share nothing, and it is said.
Why: a rest that sees its sibling, a position that is off by one, a label that counts once, a gradient that misses a
rest: each trains under a healthy loss curve.
Cost: a few micro-batches of at most `MOST` tokens through the first layers, forward and backward.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from weakref import WeakKeyDictionary

import numpy as np
import torch

from halfbyte.data import collate, prefixes
from halfbyte.data.encoding.examples import IGNORED, Example
from halfbyte.layers import attention, loss, packing, recurrent
from halfbyte.layers.experts.layout import is_routed
from halfbyte.models import structure
from halfbyte.proofs import setting
from halfbyte.proofs.fusing import gradient_fault, random_b
from halfbyte.proofs.memory import RememberedProofs
from halfbyte.proofs.setting import Gradients, StartProof
from halfbyte.types import Batch, Model

MOST = 1024  # tokens of the rows together
LOOKED_AT = 512  # rows
REST = 24  # tokens of each that are not shared
# ||difference|| / ||losses|| of the rows, in fp32 and in 16 bits
LOSSES, LOSSES_16 = 1e-5, 2e-2


def prove_sharing(model: Model, rows: Sequence[Example], memory: RememberedProofs | None = None) -> StartProof:
    """Compare some rows as a tree with each alone. The model is as before afterwards.

    Args:
        model: with its adapters, after `prove_fused`. Of one that does not train the losses alone are compared.
        rows: of one text each, of which at least two begin alike.
        memory: of proofs that need not be made again.
    """
    if memory is not None:
        name = hashlib.sha256(repr([(row.input_ids, row.labels) for row in rows]).encode()).hexdigest()
        return memory.recall(name) or memory.keep(name, prove_sharing(model, rows))
    if packing.installed(model) != "cu_seq_lens":
        return StartProof(False, "beginnings are not shared: this model takes no texts by their lengths", math.inf)
    if recurrent.chunk_of(structure.body(structure.causal_lm(model))):
        return StartProof(False, "beginnings are not shared: this model's recurrent layers carry a state", math.inf)
    within = structure.shallow(model), setting.as_given(model), random_b(model)
    problem, difference = setting.attempt(partial(_compare, model, rows), *within)
    if problem:
        return StartProof(False, f"beginnings are not shared: {problem}", difference)
    return StartProof(True, f"{len(rows)} rows that begin alike = each alone, to {difference:.1e}", difference)


_PROVEN: WeakKeyDictionary[Model, bool] = WeakKeyDictionary()


def shares(model: Model, rows: Sequence[Example], memory: RememberedProofs | None = None) -> bool:
    """Whether rows share their beginnings outside of a run: some of them begin alike, and it is proven on this model,
    by the first rows that do."""
    lm, looked_at = structure.causal_lm(model), rows[:LOOKED_AT]
    if lm.device.type != "cpu" or len(looked_at) < 2 or any(len(row.starts) > 1 for row in looked_at):
        return False
    tree = prefixes.Tree.of([np.array(row.input_ids, np.uint32) for row in looked_at])
    if not any(tree.shared):
        return False
    if lm not in _PROVEN:
        _PROVEN[lm] = prove_sharing(model, [rows[place] for place in tree.alike()], memory).ok
    return _PROVEN[lm]


def cut(rows: Sequence[Example], most: int) -> list[Example]:
    """The rows with at most `REST` tokens behind what any two of them share, and as much before as can be afforded."""
    tree = prefixes.Tree.of([np.array(row.input_ids, np.uint32) for row in rows])
    least, top = min((s for s in tree.shared if s), default=0), max(tree.shared)
    before = max(2 * prefixes.LEAST, min(most, MOST) - len(rows) * (top - least + REST))
    first = max(0, least - before)
    return [replace(row, input_ids=row.input_ids[first : top + REST]) for row in rows]


def _compare(model: Model, rows: Sequence[Example]) -> tuple[str, float]:
    """(what is wrong or nothing, the relative difference in fp32)."""
    rows = cut(rows, setting.affordable_tokens(model))
    lm, trains = structure.causal_lm(model), any(p.requires_grad for p in model.parameters())
    truth: Gradients | None = None
    difference = 0.0
    for exact in setting.precisions(model):
        with setting.few_tokens(model, exact=exact):
            texts = [tuple(token % setting.tokens_of(lm) for token in row.input_ids) for row in rows]
            examples = [Example(ids, (IGNORED, *ids[1:])) for ids in texts]
            tree, alone = collate.collate_tree(examples), [collate.collate([each]) for each in examples]
            if "levels" not in tree:
                return "these rows have nothing in common", math.inf
            with attention.in_two_pieces(tree["cu_seq_lens_q"].diff().tolist(), tree["levels"].tolist()):
                got = _losses(model, [tree])
                shared = setting.loss_and_gradients(model, [tree])[1] if trains else {}
            wanted = _losses(model, alone)
            off = float(torch.linalg.vector_norm(got - wanted) / torch.linalg.vector_norm(wanted))
            allowed = LOSSES if exact else setting.ROUTED if is_routed(model) else LOSSES_16
            if not off <= allowed:
                return f"losses differ by {off:.1e} (allowed {allowed:.1e})", off
            difference = difference or off
            if not trains:
                continue
            _, each = setting.loss_and_gradients(model, alone)
        problem, off = gradient_fault(model, shared, each, truth, exact=exact)
        if problem or set(shared) != set(each):
            return problem or "some adapters got no gradient", off
        truth, difference = truth or each, off if truth is None else difference
    return "", difference


def _losses(model: Model, batches: Sequence[Batch]) -> torch.Tensor:
    """The loss of each row: (rows,), as an evaluation has it."""
    model.eval()
    return torch.tensor([each for batch in batches for each in loss.text_losses(model, batch)])

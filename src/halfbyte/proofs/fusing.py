"""The proof at start that the fused layers learn what PEFT's own forward learns, on the user's own model.

What: the gradients of every adapter on a few short examples (and a long row, see `setting.py`), three times: by
PEFT's and transformers' own code on each example alone, fused and packed, and so again after an evaluation. In fp32
the first two must agree to 1e-3 and the last two to the bit (on a card to 1e-3, as some of its kernels add in the order
in which threads end), and no adapter may be without a gradient. The kernels of a 16-bit dtype are others, so there the
fused gradients must come as near to the truth, the fp32 gradients, as PEFT's own do.
Where that fails the fused layers are taken off again, and it is said.
Why: a wrong gradient under a healthy loss curve is the worst bug of this trade; this is the cheapest place to see it.
Cost: five micro-batches of 15 tokens forward and backward, or of a long row.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from halfbyte.layers import fuse, packing
from halfbyte.layers.experts.layout import is_routed
from halfbyte.models import structure
from halfbyte.proofs import setting
from halfbyte.proofs.closeness import distance
from halfbyte.proofs.setting import Gradients, StartProof, labelled, loss_and_gradients
from halfbyte.types import Model

# ||fused - PEFT's|| / ||PEFT's|| over all adapters' gradients together. Measured in fp32: 2e-6.
TOLERANCE = 1e-3
# In 16 bits: distance from the truth against that of PEFT's own gradients (0.01 to 0.09), which round in another order.
NEAR, SLACK = 2.0, 0.01
# Where fp32 cannot be afforded: ||fused - PEFT's|| / ||PEFT's|| in 16 bits.
ROUGH = 0.3


def prove_fused(model: Model, *, packed: bool, longest: int | None = None) -> StartProof:
    """Put the fused layers on, compare, and take them off again if they are wrong.

    Args:
        model: with its adapters, after `prove_packing`. Modes, gradients, weights and the random state are as before
            afterwards.
        packed: whether micro-batches hold several examples.
        longest: tokens of the longest row of the run, where it is known.
    """
    fuse.install(model)
    if not any(p.requires_grad for p in model.parameters()):
        return StartProof(True, "nothing trains")
    compare = partial(_compare, model, packed=packed, longest=longest)
    problem, difference = setting.attempt(compare, setting.as_given(model), random_b(model))
    if problem:
        fuse.remove(model)
        return StartProof(False, f"PEFT's own forward: {problem}", difference)
    fuse.install(model)
    return StartProof(True, f"gradients as PEFT's to {difference:.1e}", difference)


def sample_gradients(model: Model, *, packed: bool) -> Gradients:
    """The gradients of every adapter on the proof's examples, with dropout off; the model is as before afterwards. For
    comparing two ways to run one model, to the bit."""
    with setting.as_given(model), random_b(model):
        lengths = setting.short_lengths(packed=packed)
        batch = labelled(setting.random_examples(structure.causal_lm(model), lengths))
        return loss_and_gradients(model, [batch])[1]


def _compare(model: Model, *, packed: bool, longest: int | None) -> tuple[str, float]:
    """(what is wrong or nothing, the relative difference of the gradients)."""
    lm = structure.causal_lm(model)
    long, _ = setting.long_row(lm, longest) if packed else (0, "")
    layout = packing.installed(lm)
    lengths = setting.short_lengths(packed=packed)
    # with a long row among them, examples take another way through attention
    packs = [setting.random_examples(lm, each) for each in (lengths, (*lengths, long))[: 2 if long else 1]]
    together = [labelled(examples) for examples in packs]
    alone = [labelled([ids]) for examples in packs for ids in examples]
    truth: Gradients | None = None
    difference = 0.0
    for exact in setting.precisions(model):
        with setting.few_tokens(model, exact=exact):
            fuse.install(model)
            _, ours = loss_and_gradients(model, together)
            with torch.no_grad():
                setting.micro_batch_loss(model, together[0])
            _, again = loss_and_gradients(model, together)
            fuse.remove(model)
            packing.install(lm, "single")
            try:
                _, pefts = loss_and_gradients(model, alone, loss=partial(setting.micro_batch_loss, fused=False))
            finally:
                packing.install(lm, layout)
        dead = sorted(set(pefts) - set(ours)) + sorted(set(pefts) - set(again))
        if dead:
            return f"{len(dead)} adapters got no gradient, {dead[0]} for one", math.inf
        moved = [n for n in ours if not torch.equal(ours[n], again[n])]
        if moved and lm.device.type != "cpu" and distance(again, ours) <= (TOLERANCE if exact else SLACK):
            moved = []
        if moved:
            return f"an evaluation changes the gradients of {len(moved)} adapters, {moved[0]} for one", math.inf
        problem, off = gradient_fault(model, ours, pefts, truth, exact=exact)
        if problem:
            return problem, off
        truth, difference = truth or pefts, difference or off
    return "", difference


def gradient_fault(
    model: Model, got: Gradients, slow: Gradients, truth: Gradients | None, *, exact: bool
) -> tuple[str, float]:
    """(what is wrong with the gradients of the fast way or nothing, how far they are from the `truth`). `slow`: those
    of the slow way, which are the truth in fp32; `truth` None: not known yet."""
    off, slack = distance(got, truth or slow), setting.ROUTED if is_routed(model) else SLACK
    allowed = TOLERANCE if exact else NEAR * distance(slow, truth) + slack if truth else ROUGH
    return "" if off <= allowed else f"gradients differ by {off:.1e} (allowed {allowed:.1e})", off


@contextmanager
def random_b(model: Model) -> Iterator[None]:
    """LoRA's B is 0 at first, and then A's gradient is 0 whatever the code does: give B numbers for the moment."""
    generator = torch.Generator().manual_seed(1)
    parts = [b.weight for m in model.modules() if isinstance(m, LoraLayer) for b in m.lora_B.values()]
    changes = list[tuple[object, str, object]]()
    for p in (p for p in parts if isinstance(p, nn.Parameter)):
        noise = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
        changes.append((p, "data", p.data + noise / p.shape[1] ** 0.5 * 0.1))
    with structure.replaced(*changes):
        yield

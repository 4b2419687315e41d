"""The proof at start that the fused layers learn what PEFT's own forward learns, on the user's own model.

What: the gradients of every adapter on a few short examples (and a long row, see `packing_proof.py`), three times: by
PEFT's and transformers' own code on each example alone, fused and packed, and so again after an evaluation. In fp32
the first two must agree to 1e-3 and the last two to the bit (on a card to 1e-3, as some of its kernels add in the order
in which threads end), and no adapter may be without a gradient. The kernels of a 16-bit dtype are others, so there the
fused gradients must come as near to the truth, the fp32 gradients, as PEFT's own do.
Where that fails the fused layers are taken off again, and it is said.
Why: a wrong gradient under a healthy loss curve is the worst bug of this trade; this is the cheapest place to see it.
Cost: five micro-batches of 15 tokens forward and backward, or of a long row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from halfbyte.errors import first_line
from halfbyte.layers import fuse, loss, packing, packing_proof
from halfbyte.layers.experts.layout import is_routed
from halfbyte.models import structure

if TYPE_CHECKING:
    from halfbyte.types import Batch, Model

Gradients = dict[str, Tensor]
# ||fused - own|| / ||own|| over all adapters' gradients together. Measured in fp32: 2e-6.
TOLERANCE = 1e-3
# In 16 bits: distance from the truth against that of PEFT's own gradients (0.01 to 0.09), which round in another order.
NEAR, SLACK = 2.0, 0.01
# Where fp32 cannot be afforded: ||fused - own|| / ||own|| in 16 bits.
ROUGH = 0.3


@dataclass(frozen=True)
class FusedProof:
    """`ok`: the fused layers are on the model. `difference` is that of the gradients; `reason` says it in words."""

    ok: bool
    reason: str
    difference: float


def prove_fused(model: Model, *, packed: bool, longest: int | None = None) -> FusedProof:
    """Put the fused layers on, compare, and take them off again if they are wrong.

    Args:
        model: with its adapters, after `packing_proof.prove`. Modes, gradients, weights and the random state are as
            before afterwards.
        packed: whether micro-batches hold several examples.
        longest: tokens of the longest row of the run, where it is known.
    """
    fuse.install(model)
    if not any(p.requires_grad for p in model.parameters()):
        return FusedProof(True, "nothing trains", 0.0)
    try:
        with packing_proof.as_given(model), _trained_apart(model):
            problem, difference = _compare(model, packed=packed, longest=longest)
    except Exception as error:  # of any kind, from the model's code or ours; the repair: the model's own forward
        problem, difference = f"{type(error).__name__}: {first_line(error)}", float("inf")
    if problem:
        fuse.remove(model)
        return FusedProof(False, f"PEFT's own forward: {problem}", difference)
    fuse.install(model)
    return FusedProof(True, f"gradients as PEFT's to {difference:.1e}", difference)


def sample_gradients(model: Model, *, packed: bool) -> Gradients:
    """The gradients of every adapter on the proof's examples, with dropout off; the model is as before afterwards.

    For comparing two ways to run one model, to the bit.
    """
    with packing_proof.as_given(model), _trained_apart(model):
        lengths = packing_proof.SHORT if packed else packing_proof.SHORT[-1:]
        return _gradients(model, [packing_proof.random_examples(structure.causal_lm(model), lengths)])


def _compare(model: Model, *, packed: bool, longest: int | None) -> tuple[str, float]:
    """(what is wrong or nothing, the relative difference of the gradients)."""
    lm = structure.causal_lm(model)
    long, _ = packing_proof.long_row(lm, longest) if packed else (0, "")
    layout = packing.installed(lm)
    lengths = packing_proof.SHORT if packed else packing_proof.SHORT[-1:]
    # with a long row among them, examples take another way through attention
    packs = [packing_proof.random_examples(lm, each) for each in (lengths, (*lengths, long))[: 2 if long else 1]]
    truth: Gradients | None = None
    difference = 0.0
    for exact in packing_proof.precisions(model):
        with packing_proof.few_tokens(model, exact=exact):
            fuse.install(model)
            got = _gradients(model, packs)
            with torch.no_grad():
                loss.micro_batch_loss(model, labelled(packs[0]))
            again = _gradients(model, packs)
            fuse.remove(model)
            packing.install(lm, "single")
            try:
                own = _gradients(model, [[ids] for pack in packs for ids in pack], fused=False)
            finally:
                packing.install(lm, layout)
        dead = sorted(set(own) - set(got)) + sorted(set(own) - set(again))
        if dead:
            return f"{len(dead)} adapters got no gradient, {dead[0]} for one", float("inf")
        moved = [n for n in got if not torch.equal(got[n], again[n])]
        if moved and lm.device.type != "cpu" and _apart(again, got) <= (TOLERANCE if exact else SLACK):
            moved = []
        if moved:
            return f"an evaluation changes the gradients of {len(moved)} adapters, {moved[0]} for one", float("inf")
        off = _apart(got, truth or own)
        slack = packing_proof.ROUTED if is_routed(model) else SLACK
        allowed = TOLERANCE if exact else NEAR * _apart(own, truth) + slack if truth else ROUGH
        if not off <= allowed:
            return f"gradients differ by {off:.1e} (allowed {allowed:.1e})", off
        truth, difference = truth or own, difference or off
    return "", difference


def _apart(got: Gradients, wanted: Gradients) -> float:
    """||got - wanted|| / ||wanted|| over all tensors together."""
    off = sum(float((got[n].double() - wanted[n].double()).square().sum()) for n in wanted) ** 0.5
    return float(off / max(sum(float(g.double().square().sum()) for g in wanted.values()) ** 0.5, 1e-30))


def _gradients(model: Model, packs: list[list[Tensor]], *, fused: bool = True) -> Gradients:
    """The gradient of every trained tensor on some packs of examples, with dropout off.

    By `autograd.grad`, which leaves `.grad` alone and calls no hook that waits for it (of DDP, for one).
    """
    model.eval()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    batches = [labelled(pack) for pack in packs]
    summed = sum(loss.micro_batch_loss(model, batch, fused=fused) for batch in batches if len(batch["keep"]))
    grads = torch.autograd.grad(summed, list(trained.values()), allow_unused=True)
    return {n: g for n, g in zip(trained, grads, strict=True) if g is not None}


def labelled(examples: list[Tensor]) -> Batch:
    """A micro-batch of these examples; the first two tokens of each are not labelled."""
    batch = packing_proof.pack(examples)
    batch["keep"] = (batch["position_ids"][0, 1:] > 1).nonzero().squeeze(1)
    batch["targets"] = batch["input_ids"][0][batch["keep"] + 1]
    return batch


@contextmanager
def _trained_apart(model: Model) -> Iterator[None]:
    """LoRA's B is 0 at first, and then A's gradient is 0 whatever the code does: give B numbers for the moment."""
    from peft.tuners.lora import LoraLayer

    generator = torch.Generator().manual_seed(1)
    parts = [b.weight for m in model.modules() if isinstance(m, LoraLayer) for b in m.lora_B.values()]
    saved = [(p, p.detach().clone()) for p in parts if isinstance(p, nn.Parameter)]
    try:
        for p, before in saved:
            noise = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
            p.data.copy_(before + noise / p.shape[1] ** 0.5 * 0.1)
        yield
    finally:
        for p, before in saved:
            p.data.copy_(before)

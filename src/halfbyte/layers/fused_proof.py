"""The proof at start that the fused layers learn what PEFT's own forward learns, on the user's own model.

What: the gradients of every adapter on two short examples, three times: by PEFT's and transformers' own code, fused,
and fused again after an evaluation. The first two must agree as closely as the dtype allows, the last two to the bit,
and no adapter may be without a gradient. Where that fails the fused layers are taken off again, and it is said.
Why: a wrong gradient under a healthy loss curve is the worst bug of this trade; this is the cheapest place to see it.
Cost: three micro-batches of 14 tokens forward and backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.errors import first_line
from halfbyte.layers import fuse, loss
from halfbyte.models import structure

_LENGTHS = (9, 5)
# ||fused - own|| / ||own|| over all adapters' gradients together. Measured: fp32 2e-6; bf16 0.01 to 0.09, which is the
# rounding of two orders of the same sums. A layer that is wrong (a lost scale, a mask of its own) gives 0.3 and more.
_TOLERANCE = {torch.bfloat16: 0.3, torch.float16: 0.3, torch.float32: 1e-3, torch.float64: 1e-3}


@dataclass(frozen=True)
class FusedProof:
    """`ok`: the fused layers are on the model. `difference` is that of the gradients; `reason` says it in words."""

    ok: bool
    reason: str
    difference: float


def prove_fused(model: Any, *, packed: bool) -> FusedProof:
    """Put the fused layers on, compare, and take them off again if they are wrong.

    Args:
        model: with its adapters, after `packing.prove`.
        packed: whether micro-batches hold several examples.
    """
    fuse.install(model)
    if not any(p.requires_grad for p in model.parameters()):
        return FusedProof(True, "nothing trains", 0.0)
    try:
        with _as_given(model), _trained_apart(model):
            batch = _batch(model, packed=packed)
            got = _gradients(model, batch)
            with torch.no_grad():
                model.eval()
                loss.micro_batch_loss(model, batch)
            again = _gradients(model, batch)
            fuse.remove(model)
            own = _gradients(model, batch, fused=False)
        problem, difference = _compare(own, got, again, next(iter(own.values())).dtype, _compute_dtype(model))
    except Exception as error:  # of any kind, from the model's code or ours; the repair: the model's own forward
        problem, difference = f"{type(error).__name__}: {first_line(error)}", float("inf")
    if problem:
        fuse.remove(model)
        return FusedProof(False, f"PEFT's own forward: {problem}", difference)
    fuse.install(model)
    return FusedProof(True, f"gradients as PEFT's to {difference:.1e}", difference)


def sample_gradients(model: Any, *, packed: bool) -> dict[str, Tensor]:
    """The gradients of every adapter on the proof's examples, with dropout off; the model is as before afterwards.

    For comparing two ways to run one model, to the bit.
    """
    with _as_given(model), _trained_apart(model):
        return _gradients(model, _batch(model, packed=packed))


def _compute_dtype(model: Any) -> torch.dtype:
    dtype: torch.dtype = structure.causal_lm(model).dtype
    return dtype


def _compare(
    own: dict[str, Tensor], got: dict[str, Tensor], again: dict[str, Tensor], master: torch.dtype, dtype: torch.dtype
) -> tuple[str, float]:
    dead = sorted(set(own) - set(got)) + sorted(set(own) - set(again))
    if dead:
        return f"{len(dead)} adapters got no gradient, {dead[0]} for one", float("inf")
    moved = [n for n in got if not torch.equal(got[n], again[n])]
    if moved:
        return f"an evaluation changes the gradients of {len(moved)} adapters, {moved[0]} for one", float("inf")
    apart = sum(float((got[n].double() - own[n].double()).square().sum()) for n in own) ** 0.5
    size = sum(float(own[n].double().square().sum()) for n in own) ** 0.5
    difference = apart / max(size, 1e-30)
    allowed = _TOLERANCE.get(dtype, 0.3)
    if not difference <= allowed:
        return f"gradients differ by {difference:.1e} (allowed {allowed:.0e})", difference
    return "", difference


def _gradients(model: Any, batch: dict[str, Any], *, fused: bool = True) -> dict[str, Tensor]:
    """The gradient of every trained tensor, with dropout off. What a model drops by a call of its own (attention scores
    of GPT-2) is drawn from one seed, so that each way drops the same."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.training = False
    cards = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(cards)):
        torch.manual_seed(0)
        loss.micro_batch_loss(model, batch, fused=fused).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    return found


def _batch(model: Any, *, packed: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = structure.causal_lm(model).config.get_text_config().vocab_size
    lengths = torch.tensor(_LENGTHS if packed else _LENGTHS[:1])
    total = int(lengths.sum())
    ids = torch.randint(vocabulary, (total,), generator=generator)
    starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    ends = set((starts[1:] - 1).tolist())
    keep = torch.tensor([i for i in range(2, total) if i not in ends])
    return {
        "input_ids": ids[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths.tolist()])[None],
        "cu_seq_lens_q": starts.int(),
        "keep": keep,
        "targets": ids[keep + 1],
    }


@contextmanager
def _as_given(model: Any) -> Iterator[None]:
    """Modes, gradients and the random state as they were before."""
    training = {m: m.training for m in model.modules()}
    state = torch.random.get_rng_state()
    try:
        yield
    finally:
        torch.random.set_rng_state(state)
        for module, mode in training.items():
            module.training = mode
        for parameter in model.parameters():
            parameter.grad = None


@contextmanager
def _trained_apart(model: Any) -> Iterator[None]:
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

"""Whether a model's frozen products may be computed in 8-bit integers: proven on its own rows, all of its layers.

What: loss and gradients of some rows, by exact products and by integer ones (`layers/kernels/cpu/integer`). If they
are within the bounds below, integers are taken for both products; if not, for the input gradient alone, which costs
next to nothing in gradients; if not even that, for none.
Why on all layers: rounding adds up with depth, and outliers sit in the middle of a model, where a proof on the first
layers does not look. Why these bounds: a gradient that is off by a quarter of its length still points within 15 degrees
of its own direction, and other rows move it by more than its whole length; what is seen with integers decides nothing
else, as evaluations and answers are exact (docs/log.md).
Cost: a forward and a backward of up to `TOKENS` tokens, two or three times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from halfbyte.data import pack
from halfbyte.errors import AdapterError
from halfbyte.layers import fuse, loss, packing_proof
from halfbyte.layers.kernels.cpu.integer import products as integer
from halfbyte.layers.kernels.cpu.integer.products import Products
from halfbyte.models import structure
from halfbyte.quant import dequantise

if TYPE_CHECKING:
    from halfbyte.types import Batch, Document, Model

TOKENS = 512
# ||integer - exact|| / ||exact|| of the gradients of all adapters, and of those of one kind of layer; and of the loss.
GRADIENTS, KIND, LOSS = 0.25, 0.35, 0.01
BOTH, BACKWARD = Products(), Products(forward=False)


@dataclass(frozen=True)
class Seen:
    """How far integer products are from exact ones: gradients of all adapters, the worst kind of layer and which that
    is, and the loss, all relative."""

    gradients: float
    kind: float
    worst: str
    loss: float

    @property
    def ok(self) -> bool:
        return self.gradients <= GRADIENTS and self.kind <= KIND and abs(self.loss) <= LOSS

    def __str__(self) -> str:
        return (
            f"gradients differ by {self.gradients:.3f} (at most {GRADIENTS}), of {self.worst} by {self.kind:.3f} (at "
            f"most {KIND}), the loss by {abs(self.loss):.2%} (at most {LOSS:.0%})"
        )


@dataclass(frozen=True)
class Decision:
    """Which products are integer ones (None: all are exact), why, and what was seen of each choice that was tried."""

    products: Products | None
    reason: str
    seen: tuple[tuple[Products, Seen], ...] = ()

    def __str__(self) -> str:
        return f"{'exact' if self.products is None else 'int8'}: {self.reason}"

    def to_json(self) -> Document:
        tried = [{"products": str(p), "ok": s.ok, **vars(s)} for p, s in self.seen]
        return {"products": str(self.products or "exact"), "reason": self.reason, "tried": tried}


def decide(model: Model, asked: str, batch: Batch) -> Decision:
    """Set how a model's frozen products are computed from now on, in training; the proof leaves all else as it was.

    Args:
        model: with its adapters, fused (`adapters/assembly.py`), where it will be trained.
        asked: `quant.compute`: auto, exact or int8, which is taken whatever the proof says.
        batch: some rows, at least one token of them labelled.

    Raises:
        AdapterError: int8 is asked for and cannot be computed.
    """
    layers = fuse.frozen_layers(model)
    integer.ask(layers, None)
    if asked == "exact":
        return Decision(None, "as the recipe says")
    if problem := _why_not(model, layers):
        if asked == "int8":
            raise AdapterError(
                f"quant.compute int8 is not possible: {problem}.",
                fix="--set quant.compute=auto takes it where it can be had",
            )
        return Decision(None, f"int8 is not possible: {problem}")
    times = integer.times_as_fast(structure.causal_lm(model).dtype)
    fast = f"this machine multiplies int8 {times:.1f} times as fast"
    if asked == "auto" and times < integer.PAYS:
        return Decision(None, f"{fast}, and below {integer.PAYS} rounding does not pay")
    seen: list[tuple[Products, Seen]] = []
    exact = loss_and_gradients(model, batch)
    for products in (BOTH, BACKWARD)[: 1 if asked == "int8" else 2]:
        integer.ask(layers, products)
        seen.append((products, compared(exact, loss_and_gradients(model, batch))))
        if seen[-1][1].ok or asked == "int8":
            break
    else:
        integer.ask(layers, None)
        return Decision(None, f"int8 is too rough for this model: {seen[-1][1]}", tuple(seen))
    dequantise.forget()  # a whole weight, which only exact products need
    products, found = seen[-1]
    before = f"; not forward: {seen[0][1]}" if len(seen) > 1 else ""
    why = "asked, whatever is seen" if asked == "int8" else fast
    return Decision(products, f"{products} of {len(layers)} layers; {why}; {found}{before}", tuple(seen))


def rows_for_proof(step: pack.Step, lengths: pack.Sizes, *, packed: bool) -> list[int]:
    """Rows of a step that hold at most `TOKENS` tokens together, the shortest ones; at least one, and where packing is
    not proven no more."""
    rows = sorted((row for rows in step.micro_batches for row in rows), key=lambda row: int(lengths[row]))
    total, chosen = 0, list[int]()
    for row in rows:
        total += int(lengths[row])
        if chosen and (total > TOKENS or not packed):
            break
        chosen.append(row)
    return chosen


def _why_not(model: Model, layers: Sequence[object]) -> str:
    if structure.causal_lm(model).device.type != "cpu":
        return "it is for CPUs"
    if not layers:
        return "no layer runs the fused forward"
    return integer.why_not()


def loss_and_gradients(model: Model, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    """Of a micro-batch, without dropout; every mode, `.grad` and the random state are as before afterwards."""
    with packing_proof.as_given(model), torch.enable_grad():
        model.eval()
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        summed = loss.micro_batch_loss(model, batch)
        grads = torch.autograd.grad(summed, list(trained.values()), allow_unused=True)
    return float(summed.detach()), {n: g for n, g in zip(trained, grads, strict=True) if g is not None}


def compared(exact: tuple[float, dict[str, Tensor]], got: tuple[float, dict[str, Tensor]]) -> Seen:
    """How far `got` is from `exact`; what is not finite is infinitely far."""
    kinds: dict[str, list[float]] = {}
    for name, wanted in exact[1].items():
        off, size = kinds.setdefault(kind_of(name), [0.0, 0.0])
        have = got[1].get(name)
        away = float("inf") if have is None else float((have.double() - wanted.double()).square().sum())
        kinds[kind_of(name)] = [off + away, size + float(wanted.double().square().sum())]
    apart = {kind: _share(off, size) for kind, (off, size) in kinds.items()}
    worst = max(apart, key=lambda kind: apart[kind], default="none")
    total = _share(sum(off for off, _ in kinds.values()), sum(size for _, size in kinds.values()))
    loss_off = (got[0] - exact[0]) / max(abs(exact[0]), 1e-30)
    return Seen(total, apart.get(worst, 0.0), worst, loss_off if loss_off == loss_off else float("inf"))


def _share(off: float, size: float) -> float:
    share = (off / size) ** 0.5 if size > 0 else float(off > 0)
    return share if share == share else float("inf")


def kind_of(name: str) -> str:
    """The kind of layer that a trained tensor is of: `q_proj` for `...self_attn.q_proj.lora_A.default.weight`."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.startswith("lora_")), len(parts) - 1)
    return parts[max(0, at - 1)]

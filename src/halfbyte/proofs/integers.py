"""Whether a model's frozen products may be computed in 8-bit integers: proven on its own rows, all of its layers.

What: loss and gradients of some rows, by exact products and by integer ones (`layers/kernels/cpu/integer`). If they
are within the bounds below, integers are taken for both products; if not, for the input gradient alone, which costs
next to nothing in gradients; if not even that, for none.
Why on all layers: rounding adds up with depth, and outliers sit in the middle of a model, where a proof on the first
layers does not look. Why these bounds: a gradient that is off by a quarter of its length still points within 15 degrees
of its own direction, and other rows move it by more than its whole length; what is seen with integers decides nothing
else, as evaluations and answers are exact (docs/log).
Cost: a forward and a backward of up to `TOKENS` tokens, two or three times; nothing where it is remembered.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

from halfbyte.data import pack
from halfbyte.errors import AdapterError
from halfbyte.layers import fuse
from halfbyte.layers.kernels.cpu.integer import products as integer
from halfbyte.layers.kernels.cpu.integer.products import Products
from halfbyte.layers.loss import micro_batch_loss
from halfbyte.models import structure
from halfbyte.proofs import setting
from halfbyte.proofs.closeness import distance
from halfbyte.proofs.memory import RememberedProofs
from halfbyte.quant import dequantise
from halfbyte.types import Batch, Document, Model

TOKENS = 512
# ||integer - exact|| / ||exact|| of the gradients of all adapters, and of those of one kind of layer; and of the loss.
GRADIENTS, KIND = 0.25, 0.35
LOSS = 0.01
BOTH, BACKWARD = Products(), Products(forward=False)


@dataclass(frozen=True)
class Deviation:
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
    """Which products are integer ones (None: all are exact), why, and how far from exact ones each tried choice is."""

    products: Products | None
    reason: str
    tried: tuple[tuple[Products, Deviation], ...] = ()

    def __str__(self) -> str:
        return f"{'exact' if self.products is None else 'int8'}: {self.reason}"

    def to_json(self) -> Document:
        tried = [{"products": str(p), "ok": s.ok, **vars(s)} for p, s in self.tried]
        return {"products": str(self.products or "exact"), "reason": self.reason, "tried": tried}

    @classmethod
    def of_json(cls, made: Document) -> Self:
        """The decision that `to_json` wrote."""
        named = {str(products): products for products in (BOTH, BACKWARD)}
        seen = [Deviation(*(one[f.name] for f in fields(Deviation))) for one in made["tried"]]
        tried = zip((named[one["products"]] for one in made["tried"]), seen, strict=True)
        return cls(named[made["products"]], made["reason"], tuple(tried))


def decide_once(model: Model, memory: RememberedProofs, name: str, decide: Callable[[], Decision]) -> Decision:
    """What an earlier start has decided under this name, set anew, or what `decide` does now. Only integers are
    remembered: a machine that multiplied too slowly may have been busy."""
    known = memory.proofs.get(name)
    if known is None:
        decision = decide()
        if decision.products is not None:
            memory.write(name, decision.to_json())
        return decision
    integer.set_products(fuse.frozen_layers(model), (decision := Decision.of_json(known)).products)
    dequantise.forget()
    return replace(decision, reason=f"{decision.reason} (proven before)")


def decide(
    model: Model, asked: str, batch: Batch, loss: setting.Loss = micro_batch_loss,
    least: Callable[[float], float] = float,
) -> Decision:  # fmt: skip
    """Set how a model's frozen products are computed from now on, in training; the proof leaves all else as it was.

    Args:
        model: with its adapters, fused (`adapters/assembly.py`), where it will be trained.
        asked: `quant.compute`: auto, exact or int8 (whatever the proof says); gradient: auto with an exact forward.
        batch: some rows, at least one token of them labelled.
        loss: of a micro-batch, a scalar.
        least: the least of what each process of this run has seen, which all of them decide by; called by all alike.

    Raises:
        AdapterError: int8 is asked for and cannot be computed.
    """
    layers = fuse.frozen_layers(model)
    integer.set_products(layers, None)
    if asked == "exact":
        return Decision(None, "as the recipe says")
    problem = _why_not(model, layers)
    if problem and asked == "int8":
        fix = "--set quant.compute=auto takes it where it can be had"
        raise AdapterError(f"quant.compute int8 is not possible: {problem}.", fix=fix)
    times = least(0.0 if problem else integer.times_as_fast(structure.causal_lm(model).dtype))
    if problem:
        return Decision(None, f"int8 is not possible: {problem}")
    fast = f"int8 is multiplied {times:.1f} times as fast here"
    if asked != "int8" and times < integer.PAYS:
        return Decision(None, f"{fast}, and below {integer.PAYS} rounding does not pay")
    tried: list[tuple[Products, Deviation]] = []
    exact = _loss_and_gradients(model, batch, loss)
    for products in {"int8": (BOTH,), "gradient": (BACKWARD,)}.get(asked, (BOTH, BACKWARD)):
        integer.set_products(layers, products)
        tried.append((products, deviation(_loss_and_gradients(model, batch, loss), exact)))
        if least(float(tried[-1][1].ok)) or asked == "int8":
            break
    else:
        integer.set_products(layers, None)
        return Decision(None, f"int8 is too rough for this model: {tried[-1][1]}", tuple(tried))
    dequantise.forget()  # a whole weight, which only exact products need
    products, seen = tried[-1]
    before = f"; not forward: {tried[0][1]}" if len(tried) > 1 else ""
    why = "asked, whatever is seen" if asked == "int8" else fast
    return Decision(products, f"{products} of {len(layers)} layers; {why}; {seen}{before}", tuple(tried))


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


def _loss_and_gradients(model: Model, batch: Batch, loss: setting.Loss) -> tuple[float, setting.Gradients]:
    with setting.as_given(model):
        return setting.loss_and_gradients(model, [batch], loss=loss)


def deviation(got: tuple[float, setting.Gradients], exact: tuple[float, setting.Gradients]) -> Deviation:
    """How far a loss and its gradients are from the exact ones; what is not finite is infinitely far."""
    (loss, gradients), (exact_loss, exact_gradients) = got, exact
    kinds: dict[str, setting.Gradients] = {}
    for name, gradient in exact_gradients.items():
        kinds.setdefault(kind_of(name), {})[name] = gradient
    distances = {kind: distance(gradients, of_kind) for kind, of_kind in kinds.items()}
    worst = max(distances, key=lambda kind: distances[kind], default="none")
    loss_off = (loss - exact_loss) / max(abs(exact_loss), 1e-30)
    return Deviation(
        gradients=distance(gradients, exact_gradients),
        kind=distances.get(worst, 0.0),
        worst=worst,
        loss=math.inf if math.isnan(loss_off) else loss_off,
    )


def kind_of(name: str) -> str:
    """The kind of layer that a trained tensor is of: `q_proj` for `...self_attn.q_proj.lora_A.default.weight`."""
    parts = name.split(".")
    adapter = next((i for i, part in enumerate(parts) if part.startswith("lora_")), len(parts) - 1)
    return parts[max(0, adapter - 1)]

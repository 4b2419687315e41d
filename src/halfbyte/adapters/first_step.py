"""The first training forward of a script: its proofs, and in lines what is done meanwhile, and then what runs.

Why: it compiles kernels and proves them, which takes from seconds to minutes, and a script or a notebook that is silent
meanwhile looks hung. And a script may bring what only the model's own code takes: right and slow, so it is said.
What: the lines go to the logger "halfbyte" as warnings, which Python writes to stderr where nobody has set up logging.
Cost: the proofs' (`proofs/fusing.py`, `proofs/packing.py`).
"""

import logging
import time
import warnings
from dataclasses import dataclass
from weakref import WeakSet

import torch

from halfbyte.adapters import unpad
from halfbyte.layers import fuse
from halfbyte.layers.kernels.cpu import available, whole_attention
from halfbyte.models import structure
from halfbyte.proofs import setting
from halfbyte.proofs.fusing import prove_fused
from halfbyte.proofs.integers import decide
from halfbyte.system import hub_kernel, kernel_cache
from halfbyte.system.device import detect, may_use_integers
from halfbyte.types import Document, Model

_log = logging.getLogger("halfbyte")
# Models whose first training forward was, or whose proofs another has made.
SEEN: WeakSet[torch.nn.Module] = WeakSet()


@dataclass(frozen=True)
class FirstStep:
    """What was seen before the first training forward."""

    layers: str  # which of ours run; empty if none do
    problem: str  # why PEFT's own layers run; empty if ours do
    products: str  # how the frozen base's products are computed, where that was asked for
    raised: int  # how many parameters that train were not fp32, and are now
    begin: float  # when it began, of `time.perf_counter`

    def say(self, model: Model, why_logits: str) -> None:
        """After that forward: what runs fast in this training, and what does not and why. `why_logits`: why the loss
        was not made from the labelled tokens alone; empty if it was."""
        padded = unpad.why_padded(model) if why_logits or not model.writes else ""
        if "num_items_in_batch" in padded:  # a Trainer's own loss stays whole, as its labels may lie on padding
            padded = why_logits
        parts = (
            (self.layers, "PEFT's own layers", self.problem),
            ("rows without padding", "rows as they come", padded),
            ("logits of labelled tokens alone", "the script's own loss", why_logits),
        )[: 3 if model.writes else 2]
        fast = [text for text, _, why in parts if not why]
        fast += ["fp32 for what trains, which it was not"] * bool(self.raised) + [self.products] * bool(self.products)
        slow = "; ".join(f"{text} ({why})" for _, text, why in parts if why)
        _log.warning(
            "halfbyte is active: %s.%s%s This took %.0f s.",
            "; ".join(fast) or "in no part",
            f" Not: {slow}." if slow else "",
            " The kernel that bitsandbytes did not find (kernels-community) is not used." if hub_kernel.TOLD else "",
            time.perf_counter() - self.begin,
        )


def prove(model: Model, inputs: Document, *, raised: int, compute: str) -> FirstStep:
    """Compare the fused layers with PEFT's own, before the first training forward; take them off if they are wrong. And
    see on its batch whether integer products are right, where they were asked for.

    Args:
        inputs: the forward's keyword arguments.
        raised: as `FirstStep` has it.
        compute: exact, auto or int8.
    """
    SEEN.add(model)
    begin = time.perf_counter()
    about = "which takes some seconds, or a minute where others use the machine's cores"
    first = next(model.parameters())
    dtype = "bf16" if first.dtype == torch.bfloat16 else "fp32"
    attention, integers = whole_attention(first), may_use_integers(detect(), dtype, compute)
    if available(first) and kernel_cache.uncompiled(dtype, attention=attention, integers=integers):
        about = "and compiles its kernels, once on this machine: a minute, or some where others use its cores"
    _log.warning("halfbyte checks its layers on this model before the first step, %s ...", about)
    packed = unpad.packs(model)
    where = "halfbyte checked rows without padding (1 of 2, after %.0f s); its layers are next ..."
    _log.warning(where, time.perf_counter() - begin)
    with structure.shallow(model):
        proof = prove_fused(model, packed=packed)
    if not proof.ok:
        fuse.remove(model)
        warnings.warn(f"halfbyte's fused layers are not used on this model. {proof.reason}", stacklevel=4)
    products = ""
    if compute != "exact":
        batch, _ = unpad.training_batch(model, inputs)
        if batch is None:
            batch = setting.labelled(setting.random_examples(structure.causal_lm(model), setting.SHORT))
        products = f"the frozen base's products so: {decide(model, compute, batch)}"
    layers = f"its layers ({fuse.install(model)})" if proof.ok else ""  # also those that the proof has not seen
    return FirstStep(layers, "" if proof.ok else proof.reason, products, raised, begin)

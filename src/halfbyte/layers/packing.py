"""How each architecture takes examples laid end to end.

What: three layouts, tried in this order; the first that is proven (`proofs/packing.py`) is used.
    cu_seq_lens   our attention runs per example. Needs transformers' attention interface and the promise
                  (`_supports_flash_attn`) that lengths and `sliding_window` say all that a mask would.
    rows          the body runs on padded rows (`padded_rows.py`): ALiBi, an attention outside the interface, recurrent
                  layers, chunks.
    single        nothing proven: one example a micro-batch, plain input.
Tried and dropped: transformers' own block mask where positions restart. It is dense over the whole pack, T^2 a head; by
it Falcon ran at a third of the plain stack's speed (docs/log).
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from halfbyte.errors import BaseModelError
from halfbyte.layers import padded_rows, sight
from halfbyte.layers.kernels import card
from halfbyte.layers.packed_attention import LENGTHS, NAME, no_mask, register
from halfbyte.models import structure

if TYPE_CHECKING:
    from halfbyte.types import Batch, Document, Model

Layout = Literal["cu_seq_lens", "rows", "single"]

# oneDNN divides some odd numbers of rows badly: 511 or 505 of them took a fifth longer than 512. And it compiles each
# shape of a product, in 2 to 4 ms, and keeps the code: with multiples of a number there are few shapes (docs/log).
ROWS, ALIGNED_FROM = 16, 32


def layouts(model: Model) -> tuple[Layout, ...]:
    """The packed layouts that this model could take, best first. Nothing is proven yet."""
    lm = structure.causal_lm(model)
    found: list[Layout] = []
    # ALiBi counts positions from the mask, not from position_ids: in a long pack its bf16 biases would lose precision.
    restarts = "position_ids" in inspect.signature(lm.forward).parameters and not getattr(lm.config, "alibi", False)
    if restarts and lm._supports_flash_attn and lm._can_set_attn_implementation():
        found.append("cu_seq_lens")
    if structure.body(lm) is not lm:
        found.append("rows")
    return tuple(found)


def install(model: Model, layout: Layout | None = None) -> Layout:
    """Set the model up for one layout (the best candidate if not said) and return it. Idempotent; switches layouts.

    Only public seams of the instance are used: `set_attn_implementation`, and torch's forward hooks on the body.
    """
    lm = structure.causal_lm(model)
    chosen: Layout = next(iter(layouts(lm)), "single") if layout is None else layout
    hooks = padded_rows.Rows.attached(structure.body(lm))
    if chosen == "rows" and hooks is None:
        padded_rows.Rows(structure.body(lm))
    elif chosen != "rows" and hooks is not None:
        hooks.remove()
    own = lm.config._attn_implementation
    if own is not None and own.startswith("flash_attention"):  # its kernel is used on packs, where it can be
        _ASKED[structure.body(lm)] = own
    if chosen == "cu_seq_lens":
        register()
        lm.set_attn_implementation(NAME)
    elif own == NAME:
        lm.set_attn_implementation(None)  # transformers' own choice for this model
    elif structure.body(lm) in _ASKED:
        lm.set_attn_implementation("sdpa")  # the same function, also in the fp32 of a proof
    return chosen


# The attention that a model was opened with, where a user has asked for one.
_ASKED: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def asked_attention(model: Model) -> str | None:
    """The implementation that the model was opened with, where that is one to be asked for."""
    return _ASKED.get(structure.body(structure.causal_lm(model)))


def installed(model: Model) -> Layout:
    """Which layout this model is set up for, read from the model itself."""
    lm = structure.causal_lm(model)
    if padded_rows.Rows.attached(structure.body(lm)) is not None:
        return "rows"
    return "cu_seq_lens" if lm.config._attn_implementation == NAME else "single"


def takes_use_cache(lm: Model) -> bool:
    """Whether a model can be told to keep no cache: by its own argument, or by one that it hands to its body."""
    own = inspect.signature(lm.forward).parameters
    handed_on = any(p.kind == p.VAR_KEYWORD for p in own.values())
    return "use_cache" in own or (handed_on and "use_cache" in inspect.signature(structure.body(lm).forward).parameters)


def forward_inputs(model: Model, batch: Batch) -> dict[str, Tensor]:
    """The keyword arguments of this model's forward for one collated micro-batch.

    Args:
        model: after `install` or `prove`; PEFT and DDP wrappers are looked through.
        batch: `collate`'s dict: input_ids, position_ids (1, T), cu_seq_lens_q (N + 1), perhaps labels (1, T).

    Returns:
        input_ids, labels if given, use_cache=False, and what the layout needs, on the model's device (the lengths on
        the CPU). Logits and labels stay (1, T) in every layout. A micro-batch of one example gets plain input, right
        for every model.
    """
    lm = structure.causal_lm(model)
    device = lm.device
    inputs: dict[str, Tensor] = {
        name: batch[name].to(device) for name in ("input_ids", "labels") if batch.get(name) is not None
    }
    if takes_use_cache(lm):
        inputs["use_cache"] = False
    starts: Tensor = batch["cu_seq_lens_q"]
    if len(starts) <= 2 and not (installed(lm) == "cu_seq_lens" and torch.is_grad_enabled()):
        return inputs  # in a training forward even one example brings its lengths: the fused attention asks for them
    layout = installed(lm)
    if layout == "cu_seq_lens":
        inputs |= packed_inputs(structure.body(lm), batch)
    elif layout == "rows":
        inputs["attention_mask"] = padded_rows.example_numbers(starts.diff()).to(device)
    else:
        raise BaseModelError(
            f"{type(lm).__name__} is not set up for {len(starts) - 1} examples in one micro-batch",
            fix="halfbyte.layers.prove_packing(model) first; if it says single, one example a micro-batch",
        )
    return inputs


def up_to(count: int) -> int:
    """The next multiple of `ROWS`."""
    return -(-count // ROWS) * ROWS


def aligned(batch: Batch) -> Batch:
    """The batch with tokens of no example behind the others, until its rows are a multiple that products are fast at.

    They are an example of their own without a label, so no other token sees them and no gradient comes from them.
    A micro-batch of less than `ALIGNED_FROM` tokens stays as it is, as there they would cost more than they save.
    """
    tokens = batch["input_ids"].shape[1]
    more = up_to(tokens) - tokens
    if not more or tokens < ALIGNED_FROM:
        return batch
    ids, positions, starts = batch["input_ids"], batch["position_ids"], batch["cu_seq_lens_q"]
    ends = torch.cat([starts, starts.new_tensor([tokens + more])])
    longest = int(ends.diff().max())
    made: Batch = {
        "input_ids": torch.cat([ids, ids[:, :1].expand(1, more)], 1),
        "position_ids": torch.cat([positions, torch.arange(more, device=positions.device)[None]], 1),
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    return {**batch, **made}


def packed_inputs(body: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """What tells a forward in the `cu_seq_lens` layout where its examples begin.

    Before a forward with texts longer than any earlier one, what its layers see of such texts is looked up.

    The lengths stay on the CPU, and go along as numbers too: the attention of each layer reads them in Python, and must
    not wait for a card each time, nor where something moves a layer's tensors to the layer's own card.
    """
    starts = batch["cu_seq_lens_q"].cpu()
    known = card.Lengths(tuple(starts.diff().tolist()), card.chosen(_ASKED.get(body)))
    longest = known.longest
    sight.look(body, longest)
    device = body.device
    lengths: Document = {
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    lengths[LENGTHS] = known
    return {"position_ids": batch["position_ids"].to(device), "attention_mask": no_mask(device), **lengths}

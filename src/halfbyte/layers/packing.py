"""How each architecture takes examples laid end to end.

What: three layouts, tried in this order; the first that is proven (`proofs/packing.py`) is used.
    cu_seq_lens   our attention runs per example, and so do recurrent layers of known kinds (`recurrent.py`). Needs
                  transformers' attention interface and the promise (`_supports_flash_attn`) that lengths and
                  `sliding_window` say all that a mask would; or one of the attentions of `by_mask.py`.
    rows          the body runs on padded rows (`PaddedRows`): another attention outside the interface, recurrent
                  layers of other kinds, chunks.
    single        nothing proven: one example a micro-batch, plain input.
Tried and dropped: transformers' own block mask where positions restart. It is dense over the whole pack, T^2 a head; by
it Falcon ran at a third of the plain stack's speed (docs/log).
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from halfbyte.errors import BaseModelError
from halfbyte.layers import by_mask, fuse, recurrent, sight
from halfbyte.layers.kernels import card
from halfbyte.layers.kernels.cpu import enabled
from halfbyte.layers.packed_attention import LENGTHS, NAME, no_mask, register
from halfbyte.models import structure
from halfbyte.types import Batch, Document, Model
from halfbyte.upstream.transformers import PACKED_ATTENTION

Layout = Literal["cu_seq_lens", "rows", "single"]

# oneDNN divides some odd numbers of rows badly: 511 or 505 of them took a fifth longer than 512. And it compiles each
# shape of a product, in 2 to 4 ms, and keeps the code: with multiples of a number there are few shapes (docs/log).
ROWS, ALIGNED_FROM = 16, 32


def layouts(model: Model) -> tuple[Layout, ...]:
    """The packed layouts that this model could take, best first. Nothing is proven yet."""
    lm = structure.causal_lm(model)
    possible: list[Layout] = []
    # ALiBi counts positions from the mask, not from position_ids: in a long pack its bf16 biases would lose precision.
    restarts = "position_ids" in inspect.signature(lm.forward).parameters and not getattr(lm.config, "alibi", False)
    interface = PACKED_ATTENTION.there and lm._supports_flash_attn and lm._can_set_attn_implementation()
    if (interface and restarts) or by_mask.fits(lm):
        possible.append("cu_seq_lens")
    if structure.body(lm) is not lm:
        possible.append("rows")
    return tuple(possible)


def install(model: Model, layout: Layout | None = None) -> Layout:
    """Set the model up for one layout (the best candidate if not said) and return it. Idempotent; switches layouts.
    Only public seams of the instance are used: `set_attn_implementation`, and torch's forward hooks on the body."""
    lm = structure.causal_lm(model)
    chosen: Layout = next(iter(layouts(lm)), "single") if layout is None else layout
    hooks = PaddedRows.attached(structure.body(lm))
    structure.body(lm).__dict__.pop(_SET_UP, None)
    if chosen == "rows" and hooks is None:
        PaddedRows(structure.body(lm))
    elif chosen != "rows" and hooks is not None:
        hooks.remove()
    (_keep_apart if chosen == "cu_seq_lens" else recurrent.remove)(structure.body(lm))
    before = lm.config._attn_implementation
    if before is not None and before.startswith("flash_attention"):  # its kernel is used on packs, where it can be
        _ASKED[structure.body(lm)] = before
    by_mask.remove(lm)
    if chosen == "cu_seq_lens" and by_mask.fits(lm):
        by_mask.install(lm)
    elif chosen == "cu_seq_lens":
        register()
        if before != NAME:  # the first one: a proof tries others
            _OPENED.setdefault(structure.body(lm), before)
        lm.set_attn_implementation(NAME)
    elif before == NAME:
        lm.set_attn_implementation(None)  # transformers' own choice for this model
    elif structure.body(lm) in _ASKED:
        lm.set_attn_implementation("sdpa")  # the same function, also in the fp32 of a proof
    return chosen


def _keep_apart(body: nn.Module) -> None:
    """Recurrent layers by lengths. Elsewhere than on a CPU with kernels they stay as they are, which the proof sees."""
    if next(body.parameters()).device.type == "cpu" and enabled():
        recurrent.install(body)


# The attention that a model was opened with, where a user has asked for one.
_ASKED: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


# The attention that stood where ours is.
_OPENED: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()


@contextmanager
def attention_as_opened(model: Model) -> Iterator[None]:
    """While it lasts a model computes by the attention that it was opened with, which may show its maps."""
    lm = structure.causal_lm(model)
    if lm.config._attn_implementation != NAME:
        yield
        return
    lm.set_attn_implementation(_OPENED.get(structure.body(lm)))
    try:
        yield
    finally:
        lm.set_attn_implementation(NAME)


def asked_attention(model: Model) -> str | None:
    """The implementation that the model was opened with, where that is one to be asked for."""
    return _ASKED.get(structure.body(structure.causal_lm(model)))


def installed(model: Model) -> Layout:
    """Which layout this model is set up for, read from the model itself."""
    lm = structure.causal_lm(model)
    if PaddedRows.attached(structure.body(lm)) is not None:
        return "rows"
    return "cu_seq_lens" if lm.config._attn_implementation == NAME or by_mask.is_on(lm) else "single"


def takes_use_cache(lm: Model) -> bool:
    """Whether a model can be told to keep no cache: by its own argument, or by one that it hands to its body."""
    parameters = inspect.signature(lm.forward).parameters
    handed_on = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    of_body = inspect.signature(structure.body(lm).forward).parameters if handed_on else {}
    return "use_cache" in parameters or "use_cache" in of_body


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
    if "token_types" in batch and "token_type_ids" in inspect.signature(structure.body(lm).forward).parameters:
        inputs["token_type_ids"] = batch["token_types"].to(device)
    starts: Tensor = batch["cu_seq_lens_q"]
    if len(starts) <= 2 and not (installed(lm) == "cu_seq_lens" and fuse.computes_as_trained()):
        return inputs  # in a training forward even one example brings its lengths: the fused attention asks for them
    layout = installed(lm)
    if layout == "cu_seq_lens":
        inputs |= packed_inputs(structure.body(lm), batch)
    elif layout == "rows" and "levels" not in batch:
        numbers = torch.arange(1, len(starts), device=starts.device)  # of the examples: this mask asks for rows
        inputs["attention_mask"] = numbers.repeat_interleave(starts.diff())[None].to(device)
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
    They are an example of their own without a label, so no other token sees them and no gradient comes from them. A
    micro-batch of less than `ALIGNED_FROM` tokens stays as it is, as there they would cost more than they save."""
    tokens = batch["input_ids"].shape[1]
    more = up_to(tokens) - tokens
    if not more or tokens < ALIGNED_FROM:
        return batch
    ids, positions = batch["input_ids"], batch["position_ids"]
    starts = batch["cu_seq_lens_q"]
    ends = torch.cat([starts, starts.new_tensor([tokens + more])])
    longer: Batch = {
        "input_ids": torch.cat([ids, ids[:, :1].expand(1, more)], 1),
        "position_ids": torch.cat([positions, torch.arange(more, device=positions.device)[None]], 1),
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
    }
    if "levels" in batch:
        longer["levels"] = torch.cat([batch["levels"], batch["levels"].new_zeros(1)])
    if "token_types" in batch:
        longer["token_types"] = torch.nn.functional.pad(batch["token_types"], (0, more))
    return {**batch, **longer}


def first_position(body: nn.Module) -> int:
    """The position of a text's first token: RoBERTa's positions begin behind the number of its padding. Seen on the
    module, since scripts bring models that `families.toml` has no line of, such as CamemBERT."""
    embeddings = getattr(body, "embeddings", body)
    return int(embeddings.padding_idx) + 1 if hasattr(embeddings, "create_position_ids_from_input_ids") else 0


def packed_inputs(body: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """What tells a forward in the `cu_seq_lens` layout where its examples begin.

    Before a forward with texts longer than any earlier one, what its layers see of such texts is looked up.

    The lengths stay on the CPU, and go along as numbers too: the attention of each layer reads them in Python, and must
    not wait for a card each time, nor where something moves a layer's tensors to the layer's own card.
    """
    starts = batch["cu_seq_lens_q"].cpu()
    levels = tuple(batch["levels"].tolist()) if "levels" in batch else ()
    known = card.PackLengths(tuple(starts.diff().tolist()), card.kernel_name(_ASKED.get(body)), levels)
    longest, device = known.longest, body.device
    positions = batch["position_ids"].to(device) + first_position(body)
    inputs = {"position_ids": positions, "attention_mask": no_mask(device, known)}
    if _set_up(body):
        return {name: x for name, x in inputs.items() if name in inspect.signature(body.forward).parameters}
    sight.look(body, longest)
    lengths: Document = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, LENGTHS: known}
    lengths |= {"max_length_q": longest, "max_length_k": longest}
    return inputs | lengths


# On a body: the list of layers that are set up, and whether their attention is by a mask. A proof has another list.
_SET_UP = "_halfbyte_set_up"


def _set_up(body: nn.Module) -> bool:
    """Set up those layers too that a proof on the first ones did not meet. Whether their attention is by a mask."""
    layers = getattr(*structure.layers_of_body(body))
    if body.__dict__.get(_SET_UP, (None,))[0] is not layers:
        recurrent.complete(body)
        masked = by_mask.is_on(body)
        (by_mask.install if masked else _keep_apart)(body)
        body.__dict__[_SET_UP] = layers, masked
    return bool(body.__dict__[_SET_UP][1])


# Other keyword arguments of a forward, and the way back for its hidden states.
Change = tuple[dict[str, Any], Callable[[Tensor], Tensor]]


class BodyHooks:
    """A pair of hooks on a body: what a subclass's `change` does to its input, and back on its hidden states."""

    def __init__(self, body: torch.nn.Module) -> None:
        self._back: Callable[[Tensor], Tensor] | None = None  # during a forward whose input was changed
        self._handles = [
            body.register_forward_pre_hook(self._before, with_kwargs=True),
            body.register_forward_hook(self._after),
        ]

    @classmethod
    def attached(cls, body: torch.nn.Module) -> Self | None:
        """The hooks of this kind on a body, if any; found on the body itself, so a copied model knows its own."""
        owners = (getattr(hook, "__self__", None) for hook in body._forward_pre_hooks.values())
        return next((owner for owner in owners if isinstance(owner, cls)), None)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def change(self, body: nn.Module, given: dict[str, Any]) -> Change | None:
        """Other keyword arguments, and the way back for hidden states; None to leave a forward as it is."""
        raise NotImplementedError

    def _before(self, body: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        self._back = None
        given = dict(zip(inspect.signature(body.forward).parameters, args, strict=False)) | kwargs
        changed = self.change(body, given)
        if changed is None:
            return None
        inputs, self._back = changed
        return (), inputs

    def _after(self, body: torch.nn.Module, args: object, output: Any) -> object:
        back, self._back = self._back, None
        if back is None:
            return None
        changed: object = with_hidden(output, back(output[0]))
        if getattr(output, "pooler_output", None) is not None:  # of the first tokens of rows
            output.pooler_output = body.pooler(output.last_hidden_state)
        return changed


def with_hidden(output: Any, hidden: Tensor) -> object:
    """A body's output, a tuple or a `ModelOutput`, with other hidden states."""
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    output.last_hidden_state = hidden
    return output


class PaddedRows(BodyHooks):
    """Packed outside, one row an example inside: a pack becomes right-padded rows where the mask holds example numbers.

    Why: Bloom and MPT (ALiBi), Mamba, chunked attention and the like have no seam for example lengths. A dense block
    mask over the pack costs T^2 per head and rounds ALiBi's far positions in bf16; a recurrent state ignores a mask
    altogether.
    What: before the body (1, T) becomes rows (N, L) with an ordinary padding mask, after it the hidden states become
    (1, T) again. So the head, the loss and every caller see a pack, and the body runs its stock path on stock input.
    Cost: padding inside the body, N x (the longest example) tokens instead of T; attention costs N L^2 instead of T^2.

    The lengths arrive in `attention_mask` as example numbers, counted from 1: [[1, 1, 1, 2, 2, 3]]. An ordinary mask
    (0 and 1) passes untouched.
    """

    def change(self, body: nn.Module, given: dict[str, Any]) -> Change | None:
        numbers = given.get("attention_mask")
        if numbers is None or numbers.dim() != 2 or numbers.shape[0] != 1 or int(numbers.max()) < 2:
            return None
        lengths = torch.bincount(numbers[0])[1:]  # (N,)
        column = torch.arange(int(lengths.max()), device=lengths.device)  # (L,)
        real = column < lengths[:, None]  # (N, L)
        token = ((lengths.cumsum(0) - lengths)[:, None] + column).where(real, 0)  # (N, L): where in the pack
        inputs = {  # padding repeats the first token, masked; what is not (1, T, ...) stays
            name: x[0][token.to(x.device)] if isinstance(x, Tensor) and x.shape[:2] == numbers.shape else x
            for name, x in given.items()
        }
        inputs["attention_mask"] = real.long()
        return inputs, lambda hidden: hidden[real.to(hidden.device)][None]  # (N, L, D) -> (1, T, D)

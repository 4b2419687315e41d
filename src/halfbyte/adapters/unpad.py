"""Padded batches at the door: a script that brings (B, L) rows with a mask has them run end to end, without padding.

Why: a Trainer with dynamic padding, or TRL, spends a third of its step on padding and on dense masks. What a
script sees does not change: hidden states and logits have their (B, L) shape, with zeros where the padding was.
What: two torch hooks on the model's body, the mirror of `packing.PaddedRows`: before it, real tokens are laid end to
end with their lengths; after it, hidden states go back to their places. `training_loss` is the shorter way for a
Trainer, which asks for the loss alone: logits are then made where there is a label, and never whole.
Only what is surely the same is touched: a forward in training (also without gradients: DPO's reference is compared
with its policy, so both round alike), rows that are padded on the right, positions as the model counts them itself, no
cache, no hidden states of every layer asked for. And a loss that does not read what stands at padding: the first step
with padding computes that by a forward of its own, and sees whether a gradient comes back there.
Cost: one gather of the ids, one scatter of (T, D), a look at the gradient of what is padding; once a second forward.
"""

import inspect
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from halfbyte.data.collate import collate, collate_tree
from halfbyte.data.encoding.examples import Example
from halfbyte.errors import BaseModelError
from halfbyte.layers import loss, packing, sight
from halfbyte.models import structure
from halfbyte.proofs import sharing
from halfbyte.proofs.packing import prove_packing
from halfbyte.system import accelerator
from halfbyte.types import Batch, Document, Model
from halfbyte.upstream import transformers as upstream

_PLAIN = frozenset({"input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "use_cache", "return_dict"})
_LABELLED = frozenset({"input_ids", "attention_mask", "labels", "use_cache", "return_dict"})
_PAIR = ("labels", "attention_mask")
NOT_RIGHT = "rows are not padded on the right"
NOT_PROVEN = "packing is not proven on this model"
READ = "the loss reads what stands at padding"
NOISE = "NEFTune's noise goes by the length of padded rows"
ACTIVATED = "an adapter begins within each row, at its invocation tokens"
# Whether a causal LM takes packed examples, once it has been seen.
_PROVEN: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()


def packs(model: Model) -> bool:
    """Whether this model is proven to take examples end to end by their lengths. Proven at the first call."""
    lm = structure.causal_lm(model)
    if lm not in _PROVEN:
        packed = packing.installed(lm) == "cu_seq_lens"
        _PROVEN[lm] = packed or ("cu_seq_lens" in packing.layouts(lm) and prove_packing(lm).layout == "cu_seq_lens")
    return _PROVEN[lm]


def lengths_of(mask: Tensor | None, rows: int, width: int) -> Tensor | None:
    """(B,) lengths of right-padded rows, on the CPU; None if they are padded in another way, or a row is empty. `mask`:
    (B, L); of a card it is copied to the CPU once, where all else is computed."""
    if mask is None:
        return torch.full((rows,), width)
    if mask.dim() != 2 or mask.shape != (rows, width):
        return None
    mask = mask.cpu()
    lengths = mask.long().sum(1)
    padded_right = (mask.bool() == (torch.arange(width) < lengths[:, None])).all()
    return lengths if bool(padded_right) and bool((lengths > 0).all()) else None


def real_tokens(lengths: Tensor, width: int) -> Tensor:
    """(T,) places of the real tokens in the flattened (B * L) rows."""
    real = torch.arange(width, device=lengths.device) < lengths[:, None]  # (B, L)
    return real.flatten().nonzero().squeeze(1)


def pack(lengths: Tensor, width: int) -> Batch:
    """`position_ids` and the lengths of a pack, as `packing.forward_inputs` reads them."""
    starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    return {"position_ids": (real_tokens(lengths, width) % width)[None], "cu_seq_lens_q": starts}


def _beyond(given: Document, taken: frozenset[str]) -> str:
    """What a forward was given that is not `taken`, in words; empty if nothing."""
    more = sorted({*given} - taken | ({"use_cache"} if given.get("use_cache") else set()))
    return f"the script passes {', '.join(more)}" if more else ""


class Unpad(packing.BodyHooks):
    """Padded rows of a training forward become a pack. `never`: why none may, empty if some may; `why` the last one's
    did not; `reads`: whether the script's loss reads what stands at padding, None until a backward has shown it."""

    never = ""
    why = ""
    reads: bool | None = None
    _plain = False

    def change(self, body: torch.nn.Module, given: Document) -> packing.Change | None:
        if not body.training or sight.looks() or self._plain:
            return None
        whole, given = given, {k: v for k, v in given.items() if v is not None and v is not False}
        self.why = self.never or _beyond(given, _PLAIN) or (NOISE if _is_noisy(body) else "")
        name = "input_ids" if "input_ids" in given else "inputs_embeds"
        x = given.get(name)
        if self.why or x is None:
            return None
        rows, width = x.shape[:2]
        lengths = lengths_of(given.get("attention_mask"), rows, width)
        if lengths is None:
            self.why = NOT_RIGHT
            return None
        tokens = real_tokens(lengths, width).to(x.device)
        is_padded = len(tokens) < rows * width
        if is_padded and self.reads:
            self.why = READ
            return None
        inputs = packing.packed_inputs(body, pack(lengths, width))

        def back(hidden: Tensor) -> Tensor:
            packed = hidden[0]  # (T, D)
            if is_padded and self.reads is None:
                padding = self._padded(body, whole).flatten(0, 1)
            else:
                padding = packed.new_zeros((rows * width, packed.shape[-1]))
            padded = padding.index_copy(0, tokens.to(packed.device), packed)
            return self._watched(tokens, padded.view(rows, width, -1))

        rows_of = {n: given[n].flatten(0, 1)[tokens][None] for n in (name, "token_type_ids") if n in given}
        more = {"use_cache": False} if "use_cache" in inspect.signature(body.forward).parameters else {}
        return {**inputs, **rows_of, **more}, back

    def _padded(self, body: torch.nn.Module, given: Document) -> Tensor:
        """Hidden states (B, L, D) of the rows as they came, for what stands at padding; random numbers stay as they
        were, so that a training that is resumed draws the same."""
        with structure.replaced((self, "_plain", True)), accelerator.keep_random_state([body.device]):
            hidden: Tensor = body(**given)[0]
        return hidden

    def _watched(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Hidden states (B, L, D), of whose gradient it is seen whether it is 0 but at the real `tokens`."""
        looks = self.reads is None or hidden.device.type == "cpu"  # a card would be waited for in each step
        if looks and hidden.requires_grad and len(tokens) < hidden.shape[0] * hidden.shape[1]:
            hidden.register_hook(partial(self._see, tokens))
        return hidden

    def _see(self, tokens: Tensor, gradient: Tensor) -> None:
        padding = torch.ones(gradient.shape[:2], dtype=torch.bool, device=gradient.device)
        padding.view(-1)[tokens.to(gradient.device)] = False
        reads = bool((gradient[padding] != 0).any())
        if reads and self.reads is False:
            self.reads = True
            raise BaseModelError(
                f"{READ}, which that of the steps before did not: nothing was computed there in this step.",
                fix="label padding with -100, or run the step again: from now on padding is computed",
            )
        self.reads = reads or bool(self.reads)


def _is_noisy(body: torch.nn.Module) -> bool:
    """Whether transformers adds NEFTune's noise to the embeddings, as its Trainer asks it to."""
    return getattr(body.get_input_embeddings(), "neftune_noise_alpha", None) is not None


def _is_activated(model: Model) -> bool:
    """Whether PEFT's forward tells the layers where an adapter begins in each padded row: aLoRA (arXiv:2504.12397)."""
    configs = getattr(model, "peft_config", {}).values()
    return any(getattr(config, "alora_invocation_tokens", None) for config in configs)


def attach(model: Model) -> bool:
    """Put the hooks on the body of a model that takes packed examples. Returns whether they are there."""
    lm = structure.causal_lm(model)
    body = structure.body(lm)
    if body is lm or not packs(lm):
        return False
    hooks = Unpad.attached(body) or Unpad(body)
    hooks.never = ACTIVATED if _is_activated(model) else ""
    return True


def see_labels(model: Model, inputs: Document) -> None:
    """Padding is computed from now on where it has labels; of a card, which would be waited for, nothing is read."""
    hooks = Unpad.attached(structure.body(structure.causal_lm(model)))
    labels, mask = (x if isinstance(x, Tensor) and x.device.type == "cpu" else None for x in map(inputs.get, _PAIR))
    if hooks is not None and not hooks.reads and labels is not None and mask is not None:
        hooks.reads = (labels.shape == mask.shape and bool((labels[mask == 0] != -100).any())) or hooks.reads


def why_padded(model: Model) -> str:
    """Why the last training forward computed its padding too; empty if it did not."""
    hooks = Unpad.attached(structure.body(structure.causal_lm(model)))
    return NOT_PROVEN if hooks is None else hooks.why


def training_loss(model: Model, inputs: dict[str, Tensor]) -> tuple[Tensor | None, str]:
    """The mean loss of a Trainer's batch: the sum over labelled tokens divided by its `num_items_in_batch`.

    Args:
        inputs: a forward's keyword arguments: input_ids (B, L), labels (B, L), num_items_in_batch, perhaps a mask.

    Returns:
        None and why, if this batch must go the ordinary way: other arguments, padding elsewhere than on the right,
        labels on padding, or a model whose logits are not its plain head's.
    """
    batch, why = training_batch(model, inputs)
    if batch is None:
        return None, why
    ids, items = inputs["input_ids"], inputs["num_items_in_batch"]
    summed = loss.micro_batch_loss(model, batch).to(ids.device)  # the head may be on another card
    return summed / (items.to(ids.device) if isinstance(items, Tensor) else items), ""


def training_batch(model: Model, inputs: dict[str, Tensor]) -> tuple[Batch | None, str]:
    """A Trainer's batch as one packed micro-batch; None and why, where `training_loss` is."""
    given = {k: v for k, v in inputs.items() if v is not None and v is not False}
    if given.pop("num_items_in_batch", None) is None:
        return None, _beyond(given, _LABELLED) or "it does not say num_items_in_batch"
    if why := _beyond(given, _LABELLED):
        return None, why
    if inputs.get("return_dict") is False:
        return None, "it asks for a tuple"
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return None, "a learned prompt comes before the rows"
    if _is_activated(model):
        return None, ACTIVATED
    if not upstream.has_plain_loss(lm := structure.causal_lm(model)):
        return None, "the model has a loss function of its own"
    if _is_noisy(lm):
        return None, NOISE
    ids, labels = given.get("input_ids"), given.get("labels")
    if ids is None or labels is None or ids.dim() != 2 or labels.shape != ids.shape:
        return None, "no labels (B, L) beside input_ids (B, L)"
    rows, width = ids.shape
    mask = given.get("attention_mask", torch.ones_like(labels))
    if mask.shape != labels.shape:
        return None, NOT_RIGHT
    numbers = (x.to(labels.device, labels.dtype) for x in (mask, labels, ids))
    mask, labels, ids = torch.stack([*numbers]).cpu().unbind()  # a card is waited for once
    lengths = lengths_of(mask, rows, width)
    if lengths is None:
        return None, NOT_RIGHT
    if not packs(model):
        return None, NOT_PROVEN
    if loss.head_of(model) is None:
        return None, "this model's logits are not its head's alone"
    real = torch.arange(width) < lengths[:, None]  # (B, L)
    if bool((labels[~real] != -100).any()):
        return None, "padding has labels"
    pairs = zip(ids.tolist(), labels.tolist(), lengths.tolist(), strict=True)
    examples = [Example(tuple(row[:n]), tuple(of_row[:n])) for row, of_row, n in pairs]
    are_ids = all(label in (-100, token) for e in examples for token, label in zip(e.input_ids, e.labels, strict=True))
    return (collate_tree if are_ids and sharing.shares(model, examples) else collate)(examples), ""

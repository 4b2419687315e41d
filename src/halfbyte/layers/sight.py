"""What each layer sees of a text, read off the masks that transformers itself builds for it.

Why: an architecture keeps its window or chunk where it likes: in the config alone (Mistral), in the attention module,
in a list of layer types. A kernel that looks in the wrong place attends to everything, under a healthy loss curve.
What: the model's body runs once on a row of the length in question, with a stand-in for each decoder layer that notes
which mask it is handed. Our mask function (registered in `packed_attention.py`) gives `Sight`, a description, in place
of the (L, L) mask. A layer whose mask is of no known kind is `unknown`: it is neither fused nor packed.
Source: `transformers/masking_utils.py`; bodies build their masks before their first layer.
Cost: an embedding of L tokens and some 20 rows of the mask; no layer runs. Repeated only for a longer text.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from halfbyte.layers.kernels import ALL_TOKENS
from halfbyte.models import structure
from halfbyte.system import accelerator

_SAMPLED_ROWS = 16


@dataclass(frozen=True)
class Sight:
    """What one layer sees of a text of up to `tokens` tokens."""

    tokens: int
    causal: int  # up to this length a token sees everything before it; 0: the mask is of no known kind
    slides: bool = False  # beyond it, a token sees the last `causal` tokens, itself included
    ahead: bool = False  # a token sees as many behind itself as before

    def reach(self, length: int) -> tuple[int, int] | None:
        """How many tokens before and after itself a token of a text of this length sees; None: not known."""
        if length > self.tokens:
            return None
        if length <= self.causal:
            return ALL_TOKENS, ALL_TOKENS if self.ahead else 0
        return (self.causal - 1, self.causal - 1 if self.ahead else 0) if self.slides else None

    def is_window(self, window: int | None) -> bool:
        """Whether `window` (None: none) is what this layer sees of every text of up to `tokens` tokens."""
        if self.causal == self.tokens:
            return window is None or window >= self.tokens
        return self.slides and window == self.causal

    def __str__(self) -> str:
        if not self.causal:
            return "a mask of no known kind"
        if self.ahead:
            return "no mask" if self.causal == self.tokens else f"a window of {self.causal} tokens to both sides"
        shape = "a causal mask" if self.causal == self.tokens else f"a window of {self.causal} tokens"
        known = self.slides or self.causal == self.tokens
        return (
            shape if known else f"a causal mask for texts of up to {self.causal} tokens, and then one of no known kind"
        )


_SIGHTS: WeakKeyDictionary[nn.Module, Sight] = WeakKeyDictionary()
# During `look`: the stand-ins for masks, and what each stands for.
_MARKS: ContextVar[list[tuple[Tensor, Sight]] | None] = ContextVar("marks", default=None)


def of(module: nn.Module) -> Sight | None:
    """What this part of a decoder layer sees, if `look` has been there."""
    return _SIGHTS.get(module)


def mark(mask_function: Callable[..., Tensor], length: int, device: torch.device, *, plain: bool) -> Tensor | None:
    """During `look`, the stand-in for the mask that `mask_function` describes; None at any other time. `plain`: the
    function is computed on tensors of indices (`use_vmap` is False)."""
    marks = _MARKS.get()
    if marks is None:
        return None
    stand_in = torch.empty((1, 1, 0, 0), device=device)
    marks.append((stand_in, _describe(mask_function, length, device) if plain else Sight(length, 0)))
    return stand_in


def _describe(mask_function: Callable[..., Tensor], length: int, device: torch.device) -> Sight:
    positions = torch.arange(length, device=device)
    zero = positions[:1].view(1, 1, 1, 1)

    def sees(rows: Tensor, keys: Tensor) -> Tensor:
        seen = mask_function(zero, zero, rows.view(1, 1, -1, 1), keys.view(1, 1, 1, -1))
        return seen.expand(1, 1, len(rows), len(keys))[0, 0]  # (rows, keys) bool

    if (far := int(sees(positions[:1], positions).sum())) > 1:  # the first token sees behind itself
        rows = torch.linspace(0, length - 1, _SAMPLED_ROWS, device=device).long()
        alike = torch.equal(sees(rows, positions), (rows[:, None] - positions).abs() < far)
        return Sight(length, far if alike else 0, slides=alike and far < length, ahead=True)
    hidden = (~sees(positions, positions[:1])[:, 0]).nonzero()  # from which row on the first token is not seen
    causal = int(hidden[0]) if len(hidden) else length
    spread = torch.linspace(0, length - 1, _SAMPLED_ROWS, device=device).long()
    around = torch.tensor([causal - 1, causal, causal + 1], device=device).clamp(0, length - 1)
    rows = torch.cat([spread, around]).unique()
    seen, back = sees(rows, positions), rows[:, None] - positions
    if torch.equal(seen, (back >= 0) & (back < causal)):
        return Sight(length, causal, slides=causal < length)
    early = rows < causal
    return Sight(length, causal if torch.equal(seen[early], back[early] >= 0) else 0)


def look(body: nn.Module, length: int) -> None:
    """Find out what each decoder layer of a body sees of texts of up to `length` tokens, where that is not known yet.
    The model must be set to the attention of `packed_attention.py`. Nothing about it is changed afterwards."""
    length = max(length, 2)  # one token shows no direction
    holder, name = structure.layers_of_body(body)
    layers = list(getattr(holder, name))
    if all(layer in _SIGHTS and _SIGHTS[layer].tokens >= length for layer in layers):
        return
    notes: dict[int, Tensor | None] = {}
    marks: list[tuple[Tensor, Sight]] = []
    stands = [_StandIn(layer, number, len(layers), notes) for number, layer in enumerate(layers)]
    inputs: dict[str, object] = {"input_ids": torch.ones((1, length), dtype=torch.int64, device=body.device)}
    if "use_cache" in inspect.signature(body.forward).parameters:
        inputs["use_cache"] = False
    token = _MARKS.set(marks)
    try:
        with structure.replaced((holder, name, nn.ModuleList(stands))), torch.no_grad(), _restoring(body):
            body(**inputs)
    except Exception:  # the last stand-in stops the forward; any other error leaves layers unknown
        pass
    finally:
        _MARKS.reset(token)
    for number, layer in enumerate(layers):
        handed = notes.get(number)
        seen = next((sight for stand_in, sight in marks if stand_in is handed), Sight(length, 0))
        for module in layer.modules():
            _SIGHTS[module] = seen


def looks() -> bool:
    """Whether a body runs now to be looked at."""
    return _MARKS.get() is not None


class _AllLayersReached(Exception):
    """Every layer has been handed its mask."""


class _StandIn(nn.Module):
    """In the place of a decoder layer: notes its mask and passes hidden states on. Other attributes are the layer's."""

    def __init__(self, layer: nn.Module, number: int, count: int, notes: dict[int, Tensor | None]) -> None:
        super().__init__()
        self.layer = layer
        self.number, self.count = number, count
        self.notes = notes

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        marks = _MARKS.get() or []
        # Gemma 4 hands its later layers a slice of the mask
        given = [s for x in (*args, *kwargs.values()) for s, _ in marks if x is s or getattr(x, "_base", None) is s]
        self.notes[self.number] = given[0] if len(given) == 1 else None
        if len(self.notes) == self.count:
            raise _AllLayersReached
        hidden = args[0] if args else kwargs["hidden_states"]
        return hidden if hidden.dim() > 2 else hidden[None]  # of bodies that take the first of what a layer returns


@contextmanager
def _restoring(body: nn.Module) -> Iterator[None]:
    """Random numbers that a dropout on embeddings draws, and what rotary embeddings of some kinds keep of a long text,
    are as before afterwards."""
    states = [(m, dict(vars(m)), dict(m._buffers)) for m in body.children() if next(m.parameters(), None) is None]
    try:
        with accelerator.keep_random_state([body.device]):
            yield
    finally:
        for module, attributes, buffers in states:
            vars(module).update(attributes)
            module._buffers.update(buffers)

"""Packed outside, one row an example inside: for models whose attention cannot take packed examples.

Why: Bloom and MPT (ALiBi), Mamba, chunked attention and the like have no seam for example lengths. A dense block mask
over the pack costs T^2 per head and rounds ALiBi's far positions in bf16; a recurrent state ignores a mask altogether.
What: two torch forward hooks on the model's body. Before it, (1, T) becomes right-padded rows (N, L) with an ordinary
padding mask; after it, the hidden states become (1, T) again. So the head, the loss and every caller see a pack,
and the body runs its stock path on stock input.
Cost: padding inside the body, N x (the longest example) tokens instead of T; attention costs N L^2 instead of T^2.

The lengths arrive in `attention_mask` as example numbers, counted from 1: [[1, 1, 1, 2, 2, 3]]. An ordinary mask
(0 and 1) passes untouched.
"""

import inspect
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor


def example_numbers(lengths: Tensor) -> Tensor:
    """The `attention_mask` that asks for rows: (N,) lengths -> (1, T) numbers from 1."""
    return torch.arange(1, len(lengths) + 1, device=lengths.device).repeat_interleave(lengths)[None]


class Hooks:
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

    def change(
        self, body: torch.nn.Module, given: dict[str, Any]
    ) -> tuple[dict[str, Any], Callable[[Tensor], Tensor]] | None:
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
        return None if back is None else with_hidden(output, back(output[0]))


def with_hidden(output: Any, hidden: Tensor) -> object:
    """A body's output, a tuple or a `ModelOutput`, with other hidden states."""
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    output.last_hidden_state = hidden
    return output


class Rows(Hooks):
    """A pack becomes padded rows where the mask holds example numbers."""

    def change(
        self, body: torch.nn.Module, given: dict[str, Any]
    ) -> tuple[dict[str, Any], Callable[[Tensor], Tensor]] | None:
        numbers = given.get("attention_mask")
        if numbers is None or numbers.dim() != 2 or numbers.shape[0] != 1 or int(numbers.max()) < 2:
            return None
        lengths = torch.bincount(numbers[0])[1:]  # (N,)
        column = torch.arange(int(lengths.max()), device=lengths.device)  # (L,)
        real = column < lengths[:, None]  # (N, L)
        token = ((lengths.cumsum(0) - lengths)[:, None] + column).where(real, 0)  # (N, L): where in the pack
        inputs = {name: _as_rows(x, numbers.shape[1], token) for name, x in given.items()}
        inputs["attention_mask"] = real.long()
        return inputs, lambda hidden: hidden[real.to(hidden.device)][None]  # (N, L, D) -> (1, T, D)


def _as_rows(x: Tensor, tokens: int, token: Tensor) -> Tensor:
    """(1, T, ...) -> (N, L, ...); anything of another shape stays. Padding repeats the first token, masked."""
    is_packed = isinstance(x, Tensor) and x.dim() >= 2 and x.shape[:2] == (1, tokens)
    return x[0][token.to(x.device)] if is_packed else x

"""Several linear layers that read the same input, and their gradients of it summed in one place.

Why: autograd lets each make its own gradient of x and adds these two by two, each sum a pass over three tensors of x's
size in new memory: three a layer of a Llama, 3% of a step (docs/log).
What: the first of them that comes to its backward makes the gradient, the others add their products to it, and the last
one returns it; the others return none. A pass that asks for gradients of some of them alone leaves a part of the sum
behind, so each pass begins anew.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from halfbyte.layers.instances import is_hooked

# Under this name a tensor carries its `SharedGradient` while those that read it are called.
SHARED = "_halfbyte_shared_gradient"


class SharedGradient:
    """The gradient of a tensor, made by those that `join`. All of them have to come to their backward."""

    def __init__(self) -> None:
        self._joined = self._returned = 0
        self._sum: Tensor | None = None
        self._pass = -1  # autograd's number of the backward pass

    def join(self) -> None:
        self._joined += 1

    def give(self, add_to: Callable[[Tensor | None], Tensor]) -> Tensor | None:
        """`add_to`: the sum so far, None at first -> the sum with one more, in the same memory. Returns it when it is
        whole."""
        this_pass = torch._C._current_graph_task_id()
        if this_pass != self._pass:
            self._pass, self._sum = this_pass, None
            self._returned = 0
        total = add_to(self._sum)
        self._returned += 1
        if self._returned < self._joined:
            self._sum = total
            return None
        self._sum, self._returned = None, 0
        return total


def join(x: Tensor) -> SharedGradient | None:
    """The shared gradient of x, for a layer that reads it now and will `give` its own; None where there is none."""
    shared: SharedGradient | None = getattr(x, SHARED, None)
    if shared is not None:
        shared.join()
    return shared


def read(x: Tensor, linears: Sequence[nn.Module]) -> list[Tensor]:
    """What each of the layers makes of x. All results must be used, as whoever shares must come to its backward."""
    if not (torch.is_grad_enabled() and x.requires_grad) or any(map(is_hooked, linears)):  # a hook may detach a result
        return [linear(x) for linear in linears]
    setattr(x, SHARED, SharedGradient())
    try:
        return [linear(x) for linear in linears]
    finally:
        delattr(x, SHARED)

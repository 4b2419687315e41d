"""Whether adapters learn: that a first backward reaches each of them, and that training has moved them.

Why: an adapter that gets no gradient, or that no optimiser holds, is saved and loaded like any other, and says what the
base says. Nothing in PEFT or the Trainer looks.
Cost: a pass over the gradients of one step; two hashes of what trains (1 GB/s).
"""

import hashlib
from collections.abc import Mapping

import torch
from peft.tuners.lora import LoraLayer

from halfbyte.types import Model


def pairs(adapted: Model) -> dict[str, list[torch.nn.Parameter]]:
    """The A and B of each LoRA layer that train, by the layer's name."""
    trained = {}
    for name, module in adapted.named_modules():
        if isinstance(module, LoraLayer):
            parts = (*module.lora_A.values(), *module.lora_B.values())
            parameters = [p for part in parts for p in part.parameters() if p.requires_grad]
            embedded = (*module.lora_embedding_A.values(), *module.lora_embedding_B.values())
            parameters += [p for p in embedded if p.requires_grad]
            if parameters:
                trained[name] = parameters
    return trained


def without_gradient(adapted: Model) -> list[str]:
    """What trains and has no gradient after a backward, and LoRA layers that have one of zeros: silent failures. Of A
    and B one begins at 0, and then the other's gradient is 0 at first: so a layer is one whose both are."""
    missing = [n for n, p in adapted.named_parameters() if p.requires_grad and p.grad is None]
    if missing:
        return missing
    return [name for name, parts in pairs(adapted).items() if all(p.grad is None or not p.grad.any() for p in parts)]


def not_finite(adapted: Model) -> list[str]:
    """Names of gradients with a NaN or an infinity."""
    grads = ((n, p.grad) for n, p in adapted.named_parameters() if p.grad is not None)
    return [n for n, grad in grads if not bool(grad.isfinite().all())]


def digests(adapted: Model) -> dict[str, str]:
    """A hash of the bytes of everything that trains, by name."""
    trained = ((n, p.detach()) for n, p in adapted.named_parameters() if p.requires_grad)
    return {n: hashlib.sha256(memoryview(_bytes(p).numpy())).hexdigest() for n, p in trained}


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().contiguous().view(-1).view(torch.uint8)


def unmoved(adapted: Model, start: Mapping[str, str]) -> list[str]:
    """LoRA layers of which both A and B are, byte for byte, what they were when `digests` gave `start`."""
    now = digests(adapted)
    names = {id(p): n for n, p in adapted.named_parameters() if p.requires_grad}
    by_layer = {layer: [names[id(p)] for p in parts] for layer, parts in pairs(adapted).items()}
    return [layer for layer, parts in by_layer.items() if all(now[n] == start.get(n) for n in parts)]

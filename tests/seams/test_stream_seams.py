"""What stream.py stands on in torch and transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from halfbyte.base import stream
from halfbyte.models import structure
from halfbyte.quant import bnb
from halfbyte.system import pages
from tests import mapped, tiny


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_layers_are_called_as_modules_once_a_forward_and_in_order(name: str) -> None:
    """Hooks of a layer see every forward; in some versions also the recomputation, in the order of the backward."""
    model = tiny.model(name).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    layers = structure.decoder_layers(model)
    assert len(layers) == tiny.LAYERS
    seen: list[int] = []
    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, n=number: seen.append(n))
    logits = model(input_ids=torch.arange(3, 12)[None], use_cache=False).logits
    assert seen == list(range(tiny.LAYERS))
    logits.sum().backward()
    assert seen[tiny.LAYERS :] in ([], list(reversed(range(tiny.LAYERS))))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_hook_on_the_output_fires_before_the_recomputation(reentrant: bool) -> None:
    order: list[str] = []

    class Layer(nn.Linear):
        def forward(self, x: Any) -> Any:
            order.append("forward")
            return super().forward(x)

    layer, x = Layer(4, 4), torch.ones(2, 4, requires_grad=True)
    y = checkpoint(layer, x, use_reentrant=reentrant)
    y.register_hook(lambda _: order.append("hook"))
    y.sum().backward()
    assert order == ["forward", "hook", "forward"]


def test_a_hook_on_the_output_fires_when_it_is_added_to_in_place() -> None:
    seen = []
    y = nn.Linear(4, 4)(torch.ones(2, 4))
    y.register_hook(lambda _: seen.append(1))
    y += 1
    y.sum().backward()
    assert seen == [1]


@pytest.mark.skipif(not pages.supported(), reason="needs Linux and /proc/self/pagemap")
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_the_loader_maps_a_prequantised_checkpoint_without_a_copy(tmp_path: Path, name: str) -> None:
    model = mapped.open_model(mapped.save(tmp_path, name))
    maps = pages.FileMaps.read()
    for layer in structure.decoder_layers(model):
        tensors = [p for p in bnb.held_tensors(layer) if p.numel() > 64]
        copied = [tuple(t.shape) for t in tensors if not stream._is_mapped(t, maps)]
        assert tensors and not copied

"""Of a streamed mixture only the experts that tokens are sent to come into memory, and gradients are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from halfbyte.base import stream
from halfbyte.layers.experts.layout import experts_of
from halfbyte.system import pages
from tests.base.store.helpers import opened
from tests.present import present_bytes

pytestmark = pytest.mark.skipif(not pages.supported(), reason="needs Linux and /proc/self/pagemap")
VOCAB = 256


def test_of_a_streamed_mixture_only_experts_with_tokens_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen experts of 100 KB and more; twelve tokens meet some of them, and a layer ahead none."""
    config = transformers.MixtralConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCAB, num_experts_per_tok=1, num_local_experts=16,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = opened(tmp_path, compute_dtype="bf16").model
    ids = torch.full((1, 12), 7)  # one token again and again: a router sends it to one expert or two
    embedding = model.get_input_embeddings().weight
    embedding.requires_grad_(True)  # so that backward runs through every layer
    wanted = torch.autograd.grad(model(input_ids=ids).logits.float().sum(), embedding)[0]
    asked: list[pages.Span] = []
    monkeypatch.setattr(pages, "prefetch", asked.append)  # what is read ahead: it is not in this process until touched
    placed = stream.place(model, "streamed")
    met: dict[str, set[int]] = {}
    here: dict[str, dict[int, int]] = {}

    def look(name: str, module: Any, index: torch.Tensor) -> None:
        met.setdefault(name, set()).update(index.unique().tolist())
        for e in range(16):
            spans = pages.whole_pages((p.data_ptr(), p.nbytes) for p in module.gate_up_proj.of_expert(e)[:1])
            here.setdefault(name, {})[e] = present_bytes(spans)

    for name, module in experts_of(model):
        module.register_forward_hook(lambda m, args, out, name=name: look(name, m, args[1]))
    got = torch.autograd.grad(model(input_ids=ids).logits.float().sum(), embedding)[0]
    assert torch.equal(got, wanted)
    for name, present in here.items():
        assert 0 < len(met[name]) < 8
        assert all(size >= 30 * pages.PAGE for e, size in present.items() if e in met[name])
        # the kernel maps sixteen pages around one that is touched: of a neighbour, or of the tensors beside the stack
        near = {e + d for e in met[name] for d in (-1, 1)} | {0, 15}
        assert all(size == 0 for e, size in present.items() if e not in met[name] | near)
    placed.remove()
    for name, module in experts_of(model):
        codes = module.gate_up_proj.of_expert
        middles = {e: codes(e)[0].data_ptr() + codes(e)[0].nbytes // 2 for e in range(16)}
        read = {e for e, middle in middles.items() if any(span.start <= middle < span.end for span in asked)}
        assert read == met[name]

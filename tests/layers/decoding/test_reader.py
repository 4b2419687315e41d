"""Prompts read by a tape: to the bit what token after token leaves in the cache, whatever is read beside them."""

from __future__ import annotations

import pytest
import torch

from halfbyte.layers.decoding import llama, reader
from halfbyte.layers.decoding.tape import isa
from tests import tiny

DTYPES = [d for d in (torch.bfloat16, torch.float32) if isa(d)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_prompt_is_read_as_token_after_token(name: str, dtype: torch.dtype) -> None:
    model, lengths, room = tiny.model(name).to(dtype).eval(), (70, 1, 9, 33), 128
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 50, (n,), generator=generator).tolist() for n in lengths]
    table = model.get_input_embeddings()
    with torch.no_grad():
        wanted = []
        for text in texts:
            one = llama.decoder(model, 1, room)
            for at, token in enumerate(text):
                one.step(table(torch.tensor([token])), [at])
            wanted.append(one)
        for together in ([0, 1, 2, 3], [3, 2], [1]):
            made = llama.decoder(model, len(texts), room)
            states = reader.Reader(model, made).read([(m, texts[m]) for m in together])
            for m, own in zip(together, states, strict=True):
                n = lengths[m]
                assert own.shape == (n, model.config.get_text_config().hidden_size)
                for ours, theirs in ((made.keys, wanted[m].keys), (made.values, wanted[m].values)):
                    for mine, alone in zip(ours, theirs, strict=True):
                        assert torch.equal(mine[m, :, :n], alone[0, :, :n])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_text_is_read_on_from_a_token(dtype: torch.dtype) -> None:
    model = tiny.model("llama").to(dtype).eval()
    text = [5, 9, 3, 7, 11, 4, 8, 30, 2, 6]
    with torch.no_grad():
        whole, parts = (llama.decoder(model, 2, 64) for _ in range(2))
        reader.Reader(model, whole).read([(1, text)])
        some = reader.Reader(model, parts)
        some.read([(1, text[:4])])
        some.read([(1, text)], start=4)
    for ours, theirs in zip((*whole.keys, *whole.values), (*parts.keys, *parts.values), strict=True):
        assert torch.equal(ours, theirs)

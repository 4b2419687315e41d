"""Prompts read by a tape: to the bit what token after token leaves in the cache, whatever is read beside them."""

from __future__ import annotations

import pytest
import torch

from halfbyte.layers.decoding import llama
from halfbyte.layers.decoding.llama import Decoder
from halfbyte.layers.decoding.tape import isa
from halfbyte.writing.prefill import TapeReader, embedding_factor
from tests import tiny

DTYPES = [d for d in (torch.bfloat16, torch.float32) if isa(d)]


def caches(decoder: Decoder) -> tuple[torch.Tensor, ...]:
    return (*decoder.keys, *decoder.values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_prompt_is_read_as_token_after_token(name: str, dtype: torch.dtype) -> None:
    model, lengths, max_tokens = tiny.model(name).to(dtype).eval(), (70, 1, 9, 33), 128
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 50, (n,), generator=generator).tolist() for n in lengths]
    table = model.get_input_embeddings()
    with torch.no_grad():
        wanted = []
        for text in texts:
            one = llama.decoder(model, 1, max_tokens)
            for at, token in enumerate(text):
                one.step(table(torch.tensor([token])), [at])
            wanted.append(one)
        for together in ([0, 1, 2, 3], [3, 2], [1]):
            decoder = llama.decoder(model, len(texts), max_tokens)
            TapeReader(model, decoder).read([(m, texts[m], 0) for m in together])
            for m in together:
                for ours, alone in zip(caches(decoder), caches(wanted[m]), strict=True):
                    assert torch.equal(ours[m, :, : lengths[m]], alone[0, :, : lengths[m]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_text_is_read_on_from_a_token(dtype: torch.dtype) -> None:
    model = tiny.model("llama").to(dtype).eval()
    text = [5, 9, 3, 7, 11, 4, 8, 30, 2, 6]
    with torch.no_grad():
        whole, parts = (llama.decoder(model, 2, 64) for _ in range(2))
        TapeReader(model, whole).read([(1, text, 0)])
        reader = TapeReader(model, parts)
        reader.read([(1, text[:4], 0)])
        reader.read([(1, text, 4)])
    assert all(map(torch.equal, caches(whole), caches(parts)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("factor", [1.0, 12.0, 640**0.5, 0.07])
def test_the_factor_of_embeddings_does_not_depend_on_the_tokens(dtype: torch.dtype, factor: float) -> None:
    wanted = torch.tensor(factor, dtype=dtype)
    for seed in range(9):
        plain = torch.randn(3, 640, generator=torch.Generator().manual_seed(seed)).to(dtype)
        assert embedding_factor(plain, plain * wanted) == float(wanted)

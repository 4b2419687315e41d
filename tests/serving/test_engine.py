"""What the engine sends, and when: an answer's first and last text at once, what is between in parts of a while. And
that an answer is that of `generate`, greedy or drawn, whatever else is written."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from halfbyte.inference.generate import generate
from halfbyte.layers.decoding.tape import isa
from halfbyte.serving import engine
from halfbyte.serving.engine import Ask, Engine
from halfbyte.writing.sampling import SamplingParams, TokenLogprob
from halfbyte.writing.text import TextChunk
from halfbyte.writing.writer import Writer
from tests.serving import served

PRECISIONS = {
    name: pytest.param((f"quant.compute_dtype={name}", f"quant.type={quant}"), id=f"{name}-{quant}",
                       marks=pytest.mark.skipif(isa(dtype) is None, reason="no kernels for this processor"))
    for name, dtype, quant in (("fp32", torch.float32, "none"), ("bf16", torch.bfloat16, "nf4"))
}  # fmt: skip


MORE: list[dict[str, Any]] = [
    {}, {}, {"top_k": 20, "min_p": 0.02}, {"repetition_penalty": 2.0}, {"frequency_penalty": 1.0}, {},
    {"presence_penalty": 0.5}, {"logit_bias": ((60, 5.0), (200, -100.0))},
]  # fmt: skip


def written(asking: Engine, asks: list[Ask]) -> list[list[str]]:
    """The texts of asks that come at once."""

    async def texts_of(ask: Ask) -> list[str]:
        texts, left = [""] * ask.n, ask.n
        while left:
            chunk = await asyncio.wait_for(ask.chunks.get(), 60)
            if isinstance(chunk, Exception):
                raise chunk
            texts[chunk.index] += chunk.text
            left -= chunk.finish is not None
        return texts

    async def all_texts() -> list[list[str]]:
        asking.start()
        asking.submit(asks)
        return [await texts_of(ask) for ask in asks]

    try:
        return asyncio.run(all_texts())
    finally:
        asking.end()


@pytest.mark.parametrize("overrides", PRECISIONS.values())
def test_an_answer_is_that_of_generate_beside_15_others(overrides: tuple[str, ...]) -> None:
    """With a temperature of 0.7 and a seed, and greedy; by what else changes a draw or logits; of both adapters and the
    base; and several after one prompt."""
    models = served.opened(served.folder(), overrides=overrides, places=16)
    kinds = [
        SamplingParams(9 + i % 5, temperature=(0.7, 0.0, 0.7, 1.4)[i % 4], seed=i, **MORE[i % len(MORE)])
        for i in range(22)
    ]
    asked = [
        (list(models.by_name)[i % 3], served.prompt(served.QUESTIONS[i % 6]), kind) for i, kind in enumerate(kinds)
    ]

    def alone(name: str, prompt: list[int], params: SamplingParams) -> str:
        one = models.by_name[name]
        with models.using(one.adapter):
            return generate(models.model, one.tokenizer, [prompt], params)[0]

    wanted = [alone(*each) for each in asked]
    assert len(set(wanted)) > 12
    fast = Engine(models)
    assert isinstance(fast.writers[0], Writer)
    texts = written(fast, [Ask(models.by_name[name], prompt, params) for name, prompt, params in asked])
    assert [text for (text,) in texts] == wanted
    name, prompt, params = asked[0]
    several = written(Engine(models), [Ask(models.by_name[name], prompt, params, n=5)])
    seeds = [SamplingParams(params.max_tokens, params.temperature, seed=(params.seed or 0) + i) for i in range(5)]
    assert several == [[alone(name, prompt, each) for each in seeds]] and len(set(several[0])) == 5


def gathering(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[Any], list[float]]:
    """An engine without a model, what it has sent, and a clock."""
    made, sent, now = Engine.__new__(Engine), list[Any](), [100.0]
    made._gathered, made._sent_at = [], 0.0
    monkeypatch.setattr(made, "_post", lambda some: sent.append(some))
    monkeypatch.setattr(engine.time, "monotonic", lambda: now[0])
    return made, sent, now


def test_pieces_of_a_while_are_sent_together_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    made, sent, now = gathering(monkeypatch)
    a, b = "one ask", "another"
    logprobs = [TokenLogprob(n, -0.5) for n in range(4)]
    made._gather([(a, TextChunk(0, "a", 1, (logprobs[0],)))])
    assert sent == [[(a, TextChunk(0, "a", 1, (logprobs[0],)))]]  # an answer's first text
    for n, text in enumerate("bc", 2):
        now[0] += 0.004
        made._gather([(a, TextChunk(0, text, n, (logprobs[n],))), (b, TextChunk(1, text.upper(), n))])
    assert len(sent) == 1
    now[0] += engine.GATHERED_S
    made._gather([(a, TextChunk(1, "x", 4))])
    assert sent[1:] == [
        [(a, TextChunk(0, "bc", 3, tuple(logprobs[2:]))), (b, TextChunk(1, "BC", 3)), (a, TextChunk(1, "x", 4))]
    ]
    made._gather([(b, TextChunk(1, "d", 5))])
    made._gather([(b, TextChunk(1, "e", 6, finish="stop"))])
    assert sent[2:] == [[(b, TextChunk(1, "de", 6, finish="stop"))]]  # and its last


def test_an_error_comes_at_once_after_what_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    made, sent, _ = gathering(monkeypatch)
    made._sent_at = engine.time.monotonic()
    made._gather([("ask", TextChunk(0, "b", 2))])
    error = RuntimeError("of a step")
    made._gather([("ask", error)])
    assert sent == [[("ask", TextChunk(0, "b", 2)), ("ask", error)]]

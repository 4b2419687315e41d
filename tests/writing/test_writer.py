"""Texts by the tape against those by the model's own forward, and the proof against faults."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from halfbyte.inference import generate as generating
from halfbyte.inference.generate import Session, chat_ids, generate, generate_ids
from halfbyte.layers import packing
from halfbyte.layers.decoding import llama
from halfbyte.layers.decoding.tape import isa
from halfbyte.writing import writer as writing
from halfbyte.writing.places import FastPathUnavailable
from halfbyte.writing.sampling import SamplingParams
from halfbyte.writing.text import Text
from halfbyte.writing.writer import Writer
from tests import small_models, tiny, tiny_run

pytestmark = pytest.mark.skipif(isa(torch.float32) is None, reason="no kernels for this processor")


def prompts() -> list[list[int]]:
    tokenizer = tiny_run.tokenizer()
    return [chat_ids(tokenizer, [{"role": "user", "content": text}]) for text in ("red", "a large round box", "new")]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Why the model's own forward was used."""
    reasons: list[str] = []
    monkeypatch.setattr(generating, "log_once", reasons.append)
    return reasons


@pytest.mark.parametrize(
    ("name", "params", "count"),
    [
        ("llama", SamplingParams(20), 3),
        ("qwen3", SamplingParams(20), 3),
        ("llama", SamplingParams(12, temperature=0.5, seed=3), 2),
        ("llama", SamplingParams(4), 18),  # more than a tape takes
    ],
)
def test_texts_are_those_of_the_models_own_forward(
    name: str, params: SamplingParams, count: int, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer, asked = tiny.model(name, vocab_size=tiny_run.VOCAB), tiny_run.tokenizer(), (prompts() * 6)[:count]
    fast = generate(model, tokenizer, asked, params)
    assert told == []
    monkeypatch.setattr(generating, "Writer", refused)
    assert generate(model, tokenizer, asked, params) == fast
    assert len(told) == 1


def refused(*args: object, **more: object) -> Any:
    raise FastPathUnavailable("asked")


def text(prompt: list[int], params: SamplingParams = SamplingParams(9)) -> Text:  # noqa: B008
    return Text(prompt, params, ())


def written(texts: list[Text], writer: Writer) -> list[list[int]]:
    while not all(text.ended for text in texts):
        writer.step()
    return [text.tokens for text in texts]


@pytest.mark.parametrize("dtype", [d for d in (torch.bfloat16, torch.float32) if isa(d)])
def test_a_text_does_not_depend_on_its_neighbours_nor_on_when_it_came(dtype: torch.dtype) -> None:
    """Greedy and drawn, beside up to 15 others that come and leave; the same prompt is read once."""
    model = tiny.model("llama", vocab_size=tiny_run.VOCAB).to(dtype)
    kinds = [SamplingParams(3 + 5 * i % 17, temperature=(0.0, 0.7, 1.3)[i % 3], seed=i) for i in range(24)]
    asked = [(prompts()[i % 3] + [5 + i // 5] * (i // 5), kind) for i, kind in enumerate(kinds)]
    with torch.no_grad():
        alone = [written([one := text(*pair)], with_texts(Writer(model, 1, 64), [one]))[0] for pair in asked]
        writer, texts = Writer(model, 16, 64), [text(*pair) for pair in asked]
        waiting = list(texts)
        while waiting or writer.free < 16:
            while waiting and writer.free:
                writer.insert([waiting.pop(0)])
            writer.step()
    assert [text.tokens for text in texts] == alone
    assert len({tuple(tokens) for tokens in alone}) > 12


def with_texts(writer: Writer, texts: list[Text]) -> Writer:
    for one in texts:
        writer.insert([one])
    return writer


def test_texts_after_one_prompt_draw_differently_and_each_by_its_own_seed() -> None:
    model, prompt = tiny.model("llama", vocab_size=tiny_run.VOCAB), prompts()[0]
    params = [SamplingParams(9, temperature=1.2, seed=seed) for seed in range(4, 7)]
    with torch.no_grad():
        choices = [Text(prompt, params[0], (), index=i) for i in range(3)]
        writer = Writer(model, 4, 64)
        writer.insert(choices)
        together = written(choices, writer)
        alone = [written([one := text(prompt, each)], with_texts(Writer(model, 1, 64), [one]))[0] for each in params]
    assert together == alone and len(set(map(tuple, alone))) == 3


def test_what_a_generation_config_does_to_logits_is_done(told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers' own loop does it."""
    model, tokenizer = tiny.model("llama", vocab_size=tiny_run.VOCAB), tiny_run.tokenizer()
    plain = generate(model, tokenizer, prompts(), SamplingParams(12))
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.suppress_tokens = [176]
    wanted = []
    for prompt in prompts():
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0,
            eos_token_id=generating.stop_ids(model, tokenizer),
        )  # fmt: skip
        wanted.append(tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True))
    assert generate(model, tokenizer, prompts(), SamplingParams(12)) == wanted != plain and told == []
    monkeypatch.setattr(generating, "Writer", refused)
    assert generate(model, tokenizer, prompts(), SamplingParams(12)) == wanted


FAULTS = {
    "position": lambda made, embedded, before: (embedded, [n + 1 for n in before]),
    "embedding": lambda made, embedded, before: (embedded.flip(-1), before),
    "rope": lambda made, embedded, before: (made.ropes[0][0].neg_(), (embedded, before))[1],
    "keys": lambda made, embedded, before: (made.keys[1].mul_(0.5), (embedded, before))[1],
    "values": lambda made, embedded, before: (made.values[0].roll(1, 2), made.values[0].neg_(), (embedded, before))[2],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen_before_its_first_token_and_the_models_own_loop_answers(
    fault: str, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny.model("llama", vocab_size=tiny_run.VOCAB), tiny_run.tokenizer()
    wanted = generate(model, tokenizer, prompts(), SamplingParams(6))
    own = llama.Decoder.step

    def faulty(made: llama.Decoder, embedded: Any, before: list[int], enter: Any = None, **more: Any) -> Any:
        return own(made, *FAULTS[fault](made, embedded, before), enter, **more)

    monkeypatch.setattr(llama.Decoder, "step", faulty)
    assert generate(model, tokenizer, prompts(), SamplingParams(6)) == wanted
    assert len(told) == 1 and "apart from the model's own" in told[0]


@pytest.mark.parametrize("fault", ["places", "positions", "embedding"])
def test_a_fault_of_reading_a_prompt_is_seen(fault: str, told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny.model("llama", vocab_size=tiny_run.VOCAB), tiny_run.tokenizer()
    wanted = generate(model, tokenizer, prompts(), SamplingParams(6))
    own = llama.Decoder.read

    def faulty(made: llama.Decoder, embedded: Any, positions: Any, places: Any) -> Any:
        if fault == "places":
            places = [(place + 1) % len(prompts()) for place in places]
        elif fault == "positions":
            positions = [max(0, at - 1) for at in positions]
        return own(made, embedded.flip(-1) if fault == "embedding" else embedded, positions, places)

    monkeypatch.setattr(llama.Decoder, "read", faulty)
    assert generate(model, tokenizer, prompts(), SamplingParams(6)) == wanted
    assert len(told) == 1 and "apart from the model's own" in told[0]


def test_only_greedy_answers_look_at_the_largest_logit_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny.model("llama", vocab_size=tiny_run.VOCAB), tiny_run.tokenizer()
    made, own = list[bool](), llama.decoder

    def noted(*args: Any, largest: bool = False, **more: Any) -> Any:
        found = own(*args, largest=largest, **more)
        if "reads" not in more:
            made.append(found.rough is not None)
        return found

    monkeypatch.setattr(llama, "decoder", noted)
    generate(model, tokenizer, prompts()[:1], SamplingParams(2))
    generate(model, tokenizer, prompts()[:1], SamplingParams(2, temperature=0.7, seed=1))
    assert made == [True, False]


def test_a_largest_logit_that_is_not_the_whole_heads_is_seen(told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny.model("llama", vocab_size=tiny_run.VOCAB), tiny_run.tokenizer()
    own = llama.Decoder.whole
    monkeypatch.setattr(llama.Decoder, "whole", lambda made: own(made).add_(1.0))
    generate(model, tokenizer, prompts()[:1], SamplingParams(2))
    assert len(told) == 1 and "whole head" in told[0]


# gemma4 normalises values: a fault of 0.1% in one token's logits, so the parts of an attention must tell
SOME = ("deepseek_v3", "gemma4_unified_text", "nanochat", "olmo", "persimmon", "gptj", "gpt_oss", "mamba",
        "modernbert-decoder", "dots3_note_text", "qwen3_next", "xglm")  # fmt: skip


@pytest.mark.parametrize("kinds", [SOME, pytest.param(small_models.TYPES, marks=pytest.mark.slow)], ids=["some", "all"])
def test_whatever_the_tape_cannot_write_is_left_to_its_own_forward(
    kinds: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    fast = []
    for kind in kinds:
        torch.manual_seed(0)
        try:
            model = small_models.build(kind).eval()
        except Exception:  # of any kind: it cannot be built small
            continue
        packing.install(model, "cu_seq_lens")
        try:
            with torch.no_grad():
                writer = with_texts(Writer(model, 1, 20), [text(torch.randint(3, 120, (14,)).tolist(), ONE)])
        except FastPathUnavailable:
            continue
        fast.append(kind if writer.apart < 1e-4 else f"{kind} but {writer.apart:.3g} apart")
    with capsys.disabled():
        print(f"\nby the tape: {', '.join(fast)}" if kinds is not SOME else "")
    assert not any("apart" in kind for kind in fast)
    assert (fast == []) == (kinds is SOME)


ONE = SamplingParams(1)


def test_layers_are_those_of_the_text_beside_a_larger_tower() -> None:
    kinds = {type(layer).__name__ for layer in writing.layers_of(small_models.build("got_ocr2"))}
    assert kinds == {"Qwen2DecoderLayer"}


def test_another_architecture_is_left_to_its_own_forward(told: list[str]) -> None:
    generate(tiny.model("gptj", vocab_size=tiny_run.VOCAB), tiny_run.tokenizer(), prompts()[:1], SamplingParams(2))
    assert len(told) == 1 and "GPTJBlock has" in told[0]


VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-biases": {"attention_bias": True},
    "llama-scaled": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    "mistral": {},
    "mistral-windows": {"sliding_window": 5},
    "qwen3": {},
    "gemma3": {},
    "phi3": {},
}


GRANITE = {
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.1,
}
OTHERS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "gemma2": {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    "granite": GRANITE,
}


@pytest.mark.parametrize("name", [*VARIANTS, *OTHERS])
def test_logits_of_each_architecture_are_its_own(name: str) -> None:
    """In fp32, where only the order of sums differs; 23 tokens, more than a window; a token after the prompts too."""
    if name in OTHERS:
        torch.manual_seed(0)
        model = small_models.build(name, **{**OTHERS[name], "attn_implementation": "eager"}).eval()
    else:
        model = tiny.model(name.partition("-")[0], changes=VARIANTS[name]).eval()
    packing.install(model, "cu_seq_lens")
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 127, (2, 24), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0  # the second begins later
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
        whole = SamplingParams(9, logprobs=0)  # looks at all logits
        texts = [text(row[keep.bool()].tolist(), whole) for row, keep in zip(ids[:, :-1], mask[:, :-1], strict=True)]
        writer = with_texts(Writer(model, 2, 33), texts)
        writer.next_logits()
        for one, row in zip(texts, ids, strict=True):
            one.add(int(row[-1]))
        got = dict(writer.next_logits())
    assert writer.apart < 2e-5
    assert writing.check(torch.stack([got[one] for one in texts]), wanted, 1) < 2e-5


@pytest.mark.parametrize("name", ["llama", "mistral-windows", "qwen3", "gemma3", "phi3"])
def test_a_conversation_reads_only_what_is_new_and_says_what_a_fresh_one_says(
    name: str, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model(name.partition("-")[0], vocab_size=tiny_run.VOCAB, changes=VARIANTS[name])
    packing.install(model, "cu_seq_lens")
    read: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, more: read.append(more["input_ids"].shape[1]), with_kwargs=True
    )
    session, tokenizer, talk, seen = Session(), tiny_run.tokenizer(), list[int](), 0
    for words in ("a large round box", "red", "and another one, new", "a large"):
        talk += chat_ids(tokenizer, [{"role": "user", "content": words}])
        (fresh,) = generate_ids(model, tokenizer, [talk], SamplingParams(8))
        read.clear()
        (again,) = generate_ids(model, tokenizer, [talk], SamplingParams(8), session=session)
        assert again == fresh and read == [len(talk) - seen]
        seen = len(talk) + len(fresh) - 1  # the last token was not read
        talk = [*talk, *fresh[:-1]]
    other = talk[:9] + talk[12:]  # what was said is another thing from there on
    assert generate(model, tokenizer, [other], SamplingParams(8), session=session) == generate(
        model, tokenizer, [other], SamplingParams(8)
    )
    assert session.writer is not None and told == []
    for keys in session.writer.places.caches.keys:
        keys[:, :, 1:] = keys[:, :, 1:].flip(-1)  # what is there is used: in the proof, too
    wrong, right = (generate(model, tokenizer, [[*other, 5]], SamplingParams(8), session=s) for s in (session, None))
    assert told == [] and wrong != right

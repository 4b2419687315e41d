"""Generation against a loop that reads the whole text again for each token, and the scores made from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from halfbyte.errors import DataError
from halfbyte.inference.generate import chat_ids, end_of_turn_id, generate, stop_ids
from halfbyte.writing.sampling import SamplingParams
from tests import tiny, tiny_run


def greedy(model: Any, prompt: list[int], stops: list[int], steps: int) -> list[int]:
    """One token after another, without a cache and without padding."""
    ids = list(prompt)
    for _ in range(steps):
        with torch.no_grad():
            following = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        ids.append(following)
        if following in stops:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_prompts_of_several_lengths_are_continued_as_each_alone(name: str) -> None:
    model, tokenizer = tiny.model(name, vocab_size=tiny_run.VOCAB), tiny_run.tokenizer()
    prompts = [chat_ids(tokenizer, [{"role": "user", "content": text}]) for text in ("red", "a large round box", "new")]
    stops = stop_ids(model, tokenizer)
    wanted = [tokenizer.decode(greedy(model, p, stops, 6), skip_special_tokens=True) for p in prompts]
    assert generate(model, tokenizer, prompts, SamplingParams(6)) == wanted


def test_a_stream_gives_the_same_text_in_pieces_and_leaves_the_mode_alone() -> None:
    model, tokenizer = tiny.model("llama", vocab_size=tiny_run.VOCAB).train(), tiny_run.tokenizer()
    prompt, pieces = chat_ids(tokenizer, [{"role": "user", "content": "red"}]), []
    (whole,) = generate(model, tokenizer, [prompt], SamplingParams(5), emit=pieces.append)
    assert "".join(pieces) == whole
    assert model.training


@pytest.mark.parametrize("name", ["llama", "bloom"])  # a tape, and the model's own forward
def test_an_answer_that_is_stopped_is_its_beginning(name: str) -> None:
    model, tokenizer = tiny.model(name, vocab_size=tiny_run.VOCAB), tiny_run.tokenizer()
    prompts = [chat_ids(tokenizer, [{"role": "user", "content": text}]) for text in ("red", "a large round box")]
    whole, counted = generate(model, tokenizer, prompts, SamplingParams(12)), list[int]()

    def each() -> bool:
        counted.append(len(counted) + 1)
        return len(counted) == 4

    said = generate(model, tokenizer, prompts, SamplingParams(12), each=each)
    assert counted == [1, 2, 3, 4]
    assert said == generate(model, tokenizer, prompts, SamplingParams(4))
    assert all(w.startswith(s) and s != w for w, s in zip(whole, said, strict=True))


def test_what_the_model_cannot_read_is_refused_before_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny.model("llama", vocab_size=tiny_run.VOCAB), tiny_run.tokenizer()
    monkeypatch.setattr(model, "forward", lambda **_: pytest.fail("the model ran"))
    with pytest.raises(DataError, match="--max-new-tokens 56"):
        generate(model, tokenizer, [[5], [5] * 200], SamplingParams(57))


def test_a_seed_repeats_what_sampling_chooses() -> None:
    model, tokenizer = tiny.model("llama", vocab_size=tiny_run.VOCAB), tiny_run.tokenizer()
    prompt = chat_ids(tokenizer, [{"role": "user", "content": "red"}])

    def sampled(seed: int) -> str:
        return generate(model, tokenizer, [prompt], SamplingParams(12, temperature=5.0, seed=seed))[0]

    assert sampled(1) == sampled(1)
    assert len({sampled(seed) for seed in range(4)}) > 1


def test_an_answer_ends_at_the_end_of_turn_and_at_the_models_own_end() -> None:
    tokenizer, model = tiny_run.tokenizer(), tiny.model("llama", vocab_size=tiny_run.VOCAB)
    turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_of_turn_id(tokenizer) == turn
    assert stop_ids(model, tokenizer) == sorted({turn, model.generation_config.eos_token_id})
    plain = tiny_run.tokenizer(chat_template=None)
    assert chat_ids(plain, [{"role": "user", "content": "red box"}]) == plain("red box")["input_ids"]


def test_a_template_that_writes_half_a_character_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_run.tokenizer()
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0]['content'] }}\ud800")
    with pytest.raises(DataError, match="the chat template refuses the conversation"):
        chat_ids(tokenizer, [{"role": "user", "content": "red"}])
    assert end_of_turn_id(tokenizer) is None

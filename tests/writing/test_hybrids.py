"""Texts of models with recurrent layers by the tape: those of transformers' own `generate`, whatever stands beside
them, was in their place before, or begins as they do; and faults of states, which the proof or the answers show."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.adapters import targets
from halfbyte.data.encoding.examples import IGNORED, Example
from halfbyte.layers import packing
from halfbyte.layers.decoding import llama
from halfbyte.layers.decoding.recurrent import MixerWriter
from halfbyte.layers.decoding.tape import isa
from halfbyte.writing import image_writer, prefill
from halfbyte.writing.places import FastPathUnavailable
from halfbyte.writing.prefill import TapeReader
from halfbyte.writing.sampling import SamplingParams
from halfbyte.writing.text import Text
from halfbyte.writing.writer import Writer, check, tolerance
from tests import plain_peft, small_models

pytestmark = pytest.mark.skipif(isa(torch.float32) is None, reason="no kernels for this processor")
PROMPTS, MOST = 20, 160
FALCON = {
    "attention_in_multiplier": 0.7, "attention_out_multiplier": 1.3, "key_multiplier": 0.6, "ssm_in_multiplier": 0.8,
    "ssm_out_multiplier": 1.2, "mlp_multipliers": [0.7, 1.4], "lm_head_multiplier": 0.5, "embedding_multiplier": 2.0,
    "ssm_multipliers": [0.5, 0.6, 0.7, 0.8, 0.9],
}  # fmt: skip
GRANITE = {
    "num_local_experts": 0, "residual_multiplier": 0.4, "logits_scaling": 3.0, "embedding_multiplier": 6.0,
    "attention_multiplier": 0.1,
}  # fmt: skip
HEADS = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 24, "linear_value_head_dim": 16
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lfm2": ("lfm2", {}),
    "lfm2-biases": ("lfm2", {"conv_bias": True, "conv_L_cache": 5}),
    "qwen3_5": ("qwen3_5_text", {}),
    "qwen3_5-heads": ("qwen3_5_text", HEADS),
    "granite": ("granitemoehybrid", GRANITE),
    "granite-rope": ("granitemoehybrid", {**GRANITE, "position_embedding_type": "rope", "mamba_n_groups": 2}),
    "falcon_h1": ("falcon_h1", FALCON),
    "falcon_h1-norm": ("falcon_h1", {**FALCON, "mamba_rms_norm": True, "mamba_norm_before_gate": True}),
    "bamba": ("bamba", {"attn_layer_indices": [1]}),
    "olmo_hybrid": ("olmo_hybrid", {}),
}  # fmt: skip
MIXERS = ("lfm2", "qwen3_5", "granite")  # each kind of recurrent layer once


def build(name: str) -> Any:
    kind, changes = KINDS[name]
    return small_models.build(kind, max_position_embeddings=256, **changes)


def draw(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, small_models.VOCAB, (n,), generator=generator).tolist() for n in lengths]


def text(prompt: list[int], most: int = 12, **more: Any) -> Text:
    return Text(prompt, SamplingParams(most), (), **more)


def generated(model: Any, prompt: list[int], most: int = 12) -> list[int]:
    """transformers' own greedy loop, on its own cache."""
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=most, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    answer: list[int] = out[0, len(prompt) :].tolist()
    return answer


def written(model: Any, texts: list[Text], places: int = 1, writer: Writer | None = None) -> list[list[int]]:
    """The texts come one by one, as places become free; those that are in places already are written on."""
    with torch.no_grad():
        writer = writer or Writer(model, places, MOST)
        waiting = [one for one in texts if one not in writer.places.texts and not one.ended]
        while waiting or not all(one.ended for one in texts):
            while waiting and writer.free:
                writer.insert([waiting.pop(0)])
            writer.step()
    return [one.tokens for one in texts]


@contextmanager
def read_tokens(patch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many tokens each read of a tape was of."""
    counts: list[int] = []
    own = TapeReader.read
    with patch.context() as local:

        def noted(reader: TapeReader, jobs: Any) -> None:
            counts.append(sum(len(tokens) - start for _, tokens, start in jobs))
            own(reader, jobs)

        local.setattr(TapeReader, "read", noted)
        yield counts


@pytest.mark.parametrize("name", KINDS)
def test_greedy_texts_are_those_of_transformers(name: str) -> None:
    """Prompts shorter than the convolution and longer than what a tape reads at once; texts join and leave."""
    model = build(name)
    lengths = [1, 2, 3, 4, 5, 90, 65, *range(6, 6 + PROMPTS - 7)]
    prompts, most = draw(*lengths), [3 + 5 * i % 17 for i in range(PROMPTS)]
    wanted = [generated(model, prompt, n) for prompt, n in zip(prompts, most, strict=True)]
    assert len(set(map(tuple, wanted))) > PROMPTS // 2
    packing.install(model, "cu_seq_lens")
    assert written(model, [text(*pair) for pair in zip(prompts, most, strict=True)], 4) == wanted


@pytest.mark.parametrize("dtype", [d for d in (torch.bfloat16, torch.float32) if isa(d)])
@pytest.mark.parametrize("name", [*MIXERS, "falcon_h1"])
def test_a_text_has_the_same_bits_alone_and_beside_others(name: str, dtype: torch.dtype) -> None:
    """Beside up to 15 others, of which some leave and others take their places."""
    model = build(name).to(dtype)
    packing.install(model, "cu_seq_lens")
    prompts = draw(*(1 + 7 * i % 70 for i in range(24)))
    kinds = [SamplingParams(3 + 5 * i % 11, temperature=(0.0, 0.8)[i % 2], seed=i) for i in range(24)]
    alone = [written(model, [Text(*pair, ())])[0] for pair in zip(prompts, kinds, strict=True)]
    assert written(model, [Text(*pair, ()) for pair in zip(prompts, kinds, strict=True)], 16) == alone


@pytest.mark.parametrize("name", MIXERS)
def test_a_beginning_is_read_once_its_end_was_seen_and_said_as_without_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first text leaves the state of its end alone; the second is read whole, and keeps that of what both have; the
    third begins there. Together, each after the first begins there."""
    model = build(name)
    (common, *tails) = draw(100, 5, 9, 3, seed=1)
    prompts = [[*common, *tail] for tail in tails]
    wanted = [generated(model, prompt) for prompt in prompts]
    packing.install(model, "cu_seq_lens")
    with torch.no_grad():
        writer = Writer(model, 4, MOST)
        written(model, [text(draw(110)[0])], writer=writer)  # the proof's
        with read_tokens(monkeypatch) as counts:
            assert [written(model, [text(prompt)], writer=writer)[0] for prompt in prompts] == wanted
        assert [n for n in counts if n] == [104, 100, 8, 2]
        fresh, texts = Writer(model, 4, MOST), [text(prompt) for prompt in prompts]
        with read_tokens(monkeypatch) as counts:
            fresh.insert(texts)
        assert [n for n in counts if n] == [100, 4, 10]
        assert written(model, texts, writer=fresh) == wanted  # all are there
        with read_tokens(monkeypatch) as counts:
            fresh.insert([again := text(prompts[0])])
        assert sum(counts) <= 4 and written(model, [again], writer=fresh) == wanted[:1]


@pytest.mark.parametrize("name", MIXERS)
def test_a_conversation_reads_what_is_new_or_all_where_it_has_changed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name)
    first, second, other = draw(20, 15, 4, seed=2)
    answer = generated(model, first)
    longer = [*first, *answer, *second]
    changed = [*first[:10], *other]
    wanted = [generated(model, prompt) for prompt in (longer, changed)]
    packing.install(model, "cu_seq_lens")
    with torch.no_grad():
        writer = Writer(model, 1, 32, exact=False)
        assert written(model, [text(first)], writer=writer) == [answer]
        for prompt, tokens, expected in ((longer, len(second), wanted[0]), (changed, len(changed) - 1, wanted[1])):
            with read_tokens(monkeypatch) as counts:
                assert written(model, [text(prompt)], writer=writer) == [expected]
            assert sum(counts) == tokens


def test_several_answers_to_a_prompt_begin_at_one_state() -> None:
    model, (prompt,) = build("qwen3_5"), draw(30)
    packing.install(model, "cu_seq_lens")
    params = [SamplingParams(9, temperature=1.2, seed=seed) for seed in range(4, 7)]
    with torch.no_grad():
        choices, writer = [Text(prompt, params[0], (), index=i) for i in range(3)], Writer(model, 4, MOST)
        writer.insert(choices)
    alone = [written(model, [Text(prompt, each, ())])[0] for each in params]
    assert written(model, choices, writer=writer) == alone and len(set(map(tuple, alone))) == 3


@pytest.mark.parametrize("name", MIXERS)
def test_rows_get_their_losses_and_the_same_answers(name: str) -> None:
    """Of several rows in one forward, whose own states are of no use."""
    model, prompts = build(name), draw(9, 30, 4, seed=3)
    rows = [[*prompt, *generated(model, prompt, 3), 7, 9] for prompt in prompts]
    with torch.no_grad():
        losses = []
        for prompt, row in zip(prompts, rows, strict=True):
            logits = model(torch.tensor([row]), use_cache=False).logits[0, len(prompt) - 1 : -1]
            losses.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor(row[len(prompt) :]))))
    wanted = [generated(model, prompt) for prompt in prompts]
    packing.install(model, "cu_seq_lens")
    examples = [
        Example(tuple(row), tuple([IGNORED] * len(prompt) + row[len(prompt) :]), "", (), "")
        for prompt, row in zip(prompts, rows, strict=True)
    ]
    texts = [text(prompt, row=each) for prompt, each in zip(prompts, examples, strict=True)]
    with torch.no_grad():
        writer = Writer(model, 4, MOST)
        writer.insert(texts, packed=True)
    assert written(model, texts, writer=writer) == wanted
    sums = [loss * (len(row) - len(prompt)) for loss, row, prompt in zip(losses, rows, prompts, strict=True)]
    assert [one.loss for one in texts] == pytest.approx(sums, rel=1e-4)


@pytest.mark.parametrize("name", [*MIXERS, "falcon_h1"])
def test_each_text_has_its_adapter(name: str) -> None:
    model = build(name)
    names = targets.matched(model, targets.auto_targets(model))
    adapted = plain_peft.adapt(copy.deepcopy(model), names).eval()
    adapted.add_adapter("other", adapted.peft_config["default"])
    for key, parameter in adapted.named_parameters():
        if "lora_B.other" in key:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) * 0.2
    prompts, asked = draw(3, 20, 70, 8, 5), ["default", "other", None, "other", "default"]
    wanted = []
    for prompt, adapter in zip(prompts, asked, strict=True):
        adapted.set_adapter(adapter or "default")
        with active(adapted, adapter):
            wanted.append(generated(adapted, prompt))
    assert len(set(map(tuple, wanted))) == len(wanted)
    packing.install(adapted, "cu_seq_lens")
    with torch.no_grad():
        writer = Writer(adapted, 8, MOST, adapters=["default", "other"], using=lambda each: active(adapted, each))
    texts = [text(prompt, adapter=each) for prompt, each in zip(prompts, asked, strict=True)]
    assert written(adapted, texts, writer=writer) == wanted


@contextmanager
def active(model: Any, adapter: str | None) -> Iterator[None]:
    if adapter is None:
        with model.disable_adapter():
            yield
    else:
        model.set_adapter(adapter)
        yield


def carried_over(patch: pytest.MonkeyPatch) -> None:
    """What the place's last text has left: recurrent layers never see a first token. 60: as often around the ring."""
    own, enter = MixerWriter.__init__, llama.Decoder._enter

    def begun(mixer: MixerWriter, *args: Any) -> None:
        own(mixer, *args)
        later = mixer.tape.buffer(mixer.tape.m, dtype=torch.int64)
        LATER.append((mixer.positions, later))
        mixer.positions = later

    def entered(decoder: llama.Decoder, embedded: Any, positions: Any) -> None:
        enter(decoder, embedded, positions)
        for here, later in LATER:
            later.copy_(here + 60)

    LATER.clear()
    patch.setattr(MixerWriter, "__init__", begun)
    patch.setattr(llama.Decoder, "_enter", entered)


LATER: list[tuple[torch.Tensor, torch.Tensor]] = []


def turned(patch: pytest.MonkeyPatch, method: str, of: Any, by: int, axis: int) -> None:
    """While operations are written, a weight is turned by one."""
    own = getattr(MixerWriter, method)

    def faulty(mixer: MixerWriter, *args: Any, **more: Any) -> Any:
        weight = of(mixer, args)
        right = weight.data
        weight.data = right.roll(by, axis)
        try:
            return own(mixer, *args, **more)
        finally:
            weight.data = right

    patch.setattr(MixerWriter, method, faulty)


def decay_of_the_neighbour(patch: pytest.MonkeyPatch) -> None:
    turned(patch, "_scan", lambda mixer, args: mixer.module.A_log, 1, 0)


def convolution_shifted(patch: pytest.MonkeyPatch) -> None:
    turned(patch, "_conv", lambda mixer, args: args[0].weight, 1, 2)


def states_at_the_wrong_place(patch: pytest.MonkeyPatch) -> None:
    own = TapeReader.read

    def faulty(reader: TapeReader, jobs: Any) -> None:
        own(reader, jobs)
        for state in reader.target.states:
            state.copy_(state.roll(1, 0))

    patch.setattr(TapeReader, "read", faulty)


FAULTS = {
    "carried over": (carried_over, MIXERS),
    "decay": (decay_of_the_neighbour, MIXERS[1:2]),
    "convolution": (convolution_shifted, MIXERS),
    "place": (states_at_the_wrong_place, MIXERS),
}


def test_a_neighbours_decay_of_mamba_shows_in_the_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a token gives itself is most of what comes out, so its logits are within what rounding may change."""
    model, prompts = build("granite"), draw(*range(20, 40))
    wanted = [generated(model, prompt, 30) for prompt in prompts]
    packing.install(model, "cu_seq_lens")
    assert written(model, [text(prompt, 30) for prompt in prompts], 4) == wanted
    decay_of_the_neighbour(monkeypatch)
    assert written(model, [text(prompt, 30) for prompt in prompts], 4) != wanted


@pytest.mark.parametrize(("fault", "name"), [(fault, name) for fault in FAULTS for name in FAULTS[fault][1]])
def test_the_proof_sees_a_fault_of_a_state(fault: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (first, second) = build(name), draw(9, 12, seed=4)
    packing.install(model, "cu_seq_lens")
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("A_log"):  # heads that forget differently fast
            parameter.data = torch.linspace(-6.0, 2.0, len(parameter))

    def both() -> None:
        with torch.no_grad():
            writer = Writer(model, 2, MOST)
            for prompt in (first, second):
                written(model, [text(prompt)], writer=writer)

    both()
    FAULTS[fault][0](monkeypatch)
    with pytest.raises(FastPathUnavailable, match="apart from the model's own"):
        both()


def test_a_proof_leaves_other_texts_states_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """A longer prompt comes while others are being written."""
    model, prompts = build("qwen3_5"), draw(5, 9, 40)
    wanted = [generated(model, prompt) for prompt in prompts]
    packing.install(model, "cu_seq_lens")
    texts, writer = [text(prompt) for prompt in prompts], Writer(model, 3, MOST)
    with torch.no_grad():
        for one in texts:
            writer.insert([one])
            writer.step()
    assert written(model, texts, writer=writer) == wanted


@pytest.mark.parametrize("dtype", [d for d in (torch.bfloat16, torch.float32) if isa(d)])
@pytest.mark.parametrize("name", MIXERS)
def test_reading_leaves_the_states_of_token_after_token(name: str, dtype: torch.dtype) -> None:
    model, texts = build(name).to(dtype), draw(70, 1, 9, 33)
    table, most = model.get_input_embeddings(), 128
    with torch.no_grad():
        one = [llama.decoder(model, 1, most) for _ in texts]
        for decoder, tokens in zip(one, texts, strict=True):
            for at, token in enumerate(tokens):
                decoder.step(table(torch.tensor([token])), [at])
        decoder = llama.decoder(model, len(texts), most)
        for state in decoder.states:
            state.fill_(3.0)  # of texts before
        TapeReader(model, decoder).read([(m, tokens, 0) for m, tokens in enumerate(texts)])
    for m, tokens in enumerate(texts):
        for ours, alone in zip(decoder.states, one[m].states, strict=True):
            rows = min(len(tokens), ours.shape[1]) if ours.dim() == 3 else ours.shape[1]
            assert torch.equal(ours[m, :rows], alone[0, :rows])
    assert prefill.VECTORS < 70


@pytest.mark.skipif(isa(torch.bfloat16) is None, reason="no kernels for this processor")
@pytest.mark.parametrize("name", [*MIXERS, "falcon_h1"])
def test_logits_in_bf16_are_the_models_own_within_what_rounding_explains(name: str) -> None:
    model, (prompt,) = build(name).bfloat16(), draw(90)
    with torch.no_grad():
        expected = build(name)(torch.tensor([prompt]), use_cache=False).logits[:, -1]
        packing.install(model, "cu_seq_lens")
        writer = Writer(model, 1, MOST)
        writer.insert([one := Text(prompt, SamplingParams(2, logprobs=0), ())])
        logits = dict(writer.next_logits())[one]
    assert check(logits[None], expected, 2, read=True) < tolerance(2, torch.bfloat16, read=True) / 2


@pytest.mark.parametrize("name", MIXERS)
def test_the_next_start_says_the_same(name: str, tmp_path: Path) -> None:
    """By an image, with states of its own: a conversation goes on, and one that has changed is read from its start."""
    model, (first, second, other) = build(name), draw(20, 15, 4, seed=2)
    answer = generated(model, first)
    prompts = [first, [*first, *answer, *second], [*first[:10], *other]]
    wanted = [generated(model, prompt) for prompt in prompts]
    packing.install(model, "cu_seq_lens")
    with torch.no_grad():
        writer = Writer(model, 1, 64, exact=False)
        assert written(model, [text(first)], writer=writer) == [answer]
        image_writer.keep(writer, tmp_path, first, 64, torch.get_num_threads(), {})
    image, texts = image_writer.ImageWriter(tmp_path, torch.get_num_threads()), [text(prompt) for prompt in prompts]
    for one in texts:
        assert image.takes(one.prompt, one.params)
        image.write(one, lambda texts: False)
    assert [one.tokens for one in texts] == wanted


def test_a_layer_that_is_not_written_is_said() -> None:
    model = small_models.build("granitemoehybrid", num_local_experts=0, time_step_limit=(0.0, 2.0))
    with pytest.raises(FastPathUnavailable, match="time steps within"), torch.no_grad():
        Writer(model, 1, 32)

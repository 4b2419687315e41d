"""Texts of several adapters and of the base in one batch, against plain PEFT's greedy loop one by one, in fp32; and the
proof before anything is served."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from halfbyte.base import load as base_load
from halfbyte.base import stream
from halfbyte.errors import RecipeError
from halfbyte.layers.decoding.llama import Decoder
from halfbyte.layers.decoding.tape import TextAdapters, isa
from halfbyte.serving import models, names
from halfbyte.serving.models import Models, writer_for
from halfbyte.system import device
from halfbyte.writing.places import CachePlaces, FastPathUnavailable
from halfbyte.writing.plain import PlainWriter
from halfbyte.writing.prefill import TapeReader
from halfbyte.writing.sampling import SamplingParams
from halfbyte.writing.text import Text
from halfbyte.writing.writer import Writer
from tests.serving import served

KERNELS = pytest.mark.skipif(isa(torch.float32) is None, reason="no kernels for this processor")


def fast(models: Models) -> Writer:
    return Writer(models.model, models.places, models.max_length, adapters=models.adapters, using=models.using)


def text_of(models: Models, name: str, prompt: list[int], params: SamplingParams, index: int = 0) -> Text:
    one = models.by_name[name]
    return Text(prompt, params, one.stop_ids, adapter=one.adapter, index=index)


def written(
    writer: Writer | PlainWriter, models: Models, max_tokens: list[int], *, pairs: int = 1
) -> dict[tuple[str, int], list[list[int]]]:
    """Greedy answers of every model to every question, as many at once as there are places; some end early and others
    take their places."""
    waiting = [(name, i) for i in range(len(served.QUESTIONS)) for name in models.by_name]
    answers: dict[tuple[str, int], list[Text]] = {}
    active: list[Text] = []
    while waiting or active:
        while waiting and len(active) + pairs <= models.places:
            name, i = waiting.pop(0)
            prompt, params = served.prompt(served.QUESTIONS[i]), SamplingParams(max_tokens[i])
            answers[name, i] = [text_of(models, name, prompt, params, n) for n in range(pairs)]
            writer.insert(answers[name, i])
            active += answers[name, i]
        writer.step()
        active = [text for text in active if not text.ended]
    return {which: [text.tokens for text in texts] for which, texts in answers.items()}


@pytest.mark.parametrize("kind", [pytest.param("fast", marks=KERNELS), "plain"])
@pytest.mark.parametrize("pairs", [1, 2])
def test_each_text_is_that_of_its_adapter_alone(kind: str, pairs: int) -> None:
    models = served.two()
    writer = fast(models) if kind == "fast" else PlainWriter(models.model, models.using)
    max_tokens = [1 + 9 * i % 23 for i in range(len(served.QUESTIONS))]
    with torch.no_grad():
        answers = written(writer, models, max_tokens, pairs=pairs)
    wanted = {
        (name, i): [served.greedy(served.plain(served.where(models), None if name == served.BASE else name),
                                  served.prompt(question), max_tokens[i])] * pairs
        for name in models.by_name
        for i, question in enumerate(served.QUESTIONS)
    }  # fmt: skip
    assert answers == wanted
    assert len({tuple(wanted[name, 2][0]) for name in models.by_name}) == 3  # the adapters say different things


@KERNELS
def test_the_fast_writer_is_taken_and_a_text_does_not_depend_on_its_neighbours() -> None:
    models = served.two()
    writer, why = writer_for(models)
    assert isinstance(writer, Writer) and why == "up to 8 texts a step"
    rows = []
    with torch.no_grad():
        for neighbours in ([], ["second", "model"], ["first"] * 6):
            asked = zip(("first", *neighbours), served.QUESTIONS[1:] + served.QUESTIONS, strict=False)
            texts = [text_of(models, name, served.prompt(question), SamplingParams(9)) for name, question in asked]
            for text in texts:
                writer.insert([text])
            for _ in range(2):
                rows += [row.clone() for row in stepped(writer, texts[0])]
            for text in texts:
                writer.remove(text)
    assert all(torch.equal(row, rows[i % 2]) for i, row in enumerate(rows))  # to the bit


def stepped(writer: Writer, wanted: Text) -> list[torch.Tensor]:
    """The logits of one text in a step of all."""
    rows = writer.next_logits()
    logits = [row.clone() for text, row in rows if text is wanted]
    for text, row in rows:
        text.take(row)
    return logits


@KERNELS
def test_what_has_been_read_for_another_text_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    models, counts, read = served.two(), list[int](), Decoder.read

    def counted(decoder: Any, embedded: Any, positions: Any, places: Any) -> Any:
        counts.append(len(positions))
        return read(decoder, embedded, positions, places)

    def begun(writer: Writer, name: str, ids: list[int]) -> Text:
        text = text_of(models, name, ids, SamplingParams(99))
        writer.insert([text])
        return text

    def logits(writer: Writer, text: Text, tokens: int) -> list[torch.Tensor]:
        return [row for _ in range(tokens) for row in stepped(writer, text)]

    first = served.prompt("a large round box of old trees and a green cup")
    other = [*first[:-4], 7, 9, 11]
    with torch.no_grad():
        writer, fresh = fast(models), fast(models)
        wanted = logits(fresh, begun(fresh, "first", other), 4)
        monkeypatch.setattr(Decoder, "read", counted)
        beside = begun(writer, "second", served.prompt("red"))
        text = begun(writer, "first", first)
        logits(writer, text, 5)
        counts.clear()
        there = begun(writer, "first", other)  # beside the one that has read it
        assert counts == [len(other) - 1 - len(first[:-4])]
        assert all(map(torch.equal, logits(writer, there, 4), wanted))
        longer = [*first, *text.tokens[:-1], 8, 5]
        for one in (text, there):
            writer.remove(one)
        logits(writer, beside, 3)  # places without a text keep what they have
        counts.clear()
        more = begun(writer, "first", longer)  # after it, and what was answered is read as well
        again = begun(writer, "first", other)
        assert counts == [1]
        rows: dict[Text, list[torch.Tensor]] = {more: [], again: []}
        for _ in range(4):
            for one, row in writer.next_logits():
                rows.setdefault(one, []).append(row.clone())
                one.take(row)
        assert all(map(torch.equal, rows[again], wanted))
        fresh = fast(models)
        assert all(map(torch.equal, rows[more], logits(fresh, begun(fresh, "first", longer), 4)))
        counts.clear()
        begun(writer, "second", other)  # read by another adapter
        assert sum(counts) == len(other) - 1


@KERNELS
def test_the_whole_head_is_used_where_a_text_looks_at_more_than_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    models, asked, step = served.two(), list[bool](), Decoder.step

    def noted(decoder: Any, *args: Any, whole: bool = False) -> Any:
        asked.append(whole and decoder.rough is not None)
        return step(decoder, *args, whole=whole)

    monkeypatch.setattr(Decoder, "step", noted)
    rows = []
    with torch.no_grad():
        writer = fast(models)
        for params in (SamplingParams(8), SamplingParams(9, logprobs=2), SamplingParams(9, temperature=1.0)):
            texts = [
                text_of(models, name, served.prompt(question), each)
                for name, question, each in zip(
                    ("first", "second"), served.QUESTIONS, (params, SamplingParams(9)), strict=False
                )
            ]
            for text in texts:
                writer.insert([text])
            for text, row in writer.next_logits():
                text.add(int(row.argmax()))
            asked.clear()
            rows.append([row.clone() for _, row in writer.next_logits()])
            assert asked == [not texts[0].sampler.greedy]
            for text in texts:
                writer.remove(text)
    rough, whole, drawn = rows
    assert all(torch.equal(a, b) for a, b in zip(whole, drawn, strict=True))
    assert [int(row.argmax()) for row in rough] == [int(row.argmax()) for row in whole]
    assert [float(row.max()) for row in rough] == [float(row.max()) for row in whole]


@KERNELS
@pytest.mark.parametrize("fault", ["adapter", "cache", "copy", "none"])
def test_a_fault_of_the_tape_is_found_before_a_text_is_written(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    models = served.two()
    if fault == "adapter":  # every text gets the first one
        monkeypatch.setattr(
            TextAdapters, "use", lambda adapters, text, name: adapters.uses[:, text].copy_(torch.tensor([1.0, 0.0]))
        )
    elif fault == "cache":
        read = TapeReader.read

        def faulty(reader: Any, jobs: Any) -> None:
            read(reader, jobs)
            reader.target.values[1][[m for m, *_ in jobs]] *= -1

        monkeypatch.setattr(TapeReader, "read", faulty)
    elif fault == "copy":  # of what has been read, one token too few
        copy = CachePlaces.copy
        monkeypatch.setattr(CachePlaces, "copy", lambda places, m, to, n: copy(places, m, to, n - 1 if n else 0))
    writer, why = writer_for(models)
    assert isinstance(writer, Writer if fault == "none" else PlainWriter)
    assert ("apart from the model's own" in why) == (fault != "none")


@pytest.mark.parametrize(
    ("name", "settings", "why"),
    [
        ("llama", {"target_modules": ["q_proj"], "use_dora": True}, "DoRA"),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}, ""),
        ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 7]}, "embedding"),
        ("gptj", {"target_modules": ["q_proj"]}, "GPTJBlock has"),
    ],
)
def test_what_no_tape_can_mix_is_written_by_the_models_own_forward(name: str, settings: Any, why: str) -> None:
    where = served.folder(name, {"first": settings, "second": settings})
    models = served.opened(where)
    writer, reason = writer_for(models)
    assert isinstance(writer, PlainWriter) and why in reason
    with torch.no_grad():
        answers = written(writer, models, [6] * 6)
    for (one, i), (tokens,) in answers.items():
        plain = served.plain(where, None if one == served.BASE else one)
        assert tokens == served.greedy(plain, served.prompt(served.QUESTIONS[i]), 6)


def test_where_neither_is_right_nothing_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object, **more: object) -> None:
        raise FastPathUnavailable("not here")

    own = PlainWriter.next_logits
    monkeypatch.setattr(PlainWriter, "next_logits", lambda writer: [(text, -row) for text, row in own(writer)])
    monkeypatch.setattr(Writer, "__init__", refused)
    with pytest.raises(FastPathUnavailable, match="apart"):
        writer_for(served.two())


@pytest.mark.parametrize("large_pages", [True, False])
def test_a_small_base_is_copied_where_there_are_large_pages(large_pages: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    here = replace(device.detect(), large_pages=large_pages)
    monkeypatch.setattr(device, "detect", lambda: here)
    words = names.find([str(served.folder(adapters={}) / served.BASE)], ["quant.compute_dtype=fp32"])
    opened = models.open_all(words, max_length=64, places=1)
    assert opened.opened.plan.placement == ("resident" if large_pages else "mapped")
    assert stream.is_mapped(opened.model) is not large_pages


def test_a_context_beyond_the_models_is_refused_before_the_base_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    words = names.find([str(served.folder(adapters={}) / served.BASE)])
    monkeypatch.setattr(base_load, "open_base", None)
    with pytest.raises(RecipeError, match=r"--context 257 is more than the model reads, 256 .*\n  fix: --context 256$"):
        models.open_all(words, max_length=257)

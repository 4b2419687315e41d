"""Texts of several adapters and of the base in one batch, against plain PEFT's greedy loop one by one, in fp32."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from halfbyte.base import stream
from halfbyte.inference import decode
from halfbyte.layers.decoding.tape import isa
from halfbyte.serving import lanes, models, names
from halfbyte.serving.models import Models
from halfbyte.serving.text import Text, Wish
from halfbyte.system import device
from tests.serving import served

KERNELS = pytest.mark.skipif(isa(torch.float32) is None, reason="no kernels for this processor")


def written(lane: Any, models: Models, most: list[int], *, pairs: int = 1) -> dict[tuple[str, int], list[list[int]]]:
    """Greedy answers of every model to every question, as many at once as there are places; some end early and others
    take their places."""
    waiting = [(name, i) for i in range(len(served.QUESTIONS)) for name in models.named]
    found: dict[tuple[str, int], list[list[int]]] = {}
    of: dict[Any, tuple[str, int]] = {}
    while waiting or of:
        while waiting and len(of) + pairs <= models.places:
            name, i = waiting.pop(0)
            one = models.named[name]
            texts = [Text.begun(one, Wish(most[i]), n, None) for n in range(pairs)]
            lane.begin(one.adapter, [served.prompt(served.QUESTIONS[i])], [texts])
            of.update(dict.fromkeys(texts, (name, i)))
        for text, row in lane.step() if of else ():
            take(lane, text, row, of, found)
    return found


def take(lane: Any, text: Any, row: torch.Tensor, of: Any, found: Any) -> None:
    piece = text.take(row)
    if piece is not None and piece.finish is not None:
        found.setdefault(of.pop(text), []).append(text.words.ids)
        lane.leave(text)


@pytest.mark.parametrize("kind", [pytest.param("tapes", marks=KERNELS), "forward"])
@pytest.mark.parametrize("pairs", [1, 2])
def test_each_text_is_that_of_its_adapter_alone(kind: str, pairs: int) -> None:
    models = served.two()
    lane = lanes.Tapes(models) if kind == "tapes" else lanes.Forward(models)
    most = [1 + 9 * i % 23 for i in range(len(served.QUESTIONS))]
    with torch.no_grad():
        found = written(lane, models, most, pairs=pairs)
    wanted = {
        (name, i): [served.greedy(served.plain(served.where(models), None if name == served.BASE else name),
                                  served.prompt(question), most[i])] * pairs
        for name in models.named
        for i, question in enumerate(served.QUESTIONS)
    }  # fmt: skip
    assert found == wanted
    assert len({tuple(wanted[name, 2][0]) for name in models.named}) == 3  # the adapters say different things


@KERNELS
def test_the_fast_lane_is_taken_and_a_text_does_not_depend_on_its_neighbours() -> None:
    models = served.two()
    lane, why = lanes.lane_for(models)
    assert isinstance(lane, lanes.Tapes) and why == "up to 8 texts a step"
    rows = []
    with torch.no_grad():
        for neighbours in ([], ["second", "model"], ["first"] * 6):
            texts = [Text.begun(models.named[name], Wish(9), 0, None) for name in ("first", *neighbours)]
            for text, question in zip(texts, served.QUESTIONS[1:] + served.QUESTIONS, strict=False):
                lane.begin(text.model.adapter, [served.prompt(question)], [[text]])
            made = list[torch.Tensor]()
            for _ in range(2):
                for text, row in lane.step():
                    made += [row.clone()] if text is texts[0] else []
                    text.take(row)
            for text in texts:
                lane.leave(text)
            rows += made
    assert all(torch.equal(row, rows[i % 2]) for i, row in enumerate(rows))  # to the bit


@KERNELS
def test_what_has_been_read_for_another_text_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    models, counts, read = served.two(), list[int](), lanes.llama.Decoder.read

    def counted(made: Any, embedded: Any, positions: Any, places: Any) -> Any:
        counts.append(len(positions))
        return read(made, embedded, positions, places)

    def begun(lane: Any, name: str, ids: list[int]) -> Text:
        text = Text.begun(models.named[name], Wish(99), 0, None)
        lane.begin(text.model.adapter, [ids], [[text]])
        return text

    def logits(lane: Any, text: Text, tokens: int) -> list[torch.Tensor]:
        made = []
        for _ in range(tokens):
            for own, row in lane.step():
                made += [row.clone()] if own is text else []
                own.take(row)
        return made

    first = served.prompt("a large round box of old trees and a green cup")
    other = [*first[:-4], 7, 9, 11]
    lane, fresh = lanes.Tapes(models), lanes.Tapes(models)
    wanted = logits(fresh, begun(fresh, "first", other), 4)
    monkeypatch.setattr(lanes.llama.Decoder, "read", counted)
    with torch.no_grad():
        beside = begun(lane, "second", served.prompt("red"))
        text = begun(lane, "first", first)
        logits(lane, text, 5)
        counts.clear()
        there = begun(lane, "first", other)  # beside the one that has read it
        assert counts == [len(other) - 1 - len(first[:-4]) + 1]  # and the first token
        for mine, alone in zip(logits(lane, there, 4), wanted, strict=True):
            assert torch.equal(mine, alone)
        said = [*first, *text.words.ids]
        for one in (text, there):
            lane.leave(one)
        logits(lane, beside, 3)  # places without a text compute too
        counts.clear()
        longer = [*said[:-1], 8, 5]
        more = begun(lane, "first", longer)  # after it, and what was answered is read as well
        again = begun(lane, "first", other)
        assert counts == [2, 1]
        made: dict[Text, list[torch.Tensor]] = {beside: [], more: [], again: []}
        for _ in range(4):
            for own, row in lane.step():
                made[own].append(row.clone())
                own.take(row)
        assert all(map(torch.equal, made[again], wanted))
        for m in range(models.places):
            fresh.text[m], fresh.read[m] = None, ("", [])
        assert all(map(torch.equal, made[more], logits(fresh, begun(fresh, "first", longer), 4)))
        counts.clear()
        begun(lane, "second", other)  # read by another adapter
        assert sum(counts) == len(other) - 1


@KERNELS
def test_the_whole_head_is_used_where_a_text_looks_at_more_than_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    models, asked = served.two(), list[bool]()
    lane, own = lanes.Tapes(models), lanes.llama.Decoder.step

    def noted(made: Any, *args: Any, whole: bool = False) -> Any:
        asked.append(whole and made.rough is not None)
        return own(made, *args, whole=whole)

    monkeypatch.setattr(lanes.llama.Decoder, "step", noted)
    found: dict[str, list[torch.Tensor]] = {}
    with torch.no_grad():
        for wish in (Wish(8), Wish(9), Wish(9, logprobs=2), Wish(9, temperature=1.0)):  # the first is proven
            text = Text.begun(models.named["first"], wish, 0, None)
            beside = Text.begun(models.named["second"], Wish(9), 0, None)
            for one, question in zip((text, beside), served.QUESTIONS, strict=False):
                lane.begin(one.model.adapter, [served.prompt(question)], [[one]])
            for one, row in lane.step():
                one.last = int(row.argmax())
            asked.clear()
            rows = [row.clone() for _, row in lane.step()]
            assert asked == [not text.greedy]
            found[str(wish)] = rows
            lane.leave(text)
            lane.leave(beside)
    _, rough, whole, drawn = found.values()
    assert all(torch.equal(a, b) for a, b in zip(whole, drawn, strict=True))
    assert [int(row.argmax()) for row in rough] == [int(row.argmax()) for row in whole]
    assert [float(row.max()) for row in rough] == [float(row.max()) for row in whole]


@KERNELS
@pytest.mark.parametrize("fault", ["adapter", "cache", "copy", "none"])
def test_a_fault_of_the_tape_is_found_before_a_text_is_written(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    models = served.two()
    if fault == "adapter":  # every text gets the first one
        monkeypatch.setattr(
            lanes.TextAdapters, "use", lambda mixed, text, name: mixed.uses[:, text].copy_(torch.tensor([1.0, 0.0]))
        )
    elif fault == "cache":
        read = lanes.reader.Reader.read

        def faulty(made: Any, texts: Any, start: int, *, first: bool) -> None:
            read(made, texts, start, first=first)
            made.of.values[1][[m for m, _ in texts]] *= -1

        monkeypatch.setattr(lanes.reader.Reader, "read", faulty)
    elif fault == "copy":  # of what has been read, one token too few
        copy = lanes.Tapes._copy
        monkeypatch.setattr(lanes.Tapes, "_copy", lambda lane, m, to, n: copy(lane, m, to, n - 1 if n else 0))
    lane, why = lanes.lane_for(models)
    assert isinstance(lane, lanes.Tapes if fault == "none" else lanes.Forward)
    assert ("apart from the model's own" in why) == (fault != "none")


@pytest.mark.parametrize(
    ("name", "settings", "why"),
    [
        ("llama", {"target_modules": ["q_proj"], "use_dora": True}, "DoRA"),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}, ""),
        ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 7]}, "embedding"),
        ("gpt2", {"target_modules": ["c_attn"]}, "not built like Llama"),
    ],
)
def test_what_no_tape_can_mix_is_written_by_the_models_own_forward(name: str, settings: Any, why: str) -> None:
    where = served.folder(name, {"first": settings, "second": settings})
    models = served.opened(where)
    lane, said = lanes.lane_for(models)
    assert isinstance(lane, lanes.Forward) and why in said
    with torch.no_grad():
        found = written(lane, models, [6] * 6)
    for (one, i), (tokens,) in found.items():
        plain = served.plain(where, None if one == served.BASE else one)
        assert tokens == served.greedy(plain, served.prompt(served.QUESTIONS[i]), 6)


def test_where_neither_is_right_nothing_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    run = lanes.Forward._run
    monkeypatch.setattr(lanes.Forward, "_run", lambda lane, *rest: -run(lane, *rest))
    monkeypatch.setattr(lanes.Tapes, "__init__", lambda *rest: (_ for _ in ()).throw(decode.Slower("not here")))
    with pytest.raises(decode.Slower, match="apart"):
        lanes.lane_for(served.two())


@pytest.mark.parametrize("large_pages", [True, False])
def test_a_small_base_is_copied_where_there_are_large_pages(large_pages: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    here = replace(device.detect(), large_pages=large_pages)
    monkeypatch.setattr(device, "detect", lambda: here)
    words = names.find([str(served.folder(adapters={}) / served.BASE)], ["quant.compute_dtype=fp32"])
    made = models.open_all(words, room=64, places=1)
    assert made.opened.plan.placement == ("resident" if large_pages else "mapped")
    assert stream.is_mapped(made.model) is not large_pages

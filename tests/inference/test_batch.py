"""Many answers at once against one by one by the model's own loop; choices against transformers' own logits."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from halfbyte.data.encoding.examples import Example
from halfbyte.errors import DataError
from halfbyte.inference import batch, choices
from halfbyte.layers import packing
from halfbyte.layers.decoding.llama import Decoder
from halfbyte.layers.decoding.tape import isa
from halfbyte.models import structure
from halfbyte.recipe.evaluation import Eval
from halfbyte.scoring import metrics
from halfbyte.writing.places import CachePlaces, FastPathUnavailable
from halfbyte.writing.prefill import Prefilled, TapeReader
from halfbyte.writing.text import Text
from halfbyte.writing.writer import check
from tests import small_models, tiny, tiny_run

WORDS = ["red", "green cup", "a large round box of old trees", "blue", "new road", "small square tree and a cup"]


def prompts(count: int) -> list[list[int]]:
    tokenizer = tiny_run.tokenizer()
    return [tokenizer(f"{WORDS[i % 6]} {i}")["input_ids"] for i in range(count)]


def tokens_alone(model: Any, prompt: list[int], most: int) -> list[int]:
    """transformers' own greedy loop, one prompt."""
    stops = [tiny_run.tokenizer().convert_tokens_to_ids("<|im_end|>"), 2]
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=most, do_sample=False, eos_token_id=stops, pad_token_id=0
        )
    found: list[int] = out[0, len(prompt) :].tolist()
    return found


def alone(model: Any, prompt: list[int], most: int) -> str:
    return str(tiny_run.tokenizer().decode(tokens_alone(model, prompt, most), skip_special_tokens=True))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Why another way was taken."""
    reasons: list[str] = []
    monkeypatch.setattr(batch, "log_once", reasons.append)
    return reasons


@pytest.mark.skipif(isa(torch.float32) is None, reason="no kernels for this processor")
@pytest.mark.parametrize(
    ("name", "count", "at_once", "packed"),
    [("llama", 21, 16, True), ("llama", 5, 4, False), ("gemma3", 7, 4, True), ("qwen3", 3, 1, True)],
)
def test_answers_in_a_batch_are_those_of_one_by_one(
    name: str, count: int, at_once: int, packed: bool, told: list[str]
) -> None:
    """Answers of many lengths: texts leave, others take their place, and the last ones go to a smaller tape."""
    model = tiny.model(name, vocab_size=tiny_run.VOCAB)
    asked, most = prompts(count), [1 + 7 * i % 23 for i in range(count)]
    wanted = [alone(model, prompt, n) for prompt, n in zip(asked, most, strict=True)]
    assert len(set(wanted)) > 1
    if packed:
        packing.install(model, "cu_seq_lens")
    seen: list[tuple[int, int]] = []
    found = batch.answers(
        model, tiny_run.tokenizer(), asked, most, at_once=at_once, tokens_at_once=40,
        progress=lambda *done: seen.append(done),
    )  # fmt: skip
    assert found == wanted and told == []
    assert seen[-1] == (count, count) and seen == sorted(seen) and len({done for done, _ in seen}) > count // 2


@pytest.mark.skipif(isa(torch.float32) is None, reason="no kernels for this processor")
@pytest.mark.parametrize("fault", ["put", "read"])
def test_a_fault_of_the_tape_is_seen_and_the_models_own_forward_answers(
    fault: str, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model("llama", vocab_size=tiny_run.VOCAB)
    wanted = [alone(model, prompt, 6) for prompt in prompts(4)]
    put, read, rows = Prefilled.put, TapeReader.read, [example("red: ", "cup")] * 4

    def faulty(prefilled: Any, i: int, decoder: Decoder, place: int) -> None:
        put(prefilled, i, decoder, place)
        decoder.keys[0][place].neg_()

    def misread(reader: Any, jobs: Any) -> None:
        read(reader, jobs)
        reader.target.keys[0].neg_()

    monkeypatch.setattr(Prefilled, "put", faulty)
    monkeypatch.setattr(TapeReader, "read", misread)
    asked = [row.prompt_ids for row in rows] if fault == "put" else prompts(4)
    losses: dict[int, float] | None = {} if fault == "put" else None  # rows are read by a forward
    wanted = [alone(model, list(prompt), 6) for prompt in asked]
    found = batch.answers(
        model, tiny_run.tokenizer(), asked, [6] * 4, rows=rows if fault == "put" else (), losses=losses
    )  # fmt: skip
    assert found == wanted and not losses
    assert len(told) == 1 and "apart from the model's own" in told[0]


def test_another_architecture_takes_the_models_own_forward(told: list[str]) -> None:
    model = tiny.model("gptj", vocab_size=tiny_run.VOCAB)
    wanted = [alone(model, prompt, 5) for prompt in prompts(5)]
    assert batch.answers(model, tiny_run.tokenizer(), prompts(5), [5] * 5, at_once=2) == wanted
    assert len(told) == 1 and "GPTJBlock has" in told[0]
    assert batch.answers(model, tiny_run.tokenizer(), [], []) == []


@pytest.mark.parametrize("kind", ["rwkv", "deepseek_v4", "mamba"])
@pytest.mark.usefixtures("told")
def test_a_text_is_that_of_its_prompt_alone_where_a_model_takes_padding_for_text(kind: str) -> None:
    """Long beside short: RWKV's state would begin with the padding, DeepSeek-V4 would take other keys together."""
    model, asked = (
        small_models.build(kind, vocab_size=tiny_run.VOCAB),
        [p * n for p, n in zip(prompts(4), (1, 4, 2, 1), strict=True)],
    )
    wanted = [alone(model, prompt, 9) for prompt in asked]
    assert batch.answers(model, tiny_run.tokenizer(), asked, [9] * 4) == wanted


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_a_generation_config_does_to_logits_and_stop_strings(name: str) -> None:
    model, tokenizer = tiny.model(name, vocab_size=tiny_run.VOCAB), tiny_run.tokenizer()
    model.generation_config.repetition_penalty = 5.0
    wanted = [alone(model, prompt, 12) for prompt in prompts(3)]
    assert batch.answers(model, tokenizer, prompts(3), [12] * 3) == wanted
    stops = ("<|im_end|>", wanted[0][2:4])  # a special token is none of the text
    found = batch.answers(model, tokenizer, prompts(3), [12] * 3, stops=stops, ends=[2])
    assert found == [text.partition(stops[1])[0] for text in wanted]


@pytest.mark.skipif(isa(torch.float32) is None, reason="no kernels for this processor")
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_one_forward_gives_answers_and_losses(name: str, told: list[str]) -> None:
    model, tokenizer = tiny.model(name, vocab_size=tiny_run.VOCAB), tiny_run.tokenizer()
    rows = [example(f"{word}: ", answer) for word, answer in zip(WORDS, reversed(WORDS), strict=True)]
    asked = [list(row.prompt_ids) for row in rows]
    wanted = [alone(model, prompt, 9) for prompt in asked]
    losses = []
    for row in rows:
        ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
        with torch.no_grad():
            losses.append(float(model(input_ids=ids, labels=labels).loss) * int((labels != -100).sum()))
    packing.install(model, "cu_seq_lens")
    found: dict[int, float] = {}
    texts = batch.answers(
        model, tokenizer, asked, [9] * 6, at_once=4, tokens_at_once=50, rows=rows, losses=found
    )  # fmt: skip
    assert texts == wanted and told == []
    assert [found[i] for i in range(6)] == pytest.approx(losses, rel=1e-5)
    # not where a prompt is no beginning of its row
    other = [Example(row.input_ids, row.labels, row.where, (5, *row.prompt_ids), row.completion) for row in rows]
    none: dict[int, float] = {}
    assert batch.answers(model, tokenizer, asked, [9] * 6, rows=other, losses=none) == wanted and none == {}


def losses_of(model: Any, rows: list[Example]) -> list[float]:
    """Summed, by transformers' own forward."""
    made = []
    for row in rows:
        ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
        with torch.no_grad():
            made.append(float(model(input_ids=ids, labels=labels).loss) * int((labels[:, 1:] != -100).sum()))
    return made


@pytest.mark.skipif(isa(torch.float32) is None, reason="no own loop")
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_what_is_expected_is_a_draft(name: str, told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of the rows expect what the model writes, a third its beginning, the others something else."""
    model, tokenizer = tiny.model(name, vocab_size=tiny_run.VOCAB), tiny_run.tokenizer()
    rows, known = list[Example](), 0
    for i in range(19):
        asked = tokenizer(f"a large round box of old trees {WORDS[i % 6]} {i}: ")["input_ids"]
        own, other = tokens_alone(model, asked, 9), tokenizer(f"{WORDS[(i + 1) % 6]} and a cup")["input_ids"]
        same = [len(own), len(own) // 2, 0][i % 3]
        assert own[same : same + 1] != other[:1]
        ids = (*asked, *own[:same], *other)
        rows.append(Example(ids, (*[-100] * len(asked), *ids[len(asked) :]), "rows.jsonl:1", tuple(asked), ""))
        known += min(len(own), same + 1)
    asked = [list(row.prompt_ids) for row in rows]
    wanted, losses = [alone(model, prompt, 9) for prompt in asked], losses_of(model, rows)
    packing.install(model, "cu_seq_lens")
    counted = mock.Mock(side_effect=Text.add, autospec=True)
    monkeypatch.setattr(Text, "add", lambda *args: counted(*args))
    steps = mock.Mock(side_effect=Decoder.step, autospec=True)
    monkeypatch.setattr(Decoder, "step", lambda *args, **more: steps(*args, **more))
    found: dict[int, float] = {}
    assert batch.answers(model, tokenizer, asked, [9] * 19, at_once=1, rows=rows, losses=found) == wanted
    assert told == [] and [found[i] for i in range(19)] == pytest.approx(losses, rel=1e-6)
    assert counted.call_count - (steps.call_count - 1) == known > 60, "one step is the proof's"
    assert batch.answers(model, tokenizer, asked, [9] * 19, at_once=4, rows=rows, losses={}) == wanted


@pytest.mark.skipif(isa(torch.float32) != "avx2", reason="prompts are read by a forward")
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_what_prompts_begin_with_is_read_once_and_copied(
    name: str, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny.model(name, vocab_size=tiny_run.VOCAB), tiny_run.tokenizer()
    shared = "a large round box of old trees " * 9
    asked = [tokenizer(f"{shared}{WORDS[i % 6]} {i}: ")["input_ids"] for i in range(19)]
    wanted = [alone(model, prompt, 9) for prompt in asked]
    packing.install(model, "cu_seq_lens")
    copied, read = list[int](), list[int]()
    copy, own = CachePlaces.copy, TapeReader.read
    monkeypatch.setattr(CachePlaces, "copy", lambda places, m, to, n: (copied.append(n), copy(places, m, to, n)))
    monkeypatch.setattr(
        TapeReader, "read", lambda reader, jobs: (read.extend(len(t) - n for _, t, n in jobs), own(reader, jobs))
    )
    assert batch.answers(model, tokenizer, asked, [9] * 19, at_once=4) == wanted
    assert told == [] and len(read) == 19 and read[0] > 64 > max(read[1:]) and min(n for n in copied if n) > 64


def example(prompt: str, answer: str) -> Example:
    """As a row is encoded: the answer and the end of the turn are labelled."""
    tokenizer = tiny_run.tokenizer()
    start, said = tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]
    end = [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    ids, labels = (*start, *said, *end), (*[-100] * len(start), *said, *end)
    return Example(ids, labels, "rows.jsonl:1", tuple(start), answer)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_choice_is_the_most_likely_answer(name: str) -> None:
    model, tokenizer = tiny.model(name, vocab_size=tiny_run.VOCAB), tiny_run.tokenizer()
    for layer in structure.decoder_layers(model):  # a training's dropout
        layer.register_forward_pre_hook(lambda module, args: (F.dropout(args[0], 0.9, module.training), *args[1:]))
    named = ("red", "cup", "blue", "tree", "old", "green box")
    rows = [example(f"{word}: ", answer) for word, answer in zip(WORDS, named, strict=True)]

    def likelihood(row: Example, answer: str) -> float:
        said = [*tokenizer(answer)["input_ids"], tokenizer.convert_tokens_to_ids("<|im_end|>")]
        ids = torch.tensor([[*row.prompt_ids, *said]])
        with torch.no_grad():
            log_p = torch.log_softmax(model(ids).logits[0].double(), -1)
        first = len(row.prompt_ids) - 1
        return sum(float(log_p[first + i, token]) for i, token in enumerate(said))

    wanted = [max(named, key=lambda answer, row=row: likelihood(row, answer)) for row in rows]
    assert len(set(wanted)) > 1
    for layout in ("single", packing.layouts(model)[0]):
        packing.install(model, layout)
        for train in (False, True):  # as in a training's evaluation
            model.train(train)
            found = choices.choose(model, tokenizer, rows, Eval(choices=named), lambda *done: None)
            assert found == wanted and model.training == train


def test_choices_that_cannot_be_are_told() -> None:
    assert metrics.choices(Eval(), ["yes", "no", "yes", "no"]) == ("yes", "no")
    with pytest.raises(DataError, match=r"4 rows expect 4 different answers\.\n  fix: --set 'eval.choices="):
        metrics.choices(Eval(), ["a", "b", "c", "d"])
    with pytest.raises(DataError, match=r"'maybe' is not among eval.choices \(yes, no\)"):
        metrics.choices(Eval(choices=("yes", "no")), ["yes", "maybe"])
    model = tiny.model("llama", vocab_size=tiny_run.VOCAB)
    row = example("red ", "cup")
    torn = Example((*row.input_ids[:-2], 7, 8), row.labels, row.where, row.prompt_ids, "cup")
    with pytest.raises(DataError, match=r"rows.jsonl:1: the metric choice cannot put another answer in the place"):
        choices.choose(model, tiny_run.tokenizer(), [torn], Eval(choices=("cup", "box")), lambda *done: None)


def test_the_proof_allows_rounding_and_nothing_else() -> None:
    own = torch.randn(3, 50)
    assert check(own.clone(), own, 2) == 0
    with pytest.raises(FastPathUnavailable, match="apart"):
        check(own * 1.5, own, 2)

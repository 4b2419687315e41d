"""Runs that read and write nothing, over HTTP: vectors by the official client, labels, rankings."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from halfbyte import finetune
from halfbyte.data.encoding.examples import Example
from halfbyte.errors import DataError, RecipeError
from halfbyte.inference import vectors
from halfbyte.inference.load import open_run
from halfbyte.objectives.labels import Labels
from halfbyte.serving import names, reader
from halfbyte.serving.http import reading, wire
from halfbyte.serving.http.refusal import Refusal
from tests import tiny_run
from tests.objectives.test_vectors import WORDS
from tests.serving.http.test_app import Running

ROWS = {
    "embed": [{"query": w, "passage": f"{w} {w}"} for w in WORDS],
    "classify": [{"text": w, "label": (w[0] < "m" and "early") or "late"} for w in WORDS],
    "regress": [{"text": w, "text_pair": w + w, "label": len(w)} for w in WORDS],
}


def trained(folder: Path, task: str) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[task]))
    prompts = {"data__query_prompt": "ask: "} if task == "embed" else {}
    changes = {"task": task, "data__train": folder / "rows.jsonl", "data__eval": "none", "quant__type": "none"}
    finetune.train(tiny_run.recipe(folder, **changes, **prompts, train__max_steps=1))
    return folder / "run"


def served(folder: Path, waiting: int = 128) -> reader.TextReader:
    return reader.TextReader(open_run(folder), "one", waiting)


def plain_vectors(folder: Path, texts: Sequence[str]) -> Any:
    """By transformers and PEFT: the last token's hidden state of each text, of unit length."""
    model = PeftModel.from_pretrained(
        AutoModel.from_pretrained(folder.parent / "model", dtype=torch.float32), str(folder / "sentence_transformer")
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder.parent / "model")
    with torch.no_grad():
        last = [model(torch.tensor([tokenizer(text).input_ids])).last_hidden_state[0, -1] for text in texts]
    return torch.nn.functional.normalize(torch.stack(last), dim=-1).numpy()


def plain_scores(folder: Path, texts: Sequence[tuple[str, ...]]) -> Any:
    """By transformers and PEFT: what the head says of texts or pairs."""
    base, adapter = folder.parent / "model", folder / "adapter"
    config = AutoConfig.from_pretrained(adapter / "head")
    classifier = AutoModelForSequenceClassification.from_pretrained(base, config=config, dtype=torch.float32)
    model, tokenizer = PeftModel.from_pretrained(classifier, str(adapter)).eval(), AutoTokenizer.from_pretrained(base)
    with torch.no_grad():
        return torch.cat([model(torch.tensor([tokenizer(*text).input_ids])).logits for text in texts]).numpy()


@pytest.fixture(scope="module")
def embeds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, reader.TextReader]]:
    one = served(trained(tmp_path_factory.mktemp("embed"), "embed"))
    running = Running(one)
    yield running, one
    running.end()


def test_sixty_four_clients_get_their_own_vectors(embeds: tuple[Running, reader.TextReader]) -> None:
    running, one = embeds
    texts = [f"{WORDS[i % len(WORDS)]} {WORDS[i // 5 % len(WORDS)]}" for i in range(64)]

    async def all_of_them() -> list[Any]:
        client = running.clients()
        kinds = ("float", "base64")
        return await asyncio.gather(
            *(client.embeddings.create(model="one", input=[text, "red"], encoding_format=kinds[i % 2])  # type: ignore
              for i, text in enumerate(texts))
        )  # fmt: skip

    answers, wanted = asyncio.run(all_of_them()), plain_vectors(one.opened.run, [*texts, "red"])
    for i, answer in enumerate(answers):
        got = [row.embedding for row in answer.data]
        got = [np.frombuffer(base64.b64decode(g), "<f4") if isinstance(g, str) else g for g in got]
        np.testing.assert_allclose(got, wanted[[i, 64]], atol=1e-5)
        assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0


def test_dimensions_tokens_and_prompts(embeds: tuple[Running, reader.TextReader]) -> None:
    running, one = embeds
    client = running.client()
    (short,) = client.embeddings.create(model="one", input="red cup", dimensions=8).data
    whole = plain_vectors(one.opened.run, ["red cup", "ask: red cup"])
    np.testing.assert_allclose(short.embedding, whole[0, :8] / np.linalg.norm(whole[0, :8]), atol=1e-5)
    ids = one.opened.tokenizer("red cup").input_ids
    np.testing.assert_allclose(client.embeddings.create(model="one", input=ids).data[0].embedding, whole[0], atol=1e-5)
    asked = client.embeddings.create(model="one", input="red cup", extra_body={"prompt_name": "query"})
    np.testing.assert_allclose(asked.data[0].embedding, whole[1], atol=1e-5)
    for wrong in ({"dimensions": 10**6}, {"input": ""}, {"input": [10**6]}, {"input": "red " * 400}, {"model": "two"}):
        with pytest.raises((openai.BadRequestError, openai.NotFoundError)):
            client.embeddings.create(**{"model": "one", "input": "red", **wrong})
    assert client.models.list().data[0].id == "one"


WRONG_INPUTS: list[tuple[dict[str, Any], str, str]] = [
    ({"input": []}, "input", "List should have at least 1 item after validation, not 0"),
    ({"input": ["red"] * 2049}, "input", "List should have at most 2048 items after validation, not 2049"),
    ({"input": [[1]] * 2049}, "input", "List should have at most 2048 items after validation, not 2049"),
    ({"input": ["a", ""]}, "input.1", "String should have at least 1 character"),
    ({"input": ["a", 1]}, "input.1", "Input should be a valid string"),
    ({"input": [True]}, "input.0", "Input should be a valid integer"),
    ({"input": [[1], [2, True]]}, "input.1.1", "Input should be a valid integer"),
    ({"input": 5}, "input", "a text, a list of tokens, or a list of 1 to 2,048 of either is needed"),
    ({"input": "red", "dimensions": True}, "dimensions", "Input should be a valid integer"),
]


@pytest.mark.parametrize(("asked", "param", "message"), WRONG_INPUTS)
def test_what_is_wrong_with_an_input_is_named(
    embeds: tuple[Running, reader.TextReader], asked: dict[str, Any], param: str, message: str
) -> None:
    ways = ["/v1/embeddings"]
    if all(isinstance(one, str) for one in (asked["input"] if isinstance(asked["input"], list) else [5])):
        ways.append("/classify")
    for way in ways:
        answer = embeds[0].post(asked, way)
        error = answer.json()["error"]
        assert answer.status_code == 400 and (error["param"], error["message"]) == (param, f"{param}: {message}")


def test_tokens_are_not_for_labels(embeds: tuple[Running, reader.TextReader]) -> None:
    error = embeds[0].post({"input": [1]}, "/classify").json()["error"]
    assert error["message"] == "input: a text, or a list of 1 to 2,048 texts, is needed"


def test_a_full_queue_says_when_to_come_again(embeds: tuple[Running, reader.TextReader]) -> None:
    """With a queue of none who comes while nothing is read is read, and who comes meanwhile is not."""
    one = reader.TextReader(embeds[1].opened, "one", 0)
    full, begun, ends, read = Running(one), threading.Event(), threading.Event(), one._read

    def slow(rows: list[Example]) -> Any:
        begun.set()
        assert ends.wait(20)
        return read(rows)

    one._read = slow  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as other:
        first = other.submit(full.client().embeddings.create, model="one", input="red")
        assert begun.wait(20)
        with pytest.raises(openai.RateLimitError):
            full.client().embeddings.create(model="one", input="red")
        ends.set()
        assert len(first.result().data) == 1
    assert len(full.client().embeddings.create(model="one", input="red").data) == 1
    full.end()


def test_a_request_that_fails_fails_alone_and_is_logged(
    embeds: tuple[Running, reader.TextReader], caplog: pytest.LogCaptureFixture
) -> None:
    """Of three that are read together one breaks the model: the others get their own vectors."""
    one = reader.TextReader(embeds[1].opened, "one", 8)
    read, bad, turns = one._read, one.opened.tokenizer("tree").input_ids, list[int]()

    def breaks(rows: list[Example]) -> Any:
        turns.append(len(rows))
        if any(list(row.input_ids) == bad for row in rows):
            raise RuntimeError("a broken kernel")
        return read(rows)

    one._read = breaks  # type: ignore[method-assign]

    async def all_three() -> list[Any]:
        return await asyncio.gather(*(one.read([(w,)]) for w in ("red", "tree", "box")), return_exceptions=True)

    red, tree, box = asyncio.run(all_three())
    assert turns[0] == 3 and isinstance(tree, RuntimeError)
    wanted = plain_vectors(one.opened.run, ["red", "box"])
    np.testing.assert_allclose(np.concatenate([red[0], box[0]]), wanted, atol=1e-5)
    assert [r.getMessage() for r in caplog.records] == [
        "a request of 1 texts has failed: RuntimeError: a broken kernel"
    ]


def test_a_text_of_no_token_is_refused_alone(embeds: tuple[Running, reader.TextReader]) -> None:
    running, one = embeds
    empty = one.opened.tokenizer("").input_ids
    assert not empty, "this tokenizer has no special tokens"
    assert running.post({"input": ["red", "\u200b"]}, "/v1/embeddings").status_code == 200
    with pytest.raises(DataError, match=r"a text of which the tokenizer makes no token: ''"):
        vectors.of_texts(one.opened, ["red", ""])
    assert isinstance(one._rows([("red",), ("",)]), DataError)


def test_scores_are_raw_or_refused(embeds: tuple[Running, reader.TextReader]) -> None:
    asked = {"query": "red", "texts": ["box"]}
    answers = [embeds[0].post({**asked, "raw_scores": raw}, "/rerank").status_code for raw in (True, False)]
    assert answers == [200, 400]
    error = embeds[0].post({"query": "red", "documents": ["box"], "top_n": True}, "/rerank").json()["error"]
    assert (error["param"], error["message"]) == ("top_n", "top_n: Input should be a valid integer")


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"stop": 5}, "stop"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        ({"messages": [{"role": "user", "content": "red"}], "tools": [{"type": "function"}]}, "tools.0.function"),
    ],
)
def test_a_field_is_named_as_the_request_has_it(more: dict[str, Any], param: str) -> None:
    talk = {"model": "one", "messages": [{"role": "user", "content": "red"}]}
    with pytest.raises(Refusal) as refused:
        wire.read(wire.ChatRequest, json.dumps({**talk, **more}).encode())
    assert refused.value.body["error"]["param"] == param


def test_rankings_by_vectors_as_vllm_and_tei_have_them(embeds: tuple[Running, reader.TextReader]) -> None:
    running, one = embeds
    passages = ["box", "red cup", "old road"]
    query, *others = plain_vectors(one.opened.run, ["ask: red", *passages])
    scores = np.array(others) @ query
    order = np.argsort(-scores).tolist()
    got = running.post({"model": "one", "query": "red", "documents": passages, "top_n": 2}, "/rerank").json()
    assert [row["index"] for row in got["results"]] == order[:2]
    assert got["results"][0]["relevance_score"] == pytest.approx(scores.max(), abs=1e-5)
    tei = running.post({"query": "red", "texts": passages, "return_text": True}, "/rerank").json()
    assert [(row["index"], row["text"]) for row in tei] == [(i, passages[i]) for i in order]
    assert running.post({"input": "red"}, "/classify").status_code == 400


def test_answers_are_written_outside_of_the_event_loop(
    embeds: tuple[Running, reader.TextReader], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request of many vectors keeps no other waiting while its numbers become text."""
    threads, real, encode = set[str](), reading.unit, reading.Json.__init__
    seen = lambda: threads.add(threading.current_thread().name)  # noqa: E731
    monkeypatch.setattr(reading, "unit", lambda numbers: (seen(), real(numbers))[1])
    monkeypatch.setattr(reading.Json, "__init__", lambda self, *a, **k: (seen(), encode(self, *a, **k))[1])
    assert embeds[0].post({"input": ["red", "box"]}, "/v1/embeddings").status_code == 200
    assert threads and embeds[0].thread.name not in threads


def test_labels_and_scores_of_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for task in ("classify", "regress"):
        (tmp_path / task).mkdir()
        one = served(trained(tmp_path / task, task))
        running = Running(one)
        with monkeypatch.context() as patch:
            if task == "classify":
                patch.setattr(Labels, "at", lambda *_: pytest.fail("read again for a request"))
                got = running.post({"model": "one", "input": ["red", "tree"]}, "/classify").json()
                powers = np.exp(plain_scores(one.opened.run, [("red",), ("tree",)]))
                wanted = powers / powers.sum(1, keepdims=True)
                assert [row["label"] for row in got["data"]] == [["early", "late"][p.argmax()] for p in wanted]
                np.testing.assert_allclose([row["probs"] for row in got["data"]], wanted, atol=1e-5)
                assert got["data"][0]["num_classes"] == 2
            else:
                got = running.post({"query": "red", "documents": ["box", "road"]}, "/v1/rerank").json()
                scores = {row["index"]: row["relevance_score"] for row in got["results"]}
                wanted = plain_scores(one.opened.run, [("red", "box"), ("red", "road")])
                np.testing.assert_allclose([scores[0], scores[1]], wanted[:, 0], atol=1e-5)
        running.end()
    assert names.of_other_task([f"a={tmp_path / 'classify' / 'run'}"]) is not None
    with pytest.raises(RecipeError, match="is served alone"):
        names.of_other_task([str(tmp_path / task / "run") for task in ("classify", "regress")])

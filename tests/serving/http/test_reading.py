"""Runs that read and write nothing, over HTTP: vectors by the official client, labels, rankings."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from halfbyte import finetune
from halfbyte.errors import RecipeError
from halfbyte.inference import labels, vectors
from halfbyte.inference.load import open_run
from halfbyte.objectives.labels import Labels
from halfbyte.serving import names, reader
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

    answers, wanted = asyncio.run(all_of_them()), vectors.of_texts(one.opened, [*texts, "red"])
    for i, answer in enumerate(answers):
        got = [row.embedding for row in answer.data]
        got = [np.frombuffer(base64.b64decode(g), "<f4") if isinstance(g, str) else g for g in got]
        np.testing.assert_allclose(got, wanted[[i, 64]], atol=1e-5)
        assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0


def test_dimensions_tokens_and_prompts(embeds: tuple[Running, reader.TextReader]) -> None:
    running, one = embeds
    client = running.client()
    (short,) = client.embeddings.create(model="one", input="red cup", dimensions=8).data
    whole = vectors.of_texts(one.opened, ["red cup", "ask: red cup"])
    np.testing.assert_allclose(short.embedding, whole[0, :8] / np.linalg.norm(whole[0, :8]), atol=1e-5)
    ids = one.opened.tokenizer("red cup").input_ids
    np.testing.assert_allclose(client.embeddings.create(model="one", input=ids).data[0].embedding, whole[0], atol=1e-5)
    asked = client.embeddings.create(model="one", input="red cup", extra_body={"prompt_name": "query"})
    np.testing.assert_allclose(asked.data[0].embedding, whole[1], atol=1e-5)
    for wrong in ({"dimensions": 10**6}, {"input": ""}, {"input": [10**6]}, {"input": "red " * 400}, {"model": "two"}):
        with pytest.raises((openai.BadRequestError, openai.NotFoundError)):
            client.embeddings.create(**{"model": "one", "input": "red", **wrong})
    assert client.models.list().data[0].id == "one"


def test_a_full_queue_says_when_to_come_again(tmp_path: Path, embeds: tuple[Running, reader.TextReader]) -> None:
    full = Running(reader.TextReader(embeds[1].opened, "one", 0))
    with pytest.raises(openai.RateLimitError):
        full.client().embeddings.create(model="one", input="red")
    full.end()


def test_rankings_by_vectors_as_vllm_and_tei_have_them(embeds: tuple[Running, reader.TextReader]) -> None:
    running, one = embeds
    passages = ["box", "red cup", "old road"]
    query, *others = vectors.of_texts(one.opened, ["ask: red", *passages])
    scores = np.array(others) @ query
    order = np.argsort(-scores).tolist()
    got = running.post({"model": "one", "query": "red", "documents": passages, "top_n": 2}, "/rerank").json()
    assert [row["index"] for row in got["results"]] == order[:2]
    assert got["results"][0]["relevance_score"] == pytest.approx(scores.max(), abs=1e-5)
    tei = running.post({"query": "red", "texts": passages, "return_text": True}, "/rerank").json()
    assert [(row["index"], row["text"]) for row in tei] == [(i, passages[i]) for i in order]
    assert running.post({"input": "red"}, "/classify").status_code == 400


def test_labels_and_scores_of_pairs(tmp_path: Path) -> None:
    for task in ("classify", "regress"):
        (tmp_path / task).mkdir()
        one = served(trained(tmp_path / task, task))
        running, objective = Running(one), Labels.at(one.opened.run / "adapter")
        if task == "classify":
            got = running.post({"model": "one", "input": ["red", "tree"]}, "/classify").json()
            wanted = labels.predictions(one.opened, objective, [("red",), ("tree",)])
            assert [row["label"] for row in got["data"]] == [row["prediction"] for row in wanted]
            assert got["data"][0]["probs"] == pytest.approx([*wanted[0]["probabilities"].values()], abs=1e-5)
            assert got["data"][0]["num_classes"] == 2
        else:
            got = running.post({"query": "red", "documents": ["box", "road"]}, "/v1/rerank").json()
            wanted = [
                a["prediction"] for a in labels.predictions(one.opened, objective, [("red", "box"), ("red", "road")])
            ]
            scores = {row["index"]: row["relevance_score"] for row in got["results"]}
            assert [scores[0], scores[1]] == pytest.approx(wanted, abs=1e-5)
        running.end()
    assert names.of_other_task([f"a={tmp_path / 'classify' / 'run'}"]) is not None
    with pytest.raises(RecipeError, match="is served alone"):
        names.of_other_task([str(tmp_path / task / "run") for task in ("classify", "regress")])

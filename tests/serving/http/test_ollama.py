"""Ollama's interface: its lines, its defaults, its errors."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest

from tests.serving import served
from tests.serving.http.test_app import Running, asked, wanted
from tests.serving.http.test_app import running as running
from tests.serving.http.test_tools import running as tools_server


def lines(server: Running, **body: Any) -> list[Any]:
    answer = server.post({"model": "first", "messages": asked("green cup"), **body}, "/api/chat")
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


@pytest.mark.parametrize("name", ["second", "second:latest"])
def test_a_text_comes_in_lines_or_whole(running: Running, name: str) -> None:
    right = wanted("second", "green cup", 16)
    options = {"temperature": 0, "num_predict": 16, "num_ctx": 4096, "seed": None}
    *some, last = lines(running, model=name, options=options)
    assert "".join(line["message"]["content"] for line in some) == right and last["message"]["content"] == ""
    assert [line["done"] for line in (*some, last)] == [False] * len(some) + [True]
    assert last["prompt_eval_count"] == len(served.prompt("green cup")) and last["done_reason"] in ("stop", "length")
    assert all(last[key] >= 0 for key in ("total_duration", "prompt_eval_duration", "eval_duration"))
    (whole,) = lines(running, model=name, options=options, stream=False)
    assert whole["message"] == {"role": "assistant", "content": right} and whole["done"] is True
    assert whole["eval_count"] == last["eval_count"] and whole["model"] == "second"


def test_its_own_defaults_are_those_of_ollama(running: Running) -> None:
    (made,) = lines(running, options={"seed": 5, "num_predict": 12}, stream=False)
    same = running.client().chat.completions.create(
        model="first", messages=asked("green cup"), seed=5, max_tokens=12, temperature=0.8, top_p=0.9,
        extra_body={"top_k": 40},
    )  # fmt: skip
    assert made["message"]["content"] == same.choices[0].message.content


def test_json_and_schemas_are_followed(running: Running) -> None:
    (made,) = lines(running, format={"enum": ["red", "blue"]}, stream=False)
    assert json.loads(made["message"]["content"]) in ("red", "blue")


talkative = tools_server


def test_what_was_called_is_in_the_prompt(talkative: Running) -> None:
    tools = [{**tool, "function": {**tool["function"], "strict": True}} for tool in (served.WEATHER, served.PAINT)]
    talk = [
        *asked("red"),
        {"role": "assistant", "tool_calls": [{"function": {"name": "paint", "arguments": {"colour": "red"}}}]},
        {"role": "tool", "tool_name": "paint", "content": "done"},
    ]  # fmt: skip
    first = lines(talkative, messages=talk, tools=tools, options={"num_predict": 2})[-1]
    plain = lines(talkative, messages=talk[:1], tools=tools, options={"num_predict": 2})[-1]
    assert first["prompt_eval_count"] > plain["prompt_eval_count"] > 200


def test_what_there_is_is_told(running: Running) -> None:
    with httpx2.Client(trust_env=False) as client:
        tags = client.get(f"{running.url}/api/tags").json()["models"]
        assert [tag["name"] for tag in tags] == ["first", "second", served.BASE] and len(tags[0]["digest"]) == 64
        assert client.get(f"{running.url}/api/version").json()["version"]
    shown = running.post({"model": "first:latest"}, "/api/show").json()
    assert shown["model_info"]["llama.context_length"] == 128 and shown["capabilities"] == ["completion", "tools"]


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"model": "third"}, 404, "there is no model 'third'"),
        ({"options": {"mirostat": 2}}, 400, "options.mirostat: is not known here"),
        ({"messages": [{"role": "user", "content": "red", "images": ["aGk="]}]}, 400, "images"),
        ({"think": True}, 400, "think: the chat template of first does not read it"),
        ({"options": {"temperature": 5}}, 400, "options.temperature: "),
        ({"options": {"num_predict": 0}}, 400, "options.num_predict: "),
        ({"options": {"repeat_penalty": 0}}, 400, "options.repeat_penalty: "),
    ],
)
def test_errors_have_ollamas_form(running: Running, change: Any, status: int, words: str) -> None:
    made = running.post({"model": "first", "messages": asked("red"), **change}, "/api/chat")
    assert made.status_code == status and made.json().keys() == {"error"} and words in made.json()["error"]


@pytest.mark.parametrize(
    ("path", "kind", "status", "words"),
    [
        ("/api/generate", "application/json", 404, "POST /api/generate: Not Found"),
        ("/api/tags", "application/json", 405, "POST /api/tags: Method Not Allowed"),
        ("/api/chat", "text/plain", 415, "Content-Type has to be application/json."),
    ],
)
def test_so_have_those_of_what_is_not_read(running: Running, path: str, kind: str, status: int, words: str) -> None:
    with httpx2.Client(trust_env=False) as client:
        refused = client.post(f"{running.url}{path}", content=b"{}", headers={"Content-Type": kind})
        assert (refused.status_code, refused.json()) == (status, {"error": words})
        openai = client.post(f"{running.url}/v1{path}", content=b"{}", headers={"Content-Type": kind})
        assert openai.json()["error"].keys() == {"message", "type", "param", "code"}

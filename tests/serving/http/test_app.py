"""The whole server, with the official `openai` client and with plain sockets, on a tiny model in fp32."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest

from halfbyte.inference.generate import generate
from halfbyte.serving.engine import Engine
from halfbyte.serving.folders import AdapterFolders
from halfbyte.serving.http import app
from halfbyte.serving.reader import TextReader
from halfbyte.serving.settings import Settings, bind
from halfbyte.writing.sampling import SamplingParams
from tests import tiny_run
from tests.serving import served

WAITING = 3
_NONE = AdapterFolders()
NAMES = ("first", "second", served.BASE)


class Running:
    """A server in a thread of its own."""

    def __init__(self, engine: Engine | TextReader, *, folders: AdapterFolders = _NONE, **settings: Any) -> None:
        self.settings = Settings(port=0, **settings)
        self.sock = bind(self.settings)
        self.sock.listen(64)
        if isinstance(engine, TextReader):
            self.server = app.build_reader(engine, self.settings)
        else:
            self.engine, self.server = engine, app.build(engine, self.settings, folders)
        self.url = f"http://127.0.0.1:{self.sock.getsockname()[1]}"
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.sock]})
        self.thread.start()
        until(lambda: self.server.started)

    def end(self) -> None:
        self.server.should_exit = True
        self.thread.join()

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def clients(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def post(self, body: object, path: str = "/v1/chat/completions", **headers: str) -> httpx2.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        with httpx2.Client(trust_env=False) as client:
            given = {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
            return client.post(self.url + path, content=content, headers=given)


def until(true: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    made = Running(Engine(served.two(), WAITING))
    yield made
    made.end()


def asked(question: str) -> list[Any]:
    return [{"role": "user", "content": question}]


def wanted(name: str, question: str, most: int) -> str:
    where = served.where(served.two())
    plain = served.plain(where, None if name == served.BASE else name)
    return served.words(served.greedy(plain, served.prompt(question), most))


@pytest.mark.parametrize("name", NAMES)
def test_chat_whole_and_streamed(running: Running, name: str) -> None:
    client, question = running.client(), "a large round box"
    whole = client.chat.completions.create(model=name, messages=asked(question), temperature=0, max_tokens=20)
    (choice,) = whole.choices
    assert choice.message.content == wanted(name, question, 20) and choice.message.role == "assistant"
    assert choice.finish_reason in ("stop", "length") and whole.model == name and whole.usage is not None
    assert whole.usage.prompt_tokens == len(served.prompt(question))
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(client.chat.completions.create(
        model=name, messages=asked(question), temperature=0, max_tokens=20, stream=True,
        stream_options={"include_usage": True},
    ))  # fmt: skip
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == choice.message.content
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + [choice.finish_reason]
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage == whole.usage and not chunks[-1].choices


def test_the_models_and_their_base(running: Running) -> None:
    client = running.client()
    found = {one.id: one.model_dump() for one in client.models.list()}
    assert list(found) == list(NAMES)
    assert found["first"]["parent"] == served.BASE and found[served.BASE]["parent"] is None
    assert client.models.retrieve("second").id == "second"
    with pytest.raises(openai.NotFoundError, match="there is no model 'third'; there are first, second, model"):
        client.models.retrieve("third")


def test_plain_completions_of_several_prompts(running: Running) -> None:
    prompts = ["red green", "a small cup of"]
    tokenizer = served.tiny_run.tokenizer()
    made = running.client().completions.create(model="first", prompt=prompts, temperature=0, max_tokens=9, logprobs=2)
    plain = served.plain(served.where(served.two()), "first")
    answers = [served.words(served.greedy(plain, tokenizer(text)["input_ids"], 9)) for text in prompts]
    assert [choice.text for choice in made.choices] == answers
    told = made.choices[1].logprobs
    assert told is not None and told.top_logprobs is not None and told.tokens is not None
    assert told.text_offset[0] == 0 and len(told.token_logprobs or ()) == len(told.tokens)
    ids = [list(tokenizer(text)["input_ids"]) for text in prompts]
    again = running.client().completions.create(model="first", prompt=ids, temperature=0, max_tokens=9)
    assert [choice.text for choice in again.choices] == answers


def test_parts_of_letters_are_told_apart_and_offsets_go_on_in_a_stream(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halfbyte.serving.engine.GATHERED_S", 0.0)
    tokenizer = served.tiny_run.tokenizer()
    parts = [tokenizer.convert_tokens_to_ids(letter) for letter in "\u00f0\u0141\u013a\u0122\u00e1"]
    bias = {str(token): 100 for token in parts}
    options: Any = {"model": "first", "prompt": "red", "temperature": 0, "max_tokens": 9, "logprobs": 5}
    told = running.client().completions.create(**options, logit_bias=bias).choices[0].logprobs
    assert told is not None and told.tokens and told.token_logprobs and told.top_logprobs
    names = {rf"bytes:\x{byte:02x}" for byte in (0xF0, 0x9F, 0x98, 0x80, 0xE1)}
    for token, value, likely in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        assert token in names and likely[token] == value and len(likely) in (5, 6) and "\ufffd" not in likely
    (whole,) = running.client().completions.create(**options).choices
    chunks = list(running.client().completions.create(**options, stream=True))
    offsets = [n for chunk in chunks if (told := chunk.choices[0].logprobs) for n in told.text_offset or ()]
    assert whole.logprobs is not None and offsets == whole.logprobs.text_offset and len(chunks) > 2
    for token, at in zip(whole.logprobs.tokens or (), offsets, strict=True):
        # what begins a letter that never ends is there when the next token is
        assert token.startswith("bytes:") or "<" in token or token in whole.text[at : at + len(token) + 3]


@pytest.mark.parametrize("prompt", ["a" * 1_000_000, "red " * 200, [5] * 200])
def test_a_prompt_that_is_too_long_is_named_as_it_was_sent(running: Running, prompt: Any) -> None:
    error = running.post({"model": "first", "prompt": prompt}, "/v1/completions").json()["error"]
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")


def test_stop_ends_a_text_and_is_no_part_of_it(running: Running) -> None:
    whole = wanted(served.BASE, "new road", 30)
    stop = whole[6:9]
    options: Any = {
        "model": served.BASE,
        "messages": asked("new road"),
        "temperature": 0,
        "max_tokens": 30,
        "stop": [stop],
    }
    made = running.client().chat.completions.create(**options)
    assert made.choices[0].message.content == whole[: whole.find(stop)] and made.choices[0].finish_reason == "stop"
    chunks = running.client().chat.completions.create(**options, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole[: whole.find(stop)]


def test_a_seed_makes_samples_repeatable_and_n_gives_several(running: Running) -> None:
    options: Any = {"model": "second", "messages": asked("blue"), "max_tokens": 12, "n": 3, "temperature": 1.5}
    once, again, other = (
        [c.message.content for c in running.client().chat.completions.create(**options, seed=seed).choices]
        for seed in (5, 5, 6)
    )
    assert once == again and len(set(once)) == 3 and once != other
    narrow = running.client().chat.completions.create(**options | {"top_p": 1e-6, "n": 1})
    assert narrow.choices[0].message.content == wanted("second", "blue", 12)


def test_logprobs_are_those_of_the_model(running: Running) -> None:
    import torch

    made = running.client().chat.completions.create(
        model="first", messages=asked("old trees"), temperature=0, max_tokens=5, logprobs=True, top_logprobs=3
    )
    told = made.choices[0].logprobs
    assert told is not None and told.content is not None
    ids = served.prompt("old trees")
    plain = served.plain(served.where(served.two()), "first")
    with torch.no_grad():
        logits = plain(torch.tensor([ids])).logits[0, -1]
    best = torch.log_softmax(logits, -1).topk(3)
    assert [one.logprob for one in told.content[0].top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert told.content[0].logprob == pytest.approx(float(best.values[0]), abs=1e-4)


def test_json_follows_its_schema(running: Running) -> None:
    schema = {
        "type": "object", "additionalProperties": False, "required": ["qty", "item"],
        "properties": {"qty": {"type": "integer", "minimum": 1, "maximum": 99}, "item": {"enum": ["cup", "box"]}},
    }  # fmt: skip
    form: Any = {"type": "json_schema", "json_schema": {"name": "order", "schema": schema}}
    for name in NAMES:
        made = running.client().chat.completions.create(
            model=name, messages=asked("red"), max_tokens=90, seed=1, n=2, response_format=form
        )
        for choice in made.choices:
            value = json.loads(choice.message.content or "")
            assert set(value) == {"qty", "item"} and 1 <= value["qty"] <= 99 and value["item"] in ("cup", "box")
            assert choice.finish_reason == "stop"
    broken: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
    words = "^Error code: 400 - response_format: the schema cannot be followed: Invalid type: nothing.$"
    with pytest.raises(openai.BadRequestError, match=words):
        running.client().chat.completions.create(model="first", messages=asked("red"), response_format=broken)


@pytest.mark.parametrize(
    ("change", "status", "code", "words"),
    [
        ({"model": "third"}, 404, "model_not_found", "there are first, second, model"),
        ({"messages": []}, 400, "invalid_value", "messages"),
        ({"messages": [{"role": "judge", "content": ""}]}, 400, "invalid_value", "messages.0.role"),
        ({"messages": [{"role": "user"}]}, 400, "invalid_value", "messages.0.content: "),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            400, "invalid_value", "messages.0.content.0.type: Input should be 'text'",
        ),
        ({"tool_choice": {"type": "tool"}}, 400, "invalid_value", "tool_choice.type: Input should be 'function'"),
        ({"messages": [{"role": "assistant", "content": None}]}, 400, "invalid_value", "only an assistant's"),
        ({"messages": [{"role": "user", "content": "a" * 1_000_000}]}, 400, "context_length_exceeded", "1,000,000"),
        ({"messages": [{"role": "user", "content": "red " * 200}]}, 400, "context_length_exceeded", "128 tokens"),
        ({"max_tokens": 5000}, 400, "context_length_exceeded", "128 tokens"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "invalid_json", ""),
        ({"temperature": 3}, 400, "invalid_value", "temperature"),
        ({"temperature": float("nan")}, 400, "", ""),
        ({"n": 9}, 400, "invalid_value", "n: at most 8"),
        ({"stop": "x" * 1025}, 400, "invalid_value", "at most 16 strings of at most 1,024 characters"),
        ({"stop": ["x"] * 17}, 400, "invalid_value", "at most 16 strings of at most 1,024 characters"),
        ({"frequency_penalty": 2.5}, 400, "invalid_value", "frequency_penalty"),
        ({"logit_bias": {"red": 5}}, 400, "invalid_value", "logit_bias"),
        ({"logit_bias": {"99999": 5}}, 400, "invalid_value", "logit_bias: 99999 is none of the model's tokens"),
        ({"top_k": -2}, 400, "invalid_value", "top_k"),
        ({"min_p": 1.5}, 400, "invalid_value", "min_p"),
        ({"repetition_penalty": 0}, 400, "invalid_value", "repetition_penalty"),
        ({"reasoning_effort": "high"}, 400, "unsupported_parameter", "reasoning_effort: the chat template of first"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, 400, "invalid_value", "enable_thinking: the chat"),
        ({"chat_template_kwargs": {"chat_template": "{{ x }}"}}, 400, "invalid_value", "does not read it"),
        ({"tool_choice": "required"}, 400, "invalid_value", "required needs tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, 400, "invalid_value", "no tool 'f'"),
        ({"best": 1}, 400, "unsupported_parameter", "best: is not known here"),
        ({"top_logprobs": 3}, 400, "invalid_value", "top_logprobs needs logprobs"),
        ({"response_format": {"type": "json_schema"}}, 400, "invalid_value", "json_schema.schema"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_an_error_in_openais_form(
    running: Running, change: dict[str, Any], status: int, code: str, words: str
) -> None:
    made = running.post({"model": "first", "messages": asked("red"), "max_tokens": 4, **change})
    error = made.json()["error"]
    assert made.status_code == status and set(error) == {"message", "type", "param", "code"}
    assert (not code or error["code"] == code) and words in error["message"]


def test_bodies_and_paths_that_are_none(running: Running) -> None:
    for body in (b"{", b"", b"[" * 100_000, b"\xff\xfe", b"null", b"[]", b'{"model": "first"}'):
        made = running.post(body)
        assert made.status_code == 400 and made.json()["error"]["type"] == "invalid_request_error"
    assert running.post(b" " * 2_000_001).status_code == 413
    assert running.post({}, Content_Type="text/plain").status_code == 415
    with httpx2.Client(trust_env=False) as client:
        assert client.get(f"{running.url}/v1/nothing").json()["error"]["message"] == "GET /v1/nothing: Not Found"
        assert client.get(f"{running.url}/v1/chat/completions").status_code == 405
        chunked = client.post(
            f"{running.url}/v1/completions", content=(b"x" * 100_000 for _ in range(30)),
            headers={"Content-Type": "application/json"},
        )  # fmt: skip
        assert chunked.status_code == 413


def test_only_this_machine_and_this_page_may_ask(running: Running) -> None:
    body = {"model": "first", "messages": asked("red"), "max_tokens": 1}
    host = running.url.removeprefix("http://")
    port = host.rpartition(":")[2]
    assert running.post(body, Host="evil.example").status_code == 421
    assert running.post(body, Host=f"127.0.0.1.evil.example:{port}").status_code == 421
    assert running.post(body, Host=f"localhost:{port}").status_code == 200
    assert running.post(body, Host=f"[::1]:{port}").status_code == 200
    for origin in ("http://evil.example", "null", f"https://localhost:{port}"):
        assert running.post(body, Origin=origin).json()["error"]["code"] == "wrong_origin"
    assert running.post(body, Origin=running.url).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),  # a script: LiteLLM's way to Ollama
        ({"Sec-Fetch-Site": "cross-site"}, 415),  # a browser's fetch(..., {mode: "no-cors", body: new Blob([...])})
        ({"Sec-Fetch-Site": "same-origin"}, 415),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null", "Sec-Fetch-Site": "cross-site"}, 403),
        ({"Origin": "SELF"}, 415),  # the page says that it sends JSON
        ({"Content-Type": ""}, 415),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "multipart/form-data; boundary=x"}, 415),
        ({"Content-Type": "Application/JSON; charset=utf-8", "Sec-Fetch-Site": "same-origin", "Origin": "SELF"}, 200),
    ],
)
def test_a_body_without_a_type_is_read_from_scripts_only(
    running: Running, headers: dict[str, str], status: int
) -> None:
    body = json.dumps({"model": "first", "messages": asked("red"), "max_tokens": 1}).encode()
    given = {name: running.url if value == "SELF" else value for name, value in headers.items()}
    with httpx2.Client(trust_env=False) as client:
        made = client.post(f"{running.url}/v1/chat/completions", content=body, headers=given)
    assert ("content-type" in made.request.headers) == ("Content-Type" in headers)
    assert made.status_code == status


def test_a_key_is_asked_for() -> None:
    made = Running(Engine(served.two()), key="k" * 20)
    try:
        with pytest.raises(openai.AuthenticationError, match="a key is required"):
            made.client("wrong").models.list()
        assert [one.id for one in made.client("k" * 20).models.list()] == list(NAMES)
        with httpx2.Client(trust_env=False) as client:
            assert client.get(f"{made.url}/health").json() == {"status": "ok"}
            assert client.get(f"{made.url}/metrics").status_code == 401
    finally:
        made.end()


def test_health_metrics_and_the_page(running: Running) -> None:
    running.client().chat.completions.create(model="first", messages=asked("red"), max_tokens=2)
    with httpx2.Client(trust_env=False) as client:
        assert client.get(f"{running.url}/health").json() == {"status": "ok"}
        text = client.get(f"{running.url}/metrics").text
        assert re.search(r'^halfbyte_answers_total\{model="first"\} [1-9]', text, re.MULTILINE)
        assert "halfbyte_places 8.0" in text and "halfbyte_running 0.0" in text
        page = client.get(f"{running.url}/")
        assert "default-src 'none'" in page.headers["content-security-policy"] and "<title>" in page.text
        assert page.headers["x-frame-options"] == "DENY" and page.headers["x-content-type-options"] == "nosniff"
        for name in re.findall(r'(?:src|href)="(/[^"]+)"', page.text):
            assert client.get(running.url + name).status_code == 200
        assert "http://" not in page.text and "https://" not in page.text


async def _crowd(running: Running, count: int) -> tuple[dict[str, int], list[str]]:
    """Many clients at once; a third of them hang up. How many of each outcome, and what was wrong."""
    seen, wrong = {"right": 0, "full": 0, "gone": 0}, []
    clients = running.clients()
    answers = {(name, q): wanted(name, q, 16) for name in NAMES for q in served.QUESTIONS}

    async def one(number: int) -> None:
        name, question = NAMES[number % 3], served.QUESTIONS[number % 6]
        options: Any = {"model": name, "messages": asked(question), "temperature": 0, "max_tokens": 16}
        try:
            if number % 3 == 1 and number % 2:
                stream = await clients.chat.completions.create(**options, stream=True)
                async for _ in stream:
                    break
                await stream.close()
                seen["gone"] += 1
            elif number % 6 == 4:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(clients.chat.completions.create(**options), 0.02)
                seen["gone"] += 1
            elif number % 2:
                parts = [
                    chunk.choices[0].delta.content or ""
                    async for chunk in await clients.chat.completions.create(**options, stream=True)
                ]
                _judge("".join(parts), answers[name, question])
            else:
                made = await clients.chat.completions.create(**options)
                _judge(made.choices[0].message.content or "", answers[name, question])
        except openai.RateLimitError as error:
            seen["full"] += int(error.response.headers["retry-after"]) >= 1

    def _judge(found: str, right: str) -> None:
        seen["right"] += found == right
        if found != right:
            wrong.append(f"{found!r} for {right!r}")

    await asyncio.gather(*(one(number) for number in range(count)))
    await clients.close()
    return seen, wrong


def test_a_crowd_with_hang_ups() -> None:
    """64 clients, two adapters and the base; nobody waits in vain, every answer is right, and no place is lost."""
    made = Running(Engine(served.two(), 64))
    try:
        seen, wrong = asyncio.run(_crowd(made, 64))
        assert not wrong and seen["full"] == 0 and seen["right"] + seen["gone"] == 64 and seen["gone"] >= 10
        until(lambda: made.engine.running == made.engine.waiting == 0)
        assert made.engine.writers[0].free == 8  # type: ignore[union-attr]
    finally:
        made.end()


def test_more_than_may_wait_get_a_429(running: Running) -> None:
    seen, wrong = asyncio.run(_crowd(running, 64))
    assert not wrong and seen["full"] > 0 and seen["right"] > 0
    until(lambda: running.engine.running == running.engine.waiting == 0)


def test_who_hangs_up_leaves_a_place(running: Running) -> None:
    stream = running.client().chat.completions.create(
        model="first", messages=asked("red"), max_tokens=100, stream=True, n=8, temperature=2, seed=3
    )
    next(iter(stream))
    before = running.engine.written_tokens
    stream.close()
    until(lambda: running.engine.running == 0)
    assert running.engine.written_tokens - before < 8 * 100


def test_an_answer_that_takes_too_long_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Running(Engine(served.two()), answer_s=0.2)
    step = made.engine._step
    monkeypatch.setattr(made.engine, "_step", lambda: (time.sleep(0.25), step()))
    try:
        with pytest.raises(openai.APIStatusError, match=r"took longer than 0\.2 s") as error:
            made.client().chat.completions.create(model="first", messages=asked("red"), max_tokens=100)
        assert error.value.status_code == 504
        with pytest.raises(openai.APIError, match=r"took longer than 0\.2 s"):
            list(
                made.client().chat.completions.create(model="first", messages=asked("red"), max_tokens=100, stream=True)
            )
        until(lambda: made.engine.running == 0)
    finally:
        made.end()


def test_a_step_that_fails_is_an_error_and_the_engine_goes_on(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = running.engine.writers[0]
    step = writer.step

    def broken() -> None:
        monkeypatch.setattr(writer, "step", step)
        raise RuntimeError("a secret path /home/x")

    monkeypatch.setattr(writer, "step", broken)
    options: Any = {"model": "first", "messages": asked("green cup"), "max_tokens": 8, "temperature": 0}
    with pytest.raises(openai.InternalServerError, match="the answer has failed: RuntimeError") as error:
        running.client().chat.completions.create(**options)
    assert "secret" not in str(error.value)
    made = running.client().chat.completions.create(**options)
    assert made.choices[0].message.content == wanted("first", "green cup", 8)


def test_an_engine_that_has_ended_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """What no step's own handler takes ends the thread: who waits and who comes is told, and so is the health check."""
    made = Running(Engine(served.two(), WAITING))

    def ended() -> None:
        raise SystemExit

    monkeypatch.setattr(made.engine, "_next", ended)
    try:
        for _ in range(2):
            with pytest.raises(openai.InternalServerError, match="the engine has failed: SystemExit"):
                made.client().chat.completions.create(model="first", messages=asked("red"), max_tokens=4)
        with httpx2.Client(trust_env=False) as client:
            assert client.get(made.url + "/health").status_code == 503
    finally:
        made.end()


def test_what_a_template_reads_can_be_said_and_efforts_too(monkeypatch: pytest.MonkeyPatch, running: Running) -> None:
    more = "{% if enable_thinking %}red box{% endif %}{{ reasoning_effort }}" + tiny_run.CHATML
    model = running.engine.models.by_name["first"]
    monkeypatch.setattr(model.tokenizer, "chat_template", more)
    prompts = [
        running.client().chat.completions.create(
            model="first", messages=asked("red"), max_tokens=1, extra_body=options
        ).usage.prompt_tokens
        for options in (
            {}, {"chat_template_kwargs": {"enable_thinking": True}}, {"reasoning_effort": "high"},
            {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}},
        )
    ]  # fmt: skip
    words = [len(model.tokenizer(text)["input_ids"]) for text in ("", "red box", "high", "red boxnone")]
    assert [n - prompts[0] for n in prompts] == words


def test_what_changes_logits_and_draws_is_that_of_generate(running: Running) -> None:
    models, client = running.engine.models, running.client()
    one, prompt = models.by_name["first"], served.prompt("green cup")
    for options in (
        {"frequency_penalty": 1.5}, {"presence_penalty": -1.0}, {"logit_bias": {"200": 4.0, "60": -9.0}}, {"top_k": 3},
        {"min_p": 0.2}, {"repetition_penalty": 3.0}, {"top_k": 9, "top_p": 0.8, "min_p": 0.01, "presence_penalty": 1.0},
    ):  # fmt: skip
        for temperature in (0, 0.9):
            params = SamplingParams(
                12, temperature, seed=7, **{k: tuple((int(t), b) for t, b in v.items()) if k == "logit_bias" else v
                                            for k, v in options.items()},
            )  # fmt: skip
            with models.using(one.adapter):
                (wanted,) = generate(models.model, one.tokenizer, [prompt], params)
            made = client.chat.completions.create(
                model="first", messages=asked("green cup"), temperature=temperature, max_tokens=12, seed=7,
                extra_body=options,
            )  # fmt: skip
            assert made.choices[0].message.content == wanted, options


def test_the_end_lets_what_runs_finish_and_refuses_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Running(Engine(served.two()))
    step = made.engine._step
    monkeypatch.setattr(made.engine, "_step", lambda: (time.sleep(0.01), step()))
    found: dict[int, object] = {}

    def ask(number: int) -> None:
        options: Any = {"model": "first", "messages": asked("new"), "temperature": 0, "max_tokens": 30, "n": 8}
        try:
            stream = made.client().chat.completions.create(**options, stream=True)
            parts = [""] * 8
            for chunk in stream:
                parts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
            found[number] = set(parts)
        except openai.InternalServerError as error:
            found[number] = error

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(2)]
    threads[0].start()
    until(lambda: made.engine.running == 8)
    threads[1].start()
    until(lambda: made.engine.waiting == 8)
    made.engine.drain()
    made.end()
    for thread in threads:
        thread.join()
    assert found[0] == {wanted("first", "new", 30)}
    refused = found[1]
    assert isinstance(refused, openai.InternalServerError) and "the server is ending" in str(refused)
    assert refused.status_code == 503 and int(refused.response.headers["retry-after"]) > 0

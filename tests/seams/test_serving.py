"""What `halfbyte serve` stands on: uvicorn's end, sse-starlette's switch, llguidance's matcher."""

from __future__ import annotations

import inspect
import json
import signal

import numpy as np
import pytest
import sse_starlette.sse
import uvicorn
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer
from sse_starlette.sse import AppStatus

from tests import tiny_run


async def nothing(scope: object, receive: object, send: object) -> None:
    return None


def test_the_first_signal_lets_uvicorn_finish_and_the_second_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AppStatus, "should_exit", False)  # sse-starlette hears of the signal, and would end all streams
    server = uvicorn.Server(uvicorn.Config(nothing))
    assert not server.should_exit
    server.handle_exit(signal.SIGTERM, None)
    assert server.should_exit and not server.force_exit
    server.handle_exit(signal.SIGINT, None)
    assert server.force_exit


def test_uvicorn_takes_what_the_server_is_made_with() -> None:
    taken = inspect.signature(uvicorn.Config.__init__).parameters
    assert {"timeout_graceful_shutdown", "timeout_keep_alive", "server_header", "proxy_headers", "backlog"} <= set(
        taken
    )
    assert "sockets" in inspect.signature(uvicorn.Server.run).parameters


def test_a_stream_may_outlive_the_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AppStatus, "enable_automatic_graceful_drain", True)
    AppStatus.disable_automatic_graceful_drain()
    assert AppStatus.enable_automatic_graceful_drain is False
    assert "enable_automatic_graceful_drain" in inspect.getsource(sse_starlette.sse)  # asked where streams are ended


def test_llguidance_says_which_tokens_may_come_next() -> None:
    tokenizer = tiny_run.tokenizer()
    table = from_tokenizer(tokenizer, n_vocab=len(tokenizer), eos_token=[tokenizer.eos_token_id])
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    matcher = LLMatcher(table, LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults={}), log_level=0)
    assert not matcher.is_error()
    bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
    assert len(bits) >= len(tokenizer) and 0 < bits.sum() < len(tokenizer)  # a brace or nothing
    wrong = int(np.flatnonzero(bits[: len(tokenizer)] == 0)[0])
    assert not matcher.consume_token(wrong)
    assert LLMatcher(table, "no grammar", log_level=0).is_error()

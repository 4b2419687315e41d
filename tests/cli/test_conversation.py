"""A conversation at the terminal, with a model that says what it is told to."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from typer.testing import CliRunner

from halfbyte.cli import conversation, main, show
from halfbyte.models.context import Context
from halfbyte.writing.sampling import SamplingParams

CONTEXT = 100


class Told:
    """Stands for what answers; it says how many letters it heard, token by token."""

    def __init__(self) -> None:
        self.alone, self.run = False, Path("run")
        self.recipe = SimpleNamespace(model="tiny")
        self.context = Context(CONTEXT, "max_position_embeddings")
        self.heard: list[tuple[bool, int]] = []
        self.sessions: list[object] = []
        self.interrupts: dict[int, int] = {}
        self.says = 5

    def ids(self, messages: list[dict[str, str]]) -> list[Any]:
        return list("".join(m["content"] for m in messages))

    def remember(self, ids: object, session: object, *, base: bool) -> None: ...

    def answer(self, ids: list[Any], params: SamplingParams, session: object, *, base: bool, **more: Any) -> str:
        self.heard.append((base, len(ids)))
        self.sessions.append(session)
        said = ""
        for number in range(min(self.says, params.max_tokens)):
            for _ in range(self.interrupts.get(number, 0)):
                os.kill(os.getpid(), signal.SIGINT)
            said += "b" if base else "a"
            if more["each"]():
                break
        more["emit"](said)
        return said


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Told:
    monkeypatch.chdir(tmp_path)
    return Told()


def chat(told: Told, *lines: str, tokens: int = 20) -> conversation.Chat:
    talk = conversation.Chat(told, SamplingParams(tokens), None)  # type: ignore[arg-type]
    for line in lines:
        talk.say(line)
    return talk


def contents(talk: conversation.Chat) -> list[str]:
    return [message["content"] for message in talk.messages]


def test_both_answer_the_same_question(told: Told, capsys: pytest.CaptureFixture[str]) -> None:
    talk = chat(told, "four", "/both", "/base", "/both two", "/base one")
    # 4: the question; 4 again without its answer; 4 + 5 + 3 with answer and the new question
    assert told.heard == [(False, 4), (True, 4), (False, 4), (True, 4), (True, 12), (False, 12), (True, 20)]
    assert contents(talk) == ["four", "aaaaa", "two", "aaaaa"]
    out = capsys.readouterr().out
    assert out.index("base>\nbbbbb") < out.index("adapter>\naaaaa")


def test_each_side_keeps_what_it_has_read_until_reset(told: Told) -> None:
    chat(told, "one", "two", "/both three", "/reset", "four")
    adapter, again, base, third, fresh = told.sessions
    assert adapter is again is third and base is not adapter and fresh is not adapter


def test_the_first_ctrl_c_keeps_what_was_said_and_the_chat(told: Told, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    told.interrupts = {2: 1}
    talk = chat(told, "four")
    assert contents(talk) == ["four", "aaa"]
    assert "(stopped; 3 tokens" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_leaves_the_token_under_way(told: Told, capsys: pytest.CaptureFixture[str]) -> None:
    told.interrupts = {2: 2}
    talk = chat(told, "four")
    assert contents(talk) == [] and "(stopped)" in capsys.readouterr().out


def test_a_context_that_fills_up_is_told(told: Told, capsys: pytest.CaptureFixture[str]) -> None:
    told.says = 1000
    talk = chat(told, "x" * 85, tokens=50)
    assert contents(talk)[1] == "a" * 15
    assert "(the context is full, /reset begins anew; 15 tokens" in capsys.readouterr().err
    talk.say("more")
    assert "the context is full: 104 of 100 tokens are taken" in capsys.readouterr().err
    assert len(talk.messages) == 2 and len(told.heard) == 1
    talk.say("/reset")
    talk.say("short")
    assert contents(talk) == ["short", "a" * 50]
    assert "(cut, see --max-new-tokens; 50 tokens" in capsys.readouterr().err


def test_a_talk_is_saved_as_a_row_and_never_written_over(told: Told, capsys: pytest.CaptureFixture[str]) -> None:
    talk = chat(told, "/save", "one", "/save talk.jsonl", "two", "/save")
    rows = [json.loads(line) for line in Path("talk.jsonl").read_text().splitlines()]
    assert [len(row["messages"]) for row in rows] == [2, 4]
    assert rows[1]["messages"] == talk.messages
    said = capsys.readouterr()
    assert "there is nothing to save yet" in said.out and said.out.count("added to talk.jsonl") == 2
    talk.say("/save /proc/nope/x.jsonl")
    assert "/proc/nope/x.jsonl cannot be written" in capsys.readouterr().err


def test_what_cannot_be_done_is_said(told: Told, capsys: pytest.CaptureFixture[str]) -> None:
    told.alone = True
    chat(told, "/both", "/base", "/nonsense now")
    out = capsys.readouterr().out
    assert "there is no adapter here" in out and "say something first" in out and "no such command /nonsense" in out
    assert told.heard == []


def test_ctrl_c_at_the_prompt_leaves_at_the_second_time(
    told: Told, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: Any = iter([KeyboardInterrupt(), "hello", KeyboardInterrupt(), KeyboardInterrupt(), "never"])

    def ask() -> str:
        line = next(lines)
        if isinstance(line, BaseException):
            raise line
        return str(line)

    monkeypatch.setattr(show, "asker", lambda: ask)
    conversation.Chat(told, SamplingParams(), None).run()  # type: ignore[arg-type]
    assert next(lines) == "never" and told.heard == [(False, 5)]
    assert capsys.readouterr().out.count("Ctrl-C again leaves") == 2


def test_lines_are_edited_with_arrow_keys_and_alt_enter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(show.sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(show, "out", SimpleNamespace(is_terminal=True))
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        ask = show.asker()
        keys.send_text("one\x1b\rtwo\r")
        assert ask() == "one\ntwo"
        keys.send_text("other\r")
        assert ask() == "other"
        keys.send_text("\x1b[A\x1b[A\r")
        assert ask() == "one\ntwo"


def test_speed_is_of_the_tokens_after_the_first() -> None:
    assert conversation.TokenWatch(tokens=11, first_s=2.0, last_s=4.0).per_second == pytest.approx(5.0)
    assert conversation.TokenWatch(tokens=1, first_s=2.0, last_s=2.0).per_second == 0.0


def test_what_generate_is_told_reaches_the_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    params = list[SamplingParams]()
    proves = list[bool]()
    opens = lambda *args, prove, **more: proves.append(prove) or SimpleNamespace(alone=False)  # noqa: E731
    monkeypatch.setattr(main.shared, "speaker", opens)
    monkeypatch.setattr(conversation, "answer", lambda ready, talk, how, session, **more: params.append(how) or "red")
    words = "generate run -p x --temperature 0.5 --top-k 7 --top-p 0.9 --min-p 0.1 --repetition-penalty 1.3 --seed 4"
    for command in (words, "generate run -p x --prove"):
        assert CliRunner().invoke(main.app, command.split()).exit_code == 0
    told = SamplingParams(256, 0.5, 0.9, 4, top_k=7, min_p=0.1, repetition_penalty=1.3)
    assert params == [told, SamplingParams(256)]
    assert proves == [False, True]


def test_a_line_that_is_not_utf8_is_told_and_not_said(
    told: Told, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = chat(told, "caf\udce9", "red")
    assert told.heard == [(False, 3)] and contents(talk)[0] == "red"
    assert capsys.readouterr().err.startswith("warning: this line is not UTF-8.\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8"))
    assert show.asker()() == "caf\udce9"

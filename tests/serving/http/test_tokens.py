"""`/tokenize` and `/detokenize`, in vLLM's form."""

from __future__ import annotations

from typing import Any

import pytest

from tests import tiny_run
from tests.serving import served
from tests.serving.http.test_app import Running, asked
from tests.serving.http.test_app import running as running


def test_texts_and_conversations_as_tokens_and_back(running: Running) -> None:
    ids = list(tiny_run.tokenizer()("red green cup")["input_ids"])
    made = running.post({"model": "first", "prompt": "red green cup", "return_token_strs": True}, "/tokenize").json()
    assert made == {"count": len(ids), "max_model_len": 128, "tokens": ids,
                    "token_strs": tiny_run.tokenizer().convert_ids_to_tokens(ids)}  # fmt: skip
    talk = running.post({"messages": asked("green cup")}, "/tokenize").json()
    assert talk["tokens"] == served.prompt("green cup") and talk["token_strs"] is None
    back = running.post({"model": "second", "tokens": ids}, "/detokenize").json()
    assert back == {"prompt": "red green cup"}


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/tokenize", {}, "prompt or messages"),
        ("/tokenize", {"prompt": "a" * 1_000_000}, "1,000,000 characters"),
        ("/tokenize", {"prompt": "\ud800"}, ""),
        ("/detokenize", {"tokens": [5, 320]}, "tokens: 320 is none of the model's tokens, which are 0 to 319"),
        ("/detokenize", {"tokens": [-1]}, "tokens: -1 is none of the model's tokens"),
    ],
)
def test_what_is_none_is_refused(running: Running, path: str, body: Any, words: str) -> None:
    made = running.post(body, path)
    assert made.status_code == 400 and words in made.json()["error"]["message"]

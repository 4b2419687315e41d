"""What looks like a token is in no text that is kept or shown."""

from __future__ import annotations

import pytest

from halfbyte.system.secrets import hidden


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("401 for hf_abcdefghijklmnopqrstuvwxyz", "401 for hf_***"),
        ("Authorization: Bearer my-own-value-123", "Authorization: Bearer ***"),
        ("https://me:pass-word@host/model", "https://***@host/model"),
        ("sk-abcdefghijklmnop and hf_short", "sk-*** and hf_short"),
        ("a run of 30 steps, runs/hf_test", "a run of 30 steps, runs/hf_test"),
    ],
)
def test_tokens_are_hidden(text: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "my-own-value-123")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert hidden(text) == said

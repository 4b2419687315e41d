"""What a model reads at once: positions of the config, rope scaling, and no limit where there is none."""

from __future__ import annotations

from typing import Any

import pytest

from halfbyte.errors import DataError
from halfbyte.models.context import context_in, context_of
from tests import tiny


@pytest.mark.parametrize(
    ("name", "changes", "tokens", "said"),
    [
        ("llama", {}, 256, "max_position_embeddings 256, no rope scaling"),
        ("gpt2", {}, 256, "max_position_embeddings 256"),
        ("gemma3", {}, 256, "max_position_embeddings 256, no rope scaling"),
        ("mpt", {}, 256, "max_seq_len 256"),
        ("bloom", {}, None, ""),
        ("falcon", {"alibi": True}, None, ""),
        ("llama", {"rope_type": "linear", "factor": 4.0}, 1024, "rope scaling linear: 256 x 4"),
        ("llama", {"rope_type": "dynamic", "factor": 2.0}, 512, "rope scaling dynamic: 256 x 2"),
        (
            "llama",
            {"rope_type": "yarn", "factor": 2.5, "original_max_position_embeddings": 256},
            640,
            "rope scaling yarn: 256 x 2.5",
        ),
        (
            "llama",
            {
                "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
            256,
            "max_position_embeddings 256, with rope scaling llama3",
        ),
    ],
)  # fmt: skip
def test_what_a_config_says(name: str, changes: dict[str, Any], tokens: int | None, said: str) -> None:
    config = tiny.config(name, changes={"rope_scaling": changes} if "rope_type" in changes else changes)
    found = context_of(config)
    assert context_in(config.to_dict()) == found, "a config.json says the same without transformers"
    if tokens is None:
        assert found is None
    else:
        assert found is not None and (found.tokens, found.why) == (tokens, said)


def test_what_an_older_config_json_says() -> None:
    scaled = {"max_position_embeddings": 256, "rope_scaling": {"type": "linear", "factor": 4.0}}
    found = context_in({"text_config": {"model_type": "llama", **scaled}})
    assert found is not None and (found.tokens, found.why) == (1024, "rope scaling linear: 256 x 4")
    within = context_in({"model_type": "gemma3_text", **scaled})
    assert within is not None and within.tokens == 256, "of its full-attention layers alone"


def test_a_config_may_have_no_padding_and_a_family_may_count_from_behind_it() -> None:
    class Bare:
        max_position_embeddings = 514

        def __init__(self, model_type: str) -> None:
            self.model_type = model_type

        def get_text_config(self) -> Bare:
            return self

    tokens = {
        name: context.tokens for name in ("bert", "roberta", "xlm-roberta") if (context := context_of(Bare(name)))
    }
    assert tokens == {"bert": 514, "roberta": 513, "xlm-roberta": 513}
    padded = context_in({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1})
    assert padded is not None and padded.tokens == 512


def test_a_prompt_and_its_answer_must_fit() -> None:
    context = context_of(tiny.config("llama"))
    assert context is not None
    context.check(200, 56)
    with pytest.raises(
        DataError, match=r"(?s)200 tokens and the answer up to 57; the model reads 256 .*max-new-tokens 56"
    ):
        context.check(200, 57)
    with pytest.raises(DataError, match="a prompt of fewer than 256 tokens"):
        context.check(256, 1)
    assert [context.left(prompt) for prompt in (0, 200, 256, 300)] == [256, 56, 0, -44]
    assert [context.fitting(prompt, 60) for prompt in (100, 200, 300)] == [60, 56, 1]

"""A checkpoint's config: what is opened, and what is refused with its file named."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from halfbyte.adapters.targets import auto_targets, matched
from halfbyte.base.config import open_config
from halfbyte.errors import BaseModelError
from halfbyte.models.structure import meta_model


def test_a_config_becomes_a_model_without_weights(tmp_path: Path) -> None:
    AutoConfig.for_model("llama", num_hidden_layers=2).save_pretrained(tmp_path)
    model = meta_model(open_config(tmp_path))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert len(matched(model, auto_targets(model))) == 8


@pytest.mark.parametrize(
    "values",
    [{}, {"model_type": "no-such-thing"}, {"model_type": "llama", "num_attention_heads": "many"}],
    ids=["no type", "unknown type", "a text for a number"],
)
def test_a_config_that_is_none_is_refused(tmp_path: Path, values: dict[str, str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(BaseModelError, match=r"config\.json is not a config that transformers knows"):
        open_config(tmp_path)


def test_a_model_that_is_no_causal_lm_is_refused(tmp_path: Path) -> None:
    AutoConfig.for_model("vit").save_pretrained(tmp_path)
    with pytest.raises(BaseModelError, match="is not a causal language model"):
        open_config(tmp_path)

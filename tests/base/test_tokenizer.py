"""A checkpoint's tokenizer: its own, or an error that names what is missing."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

from halfbyte.base.config import open_tokenizer
from halfbyte.errors import BaseModelError
from halfbyte.models.sources.lookup import find_model
from tests import tiny, tiny_run


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma3"])
def test_a_folder_without_a_tokenizer_is_refused_with_the_files_that_it_lacks(tmp_path: Path, name: str) -> None:
    """transformers makes an empty tokenizer for some of these, to which any two texts are the same tokens."""
    recipe = tiny_run.recipe(tmp_path).recipe
    folder = tiny.save(tmp_path / name, name, vocab_size=tiny_run.VOCAB)
    checkpoint = find_model(recipe.model_copy(update={"model": str(folder)}))
    with pytest.raises(BaseModelError) as error:
        open_tokenizer(checkpoint)
    assert str(folder) in str(error.value) and "tokenizer.json" in str(error.value).splitlines()[0]
    tiny_run.tokenizer().save_pretrained(folder)
    assert open_tokenizer(checkpoint)("red box").input_ids == tiny_run.tokenizer()("red box").input_ids


@pytest.mark.parametrize("trusted", [False, True])
def test_code_beside_a_tokenizer_is_run_only_where_it_is_trusted(tmp_path: Path, trusted: bool) -> None:
    """Its config.json names none: only tokenizer_config.json does."""
    recipe = tiny_run.recipe(tmp_path).recipe
    folder = tiny_run.checkpoint(tmp_path / "theirs")
    written = json.loads((folder / "tokenizer_config.json").read_text())
    theirs = {"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": ["theirs.Theirs", "theirs.Theirs"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(written | theirs))
    code = "from transformers import PreTrainedTokenizerFast\n\n\nclass Theirs(PreTrainedTokenizerFast):\n    pass\n"
    (folder / "theirs.py").write_text(f"open({str(tmp_path / 'was run')!r}, 'w').close()\n{code}")
    checkpoint = find_model(recipe.model_copy(update={"model": str(folder)}))
    with contextlib.nullcontext() if trusted else contextlib.suppress(BaseModelError):
        open_tokenizer(checkpoint, trust_remote_code=trusted)
    assert (tmp_path / "was run").exists() == trusted

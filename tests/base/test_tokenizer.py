"""A checkpoint's tokenizer: its own, or an error that names what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from halfbyte.base.tokenizer import open_tokenizer
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

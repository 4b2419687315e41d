"""Tokenizers of GGUF files: no token but the file's, and text cut by the file's own rule."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from transformers import LlamaConfig

from halfbyte.models.gguf import tokenizer as ours
from halfbyte.models.gguf.header import read_header
from halfbyte.types import Tokenizer
from tests.models.gguf import files

TEXT = "he said 12345  words, 日本!\n"


def tokenizer(folder: Path, rule: str, pad: str = files.TOKENS[0], add_bos: bool | None = False) -> Tokenizer:
    folder.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama")
    files.add_tokenizer(writer, rule, pad=pad, add_bos=add_bos)
    writer.add_tensor("token_embd.weight", np.ones((8, 8), np.float32))
    files.close(writer)
    header = read_header(folder / "m.gguf")
    made = ours.tokenizer_of(str(folder), "m.gguf", header, LlamaConfig(vocab_size=len(files.TOKENS)))
    made.save_pretrained(folder / "out")
    LlamaConfig(vocab_size=len(files.TOKENS)).save_pretrained(folder / "out")
    ours.check_tokenizer(folder / "out", made, header)
    return made


@pytest.mark.parametrize("rule", ["llama-bpe", "qwen2", "gpt-2"])
def test_no_token_but_those_of_the_file(tmp_path: Path, rule: str) -> None:
    """transformers' class for byte-level vocabularies adds <|endoftext|>, which Llama 3's, say, has not."""
    made = tokenizer(tmp_path, rule, pad="<|pad|>")
    assert len(made) == len(files.TOKENS) and max(made(TEXT + "<|endoftext|>")["input_ids"]) < len(files.TOKENS)
    assert (made.bos_token, made.eos_token, made.pad_token) == ("<|im_start|>", "<|im_end|>", "<|pad|>")
    assert made.chat_template == files.TEMPLATE and made.decode(made(TEXT)["input_ids"]) == TEXT
    assert made("<|im_end|>")["input_ids"] == [2]


@pytest.mark.parametrize(
    ("rule", "said", "first"), [("llama-bpe", None, True), ("llama-bpe", False, False), ("qwen2", None, False)]
)
def test_a_text_begins_as_llama_cpp_begins_it(tmp_path: Path, rule: str, said: bool | None, first: bool) -> None:
    made = tokenizer(tmp_path, rule, add_bos=said)
    assert (made(TEXT)["input_ids"][0] == made.bos_token_id) is first


def test_a_word_that_is_a_token_needs_no_merges(tmp_path: Path) -> None:
    words = {name: tokenizer(tmp_path / name, name) for name in ("llama-bpe", "qwen2")}
    spaces = files.TOKENS.index("ĠĠ")
    assert words["llama-bpe"].backend_tokenizer.model.ignore_merges
    assert not words["qwen2"].backend_tokenizer.model.ignore_merges and spaces in words["qwen2"](" " * 3)["input_ids"]


@pytest.mark.parametrize(
    ("rule", "pieces"),
    [
        ("gpt-2", ["he", " said", " 12345", " ", " words", ",", " 日本", "!", "\n"]),
        ("smollm", ["he", " said", " ", "1", "2", "3", "4", "5", " ", " words", ",", " 日本", "!", "\n"]),
        ("stablelm2", ["he", " said", " ", "1", "2", "3", "4", "5", " ", " words", ",", " 日本", "!\n"]),
        ("glm4", ["he", " said", " ", "123", "45", " ", " words", ",", " 日本", "!\n"]),
        ("deepseek-v3", ["he", " said", " ", "123", "45", " ", " words", ",", " ", "日本", "!\n"]),
        ("falcon", ["he", " said", " ", "123", "45", " ", " words", ",", " 日本", "!", "\n"]),
        ("bloom", ["he", " said", " 12345", " ", " words", ",", " 日本", "!\n"]),
    ],
)
def test_text_is_cut_by_the_files_own_rule(tmp_path: Path, rule: str, pieces: list[str]) -> None:
    """The cuts by hand, as the regular expressions of llama.cpp make them."""
    backend = tokenizer(tmp_path, rule).backend_tokenizer
    cut = [TEXT[start:end] for _, (start, end) in backend.pre_tokenizer.pre_tokenize_str(TEXT)]
    assert cut == pieces

"""Tokenizers of GGUF files: no token but the file's, and text cut by the file's own rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from transformers import LlamaConfig

from halfbyte.models.gguf import tokenizer as ours
from halfbyte.models.gguf.header import read_header
from halfbyte.proofs import programs
from halfbyte.types import Tokenizer
from tests.models.gguf import files

CHAT = "<|user|>\n he<|end|>\n the<s> he"
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


def sentencepiece(folder: Path, name: str = "any", prefix: bool | None = None, first: str = "<unk>") -> list[str]:
    """What a SentencePiece file's tokenizer makes of CHAT, and of a text of spaces, token by token."""
    folder.mkdir()
    chat = [first, "<s>", "</s>", "<|endoftext|>", "<|user|>", "<|end|>"]
    words = ["▁", "h", "e", "t", "▁t", "▁h", "he", "▁he", "the", "▁the"]
    tokens = [*chat, *(f"<0x{n:02X}>" for n in range(256)), *words]
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama")
    writer.add_name(name)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * (len(tokens) - len(words)) + [-1.0 - n for n in range(len(words))])
    writer.add_token_types([2 if first == "<unk>" else 3, 3, 3, 3, 3, 4, *[6] * 256, *[1] * len(words)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if prefix is not None:
        writer.add_add_space_prefix(prefix)
    writer.add_tensor("token_embd.weight", np.ones((len(tokens), 8), np.float32))
    files.close(writer)
    header, config = read_header(folder / "m.gguf"), LlamaConfig(vocab_size=len(tokens))
    read = ours.tokenizer_of(str(folder), "m.gguf", header, config)
    read.save_pretrained(folder / "out")
    config.save_pretrained(folder / "out")
    ours.check_tokenizer(folder / "out", read, header)
    assert read.decode(read("the  he", add_special_tokens=False)["input_ids"]) == "the  he"
    pieces: list[str] = read.convert_ids_to_tokens(read(CHAT)["input_ids"])
    return pieces


SPELLED = ["<s>", "<|user|>", "▁", "<0x0A>", "▁he", "<|end|>", "▁", "<0x0A>", "▁the", "<s>", "▁", "▁he"]


@pytest.mark.parametrize(
    ("said", "pieces"),
    [
        ({}, SPELLED),
        ({"prefix": True}, SPELLED),
        ({"prefix": False}, ["<s>", "<|user|>", "<0x0A>", "▁he", "<|end|>", "<0x0A>", "▁the", "<s>", "▁he"]),
        ({"name": "My Phi-3 tune"}, ["<s>", "<|user|>", "▁he", "<|end|>", "▁the", "<s>", "▁", "▁he"]),
        ({"first": "<pad>"}, SPELLED),
    ],
)
def test_sentencepiece_is_spelled_as_llama_cpp_spells_it(
    tmp_path: Path, said: dict[str, Any], pieces: list[str]
) -> None:
    """A space before each stretch of text unless the file says otherwise; none is left after a whole token in a file
    that is called Phi-3; a text begins with <s> also where transformers' class adds a token that the file has not."""
    assert sentencepiece(tmp_path / "m", **said) == pieces
    if programs.has_llama():
        program = programs.LlamaCpp(str(tmp_path / "m" / "m.gguf"), vocab_only=True)
        tokens = gguf.GGUFReader(tmp_path / "m" / "m.gguf").fields["tokenizer.ggml.tokens"].contents()
        assert [tokens[n] for n in program.tokens(CHAT)] == pieces[1:]


def test_whole_tokens_of_any_letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control tokens and those of users are whole in a text, also where they are not spelled in bytes' letters."""
    whole = ["<｜begin▁of▁sentence｜>", "<tool call>", "\t\t"]
    monkeypatch.setattr(files, "TOKENS", [files.TOKENS[0], whole[0], files.TOKENS[2], *files.TOKENS[3:], *whole[1:]])
    kinds, add = [3, 3, 3, *[1] * 258, 3, 4], gguf.GGUFWriter.add_token_types
    monkeypatch.setattr(gguf.GGUFWriter, "add_token_types", lambda self, _: add(self, kinds))
    read = tokenizer(tmp_path / "m", "qwen2")
    assert len(read) == len(files.TOKENS) and read.bos_token_id == 1
    ids = [read(token)["input_ids"] for token in whole]
    assert ids == [[1], [len(files.TOKENS) - 2], [len(files.TOKENS) - 1]]
    assert read.decode([1, *read("he\t\t")["input_ids"]], skip_special_tokens=True) == "he\t\t"

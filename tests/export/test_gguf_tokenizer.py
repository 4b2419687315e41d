"""Tokenizers in GGUF files: 1,000 strings become the same tokens, by our reading of the file and by llama.cpp."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from halfbyte.errors import ExportError
from halfbyte.export import gguf as writing
from halfbyte.export import gguf_tokenizer
from halfbyte.export.weights import MergedModel
from halfbyte.inference.target import Target
from halfbyte.models.gguf.header import read_header
from halfbyte.models.gguf.tokenizer import SPLITS, cutting, tokenizer_of
from halfbyte.models.sources.checkpoint import Checkpoint
from halfbyte.proofs import programs
from tests import tiny_run

PARTS = (
    *" \n\t", "  ", "   ", "\n\n", "\r\n", "1", "12", "1234567.5", "٣", "१२", "hello", "World", "don't", "I'LL",
    "we've", "naïve", "Straße", "日本語", "中文", "한국어", "Привет", "مرحبا", "ไทย", "🙂", "👩\u200d💻", "é", "_x",
    "==", "{}", "...", "—", "“q”", "$9.99", "<b>", "http://a.b/c?d=1", "snake_case", "CamelCase", "ﬁ", "£", "\u00a0",
)  # fmt: skip


@cache
def strings() -> tuple[str, ...]:
    draw = random.Random(0)
    return tuple("".join(draw.choices(PARTS, k=draw.randint(1, 12))) for _ in range(1000))


def trained(rule: str) -> Any:
    """A byte-level BPE of 400 tokens that cuts text by a rule."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = cutting(rule)
    made.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(strings()[:300], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def file_of(
    tokenizer: Any, folder: Path, checkpoint: Checkpoint | None = None, name: str = "model"
) -> tuple[Path, Any]:
    """A tiny model of this name with this tokenizer as a GGUF file."""
    rows = len(tokenizer)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=rows,
        tie_word_embeddings=True, max_position_embeddings=512,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        LlamaForCausalLM(config).save_pretrained(folder / name)
    recipe = tiny_run.recipe(folder, quant__type="none", model=str(folder / name)).recipe
    merged = MergedModel(Target(folder, recipe), "16bit")
    origin = checkpoint or merged.checkpoint
    path = folder / "m.gguf"
    writing.write(merged, path, "F16", lambda w: gguf_tokenizer.add(w, tokenizer, rows, origin, None))
    return path, config


def check(tokenizer: Any, path: Path, config: Any) -> None:
    alone = path.parent / "alone"
    alone.mkdir()
    path.rename(alone / "m.gguf")
    read = tokenizer_of(str(alone), "m.gguf", read_header(alone / "m.gguf"), config)
    wanted = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in strings()]
    assert [read(text, add_special_tokens=False)["input_ids"] for text in strings()] == wanted
    if programs.has_llama():
        program = programs.LlamaCpp(str(alone / "m.gguf"), tokens=64)
        wrong = [text for text, ids in zip(strings(), wanted, strict=True) if program.tokens(text) != ids]
        assert not wrong, wrong[:3]


@pytest.mark.parametrize("rule", ["gpt-2", "smollm", "qwen2", "bloom"])
def test_a_byte_level_tokenizer(rule: str, tmp_path: Path) -> None:
    tokenizer = trained(rule)
    found = gguf_tokenizer.rule_of(tokenizer)
    assert found == rule
    check(tokenizer, *file_of(tokenizer, tmp_path))


def test_a_rule_that_nobody_has(tmp_path: Path) -> None:
    tokenizer = trained("gpt-2")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("e", behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    with pytest.raises(ExportError, match=r"splits text by no rule(.|\n)*convert_hf_to_gguf"):
        gguf_tokenizer.rule_of(tokenizer)
    assert "gpt-2" in SPLITS


def test_a_sentencepiece_like_tokenizer(tmp_path: Path) -> None:
    """BPE with byte fallback, as tokenizer.json has Llama 2's: scores are the order of its merges."""
    if not programs.has_llama():
        pytest.skip("llama.cpp is not installed: pip install 'halfbyte[gguf]'")
    tokenizer = sentencepiece()
    path, _ = file_of(tokenizer, tmp_path)
    program = programs.LlamaCpp(str(path), tokens=64)
    wanted = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in strings()}
    wrong = [text for text, ids in wanted.items() if program.tokens(text) != ids]
    assert not wrong, (len(wrong), wrong[:3])


def sentencepiece() -> Any:
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special[:3], show_progress=False)
    made.train_from_iterator([text for text in strings()[:300] if "🙂" not in text], trainer)
    values = made.to_str()
    parsed = json.loads(values)
    vocabulary = parsed["model"]["vocab"]
    for token in special[3:]:
        vocabulary.setdefault(token, len(vocabulary))
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(parsed)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("name", ["model", "tiny-Phi3"])
@pytest.mark.parametrize("strips", [False, True])
def test_white_space_after_whole_tokens(tmp_path: Path, name: str, strips: bool) -> None:
    """llama.cpp takes it away, as Phi-3's tokenizer does, by the file's name, and opens no file of such a name without
    Phi-3's tokens."""
    tokenizer = sentencepiece() if strips else trained("gpt-2")
    if strips:
        tokenizer.add_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
        tokenizer.add_tokens([AddedToken("<|end|>", special=True, normalized=False, rstrip=True)])
    path, config = file_of(tokenizer, tmp_path, name=name)
    called = gguf.GGUFReader(path).fields["general.name"].contents()
    assert called == {("model", True): "phi-3 model", ("tiny-Phi3", False): "tiny-Phi_3"}.get((name, strips), name)
    text = "red<|end|>\n cup"
    wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
    if programs.has_llama():
        assert programs.LlamaCpp(str(path), tokens=64).tokens(text) == wanted
    (tmp_path / "alone").mkdir()
    path.rename(tmp_path / "alone" / "m.gguf")
    read = tokenizer_of(str(tmp_path / "alone"), "m.gguf", read_header(tmp_path / "alone" / "m.gguf"), config)
    assert read(text, add_special_tokens=False)["input_ids"] == wanted


@pytest.mark.slow
def test_that_of_a_gguf_source_is_kept(tmp_path: Path) -> None:
    from halfbyte.base.config import open_tokenizer
    from halfbyte.models.sources.lookup import resolve

    checkpoint = resolve("smollm2-135m")
    tokenizer, source = open_tokenizer(checkpoint), gguf_tokenizer.source_file(checkpoint)
    assert source is not None
    path, config = file_of(tokenizer, tmp_path, checkpoint)
    own, kept = gguf.GGUFReader(source), gguf.GGUFReader(path)
    for key, field in own.fields.items():
        if key.startswith("tokenizer.ggml."):
            assert kept.fields[key].contents() == field.contents(), key
    check(tokenizer, path, config)

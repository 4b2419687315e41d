"""The tokenizer of a GGUF file, written and read back as the file says it.

transformers builds it from the file's vocabulary, but cuts text by GPT-2's rule wherever it does not know the file's
(`tokenizer.ggml.pre`): other tokens than the model was trained on, and no word about it. The rules that are known here
are llama.cpp's (src/llama-vocab.cpp); a file with another one is refused.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.models.gguf.header import GgufHeader, vocabulary
from halfbyte.models.gguf.reader import GgufError
from halfbyte.types import Config, Document, Tokenizer
from halfbyte.upstream.transformers import GGUF_RULES, gguf_splits

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT, _THREE = r"\p{N}", r"\p{N}{1,3}"
_CJK = r"[一-龥぀-ゟ゠-ヿ]+"
_DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Rule -> the cuts, one after the other, of what the one before has left whole.
SPLITS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4", "trillion", "granite-docling"), (_GPT2,)),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), (_DIGIT, _GPT2)
    ),
    **dict.fromkeys(("stablelm2", "hunyuan", "solar-open"), ("|".join((_CONTRACTIONS, _WORDS, _DIGIT, _REST)),)),
    **dict.fromkeys(("chatglm-bpe", "glm4", "glm5"), ("|".join((_CONTRACTIONS, _WORDS, _THREE, _REST)),)),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"), (_THREE, _CJK, _DEEPSEEK)),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", "[0-9][0-9][0-9]", _GPT2),
    **dict.fromkeys(("bloom", "poro-chat", "gpt3-finnish"), (r" ?[^(\s|.,!?…。，、।۔،)]+",)),
}
# llama.cpp puts the first token before a text for these, unless the file says otherwise.
WITH_BOS = frozenset(
    ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken")
)
# A word that is a token as a whole is not put together from merges (`ignore_merges` of a tokenizer.json).
WHOLE_WORDS = WITH_BOS | {"glm4", "glm5"}
# llama.cpp's kinds of tokens, 1 to 6.
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
# After these white space stays, in a file that `strips_after_special`; it does not open without them.
UNSTRIPPED = ("<unk>", "<s>", "<|endoftext|>")
PROBE = "Hello  world, it's 12345 + 6.  7\n\n\tdef f(x):\n    return x  # é 日本\n"


def tokenizer_of(folder: str, name: str, header: GgufHeader, config: Config) -> Tokenizer:
    """The tokenizer of the file `name`, alone in `folder`: transformers prefers a tokenizer.json that lies beside it.
    Raises GgufError: it is of a kind, or cuts text by a rule, that is not known."""
    from transformers import PreTrainedTokenizerFast

    if GGUF_RULES.reason:
        raise GgufError(f"its tokenizer cannot be read: {GGUF_RULES.reason}; pip install -U transformers")
    kind, rule = header.metadata.get("tokenizer.ggml.model"), header.metadata.get("tokenizer.ggml.pre", "default")
    if kind == "gpt2" and rule not in {*SPLITS, *gguf_splits(), "default"}:
        raise GgufError(f"its tokenizer cuts text by the rule {rule!r} (tokenizer.ggml.pre), which is not known")
    try:
        # AutoTokenizer asks transformers' own table of architectures first.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, gguf_file=name)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise GgufError(f"its tokenizer (tokenizer.ggml.model = {kind!r}) cannot be read: {error}") from error
    if kind == "gpt2" and rule in SPLITS:
        tokenizer.backend_tokenizer.pre_tokenizer = cutting(rule)
    tokenizer = _as_llama_cpp_reads(tokenizer, header, *vocabulary(header))
    context = header.metadata.get(f"{header.architecture}.context_length")
    if isinstance(context, int) and context > 0:
        tokenizer.model_max_length = context
    if len(tokenizer) > config.vocab_size:
        raise GgufError(f"its tokenizer has {len(tokenizer)} tokens, and its model knows {config.vocab_size}")
    return tokenizer


def cutting(rule: str) -> "PreTokenizer":
    """What cuts a text by a rule of `SPLITS` or of transformers' own table."""
    from tokenizers import Regex, pre_tokenizers

    splits = SPLITS.get(rule) or (gguf_splits()[rule],)
    cuts = [
        pre_tokenizers.Split(Regex(cut), behavior="isolated")
        if cut != _DIGIT
        else pre_tokenizers.Digits(individual_digits=True)
        for cut in splits
        if cut != _GPT2
    ]
    # GPT-2's own cuts are built into the class, and come last wherever they come.
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=_GPT2 in splits)
    return pre_tokenizers.Sequence([*cuts, bytes_])


def _as_llama_cpp_reads(
    tokenizer: Tokenizer, header: GgufHeader, tokens: Sequence[str], kinds: Sequence[int]
) -> Tokenizer:
    """The file's tokens and no others, as no row of the embedding is theirs; text begins, is spelled, and is searched
    for whole tokens, as llama.cpp does it (transformers' classes add tokens, leave some out, and spell by their own
    rules)."""
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    stated = {key: header.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre", "add_bos_token")}
    rule = stated["pre"] if stated["model"] == "gpt2" else ""
    read = tokenizer.backend_tokenizer.to_str()
    values = json.loads(read)
    values["added_tokens"] = [token for token in values["added_tokens"] if token["id"] < len(tokens)]
    _add_whole(values, tokens, kinds)
    if strips_after_special(header.metadata.get("general.name")):
        for token in values["added_tokens"]:
            token["rstrip"] = token["content"] not in UNSTRIPPED
    if rule in WHOLE_WORDS:
        values["model"]["ignore_merges"] = True
    if stated["model"] == "llama":
        prefix = header.metadata.get("tokenizer.ggml.add_space_prefix", True)
        values |= _spelling(prefix=bool(prefix))
    if values == json.loads(read):
        return tokenizer
    names = ("bos_token", "eos_token", "unk_token", "pad_token", "chat_template", "add_eos_token")
    settings = {name: tokenizer.init_kwargs[name] for name in names if tokenizer.init_kwargs.get(name) is not None}
    settings["add_bos_token"] = tokenizer.add_bos_token or (stated["add_bos_token"] is None and rule in WITH_BOS)
    return PreTrainedTokenizerFast(tokenizer_object=Backend.from_str(json.dumps(values)), **settings)


def _add_whole(values: Document, tokens: Sequence[str], kinds: Sequence[int]) -> None:
    """Control tokens, and those of users, are found in a text as the file writes them, and are no product of merges."""
    model, added = values["model"], {token["id"] for token in values["added_tokens"]}
    numbers = model["vocab"]
    if not isinstance(numbers, dict):
        return
    spelled, renamed = {number: token for token, number in numbers.items()}, set()
    for number, (token, kind) in enumerate(zip(tokens, kinds, strict=False)):
        if kind not in (CONTROL, USER) or number in added or number not in spelled:
            continue
        if spelled[number] != token:
            # Gemma's runs of spaces are merges too
            if token in numbers or spelled[number] == token.replace(" ", "▁"):
                continue
            renamed.add(spelled[number])
            numbers[token] = numbers.pop(spelled[number])
        form = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        values["added_tokens"].append({"id": number, "content": token, **form, "special": kind == CONTROL})
    values["added_tokens"].sort(key=lambda token: token["id"])
    if renamed:
        model["merges"] = [(a, b) for a, b in model["merges"] if not renamed & {a, b, a + b}]


def _spelling(*, prefix: bool) -> Document:
    """How SentencePiece's vocabularies spell a text between whole tokens; `prefix`: with a space before it."""
    normalizers: list[Document] = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    normalizers.append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    decoders: list[Document] = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}]
    decoders += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    decoders += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
    }


def strips_after_special(name: object) -> bool:
    """Whether llama.cpp takes away white space after whole tokens: it goes by the name that a file has."""
    return isinstance(name, str) and any(each in name.lower() for each in ("phi-3", "phi3"))


def check_tokenizer(target: Path, tokenizer: Tokenizer, header: GgufHeader) -> None:
    """What was written must read back as what the file says."""
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(str(target))
    for token, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        stated = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        read = getattr(again, f"{token}_token_id")
        if stated is not None and read != stated:
            raise GgufError(f"its {token} token is {stated}, and the tokenizer read from it has {read}")
    if again.chat_template != header.metadata.get("tokenizer.chat_template"):
        raise GgufError("its chat template was changed by the conversion")
    if again(PROBE)["input_ids"] != tokenizer(PROBE)["input_ids"]:
        raise GgufError("its tokenizer reads back differently from how it was written")

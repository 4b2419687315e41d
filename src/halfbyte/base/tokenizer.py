"""A checkpoint's tokenizer, refused with a fix where none can be read or it belongs to another model."""

from halfbyte.errors import BaseModelError, first_line
from halfbyte.models.sources.checkpoint import Checkpoint
from halfbyte.types import Model, Tokenizer

# File names, without their ending, that any of transformers' tokenizers is read from.
TOKENIZER_STEMS = frozenset({"tokenizer", "vocab", "spiece", "sentencepiece", "tekken"})
MOST_BYTES, MOST_TEMPLATE_BYTES = 100_000_000, 1_000_000
BESIDE = "put the model's tokenizer.json and tokenizer_config.json beside its config.json"


def open_tokenizer(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Tokenizer:
    """The checkpoint's tokenizer. Raises BaseModelError: none is there, or it knows no text."""
    from transformers import AutoTokenizer

    for file in checkpoint.path.glob("*"):
        most = MOST_TEMPLATE_BYTES if file.name.startswith("chat_template") else MOST_BYTES
        if (file.stem in TOKENIZER_STEMS or file.name.startswith("chat_template")) and file.stat().st_size > most:
            raise BaseModelError(f"{file} has {file.stat().st_size:,} bytes; at most {most:,} are read.", fix=BESIDE)
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.path, trust_remote_code=trust_remote_code)
    except BaseException as error:  # of any kind: the files are read by many classes, some in Rust, which panics
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        there = any(f.stem in TOKENIZER_STEMS for f in checkpoint.path.iterdir())
        why = first_line(error) if there else "it has no tokenizer.json"
        raise BaseModelError(f"no tokenizer could be read from {checkpoint.path}: {why}", fix=BESIDE) from error
    if not tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys():  # made by transformers out of no file
        looked_for = {"tokenizer.json", *type(tokenizer).vocab_files_names.values()}
        raise BaseModelError(
            f"{checkpoint.path} has no tokenizer: what is there knows not one word; looked for "
            f"{', '.join(sorted(looked_for))}.",
            fix=BESIDE,
        )
    return tokenizer


def check_vocabulary(checkpoint: Checkpoint, tokenizer: Tokenizer, model: Model) -> None:
    """Refuse a tokenizer that knows more tokens than the embedding has rows (BaseModelError)."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise BaseModelError(
            f"{checkpoint.id}: the tokenizer knows {len(tokenizer)} tokens, the embedding has {rows} rows.",
            fix="use the tokenizer that belongs to this checkpoint",
        )

"""An adapter's passport, `halfbyte.json` beside its weights: the base, quantiser, tokenizer and chat template that it
belongs to, the recipe and rows that it was trained with, and how far it got.

Why: PEFT puts an adapter on any base that has its shapes, and a tokenizer with other ids feeds it other words: both
answer fluently and wrongly.
Cost: a hash of the adapter's file; of a base without a store, 1 MB of each of its files.
"""

import hashlib
import json
from pathlib import Path

from halfbyte.adapters.lora import damaged
from halfbyte.base.load import Base
from halfbyte.base.store import manifest, shelf
from halfbyte.errors import AdapterError
from halfbyte.models.gguf import blocks
from halfbyte.recipe.adapter import read_config
from halfbyte.recipe.adapter_folder import ADAPTER_FILES, PASSPORT, PASSPORT_FORMAT, read_passport
from halfbyte.recipe.fields import shown
from halfbyte.recipe.schema import Quant
from halfbyte.system import files
from halfbyte.system.libraries import versions
from halfbyte.types import Document, Tokenizer

_WHERE = frozenset({"base_model_name_or_path", "revision"})
SAMPLES, SAMPLE_BYTES = 256, 4096
# What a tokenizer does beside its vocabulary: spaces, line ends, digits, contractions, accents, other scripts.
_PROBE = " A b\n\n  c's 1234567.5 Straße naïve 日本語 🙂\tend "


def belongs_to(base: Base, quant: Quant, tokenizer: Tokenizer, template: str | None) -> Document:
    """What an adapter that is trained or used here belongs to. `template`: the text of the chat template in use."""
    source = base.checkpoint
    settings = shelf.settings(quant, base.compute_dtype) if quant.quantises else {"type": quant.type}
    settings.pop("compute_dtype", None)  # a machine without bf16 computes the same in fp32
    in_file = blocks.read(source.path)
    if in_file is not None:
        content = in_file.content
    else:
        content = manifest.read(base.store).content_sha256 if base.store is not None else _sampled(base)
    return {
        "base": {"id": source.id, "revision": source.revision, "content": content},
        "quant": settings,
        "tokenizer": _tokenizer_digest(tokenizer),
        "chat_template": template,
    }


def _sampled(base: Base) -> str:
    """A hash of pieces of the source's files, spread evenly: enough to tell any two trainings of a model apart."""
    digest = hashlib.sha256()
    for file in shelf.source_files(base.checkpoint):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            for i in range(SAMPLES):
                stream.seek(i * max(0, size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(stream.read(SAMPLE_BYTES))
    return f"samples:{digest.hexdigest()}"


def _tokenizer_digest(tokenizer: Tokenizer) -> str:
    """By what it does, so that another version's way of writing its file changes nothing."""
    words = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer(_PROBE)["input_ids"]])
    return hashlib.sha256(words.encode()).hexdigest()


def _config_digest(folder: Path) -> str:
    """Of what the config says of the weights: not of where the base is, which changes when it is moved."""
    config = {name: value for name, value in read_config(folder).items() if name not in _WHERE}
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def write(folder: Path, trained: Document, reached: Document) -> None:
    """Put the passport beside an adapter's weights, which are there already. `trained`: as `points.trained_with` makes
    it. `reached`: as `report.reached` makes it."""
    values = {
        "format": PASSPORT_FORMAT,
        "adapter_sha256": files.sha256(folder / ADAPTER_FILES[0]),
        "config_sha256": _config_digest(folder),
        **trained,
        "reached": reached,
        "versions": versions(),
    }
    files.write(folder / PASSPORT, files.as_json(values))


def differences(was: Document, now: Document) -> list[str]:
    """What an adapter belongs to beside what is here, a sentence each; empty where it belongs here."""
    a, b = was["base"], now["base"]
    sentences: list[str] = []
    # a whole hash and one of samples say nothing of each other
    comparable = a["content"].startswith("samples:") == b["content"].startswith("samples:")
    if comparable and a["content"] != b["content"]:
        sentences.append(f"base: trained on {_named(a)}, here is {_named(b)}")
    for name in sorted({*was["quant"], *now["quant"]}):
        x, y = was["quant"].get(name), now["quant"].get(name)
        if x != y:
            sentences.append(f"quant.{name}: trained with {shown(x)}, here is {shown(y)}")
    if was["tokenizer"] != now["tokenizer"]:
        sentences.append(f"tokenizer: trained with {was['tokenizer'][:12]}, here is {now['tokenizer'][:12]}")
    if was["chat_template"] != now["chat_template"]:
        sentences.append(f"chat template: trained with {_text(was)}, here is {_text(now)}")
    return sentences


def _named(base: Document) -> str:
    revision = f"@{base['revision'][:12]}" if base["revision"] else ""
    return f"{base['id']}{revision} (weights {base['content'].removeprefix('samples:')[:12]})"


def _text(belongs: Document) -> str:
    text = belongs["chat_template"]
    return f"one of {len(text)} characters, {hashlib.sha256(text.encode()).hexdigest()[:12]}" if text else "none"


def check(folder: Path, now: Document, *, force: bool = False) -> list[str]:
    """Refuse an adapter that belongs elsewhere, or whose weights are not those that its passport names. `now`: as
    `belongs_to` makes it. `force`: say it, and go on. Returns what is to be told: nothing, or with `force` what would
    have been refused. Raises AdapterError: names both sides of each difference."""
    passport = read_passport(folder)
    if passport is None:
        return []
    if files.sha256(folder / ADAPTER_FILES[0]) != passport["adapter_sha256"] and not force:
        raise damaged(folder, f"it is not the file that {PASSPORT} beside it names; --force uses it all the same")
    config_sha256 = passport.get("config_sha256")  # none in passports of earlier versions
    if config_sha256 is not None and _config_digest(folder) != config_sha256 and not force:
        raise AdapterError(
            f"{folder / ADAPTER_FILES[1]} is not the file that {PASSPORT} beside it names; --force uses it all the "
            "same.",
            fix="copy it again; a run's checkpoints/ hold earlier states of its adapter",
        )
    return refuse(f"the adapter {folder}", differences(passport["belongs_to"], now), force=force)


def refuse(what: str, sentences: list[str], *, force: bool) -> list[str]:
    """Raise an AdapterError that lists these differences, unless there are none or `force` is given."""
    if sentences and not force:
        listed = "\n".join(f"  - {text}" for text in sentences)
        raise AdapterError(
            f"{what} does not belong to what is here:\n{listed}",
            fix="open it with what it was trained with; --force goes on all the same",
        )
    return [f"{what} does not belong here, used all the same: {text}" for text in sentences]

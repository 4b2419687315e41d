"""`halfbyte export RUN`: a GGUF file, a GGUF adapter, a Modelfile for Ollama, or a PEFT folder, each proven.

Cost: the source read once, the file written once (K-quants: an F16 file first), and what the proof asks.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.base.config import open_config
from halfbyte.data.encoding.chatml import chat_template
from halfbyte.errors import ExportError
from halfbyte.export import converter, folder, gguf, gguf_tokenizer, lora, ollama
from halfbyte.export.merge import Asking, Base, Wish, bases, better, describe, finish, notes
from halfbyte.export.weights import BaseKind, Merged
from halfbyte.inference.load import tokenizer_of
from halfbyte.inference.target import Target
from halfbyte.models.sources.lookup import find_model
from halfbyte.proofs import programs
from halfbyte.proofs.export import Exported, Proof
from halfbyte.types import Tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

NO_LLAMA = f"not proven: llama.cpp is not installed ({programs.INSTALL})"
# Between two numbers llama.cpp rounds to what it multiplies in.
_OTHERS = {"F32": ("F32",), "F16": ("F16",), "BF16": ("BF16",)}


def to_gguf(wish: Wish, kind: str, base: Base = "auto", *, modelfile: bool = False) -> Exported:
    """The merged model as one GGUF file in a folder, with `--ollama` a Modelfile beside it.

    Raises:
        ExportError: the architecture is not written here, llama.cpp is not there for a K-quant, no space, or what was
            written does not say what the run says; nothing is left then.
    """
    kind = kind.upper()
    if kind not in (every := (*gguf.WRITTEN, *gguf.QUANTISED)):
        raise ExportError(f"--gguf {kind}: no such format.", fix=f"one of {', '.join(every)}")
    if kind in gguf.QUANTISED and not programs.has_llama():
        raise ExportError(f"{kind} is quantised by llama.cpp, which is not installed.", fix=programs.INSTALL)
    out = wish.place(f"gguf-{kind.lower()}")
    if (own := _model_type(wish.found())) not in gguf.ARCHITECTURES:
        converter.command_for(own)
    found = wish.checked()
    kinds, tried = bases(found, base), dict[str, Proof]()
    with wish.asking(out) as asking, folder.whole_or_absent(out) as temporary:
        told: list[str] = []
        for each in kinds if asking is not None and programs.has_llama() else [better({}, kinds)]:
            (place := temporary / each).mkdir()
            path = place / f"{name_of(found)}-{kind}.gguf"
            told += _write(wish, found, each, path, kind)
            if asking is not None and programs.has_llama():
                tried[each] = prove(asking, path, kind, each)
        taken: BaseKind = better(tried, kinds)
        told += notes(found, kinds, tried, taken) if tried or asking is None else [NO_LLAMA]
        made = Exported(out, f"GGUF file in {kind}", taken, tried, tuple(told))
        made.check()
        for each in kinds:
            for file in (temporary / each).glob("*") if each == taken else ():
                file.rename(temporary / file.name)
            shutil.rmtree(temporary / each, ignore_errors=True)
        if modelfile:
            file = next(temporary.glob("*.gguf"))
            ollama.write(temporary / "Modelfile", file.name, _tokenizer(found), found.recipe)
        finish(temporary, found, made)
    return made


def prove(asking: Asking, path: Path, kind: str, base: BaseKind, adapter: Path | None = None) -> Proof:
    """A GGUF file beside the run, by llama.cpp."""
    own = _family(kind)
    others = _OTHERS.get(own, (own, own))  # of blocks it rounds what they are multiplied with alike
    return asking.prove(path, "llama.cpp", own, f"llama-{base}", base=base, others=others, adapter=adapter)


def _family(kind: str) -> str:
    return kind[:4] if kind in gguf.QUANTISED else kind


def _write(wish: Wish, found: Target, base: BaseKind, path: Path, kind: str) -> list[str]:
    """One file; returns what is to be known of it."""
    merged = Merged(found, base, wish.tell)
    ours = _model_type(found) in gguf.ARCHITECTURES
    plain = "F16" if kind in gguf.QUANTISED or not (ours or kind in ("F32", "BF16", "Q8_0")) else kind
    weights = sum(item.source.nbytes for item in merged.items)
    folder.check_space(path.parent, 2 * weights + folder.BESIDE_BYTES)
    wish.tell.say(f"from {describe(base)}, in {kind}", label="gguf")
    first = path.with_suffix(".f16") if plain != kind else path
    told = list(_known(merged))
    if ours:
        gguf.write(merged, first, plain, add_tokenizer(found, merged))
    else:
        converter.write(merged, first, plain)
        told.append(f"{merged.config.model_type} was written by llama.cpp's own converter")
    if plain != kind:
        gguf.quantised(first, path, kind)
        first.unlink()
        if fallen := gguf.fallen_back(path, kind):
            told.append(fallen)
    return told


def _model_type(found: Target) -> str:
    config = open_config(find_model(found.recipe).path, trust_remote_code=found.recipe.trust_remote_code)
    return str(config.get_text_config().model_type)


def _known(merged: Merged) -> list[str]:
    window = getattr(merged.config.get_text_config(), "sliding_window", None)
    if merged.config.model_type == "mistral" and window:
        return [f"llama.cpp has no place for this model's window of {window} tokens: longer texts differ"]
    return []


def add_tokenizer(found: Target, merged: Merged) -> Callable[[GGUFWriter], None]:
    """What puts a run's tokenizer and chat template into a GGUF writer."""
    tokenizer = _tokenizer(found)
    rows = int(merged.config.get_text_config().vocab_size)
    template = chat_template(tokenizer, found.recipe.data)
    return lambda writer: gguf_tokenizer.add(writer, tokenizer, rows, merged.checkpoint, template)


def _tokenizer(found: Target) -> Tokenizer:
    return tokenizer_of(found, find_model(found.recipe))


def name_of(found: Target) -> str:
    """What a file is called: by the base."""
    return Path(find_model(found.recipe).id.removesuffix(".gguf")).name


def to_gguf_lora(wish: Wish, *, modelfile: bool = False) -> Exported:
    """The adapter as a GGUF adapter, with a GGUF file of its base beside it to be proven on.

    Raises:
        ExportError: it holds what such an adapter cannot, or does not say what the run says.
    """
    out = wish.place("gguf-lora")
    found = wish.checked()
    merged = Merged(found, "16bit", wish.tell)
    tried: dict[str, Proof] = {}
    with wish.asking(out) as asking, folder.whole_or_absent(out) as temporary:
        path = temporary / f"{name_of(found)}-lora.gguf"
        lora.write_gguf(merged, path)
        if asking is not None and programs.has_llama():
            alone = temporary / "base.gguf"
            _write(wish, Target(found.path, found.recipe, None, found.run), "16bit", alone, "F16")
            tried["16bit"] = prove(asking, alone, "F16", "16bit", path)
            alone.unlink()
        told = notes(found, ["16bit"], tried, "16bit") if tried or asking is None else [NO_LLAMA]
        own = [f"llama-cli -m BASE.gguf --lora {out / path.name}, on a GGUF file of {merged.checkpoint.id} in 16 bits"]
        made = Exported(out, "GGUF adapter", "16bit", tried, (*own, *told))
        made.check()
        if modelfile:
            ollama.write(temporary / "Modelfile", "BASE.gguf", _tokenizer(found), found.recipe, adapter=path.name)
        finish(temporary, found, made)
    return made


def to_peft(wish: Wish) -> Exported:
    """A PEFT folder of one rank and one scaling, as vLLM reads them.

    Raises:
        ExportError: vLLM could not hold it.
    """
    out = wish.place("peft")
    found = wish.checked()
    with folder.whole_or_absent(out) as temporary:
        merged = Merged(found, "16bit", wish.tell)
        told = lora.write_peft(merged, temporary)
        made = Exported(out, "PEFT adapter", "16bit", {}, tuple(told))
        finish(temporary, found, made)
    return made

"""A merged model as a folder that plain transformers opens: weights, config, tokenizer, chat template.

Why: it is whole or absent. It is written beside its place and renamed when every byte is on the disk, so a kill, a full
disk or an error leaves nothing under its name.
Cost: the source read once, the result written once; two files at a time, each one matrix and its delta in fp32.
"""

import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from halfbyte.base.config import open_tokenizer
from halfbyte.base.store.writer import SafetensorsWriter, Slot
from halfbyte.data.encoding.chatml import chat_template
from halfbyte.errors import ExportError
from halfbyte.export.weights import Item, MergedModel
from halfbyte.models.sources.checkpoint import Checkpoint, beside_weights
from halfbyte.models.sources.safetensors import INDEX, SINGLE
from halfbyte.recipe.schema import Recipe
from halfbyte.system import files
from halfbyte.system.words import size

FILES_AT_ONCE = 2
# Config, tokenizer and card; the headers are far smaller.
BESIDE_BYTES = 100_000_000
# The files of a tokenizer in an adapter's folder.
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
MORE_SPACE = "free some space, or name another folder: --out DIR"


def check_space(out: Path, need_bytes: int) -> None:
    """Raise an ExportError if the disk of `out` cannot hold so much."""
    if (free := files.free_bytes(out.absolute())) < need_bytes:
        raise ExportError(
            f"no space left for {out}: it needs {size(need_bytes)}, and {size(free)} are free.", fix=MORE_SPACE
        )


@contextmanager
def whole_or_absent(out: Path) -> Iterator[Path]:
    """An empty folder that is named `out` when the block ends; after an error nothing is left of it. What killed
    processes have left is removed."""
    files.clear_dead(out.absolute().parent, out.name)
    try:
        with files.new_folder(out) as temporary:
            yield temporary
    except OSError as error:
        why = error.strerror or str(error)
        raise ExportError(f"{out} could not be written: {why}. Nothing of it is left.", fix=MORE_SPACE) from error


def nbytes(merged: MergedModel) -> int:
    """Bytes that the folder takes."""
    return sum(item.source.nbytes for item in merged.items) + BESIDE_BYTES


def write(merged: MergedModel, folder: Path) -> None:
    """Write weights, config, tokenizer and chat template into an empty folder."""
    plans = _plans(merged)
    stop, threads = threading.Event(), torch.get_num_threads()
    # one thread a file: pieces are small, and the threads of one operation would wait for each other
    with merged, ThreadPoolExecutor(FILES_AT_ONCE, "merge", torch.set_num_threads, (1,)) as pool:
        try:
            for future in [pool.submit(_write_file, merged, folder / n, i, stop) for n, i in plans.items()]:
                future.result()
        except BaseException:
            stop.set()
            raise
        finally:
            torch.set_num_threads(threads)
    if changed := merged.source.changed():
        raise ExportError(f"{changed[0]} was changed while it was read.", fix="run the same command again")
    if len(plans) > 1:
        index = {item.name: name for name, items in plans.items() for item in items}
        total = sum(item.source.nbytes for item in merged.items)
        files.write(folder / INDEX, files.as_json({"metadata": {"total_size": total}, "weight_map": index}))
    _write_beside(merged, folder)


def _plans(merged: MergedModel) -> dict[str, list[Item]]:
    """One file for each of the source's, under the usual names."""
    by_file: dict[Path, list[Item]] = {}
    for item in merged.items:
        by_file.setdefault(item.source.file, []).append(item)
    if len(by_file) == 1:
        return {SINGLE: next(iter(by_file.values()))}
    ordered = [file for file in merged.source.files if file in by_file]
    return {f"model-{n:05}-of-{len(ordered):05}.safetensors": by_file[file] for n, file in enumerate(ordered, 1)}


def _write_file(merged: MergedModel, path: Path, items: list[Item], stop: threading.Event) -> None:
    slots = [Slot(item.name, item.source.dtype, item.source.shape, item.source.nbytes) for item in items]
    with SafetensorsWriter(path, slots) as out:
        for item in items:
            if stop.is_set():
                return
            for first, part in merged.pieces(item):
                out.put(item.name, part.data, first)
        out.close({})


def _write_beside(merged: MergedModel, folder: Path) -> None:
    """Config, generation settings, tokenizer and chat template."""
    for path in beside_weights(merged.checkpoint.path):
        shutil.copyfile(path, folder / path.name)
    config = json.loads(((merged.head or merged.checkpoint.path) / "config.json").read_text(encoding="utf-8"))
    if merged.untied:
        config["tie_word_embeddings"] = False
    files.write(folder / "config.json", files.as_json(config))
    put_tokenizer(folder, merged.run.adapter, merged.run.recipe, merged.checkpoint)


def put_tokenizer(folder: Path, adapter: Path | None, recipe: Recipe, checkpoint: Checkpoint) -> None:
    """The tokenizer that was trained with, over the base's: the adapter's own, and the recipe's chat template."""
    if adapter is not None and (adapter / "tokenizer_config.json").is_file():
        for name in TOKENIZER:
            if (adapter / name).is_file():
                shutil.copyfile(adapter / name, folder / name)
    elif recipe.data.chat_template is not None or recipe.data.template_args:
        text = chat_template(open_tokenizer(checkpoint), recipe.data)
        files.write(folder / "chat_template.jinja", (text or "").encode())

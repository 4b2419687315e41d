"""Rows that are read and tokenised while a run goes on: `data.streaming`.

Why: 100 GB of text take hours to tokenise and as much disk again, before a first step.
What: files are cut into blocks: JSON lines by bytes (a block has the lines that begin in it), Parquet by row groups,
any other file is one. A pass takes all blocks in the order of its seed; `WINDOW_BLOCKS` of them are tokenised together
and their rows shuffled. Of a data set on the hub the shards come in the order of the seed, one at a time: each is
downloaded, and its blocks are taken likewise. Only seed, files and position decide, so any process reads the same; how
many rows each window has, and the commit of a data set, are kept with the run: one that goes on reads the same rows,
and none of them again.
Cost: two windows of tokens in memory, one shard on disk; at a window's begin 3,000 rows of 200 tokens a second.
"""

import hashlib
import itertools
import re
import tempfile
from bisect import bisect_right
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from halfbyte.data import blocks as text_blocks
from halfbyte.data.encoding.encode import encode
from halfbyte.data.encoding.encoder import EncodedRows, Encoder
from halfbyte.data.encoding.examples import Example, Examples
from halfbyte.data.encoding.tally import Tally
from halfbyte.data.mixture import shuffled
from halfbyte.data.reading import records
from halfbyte.data.reading.files import HUB, RowSource, find, source_of
from halfbyte.data.reading.problems import Problems
from halfbyte.data.reading.read import Chunk, Known, Reader, groups
from halfbyte.errors import DataError, first_line
from halfbyte.recipe.data import Data, DataEntry, Sources
from halfbyte.system import device, files
from halfbyte.types import Document, Tokenizer

BLOCK_BYTES = 4_000_000
WINDOW_BLOCKS = 8  # as many million tokens, about
WHOLE_BYTES = 64_000_000  # of a file that can only be read from its beginning
CONVERTED = "refs/convert/parquet"  # the hub's own files of a data set, a folder for each config
# How `datasets` finds a split by the names of folders and files, where a data set's card says nothing.
_SPLITS = {"train": "train|training", "validation": "validation|valid|dev|val", "test": "test|testing|eval|evaluation"}
_BETWEEN = "[-._ 0-9]"


class Flow:
    """The rows of a run, one after another without end. Raises DataError: names that stand for nothing, a file that
    cannot be cut, a data set that is not there."""

    def __init__(self, names: Sources, tokenizer: Tokenizer, data: Data, seed: int) -> None:
        self._data, self._seed = data, seed
        self._encoder, sources = Encoder(tokenizer, data), find(names)
        local = [source for source in sources if source.kind != "hub"]
        self._shards = {one.hub: _shards(one) for one in sources if one.kind == "hub"}
        self._units = [local] * bool(local) + [[s] for some in self._shards.values() for s in some]
        self._folder = tempfile.TemporaryDirectory(prefix="halfbyte-shards-", ignore_cleanup_errors=True)
        self._cut: tuple[int, list[RowSource]] = -1, []
        self._formats = dict[tuple[str, str, DataEntry | None], Known | None]()
        self._windows = dict[int, tuple[EncodedRows, NDArray[np.uint32]]]()
        self.index = list[tuple[int, int, int, int]]()
        """Of each window so far: pass, unit (the local files, or a shard), number in it, rows up to its end."""
        self.left_out = Problems()
        self._path: Path | None = None
        files_of = (s for unit in self._units for s in unit)
        named = [(s.label, s.path.stat().st_size if s.kind != "hub" else dict(s.hub)["blob"]) for s in files_of]
        self.content = hashlib.sha256(repr((named, seed, BLOCK_BYTES, WINDOW_BLOCKS)).encode()).digest()

    def at_commit(self, name: str | Path) -> str | Path:
        """A name of rows as it is, of a data set on the hub with the commit that is read."""
        if not str(name).startswith(HUB):
            return name
        (source,) = find(name)
        given = {k: v for k, v in self._shards[source.hub][0].hub if k not in ("path", "blob")}
        return f"{HUB}{source.path}?{urlencode(given, safe='/')}"

    def first(self) -> EncodedRows:
        """The texts of the first window; a DataError names all that cannot be used of them."""
        rows = self._encode(0, 0, 0)
        if self.left_out:
            raise DataError(self.left_out.listing(f"{self.left_out.count:,} rows cannot be used"))
        rows.tally.check(self._data)
        self._add((0, 0, 0), rows)
        return rows

    def keep(self, path: Path | None, known: Document) -> None:
        """Go by what is `known` of these very rows from an earlier process, and keep it from now on, if anywhere."""
        if known.get("content") == self.content.hex():
            self.index = [tuple(place) for place in known["windows"]]
            self.left_out = Problems(**known.get("left_out", {}))
        self._path = path
        self._write()

    def rows(self, first: int, stop: int) -> list[Example]:
        """The rows at some positions of the run."""
        some = list[Example]()
        for position in range(first, stop):
            while not self.index or self.index[-1][3] <= position:
                self._open_next()
            number = bisect_right(self.index, position, key=lambda place: place[3])
            rows, order = self._window(number)
            some.append(rows.examples[int(order[position - (self.index[number - 1][3] if number else 0)])])
        return some

    def passes(self, position: int) -> float:
        """How often all blocks have been passed over before a position, about: of the windows so far."""
        number = min(bisect_right(self.index, position, key=lambda place: place[3]), len(self.index) - 1)
        epoch, unit, inside, end = self.index[number]
        begin, blocks = self.index[number - 1][3] if number else 0, max(1, len(self._cut[1]))
        first, last = (min(blocks, n * WINDOW_BLOCKS) for n in (inside, inside + 1))
        read = first + (last - first) * (position - begin) / max(1, end - begin)
        return epoch + (unit + read / blocks) / len(self._units)

    def _open_next(self) -> None:
        """Tokenise the window after the last one."""
        place = 0, 0, 0
        if self.index:
            epoch, unit, number, rows = self.index[-1]
            self._blocks(epoch, unit, number)
            place = epoch, unit, number + 1
            if place[2] * WINDOW_BLOCKS >= len(self._cut[1]):
                place = (epoch, unit + 1, 0) if unit + 1 < len(self._units) else (epoch + 1, 0, 0)
            if place[0] and not rows:
                raise DataError("data.streaming: no file has a row that can be trained on.")
        self._add(place, self._encode(*place))

    def _add(self, place: tuple[int, int, int], rows: EncodedRows) -> None:
        before = self.index[-1][3] if self.index else 0
        self.index.append((*place, before + self._put(len(self.index), rows)))
        self._write()

    def _window(self, number: int) -> tuple[EncodedRows, NDArray[np.uint32]]:
        if number not in self._windows:
            told = replace(self.left_out, shown=[*self.left_out.shown])  # of these rows already
            count = self._put(number, self._encode(*self.index[number][:3]))
            self.left_out = told
            was = self.index[number][3] - (self.index[number - 1][3] if number else 0)
            if count != was:
                names = ", ".join(dict.fromkeys(block.label for block in self._blocks(*self.index[number][:3])))
                what = f"data.train has changed since these rows were trained on: of {names} {was:,} could be used, now"
                raise DataError(
                    f"{what} {count:,}.", fix="put back what the run had, then resume it; or start a new run"
                )
        return self._windows[number]

    def _put(self, number: int, rows: EncodedRows) -> int:
        """Keep a window, in an order which of the first is that of `pack.Steps`; how many rows it has."""
        if self._data.packing == "stream" and len(rows.examples):
            rows = text_blocks.stream(rows, self._data.max_length)
        window = rows, shuffled(len(rows.examples), f"{self._seed}/{number}")
        self._windows = {n: w for n, w in self._windows.items() if n == number - 1} | {number: window}
        return len(rows.examples)

    def _blocks(self, epoch: int, unit: int, number: int) -> list[RowSource]:
        """The blocks of a window; its shard is downloaded where it is not here."""
        chosen = int(shuffled(len(self._units), f"{self._seed}/units/{epoch}")[unit])
        if self._cut[0] != chosen:
            sources = [_download(s, Path(self._folder.name)) if s.kind == "hub" else s for s in self._units[chosen]]
            self._cut = chosen, [block for source in sources for block in cut(source)]
        order = shuffled(len(self._cut[1]), f"{self._seed}/blocks/{epoch}/{unit}")
        return [self._cut[1][i] for i in order[number * WINDOW_BLOCKS : (number + 1) * WINDOW_BLOCKS]]

    def _encode(self, epoch: int, unit: int, number: int) -> EncodedRows:
        batches, tally = list[pa.RecordBatch](), Tally()
        for block in self._blocks(epoch, unit, number):
            name = str(block.path), block.label, block.entry  # two shards may come under one path
            if name not in self._formats:  # told from the first rows of its file
                self._formats[name] = next(Reader([], self._data).of(replace(block, part=None))).known
            for group in groups(records.records(block)):
                part = self._encoder.encode_chunk(Chunk(block, group, self._formats[name]), only_read=False)
                if part.error is not None:
                    raise DataError(f"{block.where(group[0][0])}: {part.error.message}", fix=part.error.fix)
                tally.merge(part.tally)
                self.left_out.update(part.problems)
                self.left_out.update(part.tally.refused)
                batches += [part.batch] if part.batch is not None else []
        return EncodedRows(Examples(batches), replace(tally, refused=Problems()))

    def _write(self) -> None:
        if self._path is not None:
            files.write(
                self._path,
                files.as_json({"content": self.content.hex(), "windows": self.index, "left_out": vars(self.left_out)}),
            )


def some_rows(names: Sources, tokenizer: Tokenizer, data: Data) -> EncodedRows:
    """Training rows to look at: all, or the first window of those that are streamed."""
    cores = device.cores()
    return Flow(names, tokenizer, data, 0).first() if data.streaming else encode(names, tokenizer, data, cores=cores)


def cut(source: RowSource) -> list[RowSource]:
    """The blocks of a file. Raises DataError: it is large, and can only be read from its beginning."""
    size = source.path.stat().st_size
    if source.kind == "jsonl" and not source.gz:
        return [replace(source, part=(at, at + BLOCK_BYTES)) for at in range(0, size, BLOCK_BYTES)]
    if source.kind == "parquet":
        sums = [*itertools.accumulate(records.row_groups(source), initial=0)]
        of_block = [nbytes // BLOCK_BYTES for nbytes in sums[:-1]]
        edges = [i for i, block in enumerate(of_block) if not i or block != of_block[i - 1]] + [len(of_block)]
        return [replace(source, part=part) for part in itertools.pairwise(edges)]
    if size > WHOLE_BYTES:
        what = f"{source.kind}{' in .gz' * source.gz} of {size / 1e9:.1f} GB only from its beginning"
        fix = "JSON lines or Parquet, or files of at most 64 MB"
        raise DataError(f"{source.path}: data.streaming reads files from anywhere, and {what}.", fix=fix)
    return [source]


def _shards(source: RowSource) -> list[RowSource]:
    """The files of a data set on the hub that hold its split, at the commit that the revision stands for now. Raises
    DataError: it is not there, has no such split, or several configs and none is named."""
    from huggingface_hub import HfApi

    given = dict(source.hub)
    name, split = given["path"], given["split"]
    revision = given.get("revision", "")
    try:
        info = HfApi().dataset_info(name, revision=revision or None, files_metadata=True)
    except Exception as error:  # of any kind: the hub's, httpx's
        raise DataError(f"{name} cannot be looked up: {first_line(error)}.", fix="check its name") from None
    blobs = {str(file.rfilename): str(file.blob_id) for file in info.siblings or []}
    every = sorted(n for n in blobs if n.endswith((".parquet", ".jsonl")))
    if revision == CONVERTED:
        configs = {n.split("/")[0]: Document() for n in every if "/" in n}
    else:
        card = (info.card_data and info.card_data.get("configs")) or ()
        configs = {str(one.get("config_name")): one for one in card if isinstance(one, dict)}
    config = given.get("name") or ("default" if "default" in configs else "".join([*configs][: len(configs) == 1]))
    if configs and config not in configs:
        what = f"has no config {config}, but" if config else "has several configs:"
        fix = f"{HUB}{name}?name={next(iter(configs))}&split={split}"
        raise DataError(f"the data set {name} {what} {', '.join(configs)}.", fix=fix)
    if not (shards := _of_split(every, split, config, configs.get(config, {}).get("data_files"))):
        fix = f"{HUB}{name}?split={split}&revision={CONVERTED}: the hub's own Parquet files"
        raise DataError(f"the data set {name} has no Parquet or JSON lines of the split {split}.", fix=fix)
    at = {**given, "revision": str(info.sha)}
    return [replace(source, label=f"{name}/{n}", path=Path(n), hub=(*at.items(), ("blob", blobs[n]))) for n in shards]


def _of_split(every: list[str], split: str, config: str, files: object) -> list[str]:
    """The files of a split: those of a config's `data_files`, as a card has them; else by their names."""
    of_splits = [one for one in (files if isinstance(files, list) else [files]) if isinstance(one, dict)]
    if paths := [one.get("path") for one in of_splits if one.get("split") == split]:
        patterns = [p for path in paths for p in (path if isinstance(path, list) else [path])]
        deep = [(str(p), None if "**" in str(p) else str(p).count("/")) for p in patterns]
        return [n for n in every if any(fnmatchcase(n, p) and depth in (None, n.count("/")) for p, depth in deep)]
    inside = [n for n in every if config in n.split("/")[:-1]] or (every if config in ("", "default") else [])
    words = f"(?:.*/)?(?:[^/]*{_BETWEEN})?(?:{_SPLITS.get(split, re.escape(split))})"
    ways = (
        rf"data/{re.escape(split)}-\d{{5}}-of-\d{{5}}.*",
        rf"{words}(?:{_BETWEEN}[^/]*)?/.*",
        rf"{words}{_BETWEEN}[^/]*",
    )
    return next((some for way in ways if (some := [n for n in inside if re.fullmatch(way, n)])), [])


def _download(shard: RowSource, folder: Path) -> RowSource:
    """A shard as a file in the folder, in the place of the one before."""
    from huggingface_hub import hf_hub_download

    given = dict(shard.hub)
    for old in folder.rglob("*"):
        old.unlink() if old.is_file() else None
    name, revision = str(shard.path), given["revision"]
    try:
        path = Path(hf_hub_download(given["path"], name, repo_type="dataset", revision=revision, local_dir=folder))
    except Exception as error:  # as above
        what = f"{shard.label} could not be downloaded: {first_line(error)}."
        raise DataError(what, fix="once it can, halfbyte train RUN --resume") from None
    return replace(source_of(path), label=shard.label, entry=shard.entry, hub=shard.hub)

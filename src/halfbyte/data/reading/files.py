"""Find the rows that a recipe names: files, globs, lists of them, hub datasets. The ending tells the kind of a file.

Why: one name may stand for many files, and where it stands for none the error must say what is there instead.
Source: `glob` of the standard library, sorted; a hub dataset is `hub:org/name?split=train&name=...&revision=...`, the
arguments of `datasets.load_dataset`.
Cost: a look into the folders; no file is read here.
"""

import glob
from collections import Counter
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qsl

from halfbyte.errors import DataError, typed
from halfbyte.recipe.data import DataEntry, Sources
from halfbyte.system import files

Kind = Literal["jsonl", "json", "csv", "parquet", "txt", "hub"]
HUB = "hub:"
HUB_ARGUMENTS = ("name", "split", "revision")
MAX_COUNTED = 10_000  # files of a folder that are looked at
ENDINGS: dict[str, Kind] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
    ".txt": "txt", ".md": "txt", ".markdown": "txt",
}  # fmt: skip


@dataclass(frozen=True)
class RowSource:
    """One file of rows, or one hub dataset. Its rows are named after `label`, the file's name."""

    kind: Kind
    path: Path
    label: str
    gz: bool = False
    hub: tuple[tuple[str, str], ...] = ()  # arguments of `datasets.load_dataset`, `path` among them
    entry: DataEntry | None = None  # that says how it is read; None: as the recipe's `data` says
    part: tuple[int, int] | None = None
    """Only what begins at bytes [start, stop) of JSON lines, or row groups of Parquet; None: all."""

    def where(self, number: int) -> str:
        """The name of a row: `train.jsonl:12` is a line; `rows.parquet row 12` counts rows; a text is its file."""
        if self.kind == "txt":
            return self.label
        if self.kind == "jsonl" and self.part is not None:
            return f"{self.label} at byte {number:,}"
        return f"{self.label}:{number}" if self.kind in ("jsonl", "csv") else f"{self.label} row {number}"


class IsFolder(DataError):
    """A folder in the place of files, with the names that read what is in it. `pattern`: one name for all of it."""

    def __init__(self, path: Path) -> None:
        inside = [p for p in islice(path.rglob("*"), MAX_COUNTED) if p.is_file()]
        endings = Counter(_ending(p) or "without an ending" for p in inside)
        listed = ", ".join(f"{count:,} {ending}" for ending, count in endings.most_common(4))
        told = f"it holds {listed}{' and others' if len(endings) > 4 else ''}" if inside else "it is empty"
        rows = [p for p in inside if _kind(p)[0] not in (None, "json")] or [p for p in inside if _kind(p)[0]]
        globs = {f"{'**/' if p.parent != path else ''}*{_ending(p)}" for p in rows}
        globs -= {g.removeprefix("**/") for g in globs if g.startswith("**/")}  # ** stands for no folder, too
        names = [str(rows[0])] if len(rows) == 1 else sorted(str(path / g) for g in globs)
        deep = any("**" in name for name in names)
        self.pattern = names[0] if len(names) == 1 else str(path / ("**/*" if deep else "*"))
        fix = f"name its files: {names[0] if len(names) == 1 else '[' + ', '.join(names) + ']'}" if rows else None
        super().__init__(f"{path} is a folder; {told}.", fix=fix)


def find(names: Sources) -> list[RowSource]:
    """Every source that the names stand for, globs in sorted order, each file once: as an entry of its own says, if
    there is one.

    Raises:
        DataError: a name that stands for nothing, a folder, or a hub dataset that is not named as it must be.
    """
    sources: dict[tuple[str, str], RowSource] = {}
    for given in [str(names)] if isinstance(names, str | Path) else names:
        entry, name = (given, given.path) if isinstance(given, DataEntry) else (None, given)
        for source in _hub(name) if name.startswith(HUB) else _files(name):
            key = str(source.path), str(source.hub)
            if entry is not None or key not in sources:
                sources[key] = replace(source, entry=entry)
    return list(sources.values())


def _files(name: str) -> list[RowSource]:
    path = Path(name).expanduser()
    matched = [path]
    if path.is_dir():
        _check_saved(path)
        raise IsFolder(path)
    if name == "-" or (path.exists() and not path.is_file()):
        what = f"{name} is a pipe or a device, and rows are read more than once."
        raise DataError(what, fix="write them to a file first: COMMAND > rows.jsonl")
    if path.is_symlink() and not path.exists():
        raise DataError(
            f"{path} is a link to {path.readlink()}, which is not there.", fix="check the link, or the disk"
        )
    if not path.exists() and glob.has_magic(name):
        matched = [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if Path(p).is_file()]
        if not matched:
            fix = "check the pattern; it is read relative to where halfbyte runs"
            raise DataError(f"{name} matches no file.", fix=fix)
    elif not path.exists():
        near = files.near_name(path, [p.name for p in path.parent.glob("*") if _kind(p)[0] is not None])
        check = "check the path" if path.is_absolute() else "check the path; it is read relative to where halfbyte runs"
        raise DataError(f"{name}: no such file.", fix=f"did you mean {path.parent / near}?" if near else check)
    return [source_of(p) for p in matched]


def _check_saved(folder: Path) -> None:
    """Raise a DataError for a folder that `datasets` has saved, also one of several splits."""
    for state in (folder / "state.json", *sorted(folder.glob("*/state.json"))):
        if state.with_name("dataset_info.json").is_file():
            how = "from datasets import Dataset; Dataset.load_from_disk(sys.argv[1]).to_parquet(sys.argv[2])"
            raise DataError(
                f"{folder} is a folder of datasets' save_to_disk, and its Arrow files are not read.",
                fix=f"python -c 'import sys; {how}' {typed(state.parent)} {typed(f'{folder.name}.parquet')}",
            )


def source_of(path: Path) -> RowSource:
    kind, gz = _kind(path)
    if kind == "parquet" and gz:
        raise DataError(
            f"{path}: a Parquet file is compressed inside, and is not read from a .gz.", fix=f"gunzip {path}"
        )
    return RowSource(kind or "jsonl", path, path.name, gz)


def _ending(path: Path) -> str:
    return "".join(path.suffixes[-2:] if path.suffix == ".gz" else path.suffixes[-1:])


def _kind(path: Path) -> tuple[Kind | None, bool]:
    """What a file's ending says, None for one that is not known; and whether it is gzipped."""
    gz = path.suffix.lower() == ".gz"
    return ENDINGS.get((path.with_suffix("") if gz else path).suffix.lower()), gz


def _hub(name: str) -> list[RowSource]:
    path, _, query = name.removeprefix(HUB).partition("?")
    arguments = dict(parse_qsl(query, keep_blank_values=True))
    strange = sorted(set(arguments) - set(HUB_ARGUMENTS))
    example = "hub:openai/gsm8k?name=main&split=train"
    if not path or strange:
        what = f"{strange[0]!r} is not an argument" if strange else "no dataset is named"
        raise DataError(f"{name}: {what}; allowed after the ?: {', '.join(HUB_ARGUMENTS)}.", fix=f"as in {example}")
    if "split" not in arguments:
        raise DataError(f"{name}: which split?", fix=f"as in {example}")
    label, hub = f"{path}/{arguments['split']}", (("path", path), *sorted(arguments.items()))
    return [RowSource("hub", Path(path), label, hub=hub)]

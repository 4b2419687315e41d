"""What the first bytes of a file say: another encoding than UTF-8, or a kind that is not read.

Why: a file of another kind, read as lines, is a hundred bad rows; its kind and the command that helps are one line.
Source: the formats' magic numbers, RFC 4627 for UTF-16.
"""

import re

from halfbyte.data.reading.files import RowSource
from halfbyte.errors import DataError, typed

# The first two characters of a text are ASCII (RFC 4627, 3): which bytes are 0 says that it is UTF-16.
_UTF16 = {"UTF-16": re.compile(rb"\xff\xfe|\xfe\xff"), "UTF-16LE": re.compile(rb"([^\0]\0){2}"),
          "UTF-16BE": re.compile(rb"(\0[^\0]){2}")}  # fmt: skip
_PARQUET = "python -c 'import sys; from {}(sys.argv[1]).to_parquet(sys.argv[2])' {{path}} {{stem}}.parquet"
# The first bytes of files that are not read: what they are, and what makes rows of them.
_OTHERS = {
    b"ARROW1": ("Arrow", _PARQUET.format("pandas import read_feather; read_feather")),
    b"\xff\xff\xff\xff": ("Arrow", _PARQUET.format("datasets import Dataset; Dataset.from_file")),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "zstd -d {path} -o {stem}"),
    b"BZh": ("compressed by bzip2", "bunzip2 -k {path}"), b"\xfd7zXZ\0": ("compressed by xz", "unxz -k {path}"),
    b"PK\3\4": ("a zip archive, as Excel's sheets are", "unzip {path}, or save the sheet as .csv"),
}  # fmt: skip


def check_start(start: bytes, source: RowSource) -> bytes:
    """The first bytes without a byte order mark."""
    if code := next((code for code, mark in _UTF16.items() if mark.match(start)), None):
        raise encoded(source, "is UTF-16", code)
    if start.startswith(b"\x1f\x8b") and not source.gz:
        raise DataError(f"{source.path} is gzip.", fix=f"name it {source.path.name}.gz")
    for mark, (what, how) in _OTHERS.items():
        if start.startswith(mark):
            fix = how.format(path=typed(source.path), stem=typed(source.path.with_suffix("")))
            raise DataError(f"{source.path} is {what}; read are JSONL, JSON, CSV, Parquet and text.", fix=fix)
    if start.startswith(b"PAR1") and source.kind != "parquet":
        raise DataError(f"{source.path} is Parquet.", fix=f"name it {source.path.stem}.parquet")
    return start.removeprefix(b"\xef\xbb\xbf")


def encoded(source: RowSource, what: str, code: str) -> DataError:
    """That a file is not UTF-8, with the command that makes it so. `code`: its encoding, as iconv names it."""
    path = source.path.with_suffix("") if source.gz else source.path
    command = f"gunzip -c {source.path} | iconv -f {code} -t UTF-8" if source.gz else f"iconv -f {code} -t UTF-8 {path}"
    return DataError(
        f"{source.path} {what}; UTF-8 is needed.", fix=f"{command} > {path.with_suffix(f'.utf8{path.suffix}')}"
    )

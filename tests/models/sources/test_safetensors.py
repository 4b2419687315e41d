"""Headers of safetensors files: a whole one as it is, each damaged one named with what is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from halfbyte.errors import SourceError
from halfbyte.models.sources.safetensors import read_header, weight_files
from halfbyte.models.tensors import read_checkpoint


def header(entries: dict[str, Any], data: int = 0) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


def raw(root: Path, content: bytes) -> Path:
    (root / "config.json").write_text("{}")
    (root / "model.safetensors").write_bytes(content)
    return root


GOOD = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x01\x02", "is not a safetensors file (2 bytes)"),
        (b"", "is not a safetensors file (0 bytes)"),
        ((500).to_bytes(8, "little") + b"{}", "is cut short inside its header: 10 bytes of at least 508"),
        (b"PK\x03\x04 a zip file, as torch.save writes", "is not a safetensors file"),
        ((5).to_bytes(8, "little") + b"{oops", "is not a safetensors file: its header cannot be read"),
        ((7).to_bytes(8, "little") + b"[1,2,3]", "is not a safetensors file: its header cannot be read"),
        (
            header({"a": {"shape": [1], "data_offsets": [0, 4]}}, 4),
            "is not a safetensors file: its header cannot be read: 'dtype'",
        ),
        (header({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, 4), "a has the unknown dtype 'F99'"),
        (header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, 4), "a has the shape [-1]"),
        (
            header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, 4),
            "a has 4 bytes, which do not hold F32 [2]",
        ),
        (header(GOOD, 23), "is cut short: "),
        (header(GOOD, 25), "has 1 bytes more than its header says"),
    ],
)
def test_damaged_files_are_named_with_what_is_wrong(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(SourceError, match=re.escape(message)) as caught:
        read_checkpoint(raw(tmp_path, content))
    assert str(tmp_path / "model.safetensors") in str(caught.value)


def test_a_whole_file_passes(tmp_path: Path) -> None:
    assert (
        read_header(raw(tmp_path, header({"__metadata__": {"format": "pt"}, **GOOD}, 24)) / "model.safetensors") == GOOD
    )


def test_the_files_of_a_folder(tmp_path: Path) -> None:
    """Its index decides, then the one file, then all there are; an index that points elsewhere is refused."""
    for name in ("b.safetensors", "a.safetensors"):
        (tmp_path / name).write_bytes(b"")
    assert [file.name for file in weight_files(tmp_path)] == ["a.safetensors", "b.safetensors"]
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert [file.name for file in weight_files(tmp_path)] == ["model.safetensors"]
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "b.safetensors", "y": "b.safetensors"}}))
    assert [file.name for file in weight_files(tmp_path)] == ["b.safetensors"]
    index.write_text(json.dumps({"weight_map": {"x": "../b.safetensors"}}))
    with pytest.raises(SourceError, match=r"names a path, not a file: \.\./b\.safetensors"):
        weight_files(tmp_path)

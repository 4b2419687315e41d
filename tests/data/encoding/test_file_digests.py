"""A large file is hashed once; whatever changes it makes it hashed again."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from halfbyte.data.encoding import encode
from halfbyte.errors import DataError
from halfbyte.system import files


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(encode, "LARGE_BYTES", 4)
    monkeypatch.setattr(encode, "SETTLED_S", 0.0)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"some rows")
    return path


def once(path: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether its digest is known without reading it."""
    with monkeypatch.context() as patch:
        read: list[Path] = []
        real = files.sha256
        patch.setattr(files, "sha256", lambda p: (read.append(p), real(p))[1])
        assert encode.digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()
        return not read


def test_it_is_hashed_once(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [once(large, monkeypatch) for _ in range(3)] == [False, True, True]


def test_a_change_that_keeps_size_and_time_is_seen(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    once(large, monkeypatch)
    before = large.stat()
    time.sleep(0.02)
    large.write_bytes(b"same rows")
    os.utime(large, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not once(large, monkeypatch) and once(large, monkeypatch)


@pytest.mark.parametrize("harm", ["not json", "[]", '{"x": 1}'])
def test_notes_that_are_damaged_are_not_read(harm: str, large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    once(large, monkeypatch)
    encode._digests().write_text(harm)
    assert not once(large, monkeypatch) and once(large, monkeypatch)


def test_a_file_that_has_just_changed_and_a_small_one_are_not_noted(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "SETTLED_S", 60.0)
    assert [once(large, monkeypatch) for _ in range(2)] == [False, False]
    monkeypatch.setattr(encode, "SETTLED_S", 0.0)
    monkeypatch.setattr(encode, "LARGE_BYTES", 100)
    assert [once(large, monkeypatch) for _ in range(2)] == [False, False]


def test_one_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.jsonl cannot be read: No such file or directory"):
        encode.digest(tmp_path / "nothing.jsonl")

"""A file written piece by piece in any order is read by safetensors' own reader; nothing is left of one that failed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from halfbyte.base.store.writer import PAGE, SafetensorsWriter, Slot

TENSORS = {
    "odd": np.arange(7, dtype=np.uint8),
    "codes": np.arange(640, dtype=np.uint8).reshape(10, 64) % 251,
    "scales": np.linspace(-1, 1, 33, dtype=np.float32).reshape(3, 11),
    "empty": np.zeros((0, 4), np.float32),
}
DTYPES = {"uint8": "U8", "float32": "F32"}


def slots() -> list[Slot]:
    known = [Slot(n, DTYPES[str(x.dtype)], x.shape, x.nbytes) for n, x in TENSORS.items()]
    return [*known, Slot("state", "U8", (), None)]


def test_what_was_put_is_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    state = json.dumps({"blocksize": 64}).encode()
    with SafetensorsWriter(path, slots()) as writer:
        for name in reversed(TENSORS):
            data = TENSORS[name].tobytes()
            for start in reversed(range(0, len(data), 50)):
                writer.put(name, data[start : start + 50], start)
        assert not path.exists() and writer.max_bytes >= PAGE
        entry = writer.finish({"state": state})
    read = load_file(path)
    assert read.keys() == {*TENSORS, "state"} and read.pop("state").tobytes() == state
    for name, wanted in TENSORS.items():
        assert read[name].dtype == wanted.dtype and np.array_equal(read[name], wanted), name
    assert entry.nbytes == path.stat().st_size <= writer.max_bytes
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_data_begins_on_a_page_and_packed_weights_on_multiples_of_64(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path / "model.safetensors", slots())
    assert writer.data_start % PAGE == 0 and writer.starts["codes"] % 64 == 0
    assert writer.starts["codes"] < writer.starts["odd"], "what keeps the alignment comes first"


def test_one_that_failed_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with SafetensorsWriter(tmp_path / "model.safetensors", slots()) as writer:
            writer.put("odd", b"0123456")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []

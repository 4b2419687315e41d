"""Headers that are cut, hostile or of another kind: one clear error with file and field, and nothing allocated."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from halfbyte.errors import SourceError
from halfbyte.models.gguf.header import read_header
from tests.models.gguf import files

HUGE = 1 << 62


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("gguf") / "m.gguf"
    return made(file).read_bytes()


def made(file: Path, tokenizer: bool = True, **metadata: Any) -> Path:
    writer = gguf.GGUFWriter(file, "llama")
    for key, value in metadata.items():
        files.add(writer, key.replace("__", "."), value)
    if tokenizer:
        files.add_tokenizer(writer)
    writer.add_array("llama.some_sizes", [1, 2, 3])
    writer.add_tensor("token_embd.weight", np.ones((32, 64), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(64, np.float32))
    files.close(writer)
    return file


def error_of(file: Path) -> str:
    with pytest.raises(SourceError) as caught:
        read_header(file)
    return str(caught.value)


def test_a_header_says_where_everything_is(tmp_path: Path) -> None:
    file = made(tmp_path / "m.gguf")
    header, reader = read_header(file), gguf.GGUFReader(file)
    for ours, theirs in zip(header.tensors, reader.tensors, strict=True):
        assert (ours.name, ours.shape, ours.type) == (
            theirs.name, tuple(reversed(theirs.shape.tolist())), theirs.tensor_type.name
        )  # fmt: skip
        assert (ours.start, ours.nbytes) == (theirs.data_offset, theirs.n_bytes)
    assert header.metadata["llama.some_sizes"] == [1, 2, 3]
    assert header.metadata["tokenizer.ggml.tokens"] == len(files.TOKENS)


def test_a_file_that_is_cut_anywhere_is_told_in_one_error(whole: bytes, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    for length in [*range(4, 400), *range(400, len(whole), 97)]:
        cut.write_bytes(whole[:length])
        assert f"{cut} is cut short" in error_of(cut)
    cut.write_bytes(b"")
    assert "is not a GGUF file" in error_of(cut)


def patched(whole: bytes, after: str, at: int, code: str, value: int) -> bytes:
    """With a number written over what stands `at` bytes behind a name."""
    at += whole.index(after.encode()) + len(after)
    return whole[:at] + struct.pack(code, value) + whole[at + struct.calcsize(code) :]


# A tensor's name is followed by its rank (4 bytes), its sizes (8 each), its type (4) and its offset (8).
TENSOR = "token_embd.weight"


@pytest.mark.parametrize(
    ("after", "at", "code", "value", "said"),
    [
        ("GGUF", 0, ">I", 3, "(a big-endian file); allowed: little-endian 2 or 3"),
        ("GGUF", 4, "<Q", HUGE, "tensor_count says 4,611,686,018,427,387,904 entries, which do not fit"),
        ("GGUF", 12, "<Q", HUGE, "metadata_kv_count says 4,611,686,018,427,387,904 entries"),
        ("GGUF", 20, "<Q", HUGE, "end inside its own header (at the key of metadata value 1 of"),
        ("llama.some_sizes", 8, "<Q", HUGE, "llama.some_sizes says 4,611,686,018,427,387,904 entries"),
        ("tokenizer.ggml.tokens", 8, "<Q", HUGE, "tokenizer.ggml.tokens says 4,611,686,018,427,387,904 entries"),
        ("llama.some_sizes", 4, "<I", 9, "its llama.some_sizes is an array of unknown type 9"),
        ("llama.some_sizes", 0, "<I", 99, "its llama.some_sizes is a value of unknown type 99"),
        (TENSOR, 0, "<I", 99, "the tensor token_embd.weight has 99 dimensions; allowed: 1 to 4"),
        (TENSOR, 4, "<Q", HUGE, "is cut short"),
        (TENSOR, 4, "<Q", 0, "the tensor token_embd.weight has the shape [32, 0], whose rows are not whole blocks"),
        (TENSOR, 20, "<I", 9999, "has type 9999, which the installed gguf package does not know"),
        (TENSOR, 20, "<I", 15, "the tensor token_embd.weight has type Q8_K, which cannot be read; allowed: BF16, F16"),
        (TENSOR, 20, "<I", 26, "has type I32, which cannot be read; allowed: BF16, F16"),
        (TENSOR, 20, "<I", 12, "has the shape [32, 64], whose rows are not whole blocks of 256 (Q4_K)"),
        (TENSOR, 24, "<Q", HUGE, "is cut short"),
    ],
)
def test_a_hostile_header_is_told_by_its_field_and_costs_nothing(
    whole: bytes, tmp_path: Path, after: str, at: int, code: str, value: int, said: str
) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(patched(whole, after, at, code, value))
    tracemalloc.start()
    message = error_of(file)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(file) in message and said in message
    assert peak_bytes < 10_000_000


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"general__alignment": 0}, "its general.alignment is 0; allowed: a multiple of 8"),
        ({"general__alignment": 12}, "its general.alignment is 12; allowed: a multiple of 8"),
        ({"general__alignment": "big"}, "its general.alignment is 'big'; allowed"),
        ({"split__count": "three"}, "its split.count is 'three', not a number"),
        ({"split__count": 3}, "is one part of 3, and it is not called NAME-00001-of-00003.gguf as a part is"),
        ({"tokenizer": False}, "holds no tokenizer"),
    ],
)
def test_what_the_metadata_may_not_say(tmp_path: Path, metadata: dict[str, Any], said: str) -> None:
    assert said in error_of(made(tmp_path / "m.gguf", **metadata))


def test_a_part_that_is_missing_or_another_is_named(tmp_path: Path) -> None:
    parts = files.split(made(tmp_path / "m.gguf"), tmp_path, 2)
    assert [tensor.file for tensor in read_header(parts[1]).tensors] == parts
    first = parts[0].read_bytes()
    parts[0].write_bytes(parts[1].read_bytes())
    assert f"{parts[0]} is called part 1, and its split.no is not 0" in error_of(parts[1])
    parts[0].write_bytes(first)
    parts[1].unlink()
    assert f"{parts[0]} is one part of 2, and 1 are not beside it: {parts[1].name}" in error_of(parts[0])

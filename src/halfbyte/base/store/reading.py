"""The tensors of a source, read in pieces past the page cache (safetensors by position, pickles through a mapping), and
what a store makes of them; and the first pages of a store, read before it is mapped.

A source is read once, front to back; kept in the page cache it would push out what the machine needs. Safetensors bytes
are never mapped, so they count in no process's resident memory.
"""

import math
import mmap
import os
import zipfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Literal, Self

import torch

from halfbyte.errors import BaseModelError, StoreError, first_line
from halfbyte.models.sources import safetensors
from halfbyte.models.sources.checkpoint import Checkpoint
from halfbyte.quant.number_format import torch_dtypes
from halfbyte.system.platforms import calls
from halfbyte.types import ConfigFile

# What can be quantised, as safetensors calls it.
FLOATS = ("F64", "F32", "F16", "BF16")
# First pages in flight; they wait for the disk, not for a core.
THREADS = 16


@dataclass(frozen=True)
class SourceTensor:
    """One tensor of a source, under the source's name and safetensors' name of its dtype. `start` is its first byte in
    the file; for a pickle the address of its storage, which tells shared tensors."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    start: int


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of a store, from one tensor of the source or from all experts' tensors, one after the other."""

    name: str
    sources: tuple[SourceTensor, ...]
    shape: tuple[int, ...]  # as it is held: (out, in), or (experts, out, in) as the model has them
    encoding: Literal["quantised", "copy"]
    dtype: torch.dtype  # what its values are cast to, before they are quantised too
    transposed: bool = False  # each matrix of the source is
    mxfp4: bool = False  # the sources are blocks and scales of that format (`mxfp4.py`)
    target: str = ""  # what the model calls it; empty for a stack of experts

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def source_bytes(self) -> int:
        return sum(source.nbytes for source in self.sources)


class Source:
    """Every tensor of a safetensors checkpoint. Threads may read at once."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = tuple(files)
        self.seen = {file: _stamp(file) for file in self.files}
        self.tensors: dict[str, SourceTensor] = {}
        self._fds: dict[Path, int] = {}
        self._index()

    def _index(self) -> None:
        for file in self.files:
            header = safetensors.read_header(file)
            with file.open("rb") as stream:
                data = 8 + int.from_bytes(stream.read(8), "little")
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                shape = tuple(entry["shape"])
                self.tensors[name] = SourceTensor(name, entry["dtype"], shape, end - begin, file, data + begin)

    def __enter__(self) -> Self:
        for file in self.files:
            self._fds[file] = os.open(file, os.O_RDONLY | calls.BINARY)
            # The kernel reads ahead by itself. Asked for each next piece (WILLNEED) it takes the thread's own time, and
            # letting go of a piece then waits for it.
            calls.advise(self._fds[file], "SEQUENTIAL")
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def read(self, tensor: SourceTensor, offset: int, into: memoryview) -> None:
        """Fill `into` with bytes of a tensor, from `offset` on; the page cache lets go of them. Raises StoreError: the
        file has become shorter."""
        fd, at = self._fds[tensor.file], tensor.start + offset
        count, done = len(into), 0
        while done < count:
            got = calls.read_at(fd, into[done:], at + done)
            if got == 0:
                raise StoreError(f"{tensor.file} is cut short: {tensor.name} ends {count - done} bytes too early.")
            done += got
        calls.advise(fd, "DONTNEED", at, count)

    def changed(self) -> list[Path]:
        """Files that are not what they were when this source was opened."""
        return [file for file, stamp in self.seen.items() if _stamp(file) != stamp]


class PickledSource(Source):
    """A checkpoint of `.bin` files, each mapped by torch and read with `weights_only=True`."""

    def _index(self) -> None:
        names = {dtype: name for name, dtype in torch_dtypes().items()}
        self._values: dict[str, torch.Tensor] = {}
        for file in self.files:
            try:
                mapped = zipfile.is_zipfile(file)  # torch's format since 1.6, the one that can be mapped
                content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
            except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
                raise StoreError(f"{file} cannot be read: {first_line(error)}.") from error
            for name, value in content.items():
                if isinstance(value, torch.Tensor) and value.dtype in names:
                    shape, nbytes = tuple(value.shape), value.numel() * value.element_size()
                    self._values[name] = value
                    self.tensors[name] = SourceTensor(name, names[value.dtype], shape, nbytes, file, value.data_ptr())

    def read(self, tensor: SourceTensor, offset: int, into: memoryview) -> None:
        read_tensor(self._values[tensor.name], offset, into)


def read_tensor(value: torch.Tensor, offset: int, into: memoryview) -> None:
    """Fill `into` with bytes of a tensor, on any device, from `offset` on."""
    flat = value.detach().reshape(-1)
    size = flat.element_size()
    part = flat[offset // size : (offset + len(into)) // size].cpu().contiguous()
    into[:] = memoryview(part.view(torch.uint8).numpy())


def unsafe_pickle(checkpoint: Checkpoint, error: UnpicklingError) -> BaseModelError:
    """The error that says what `torch.load` refused, out of the page that it says about it."""
    lines = [line.strip() for line in str(error).splitlines()]
    blocked = next((line for line in lines if "GLOBAL" in line or "Unsupported" in line), first_line(error))
    return BaseModelError(
        f"{checkpoint.id}: its pickled weights hold more than tensors, so they were not read: {blocked.rstrip('.')}.",
        fix="use a copy of the model with safetensors",
    )


def _stamp(file: Path) -> tuple[int, int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def read_first_pages(folder: Path) -> int:
    """Bring what opening a folder's safetensors files touches into the page cache, and no more: headers, and the first
    page of every tensor. Returns how many pages were read; 0 on a system without `posix_fadvise`.

    Why: a mapped checkpoint is opened by touching each tensor's first bytes. For a page that is not in its cache the
    kernel reads all that lies around it, as far as the disk's read-ahead goes (`read_ahead_kb`, 8 MB on some disks):
    three quarters of a 7B store. A page that is there already is taken alone, and what is read through a descriptor
    with POSIX_FADV_RANDOM (`posix_fadvise(2)`) is not read ahead of.

    Raises:
        SourceError: a file is cut short, or is not a safetensors file.
    """
    if not hasattr(os, "posix_fadvise"):
        return 0
    with ThreadPoolExecutor(THREADS, thread_name_prefix="first-pages") as pool:
        return sum(pool.map(_read_first_pages, sorted(folder.glob("*.safetensors"))))


def _read_first_pages(path: Path) -> int:
    fd = os.open(path, os.O_RDONLY | calls.BINARY)
    try:
        calls.advise(fd, "RANDOM")
        size = os.fstat(fd).st_size
        length = safetensors.header_length(os.pread(fd, 8, 0), size, str(path))
        numbers = first_pages(safetensors.parse_header(os.pread(fd, length, 8), size, str(path)), 8 + length)
        for page in numbers:
            os.pread(fd, mmap.PAGESIZE, page * mmap.PAGESIZE)
        return len(numbers)
    finally:
        os.close(fd)


def first_pages(header: Mapping[str, ConfigFile], data_start: int) -> list[int]:
    """The numbers of the file's pages that hold a tensor's first byte, and the last one of a tensor below a page."""
    touched = set()
    for entry in header.values():
        begin, end = (data_start + at for at in entry["data_offsets"])
        if end > begin:
            touched.add(begin // mmap.PAGESIZE)
            if end - begin <= mmap.PAGESIZE:
                touched.add((end - 1) // mmap.PAGESIZE)
    return sorted(touched)

"""Read what opening a checkpoint touches, and no more: its headers and the first page of every tensor.

Why: a mapped checkpoint is opened by touching each tensor's first bytes. For a page that is not in its cache the kernel
reads all that lies around it, as far as the disk's read-ahead goes (`read_ahead_kb`, 8 MB on some disks): three
quarters of a 7B store. A page that is there already is taken alone.
What is read through a descriptor with POSIX_FADV_RANDOM (`posix_fadvise(2)`) is not read ahead of.
"""

import mmap
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from halfbyte.models.sources import safetensors
from halfbyte.system.platforms import calls
from halfbyte.types import ConfigFile

# Reads in flight; they wait for the disk, not for a core.
THREADS = 16


def read(folder: Path) -> int:
    """Bring them into the page cache, for every safetensors file of a folder. Returns how many pages were read.

    Nothing happens on a system without `posix_fadvise`.

    Raises:
        SourceError: a file is cut short, or is not a safetensors file.
    """
    if not hasattr(os, "posix_fadvise"):
        return 0
    with ThreadPoolExecutor(THREADS, thread_name_prefix="first-pages") as pool:
        return sum(pool.map(_read_file, sorted(folder.glob("*.safetensors"))))


def _read_file(path: Path) -> int:
    fd = os.open(path, os.O_RDONLY | calls.BINARY)
    try:
        calls.advise(fd, "RANDOM")
        size = os.fstat(fd).st_size
        length = safetensors.header_length(os.pread(fd, 8, 0), size, str(path))
        header = safetensors.parse_header(os.pread(fd, length, 8), size, str(path))
        wanted = pages(header, 8 + length)
        for page in wanted:
            os.pread(fd, mmap.PAGESIZE, page * mmap.PAGESIZE)
        return len(wanted)
    finally:
        os.close(fd)


def pages(header: Mapping[str, ConfigFile], data_start: int) -> list[int]:
    """The numbers of the file's pages that hold a tensor's first byte, and the last one of a tensor below a page."""
    touched = set()
    for entry in header.values():
        begin, end = (data_start + at for at in entry["data_offsets"])
        if end > begin:
            touched.add(begin // mmap.PAGESIZE)
            if end - begin <= mmap.PAGESIZE:
                touched.add((end - 1) // mmap.PAGESIZE)
    return sorted(touched)

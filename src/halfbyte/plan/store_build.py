"""What building the store of a base takes, before it begins: RAM at its peak, and bytes on disk.

What: a few threads each read a tensor in chunks into one buffer, cast and quantise a chunk, and write it. So the peak
does not grow with the model. Only matrices that a checkpoint holds transposed, and experts in MXFP4, come whole.
Source: `store/build.py` (buffers), `store/writer.py` and `store/layout.py` (files); the process itself is measured.
Cost: one walk over the tensors; no torch.
"""

from dataclasses import dataclass
from functools import cached_property

from halfbyte.models.sources.safetensors import DTYPE_BITS
from halfbyte.models.tensors import TensorSpec
from halfbyte.plan.result import Line, library_lines
from halfbyte.quant import formats, policy
from halfbyte.quant.number_format import StoredPart
from halfbyte.recipe.schema import Quant

# A multiple of every block size; with casting to another dtype a thread holds about four times this in bytes.
CHUNK_ELEMENTS = 1 << 22
# Reading waits for the disk now and then: one thread more than cores keeps them busy.
EXTRA_THREADS = 1
# Of a process that will train; `halfbyte quantize` alone imports less (0.60 GB at its peak where 0.67 are planned).
LIBRARIES_PRIVATE_BYTES = 390_000_000
# Of a tokenizer's files for each entry of the vocabulary, where they are not at hand to be looked at.
BESIDE_BYTES_PER_ENTRY = 60
OWN_FILE_BYTES = 1 << 20  # a tensor around the layers gets a file of its own from here on
PAGE_BYTES = 4096  # the data of a file begins on one
_ENTRY_BYTES = 90  # of a header: dtype, shape, two offsets
_INDEX_BYTES = 42  # of the index: the name of the file, quotes, spaces
_FILE_BYTES = 260  # of the manifest: name, size, two hashes


@dataclass(frozen=True)
class StoreBuild:
    """A store to be built. `beside_bytes`: of files that are copied; None where they are not at hand: then guessed from
    the `vocab` entries of the tokenizer."""

    specs: tuple[TensorSpec, ...]
    quant: Quant
    itemsize: int  # bytes of a number in the compute dtype
    vocab: int
    beside_bytes: int | None = None

    def lines(self, cores: int) -> tuple[Line, ...]:
        """RAM while it is built on `cores` cores."""
        threads = min(cores + EXTRA_THREADS, len(self._files))
        buffers = sum(self._largest_bytes[:threads])
        words = f"{threads} threads, {CHUNK_ELEMENTS / 1e6:.1f} M numbers at once"
        return (
            *library_lines(LIBRARIES_PRIVATE_BYTES, "torch, transformers, bitsandbytes, numba"),
            Line("chunks", buffers, words, "store/build.py"),
        )

    @cached_property
    def _largest_bytes(self) -> list[int]:
        """What a thread takes for each tensor, the most first. Cached, as every candidate of a plan asks."""
        return sorted(map(self._thread_bytes, self.specs), reverse=True)

    @cached_property
    def disk_bytes(self) -> int:
        """Bytes of the store's folder: tensors, headers, index, manifest, and what is copied beside them."""
        total = BESIDE_BYTES_PER_ENTRY * self.vocab if self.beside_bytes is None else self.beside_bytes
        for specs in self._files.values():
            parts = [(len(p.name(spec.name)), p.likely_bytes) for spec in specs for p in self._parts(spec)]
            names, header = sum(name for name, _ in parts), sum(name + _ENTRY_BYTES for name, _ in parts)
            total += sum(policy.encoded_bytes(spec, self.quant, self.itemsize) for spec in specs)
            total += sum(size for _, size in parts) + -(-header // PAGE_BYTES) * PAGE_BYTES
            total += names + _INDEX_BYTES * len(parts) + _FILE_BYTES
        return total

    @cached_property
    def _files(self) -> dict[str, list[TensorSpec]]:
        """A file for each layer, one for each large tensor around them, one for the small rest."""
        files: dict[str, list[TensorSpec]] = {}
        for spec in self.specs:
            alone = spec.name if spec.nbytes >= OWN_FILE_BYTES else "rest"
            files.setdefault(alone if spec.layer is None else f"layer {spec.layer}", []).append(spec)
        return files

    def _parts(self, spec: TensorSpec) -> tuple[StoredPart, ...]:
        """The tensors of the store's file that one tensor of the checkpoint becomes."""
        if not self._is_quantised(spec):
            return (StoredPart("", spec.dtype, spec.shape, spec.nbytes),)
        return formats.of(self.quant).parts(spec.out_in, self.quant)

    def _is_quantised(self, spec: TensorSpec) -> bool:
        return policy.encoding(spec, self.quant) == "quantised"

    def _thread_bytes(self, spec: TensorSpec) -> int:
        """Bytes that a thread takes at most while it works on one tensor."""
        at_once = spec.numel if spec.transposed else min(spec.numel, CHUNK_ELEMENTS)
        if spec.dtype == "F4":  # a whole expert: its codes as numbers, its weights and the same transposed
            at_once = spec.numel // spec.shape[0]
            encoding = formats.of(self.quant).encoding_bytes(at_once, spec.out_in, self.quant)
            return at_once * (5 + 2 * self.itemsize) + encoding
        read = at_once * DTYPE_BITS[spec.dtype] // 8
        cast = 0 if DTYPE_BITS[spec.dtype] == 8 * self.itemsize else at_once * self.itemsize
        if not self._is_quantised(spec):
            return read + cast
        transposed = at_once * self.itemsize if spec.transposed else 0
        return read + cast + transposed + formats.of(self.quant).encoding_bytes(at_once, spec.out_in, self.quant)

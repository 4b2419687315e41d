"""A GGUF file as a base in its own blocks: which parameters can be held as they lie there, and a manifest of them.

What: beside config and tokenizer lies `halfbyte-gguf.json`: the files by their hashes, and of every parameter of the
checkpoint its shape and the types of the blocks that it is held in. No weight is written. A parameter whose values a
converter has changed, or that is composed along a block, is made of its values when the base is opened.
Cost: the manifest takes one reading of the file, for its hash; opening, the file's header.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

from halfbyte.errors import SourceError, typed
from halfbyte.models.gguf import layouts
from halfbyte.models.gguf.header import GgufHeader
from halfbyte.models.gguf.reader import GgufError, GgufReader
from halfbyte.system import files
from halfbyte.types import Document

MANIFEST = "halfbyte-gguf.json"
FORMAT_VERSION = 1
# ggml's own number of each type that is held as it is, and the weights and bytes of a block.
BLOCKS = {
    "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q5_0": (6, 32, 22), "Q5_1": (7, 32, 24), "Q8_0": (8, 32, 34),
    "Q4_K": (12, 256, 144), "Q5_K": (13, 256, 176), "Q6_K": (14, 256, 210), "IQ4_NL": (20, 32, 18),
    "MXFP4": (39, 32, 17),
}  # fmt: skip
PLAIN_TYPES = frozenset(("F32", "F16", "BF16"))
# Where the fp16 scales of a block begin.
_SCALES = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q6_K": (208,),
    "MXFP4": (),
}


@dataclass(frozen=True)
class Parameter:
    """One tensor of the checkpoint that a file stands for. `blocks`: the type of each tensor of the file that it is
    held in, in their order; empty where it is made of its values."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    blocks: tuple[str, ...]


@dataclass(frozen=True)
class BlockManifest:
    """`sha256`: of each file, in the order of the parts. Together they are what the base is known by."""

    names: tuple[str, ...]
    nbytes: tuple[int, ...]
    sha256: tuple[str, ...]
    parameters: tuple[Parameter, ...]

    @property
    def content(self) -> str:
        return self.sha256[0] if len(self.sha256) == 1 else hashlib.sha256("".join(self.sha256).encode()).hexdigest()


def types_of(source: layouts.ParameterSource, file: GgufReader) -> tuple[str, ...]:
    """The types of the tensors that a parameter is held in; empty where it cannot be."""
    if source.name.endswith("ssm_dt.weight"):  # transformers' state-space blocks read it as a tensor, not by its layer
        return ()
    kinds = tuple(file.tensors[name].type for name in source.parts or (source.name,))
    as_it_lies = source.transform.value is None and source.compose in (None, *layouts.OF_EXPERTS)
    return kinds if as_it_lies and all(kind in BLOCKS for kind in kinds) else ()


def nbytes(numel: int, blocks: tuple[str, ...]) -> int:
    """Bytes of so many weights in blocks of these types, as many in each."""
    return sum(numel // len(blocks) // BLOCKS[kind][1] * BLOCKS[kind][2] for kind in blocks)


def describe(
    header: GgufHeader, shapes: Mapping[str, tuple[int, ...]], sources: Mapping[str, layouts.ParameterSource]
) -> list[Document]:
    """The manifest's parameters. Raises GgufError: a tensor's type is not held here, or a scale is not finite."""
    file = GgufReader(header)
    for tensor in header.tensors:
        if tensor.type not in PLAIN_TYPES | BLOCKS.keys():
            raise GgufError(
                f"its tensor {tensor.name} is in {tensor.type}, which quant.type gguf does not hold; allowed: "
                f"{', '.join(BLOCKS)}, {', '.join(sorted(PLAIN_TYPES))}; --set quant.type=nf4 quantises it anew"
            )
        if tensor.type in BLOCKS:
            _check_scales(file, tensor.name, tensor.type)
    fp32 = {name for name, source in sources.items() if file.tensors[source.name].type == "F32"}
    return [
        asdict(Parameter(name, shape, "F32" if name in fp32 else "BF16", types_of(sources[name], file)))
        for name, shape in shapes.items()
    ]


def _check_scales(file: GgufReader, name: str, kind: str) -> None:
    blocks = file.rows(name).reshape(-1, BLOCKS[kind][2])
    for at in _SCALES[kind]:
        if not np.isfinite(blocks[:, at : at + 2].copy().view(np.float16)).all():
            raise GgufError(f"its tensor {name} holds values that are not finite")


def write(folder: Path, header: GgufHeader, parameters: list[Document]) -> None:
    """Put the manifest into a folder; hashes every byte of the files."""
    parts = [(part.name, part.stat().st_size, files.sha256(part)) for part in header.files]
    names, sizes, hashes = zip(*parts, strict=True)
    values = {"format": FORMAT_VERSION, "names": names, "nbytes": sizes, "sha256": hashes, "parameters": parameters}
    (folder / MANIFEST).write_text(json.dumps(values) + "\n", encoding="utf-8")


def read(folder: Path) -> BlockManifest | None:
    """The manifest of a checkpoint folder; None where its weights are in the folder itself. Raises SourceError: it is
    damaged."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = TypeAdapter(BlockManifest).validate_json(path.read_bytes())
        if not all(kind in BLOCKS for each in manifest.parameters for kind in each.blocks):
            raise ValueError("a type that is none")
    except ValueError as error:  # pydantic's is one
        raise SourceError(f"{path} is damaged", fix=f"rm -r {typed(folder)}, and it is written again") from error
    return manifest


def problems(manifest: BlockManifest, parts: tuple[Path, ...]) -> list[str]:
    """What differs from the manifest, every byte hashed; empty where nothing does."""
    wrong = []
    for path, size, digest in zip(parts, manifest.nbytes, manifest.sha256, strict=True):
        if not path.is_file():
            wrong.append(f"{path} is missing")
        elif path.stat().st_size != size or files.sha256(path) != digest:
            wrong.append(f"{path} has another sha256 than when the base was first opened")
    return wrong

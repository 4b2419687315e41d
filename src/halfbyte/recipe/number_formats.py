"""The number formats of frozen weights, as a recipe, a plan and a table of formats speak of them; no torch.

What encodes and computes with them is `quant/formats.py`, under the same names. A new format is a file there and a line
in both tables.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

# The fields of `quant:` that some formats alone read, each with the value that says nothing.
UNSET: Mapping[str, object] = MappingProxyType({"double_quant": False, "block_size": None, "llm_int8_threshold": None})
BLOCK_FIELDS = ("block_size", "double_quant")
AUTO = "auto"  # the format that the plan chooses (`plan/number_format.py`)
_ONCE: tuple[Mapping[str, object], ...] = (MappingProxyType({}),)


@dataclass(frozen=True)
class FormatInfo:
    """What is said of a format. `scales`: why it reads no `BLOCK_FIELDS`, as a refusal ends: "has one scale for each
    row of a matrix". `compared`: with which of its fields `halfbyte quantize --report` measures it, once for each."""

    name: str
    bits: int | None  # of a weight's code; None: as the model's file has it
    reads: frozenset[str] = frozenset(BLOCK_FIELDS)  # which fields of `UNSET` it reads
    scales: str = "has no blocks"
    suggested: bool = False  # whether a plan names it where fewer bits would fit; at most one format of so many bits
    compared: tuple[Mapping[str, object], ...] = _ONCE

    @property
    def unread(self) -> dict[str, object]:
        """The fields that it does not read, with the value that they must have."""
        return {name: value for name, value in UNSET.items() if name not in self.reads}

    def problems(self, quant: object) -> Iterator[str]:
        """What a `quant:` sets that this format does not read, in sentences."""
        wrong = [name for name, value in self.unread.items() if getattr(quant, name) != value]
        if blocks := [f"quant.{name}" for name in BLOCK_FIELDS if name in wrong]:
            unset = " ".join(f"{name}={json.dumps(UNSET[name.removeprefix('quant.')])}" for name in blocks)
            yield (
                f"{' and '.join(blocks)} cannot be set with quant.type {self.name}, which {self.scales}; "
                f"leave out what is for {_readers('block_size')} (--set {unset})"
            )
        for name in (name for name in wrong if name not in BLOCK_FIELDS):
            yield f"quant.{name} is not read with quant.type {self.name}; it is for {_readers(name)}"


FORMATS: dict[str, FormatInfo] = {
    info.name: info
    for info in (
        FormatInfo("nf4", 4, suggested=True, compared=({"double_quant": False}, {"double_quant": True})),
        FormatInfo("fp4", 4, compared=({"double_quant": False},)),
        FormatInfo(
            "int8",
            8,
            reads=frozenset({"llm_int8_threshold"}),
            scales="has one scale for each row of a matrix",
            suggested=True,
        ),
        FormatInfo("gguf", None, reads=frozenset(), scales="is held as its file has it", compared=()),
        FormatInfo("none", 16),
    )
}


def known(value: object) -> object:
    if not isinstance(value, str) or value not in (*FORMATS, AUTO):
        *names, last = (*FORMATS, AUTO)
        raise ValueError(f"must be {', '.join(names)} or {last}")
    return value


def of_bits(bits: int) -> str:
    """The name of the format with so many bits that is taken where nobody names one."""
    return next(info.name for info in FORMATS.values() if info.bits == bits and (info.suggested or bits == 16))


def smaller(than: str = "none") -> list[FormatInfo]:
    """The suggested formats with fewer bits than another, the most bits first."""
    most = FORMATS[than].bits or 0
    formats = [info for info in FORMATS.values() if info.suggested and (info.bits or 0) < most]
    return sorted(formats, key=lambda info: -(info.bits or 0))


def compared() -> Iterator[tuple[str, Mapping[str, object]]]:
    """(name, fields) of each format that a report of a base's quality measures, the most bits first."""
    quantising = (info for info in FORMATS.values() if info.name != "none")
    for info in sorted(quantising, key=lambda info: -(info.bits or 0)):
        yield from ((info.name, fields) for fields in info.compared)


def fields_of(name: str) -> FormatInfo:
    """What is said of a format's fields; of `auto`, which sets none: the format that is chosen has its own."""
    return FORMATS.get(name) or FormatInfo(AUTO, None, reads=frozenset(), scales="takes those of the format it chooses")


def _readers(field: str) -> str:
    return " and ".join(info.name for info in FORMATS.values() if field in info.reads and info.name != "none")

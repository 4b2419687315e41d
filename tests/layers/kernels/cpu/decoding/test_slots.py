"""Slots of a tape: no bare number on either side, and no two numbers of an operation in one slot."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import halfbyte
from halfbyte.layers.kernels.cpu.decoding import slots

LAYERS = Path(halfbyte.__file__).parent / "layers"
KERNELS = LAYERS / "kernels" / "cpu" / "decoding"
# What an operation's numbers, or a run's, are called in these files.
ROWS = {"op", "ops", "number", "row", "run", "_run", "_operations"}


def bare_slots(tree: ast.AST) -> Iterator[int]:
    """Lines on which a slot is a number: `op[4]`, `{4: address}`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript):
            name = getattr(node.value, "id", getattr(node.value, "attr", ""))
            if name in ROWS and any(part.strip().lstrip("-").isdigit() for part in ast.unparse(node.slice).split(":")):
                yield node.lineno
        elif isinstance(node, ast.Dict):
            keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
            if any(isinstance(key, int) for key in keys):
                yield node.lineno


@pytest.mark.parametrize("path", [LAYERS / "decoding" / "tape.py", *sorted(KERNELS.glob("*.py"))], ids=lambda p: p.stem)
def test_no_slot_is_a_bare_number(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for by_bytes in ("CHUNK_BYTES = {2: 64, 4: 32}", "LANES = {2: 16, 4: 8}"):
        text = text.replace(by_bytes, "")
    assert not list(bare_slots(ast.parse(text)))


def test_the_search_for_bare_slots_finds_them() -> None:
    code = "op[4]\nnumber[8]\nself._run[2:4] = 1\nadd({4: 1})\nop[slots.X]\nops[i * WIDTH : j]\nx[3]"
    assert sorted(bare_slots(ast.parse(code))) == [1, 2, 3, 4]


def named(*prefixes: str) -> dict[str, int]:
    return {name: value for name, value in vars(slots).items() if name.startswith(prefixes) and isinstance(value, int)}


KINDS = (
    "NORM", "CODES", "DENSE", "ROTATE", "ATTEND", "GATE", "HEAD_ROUGH", "HEAD_EXACT", "BLOCKS", "CONV", "DELTA", "SCAN",
    "GATED", "PAIRS", "QUADS",
)  # fmt: skip
OF_ONE_KIND = ("NORM_", "CODES_", "DENSE_", "ATTEND_", "GATE_", "HEAD_", "BLOCKS_", "CONV_", "SCAN_", "GATED_")
# Those without the name of a kind: of every operation, and of every product with a matrix.
MATRIX = ("W", "D", "O", "X", "X_ROW", "OUT", "OUT_ROW", "ADD", "BIAS", "ITEM_ROWS", "VECTORS")
EVERY = {
    n: v
    for n, v in named("").items()
    if n not in (*KINDS, *MATRIX, "WIDTH") and not n.startswith(("TAPE_", "STATE", *OF_ONE_KIND, "_"))
}


@pytest.mark.parametrize("kind", [*OF_ONE_KIND, "TAPE_"])
def test_numbers_of_one_operation_have_slots_of_their_own(kind: str) -> None:
    used = {name: value for name, value in named(kind).items() if name not in KINDS}
    if kind == "BLOCKS_":  # LoRA's numbers are where CODES has them
        used |= named("CODES_UP", "CODES_H", "CODES_PIECES")
    if kind in ("CODES_", "DENSE_", "HEAD_", "BLOCKS_"):
        used |= {name: getattr(slots, name) for name in MATRIX}
    if kind in ("CONV_", "SCAN_"):  # where the state is, and of which text
        used |= named("STATE")
    if kind != "TAPE_":
        used |= EVERY
    assert {"KIND", "USED", "NEXT_W"} <= set(used) or kind == "TAPE_"
    assert len(set(used.values())) == len(used) > 10
    assert all(0 <= slot < slots.WIDTH for slot in used.values())

"""The rules of the house (docs/design.md), read from the source: who may import whom, and what nobody may do.

The order of the rooms is the tree in docs/design.md itself; a new room is one entry there. The tables below hold the
rest, one line a rule.
"""

from __future__ import annotations

import ast
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "halfbyte"
MAX_LINES = 450
HELP_CPU_SECONDS = 0.5

HEAVY = frozenset({"torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "numba", "gguf", "trl"})
# Rooms that `halfbyte --help` and `halfbyte plan` go through.
NO_TORCH = (
    "__main__",
    "architectures",
    "bnb_backend",
    "calibrate",
    "cli",
    "device",
    "errors",
    "fields",
    "memory.choose",
    "memory.compare",
    "memory.decoder",
    "memory.fixes",
    "memory.job",
    "memory.lines",
    "memory.state",
    "memory.step",
    "memory.timing",
    "planning",
    "quantise",
    "recipe",
    "references",
    "report",
    "run",
    "shapes",
    "sites",
    "sources.headers",
    "targets",
    "usage",
)
# Library -> the rooms that may import it.
DOORS = {
    "bitsandbytes": {"quant"},
    "peft": {"dropin", "adapters", "targets", "layers.fuse", "layers.proof"},
}
TRAINER_NAMES = re.compile(r"^(Trainer|TrainingArguments|Seq2SeqTrainer|TrainerCallback|trainer(_\w+)?)$")
TRAINER_ROOMS = {"train", "callbacks"}
PRINTING_ROOMS = {"cli", "cli_store", "show", "show_store", "docs"}


@cache
def rooms() -> tuple[str, ...]:
    """Dotted names of the rooms, in the order of the tree in docs/design.md."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    block = re.search(r"^src/halfbyte/\n(.*?)^(?:\w|```)", text, re.MULTILINE | re.DOTALL)
    assert block is not None, "docs/design.md has no tree of src/halfbyte/"
    found: list[str] = []
    for line in block[1].splitlines():
        folder = re.match(r"\s+([\w/]+)/", line)
        prefix = f"{folder[1].replace('/', '.')}." if folder else ""
        found += [prefix + name for name in re.findall(r"(\w+)\.py\b", line)]
    return tuple(dict.fromkeys(found))


@cache
def sources() -> dict[str, Path]:
    """Dotted name -> file of every module, without `__init__`."""
    files = sorted(SOURCE.rglob("*.py"))
    return {".".join(p.relative_to(SOURCE).with_suffix("").parts): p for p in files if p.name != "__init__.py"}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def everywhere() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts)


def imports(nodes: ast.AST) -> Iterator[tuple[str, int]]:
    """(dotted module, line) of each import; `from a import b` gives a.b, as b may be a module."""
    for node in ast.walk(nodes):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno


def at_import(path: Path) -> Iterator[tuple[str, int]]:
    """Imports that run when the module is imported: none inside functions or under TYPE_CHECKING."""

    def walk(body: list[ast.stmt]) -> Iterator[tuple[str, int]]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                yield from walk(node.orelse)
                continue
            if isinstance(node, ast.Import | ast.ImportFrom):
                yield from imports(node)
            for name in ("body", "orelse", "finalbody"):
                yield from walk(getattr(node, name, []))
            for handler in getattr(node, "handlers", []):
                yield from walk(handler.body)

    yield from walk(tree(path).body)


def own_rooms(dotted: str) -> list[str]:
    """Rooms that importing `halfbyte.x.y` reaches: the module, or all of a package that is imported as a whole."""
    parts = dotted.split(".")[1:]
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name in sources():
            return [name]
        if (SOURCE / Path(*parts[:length])).is_dir():
            return [room for room in sources() if room.startswith(f"{name}.")]
    return []


def test_every_module_is_a_room_of_the_design() -> None:
    strangers = sorted(set(sources()) - set(rooms()))
    assert not strangers, f"add to the tree in docs/design.md, in its place: {strangers}"


def test_a_room_imports_only_rooms_above_it() -> None:
    order = {name: position for position, name in enumerate(rooms())}
    wrong = []
    for name, path in sources().items():
        for dotted, line in imports(tree(path)):
            if dotted.split(".")[0] != "halfbyte":
                continue
            below = [room for room in own_rooms(dotted) if room != name and order.get(room, 0) > order.get(name, 0)]
            if below:
                wrong.append(f"{name}:{line} imports {', '.join(below)}")
    assert not wrong, "\n".join(dict.fromkeys(wrong))


def test_imports_are_absolute_so_that_the_rules_can_be_read() -> None:
    wrong = [
        f"{name_of(path)}:{node.lineno}"
        for path in everywhere()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not wrong


@pytest.mark.parametrize("library", sorted(DOORS))
def test_a_library_has_its_doors(library: str) -> None:
    wrong = [
        f"{name}:{line} imports {dotted}"
        for name, path in sources().items()
        for dotted, line in imports(tree(path))
        if dotted.split(".")[0] == library and name not in DOORS[library]
    ]
    assert not wrong, "\n".join(wrong)


def test_only_train_and_callbacks_know_the_trainer() -> None:
    wrong = [
        f"{name}:{line} imports {dotted}"
        for name, path in sources().items()
        for dotted, line in imports(tree(path))
        if dotted.split(".")[0] == "transformers"
        and any(TRAINER_NAMES.match(part) for part in dotted.split(".")[1:])
        and name not in TRAINER_ROOMS
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", NO_TORCH)
def test_light_rooms_import_nothing_heavy(name: str) -> None:
    wrong = [f"{name}:{line} {dotted}" for dotted, line in at_import(sources()[name]) if dotted.split(".")[0] in HEAVY]
    assert not wrong, "\n".join(wrong)


def test_importing_all_light_rooms_leaves_heavy_libraries_out() -> None:
    modules = [f"halfbyte.{name}" for name in NO_TORCH if name != "__main__"]
    code = f"import sys, {', '.join(modules)}; print(sorted({set(HEAVY)} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert out.strip() == "[]"


def test_help_never_imports_torch() -> None:
    code = (
        "import runpy, sys\nsys.argv = ['halfbyte', '--help']\n"
        "try:\n    runpy.run_module('halfbyte', run_name='__main__')\n"
        f"except SystemExit as end:\n    print('code', end.code, sorted({set(HEAVY)} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout
    assert done.stdout.splitlines()[-1] in ("code 0 []", "code None [])", "code None []")


def test_help_takes_little_cpu_time() -> None:
    """CPU time of the process, not wall time; the best of three, as the first may compile bytecode."""
    taken = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "halfbyte", "--help"], capture_output=True, check=True, cwd=ROOT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(taken) < HELP_CPU_SECONDS, taken


def test_nothing_below_the_command_line_prints() -> None:
    wrong = []
    for name, path in sources().items():
        for node in ast.walk(tree(path)) if name not in PRINTING_ROOMS else ():
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "print",
                "sys.stdout.write",
                "sys.stderr.write",
            ):
                wrong.append(f"{name}:{node.lineno}")
    assert not wrong, "\n".join(wrong)


def assignments_to_upstream(module: ast.Module) -> Iterator[tuple[str, int]]:
    """Attributes set or deleted on names that were imported from other libraries, also through `setattr`.

    Items of a registry (`ALL_ATTENTION_FUNCTIONS["x"] = f`) and attributes of instances are not meant.
    """
    foreign: set[str] = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            foreign |= {(a.asname or a.name).split(".")[0] for a in node.names if not a.name.startswith("halfbyte")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] != "halfbyte":
            foreign |= {a.asname or a.name for a in node.names}

    def root(node: ast.AST) -> str:
        while isinstance(node, ast.Attribute):
            node = node.value
        return node.id if isinstance(node, ast.Name) else ""

    def flat(node: ast.AST) -> Iterator[ast.AST]:
        if isinstance(node, ast.Tuple | ast.List):
            for item in node.elts:
                yield from flat(item)
        else:
            yield node

    for node in ast.walk(module):
        targets: list[ast.AST] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = list(node.targets)
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr"):
            targets = [ast.Attribute(node.args[0], "_")] if node.args else []
        for target in targets:
            for one in flat(target):
                if isinstance(one, ast.Attribute) and root(one) in foreign:
                    yield ast.unparse(node), node.lineno


def test_no_upstream_module_or_class_is_assigned_to() -> None:
    wrong = [f"{name_of(p)}:{line} {what}" for p in everywhere() for what, line in assignments_to_upstream(tree(p))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import torch\ntorch.nn.Linear.forward = f", 1),
        ("import torch.nn as nn\nnn.x = nn.y = 1", 2),
        ("from peft import A\ndef g():\n    setattr(A, 'x', 1)\n    del A.y", 2),
        ("from peft import A\n(A.x, b) = 1, 2\nA.n += 1", 2),
        ("from peft import A, REGISTRY\nREGISTRY['x'] = A\na = A()\na.x = 1", 0),
        ("from halfbyte import run\nrun.x = 1", 0),
    ],
)
def test_the_check_for_assignments_sees_them(code: str, found: int) -> None:
    assert len(list(assignments_to_upstream(ast.parse(code)))) == found


def test_no_room_is_too_long() -> None:
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in everywhere()}
    assert not {name: n for name, n in lengths.items() if n > MAX_LINES}


def test_every_room_says_what_it_is() -> None:
    assert not [name for name, path in sources().items() if name != "__main__" and not ast.get_docstring(tree(path))]

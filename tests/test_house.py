"""The rules of the house (docs/design.md), read from the source: who may import whom, and what nobody may do.

The order of the rooms is the tree in docs/design.md itself; a new folder is one line there. A new file needs no entry.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests import in_process

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "halfbyte"
MAX_LINES = 450
MAX_FILES_AT_ROOT = 6
MAX_FILES_IN_A_FOLDER = 20
MAX_LINES_OF_A_FUNCTION = 60
MAX_LINES_OF_SOURCE = 69458
MAX_ASSIGNMENTS_OF_THREE = 50  # `a, b, c = x, y, z`: for what is one thing, as a shape
MAX_VAGUE_VARIABLES = 25
MAX_ANY = 150  # occurrences of `Any` in the package; name the type instead (halfbyte.types)

HEAVY = frozenset({"torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "numba", "gguf", "trl"})
# Folders that `halfbyte --help`, `halfbyte plan` and the reading of data go through.
LIGHT_FOLDERS = (
    "system",
    "system.platforms",
    "recipe",
    "models",
    "models.gguf",
    "models.sources",
    "data.reading",
    "data.encoding",
    "plan",
    "cli",
)
LIGHT_FILES = (
    "__main__",
    "errors",
    "adapters.targets",
    "quant.kernels.nf4_cpu",
    "quant.bnb_backend",
    "runs.folder",
    "runs.points",
    "runs.report",
    "runs.listing",
    "report.series",
    "report.plots",
    "report.record",
    "report.curves",
    "report.page",
    "report.compare",
    "report.live",
    "training.preflight",
)
# What a variable holds has a name: `model`, `rows`, `path`. These say only how it was come by.
VAGUE = frozenset({"made", "own", "found", "kept", "held", "said"})
# A module is named by a noun or a verb. Gerunds ("packing") are nouns.
PAST_FORMS = re.compile(
    r"(\w+ed|begun|built|chosen|done|drawn|found|given|gone|held|hidden|kept|known|laid|left|lost|made|meant|met|said|seen"
    r"|sent|shown|spent|taken|thrown|told|won|written)"
)
NO_PAST_FORMS = frozenset({"embed", "feed", "need", "seed", "speed", "distributed"})  # the last is torch's own name
# Library -> the rooms that may import it.
DOORS = {"bitsandbytes": {"quant", "upstream"}, "peft": {"adapters", "layers", "proofs", "upstream"}}
TRAINER_NAMES = re.compile(r"^(Trainer|TrainingArguments|Seq2SeqTrainer|TrainerCallback|trainer(_\w+)?)$")
TRAINER_ROOM = "training"
PRINTING_ROOM = "cli"


@cache
def rooms() -> tuple[str, ...]:
    """Folders and root files, dotted, in the order of the tree in docs/design.md."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    block = re.search(r"^src/halfbyte/.*?\n(.*?)^(?:\w|```)", text, re.MULTILINE | re.DOTALL)
    assert block is not None, "docs/design.md has no tree of src/halfbyte/"
    return tuple(name.replace("/", ".") for name in re.findall(r"^  ([\w/]+?)(?:/|\.py)(?= )", block[1], re.MULTILINE))


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


def room_of(module: str) -> str:
    """`layers.fuse` -> `layers`; a file at the root is a room of its own."""
    return module.rpartition(".")[0] or module


def module_of(dotted: str) -> str:
    """The module that importing `halfbyte.x.y` loads; a package as `x.__init__`."""
    parts = dotted.split(".")[1:]
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name in sources():
            return name
        if (SOURCE / Path(*parts[:length])).is_dir():
            return f"{name}.__init__"
    return "__init__"


@cache
def arrows() -> dict[tuple[str, str], list[str]]:
    """(module, module it imports) -> where; imports inside functions and for type checking included."""
    edges: dict[tuple[str, str], list[str]] = {}
    for path in everywhere():
        for dotted, line in imports(tree(path)):
            if dotted.split(".")[0] == "halfbyte":
                pair = (name_of(path), module_of(dotted))
                if pair[0] != pair[1]:
                    edges.setdefault(pair, []).append(f"{name_of(path)}:{line} imports {dotted}")
    return edges


def cycles(edges: set[tuple[str, str]]) -> list[str]:
    """Names that can reach themselves."""
    after: dict[str, set[str]] = {}
    for one, other in edges:
        after.setdefault(one, set()).add(other)

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        todo = list(after.get(start, ()))
        while todo:
            if (name := todo.pop()) not in seen:
                seen.add(name)
                todo += after.get(name, ())
        return seen

    return sorted(name for name in after if name in reachable(name))


def test_every_folder_is_a_room_of_the_design() -> None:
    assert sorted({room_of(name) for name in sources()}) == sorted(rooms()), "keep the tree in docs/design.md"


def test_a_room_imports_only_rooms_above_it() -> None:
    order = {name: position for position, name in enumerate(rooms())}
    wrong = [
        place
        for (one, other), places in arrows().items()
        if one != "__init__" and room_of(one) != room_of(other)
        and order.get(room_of(other), len(order)) > order[room_of(one)]
        for place in places
    ]  # fmt: skip
    assert not wrong, "\n".join(wrong)


def test_no_folder_and_no_file_imports_itself_through_others() -> None:
    # A package that is imported as a whole loads what its __init__ loads: those files may import one another.
    files = {pair for pair in arrows() if not any(name.endswith("__init__") for name in pair)}
    assert cycles(files) == []
    assert (
        cycles({(a, b) for a, b in ((room_of(a), room_of(b)) for a, b in arrows() if a != "__init__") if a != b}) == []
    )


def test_the_search_for_cycles_finds_one() -> None:
    assert cycles({("a", "b"), ("b", "c"), ("c", "a"), ("d", "a")}) == ["a", "b", "c"]
    assert cycles({("a", "b"), ("a", "c"), ("b", "c")}) == []


def test_folders_stay_small() -> None:
    assert len(list(SOURCE.glob("*.py"))) <= MAX_FILES_AT_ROOT
    counts = Counter(room_of(name) for name in sources() if "." in name)
    assert not {name: count for name, count in counts.items() if count > MAX_FILES_IN_A_FOLDER}


def test_tests_mirror_the_folders() -> None:
    """Every folder of the package has its tests in the folder of the same name."""
    folders = {room_of(name) for name in sources() if "." in name}
    without = [name for name in folders if not list((ROOT / "tests" / name.replace(".", "/")).glob("test_*.py"))]
    assert not without


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
        if dotted.split(".")[0] == library and room_of(name) not in DOORS[library]
    ]
    assert not wrong, "\n".join(wrong)


def writing_elsewhere(room: str, module: ast.Module) -> Iterator[tuple[str, int]]:
    """What a room other than `writing` would use to write a text: it opens a tape, draws a token, or has transformers
    prepare a loop."""
    if room not in ("writing", "layers.decoding"):
        yield from ((dotted, line) for dotted, line in imports(module) if dotted.startswith("halfbyte.layers.decoding"))
    words = ("multinomial", "custom_generate", "prepare_inputs_for_generation")
    for node in ast.walk(module) if room != "writing" else ():
        word = getattr(node, "attr", None) if isinstance(node, ast.Attribute) else getattr(node, "arg", None)
        if isinstance(node, ast.Attribute | ast.keyword) and word in words:
            yield word, node.lineno if isinstance(node, ast.Attribute) else node.value.lineno


def test_one_room_writes_texts() -> None:
    wrong = [
        f"{name}:{line} {what}"
        for name, path in sources().items()
        for what, line in writing_elsewhere(room_of(name), tree(path))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("room", "code", "count"),
    [
        ("serving", "from halfbyte.layers.decoding import llama", 1),
        ("inference", "def f():\n    import halfbyte.layers.decoding.tape", 1),
        ("inference", "token = torch.multinomial(p, 1)", 1),
        ("serving", "model.generate(ids, custom_generate=loop)", 1),
        ("training", "lm.prepare_inputs_for_generation(ids)", 1),
        ("writing", "from halfbyte.layers.decoding import llama\ntorch.multinomial(p, 1)", 0),
        ("serving", "from halfbyte.writing.writer import Writer", 0),
    ],
)
def test_the_check_for_writers_sees_them(room: str, code: str, count: int) -> None:
    assert len(list(writing_elsewhere(room, ast.parse(code)))) == count


def test_only_training_knows_the_trainer() -> None:
    wrong = [
        f"{name}:{line} imports {dotted}"
        for name, path in sources().items()
        for dotted, line in imports(tree(path))
        if dotted.split(".")[0] == "transformers"
        and any(TRAINER_NAMES.match(part) for part in dotted.split(".")[1:])
        and room_of(name) != TRAINER_ROOM
    ]
    assert not wrong, "\n".join(wrong)


def light() -> list[str]:
    assert set(LIGHT_FOLDERS) <= set(rooms()) and set(LIGHT_FILES) <= set(sources())
    return [name for name in sources() if room_of(name) in LIGHT_FOLDERS or name in LIGHT_FILES]


def test_light_rooms_import_nothing_heavy() -> None:
    wrong = [
        f"{name}:{line} {dotted}"
        for name in light()
        for dotted, line in at_import(sources()[name])
        if dotted.split(".")[0] in HEAVY
    ]
    assert not wrong, "\n".join(wrong)


def test_importing_all_light_rooms_leaves_heavy_libraries_out() -> None:
    modules = [f"halfbyte.{name}" for name in light() if name != "__main__"]
    code = f"import sys, {', '.join(modules)}; print(sorted({set(HEAVY)} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert out.strip() == "[]"


def test_help_never_imports_torch_nor_what_reads_recipes_and_rows() -> None:
    left_out = {*HEAVY, "numpy", "pydantic", "halfbyte.recipe.schema"}
    code, found, printed = in_process.imported(left_out, "--help", cwd=ROOT)
    assert (code, found) == (0, []) and "train" in printed


def test_nothing_below_the_command_line_prints() -> None:
    wrong = []
    for name, path in sources().items():
        for node in ast.walk(tree(path)) if room_of(name) != PRINTING_ROOM else ():
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


def top_names(module: ast.Module) -> set[str]:
    """What a module defines, imports or assigns outside functions and classes."""
    names: set[str] = set()
    todo: list[ast.AST] = list(module.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        todo += ast.iter_child_nodes(node)
    return names


@cache
def names_in(module: str) -> frozenset[str]:
    """What `halfbyte.MODULE` has: of a package its modules too; nothing where it does not exist."""
    place = SOURCE / Path(*module.split("."))
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    names = top_names(tree(file)) if file.exists() else set()
    if place.is_dir():
        names |= {path.stem for path in place.iterdir() if path.suffix == ".py" or path.is_dir()}
    return frozenset(names)


def missing(module: ast.Module) -> Iterator[tuple[str, int]]:
    """(name, line) of what is imported from halfbyte, or asked of a module of it, and is not there."""
    modules: dict[str, str] = {}
    assigned = {name for name, _ in variables(module)}
    assigned |= {node.arg for node in ast.walk(module) if isinstance(node, ast.arg)}
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("halfbyte."):
            parent = node.module.removeprefix("halfbyte.")
            for alias in node.names:
                if alias.name not in names_in(parent):
                    yield f"{parent}.{alias.name}", node.lineno
                elif (inner := f"{parent}.{alias.name}") in sources():
                    modules[alias.asname or alias.name] = inner
    for node in ast.walk(module):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = modules.get(node.value.id)
            is_module = owner is not None and node.value.id not in assigned
            if is_module and node.attr not in names_in(owner) and not node.attr.startswith("__"):
                yield f"{owner}.{node.attr}", node.lineno


@pytest.mark.parametrize("folder", ["benchmarks", "tools", "tests", "examples"])
def test_what_is_asked_of_the_package_is_there(folder: str) -> None:
    """Benchmarks and slow tests run seldom; a name that has moved is found here."""
    files = sorted((ROOT / folder).rglob("*.py"))
    wrong = [f"{path.relative_to(ROOT)}:{line} {what}" for path in files for what, line in missing(tree(path))]
    assert files and not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("from halfbyte.plan import choose\nchoose.best_plan", []),
        ("from halfbyte.plan import choose\nchoose.worst_plan", ["plan.choose.worst_plan"]),
        ("from halfbyte.plan import nothing", ["plan.nothing"]),
        ("from halfbyte.plan.choose import MARGIN, NONE", ["plan.choose.NONE"]),
        ("from halfbyte.plan import choose\ndef f(choose): choose.x", []),
    ],
)
def test_the_search_for_missing_names_finds_them(code: str, what: list[str]) -> None:
    assert [name for name, _ in missing(ast.parse(code))] == what


def test_slow_cases_are_cases() -> None:
    lines = [line for line in (ROOT / "tests/slow.txt").read_text().splitlines() if not line.startswith("#")]
    names = [line.partition("[")[0].split("::") for line in lines]
    assert lines and not [n for file, n in names if f"def {n}(" not in (ROOT / file).read_text(encoding="utf-8")]


def test_no_room_is_too_long() -> None:
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in everywhere()}
    assert not {name: n for name, n in lengths.items() if n > MAX_LINES}


def test_no_function_is_too_long() -> None:
    """Counted from `def` to its last line."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    lengths = {
        f"{name_of(path)}.{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in everywhere()
        for node in ast.walk(tree(path))
        if isinstance(node, kinds)
    }
    assert not {name: n for name, n in lengths.items() if n > MAX_LINES_OF_A_FUNCTION}


def test_any_is_rare() -> None:
    words = [re.findall(r"\bAny\b", path.read_text(encoding="utf-8")) for path in everywhere()]
    assert sum(map(len, words)) <= MAX_ANY


def names_assigned(target: ast.AST) -> Iterator[str]:
    """The variables of a target; `a.b` and `a[b]` are none."""
    if isinstance(target, ast.Name):
        yield target.id
    elif isinstance(target, ast.Tuple | ast.List):
        for item in target.elts:
            yield from names_assigned(item)
    elif isinstance(target, ast.Starred):
        yield from names_assigned(target.value)


def variables(module: ast.Module) -> Iterator[tuple[str, int]]:
    """(name, line) of each assignment, in loops, comprehensions, `with` and `:=` too."""
    for node in ast.walk(module):
        targets: list[ast.AST] = []
        if isinstance(node, ast.Assign):
            targets += node.targets
        elif isinstance(
            node, ast.AnnAssign | ast.AugAssign | ast.NamedExpr | ast.For | ast.AsyncFor | ast.comprehension
        ):
            targets.append(node.target)
        elif isinstance(node, ast.withitem) and node.optional_vars is not None:
            targets.append(node.optional_vars)
        for target in targets:
            for name in names_assigned(target):
                yield name, target.lineno  # type: ignore[attr-defined]


def assignments_of_three(module: ast.Module) -> Iterator[int]:
    """Lines that assign three names and more from as many values that are written out."""
    for node in ast.walk(module):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            widths = [len(target.elts) for target in node.targets if isinstance(target, ast.Tuple | ast.List)]
            if max(widths, default=0) >= 3:
                yield node.lineno


def classes(module: ast.Module) -> Iterator[str]:
    """Names of classes, without a leading underscore."""
    for node in ast.walk(module):
        if isinstance(node, ast.ClassDef):
            yield node.name.lstrip("_")


def is_past_form(module: str) -> bool:
    """Whether the last word of a file's or folder's name is a participle."""
    word = module.rpartition("_")[2]
    return PAST_FORMS.fullmatch(word) is not None and word not in NO_PAST_FORMS


def test_a_class_name_has_one_meaning() -> None:
    places: dict[str, list[str]] = {}
    for path in everywhere():
        for name in classes(tree(path)):
            places.setdefault(name, []).append(name_of(path))
    twice = [f"{name}: {', '.join(where)}" for name, where in sorted(places.items()) if len(where) > 1]
    assert not twice, "\n".join(twice)


def test_no_module_is_a_participle() -> None:
    words = {word for name in sources() for word in name.split(".") if is_past_form(word)}
    assert not words


def test_a_variable_says_what_it_holds() -> None:
    vague = [
        f"{name_of(path)}:{line} {name}"
        for path in everywhere()
        for name, line in variables(tree(path))
        if name in VAGUE
    ]
    assert len(vague) <= MAX_VAGUE_VARIABLES, "\n".join(vague)


def test_three_things_are_seldom_assigned_at_once() -> None:
    wide = [f"{name_of(path)}:{line}" for path in everywhere() for line in assignments_of_three(tree(path))]
    assert len(wide) <= MAX_ASSIGNMENTS_OF_THREE, "\n".join(wide)


def test_the_source_does_not_grow_without_a_reason() -> None:
    """Raise the number with what needs it, and look for what it makes superfluous."""
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in everywhere()) <= MAX_LINES_OF_SOURCE


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("made = 1\na.made = 2\nmade[0] = 3", ["made"]),
        ("(own, (found, *kept)), x = y", ["found", "kept", "own"]),
        ("for held in said: pass\nwith f() as made: pass", ["held", "made"]),
        ("[own for own in x if (said := own)]\nheld: int = 1\nmade += 1", ["held", "made", "own", "said"]),
        ("def found(made): return own", []),
    ],
)
def test_the_search_for_vague_variables_sees_them(code: str, expected: list[str]) -> None:
    assert sorted(name for name, _ in variables(ast.parse(code)) if name in VAGUE) == expected


@pytest.mark.parametrize(
    ("code", "count"),
    [("a, b, c = x, y, z", 1), ("n = (a, *b, [c]) = 1, 2, 3", 1), ("a, b = b, a\na, b, c = x.shape\na = 1, 2, 3", 0)],
)
def test_the_search_for_assignments_of_three_sees_them(code: str, count: int) -> None:
    assert len(list(assignments_of_three(ast.parse(code)))) == count


def test_the_search_for_classes_takes_an_underscore_for_no_difference() -> None:
    assert list(classes(ast.parse("class A: pass\ndef f():\n    class _A: pass"))) == ["A", "A"]


@pytest.mark.parametrize(
    ("name", "past"),
    [
        ("lost", True), ("shared", True), ("what_was_said", True), ("said", True),
        ("packed_attention", False), ("packing", False), ("seed", False), ("merge", False), ("first_pages", False),
    ],
)  # fmt: skip
def test_the_search_for_participles_sees_them(name: str, past: bool) -> None:
    assert is_past_form(name) == past


def test_every_room_says_what_it_is() -> None:
    assert not [name for name, path in sources().items() if name != "__main__" and not ast.get_docstring(tree(path))]

"""Every command and every field that a message names can be typed as it stands.

All texts of the package are looked through, docstrings left out. What an f-string puts in reads X. A command stands in
backticks, or goes on to the end of its sentence; `--set` stands inside a command, or is meant for the one just given.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from halfbyte.cli import main
from halfbyte.errors import typed
from halfbyte.recipe.schema import SECTIONS

SOURCE = Path(main.__file__).parents[1]
APP: Any = typer.main.get_command(main.app)
UsageError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "UsageError")  # typer may bring its click
COMMAND = re.compile(r"(?<![\w/.-])halfbyte ((?:[a-z]+)\b(?:(?!   halfbyte )[^`;\n])*)")  # to the next one in a line
SET = re.compile(r"--set '?([a-z_.]+)=")
# Commands that take no `--set`: what they say must not ask for one.
WITHOUT_SET = {
    "import", "studio", "report", "compare", "runs", "push", "version",
    "store list", "store verify", "store gc",
}  # fmt: skip


def text_of(node: ast.AST) -> str | None:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(v.value if isinstance(v, ast.Constant) else "X" for v in node.values)
    return None


def texts() -> Iterator[tuple[str, str]]:
    """(where, text) of every literal, docstrings and the parts of f-strings left out."""
    for path in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        skipped = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        skipped |= {
            id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)
        }
        for node in ast.walk(tree):
            text = text_of(node)
            if text is not None and id(node) not in skipped:
                yield f"{path.relative_to(SOURCE)}:{node.lineno}", text  # type: ignore[attr-defined]


def commands(text: str) -> Iterator[str]:
    for match in COMMAND.finditer(text):
        typed = re.split(r", (?!then)|   or   | #|  +|\)|\.$", match[1])[0]
        if typed.split()[0] in APP.commands:
            yield typed.strip()


def parse(typed: str) -> str:
    """Parse a command line as click does, and run nothing; the name of the command."""
    words, command, name = shlex.split(typed), APP, ""
    while hasattr(command, "commands"):
        word = words.pop(0)
        command, name = command.commands[word], f"{name} {word}".strip()
    command.make_context(name, [word for word in words if word != "[...]"])
    return name


def untyped(node: ast.JoinedStr) -> list[str]:
    """What an f-string puts into a command as it is: a path with a space would fall apart in a shell."""
    before, found = "", []
    for value in node.values:
        if isinstance(value, ast.Constant):
            before += str(value.value)
            continue
        shown = ast.unparse(value.value)  # type: ignore[attr-defined]
        inside = re.search(r"(?<![\w/.-])halfbyte ([a-z]+)\b(?:[^`;\n,]|X)*$", before)
        if (
            inside
            and inside[1] in APP.commands
            and not shown.startswith("typed(")
            and not before.endswith(("=", "--set train."))
        ):
            found.append(shown)
        before += "X"
    return found


FOUND = [(where, typed) for where, text in texts() for typed in commands(text)]


def test_there_are_commands_in_messages() -> None:
    assert len(FOUND) >= 20 and len({typed.split()[0] for _, typed in FOUND}) >= 6


@pytest.mark.parametrize(("where", "typed"), FOUND, ids=[f"{where} {typed}" for where, typed in FOUND])
def test_a_command_in_a_message_can_be_typed(where: str, typed: str) -> None:
    try:
        name = parse(typed)
    except UsageError as error:
        pytest.fail(f"{where}: halfbyte {typed}: {error.format_message()}")
    assert name not in WITHOUT_SET or "--set" not in typed


def test_what_is_put_into_a_command_can_be_pasted() -> None:
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found += [f"{path.relative_to(SOURCE)}:{node.lineno} {{{name}}}" for name in untyped(node)]
    assert not found


def test_what_is_put_into_a_command_as_it_is_is_seen() -> None:
    tree = ast.parse("f'halfbyte eval {run} --data {typed(rows)}'; f'of {n} rows: halfbyte chat {typed(run)}'")
    assert [untyped(node) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)] == [["run"], []]
    assert typed("runs/my run") == "'runs/my run'" and typed(Path("runs/a")) == "runs/a"


def test_every_command_that_is_told_to_set_can_set() -> None:
    """A message is seen under any command that opens a model or reads rows: all of these take `--set`."""

    def leaves(group: Any, name: str = "") -> Iterator[tuple[str, Any]]:
        if not hasattr(group, "commands"):
            yield name, group
            return
        for word, command in group.commands.items():
            yield from leaves(command, f"{name} {word}".strip())

    without = {name for name, command in leaves(APP) if not any("--set" in p.opts for p in command.params)}
    assert without == WITHOUT_SET


def test_what_messages_tell_to_set_is_a_field() -> None:
    fields = {f"{section}.{name}" if section else name for section, m in SECTIONS.items() for name in m.model_fields}
    told = [(where, name) for where, text in texts() for name in SET.findall(text) if name not in ("a.b",)]
    assert len(told) >= 6
    assert not [(where, name) for where, name in told if name not in fields]


@pytest.mark.parametrize("typed", ["generate runs/a", "train --resume --what", "eval", "train a b c", "store list X"])
def test_the_check_sees_what_cannot_be_typed(typed: str) -> None:
    with pytest.raises(UsageError):
        parse(typed)


def test_each_of_several_commands_in_a_line_is_seen() -> None:
    line = "next: halfbyte data check X   then   halfbyte train X   or   halfbyte chat X"
    assert list(commands(line)) == ["data check X", "train X", "chat X"]

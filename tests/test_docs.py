"""The pages: what they link to exists, what they name in the code exists, and the README's figures are claims."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
CLAIMS = ROOT / "docs" / "claims.md"
GLOSSARY = ROOT / "docs" / "glossary.md"
MAX_WORDS_OF_THE_GLOSSARY = 40
FIGURE = re.compile(r"\d[\d.,]* of \d[\d,]*|\d+\.\d+(?:, \d+\.\d+)*(?: and \d+\.\d+)? times|\d+\.\d+ GB")
ROOTS = ("src", "tests", "tools", "benchmarks", "examples")
# Files of other programs.
OTHERS = (
    "peft/", "transformers/", "bitsandbytes/", "torch/", "accelerate/", "numba/", "lm_eval/", "vllm/", "backends/",
    "core_model_loading.py", "conversion_mapping.py", "modeling_rope_utils.py", "variants.py", "convert_hf_to_gguf.py",
)  # fmt: skip
# These tell of a day, or of every version: what they name need not be there any more.
HISTORY = ("CHANGELOG.md", "docs/log/")


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def text_of(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def links(text: str) -> Iterator[str]:
    """Targets of links and pictures."""
    yield from re.findall(r"\]\(([^)\s]+)\)", text)
    yield from re.findall(r"<img src=\"([^\"]+)\"", text)


def anchors(text: str) -> set[str]:
    """What each heading is linked by, as GitHub makes it."""
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in re.findall(r"^#+ +(.+?)\s*$", text, re.MULTILINE))
    return {heading.replace(" ", "-") for heading in plain}


def broken(page: Path, text: str) -> list[str]:
    """Links of this page's text that lead to no file, or to no heading of it."""
    wrong = []
    for link in links(text):
        place, _, anchor = link.partition("#")
        target = page if not place else (page.parent / place).resolve()
        if re.match(r"\w+:", link):
            continue
        if not target.exists() or (anchor and anchor not in anchors(text_of(target))):
            wrong.append(link)
    return wrong


def tables(page: Path) -> Iterator[list[str]]:
    """The cells of each row of a table, without the headings'."""
    lines = page.read_text(encoding="utf-8").splitlines()
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("| ") and not line.startswith("| ---") and not after.startswith("| ---"):
            yield [cell.strip() for cell in line.strip("| ").split(" | ")]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken(page, text_of(page)) == []


def test_the_search_for_broken_links_finds_them() -> None:
    text = "# A b's\n[a](README.md) [b](nothing.md) [c](#a-bs) [d](README.md#nothing) [e](https://x.y/z)"
    text += '\n<img src="no.png">'
    assert broken(ROOT / "README.md", text) == ["nothing.md", "#a-bs", "README.md#nothing", "no.png"]
    assert anchors(text) == {"a-bs"}


def test_figures_of_the_readme_are_claims_with_their_commands() -> None:
    claims = list(tables(CLAIMS))
    rows = [row for row in tables(ROOT / "README.md") if FIGURE.search(row[1])]
    assert len(rows) == 5
    for _, figure, command in rows:
        assert any(figure in claim[1] and command in claim[2] for claim in claims), figure
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    known = CLAIMS.read_text(encoding="utf-8")
    assert not [figure for figure in FIGURE.findall(page) if figure not in known]


def test_each_claim_stands_there_once_with_a_figure_a_command_and_a_day() -> None:
    claims = list(tables(CLAIMS))
    assert all(len(claim) == 4 and all(claim) for claim in claims)
    assert not [claim for claim in claims if not re.match(r"\d{4}-\d\d-\d\d, \w", claim[3])]
    assert not [what for what, count in Counter(claim[0] for claim in claims).items() if count > 1]
    assert not [figure for figure, count in Counter(f"{c[1]}; {c[2]}" for c in claims).items() if count > 1]


def test_what_a_claims_command_runs_is_there() -> None:
    commands = [command for claim in tables(CLAIMS) for command in re.findall(r"`([^`]+)`", claim[2])]
    words = [word for command in commands for word in command.split()]
    paths = [word for word in words if word.startswith(("tests/", "benchmarks/", "examples/", ".ci/"))]
    paths += [word.replace(".", "/") + ".py" for word in words if word.startswith("tests.")]
    assert len(paths) > 30
    assert not [path for path in paths if not (ROOT / path).exists()]


def files_named(text: str) -> set[str]:
    """Python files in backticks, and folders that begin with a room's, without those of other programs."""
    named = re.findall(r"`((?:\w+/)*\w+\.py|(?:\w+/)+)`", text)
    named += re.findall(r"\b((?:tests|benchmarks|tools|examples)/[\w/]+\.(?:py|sh|yaml))\b", text)
    rooms = {folder.name for folder in (ROOT / "src" / "halfbyte").iterdir() if folder.is_dir()}
    return {
        path
        for path in named
        if not path.startswith(OTHERS) and (path.endswith((".py", ".sh", ".yaml")) or path.split("/")[0] in rooms)
    }


@cache
def files() -> tuple[str, ...]:
    return tuple(path.as_posix() for root in ROOTS for path in (ROOT / root).rglob("*.py"))


def is_there(file: str) -> bool:
    """Whether some path of the repository ends in `file`."""
    folders = (ROOT, ROOT / "src" / "halfbyte")
    return any((folder / file).exists() for folder in folders) or any(path.endswith(f"/{file}") for path in files())


@pytest.mark.parametrize("page", [page for page in PAGES if not name(page).startswith(HISTORY)], ids=name)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    assert not [file for file in files_named(page.read_text(encoding="utf-8")) if not is_there(file)]


def test_files_that_the_source_names_are_there() -> None:
    source = ROOT / "src" / "halfbyte"
    assert not [
        f"{name(path)} names {file}"
        for path in sorted(source.rglob("*.py"))
        for file in sorted(files_named(path.read_text(encoding="utf-8")))
        if file.endswith(".py") and not is_there(file)
    ]


def test_the_search_for_files_named_sees_them() -> None:
    text = "`plan/none.py`, `peft/a.py`, `plan/`, `x/`, none.py, `pytest tests/none.py -s`"
    assert files_named(text) == {"plan/none.py", "plan/", "tests/none.py"}
    assert is_there("choose.py") and is_there("plan/") and is_there("tests/test_docs.py")
    assert not is_there("plan/none.py") and not is_there("none/")


def test_the_glossary_is_short_and_in_order() -> None:
    words = re.findall(r"^- \*\*(.+?)\*\*", GLOSSARY.read_text(encoding="utf-8"), re.MULTILINE)
    assert 0 < len(words) <= MAX_WORDS_OF_THE_GLOSSARY
    assert words == sorted(words, key=str.lower)

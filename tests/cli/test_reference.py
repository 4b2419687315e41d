"""The generated pages are those that the code would write now."""

from __future__ import annotations

from pathlib import Path

import pytest
from tools import reference

from halfbyte.recipe import fields
from halfbyte.recipe.schema import SECTIONS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", list(reference.PAGES))
def test_a_generated_page_is_up_to_date(name: str) -> None:
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == reference.PAGES[name](), "run `make docs`"


def test_check_says_what_is_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reference, "PAGES", {"a.md": lambda: "new"})
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("old")
    assert reference.main(["--check"]) == 1
    assert capsys.readouterr().out == "docs: a.md out of date\n"
    assert reference.main([]) == 0
    assert (tmp_path / "docs" / "a.md").read_text() == "new"
    assert reference.main(["--check"]) == 0


@pytest.mark.parametrize(("section", "refused"), [("lora", fields.LORA_REFUSED), ("train", fields.TRAIN_REFUSED)])
def test_the_tables_have_every_field(section: str, refused: dict[str, str]) -> None:
    names = SECTIONS[section].model_fields
    lines = reference.fields_table(section).splitlines()
    assert [line.split("`")[1] for line in lines[2:]] == list(names)
    assert all(line.count(" | ") == 3 for line in lines)
    told = {name: why for cell, why in reference.refused(refused) for name in cell.strip("`").split("`, `")}
    assert told == refused


def test_a_field_of_our_own_is_marked() -> None:
    assert "`save_minutes` (halfbyte's own)" in reference.fields_table("train")
    assert "`r` |" in reference.fields_table("lora")

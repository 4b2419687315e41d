"""The generated pages are those that the code would write now."""

from __future__ import annotations

from pathlib import Path

import pytest

from halfbyte import docs

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", list(docs.PAGES))
def test_a_generated_page_is_up_to_date(name: str) -> None:
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == docs.PAGES[name](), "run `make docs`"


def test_check_says_what_is_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(docs, "PAGES", {"a.md": lambda: "new"})
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("old")
    assert docs.main(["--check"]) == 1
    assert capsys.readouterr().out == "docs: a.md out of date\n"
    assert docs.main([]) == 0
    assert (tmp_path / "docs" / "a.md").read_text() == "new"
    assert docs.main(["--check"]) == 0

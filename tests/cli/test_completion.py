"""The shell completes commands and options: `halfbyte --install-completion` writes what asks this."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from halfbyte.cli.main import app


@pytest.mark.parametrize(("typed", "word"), [("halfbyte stu", "studio"), ("halfbyte data ch", "check")])
def test_a_word_is_completed(typed: str, word: str) -> None:
    asked = {"_HALFBYTE_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    assert CliRunner().invoke(app, [], prog_name="halfbyte", env=asked).output.split() == [word]

"""The shell completes commands and options: `halfbyte --install-completion` writes what asks this."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from halfbyte.cli.main import app
from tests import scripts


@pytest.mark.parametrize(
    ("typed", "word"),
    [("halfbyte stu", "studio"), ("halfbyte data ch", "check"), ("halfbyte init --for st", "style"),
     ("halfbyte train --dry", "--dry-run")],
)  # fmt: skip
def test_a_word_is_completed(typed: str, word: str) -> None:
    asked = {"_HALFBYTE_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    assert CliRunner().invoke(app, [], prog_name="halfbyte", env=asked).output.split() == [word]


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_completes_by_the_script_that_is_shown(tmp_path: Path) -> None:
    """The script itself, in a bash: what `--install-completion` writes into its start files."""
    scripts.write(tmp_path / "halfbyte", "from halfbyte.cli.main import app\napp(prog_name='halfbyte')\n")
    script = f"""
    PATH={tmp_path}:$PATH
    eval "$(_HALFBYTE_COMPLETE=source_bash halfbyte)"
    COMP_WORDS=(halfbyte stu) COMP_CWORD=1
    _halfbyte_completion halfbyte; echo "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "studio", done.stderr

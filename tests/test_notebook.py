"""The notebook of the examples, executed whole: three steps instead of sixty."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
def test_the_notebook_goes_from_a_file_to_scores(tmp_path: Path) -> None:
    pytest.importorskip("nbconvert")
    pytest.importorskip("ipykernel")
    shutil.copytree(EXAMPLES / "orders", tmp_path / "orders")
    text = (EXAMPLES / "first.ipynb").read_text(encoding="utf-8")
    assert "steps = 60 " in text
    (tmp_path / "first.ipynb").write_text(text.replace("steps = 60 ", "steps = 3 "), encoding="utf-8")
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--output", "done.ipynb"]
    command.append("--ExecutePreprocessor.timeout=1200")
    subprocess.run([*command, "first.ipynb"], check=True, capture_output=True, cwd=tmp_path)
    cells = [cell for cell in json.loads((tmp_path / "done.ipynb").read_text())["cells"] if cell["cell_type"] == "code"]
    shown = ["".join("".join(output.get("text", "")) for output in cell["outputs"]) for cell in cells]
    assert "error:" not in "".join(shown)
    for text, words in zip(shown, ("halfbyte", "⟦", "memory", "step 3/3", "", "difference"), strict=True):
        assert words in text
    assert "verdict" in shown[3] and (tmp_path / "runs" / "first" / "adapter").is_dir()

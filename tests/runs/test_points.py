"""points.py: where a run goes on, from checkpoints written here by hand."""

import hashlib
import json
from pathlib import Path

import pytest

from halfbyte.errors import RunError
from halfbyte.runs import points
from halfbyte.system import files


def _checkpoint(folder: Path, step: int, content: bytes) -> Path:
    path = folder / f"step-{step:06}"
    path.mkdir(parents=True)
    (path / "weights").write_bytes(content)
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    trained = {"recipe": {"lora.r": step}, "rows": {}}
    (path / "manifest.json").write_text(json.dumps({"format": 1, "files": {"weights": entry}, "trained": trained}))
    return path


def test_the_newest_whole_checkpoint_is_taken_and_what_is_damaged_is_named(tmp_path: Path) -> None:
    for step, content in ((4, b"four"), (12, b"twelve"), (30, b"thirty")):
        _checkpoint(tmp_path, step, content)
    assert points.newest(tmp_path).step == 30
    (tmp_path / "step-000030" / "weights").write_bytes(b"thirtz")  # of the same size
    (tmp_path / "step-000012" / "weights").unlink()
    point = points.newest(tmp_path)
    assert (point.step, point.trained) == (4, {"recipe": {"lora.r": 4}, "rows": {}})
    assert point.passed_over == ("step-000030 (weights has another sha256)", "step-000012 (weights is missing)")
    (tmp_path / "step-000004" / "manifest.json").write_text("{")
    with pytest.raises(RunError, match=r"only damaged ones: step-000004 \(manifest\.json cannot be read\)"):
        points.newest(tmp_path)


def test_a_file_is_hashed_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _checkpoint(tmp_path, 3, b"three")
    hashed, hash_of = list[Path](), files.sha256
    monkeypatch.setattr(files, "sha256", lambda file: hashed.append(file) or hash_of(file))
    for _ in range(3):
        assert points.newest(tmp_path).step == 3
    assert hashed == [path / "weights"]
    (path / "weights").write_bytes(b"throe")
    with pytest.raises(RunError, match="damaged"):
        points.newest(tmp_path)
    assert len(hashed) == 2

"""halfbyte in this process, in a folder that has a tiny model."""

from pathlib import Path

import pytest

from tests import in_process, tiny_run
from tests.in_process import Cli


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.checkpoint(tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture
def halfbyte(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: Path) -> Cli:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(model)
    return in_process.runner(tmp_path, capsys)

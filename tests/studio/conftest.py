"""What the tests in a browser share."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serving.http.test_page import CHROMIUM
from tests.studio import driven


@pytest.fixture(scope="session")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """axe-core's script, from npm; empty where there is none."""
    folder = tmp_path_factory.mktemp("axe")
    if shutil.which("npm") is None:
        return ""
    packed = subprocess.run(["npm", "pack", "axe-core@4"], cwd=folder, capture_output=True, check=False)
    if packed.returncode:
        return ""
    shutil.unpack_archive(next(folder.glob("*.tgz")), folder)
    return (folder / "package" / "axe.min.js").read_text()


@pytest.fixture
def opened() -> Iterator[Any]:
    """A browser."""
    with driven.browser(CHROMIUM) as chromium:
        yield chromium


@pytest.fixture
def page(opened: Any, server: driven.Server) -> Any:
    """A tab at the module's `server`."""
    return driven.page_of(opened, server)

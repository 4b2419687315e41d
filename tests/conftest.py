"""For every test: bitsandbytes as it is, so that what it quantises is a reference that does not come from us; and a
cache of its own, where stores are built, with the conversions of packaged models that the user's cache has already.
"""

from __future__ import annotations

import atexit
import gc
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import pytest

os.environ["HALFBYTE_BNB_KERNEL"] = "0"

_users = Path(os.environ.get("HALFBYTE_CACHE") or Path.home() / ".cache" / "halfbyte")
_cache = Path(tempfile.mkdtemp(prefix="halfbyte-tests-"))
atexit.register(shutil.rmtree, _cache, ignore_errors=True)
for _kept in ("gguf", "packaged"):
    (_users / _kept).mkdir(parents=True, exist_ok=True)
    (_cache / _kept).symlink_to(_users / _kept)
os.environ["HALFBYTE_CACHE"] = str(_cache)


@pytest.fixture(scope="session", autouse=True)
def _short_base_text() -> Iterator[None]:
    """Each run reads the text of the base's kind, as do its base and its source: its three shortest parts will do, but
    in tests that ask for `whole_base_text`."""
    from halfbyte.data import base_text

    short = _cache / base_text.FILE.name
    parts = sorted(base_text.FILE.read_text("utf-8").split("\n\n"), key=len)
    short.write_text("\n\n".join(parts[:3]), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base_text, "FILE", short)
        yield


@pytest.fixture(scope="session", autouse=True)
def _code_stays() -> Iterator[None]:
    """A run lets the code of libraries go, twice, and reads it again: in a process of many tests that is time alone.
    `tests/system/test_pages.py` and every run in a process of its own do it."""
    with pytest.MonkeyPatch.context() as patch:
        if pace := sys.modules.get("halfbyte.training.pace"):
            patch.setattr(pace, "pages", SimpleNamespace(release_code=lambda: None))
        yield


@pytest.fixture(scope="module", autouse=True)
def _imports_stay() -> None:
    """As at the start: the collector need not go through what the last modules have imported."""
    if len(sys.modules) > _frozen[0] + 50:
        _freeze()


@pytest.fixture
def whole_base_text(monkeypatch: pytest.MonkeyPatch) -> None:
    from halfbyte.data import base_text

    monkeypatch.setattr(base_text, "FILE", resources.files(base_text.__package__).joinpath(base_text.FILE.name))


@pytest.fixture
def forked_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children of ours, which convert a GGUF file or look at what was exported, are forked: it saves their imports.
    `tests/models/sources` and `tests/proofs/test_export.py` start them as a user does."""
    from halfbyte.models.sources import gguf_file
    from halfbyte.system import children
    from tests import forked

    monkeypatch.setattr(children, "subprocess", SimpleNamespace(run=forked.run))
    monkeypatch.setattr(gguf_file, "subprocess", SimpleNamespace(Popen=forked.Popen, PIPE=-1))


_SLOW = [line for line in (Path(__file__).parent / "slow.txt").read_text().splitlines() if not line.startswith("#")]
_is_slow = re.compile("|".join(re.escape(line).replace(r"\*", ".*") for line in _SLOW)).fullmatch


_frozen = [0]


def _freeze() -> None:
    gc.collect()
    gc.freeze()
    _frozen[0] = len(sys.modules)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _is_slow(item.nodeid):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fake cards are registered before the first backward of the process: autograd counts devices then, and once. What
    is there by now stays: the collector, which each run of the trainer asks for, need not go through it again."""
    modules = {item.module.__name__: item.module for item in session.items if isinstance(item, pytest.Function)}
    for module in modules.values():
        if (fake_card := getattr(module, "fake_card", None)) is not None:
            fake_card.device()
            break
    _freeze()

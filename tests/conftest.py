"""For every test: bitsandbytes as it is, so that what it quantises is a reference that does not come from us; and a
cache of its own, where stores are built, with the conversions of packaged models that the user's cache has already.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest

os.environ["HALFBYTE_BNB_KERNEL"] = "0"

_users = Path(os.environ.get("HALFBYTE_CACHE") or Path.home() / ".cache" / "halfbyte")
_cache = Path(tempfile.mkdtemp(prefix="halfbyte-tests-"))
atexit.register(shutil.rmtree, _cache, ignore_errors=True)
for _kept in ("gguf", "packaged"):
    (_users / _kept).mkdir(parents=True, exist_ok=True)
    (_cache / _kept).symlink_to(_users / _kept)
os.environ["HALFBYTE_CACHE"] = str(_cache)


_SLOW = [line for line in (Path(__file__).parent / "slow.txt").read_text().splitlines() if not line.startswith("#")]
_is_slow = re.compile("|".join(re.escape(line).replace(r"\*", ".*") for line in _SLOW)).fullmatch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _is_slow(item.nodeid):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fake cards are registered before the first backward of the process: autograd counts devices then, and once."""
    modules = {item.module.__name__: item.module for item in session.items if isinstance(item, pytest.Function)}
    for module in modules.values():
        if (fake_card := getattr(module, "fake_card", None)) is not None:
            fake_card.device()
            break

"""For every test: bitsandbytes as it is, so that what it quantises is a reference that does not come from us; and a
cache of its own, where stores are built, with the conversions of packaged models that the user's cache has already.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

os.environ["HALFBYTE_BNB_KERNEL"] = "0"

_users = Path(os.environ.get("HALFBYTE_CACHE") or Path.home() / ".cache" / "halfbyte")
_cache = Path(tempfile.mkdtemp(prefix="halfbyte-tests-"))
atexit.register(shutil.rmtree, _cache, ignore_errors=True)
for _kept in ("gguf", "packaged"):
    (_users / _kept).mkdir(parents=True, exist_ok=True)
    (_cache / _kept).symlink_to(_users / _kept)
os.environ["HALFBYTE_CACHE"] = str(_cache)

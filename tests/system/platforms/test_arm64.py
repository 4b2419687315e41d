"""arm64 under qemu-user: `tests/arm64.sh`, where there are root, qemu and mmdebstrap."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.platforms import without

ROOT = Path(__file__).parents[3]
MISSING = [name for name in ("qemu-aarch64", "mmdebstrap") if shutil.which(name) is None]


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING) or os.name != "posix" or os.geteuid() != 0, reason=f"needs root; missing: {MISSING}")
def test_arm64_learns_what_this_machine_learns(tmp_path: Path) -> None:
    folder = os.environ.get("HALFBYTE_ARM64", str(tmp_path / "arm64"))
    command = ["bash", str(ROOT / "tests" / "arm64.sh"), folder]
    done = subprocess.run(command, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    there = next(json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"losses"'))
    here = without.work(tmp_path / "here")
    assert there["losses"] == pytest.approx(here["losses"], rel=1e-4)
    assert there["resumed"] == there["losses"][2:]

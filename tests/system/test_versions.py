"""versions.py: what is installed is named without being imported."""

from __future__ import annotations

import subprocess
import sys

from halfbyte.system.versions import version, versions


def test_versions_name_what_is_installed_without_importing_it() -> None:
    code = (
        "import sys; from halfbyte.system.versions import versions; print(versions()['torch'], 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    installed = versions()
    assert out == [installed["torch"], "False"]
    assert {"python", "halfbyte", "transformers", "peft", "bitsandbytes"} <= set(installed)
    assert all(installed.values())
    assert version("no-such-library") == ""

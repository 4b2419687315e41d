"""Reading and planning never need torch."""

from __future__ import annotations

import subprocess
import sys


def test_only_collate_imports_torch() -> None:
    code = (
        "import sys, halfbyte.data.read, halfbyte.data.render, halfbyte.data.template, halfbyte.data.pack; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

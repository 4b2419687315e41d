"""Reading and planning never need torch."""

from __future__ import annotations

import subprocess
import sys


def test_only_collate_imports_torch() -> None:
    code = (
        "import sys, halfbyte.data.reading.read, halfbyte.data.pack; "
        "import halfbyte.data.encoding.render, halfbyte.data.encoding.encoder; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Fine-tune SmolLM2-135M on the example orders, then show base and adapter side by side. `make quickstart` runs this.

Each step is a command that you can run yourself; this file only says which, and how long they took.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
HALFBYTE = Path(sys.executable).with_name("halfbyte")


def run(*arguments: str) -> None:
    print(f"\n$ halfbyte {' '.join(arguments)}", flush=True)
    done = subprocess.run([HALFBYTE, *arguments])
    if done.returncode:
        sys.exit(done.returncode)


def free_name(parent: Path) -> Path:
    """A run folder is never overwritten: quickstart, quickstart-2, ..."""
    names = ["quickstart", *(f"quickstart-{i}" for i in range(2, 1000))]
    return next(parent / name for name in names if not (parent / name).exists())


def main() -> None:
    start = time.monotonic()
    out = free_name(Path("runs"))
    recipe = os.path.relpath(HERE / "recipe.yaml")
    run("train", recipe, "--output", str(out))
    run("eval", str(out), "--base", "--limit", "48", "--samples", "3", "--max-new-tokens", "64")
    print(f"\n{time.monotonic() - start:.0f} s in all. Talk to it: {os.path.relpath(HALFBYTE)} chat {out}")


if __name__ == "__main__":
    main()

"""Fine-tune SmolLM2-135M on the example orders, then show base and adapter side by side. `make quickstart` runs this.

    python examples/orders/quickstart.py rewards     # 20 short steps, then on by rewards; both scored

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
FIRST, SHORT = Path("runs/orders-20"), ("--set", "train.max_steps=20", "--set", "train.learning_rate=5e-4")


def run(*arguments: str) -> None:
    print(f"\n$ {os.path.relpath(HALFBYTE)} {' '.join(arguments)}", flush=True)
    with subprocess.Popen([HALFBYTE, *arguments]) as command:
        while (
            code := ended(command)
        ) is None:  # Ctrl-C reaches the command too, which ends by itself when it has saved
            pass
    if code:
        sys.exit(code if code > 0 else 128 - code)


def ended(command: subprocess.Popen[bytes]) -> int | None:
    """How a command ended; None where Ctrl-C came first."""
    try:
        return command.wait()
    except KeyboardInterrupt:
        return None


def folder_in(parent: Path) -> tuple[Path, bool]:
    """A run folder is never overwritten: quickstart, quickstart-2, ... and whether it is one that was interrupted."""
    for name in ("quickstart", *(f"quickstart-{i}" for i in range(2, 1000))):
        path = parent / name
        if not path.exists():
            return path, False
        if not (path / "adapter").exists() and any((path / "checkpoints").glob("step-*")):
            return path, True
    raise SystemExit(f"{parent} is full of quickstarts")


def rewards() -> None:
    """An adapter that reads about half of an order, and what rewards make of it; each trained unless it is there."""
    for out, recipe, more in ((FIRST, "recipe.yaml", SHORT), (FIRST.with_name("orders-rewards"), "rewards.yaml", ())):
        if out.exists():
            run("train", str(out), "--resume")
        else:
            run("train", os.path.relpath(HERE / recipe), *more, "--output", str(out))
        run("eval", str(out), "--metric", "json_fields", "--metric", "exact_match", "--max-new-tokens", "96")


def main() -> None:
    start = time.monotonic()
    if sys.argv[1:] == ["rewards"]:
        rewards()
        print(f"\n{time.monotonic() - start:.0f} s in all")
        return
    out, interrupted = folder_in(Path("runs"))
    recipe = os.path.relpath(HERE / "recipe.yaml")
    run("train", str(out), "--resume") if interrupted else run("train", recipe, "--output", str(out))
    run("eval", str(out), "--base", "--limit", "48", "--samples", "3", "--max-new-tokens", "64")
    print(f"\n{time.monotonic() - start:.0f} s in all. Talk to it: {os.path.relpath(HALFBYTE)} chat {out}")


if __name__ == "__main__":
    main()

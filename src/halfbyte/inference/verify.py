"""`halfbyte verify RUN`: every hash of a run, and whether its adapter still says what it said when it was trained.

Cost: reading the run's files and its base's store once (1 GB/s), and opening the base.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from halfbyte.base.store import manifest, supply
from halfbyte.errors import HalfbyteError
from halfbyte.inference.load import open_run
from halfbyte.models.gguf import blocks
from halfbyte.plan import Plan
from halfbyte.proofs.adapter import compare_logits
from halfbyte.runs import points
from halfbyte.runs.folder import VERIFIED_FROM_S, RunFolder
from halfbyte.system import device
from halfbyte.types import Check, Document

LIMIT_S = 60.0  # opening a base and looking at three rows takes some seconds


@dataclass(frozen=True)
class Verified:
    run: Path
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def to_json(self) -> Document:
        return {"run": str(self.run), "ok": self.ok, "checks": [asdict(check) for check in self.checks]}


def verify(path: Path, overrides: Sequence[str] = (), *, hashes: bool = True) -> Verified:
    """Check a finished run. `hashes`: also of every checkpoint and of the base's store; else only what the adapter
    says. Raises RunError: there is no finished run. Whatever else is wrong is among the checks."""
    run = RunFolder.open(path)
    checks = [*_files(run)] if hashes else []
    built = list[str]()
    try:
        # compares adapter, base, tokenizer and template with the passport
        opened = open_run(path, supply.Tell(note=lambda _, text: built.append(text)), overrides)
        checks.append(Check("passport", True, "adapter, base, quantiser, tokenizer and template are its own"))
        if hashes and opened.store is not None:
            wrong = manifest.problems(opened.store, manifest.read(opened.store), full=True)
            damage = "".join(f" ({text})" for text in built if text.startswith(supply.DAMAGED))
            checks.append(Check("base", not wrong, "; ".join(wrong) or f"every byte of {opened.store}{damage}"))
        if hashes and opened.base is not None and (parts := opened.base.checkpoint.blocks):
            in_file = blocks.read(opened.base.checkpoint.path)
            wrong = blocks.problems(in_file, parts) if in_file is not None else []
            checks.append(Check("base", not wrong, "; ".join(wrong) or f"every byte of {parts[0]}"))
        if run.proof.is_file():
            same = compare_logits(run.proof, opened.model)
            checks.append(Check("adapter", same.ok, str(same)))
        else:
            checks.append(Check("adapter", True, f"not compared: the run has no {run.proof.name}"))
    except HalfbyteError as error:
        checks.append(Check("adapter", False, error.message))
    return Verified(path, tuple(checks))


def after(path: Path, run_s: float, plan: Plan, machine: device.Device) -> Document:
    """What a process of its own sees of an adapter that was just saved: `ok` (None where it did not look), `seen`. A
    run of less than a minute, or one that leaves no memory for a second process, is left to `halfbyte verify`."""
    if run_s < VERIFIED_FROM_S:
        return {"ok": None, "seen": f"not asked of a run of less than {VERIFIED_FROM_S:.0f} s"}
    if machine.on_card or device.ram_available() < plan.private_bytes:
        return {"ok": None, "seen": "not asked: too little memory is left for a second process"}
    command, limit = [sys.executable, "-m", "halfbyte", "verify", str(path)], max(run_s, LIMIT_S)
    try:
        done = subprocess.run(
            [*command, "--quick", "--json"], capture_output=True, text=True, timeout=limit, check=False
        )
        document = json.loads(done.stdout)
        if "error" in document:
            return {"ok": None, "seen": f"not seen: {document['error']['message']}"}
        (check,) = (c for c in document["checks"] if c["what"] == "adapter")
        return {"ok": check["ok"], "seen": check["seen"]}
    except subprocess.TimeoutExpired:
        return {"ok": None, "seen": f"not seen: it took more than {limit:.0f} s"}
    except (OSError, ValueError, KeyError, TypeError) as error:  # it did not start, or has no document
        return {"ok": None, "seen": f"not seen: the second process ended without a word ({type(error).__name__})"}


def _files(run: RunFolder) -> list[Check]:
    checks = []
    for path in points.every(run.checkpoints):
        damage = points.damage(path, hashes=True)
        checks.append(Check(path.name, damage is None, damage or "whole"))
    try:
        rows = run.read_metrics()
        checks.append(Check("metrics", bool(rows), f"{len(rows):,} rows"))
    except HalfbyteError as error:
        checks.append(Check("metrics", False, error.message))
    return checks

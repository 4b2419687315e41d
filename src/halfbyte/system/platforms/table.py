"""The platforms people have, a row each in `table.toml`: what runs, how that is known, what is slow, how to install.

One list: `docs/machines.md` prints it, and `halfbyte doctor` prints the row of the machine that it runs on.
"""

import platform
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_ARCHITECTURES = {"x86_64": "x86", "amd64": "x86", "aarch64": "arm", "arm64": "arm"}


@dataclass(frozen=True)
class Platform:
    """One row. `executed`: real (on such a machine), emulated, limited (instructions taken away), fake (a stand-in for
    the device), by removal (calls taken away), or never. `when`: what has to be so
    of a machine; of `isa` it has one flag."""

    name: str
    runs: str
    executed: str
    slow: str
    install: str
    when: Mapping[str, object]
    isa: Sequence[str] = ()

    def to_json(self) -> dict[str, str]:
        """What is told of it, by column."""
        return {"platform": self.name, **{n: getattr(self, n) for n in ("runs", "executed", "slow", "install")}}


PLATFORMS = tuple(
    Platform(**row)
    for row in tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))["platform"]
)


def here(
    kind: str, cards: Sequence[tuple[str, bool]], isa: tuple[str, ...], *, system: str = "", architecture: str = ""
) -> Platform:
    """The row of a machine, this one if no system is named. cards: name of each, and whether it multiplies bf16."""
    machine = architecture or platform.machine()
    facts = {
        "system": system or sys.platform, "architecture": _ARCHITECTURES.get(machine.lower(), machine),
        "kind": kind, "card": kind != "cpu", "bf16": all(bf16 for _, bf16 in cards),
        "amd": any(word in name.lower() for name, _ in cards for word in ("amd", "radeon", "instinct")),
    }  # fmt: skip
    fitting = (row for row in PLATFORMS if all(facts[name] == value for name, value in row.when.items()))
    return next(row for row in fitting if not row.isa or set(row.isa) & set(isa))

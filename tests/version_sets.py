"""Print pip's constraints for one of the sets of versions that `make test-versions` tests.

Use: `python tests/version_sets.py SET > constraints.txt`; needs nothing but Python. SET is
oldest: the lower bounds of pyproject.toml, `torch>=2.9` as `torch==2.9`;
middle: MIDDLE; newest: no constraint;
prerelease: the pre-release of each of these libraries that is newer than its newest release; nothing if there is none.
"""

import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
MIDDLE = {
    "transformers": "5.17.0",
    "peft": "0.20.0",
    "bitsandbytes": "0.49.2",
    "accelerate": "1.13.0",
    "datasets": "4.8.5",
}
PRERELEASE = re.compile(r"(a|b|rc|dev)\d")


def oldest(requirements: list[str]) -> list[str]:
    """One `name==version` a requirement. ValueError: it does not start with `name>=version`, so it has no oldest."""
    pins = []
    for requirement in requirements:
        bound = re.match(r"([\w.-]+)(?:\[\w+\])?>=([\d.]+)(?:[,;]|$)", requirement)
        if bound is None:
            raise ValueError(f"{requirement}: write it as name>=version in {PYPROJECT.name}")
        pins.append(f"{bound[1]}=={bound[2]}")
    return pins


def prereleases(versions: Callable[[str], list[str]]) -> list[str]:
    """`name==version` of each that has one. `versions`: all of a library, newest first."""
    newest = {library: versions(library)[0] for library in MIDDLE}
    return [f"{library}=={version}" for library, version in newest.items() if PRERELEASE.search(version)]


def on_index(library: str) -> list[str]:
    command = [sys.executable, "-m", "pip", "index", "versions", "--pre", library]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.findall(r"[^\s,]+", text.partition("Available versions:")[2].partition("\n")[0])


def constraints(name: str) -> list[str]:
    if name == "oldest":
        return oldest(tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["dependencies"])
    if name == "middle":
        return [f"{library}=={version}" for library, version in MIDDLE.items()]
    return prereleases(on_index) if name == "prerelease" else []


if __name__ == "__main__":
    sys.stdout.writelines(f"{pin}\n" for pin in constraints(sys.argv[1]))

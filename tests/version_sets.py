"""Print pip's constraints for one of the sets of versions that `make test-versions` tests.

Use: `python tests/version_sets.py SET > constraints.txt`; needs nothing but Python. SET is
oldest: the lower bounds of pyproject.toml, `torch>=2.9` as `torch==2.9`;
middle: MIDDLE; newest: no constraint;
prerelease: the pre-release of each of these libraries that is newer than its newest release; nothing if there is none.
Or `python tests/version_sets.py resolve`: does pip find one environment for halfbyte and the newest release of each of
BESIDE? Asks the network, installs nothing, prints what is chosen; exit code 1 where there is none.
"""

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
MIDDLE = {
    "torch": "2.13.0",
    "transformers": "5.17.0",
    "peft": "0.20.0",
    "bitsandbytes": "0.49.2",
    "accelerate": "1.13.0",
    "datasets": "4.8.5",
}
# What shall go into one environment with halfbyte, each line at once.
BESIDE = (tuple(MIDDLE), ("trl",), ("lm-eval",), ("sentence-transformers",), ("vllm",))
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


def resolved(*arguments: str) -> dict[str, str]:
    """What pip would install into an empty environment: name -> version. ValueError: what pip says where it cannot."""
    asks = ("-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-")
    command = [sys.executable, *asks, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise ValueError(ended.stderr.strip())
    found = (each["metadata"] for each in json.loads(ended.stdout)["install"])
    return {re.sub(r"[-_.]+", "-", each["name"].lower()): each["version"] for each in found}


def resolve(pip: Callable[..., dict[str, str]] = resolved) -> int:
    """Print an environment for each of BESIDE; the exit code."""
    newest = pip("--no-deps", *(name for names in BESIDE for name in names))
    status = 0
    for names in BESIDE:
        pins = [f"{name}=={newest[name]}" for name in names]
        try:
            chosen = pip(str(PYPROJECT.parent), *pins)
            found = ", ".join(f"{name} {chosen[name]}" for name in MIDDLE)
        except ValueError as error:
            found, status = f"none\n{error}", 1
        print(f"beside {', '.join(pins)}: {found}", flush=True)
    return status


if __name__ == "__main__":
    if sys.argv[1] == "resolve":
        sys.exit(resolve())
    sys.stdout.writelines(f"{pin}\n" for pin in constraints(sys.argv[1]))

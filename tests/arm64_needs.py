"""Print what tests/arm64.sh installs: what this environment has of halfbyte's needs, with theirs, at the same versions.

Use: `python tests/arm64_needs.py > needs.txt`, in an environment with halfbyte and its extra `dev`.
"""

import sys
from importlib import metadata

from packaging.requirements import Requirement

TORCH = "torch==2.10.0"
TESTS = ("pytest", "hypothesis", "portalocker")
NOT_THERE = ("torch", "halfbyte", "llama-cpp-py-sync", "triton")  # torch apart; the others are not needed


def needed(names: tuple[str, ...]) -> dict[str, str]:
    """name -> version of these and of all they need, as installed here; extras are left out."""
    versions, waiting = dict[str, str](), list(names)
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in versions or name in NOT_THERE or name.startswith(("nvidia", "cuda")):
            continue
        try:
            has = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # another system's
        versions[name] = has.version
        for text in has.requires or ():
            wanted = Requirement(text)
            if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
                waiting.append(wanted.name)
    return versions


if __name__ == "__main__":
    ours = [Requirement(text) for text in metadata.requires("halfbyte") or ()]
    direct = tuple(each.name for each in ours if each.marker is None)
    torchs = ("filelock", "typing-extensions", "setuptools", "sympy", "networkx", "jinja2", "fsspec")
    lines = [f"{name}=={version}" for name, version in sorted(needed(direct + TESTS + torchs).items())]
    sys.stdout.write("\n".join([*lines, TORCH]) + "\n")

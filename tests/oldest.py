"""Print pip's constraints for the oldest versions that pyproject.toml allows: `torch>=2.9` becomes `torch==2.9`.

Use: `python tests/oldest.py > constraints.txt`; needs nothing but Python. `make test-versions` installs them.
"""

import re
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def oldest(requirements: list[str]) -> list[str]:
    """One `name==version` a requirement. ValueError: it does not start with `name>=version`, so it has no oldest."""
    pins = []
    for requirement in requirements:
        bound = re.match(r"([\w.-]+)(?:\[\w+\])?>=([\d.]+)(?:[,;]|$)", requirement)
        if bound is None:
            raise ValueError(f"{requirement}: write it as name>=version in {PYPROJECT.name}")
        pins.append(f"{bound[1]}=={bound[2]}")
    return pins


if __name__ == "__main__":
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    sys.stdout.write("\n".join(oldest(project["dependencies"])) + "\n")

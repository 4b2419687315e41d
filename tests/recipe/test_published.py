"""Published configs of four tools, fetched for the test and not kept: every field of each is accounted for.

HALFBYTE_PUBLISHED is a folder with clones of axolotl, LLaMA-Factory, mlx-lm, trl and Unsloth's notebooks, as
`git clone --depth 1` leaves them.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
import yaml

from halfbyte.errors import RecipeError
from halfbyte.recipe import peers
from halfbyte.recipe.file import load_recipe

FOLDER = Path(os.environ.get("HALFBYTE_PUBLISHED", "/nowhere"))
PATTERNS = {
    "axolotl": ("*/examples/**/*.yml", "*/examples/**/*.yaml"),
    "llamafactory": ("*/examples/train_*/**/*.yaml", "*/examples/extras/**/*.yaml"),
    "mlx-lm": ("*/mlx_lm/examples/*.yaml",),
    "trl": ("*/nb/*.ipynb", "*/examples/notebooks/*.ipynb"),
}
LEAST = {"axolotl": 15, "llamafactory": 10, "mlx-lm": 1, "trl": 14}
NO_CONFIG = ("is no config of", "cannot be read")


@pytest.mark.slow
@pytest.mark.parametrize("tool", PATTERNS)
def test_every_field_of_published_configs_is_accounted_for(tmp_path: Path, tool: str) -> None:
    files = sorted({f for pattern in PATTERNS[tool] for f in FOLDER.glob(pattern) if f.is_file()})
    if not files:
        pytest.skip("HALFBYTE_PUBLISHED names no folder with clones of these tools")
    seen, fields = Counter[str](), Counter[str]()
    for number, file in enumerate(files):
        try:
            config = peers.read(file)
        except RecipeError as error:
            failed = str(error)
        else:
            failed = ""
        if failed:
            assert any(words in failed for words in NO_CONFIG), (file, failed)
            seen["no config"] += 1
            continue
        if config.tool != tool:
            seen["of another tool"] += 1
            continue
        named = Counter(item.name for item in config.items)
        if file.suffix != ".ipynb":
            for name, value in dict(
                peers.flat_fields(yaml.safe_load(file.read_text(encoding="utf-8")), config.table["fields"])
            ).items():
                of_rows = name in config.table["rows"] and value
                assert named[name] or (of_rows and any(n.startswith(name) for n in named)), (file, name)
        assert all(item.text and item.kind in KINDS for item in config.items), file
        fields.update(item.kind for item in config.items)
        stops = [item for item in config.items if item.kind == "stops"]
        seen[
            "another training" if stops else str(config.values.get("train.method", config.values.get("task", "sft")))
        ] += 1
        if not stops:
            out = tmp_path / f"{number}.yaml"
            out.write_text(config.recipe(file.name))
            load_recipe(out)
    print(tool, dict(seen), dict(fields))
    assert seen.total() - seen["no config"] - seen["of another tool"] >= LEAST[tool]


KINDS = ("translated", "noted", "default", "refused", "stops")

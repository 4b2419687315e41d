"""What a run is asked on, where it names no rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from halfbyte.export import witness
from halfbyte.inference import load, target
from tests.export import runs


@pytest.mark.parametrize(("context", "at_least"), [(48, 48), (4096, 49)])
def test_an_adapter_alone_is_asked_on_a_text_of_ours_that_its_model_reads(
    context: int, at_least: int, tmp_path: Path
) -> None:
    runs.make(tmp_path, "plain")
    config = tmp_path / "model/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": context}))
    opened = load.open_target(target.find(tmp_path / "adapter"))
    (row,) = witness.rows_of(opened, None, 4)
    assert at_least <= len(row.input_ids) <= context

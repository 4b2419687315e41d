"""What is held beside the result while a module of 1 GB is read, seen in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks import any_module

BLOCKS = 4  # of 268 MB


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("blocks")
    any_module.write(made, BLOCKS)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["nf4", "int8"])
@pytest.mark.parametrize("mode", any_module.MODES)
def test_at_most_the_largest_tensor_and_300_mb_beside_the_result(mode: str, quant: str, folder: Path) -> None:
    seen = any_module.run(mode, folder, BLOCKS, quant)
    assert seen["beside_gb"] * 1e9 <= seen["largest_gb"] * 1e9 + any_module.ALLOWED
    bits = {"nf4": 4.127, "int8": 8.01}[quant]
    if mode != "disk":
        assert seen["result_gb"] == pytest.approx(BLOCKS * 0.134217728 * bits / 8, rel=0.01)

"""Tiles of bf16 products against numpy, and the kernels made of them on a processor without AMX."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from llvmlite import binding
from numba import njit

from halfbyte.layers.kernels.cpu import tiles

amx = pytest.mark.skipif(not tiles.amx(), reason="no AMX")


@njit
def _product(c, a, b, c_row, a_row, b_row, steps, add):  # type: ignore[no-untyped-def]
    tiles.amx_begin(np.zeros(64, np.uint8))
    tiles.amx_tile(c, c_row, a, a_row, 1, b, b_row, steps, add)
    tiles.amx_end()


@amx
@pytest.mark.parametrize("add", [0, 1])
@pytest.mark.parametrize("steps", [16, 48])
def test_an_amx_tile_is_its_product_and_writes_nowhere_else(steps: int, add: int) -> None:
    draw = np.random.default_rng(steps + add)
    # numbers that bf16 holds, small whole ones: products and sums are exact in fp32
    a, b = draw.integers(-9, 10, (16, 2 * steps)), draw.integers(-9, 10, (2 * steps, 32))
    a_row, b_row, c_row = steps + 3, 40, 35
    given = np.zeros((16, a_row), np.uint32)
    given[:, :steps] = (a.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).reshape(16, -1).view(np.uint32)
    pairs = np.zeros((steps, b_row), np.uint32)
    bits = b.astype(np.float32).view(np.uint32) >> 16
    pairs[:, :32] = bits[0::2] | bits[1::2] << 16
    before = draw.integers(-50, 50, (16, c_row)).astype(np.float32)
    c = before.copy()
    _product(c.ravel(), given.ravel(), pairs.ravel(), c_row, a_row, b_row, steps, add)
    assert np.array_equal(c[:, :32], a @ b + add * before[:, :32])
    assert np.array_equal(c[:, 32:], before[:, 32:])


@amx
@pytest.mark.slow
def test_a_kernel_of_a_processor_with_amx_is_not_taken_where_linux_refuses_it(tmp_path: Path) -> None:
    # a container may refuse the call on the same processor, over the same folder of compiled kernels
    code = (
        "from halfbyte.layers.kernels.cpu import tiles\n"
        "if refused: tiles.amx = lambda: False\n"
        "import torch\n"
        "from halfbyte.layers.kernels.cpu.lora import bf16\n"
        "print(bf16.AMX, bf16.fault())"
    )
    for refused in (False, True):
        env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
        run = [sys.executable, "-c", f"refused = {refused}\n{code}"]
        done = subprocess.run(run, env=env, capture_output=True, text=True, check=True)
        assert done.stdout.split() == [str(not refused), "None"]
    assert len(list(tmp_path.rglob("*lora_down*.nbc"))) == 2


@amx
@pytest.mark.slow
def test_the_kernels_are_as_right_without_amx() -> None:
    features = binding.get_host_cpu_features()
    without = {name: on and not name.startswith("amx") for name, on in features.items()}
    flags = ",".join(f"{'+' if on else '-'}{name}" for name, on in without.items())
    env = {**os.environ, "NUMBA_CPU_NAME": binding.get_host_cpu_name(), "NUMBA_CPU_FEATURES": flags}
    here = Path(__file__).parent
    folders = [str(here / name) for name in ("attention", "lora", "decoding", "recurrent")]
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *folders]
    done = subprocess.run(run, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]

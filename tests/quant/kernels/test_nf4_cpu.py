"""The quantiser writes bitsandbytes' own bytes, whatever the numbers; numbers that are none are refused by name."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bitsandbytes.functional as bnb_f
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from halfbyte.errors import BaseModelError
from halfbyte.models.sources.lookup import resolve
from halfbyte.quant import bnb_backend, formats
from halfbyte.quant.kernels import nf4_cpu
from halfbyte.recipe.schema import Quant

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SIZES = [1, 2, 63, 64, 65, 127, 128, 4095, 4096, 4097, 64 * 300 + 1]


def ours(values: torch.Tensor, kind: str, block: int) -> tuple[np.ndarray, np.ndarray, int]:
    flat = values.reshape(-1)
    array = (flat.view(torch.uint16) if flat.dtype == torch.bfloat16 else flat).numpy()
    return nf4_cpu.quantise(array, kind, block)


def check(values: torch.Tensor, kind: str, block: int = 64) -> None:
    assert not bnb_backend.active()  # the reference is bitsandbytes' own
    packed, state = bnb_f.quantize_4bit(values, blocksize=block, quant_type=kind, compress_statistics=False)
    codes, absmax, bad = ours(values, kind, block)
    assert bad == -1
    np.testing.assert_array_equal(codes, packed.numpy().reshape(-1))
    np.testing.assert_array_equal(absmax.view(np.uint32), state.absmax.numpy().view(np.uint32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block", nf4_cpu.BLOCK_SIZES)
def test_every_block_size_and_ragged_end(block: int, kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(block)
    for n in SIZES:
        check((torch.randn(n) * 0.02).to(dtype), kind, block)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_edge_values(kind: str, dtype: torch.dtype) -> None:
    """Zeros of both signs, subnormals, the smallest and largest numbers, and the midpoints themselves."""
    info = torch.finfo(dtype)
    bounds, _ = nf4_cpu.tables(kind)
    ties = torch.from_numpy(np.concatenate([bounds, np.nextafter(bounds, 1), np.nextafter(bounds, -1), [1.0]]))
    rows = [
        torch.zeros(64),
        -torch.zeros(64),
        torch.full((64,), info.smallest_normal),
        torch.arange(64) * info.smallest_normal / 64,  # subnormal
        torch.full((64,), 1e-45),
        torch.tensor([info.max, info.min] * 32),
        torch.cat([ties, torch.zeros(64 - len(ties))]),
        torch.cat([ties * 1e-38, torch.zeros(64 - len(ties))]),
        torch.cat([ties * 3, torch.zeros(64 - len(ties))]),
        torch.cat([torch.ones(1), torch.zeros(63)]),
    ]
    for row in rows:
        check(row.to(dtype), kind)
        check(row[:33].to(dtype), kind)  # the ragged block divides where a whole one multiplies
    check(torch.stack(rows).to(dtype), kind)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_every_number_of_16_bits(kind: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
        finite = every[every.isfinite()]
        check(finite, kind, 32)
        alone = torch.zeros(len(finite), 64, dtype=dtype)  # each beside a 1
        alone[:, 0], alone[:, 1] = 1.0, finite.clamp(-1, 1)
        check(alone, kind)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])  # under emulation
@given(
    data=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=200),
    kind=st.sampled_from(["nf4", "fp4"]),
    block=st.sampled_from([32, 64, 128]),
)
def test_any_floats(data: list[float], kind: str, block: int) -> None:
    check(torch.tensor(data), kind, block)


def test_parts_and_threads_change_nothing() -> None:
    values = torch.randn(3 * nf4_cpu.PART_ELEMENTS + 12345).bfloat16()
    alone = ours(values, "nf4", 64)
    with ThreadPoolExecutor(3) as pool:
        array = values.view(torch.uint16).numpy()
        absmax = np.empty_like(alone[1])
        together = nf4_cpu.quantise(array, "nf4", 64, absmax=absmax, pool=pool)
    assert together[1] is absmax
    np.testing.assert_array_equal(alone[0], together[0])
    np.testing.assert_array_equal(alone[1], absmax)
    check(values, "nf4")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_block_that_is_not_finite_is_told(bad: float, dtype: torch.dtype) -> None:
    values = torch.randn(64 * 10 + 3).to(dtype)
    for position in (0, 63, 64, 300, 642):
        broken = values.clone()
        broken[position] = bad
        assert ours(broken, "nf4", 64)[2] == position // 64 * 64


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(128, 64), (96, 100), (7, 9), (1024, 512)])
def test_a_checkpoint_s_tensors_are_those_of_bitsandbytes(
    shape: tuple[int, int], dtype: torch.dtype, double: bool, kind: str
) -> None:
    torch.manual_seed(1)
    same_tensors((torch.randn(shape) * 0.05).to(dtype), double, kind)


def same_tensors(values: torch.Tensor, double: bool, kind: str) -> None:
    wanted, state = bnb_f.quantize_4bit(values, quant_type=kind, compress_statistics=double)
    quant = Quant(type=kind, double_quant=double)
    encoder = formats.of(quant).encoder(quant, tuple(values.shape), values.dtype, "x")
    flat, half = values.reshape(-1), values.numel() // 2 // 64 * 64  # in two chunks
    packed = np.concatenate(
        [encoder.codes(at, part) for at, part in ((0, flat[:half]), (half, flat[half:])) if len(part)]
    )
    assert encoder.code_bytes(half) == half // 2
    assert np.array_equal(packed, wanted.numpy().reshape(-1))
    parts = {name.removeprefix("."): value for name, value in encoder.parts().items()}
    expected = state.as_dict(packed=True)
    assert parts.keys() == expected.keys()
    assert all(torch.equal(parts[name].view(torch.uint8), expected[name].view(torch.uint8)) for name in parts)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_a_real_model_s_matrices_are_those_of_bitsandbytes(double: bool, kind: str) -> None:
    seen = 0
    for file in resolve("smollm2-135m").path.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  it is no mapping
                if name.endswith("proj.weight"):
                    same_tensors(tensors.get_tensor(name), double, kind)
                    seen += 1
    assert seen == 7 * 30


def test_a_transposed_matrix_is_quantised_as_it_reads() -> None:
    values = torch.randn(64, 128)
    wanted, _ = bnb_f.quantize_4bit(values.T, quant_type="nf4")
    encoder = formats.of(Quant()).encoder(Quant(), (128, 64), values.dtype, "x")
    assert np.array_equal(encoder.codes(0, values.T), wanted.numpy().reshape(-1))


def test_a_weight_that_is_not_finite_is_refused_by_name_and_place() -> None:
    values = torch.randn(8, 64).bfloat16()
    values[3, 5] = math.inf
    with pytest.raises(BaseModelError, match=r"layers\.2\.up_proj\.weight holds inf at \(3, 5\)"):
        formats.of(Quant()).encoder(Quant(), (8, 64), values.dtype, "layers.2.up_proj.weight").codes(0, values)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_code_is_bitsandbytes_s(kind: str) -> None:
    assert torch.equal(torch.from_numpy(nf4_cpu.code(kind)), bnb_f.get_4bit_type(kind, device="cpu"))


def test_the_loop_is_compiled_once_a_machine(tmp_path: Path) -> None:
    """A second process finds it in numba's cache, for each of the three dtypes."""
    code = """
import numpy as np
from halfbyte.quant.kernels import nf4_cpu, nf4_cpu_kernel
for dtype in ("uint16", "float16", "float32"):
    nf4_cpu.quantise(np.zeros(64, dtype), "nf4", 64)
print(sum(nf4_cpu_kernel.run.stats.cache_hits.values()))
"""
    hits = [
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)},
            capture_output=True, text=True, check=True,
        ).stdout
        for _ in range(2)
    ]  # fmt: skip
    assert hits == ["0\n", "3\n"]

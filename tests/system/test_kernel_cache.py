"""kernel_cache.py: kernels are compiled, and weights quantised, also where numba would find no place for its cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from halfbyte.system import files, kernel_cache

# A user who may write into the temporary folder alone. It is the test's own, as the checkout may lie in the system's.
CODE = """
import os, sys, tempfile
from pathlib import Path
open_file, temporary = tempfile.TemporaryFile, Path(tempfile.gettempdir()).resolve()
def refusing(*args, dir=None, **kwargs):
    if dir is not None and not Path(dir).resolve().is_relative_to(temporary):
        raise PermissionError(13, "Permission denied", str(dir))
    return open_file(*args, dir=dir, **kwargs)
tempfile.TemporaryFile = refusing
import numpy as np, torch
from halfbyte.layers.kernels import cpu
from halfbyte.system import kernel_cache
if sys.argv[1] == "without":
    kernel_cache.find_place = lambda: None
assert cpu.enabled(), "no kernels"
from halfbyte.layers import norm_gate
from halfbyte.quant.kernels import nf4_cpu
x = torch.ones(4, 64)
assert norm_gate.norm(x, torch.ones(64), 1e-5, norm_gate.NormKind()).shape == x.shape
codes, *_ = nf4_cpu.quantise(x.numpy().reshape(-1), "nf4", 64)
print(len(codes), os.environ[kernel_cache.VARIABLE])
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "own"))
    monkeypatch.delenv(kernel_cache.VARIABLE, raising=False)
    kernel_cache.find_place.cache_clear()
    yield tmp_path / "own" / "numba"
    kernel_cache.find_place.cache_clear()


def unwritable(monkeypatch: pytest.MonkeyPatch, *allowed: Path) -> None:
    monkeypatch.setattr(files, "why_unwritable", lambda folder: "" if folder in allowed else "it may not be written")


def test_numbas_own_place_is_left_to_it(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unwritable(monkeypatch, kernel_cache.places()[0])
    kernel_cache.find_place()
    assert kernel_cache.VARIABLE not in os.environ


def test_without_one_it_is_halfbytes_and_else_one_of_this_process(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unwritable(monkeypatch, own)
    kernel_cache.find_place()
    assert os.environ[kernel_cache.VARIABLE] == str(own)
    monkeypatch.delenv(kernel_cache.VARIABLE)
    kernel_cache.find_place.cache_clear()
    unwritable(monkeypatch)
    kernel_cache.find_place()
    made = Path(os.environ[kernel_cache.VARIABLE])
    assert made.is_dir() and made.name.startswith("halfbyte-numba-")
    made.rmdir()
    monkeypatch.delenv(kernel_cache.VARIABLE)


@pytest.mark.parametrize("place", ["with", "without"])
def test_a_user_without_a_home_folder_has_kernels_and_a_quantiser(place: str, tmp_path: Path) -> None:
    """Without a place, which is what numba itself would find, it refuses the first kernel."""
    left_out = ("HALFBYTE_CACHE", kernel_cache.VARIABLE, "XDG_CACHE_HOME")
    env = {name: value for name, value in os.environ.items() if name not in left_out} | {"HOME": "/nonexistent"}
    env |= dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(tmp_path))
    done = subprocess.run([sys.executable, "-c", CODE, place], env=env, capture_output=True, text=True)
    if place == "without":
        assert done.returncode != 0 and "no kernels" in done.stderr
        return
    assert done.returncode == 0, done.stderr[-2000:]
    codes, folder = done.stdout.split()
    assert codes == "128" and Path(folder).name.startswith("halfbyte-numba-")
    shutil.rmtree(folder)


# A kernel that is compiled of a part in another file.
PARTS = {
    "part.py": """
from numba import njit

@njit(inline="never")
def part():
    return {}
""",
    "whole.py": """
from numba import njit

from part import part

@njit(cache=True)
def whole():
    return part()
""",
}


@pytest.mark.parametrize(
    ("where", "asked"), [("beside", True), ("named", True), ("beside", False)], ids=["beside", "named", "numba alone"]
)
def test_a_kernel_is_compiled_again_after_a_part_of_it_changed(tmp_path: Path, where: str, asked: bool) -> None:
    pytest.importorskip("numba")
    kernels = tmp_path / "kernels"
    (kernels / "deeper").mkdir(parents=True)
    (kernels / "deeper" / "__init__.py").touch()
    env = {name: value for name, value in os.environ.items() if name != kernel_cache.VARIABLE}
    if where == "named":
        env[kernel_cache.VARIABLE] = str(tmp_path / "cache")
    code = f"""
import pathlib, sys
from halfbyte.system import kernel_cache
kernel_cache._KERNELS = pathlib.Path({str(kernels)!r})
{"kernel_cache.find_place()" if asked else ""}
sys.path.insert(0, {str(kernels / "deeper")!r})
from whole import whole
whole()
print(whole(), sum(whole.stats.cache_hits.values()))
"""
    for name, text in PARTS.items():
        (kernels / "deeper" / name).write_text(text.format(1))

    def value() -> str:
        return subprocess.run(
            [sys.executable, "-B", "-c", code], env=env, cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    assert value() == "1 0"
    assert value() == "1 1", "taken from the cache"
    (kernels / "deeper" / "other.py").write_text("from part import part\n")
    assert value() == "1 1", "a file that it is not compiled of"
    (kernels / "deeper" / "part.py").write_text(PARTS["part.py"].format(2))
    assert value() == ("2 0" if asked else "1 1")

"""The quantiser as bitsandbytes' own kernel: found by its entry point, lazy, off when asked, harmless when broken."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What a script sees: the same weights, with and without the kernel. Calls the entry point as bitsandbytes does.
SCRIPT = """
import sys
import bitsandbytes.functional as F
import torch
from halfbyte.quant import bnb_backend
if len(sys.argv) > 1:
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "numba":
                raise SystemError("numba is broken here")
    sys.meta_path.insert(0, Broken())
bnb_backend.register()
bnb_backend.register()
print("active", bnb_backend.active(), "numba" in sys.modules)
torch.manual_seed(0)
total = 0
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    for shape in ((64, 64), (5, 7), (1000, 100)):
        for kind in ("nf4", "fp4"):
            for storage in (torch.uint8, torch.bfloat16):
                x = torch.randn(shape).to(dtype)
                n = x.numel()
                if storage != torch.uint8 and (n + 1) // 2 % 2:
                    continue
                packed, state = F.quantize_4bit(x, quant_type=kind, compress_statistics=True, quant_storage=storage)
                total = (total * 31 + int(packed.view(torch.uint8).long().sum()) + packed.numel()) % 1000003
                total = (total * 31 + int(state.absmax.long().sum())) % 1000003
bad = torch.ones(130)
bad[3], bad[70] = float("nan"), float("inf")
packed, state = F.quantize_4bit(bad, quant_type="nf4", compress_statistics=False)
total = (total * 31 + int(packed.long().sum()) + int(state.absmax.isfinite().sum())) % 1000003
empty, _ = F.quantize_4bit(torch.zeros(0), quant_type="nf4", compress_statistics=False)
print("sum", total, tuple(empty.shape))
print("after", bnb_backend.active(), "numba" in sys.modules)
"""


def run(*args: str, kernel: str | None = "1") -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if k != "HALFBYTE_BNB_KERNEL"}
    env["PYTHONPATH"] = str(ROOT / "src")
    if kernel is not None:
        env["HALFBYTE_BNB_KERNEL"] = kernel
    done = subprocess.run([sys.executable, "-c", SCRIPT, *args], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


def test_scripts_get_the_same_bytes_lazily_and_with_a_broken_numba_too() -> None:
    plain, fast, broken = run(kernel="0"), run(kernel=None), run("broken")
    assert plain["active"] == plain["after"] == "False False"
    assert fast["active"] == "True False" and fast["after"] == "True True"
    assert broken["active"] == "True False" and broken["after"] == "False False"
    assert plain["sum"] == fast["sum"] == broken["sum"]


def test_a_registration_that_fails_is_silent() -> None:
    code = (
        "import os, torch\nimport bitsandbytes.functional as F\nfrom halfbyte.quant import bnb_backend\n"
        "def no(*a, **k): raise RuntimeError('no')\ntorch.library.Library = no\n"
        "os.environ['HALFBYTE_BNB_KERNEL'] = '1'\nbnb_backend.register()\n"
        "F.quantize_4bit(torch.ones(64), quant_type='nf4')\nprint(bnb_backend.active())\n"
    )
    env = {**os.environ, "HALFBYTE_BNB_KERNEL": "0", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"


def test_the_entry_point_names_a_function_that_is_there_and_needs_nothing_heavy() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (value,) = project["entry-points"]["bitsandbytes.backends"].values()
    module, function = value.split(":")
    code = (
        f"import sys, {module}\nassert callable({module}.{function})\n"
        "print(sorted({'torch', 'numba', 'transformers', 'bitsandbytes'} & set(sys.modules)))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == "[]"

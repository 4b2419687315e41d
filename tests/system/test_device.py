"""device.py: control groups, instruction sets, cards and the compute dtype, on machines made of text files."""

from __future__ import annotations

import hashlib
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import halfbyte
from halfbyte.errors import RecipeError
from halfbyte.system import device, files, kernel_cache
from halfbyte.system.device import Card, Device, compute_dtype, detect

GIB = 2**30
NO_LIMIT_V1 = "9223372036854771712"
SAPPHIRE = "model name\t: Xeon X\nflags\t\t: fpu sse2 avx2 avx512f avx512_bf16 amx_bf16 amx_int8\n"
HASWELL = "model name\t: Core i7\nflags\t\t: fpu sse2 avx2\n"
GRAVITON = "processor\t: 0\nFeatures\t: fp asimd i8mm bf16 sve\n"


def machine(root: Path, files: dict[str, str], *, cpuinfo: str = HASWELL, total: int = 16, available: int = 8) -> Path:
    """A root folder with /proc and the given files."""
    meminfo = f"MemTotal: {total * 2**20} kB\nMemFree: 1 kB\nMemAvailable: {available * 2**20} kB\n"
    for name, text in {"proc/cpuinfo": cpuinfo, "proc/meminfo": meminfo, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def cpu(*isa: str) -> Device:
    return Device("cpu", isa, cores=2, ram_bytes=GIB, ram_available_bytes=GIB)


def cuda(*capabilities: tuple[int, int]) -> Device:
    cards = tuple(Card(f"card{n}", 8 * GIB, 7 * GIB, capability) for n, capability in enumerate(capabilities))
    return Device("cuda", ("avx512_bf16",), cores=2, ram_bytes=GIB, ram_available_bytes=GIB, cards=cards)


def test_without_a_control_group_memory_is_the_machines(tmp_path: Path) -> None:
    found = detect(machine(tmp_path, {}))
    assert (found.ram_bytes, found.ram_available_bytes) == (16 * GIB, 8 * GIB)
    assert (found.kind, found.cpu, found.isa) == ("cpu", "Core i7", ("avx2",))


def test_v2_limit_counts_what_is_left_and_not_droppable_pages(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/user.slice/job"
    files = {
        "proc/self/cgroup": "0::/user.slice/job\n",
        f"{group}/memory.max": f"{6 * GIB}\n",
        f"{group}/memory.current": f"{4 * GIB}\n",
        f"{group}/memory.stat": f"anon 5\ninactive_file {1 * GIB - 7}\nactive_file 7\n",
    }
    found = detect(machine(tmp_path, files))
    assert found.ram_bytes == 6 * GIB
    assert found.ram_available_bytes == 3 * GIB  # 6 - (4 - 1)


def test_v2_limit_of_a_parent_binds_too(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/slice/job\n",
        "sys/fs/cgroup/slice/memory.max": str(3 * GIB),
        "sys/fs/cgroup/slice/memory.current": str(1 * GIB),
        "sys/fs/cgroup/slice/job/memory.max": "max\n",
        "sys/fs/cgroup/slice/job/memory.current": str(1 * GIB),
    }
    found = detect(machine(tmp_path, files))
    assert (found.ram_bytes, found.ram_available_bytes) == (3 * GIB, 2 * GIB)


def test_v2_in_a_container_whose_group_path_is_the_hosts(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/../../docker/abc\n",
        "sys/fs/cgroup/memory.max": str(2 * GIB),
        "sys/fs/cgroup/memory.current": str(3 * GIB),
    }
    found = detect(machine(tmp_path, files))
    assert found.ram_bytes == 2 * GIB
    assert found.ram_available_bytes == 0  # over the limit already, never negative


def test_v1_limit_and_no_limit(tmp_path: Path) -> None:
    mount = "sys/fs/cgroup/memory"
    files = {
        "proc/self/cgroup": "9:name=systemd:/\n4:memory:/job\n0::/\n",
        f"{mount}/memory.limit_in_bytes": NO_LIMIT_V1,
        f"{mount}/memory.usage_in_bytes": str(2 * GIB),
        f"{mount}/job/memory.limit_in_bytes": str(5 * GIB),
        f"{mount}/job/memory.usage_in_bytes": str(2 * GIB),
        f"{mount}/job/memory.stat": f"total_inactive_file {GIB}\n",
    }
    found = detect(machine(tmp_path / "limited", files))
    assert (found.ram_bytes, found.ram_available_bytes) == (5 * GIB, 4 * GIB)
    files[f"{mount}/job/memory.limit_in_bytes"] = NO_LIMIT_V1
    found = detect(machine(tmp_path / "free", files))
    assert (found.ram_bytes, found.ram_available_bytes) == (16 * GIB, 8 * GIB)


@pytest.mark.parametrize(
    "files",
    [
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"},
        {
            "proc/self/cgroup": "3:cpu,cpuacct:/\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "150000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
    ],
)
def test_cpu_quota_bounds_the_cores(tmp_path: Path, files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device.calls, "cores", lambda: 4)
    root = machine(tmp_path / "quota", files)
    assert device.core_share(root) == 1.5 and detect(root).cores == 2  # two threads, three quarters of the time
    for name in files:
        if "cpu." in name:
            files[name] = "max 100000\n" if name.endswith("max") else "-1\n"
    assert detect(machine(tmp_path / "none", files)).cores == detect(machine(tmp_path / "plain", {})).cores


@pytest.mark.parametrize(("enabled", "has"), [("always [madvise] never", True), ("[always] madvise never", True),
                                              ("always madvise [never]", False), (None, False)])  # fmt: skip
def test_large_pages_are_there_where_the_kernel_gives_them(tmp_path: Path, enabled: str | None, has: bool) -> None:
    name = "sys/kernel/mm/transparent_hugepage/enabled"
    files = {} if enabled is None else {name: f"{enabled}\n"}
    assert detect(machine(tmp_path, files)).large_pages is (has and hasattr(mmap, "MADV_HUGEPAGE"))


@pytest.mark.parametrize(
    ("cpuinfo", "dtype", "reason"),
    [
        (SAPPHIRE, "bf16", "auto: CPU has avx512_bf16"),
        (GRAVITON, "bf16", "auto: CPU has bf16"),
        (HASWELL, "fp32", "auto: this CPU has no bf16 multiply (avx512_bf16, amx_bf16)"),
    ],
)
def test_auto_dtype_follows_the_instruction_set(tmp_path: Path, cpuinfo: str, dtype: str, reason: str) -> None:
    assert compute_dtype(detect(machine(tmp_path, {}, cpuinfo=cpuinfo))) == (dtype, reason)


def test_fp16_is_never_chosen_on_a_cpu() -> None:
    text = "fp16 asked, but a CPU multiplies it ~1000x slower in the backward; {} instead"
    assert compute_dtype(cpu("avx512_bf16"), "fp16") == ("bf16", text.format("bf16"))
    assert compute_dtype(cpu("avx2"), "fp16") == ("fp32", text.format("fp32"))


def test_other_dtypes_that_are_asked_for_are_honoured() -> None:
    assert compute_dtype(cpu("amx_bf16"), "fp32") == ("fp32", "asked")
    assert compute_dtype(cpu("amx_bf16"), "bf16") == ("bf16", "asked")
    dtype, reason = compute_dtype(cpu("avx2"), "bf16")
    assert dtype == "bf16"
    assert "slow" in reason
    with pytest.raises(RecipeError, match=r"compute_dtype must be one of auto, bf16, fp16, fp32, got 'int8'"):
        compute_dtype(cpu(), "int8")


def test_cards_decide_by_the_oldest_one() -> None:
    assert compute_dtype(cuda((8, 0), (9, 0)))[0] == "bf16"
    dtype, reason = compute_dtype(cuda((9, 0), (7, 5)))
    assert dtype == "fp16"
    assert reason.startswith("auto: card1 has compute capability 7.5")
    assert "loss scaling" in reason
    assert compute_dtype(cuda((9, 0)), "fp16") == ("fp16", "asked, with loss scaling")
    assert "slow" in compute_dtype(cuda((7, 0)), "bf16")[1]


def test_this_machine_and_its_json(tmp_path: Path) -> None:
    found = detect()
    assert found.cores >= 1
    assert 0 < found.ram_available_bytes <= found.ram_bytes
    assert files.free_bytes(tmp_path / "not" / "there") > 0
    shown = cuda((8, 6)).to_json()
    assert shown["cards"][0]["capability"] == [8, 6]
    assert shown["isa"] == ["avx512_bf16"]


def test_compiled_kernels_are_found_where_numba_keeps_them(tmp_path: Path) -> None:
    env = {"NUMBA_CACHE_DIR": str(tmp_path)}

    def missing(
        dtype: str = "bf16", *, attention: bool = False, integers: bool = False, **more: Any
    ) -> tuple[str, ...]:
        return kernel_cache.uncompiled(dtype, attention=attention, integers=integers, env=env, **more)

    def compile_(kernel: str, folder: Path) -> None:
        place = tmp_path / f"{folder.name}_{hashlib.sha1(str(folder).encode()).hexdigest()}"
        place.mkdir(exist_ok=True)
        (place / f"{kernel}.py311.1.nbc").touch()

    cpu = Path(halfbyte.__file__).parent / "layers" / "kernels" / "cpu"
    plain, blocks = kernel_cache.decoding(blocks=False, states=False), kernel_cache.decoding(blocks=True, states=False)
    assert missing("fp32", interpreter=plain) == ("fp32", "decoding")
    compile_("interpreter.decoding_fp32-279", cpu / "decoding")  # of a generate
    assert missing("fp32", interpreter=plain) == ("fp32",)
    assert missing(interpreter=plain) == ("fp32", "bf16", "decoding")  # in another dtype
    assert missing("fp32", interpreter=blocks) == ("fp32", "decoding_with_blocks")
    compile_("entropy._kernel.locals.cross_entropy-31", Path("/another/halfbyte/layers/kernels/cpu"))
    assert missing() == ("fp32", "bf16") and missing("fp32") == ("fp32",)
    compile_("entropy._kernel.locals.cross_entropy-31", cpu)
    assert missing("fp32") == () and missing() == ("bf16",)
    assert missing("fp32", attention=True, integers=True) == ("fp32", "integers")
    compile_("fp32._backward-169", cpu / "attention")
    compile_("entropy._kernel.locals.cross_entropy-31.2", cpu)
    assert missing() == () and missing(attention=True) == ("bf16",)
    compile_("bf16._backward-212", cpu / "attention")
    compile_("weights.decode_rows-156", cpu / "integer")
    assert missing(attention=True, integers=True) == ()
    kinds = ("conv", "state_space")
    compile_("conv._kernel.locals.conv-73", cpu / "recurrent")
    assert missing("fp32", recurrent=kinds) == ("state_space",) and missing(recurrent=kinds) == kinds
    for kernel in ("_forward_kernel.locals.state_space-264", "_backward_kernel.locals.state_space_backward-279"):
        compile_(f"state_space.{kernel}", cpu / "recurrent")
    assert missing("fp32", recurrent=kinds) == () and missing(recurrent=kinds) == kinds


@pytest.mark.parametrize(
    "kind",
    [
        "conv",
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("delta_rule", "state_space", *kernel_cache.INTERPRETERS)),
    ],
)
def test_kernels_that_not_every_run_has_are_compiled_before_it(kind: str, tmp_path: Path) -> None:
    """As many as a run looks for, by processes of their own."""
    env = {"NUMBA_CACHE_DIR": str(tmp_path)}
    recurrent = [kind] if kind in kernel_cache.RECURRENT else []
    more = {"interpreter": "" if recurrent else kind, "recurrent": recurrent, "env": env}
    asked = {"attention": False, "integers": False, **more}
    assert kind in kernel_cache.uncompiled("fp32", **asked)
    code = f"from halfbyte.layers.kernels.cpu import ahead; ahead.begin(['{kind}'], 2, 'fp32')()"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | env, timeout=300)
    assert kind not in kernel_cache.uncompiled("fp32", **asked)


def test_what_a_training_compiles_in_any_dtype_marks_the_machine(tmp_path: Path) -> None:
    """In a process of its own: numba reads where its cache is once."""
    code = (
        "import torch; from halfbyte.layers import loss\n"
        "for dtype in (torch.float32, torch.bfloat16):\n"
        "    loss._chunk_loss(torch.randn(3, 8, dtype=dtype), torch.tensor([1, 2, 3]), 0.0, gradient=True)"
    )
    env = {"NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | env, timeout=120)
    assert kernel_cache.uncompiled("bf16", attention=False, integers=False, env=env) == ()

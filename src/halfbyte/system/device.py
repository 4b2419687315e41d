"""What this machine is: instruction set, cores, memory (and the control group's limit on it), disk, cards.

Why: every choice made before a model is loaded depends on it. A container's limit is what ends a run, not the machine's
memory, so both are read.
Source: Linux `proc(5)`, cgroup v1 `memory.txt` and v2 `cgroup-v2.rst`; cards by `cards.py`. Elsewhere than on Linux the
instruction set is not read, so a CPU there computes in fp32 unless the recipe says otherwise.
"""

import json
import math
import mmap
import os
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from halfbyte.errors import RecipeError
from halfbyte.system import cards as card_list
from halfbyte.system import topology
from halfbyte.system.cards import Card
from halfbyte.system.platforms import calls
from halfbyte.types import Document

# Flags that change a decision or explain a speed: x86 as /proc/cpuinfo spells them, then ARM ("bf16" is BFMMLA).
ISA_FLAGS = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "i8mm", "bf16", "sve"
)  # fmt: skip
BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")
INT8_FLAGS = ("avx_vnni", "avx512_vnni", "amx_int8")
DTYPES = ("auto", "bf16", "fp16", "fp32")


@dataclass(frozen=True)
class Device:
    """A machine, as this process may use it.

    `cores` honours affinity, CPU quota and what shares a core. `ram_bytes` is the smaller of the machine's memory and
    the control group's limit; `ram_available_bytes` the smaller of what is free now and what is left under that limit.
    `kind` is torch's name of what computes: cpu, cuda (AMD's cards too), xpu. `cards` are those that are used, the
    first one if one is enough; `notes` say which of those that are there are not, and why. `large_pages`: private
    memory may be asked for in pages of 2 MB.
    """

    kind: str
    isa: tuple[str, ...]
    cores: int
    ram_bytes: int
    ram_available_bytes: int
    cards: tuple[Card, ...] = ()
    cpu: str = ""
    notes: tuple[str, ...] = ()
    large_pages: bool = False

    @property
    def on_card(self) -> bool:
        return self.kind != "cpu"

    @property
    def main(self) -> str:
        """torch's name of where a model is that one place is enough for."""
        return f"{self.kind}:{self.cards[0].index}" if self.on_card else "cpu"

    def to_json(self) -> Document:
        """The machine for `report.json`; tuples become lists."""
        return json.loads(json.dumps(asdict(self)))


def detect(root: Path = Path("/"), env: Mapping[str, str] = os.environ) -> Device:
    """Look at the machine; `root` holds `proc` and `sys`, and CUDA_VISIBLE_DEVICES is read from `env`."""
    free, (cpu, isa) = ram_available(root), _cpu(root)
    huge = calls.text(root / "sys/kernel/mm/transparent_hugepage/enabled")
    cards = card_list.find(root, env, free)
    return Device(
        kind=cards.kind,
        isa=isa,
        cores=cores(root),
        ram_bytes=min([_memory(root)[0], *(limit for limit, _ in _cgroup_memory(root))]),
        ram_available_bytes=free,
        cards=cards.cards,
        cpu=cpu,
        notes=cards.notes,
        large_pages=bool(huge) and "[never]" not in huge and hasattr(mmap, "MADV_HUGEPAGE"),
    )


def ram_available(root: Path = Path("/")) -> int:
    """What a process may still take now: free memory, or what is left under the control group's limit."""
    return max(0, min([_memory(root)[1], *(limit - used for limit, used in _cgroup_memory(root))]))


def compute_dtype(device: Device, asked: str = "auto") -> tuple[str, str]:
    """The dtype that matrix products run in, and why: ("bf16", "auto: CPU has avx512_bf16"). Never fp16 on a CPU."""
    if asked not in DTYPES:
        raise RecipeError(f"quant.compute_dtype must be one of {', '.join(DTYPES)}, got {asked!r}")
    best, why = _best_on_card(device.cards) if device.on_card else _best_on_cpu(device.isa)
    if asked == "auto":
        return best, f"auto: {why}"
    if asked == "fp16" and device.kind == "cpu":
        return best, f"fp16 asked, but a CPU multiplies it ~1000x slower in the backward; {best} instead"
    if asked == "bf16" and best != "bf16":
        return asked, f"asked; slow, as {why}"
    return asked, "asked, with loss scaling" if asked == "fp16" else "asked"


def may_use_integers(device: Device, dtype: str, asked: str = "auto") -> bool:
    """Whether products with a frozen weight may be of 8-bit integers here, by `quant.compute`; with auto, only where
    torch may multiply them faster. AMX multiplies bf16 as fast: int8 0.16 to 1.1 times, whole steps 0.96 to 1.04."""
    faster = any(flag in device.isa for flag in INT8_FLAGS) and not (dtype == "bf16" and "amx_bf16" in device.isa)
    return asked == "int8" or (asked == "auto" and faster)


def _best_on_cpu(isa: tuple[str, ...]) -> tuple[str, str]:
    have = [flag for flag in BF16_FLAGS if flag in isa]
    return ("bf16", f"CPU has {have[0]}") if have else ("fp32", "this CPU has no bf16 multiply (avx512_bf16, amx_bf16)")


def _best_on_card(cards: tuple[Card, ...]) -> tuple[str, str]:
    # one dtype for all: the oldest card decides
    card = min(cards, key=lambda c: (c.multiplies_bf16, c.capability))
    number = f"{card.capability[0]}.{card.capability[1]}"
    why = f"{card.name} has compute capability {number}" if card.bf16 is None else f"{card.name} multiplies it"
    if card.multiplies_bf16:
        return "bf16", why
    return "fp16", f"{why}, below 8.0: no bf16 multiply; with loss scaling"


def _cpu(root: Path) -> tuple[str, tuple[str, ...]]:
    text = calls.text(root / "proc/cpuinfo")
    # all cores of one machine report the same; big.LITTLE kernels list the common set
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    have = flags[1].split() if flags else ()
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return (name[1].strip() if name else platform.processor()), tuple(f for f in ISA_FLAGS if f in have)


def cores(root: Path = Path("/")) -> int:
    """Threads that keep all busy that this process may use: one a core of those that compute, and for a quota of one
    and a half, two for three quarters of the time."""
    return max(1, min(math.ceil(core_share(root)), len(topology.read(root).computing)))


def core_share(root: Path = Path("/")) -> float:
    """Cores that this process may use, by its affinity and the control group's quota, which need not be whole."""
    count: float = calls.cores()
    for folder in _cgroup_folders(root, "cpu"):
        old = calls.text(folder / "cpu.cfs_quota_us") + calls.text(folder / "cpu.cfs_period_us")
        quota = (calls.text(folder / "cpu.max") or old).split()
        if len(quota) == 2 and quota[0].isdigit() and quota[1].isdigit() and int(quota[1]) > 0:
            count = min(count, int(quota[0]) / int(quota[1]))
    return count


def _memory(root: Path) -> tuple[int, int]:
    """Of the machine: total, and available."""
    fields = dict(re.findall(r"^(\w+):\s*(\d+) kB$", calls.text(root / "proc/meminfo"), re.MULTILINE))
    if "MemTotal" in fields and "MemAvailable" in fields:
        return int(fields["MemTotal"]) * 1024, int(fields["MemAvailable"]) * 1024
    import psutil

    memory = psutil.virtual_memory()
    return int(memory.total), int(memory.available)


def _cgroup_memory(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) for each control group above this process that has a limit; file pages it can drop do not count."""
    for folder in _cgroup_folders(root, "memory"):
        # v2, then v1: limit, usage, prefix of the reclaimable parts
        for names in (("max", "current", ""), ("limit_in_bytes", "usage_in_bytes", "total_")):
            limit, used = (calls.text(folder / f"memory.{name}").strip() for name in names[:2])
            if limit.isdigit() and used.isdigit():
                droppable = rf"^{names[2]}(?:in)?active_file (\d+)$"
                parts = re.findall(droppable, calls.text(folder / "memory.stat"), re.MULTILINE)
                yield int(limit), max(0, int(used) - sum(map(int, parts)))


def _cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """The group of this process for a controller (v1) and the unified one (v2), each with every parent. In a container
    the path that `/proc/self/cgroup` gives may be the host's; the mount's root then is the group, and it is always
    among the parents."""
    mount = root / "sys/fs/cgroup"
    for line in calls.text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        tops = [mount / controllers, mount / controller] if controller in controllers.split(",") else []
        for top in dict.fromkeys(tops if controllers else [mount, mount / "unified"]):
            folder = top / path.strip("/")
            while top in (folder, *folder.parents):
                if folder.is_dir():
                    yield folder
                folder = folder.parent

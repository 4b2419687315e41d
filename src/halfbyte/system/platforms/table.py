"""The platforms people have, one row each: what runs, how that is known, what is slow, how to install.

One list: `docs/machines.md` prints it, and `halfbyte doctor` prints the row of the machine that it runs on.
"""

import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WHEEL = "pip install halfbyte"
CPU_TORCH = "pip install torch --index-url https://download.pytorch.org/whl/cpu, then " + WHEEL
_X86, _ARM = ("x86_64", "amd64"), ("aarch64", "arm64")


@dataclass(frozen=True)
class Machine:
    """What a row is looked up by: `sys.platform`, the architecture, torch's name of what computes, makers and bf16 of
    the cards, the flags of the processor."""

    system: str
    architecture: str
    kind: str = "cpu"
    makers: tuple[str, ...] = ()
    card_bf16: bool = True
    isa: tuple[str, ...] = ()

    @property
    def x86(self) -> bool:
        return self.architecture.lower() in _X86

    @property
    def arm(self) -> bool:
        return self.architecture.lower() in _ARM


@dataclass(frozen=True)
class Platform:
    """One row. `executed`: real (on such a machine), emulated, limited (instructions taken away), fake (a stand-in for
    the device), by removal (calls taken away), or never."""

    name: str
    is_it: Callable[[Machine], bool]
    runs: str
    executed: str
    slow: str
    install: str

    def to_json(self) -> dict[str, str]:
        """What is told of it, by column."""
        return {"platform": self.name, **{n: getattr(self, n) for n in ("runs", "executed", "slow", "install")}}


def here(
    kind: str, cards: Sequence[tuple[str, bool]], isa: tuple[str, ...], *, system: str = "", architecture: str = ""
) -> Platform:
    """The row of a machine, this one if no system is named. cards: name of each, and whether it multiplies bf16."""
    rocm = any("amd" in name.lower() or "radeon" in name.lower() or "instinct" in name.lower() for name, _ in cards)
    machine = Machine(
        system or sys.platform,
        architecture or platform.machine(),
        kind,
        ("AMD",) if rocm else (),
        all(bf16 for _, bf16 in cards),
        isa,
    )
    return next(row for row in PLATFORMS if row.is_it(machine))


PLATFORMS: tuple[Platform, ...] = (
    Platform(
        "AMD card (ROCm), Linux",
        lambda m: m.kind == "cuda" and "AMD" in m.makers,
        "the same code as for NVIDIA's, through torch; attention one call for each length",
        "the detection by a stand-in; nothing else, ever",
        "attention on packs of many lengths",
        "torch from https://download.pytorch.org/whl/rocm6.4 (or newer), then " + WHEEL,
    ),
    Platform(
        "Intel card (XPU), Linux and Windows",
        lambda m: m.kind == "xpu",
        "the same code as for NVIDIA's, through torch.xpu; attention one call for each length",
        "the detection by a stand-in; nothing else, ever",
        "attention on packs of many lengths",
        "torch from https://download.pytorch.org/whl/xpu, then " + WHEEL,
    ),
    Platform(
        "NVIDIA card below compute capability 8.0 (Turing, Volta), Linux and Windows",
        lambda m: m.kind == "cuda" and not m.card_bf16,
        "everything, in fp16 with a scaled loss",
        "fake: training, the loss's scale in checkpoints, attention without scores in memory",
        "attention: torch's memory-efficient kernel, one call for each length",
        "PyPI's torch on Linux (CUDA); https://download.pytorch.org/whl/cu126 elsewhere; then " + WHEEL,
    ),
    Platform(
        "NVIDIA card from compute capability 8.0 (Ampere and later), Linux and Windows; one or several",
        lambda m: m.kind != "cpu",
        "everything; several cards hold one model split over them; attention on packs in one call a layer",
        "fake: load, proofs, train, evaluate, generate, save, resume, split over two, drop-in, a full card; gradients "
        "as the CPU's. Never on a card, so no speed is known",
        "not measured",
        "PyPI's torch on Linux, x86-64 and ARM64 (CUDA, 3 GB); https://download.pytorch.org/whl/cu130 on Windows; then "
        + WHEEL,
    ),
    Platform(
        "Linux, x86-64, AVX512-BF16 or AMX",
        lambda m: m.system == "linux" and m.x86 and bool({"avx512_bf16", "amx_bf16"} & set(m.isa)),
        "everything, in bf16",
        "real: every test",
        "nothing known",
        CPU_TORCH,
    ),
    Platform(
        "Linux, x86-64, AVX2 (and AVX-512 without bf16)",
        lambda m: m.system == "linux" and m.x86 and "avx2" in m.isa,
        "everything, in fp32",
        "real: tests and trainings on a processor with AVX2 and no more (AMD Zen 3); limited: torch, oneDNN, MKL and "
        "numba held to AVX2 on one that has more",
        "about a third of the speed that bf16 has; int8 is computed without VNNI",
        CPU_TORCH,
    ),
    Platform(
        "Linux, x86-64, before AVX2",
        lambda m: m.system == "linux" and m.x86,
        "everything, in fp32; decoding without its kernels",
        "never",
        "everything",
        CPU_TORCH,
    ),
    Platform(
        "Linux, ARM64 (Graviton, Grace, Ampere, Raspberry Pi 5)",
        lambda m: m.system == "linux" and m.arm,
        "everything, in bf16 where the processor has it, else fp32; kernels in NEON; decoding without its kernels",
        "emulated: tests of kernels and quantiser, training, resumption, answer; qemu, torch 2.10 (tests/arm64.sh)",
        "not measured",
        "PyPI's torch is a build for CUDA from 2.11 on; for processors alone " + CPU_TORCH,
    ),
    Platform(
        "macOS, Apple silicon",
        lambda m: m.system == "darwin" and m.arm,
        "everything on the processor, in fp32; a streamed base is refused (it needs Linux). The Apple GPU is not used",
        "by removal: what macOS lacks is taken away on Linux; losses as on Linux",
        "the processor alone computes",
        WHEEL + " (PyPI's torch)",
    ),
    Platform(
        "macOS, Intel",
        lambda m: m.system == "darwin",
        "nothing: torch has no wheels for it since 2.3, and halfbyte needs 2.9",
        "never",
        "-",
        "use Linux on it",
    ),
    Platform(
        "Windows, x86-64",
        lambda m: m.system == "win32" and m.x86,
        "everything, in fp32 on the processor; a streamed base is refused (it needs Linux)",
        "by removal: what Windows lacks is taken away on Linux; losses as on Linux. Its own locks by a stand-in",
        "not measured; WSL runs as Linux does",
        WHEEL + " (PyPI's torch is a build for processors; for a card see its row)",
    ),
    Platform(
        "Windows, ARM64", lambda m: m.system == "win32", "nothing: pyarrow has no wheel for it", "never", "-", "use WSL"
    ),
    Platform(
        "another system", lambda m: True, "not known", "never", "-", "torch, bitsandbytes and numba have to be built"
    ),
)

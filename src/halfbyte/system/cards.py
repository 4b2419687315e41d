"""The cards of this machine: those that torch computes on, and those that are there and are not used, with the reason.

Why torch is asked: only it knows its own order of cards (the driver's is another), what CUDA_VISIBLE_DEVICES and MIG
leave of them, and memory that is the machine's own (GB10, Jetson). In a process of its own, as a context takes hundreds
of MB on each card; and only where torch is a build for cards and a device file says that there may be one.
Source: `torch.cuda` and `torch.xpu` (`get_device_properties`, `mem_get_info`); Linux `sysfs-bus-pci`.
Cost: three seconds where there may be a card, nothing elsewhere.
"""

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType

from halfbyte.system.platforms import calls
from halfbyte.types import Document

KINDS = ("cuda", "xpu")  # AMD's cards are "cuda" in torch
BF16_CAPABILITY = (8, 0)
ASK_S = 120.0
GET_BUILD = "https://pytorch.org/get-started/locally/ names the build of torch for it"
# What says that there may be a card: NVIDIA, Jetson, WSL, AMD, any with a renderer.
_DEVICES = ("nvidia[0-9]*", "nvhost-gpu", "nvmap", "dxg", "kfd", "dri/renderD*")
_VENDORS = {"0x10de": ("NVIDIA", "cuda"), "0x1002": ("AMD", "rocm"), "0x8086": ("Intel", "xpu")}
_DISPLAY, _ACCELERATOR = "0x03", "0x12"  # classes of PCI devices


@dataclass(frozen=True)
class Card:
    """One accelerator, as torch sees it. `capability` is CUDA's compute capability, (8, 0) for an A100; `bf16` None: by
    that. `index` is torch's number. `shares_ram`: its memory is the machine's."""

    name: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int]
    bf16: bool | None = None
    index: int = 0
    shares_ram: bool = False

    @property
    def multiplies_bf16(self) -> bool:
        return self.capability >= BF16_CAPABILITY if self.bf16 is None else self.bf16


@dataclass(frozen=True)
class AvailableCards:
    """`cards` are those to be used, the one with most free memory first; `notes` name those that are not."""

    kind: str = "cpu"
    cards: tuple[Card, ...] = ()
    notes: tuple[str, ...] = ()


def find(root: Path, env: Mapping[str, str], ram_available: int) -> AvailableCards:
    """Cards that torch can use, or why it uses none of those that are there."""
    if env.get("CUDA_VISIBLE_DEVICES", "unset").strip() in ("", "-1"):
        return AvailableCards()
    if sys.platform == "darwin":
        return AvailableCards(notes=("the Apple GPU is not used: none of halfbyte's layers has ever been run there",))
    build = torch_build()
    answer: Document = {}
    if build and (sys.platform == "win32" or any(any((root / "dev").glob(name)) for name in _DEVICES)):
        answer = _asked(env)
    cards = tuple(Card(**{**each, "capability": tuple(each["capability"])}) for each in answer.get("cards", ()))
    if not cards:
        return AvailableCards(notes=tuple(_unused(root, build, answer.get("error", ""))))
    cards = tuple(replace(c, free_bytes=min(c.total_bytes, ram_available)) if c.shares_ram else c for c in cards)
    used, notes = choose(cards)
    return AvailableCards(answer["kind"], used, notes)


def choose(cards: tuple[Card, ...]) -> tuple[tuple[Card, ...], tuple[str, ...]]:
    """Of all cards those that are used together, the one with most free memory first; and what is to be said of the
    choice. One dtype is multiplied on all: a card without bf16 is left out where another has it."""
    bf16 = any(card.multiplies_bf16 for card in cards)
    used = sorted((c for c in cards if c.multiplies_bf16 == bf16), key=lambda c: -c.free_bytes)
    notes = [
        f"card {card.index} ({card.name}) is not used: it has no bf16 multiply and card {used[0].index} "
        f"({used[0].name}) has. CUDA_VISIBLE_DEVICES={card.index} uses it alone"
        for card in cards
        if card not in used
    ]
    first = min(used, key=lambda c: c.index)
    if used[0].free_bytes >= 1.1 * first.free_bytes:
        free = f"{used[0].free_bytes / 1e9:.1f} GB free, card {first.index} {first.free_bytes / 1e9:.1f}"
        notes.append(f"card {used[0].index} ({used[0].name}) comes first: it has {free}")
    else:
        used.sort(key=lambda c: c.index)
    return tuple(used), tuple(notes)


@cache
def torch_build() -> str:
    """What the installed torch is built for: cuda, rocm, xpu; empty for CPUs alone. Read from its version file."""
    spec = importlib.util.find_spec("torch")
    text = calls.text(Path(spec.origin).with_name("version.py")) if spec is not None and spec.origin else ""
    for name, build in (("hip", "rocm"), ("cuda", "cuda"), ("xpu", "xpu")):
        if re.search(rf"^{name}\b[^=\n]*= *['\"]", text, re.MULTILINE):
            return build
    return ""


def _asked(env: Mapping[str, str]) -> Document:
    """`ask` in a process of its own; `{"error": why}` where it does not answer."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return ask()
    try:
        with tempfile.TemporaryDirectory(prefix="halfbyte-cards-") as folder:
            told = Path(folder) / "cards.json"
            command = [sys.executable, "-P", __file__, str(told)]  # -P: this folder's files are no modules of their own
            subprocess.run(command, capture_output=True, text=True, timeout=ASK_S, check=True, env=dict(env))
            answer: Document = json.loads(told.read_text())
        return answer
    except subprocess.CalledProcessError as error:
        return {"error": (error.stderr.strip().splitlines() or [f"it ended with {error.returncode}"])[-1]}
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return {"error": f"{type(error).__name__} while it was asked"}


def ask() -> Document:
    """What torch sees: `kind` and `cards`; or `error`, in its words."""
    import torch

    for kind in KINDS:
        module = getattr(torch, kind, None)
        if module is not None and module.is_available() and module.device_count():
            return {"kind": kind, "cards": [_card(module, n) for n in range(module.device_count())]}
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return {"error": str(error).splitlines()[0]}
    return {"error": "it sees none"}


def _card(module: ModuleType, index: int) -> Document:
    import torch

    has = module.get_device_properties(index)
    try:
        free, total = module.mem_get_info(index)
    except (RuntimeError, AttributeError):  # so busy that not even a context fits, or a driver that does not tell
        free, total = 0, has.total_memory
    capability = (int(getattr(has, "major", 0)), int(getattr(has, "minor", 0)))
    nvidia = module is torch.cuda and not torch.version.hip
    return {
        "name": has.name,
        "total_bytes": int(total),
        "free_bytes": int(free),
        "capability": capability,
        "bf16": None if nvidia else True,  # each card of AMD or Intel that torch is built for has it
        "index": index,
        "shares_ram": bool(getattr(has, "is_integrated", False)),
    }


def _unused(root: Path, build: str, error: str) -> Iterator[str]:
    """A line for each kind of card that is in the machine while torch computes on none."""
    for maker, wanted, name in _present(root):
        if build == wanted:
            why = f"torch, a build for {build}, does not use it: {error or 'no device file of it is here'}"
        else:
            why = f"the installed torch is a build for {build or 'CPUs'}; {GET_BUILD}"
        yield f"{name or f'a card of {maker}'} is seen and not used: {why}"


def _present(root: Path) -> list[tuple[str, str, str]]:
    """(maker, torch's build for it, its name or nothing) of the cards on the PCI bus, and of a Jetson; one a maker.
    Intel's on bus 0 are part of a processor and do not count."""
    by_vendor: dict[str, tuple[str, str, str]] = {}
    for folder in sorted((root / "sys/bus/pci/devices").glob("*")):
        vendor, kind = (calls.text(folder / name).strip() for name in ("vendor", "class"))
        if vendor not in _VENDORS or not kind.startswith((_DISPLAY, _ACCELERATOR)):
            continue
        if vendor == "0x8086" and folder.name.startswith("0000:00:"):
            continue
        told = calls.text(root / f"proc/driver/nvidia/gpus/{folder.name}/information")
        name = re.search(r"Model:\s*(\S.*)", told)
        by_vendor.setdefault(vendor, (*_VENDORS[vendor], name[1].strip() if name else ""))
    jetson = calls.text(root / "proc/device-tree/model").strip(" \n\0")
    if jetson.startswith("NVIDIA"):
        by_vendor.setdefault("0x10de", ("NVIDIA", "cuda", jetson))
    return list(by_vendor.values())


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(ask()))

"""How `halfbyte doctor` looks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.text import Text

from halfbyte.cli import show

if TYPE_CHECKING:
    from halfbyte.doctor import Diagnosis


def checks(values: Iterable[tuple[bool, str, str]]) -> None:
    """Lines of `ok` or `FAILED`: whether something holds, what it is, and what was seen of it."""
    for ok, what, seen in values:
        line = Text("ok      " if ok else "FAILED  ", "green" if ok else "bold red")
        show.out.print(line.append(f"{what}: {seen}", "default"))


def diagnosis(value: Diagnosis) -> None:
    machine, rates = value.machine, value.rates
    flags = " ".join(machine.isa) or "no flags"
    show.labelled("processor", f"{machine.cpu or 'unknown'}, {machine.cores} cores: {flags}")
    show.labelled("memory", f"{show.gb(machine.ram_available_bytes)} free of {show.gb(machine.ram_bytes)}")
    for card in machine.cards:
        show.labelled("card", f"{card.name}, {show.gb(card.free_bytes)} free of {show.gb(card.total_bytes)}")
    show.labelled("cache", f"{value.cache}, {show.gb(value.cache_free_bytes)} free")
    if value.cache_problem:
        show.warning(
            f"the cache cannot be written ({value.cache_problem}): nothing is converted, and bases are quantised anew "
            "for each command\n  fix: export HALFBYTE_CACHE=/path/with/space"
        )
    show.labelled("computes", f"in {value.compute_dtype} ({value.compute_dtype_reason})")
    show.labelled(
        "rates",
        f"{rates.matmul_flops / 1e9:,.0f} GFLOP/s in matrix products, {rates.attention_flops / 1e9:,.0f} in "
        f"attention, {rates.dequant_elements / 1e9:.1f} G weights/s dequantised, memory "
        f"{rates.memory_bytes / 1e9:.1f} GB/s, disk {rates.disk_bytes / 1e9:.2f} GB/s ({rates.source})",
    )
    show.labelled("versions", ", ".join(f"{name} {version}" for name, version in value.versions.items()))
    for wanted, installed in value.outside_ranges.items():
        show.warning(f"{installed} is installed, and the tests cover {wanted}\n  fix: pip install '{wanted}'")
    if value.model is None:
        return
    show.text("")
    show.labelled("model", f"{value.model}, {value.layers} layers at their true width")
    checks((check.ok, check.claim, check.seen) for check in value.checks)

"""table.py: each machine finds its row, by what differs there; the first that fits is it."""

from __future__ import annotations

import pytest

from halfbyte.system.platforms import table

BF16, AVX2 = ("avx2", "avx512f", "avx512_bf16"), ("avx2",)


@pytest.mark.parametrize(
    ("system", "architecture", "kind", "cards", "isa", "starts"),
    [
        ("linux", "x86_64", "cpu", [], BF16, "Linux, x86-64, AVX512-BF16"),
        ("linux", "x86_64", "cpu", [], ("avx2", "amx_bf16"), "Linux, x86-64, AVX512-BF16"),
        ("linux", "x86_64", "cpu", [], ("avx2", "avx512f"), "Linux, x86-64, AVX2"),
        ("linux", "x86_64", "cpu", [], (), "Linux, x86-64, before"),
        ("linux", "aarch64", "cpu", [], ("asimd", "bf16"), "Linux, ARM64"),
        ("linux", "riscv64", "cpu", [], (), "another system"),
        ("darwin", "arm64", "cpu", [], (), "macOS, Apple"),
        ("darwin", "x86_64", "cpu", [], (), "macOS, Intel"),
        ("win32", "AMD64", "cpu", [], (), "Windows, x86-64"),
        ("win32", "ARM64", "cpu", [], (), "Windows, ARM64"),
        ("linux", "x86_64", "cuda", [("NVIDIA H100", True)], BF16, "NVIDIA card from"),
        ("linux", "aarch64", "cuda", [("NVIDIA GB10", True)], (), "NVIDIA card from"),
        ("win32", "AMD64", "cuda", [("NVIDIA RTX 4090", True)], (), "NVIDIA card from"),
        ("linux", "x86_64", "cuda", [("Tesla T4", False)], AVX2, "NVIDIA card below"),
        ("linux", "x86_64", "cuda", [("AMD Instinct MI300X", True)], AVX2, "AMD card"),
        ("win32", "AMD64", "xpu", [("Intel(R) Arc(TM) B580", True)], AVX2, "Intel card"),
    ],
)
def test_a_machine_finds_its_row(
    system: str, architecture: str, kind: str, cards: list[tuple[str, bool]], isa: tuple[str, ...], starts: str
) -> None:
    row = table.here(kind, cards, isa, system=system, architecture=architecture)
    assert row.name.startswith(starts)


def test_every_row_is_whole_and_has_a_name_of_its_own() -> None:
    rows = [row.to_json() for row in table.PLATFORMS]
    assert all(text and "|" not in text for row in rows for text in row.values())
    assert len({row["platform"] for row in rows}) == len(rows)

"""The process's own settings: what is set, what the user's environment keeps, and what the report says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from halfbyte.system import threads as process


@pytest.fixture
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


def test_no_more_threads_than_may_run_at_once(threads: int) -> None:
    torch.set_num_threads(4)
    settings = process.configure(3, env={})
    assert (settings.threads, torch.get_num_threads()) == (3, 3)
    assert settings.threads_why == "3 of 4: more are not allowed to run at once"


def test_fewer_threads_are_left_alone(threads: int) -> None:
    torch.set_num_threads(2)
    assert process.configure(64, env={}).threads == torch.get_num_threads() == 2


@pytest.mark.parametrize("name", process.THREAD_VARIABLES)
def test_threads_that_the_user_asked_for_stay(name: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process.device, "core_share", lambda: 3.5)
    for asked, taken in (("2", 2), ("4", 4), ("16", 4)):  # no more than may run at once
        torch.set_num_threads(1)
        settings = process.configure(1, env={name: asked})
        assert (settings.threads, settings.threads_why, torch.get_num_threads()) == (taken, name, taken)


@pytest.mark.parametrize(
    ("env", "asked"),
    [
        ({}, None),
        ({"OMP_NUM_THREADS": "3"}, (3, "OMP_NUM_THREADS")),
        ({"OMP_NUM_THREADS": "3,2"}, (3, "OMP_NUM_THREADS")),
        ({"MKL_NUM_THREADS": "5"}, (5, "MKL_NUM_THREADS")),
        ({"OMP_NUM_THREADS": "many", "MKL_NUM_THREADS": "0"}, None),
    ],
)
def test_what_counts_as_asked_for(
    env: dict[str, str], asked: tuple[int, str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process.device, "core_share", lambda: 64.0)
    assert process.asked_threads(env) == asked


@pytest.mark.parametrize("name", process.MALLOC_VARIABLES)
def test_the_report_names_what_changes_the_allocator(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.41"))
    assert process.configure(2, env={name: "1"}).allocator == f"glibc 2.41, {name}"
    assert process.configure(2, env={}).allocator == "glibc 2.41"


def test_another_c_library_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    assert process.configure(2, env={}).allocator == "the system's"


@pytest.mark.parametrize(
    ("text", "said"),
    [("always [madvise] never\n", "madvise"), ("[always] madvise never\n", "always"), (None, "unknown")],
)
def test_huge_pages_are_said_as_the_system_has_them(
    text: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_HUGE_PAGES", tmp_path / "enabled")
    if text is not None:
        (tmp_path / "enabled").write_text(text)
    settings = process.configure(2, env={})
    assert settings.huge_pages == said
    assert said in settings.line and settings.to_json()["huge_pages"] == said


def test_a_number_of_kept_products_is_the_users_where_there_is_one() -> None:
    asked, none = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "7", "LRU_CACHE_CAPACITY": "9"}, {}
    process.keep_few_products(asked)
    process.keep_few_products(none)
    assert asked == {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "7", "LRU_CACHE_CAPACITY": "9"}
    assert none == {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(process.PRODUCTS_KEPT), "LRU_CACHE_CAPACITY": "1"}

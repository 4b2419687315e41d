"""What lies in the folder of a trained adapter, by name, and its passport. Neither torch nor pydantic, which lists of
runs do without."""

from pathlib import Path

from halfbyte.errors import AdapterError
from halfbyte.system import limits
from halfbyte.types import Document

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
PASSPORT, PASSPORT_FORMAT = "halfbyte.json", 1
HEAD = "head"  # the folder beside the adapter that holds the config of its head
MOST_BYTES = 5_000_000


def folder_of(name: str | Path) -> Path:
    """The folder of an adapter: a PEFT folder itself, or the one in a run folder."""
    path = Path(name).expanduser()
    return path / "adapter" if (path / "adapter" / ADAPTER_FILES[1]).is_file() else path


def is_adapter(name: str | Path) -> bool:
    return (folder_of(name) / ADAPTER_FILES[1]).is_file()


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's: with its recipe, and with checkpoints or, where these were deleted, its adapter."""
    return (folder / "recipe.yaml").is_file() and ((folder / "checkpoints").is_dir() or is_adapter(folder / "adapter"))


def recipe_around(folder: Path) -> Path | None:
    """The recipe of the run that a checkpoint belongs to, which stands for the passport that it has not; None of any
    other folder."""
    around = folder.absolute().parent
    file = around.parent / "recipe.yaml"
    return file if around.name == "checkpoints" and file.is_file() else None


def read_passport(folder: Path) -> Document | None:
    """The passport of an adapter's folder (`adapters/passport.py`); None where it has none, as PEFT's own have none.
    Raises AdapterError: it cannot be read, or is of another version."""
    path = folder / PASSPORT
    try:
        values: Document = limits.read_json(path, MOST_BYTES)  # type: ignore[assignment]
        belongs = values["belongs_to"]
        if values["format"] == PASSPORT_FORMAT and belongs["base"]["content"] and belongs["quant"]["type"]:
            return values
        why = f"it is of format {values['format']}, and this halfbyte reads format {PASSPORT_FORMAT}"
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"it cannot be read ({type(error).__name__}: {error})"
    raise AdapterError(
        f"{path}: {why}.", fix="remove it, and the adapter is used without a check of what it belongs to"
    )

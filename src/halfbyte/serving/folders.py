"""The folders from which a client may load an adapter while a server runs. No torch.

Links are followed first: whatever is asked for, a folder outside of them is told apart from none at all by nothing.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from halfbyte.errors import AdapterError
from halfbyte.inference import target


@dataclass(frozen=True)
class AdapterFolders:
    """Args: allowed: folders, with links followed, below which adapters may lie. overrides: of their recipes."""

    allowed: tuple[Path, ...] = ()
    overrides: tuple[str, ...] = ()

    @classmethod
    def of(cls, folders: Sequence[Path], overrides: Sequence[str] = ()) -> "AdapterFolders":
        """Raises AdapterError: one of them is no folder."""
        if missing := [folder for folder in folders if not folder.is_dir()]:
            raise AdapterError(f"--allow-adapters {missing[0]} is no folder.", fix="name one that has adapters in it")
        return cls(tuple(folder.resolve() for folder in folders), tuple(overrides))

    def find(self, name: str) -> target.Target | None:
        """The run or adapter of a path, relative to an allowed folder or absolute; None: there is none below them, or
        it reads what is not. Raises HalfbyteError: it is no run."""
        for root in self.allowed:
            with suppress(OSError, ValueError, RuntimeError):  # 5,000 characters, a zero among them, links in a ring
                path = (root / name).resolve()
                if path.is_relative_to(root) and path.is_dir() and self._stays_inside(path):
                    found = target.find(path, self.overrides)
                    template = found.recipe.data.chat_template or ""
                    is_file = template and "{" not in template and Path(template).exists()
                    return None if found.adapter is None or is_file else found
        return None

    def _stays_inside(self, path: Path) -> bool:
        """Whether nothing of it is a link to elsewhere."""
        return all(
            any(file.resolve().is_relative_to(root) for root in self.allowed)
            for folder in (path, path / "adapter")
            for file in folder.glob("*")
        )

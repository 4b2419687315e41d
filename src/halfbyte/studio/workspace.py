"""The folder that a studio works in, and what a page may name of it.

What: `data/`, `recipes/`, `runs/`, and in `.studio/` the commands that were started and the key. There is no other
state, so a server that is killed, a second one and a reload lose nothing. A page gives names, never paths: one part, no
dot or dash at its beginning, no link. Of a recipe it sets `SETTABLE` fields: none lets code of others run.
"""

import os
import re
import secrets
import shutil
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from halfbyte.models.sources import hub, pypi
from halfbyte.recipe.command import ROW_SUFFIXES
from halfbyte.recipe.file import load_recipe
from halfbyte.recipe.start import presets
from halfbyte.runs.folder import RunFolder
from halfbyte.serving.http.refusal import Refusal
from halfbyte.system import files
from halfbyte.types import Document

SUFFIXES = {"data": ROW_SUFFIXES, "recipes": frozenset({".yaml"}), "runs": None}
ROWS = "data.rows"  # how many of the file: `limit` of its entry in data.train
SETTABLE = frozenset({
    ROWS, "quant.type", "lora.r", "lora.lora_alpha", "lora.lora_dropout", "lora.target_modules", "data.eval",
    "data.fields", "data.format", "data.mask", "data.max_length", "data.overlong", "train.learning_rate", "train.seed",
    "train.gradient_accumulation_steps", "train.max_steps", "train.num_train_epochs", "train.within",
    "train.per_device_train_batch_size",
})  # fmt: skip
_NAME = re.compile(r"\w[\w.+@ -]{0,99}")
_HELD_OUT = re.compile(r"None|none|auto|\d+|[\d.]+ ?%")
_HUB_ROWS = re.compile(r"hub:[\w.-]+/[\w.-]+(\?[\w=&.-]*)?")


@dataclass(frozen=True)
class Workspace:
    """`folder` is the working directory of every command; bases may also be below `bases`."""

    folder: Path
    bases: tuple[Path, ...] = ()
    upload_bytes: int = 2_000_000_000

    @property
    def jobs(self) -> Path:
        return self.folder / ".studio" / "jobs"

    def begin(self) -> str:
        """Make what is missing. Returns the key of this folder, which its owner alone can read."""
        for path in (*(self.folder / kind for kind in SUFFIXES), self.jobs):
            path.mkdir(parents=True, exist_ok=True)
            files.clear_dead(path)
        key = self.folder / ".studio" / "key"
        if not key.is_file():
            with os.fdopen(os.open(key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_urlsafe(24))
        return key.read_text(encoding="ascii").strip()

    def path(self, kind: str, name: object, *, new: bool = False) -> Path:
        """What a page names, relative to the folder. Raises Refusal: no name, nothing there, a link, or elsewhere."""
        if kind not in SUFFIXES or not isinstance(name, str) or not _NAME.fullmatch(name):
            raise Refusal(400, f"{str(name)[:100]!r} is no name: letters and digits, then also .+@-_", code="name")
        allowed, path = SUFFIXES[kind], Path(kind) / name
        whole = self.folder / path
        if allowed is not None and path.suffix.lower() not in allowed:
            raise Refusal(400, f"{name}: the name has to end in {', '.join(sorted(allowed))}.", code="suffix")
        if whole.is_symlink() or whole.resolve().parent != (self.folder / kind).resolve():
            raise Refusal(400, f"{path} is a link, and links are not followed here.", code="link")
        if not new and not whole.exists():
            raise Refusal(404, f"there is no {path}.", code="missing")
        return path

    def base(self, name: object) -> str:
        """A base that a page names: packaged, of the hub, or a path below the folders. Raises Refusal."""
        text, roots = str(name).strip(), (self.folder, *self.bases)
        path = (self.folder / text).resolve()
        here = path.exists() and any(path.is_relative_to(root) for root in roots)
        if text and (text in pypi.MODELS or here or (hub.HUB_ID.fullmatch(text) and not path.exists())):
            return text
        allowed = f"{', '.join(pypi.MODELS)}, org/name of the hub, or a path below {', '.join(map(str, roots))}"
        raise Refusal(400, f"{text[:200]!r} is no base: {allowed} (--bases DIR allows another).", code="base")

    def rows(self, name: object) -> str:
        """Rows that a page names: a dropped file or a data set of the hub."""
        return str(name) if _HUB_ROWS.fullmatch(str(name)) else str(self.path("data", str(name).removeprefix("data/")))

    def listing(self) -> Document:
        """Files and recipes, the newest first, and when recipes have changed; bases that are here; presets."""
        there: Document = {"folder": str(self.folder), "bases": [*pypi.MODELS], "presets": presets()}
        for root in (self.folder, *self.bases):
            names = [*root.glob("*.gguf"), *(path.parent for path in root.glob("*/config.json"))]
            there["bases"] += [p.name if root == self.folder else str(p) for p in sorted(names)]
        for kind in SUFFIXES:
            paths = sorted((self.folder / kind).iterdir(), key=lambda path: -path.lstat().st_mtime)
            there[kind] = [p.name for p in paths if _NAME.fullmatch(p.name) and not p.is_symlink()]
        there["changed"] = {name: (self.folder / "recipes" / name).stat().st_mtime for name in there["recipes"]}
        return there

    async def upload(self, name: str, size: int, parts: AsyncIterator[bytes]) -> Path:
        """A dropped file, whole or not at all, under a new name. Raises Refusal: too large, no room."""
        self.path("data", name, new=True)
        folder = self.folder / "data"
        room, taken = min(self.upload_bytes, files.free_bytes(folder) // 2), 0
        too_large = Refusal(413, f"{name} is larger than {room:,} bytes, the most that is taken here.", code="size")
        if size > room:
            raise too_large
        temporary = files.beside(folder / secrets.token_hex(8))
        try:
            with temporary.open("xb") as file:
                async for part in parts:
                    taken += file.write(part)
                    if taken > room:
                        raise too_large
            if not taken:
                raise Refusal(400, f"{name} is empty.", code="empty")
            stem, dot, suffix = name.partition(".")
            names = (name, *(f"{stem}-{number}{dot}{suffix}" for number in range(2, 10_000)))
            path = next(path for n in names if not os.path.lexists(path := folder / n))  # a link, too
            os.link(temporary, path)  # refuses where another has appeared
        finally:
            temporary.unlink(missing_ok=True)
        return path

    def change(self, name: str, values: Mapping[str, object]) -> None:
        """Set fields of a recipe; null takes one away. Raises Refusal: not for a page to set. RecipeError: as of any
        recipe; the file is then as it was."""
        path = self.folder / self.path("recipes", name)
        if wrong := [field for field in values if field not in SETTABLE]:
            raise Refusal(400, f"{wrong[0][:80]} is not set here; edit {path}.", code="field")
        load_recipe(path)  # as it is
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        for field, value in values.items():
            section, _, key = field.partition(".")
            inner = recipe[section] = recipe.get(section) or {}  # of which every line may be commented out
            if field == ROWS:
                names = inner["train"][0]["path"] if isinstance(inner["train"], list) else inner["train"]
                key, value = "train", names if value is None else [{"path": names, "limit": value}]
            inner.pop(key, None)
            if value is not None:
                inner[key] = self.rows(value) if field == "data.eval" and not _HELD_OUT.fullmatch(str(value)) else value
        temporary = files.beside(path.with_name(secrets.token_hex(8)))
        try:
            temporary.write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), encoding="utf-8")
            load_recipe(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def delete(self, kind: str, name: str, *, said: object) -> Document:
        """Delete a file, a recipe or a run, whose name is said once more. Raises Refusal."""
        path = self.folder / self.path(kind, name)
        if said != name:
            raise Refusal(400, f"to delete {kind}/{name}, confirm its name.", code="confirm")
        if kind == "runs" and (writer := RunFolder(path).writer()) is not None:
            raise Refusal(409, f"{kind}/{name} is being written by process {writer}; stop it first.", code="running")
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        return {"deleted": str(path)}

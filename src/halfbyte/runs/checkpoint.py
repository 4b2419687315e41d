"""Checkpoints that are whole or absent, nothing pickled; and the best adapter so far.

Why: upstream writes pickles one by one into the final folder, and resumes with a *fresh* optimiser, silently, when
`optimizer.pt` is missing (`transformers/trainer.py`, `_load_optimizer_and_scheduler`).
Here everything is written under a temporary name, synced, listed in `manifest.json` with sizes and sha256, and renamed.
A `Snapshot` is taken between two steps and written by a thread beside the next ones (`checkpoint.py`).
Format: safetensors for tensors, JSON for the rest; `adapter_*` files are PEFT's, `trainer_state.json` is transformers'.
Cost: one write of the adapter and of its optimiser state (8 bytes a trained parameter for AdamW).

Checkpoints written by a thread, while training goes on.

What: between two steps a snapshot is taken, which copies nothing. The thread reads weights and optimiser during the
next step's forward and backward; before the optimiser changes them, the run waits until they are read. Hashing,
syncing, reading back and removing older checkpoints go on during later steps. One checkpoint is written at a time.
Why: on a slow disk a checkpoint takes as long as many steps.
Cost: a wait where a forward and backward is shorter than writing 12 bytes a trained number into the system's memory.
"""

import json
import math
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from halfbyte.errors import DiskFull, RunError, TrainError, typed
from halfbyte.recipe.schema import Recipe, Train
from halfbyte.runs.folder import RunFolder, read_json
from halfbyte.runs.points import BEST, FORMAT_VERSION, MANIFEST, checkpoints, damage, is_whole
from halfbyte.system import accelerator, files
from halfbyte.types import Document

NESTED = "/"  # between a state's name and a name inside it
BEST_JSON = "best.json"
OPTIMIZER_TENSORS, OPTIMIZER_JSON = "optimizer.safetensors", "optimizer.json"
RNG_TENSORS = "rng.safetensors"
HAS_JSON = (type(None), bool, int, float, str, list, tuple, dict, torch.Tensor)


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint of `step` that is still to be written: random state, schedule and numbers as they are now, tensors
    as they will be when they are read. So nothing is copied, and nothing may change them until `write` says so."""

    step: int
    write_adapter: Callable[[Path], None]
    trainer_state: str
    tensors: dict[str, torch.Tensor]
    state: str
    random: dict[str, torch.Tensor]
    trained: Document


@dataclass(frozen=True)
class Randomness:
    """Every random state that training draws from, as it is now: some 10 kB."""

    tensors: dict[str, torch.Tensor]
    python: tuple[Any, ...]

    @classmethod
    def now(cls) -> Self:
        _, key, position, has_gauss, gauss = np.random.get_state()
        tensors = {
            "torch": torch.get_rng_state(),
            "numpy_key": torch.from_numpy(np.asarray(key).astype(np.int64)),
            "numpy_position": torch.tensor([int(position), int(has_gauss)]),
            "numpy_gauss": torch.tensor(float(gauss), dtype=torch.float64),
        }
        if (cards := accelerator.module()) is not None:
            tensors |= {f"cuda.{i}": cards.get_rng_state(i) for i in range(cards.device_count())}
        return cls(tensors, random.getstate())


def snapshot(
    step: int, *, randomness: Randomness, write_adapter: Callable[[Path], None], trainer_state: str,
    optimizer: torch.optim.Optimizer, scheduler: LRScheduler, trained: Document,
    scaler: torch.amp.GradScaler | None = None,
) -> Snapshot:  # fmt: skip
    """Everything that a run goes on with.

    Args:
        write_adapter: writes PEFT's two adapter files into the folder it is given.
        trainer_state: the text of transformers' `trainer_state.json`.
        trained: what the run is trained with, as `points.trained_with` makes it.
        randomness: before the step that follows.
        scaler: of the loss, where a run computes in fp16 on a card.
    """
    tensors, rest = _flatten(optimizer.state_dict())
    state = {"optimizer": rest, "scheduler": _plain(scheduler.state_dict()), "python_random": randomness.python}
    state |= {} if scaler is None else {"scaler": scaler.state_dict()}
    return Snapshot(step, write_adapter, trainer_state, tensors, json.dumps(state), randomness.tensors, trained)


def write(folder: Path, taken: Snapshot, have_read: Callable[[], None] = lambda: None) -> Path:
    """Write `folder/step-NNNNNN` whole or not at all, and read it back.

    Args:
        have_read: called when weights and optimiser may change again; what is left to do is the disk's.

    Raises:
        OSError, SafetensorError: the disk is full or refuses; the temporary folder is removed, and earlier
            checkpoints are untouched.
        TrainError: what was read back is not what was written.
    """
    final = folder / f"step-{taken.step:06d}"
    if final.exists() and is_whole(final, hashes=True):
        return final
    with files.new_folder(final) as temporary:
        taken.write_adapter(temporary)
        save_file({n: t.detach().cpu().contiguous() for n, t in taken.tensors.items()}, temporary / OPTIMIZER_TENSORS)
        have_read()
        (temporary / "trainer_state.json").write_text(taken.trainer_state)
        (temporary / OPTIMIZER_JSON).write_text(taken.state)
        save_file(taken.random, temporary / RNG_TENSORS)
        _write_manifest(temporary, step=taken.step, trained=taken.trained)
    for path in final.iterdir():
        files.forget(path)
    if (wrong := damage(final, hashes=True)) is not None:
        raise TrainError(
            f"checkpoint {final} is not what was written: {wrong}. The older ones were kept.",
            fix=f"look at the disk (dmesg, smartctl){_go_on(final)}",
        )
    return final


def _write_manifest(folder: Path, **more: object) -> None:
    """Sizes and hashes of all files of a folder, which `points.damage` compares."""
    listed = {p.name: {"bytes": p.stat().st_size, "sha256": files.sha256(p)} for p in sorted(folder.iterdir())}
    manifest = {"format": FORMAT_VERSION, **more, "files": listed}
    (folder / MANIFEST).write_text(json.dumps(files.seal(manifest), indent=1))


@contextmanager
def whole_or_absent(what: str, folder: Path) -> Iterator[Path]:
    """`files.new_folder`; if the disk refuses, a TrainError (DiskFull) with the system's reason."""
    try:
        with files.new_folder(folder) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:
        raise unwritable(what, folder, error) from error


def unwritable(what: str, path: Path, error: OSError | SafetensorError) -> TrainError:
    """What to raise where the disk refuses."""
    full = files.is_full(error)
    why = files.no_room(path) if full else getattr(error, "strerror", None) or error
    return (DiskFull if full else TrainError)(
        f"{what} could not be written: {why}.", fix=f"{'free some space' if full else 'look at the disk'}{_go_on(path)}"
    )


def _go_on(path: Path) -> str:
    """The command that goes on with the run that a path lies in, if it lies in one."""
    run = next((above for above in path.parents if (above / "recipe.yaml").is_file()), None)
    return "" if run is None else f", then go on from the newest whole checkpoint: halfbyte train {typed(run)} --resume"


def prune(folder: Path, keep: int | None) -> None:
    """Remove the oldest whole checkpoints so that `keep` stay, and temporaries of dead writers."""
    files.clear_dead(folder)
    for path in checkpoints(folder)[:-keep] if keep is not None else []:
        shutil.rmtree(path, ignore_errors=True)


def load_optimizer(
    path: Path, optimizer: torch.optim.Optimizer, scheduler: LRScheduler, scaler: torch.amp.GradScaler | None = None
) -> None:
    """Put optimiser, schedule and the loss's scale back. Raises RunError: they are of other parameters."""
    state = json.loads((path / OPTIMIZER_JSON).read_text())
    saved = [len(group["params"]) for group in state["optimizer"]["param_groups"]]
    trained = [len(group["params"]) for group in optimizer.param_groups]
    if saved != trained:
        raise RunError(
            f"checkpoint {path} holds the optimiser state of {sum(saved)} tensors, this recipe trains {sum(trained)}.",
            fix="resume with the recipe in the run folder, unchanged",
        )
    optimizer.load_state_dict(_unflatten(load_file(path / OPTIMIZER_TENSORS), state["optimizer"]))
    scheduler.load_state_dict(state["scheduler"])
    if scaler is not None and state.get("scaler"):
        scaler.load_state_dict(state["scaler"])
    if isinstance(scheduler, LambdaLR):  # over another number of steps the rate of the next one is another
        for group, rate, share in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["lr"] = rate * share(scheduler.last_epoch)


def load_rng(path: Path) -> None:
    """Put the random state of torch (CPU and cards), numpy and Python back."""
    tensors = load_file(path / RNG_TENSORS)
    torch.set_rng_state(tensors["torch"])
    # on another number of cards than it was written on, those that are new begin as they are
    if (cards := accelerator.module()) is not None:
        for index in range(cards.device_count()):
            if (state := tensors.get(f"cuda.{index}")) is not None:
                cards.set_rng_state(state, index)
    position, has_gauss = (int(v) for v in tensors["numpy_position"])
    key = tensors["numpy_key"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, position, has_gauss, float(tensors["numpy_gauss"])))
    version, internal, gauss = json.loads((path / OPTIMIZER_JSON).read_text())["python_random"]
    random.setstate((version, tuple(internal), gauss))


def _flatten(state: Document) -> tuple[dict[str, torch.Tensor], Document]:
    """An optimiser's state dict as (tensors by `index.name`, JSON). Scalars of the state stay in the JSON."""
    tensors: dict[str, torch.Tensor] = {}
    stored = set[int]()
    scalars: dict[str, Document] = {}
    for index, values in state["state"].items():
        for name, value in values.items():
            # bitsandbytes keeps the 8-bit state and its scales in a dict of their own
            inside = {f"{name}{NESTED}{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
            for key, part in inside.items():
                if isinstance(part, torch.Tensor):
                    # safetensors refuses tensors that share storage: bitsandbytes has one map for all
                    shared = part.untyped_storage().data_ptr() in stored
                    stored.add(part.untyped_storage().data_ptr())
                    tensors[f"{index}.{key}"] = part.detach().clone() if shared else part.detach()
                else:
                    scalars.setdefault(str(index), {})[key] = _plain(part)
    return tensors, {"scalars": scalars, "param_groups": _plain(state["param_groups"])}


def _unflatten(tensors: dict[str, torch.Tensor], rest: Document) -> Document:
    flat = [(*key.split(".", 1), tensor) for key, tensor in tensors.items()]
    flat += [(index, name, value) for index, values in rest["scalars"].items() for name, value in values.items()]
    state: dict[int, Document] = {}
    for index, key, value in flat:
        values = state.setdefault(int(index), {})
        name, nested, inner = key.partition(NESTED)
        if nested:
            values.setdefault(name, {})[inner] = value
        else:
            values[name] = value
    groups = [{k: tuple(v) if k == "betas" else v for k, v in group.items()} for group in rest["param_groups"]]
    return {"state": state, "param_groups": groups}


def _plain(value: object) -> object:
    """JSON-ready copy; a 0-d tensor becomes a number, an object without a JSON form is left out of its dict."""
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else value.tolist()
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if isinstance(v, HAS_JSON)}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def metric_name(train: Train) -> str:
    """The name, in a row of an evaluation, of the metric that says which is the best."""
    return f"eval_{train.best_metric}"


@dataclass
class Best:
    """The adapter of the best evaluation so far, which has the lowest `metric`, or the `greatest`. It is in `folder`;
    its `value` and its `step` are None before the first evaluation; `compared`: what it lost on the rows of the run's
    comparison with the base, as `training.comparison.Rows`."""

    metric: str
    folder: Path
    greatest: bool = False
    value: float | None = None
    step: int | None = None
    compared: list[list[float]] | None = None

    @classmethod
    def of(cls, recipe: Recipe, run: RunFolder) -> Self:
        """The best of a run so far, also of an earlier process, which may have been killed between two renames."""
        best = cls(metric_name(recipe.train), run.checkpoints / BEST, recipe.train.best_is_greatest)
        older = files.aside(best.folder)
        if not best.folder.exists() and older.exists():
            older.rename(best.folder)
        row = read_json(best.folder / BEST_JSON)
        if row.get("metric") == best.metric:
            best._take(row)
        return best

    def _take(self, entry: Document) -> None:
        self.value, self.step = entry["value"], entry["step"]
        self.compared = entry.get("compared")

    def is_better(self, value: float) -> bool:
        if self.value is None or not math.isfinite(value):
            return math.isfinite(value)
        return value > self.value if self.greatest else value < self.value

    def keep(self, entry: Document, write_adapter: Callable[[Path], None]) -> None:
        """Put an adapter in the place of the best one before, which stays there after a TrainError."""
        with whole_or_absent(f"the best adapter {self.folder}", self.folder) as temporary:
            write_adapter(temporary)
            (temporary / BEST_JSON).write_text(json.dumps({"metric": self.metric, **entry}))
            _write_manifest(temporary)
        self._take(entry)


ABANDON_S = 1.0


@dataclass
class CheckpointWriter:
    """The checkpoints of one process in `folder`, of which `keep` stay. `full`: called with a message where the disk is
    full; the run goes on with the older checkpoints."""

    folder: Path
    keep: int | None
    saved: Callable[[Path, str], None]  # called with each whole checkpoint and the reason that was given for it
    full: Callable[[str], None]
    _thread: threading.Thread | None = None
    _read: threading.Event = field(default_factory=threading.Event)
    _whole: list[Path] = field(default_factory=list)
    _errors: list[BaseException] = field(default_factory=list)
    _reason: str = ""

    def start(self, snapshot: Snapshot, reason: str) -> None:
        """Begin to write; waits for the one before."""
        self.finish()
        self._read, self._reason = threading.Event(), reason
        # a daemon thread: a process that ends at once does not wait for a disk
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint", daemon=True)
        self._thread.start()

    def wait_until_read(self) -> None:
        """Return when weights and optimiser may change again."""
        if self._thread is not None:
            self._read.wait()

    def look(self) -> None:
        """`finish` if the thread is done; never waits."""
        if self._thread is not None and not self._thread.is_alive():
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, and report it. Raises TrainError: it could not be written, for
        another reason than a full disk."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        for path in self._whole:
            self.saved(path, self._reason)
        errors = self._errors
        self._whole, self._errors = [], []
        for error in errors:
            if not isinstance(error, (OSError, SafetensorError)):
                raise error
            ours = unwritable("a checkpoint", self.folder, error)
            if not isinstance(ours, DiskFull):
                raise ours from error
            self.full(ours.message)

    def abandon(self) -> None:
        """Give the thread a second to end; what it leaves half written is cleared by the next process."""
        if self._thread is not None:
            self._thread.join(ABANDON_S)

    def _write(self, snapshot: Snapshot) -> None:
        try:
            path = write(self.folder, snapshot, self._read.set)
            prune(self.folder, self.keep)
            self._whole.append(path)
        except BaseException as error:  # raised by `finish`, in the run's own thread
            self._errors.append(error)
        finally:
            self._read.set()

"""`kill -9` at random moments of short runs: each resume must work, and end in the bytes of the uninterrupted run.

    python -m tests.destruction.kills --count 100 --seed 0
    python -m tests.destruction.kills --count 50 --signals    # SIGTERM, SIGINT, each twice, SIGHUP instead
    python -m tests.destruction.kills --count 20 --kinds rewards

A process that has imported everything is forked for each run, so that a run takes a second; the kill is a real SIGKILL.
Half of the moments are times, drawn evenly from the length of the uninterrupted run. Half are file operations (opening
for writing, renaming, removing, making a folder: between two of them lie the states that a disk can be left in) or
calls of what computes (a micro-batch, a token that is written, a reward), drawn evenly from those that the
uninterrupted run makes. A third of the resumed runs is killed again. Runs have dropout, evaluations and checkpoints,
and in turn LoRA+, an 8-bit optimiser, blocks of plain text, a streamed base (of recurrent layers too), pairs (DPO),
rewards (GRPO); each second one builds its base's store.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a pool of threads does not survive a fork

from tqdm import tqdm

from halfbyte import finetune
from halfbyte.recipe.file import load_recipe
from halfbyte.runs.folder import RunFolder
from halfbyte.scoring.rewards import RewardFunction
from halfbyte.training.trainer import StepTrainer
from halfbyte.writing.writer import Writer
from tests import letters, pairs, small_models, tiny_run

LIMIT_S = 900.0
COMMON: dict[str, Any] = {
    "lora__lora_dropout": 0.1,
    "train__max_steps": 8,
    "train__save_strategy": "steps",
    "train__save_steps": 2,
    "train__save_total_limit": 2,
    "train__eval_strategy": "steps",
    "train__eval_steps": 3,
}
EVALUATED = ("train__eval_strategy", "train__eval_steps")
KINDS: dict[str, dict[str, Any]] = {
    "best of evaluations": {"train__load_best_model_at_end": True},
    "LoRA+": {"train__loraplus_lr_ratio": 8, "train__weight_decay": 0.1, "train__learning_rate": 1e-3},
    "8-bit optimiser": {"train__optim": "adamw_8bit", "lora__r": 64},
    "stream": {
        "data__packing": "stream",
        "data__max_length": 24,
        "train__eval_strategy": None,
        "train__eval_steps": None,
    },
    "streamed base": {"quant__placement": "streamed", "train__gradient_checkpointing": True},
    **{kind: {"quant__placement": "streamed", "train__gradient_checkpointing": True} for kind in small_models.HYBRIDS},
    "pairs": {"train__method": "dpo", "train__learning_rate": 1e-2, "train__max_steps": 6},
    "rewards": {
        "train__method": "grpo", "train__rewards": f"{letters.__file__}:score", "train__num_generations": 4,
        "train__max_completion_length": 6, "train__mask_truncated_completions": False, "lora__lora_dropout": 0.0,
        "train__max_steps": 4, "data__max_length": 64,
    },
}  # fmt: skip
KEYS = ("step", "loss", "learning_rate", "grad_norm", "tokens", "eval_loss", "reward", "eval_reward", "margin")
# What computes, by the phase of a step that it is.
CALLS = {
    "writing": (Writer, "next_logits"), "reward": (RewardFunction, "__call__"),
    "training": (StepTrainer, "_run_micro_batch"), "rows without gradients": (StepTrainer, "row_sums"),
}  # fmt: skip
FILES = "files"


@dataclass(frozen=True)
class Moment:
    """When a run is killed: after so many seconds, or before its operation of this number in a `phase` (its file
    operations, or one of `CALLS`); by these signals."""

    seconds: float | None = None
    operation: int | None = None
    phase: str = FILES
    signals: tuple[signal.Signals, ...] = (signal.SIGKILL,)


@dataclass(frozen=True)
class Whole:
    """What an uninterrupted run left, and how long it was."""

    adapter: bytes
    rows: list[list[Any]]
    seconds: float
    operations: dict[str, int]


def recipe(folder: Path, kind: str) -> Path:
    tiny_run.rows(folder / "held.jsonl", 6, seed=5)
    values = COMMON | KINDS[kind]
    if kind == "pairs":
        pairs.rows(folder / "train.jsonl", 16)
        pairs.rows(folder / "held.jsonl", 6, seed=5)
    if kind == "stream":
        draw = random.Random(3)
        texts = [" ".join(draw.choices(["red", "cup", "old", "tree"], k=draw.randint(1, 19))) for _ in range(40)]
        (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        values = values | {"data__train": folder / "texts.jsonl"}
    else:
        values = values | {"data__eval": folder / "held.jsonl"}
    if kind in small_models.HYBRIDS:
        tiny_run.hybrid(folder / "model", kind)
    tiny_run.recipe(folder, **values)
    return folder / "recipe.yaml"


SIGNALS = (
    (signal.SIGTERM,),
    (signal.SIGINT,),
    (signal.SIGINT, signal.SIGINT),
    (signal.SIGTERM, signal.SIGTERM),
    (signal.SIGHUP,),
)
BETWEEN_S = 1.1  # two signals


def count_operations(folder: Path, moment: Moment, told: int) -> None:
    """Count the operations below `folder` and the calls of `CALLS` from now on; before one of them this process is
    killed. The counts so far stand in the file `told`, eight bytes each."""
    seen = 0

    def kill() -> None:
        os.pwrite(told, b"!", 16)
        os.kill(os.getpid(), moment.signals[0])

    def count(phase: str, place: int, call: Callable[..., Any]) -> Callable[..., Any]:
        numbers = itertools.count()

        def counted(*args: Any, **kwargs: Any) -> Any:
            number = next(numbers)
            if moment.phase == phase and number == moment.operation:
                kill()
            os.pwrite(told, f"{number + 1:8d}".encode(), 24 + 8 * place)
            return call(*args, **kwargs)

        return counted

    for place, (phase, (cls, name)) in enumerate(CALLS.items()):
        setattr(cls, name, count(phase, place, getattr(cls, name)))

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event == "open":
            path, mode = args[0], args[1]
            if not isinstance(mode, str) or not set(mode) & set("wax+"):
                return
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
            path = args[0]
        else:
            return
        if isinstance(path, (str, os.PathLike)) and str(path).startswith(str(folder)):
            if moment.phase == FILES and seen == moment.operation:
                kill()
            seen += 1
            os.pwrite(told, f"{seen:8d}".encode(), 0)

    sys.addaudithook(hook)


def forked(path: Path, run: Path, cache: Path, *, resume: bool, moment: Moment) -> tuple[int, float, dict[str, int]]:
    """(exit code, negative for a signal; seconds; operations by phase) of one run in a process of its own."""
    told = os.open(run.parent / "operations", os.O_CREAT | os.O_RDWR | os.O_TRUNC)
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            for stream, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(run.parent / name, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
            os.environ["HALFBYTE_CACHE"] = str(cache)
            tqdm.set_lock(threading.RLock())  # its own is shared with the process before, which was killed holding it
            count_operations(run.parent, moment, told)
            finetune.train(load_recipe(path, [f"output={run}"]), resume=resume)
            code = 0
        except KeyboardInterrupt:
            code = 130
        except BaseException as error:  # told by the exit code
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(code)
    waiting, at = list(moment.signals), moment.seconds
    if moment.operation is not None:
        del waiting[:1]  # it sends that one to itself
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        seconds = time.monotonic() - began
        if ended:
            break
        if at is None and moment.operation is not None and os.pread(told, 1, 16):
            at = seconds + BETWEEN_S
        if at is not None and waiting and seconds > at:
            os.kill(child, waiting.pop(0))
            at = seconds + BETWEEN_S
        if seconds > LIMIT_S:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.0005)
    places = {FILES: 0, **{phase: 24 + 8 * place for place, phase in enumerate(CALLS)}}
    # none yet: a hole before the mark of the kill
    operations = {phase: int(os.pread(told, 8, place).strip(b"\0 ") or 0) for phase, place in places.items()}
    os.close(told)
    return os.waitstatus_to_exitcode(status), seconds, operations


def left(run: Path) -> tuple[bytes, list[list[Any]]]:
    adapter = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    return adapter, [[row.get(key) for key in KEYS] for row in RunFolder(run).read_metrics()]


def state(run: Path, cache: Path) -> str:
    """Where a killed run was, told from what it left."""
    if not run.exists():
        return "store" if any(cache.rglob("*.tmp")) or any(cache.rglob(".*")) else "before the run folder"
    if (run / "report.json").exists():
        return "after the report"
    if any(run.glob("adapter")) or any(run.glob(".adapter*")):
        return "the end"
    if any((run / "checkpoints").glob(".step-*")):
        return "a save"
    if any((run / "checkpoints").glob(".best*")):
        return "keeping the best"
    return "steps and evaluations"


def whole(path: Path, folder: Path) -> Whole:
    folder.mkdir()
    code, seconds, operations = forked(path, folder / "run", folder / "cache", resume=False, moment=Moment())
    if code:
        raise RuntimeError(f"the uninterrupted run failed: {(folder / 'err').read_text()[-2000:]}")
    return Whole(*left(folder / "run"), seconds, operations)


def one(
    number: int, kind: str, path: Path, wanted: Whole, folder: Path, shared: Path, seen: Counter[str], *, gently: bool
) -> None:
    """One run, killed once or twice (`gently`: by a signal that it hears), and resumed until it ends.

    Raises:
        AssertionError: a resume failed, or it ended in other bytes.
    """
    draw, resume = random.Random(f"{number} {kind}"), False
    cache = folder / "cache" if number % 2 else shared
    run = folder / "run"
    folder.mkdir()
    kills = 2 if draw.random() < 1 / 3 else 1
    for _ in range(kills):
        by_time = draw.random() < 0.5
        phase = draw.choice([phase for phase, count in wanted.operations.items() if count])
        seconds, operation = draw.uniform(0, wanted.seconds), draw.randrange(wanted.operations[phase])
        signals = draw.choice(SIGNALS) if gently else (signal.SIGKILL,)
        moment = Moment(seconds, signals=signals) if by_time else Moment(None, operation, phase, signals)
        code, _, _ = forked(path, run, cache, resume=resume, moment=moment)
        if gently:
            seen[f"{' and '.join(s.name for s in signals)} in: {state(run, cache)}"] += 1
        elif code == -signal.SIGKILL:
            seen["kills"] += 1
            seen[f"in: {state(run, cache)}"] += 1
            seen[f"before: {phase}"] += not by_time
        else:
            seen["ended before the kill"] += 1
        if code not in (0, 130, *(-s for s in signals)):
            raise AssertionError(f"run {number}: {(folder / 'err').read_text()[-2000:]}")
        resume = run.exists()
    code, _, _ = forked(path, run, cache, resume=resume, moment=Moment())
    if code:
        raise AssertionError(f"run {number} did not go on: {(folder / 'err').read_text()[-2000:]}")
    adapter, rows = left(run)
    if adapter != wanted.adapter:
        raise AssertionError(f"run {number} ({kind}) ended in other bytes")
    if rows != wanted.rows:
        raise AssertionError(f"run {number} ({kind}) has other metrics: {rows} where {wanted.rows}")
    rest = [p for p in run.rglob(".*") if p.name != ".lock"]
    if rest:
        raise AssertionError(f"run {number} left {rest}")


def kill(
    count: int, seed: int, folder: Path, kinds: tuple[str, ...] = tuple(KINDS), *, gently: bool = False
) -> tuple[Counter[str], list[str]]:
    """What became of `count` runs, and what went wrong."""
    seen: Counter[str] = Counter()
    failed: list[str] = []
    made: dict[str, tuple[Path, Whole]] = {}
    for number in range(seed, seed + count):
        kind = kinds[number % len(kinds)]
        if kind not in made:
            own = folder / kind.replace(" ", "_")
            own.mkdir()
            path = recipe(own, kind)
            made[kind] = path, whole(path, own / "whole")
        path, wanted = made[kind]
        at = path.parent / f"killed-{number}"
        try:
            one(number, kind, path, wanted, at, path.parent / "whole" / "cache", seen, gently=gently)
        except AssertionError as error:
            failed.append(str(error))
        else:
            seen["same bytes"] += 1
            print(f"{number} {kind}: same bytes", flush=True)
            shutil.rmtree(at, ignore_errors=True)
    return seen, failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signals", action="store_true")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=tuple(KINDS))
    given = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        seen, failed = kill(given.count, given.seed, Path(folder), tuple(given.kinds), gently=given.signals)
    for text in failed[:5]:
        print(f"--- {text}")
    print(f"{given.count} runs from seed {given.seed} in {time.monotonic() - began:.0f} s: "
          + ", ".join(f"{n} {name}" for name, n in sorted(seen.items())) + f"; {len(failed)} failed")  # fmt: skip
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

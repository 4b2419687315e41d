"""One process of several is killed, or goes silent, at random moments of short runs under torchrun's own agent.

    python -m tests.destruction.kills_together --count 30 --seed 0
    python -m tests.destruction.kills_together --count 3 --silent    # SIGSTOP instead of SIGKILL

Each run must end by itself, restarted by the agent (`--max-restarts`) and gone on from its last checkpoint, in the
bytes of the undisturbed one; from the moment at which the fault can be seen (at once, or 20 seconds after a process
went silent) to the restart of all processes it should not take longer than `WITHIN_S`; what does is counted apart.
Exit code: 1 where a run failed, 3 where some were only late. The agent is torch's
(`torch.distributed.launcher.api.elastic_launch`, which torchrun calls); its workers are forked from a server that has
imported everything, so that a run takes seconds. A moment is a number of lines of the metrics, drawn evenly from those
of the undisturbed run, and a part of what one line takes beside it (none: of the time before the first). Runs that had
ended before are made again.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # also of the server

import psutil
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from halfbyte.distributed.watch import SILENT_S
from tests import tiny_run
from tests.destruction.kills import left

WITHIN_S, GIVE_UP_S = 30.0, 600.0
VALUES = {
    "lora__lora_dropout": 0.1,
    "train__max_steps": 12,
    "train__save_strategy": "steps",
    "train__save_steps": 2,
    "train__eval_strategy": "steps",
    "train__eval_steps": 3,
    "train__max_tokens_per_micro_batch": 40,
}


def worker(recipe: str, out: str) -> None:
    """One process of one attempt; the file says that it has begun."""
    from halfbyte import finetune
    from halfbyte.errors import HalfbyteError
    from halfbyte.recipe.file import load_recipe

    attempt, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
    (Path(out).parent / f"{Path(out).name}.{attempt}.{rank}").write_text(str(os.getpid()))
    try:
        finetune.train(load_recipe(Path(recipe), [f"output={out}"]))
    except HalfbyteError as error:
        sys.stderr.write(f"rank {rank}: {error}\n")
        os._exit(error.exit_code)
    ended(Path(out), int(attempt), int(rank), int(os.environ["WORLD_SIZE"]))


def ended(out: Path, attempt: int, rank: int, size: int) -> None:
    """Leave where another process is gone before its end, as one of torchrun's has left. torch's launcher of functions
    keeps one that has ended until all have, and waits 30 seconds for it otherwise: the signal to end came before."""
    mine = [begun(out, attempt, each) for each in range(size)]
    has_ended(mine[rank]).touch()
    while missing := [each for each in mine if not has_ended(each).exists()]:
        if any(each.exists() and not psutil.pid_exists(int(each.read_text() or os.getpid())) for each in missing):
            os._exit(1)
        time.sleep(0.02)


def launch(recipe: Path, out: Path, size: int, restarts: int) -> None:
    config = LaunchConfig(
        1,
        1,
        size,
        run_id=out.name,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=restarts,
        monitor_interval=0.1,
        start_method="forkserver",
        local_addr="127.0.0.1",
    )
    elastic_launch(config, worker)(str(recipe), str(out))


def begun(out: Path, attempt: int, rank: int) -> Path:
    return out.parent / f"{out.name}.{attempt}.{rank}"


def has_ended(begun: Path) -> Path:
    return begun.with_name(f"{begun.name}.ended")


def wait(path: Path) -> float:
    """When a process of an attempt began, in the time of files."""
    until = time.monotonic() + GIVE_UP_S
    while not (path.exists() and path.read_text()):
        if time.monotonic() > until:
            raise TimeoutError(str(path))
        time.sleep(0.01)
    return path.stat().st_mtime


def lines(out: Path) -> int:
    metrics = out / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.is_file() else 0


class Killer(threading.Thread):
    """Sends a signal to one rank of the first attempt, so many seconds after so many lines of its metrics."""

    def __init__(self, out: Path, size: int, rank: int, after: int, seconds: float, number: signal.Signals) -> None:
        super().__init__(daemon=True)
        self.out, self.size, self.rank, self.number = out, size, rank, number
        self.after, self.seconds = after, seconds
        self.took: float | None = None  # from the fault to the restart of all

    def run(self) -> None:
        wait(begun(self.out, 0, self.rank))
        while lines(self.out) < self.after:
            time.sleep(0.005)
        time.sleep(self.seconds)
        if has_ended(begun(self.out, 0, self.rank)).exists():
            return
        try:
            os.kill(int(begun(self.out, 0, self.rank).read_text()), self.number)
        except ProcessLookupError:
            return
        at = time.time()
        self.took = max(wait(begun(self.out, 1, rank)) for rank in range(self.size)) - at


def one(
    number: int, recipe: Path, size: int, times: tuple[int, float, float], silent: bool, wanted: bytes
) -> tuple[str, float | None]:
    """What became of one run (empty: as it should), and how long the restart took; None where it had ended.

    Args:
        times: of the undisturbed run: lines of metrics, seconds before the first, and of one.
    """
    draw, (most, first, each) = random.Random(number), times
    rank, after = draw.randrange(size), draw.randrange(most)
    seconds = draw.uniform(0, each if after else first)
    out = recipe.parent / f"run-{number}"
    killer = Killer(out, size, rank, after, seconds, signal.SIGSTOP if silent else signal.SIGKILL)
    killer.start()
    try:
        launch(recipe, out, size, restarts=3)
    except Exception as error:  # whatever the agent says: the run has not ended by itself
        return f"run {number}: {type(error).__name__}: {error}", killer.took
    killer.join(5)
    if killer.took is None:
        return ("" if left(out)[0] == wanted else f"run {number}: other bytes"), None
    where = f"rank {rank}, {seconds:.2f} s after {after} lines of metrics"
    print(f"{number}: {where}; all begun again {killer.took:.1f} s later", flush=True)
    return ("" if left(out)[0] == wanted else f"run {number}: other bytes"), killer.took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--silent", action="store_true")
    parser.add_argument("--sharded", action="store_true")
    given = parser.parse_args()
    multiprocessing.set_forkserver_preload(["halfbyte.finetune", "halfbyte.distributed.shard", __spec__.name])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_run.rows(folder / "held.jsonl", 6, seed=5)
        more = {"quant__placement": "sharded"} if given.sharded else {}
        recipe = tiny_run.recipe(folder, **VALUES, **more, data__eval=folder / "held.jsonl").path
        assert recipe is not None
        launch(recipe, folder / "first", given.processes, 0)  # builds the store, and compiles
        launch(recipe, folder / "whole", given.processes, 0)
        wanted, rows = left(folder / "whole")
        start = wait(begun(folder / "whole", 0, 0))
        first = (folder / "whole" / "started.json").stat().st_mtime - start
        each = ((folder / "whole" / "metrics.jsonl").stat().st_mtime - start - first) / len(rows)
        print(f"undisturbed: {first:.1f} s to the first step, {each:.2f} s a line", flush=True)
        found: list[tuple[str, float | None]] = []
        for number in range(given.seed, given.seed + 2 * given.count):
            if sum(took is not None for _, took in found) < given.count:
                times = (len(rows), first, each)
                found.append(one(number, recipe, given.processes, times, given.silent, wanted))
    failed, took = [text for text, _ in found if text], sorted(s for _, s in found if s is not None)
    late = sum(s > WITHIN_S + (SILENT_S if given.silent else 0.0) for s in took)
    for text in failed:
        print(f"--- {text}")
    said = (
        f"{len(found)} runs, {len(took)} hit while they ran, {len(failed)} failed, {late} later than {WITHIN_S:.0f} s"
    )
    print(
        said
        + (f"; begun again after {took[len(took) // 2]:.1f} s in the middle, {took[-1]:.1f} at most" if took else "")
    )
    sys.exit(1 if failed else 3 if late else 0)


if __name__ == "__main__":
    main()

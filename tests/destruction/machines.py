"""Whole runs on machines that share nothing, over a link with a delay and losses; one is cut off at random moments.

    python -m tests.destruction.machines --machines 2 --link 1Gb/s,1ms --cuts 6              # root and `ip`
    python -m tests.destruction.machines --machines 4 --link 100Mb/s,1ms --loss 1 --cuts 3 --torchrun

The machines are network namespaces (benchmarks/relay.py), each with its own model, rows, cache and run folder. First
the run of one process, then that of all machines: its losses must be those of the one within `CLOSE`. Then runs in
which one machine's link goes silent, drawn evenly from the time between the run's folder and its report: every process,
that of the machine which is cut off too, must end by itself within `WITHIN_S` of the moment at which the silence can be
told from a pause, and once the link is whole again `--resume` must end in the bytes of the undisturbed run. With
`--torchrun` the undisturbed run, and two whose last machine is killed or cut off and which are then resumed, are
started by torchrun on each machine; everything else is forked from a process that has imported everything. Exit code 1:
something failed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import relay

from halfbyte.distributed import scaling
from halfbyte.distributed.watch import SILENT_S
from tests import tiny_run
from tests.destruction.kills import left
from tests.distributed import together

CLOSE, WITHIN_S, GIVE_UP_S = 1e-5, 30.0, 300.0
VALUES = {
    "lora__lora_dropout": 0.1,
    "train__learning_rate": 1e-4,
    "train__max_steps": 60,
    "train__save_strategy": "steps",
    "train__save_steps": 5,
    "train__eval_strategy": "steps",
    "train__eval_steps": 15,
}


def command(home: Path, run: str, resume: bool) -> list[str]:
    out = str(home / run)
    return ["train", out, "--resume"] if resume else ["train", str(home / "recipe.yaml"), "--output", out]


def machine(home: str, run: str, resume: bool, space: str | None) -> None:
    """The process of one machine, as the command line is."""
    from halfbyte.cli import main

    os.environ |= {"HALFBYTE_CACHE": f"{home}/cache", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    if space is not None:
        relay.enter(space)
        os.environ["GLOO_SOCKET_IFNAME"] = space
    words = command(Path(home), run, resume)
    sys.exit(main._guard(lambda: main.app(words), words))


def started(homes: list[Path], run: str, machines: relay.Machines, resume: bool = False) -> together.Processes:
    def each(rank: int) -> tuple[object, ...]:
        return str(homes[rank]), run, resume, machines.spaces[rank]

    return together.Processes(len(homes), machine, each=each, MASTER_ADDR=relay.address(0))


def ended(processes: together.Processes, seconds: float = GIVE_UP_S) -> None:
    found = processes.end(seconds)
    if any(each.code for each in found):
        raise RuntimeError("\n".join(f"{each.code}: {each.out[-2000:]}{each.err[-2000:]}" for each in found))


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows for name in ("loss", "eval_loss") if name in row]


def seen(path: Path, processes: together.Processes | None = None) -> float:
    until = time.monotonic() + GIVE_UP_S
    while not path.exists():
        if processes is not None and processes.over():
            ended(processes)
        if time.monotonic() > until:
            raise TimeoutError(str(path))
        time.sleep(0.005)
    return time.monotonic()


def cut(number: int, homes: list[Path], machines: relay.Machines, lasts: float, wanted: bytes) -> str:
    """One run that is cut off, and resumed. What is wrong with it; empty where nothing is."""
    draw, run = random.Random(number), f"cut-{number}"
    which, after = draw.randrange(len(homes)), draw.uniform(0, lasts)
    processes = started(homes, run, machines)
    seen(homes[0] / run, processes)
    time.sleep(after)
    machines.cut(which)
    at = time.monotonic()
    codes, took = processes.times(SILENT_S + 2 * WITHIN_S)
    machines.heal(which)
    lines = len(losses(homes[0] / run)) if (homes[0] / run / "metrics.jsonl").exists() else 0
    said = ", ".join(f"{seconds - at:.1f} s (code {code})" for code, seconds in zip(codes, took, strict=True))
    print(
        f"{run}: machine {which} silent {after:.2f} s after the folder, at line {lines}; ended after {said}", flush=True
    )
    if codes == [0] * len(homes):
        return ""  # it had ended before
    ended(started(homes, run, machines, resume=True))
    late = None in codes or max(took) - at > SILENT_S + WITHIN_S
    wrong = "it did not end in time" if late else "a process took it for its end" if 0 in codes else ""
    return wrong or ("" if left(homes[0] / run)[0] == wanted else "resumed, other bytes")


def torchrun(
    homes: list[Path], run: str, machines: relay.Machines, port: int, resume: bool = False
) -> list[subprocess.Popen[bytes]]:
    made = []
    for n, home in enumerate(homes):
        words = [*machines.inside(n), sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(homes))]
        words += ["--nproc-per-node", "1", "--node-rank", str(n), "--master-addr", relay.address(0), "--master-port"]
        env = os.environ | machines.env(n) | {"HALFBYTE_CACHE": f"{home}/cache"}
        words += [str(port), "-m", "halfbyte", *command(home, run, resume)]
        with (home / f"{run}-{port}.txt").open("w") as out:
            made.append(subprocess.Popen(words, env=env, cwd=home, stdout=out, stderr=out))
    return made


def launched(homes: list[Path], machines: relay.Machines, lasts: float, wanted: bytes) -> None:
    """By torchrun: a whole run, and two whose last machine is killed or cut off, resumed."""
    codes = [each.wait(GIVE_UP_S) for each in torchrun(homes, "torchrun", machines, 29600)]
    same = not any(codes) and left(homes[0] / "torchrun")[0] == wanted
    print(f"torchrun: codes {codes}, the same bytes: {same}", flush=True)
    for number, fault in enumerate(("killed", "silent")):
        agents = torchrun(homes, fault, machines, 29601 + 2 * number)
        seen(homes[0] / fault / "metrics.jsonl")
        time.sleep(lasts / 3)
        if fault == "killed":
            for pid in machines.pids(len(homes) - 1):
                os.kill(pid, signal.SIGKILL)
        else:
            machines.cut(len(homes) - 1)
        at, took = time.monotonic(), dict[int, float]()
        while len(took) < len(homes) and time.monotonic() < at + GIVE_UP_S:
            took |= {n: time.monotonic() - at for n, agent in enumerate(agents) if n not in took and agent.poll()}
            time.sleep(0.05)
        machines.heal(len(homes) - 1)
        for agent in agents:
            agent.kill()
        seconds = ", ".join(f"{took.get(n, GIVE_UP_S):.1f} s" for n in range(len(homes)))
        print(f"torchrun: the last machine {fault}; the agents ended after {seconds}", flush=True)
        again = [each.wait(GIVE_UP_S) for each in torchrun(homes, fault, machines, 29602 + 2 * number, resume=True)]
        back = not any(again) and left(homes[0] / fault)[0] == wanted
        print(f"torchrun: resumed, codes {again}, the same bytes: {back}", flush=True)
        same = same and back
    if not same:
        raise RuntimeError("not the same under torchrun")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machines", type=int, default=2)
    parser.add_argument(
        "--link", default="1Gb/s,1ms", help="of each machine: what it sends a second, its delay one way"
    )
    parser.add_argument("--loss", type=float, default=0.0, help="%% of packets")
    parser.add_argument("--mtu", type=int, default=65_000)
    parser.add_argument("--cuts", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--torchrun", action="store_true")
    given = parser.parse_args()
    asked = scaling.link_of(given.link)
    link = relay.Link(asked.bytes_s, asked.delay_s, given.loss / 100, given.mtu)
    wrong = []
    with tempfile.TemporaryDirectory() as name, relay.Machines(given.machines, link) as machines:
        homes = [Path(name) / f"machine{n}" for n in range(given.machines)]
        for home in homes:
            tiny_run.rows(home.parent / "held.jsonl", 6, seed=5)
            home.mkdir()
            shutil.move(home.parent / "held.jsonl", home / "held.jsonl")
            tiny_run.recipe(home, **VALUES, data__eval=home / "held.jsonl")
        ended(together.Processes(1, machine, str(homes[0]), "alone", False, None))
        processes = started(homes, "whole", machines)
        began = seen(homes[0] / "whole", processes)
        ended(processes)
        lasts = time.monotonic() - began
        wanted = left(homes[0] / "whole")[0]
        pairs = list(zip(losses(homes[0] / "whole"), losses(homes[0] / "alone"), strict=True))
        off = max(abs(one - other) for one, other in pairs)
        print(
            f"{given.machines} machines: {lasts:.1f} s, {len(pairs)} losses within {off:.1e} of one process's",
            flush=True,
        )
        if off > CLOSE:
            wrong.append("other losses than one process's")
        if given.torchrun:
            launched(homes, machines, lasts, wanted)
        for number in range(given.seed, given.seed + given.cuts):
            wrong += [f"cut-{number}: {text}" for text in [cut(number, homes, machines, lasts, wanted)] if text]
    print("\n".join(wrong) or f"all as it should be, {given.cuts} cuts")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()

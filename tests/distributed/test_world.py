"""Processes find each other, add what they have, see what differs, and end together with one reason."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from halfbyte.distributed import agree, launch, watch
from halfbyte.distributed import world as worlds
from halfbyte.distributed.step import StepSum, sums
from halfbyte.distributed.world import World
from halfbyte.errors import DataError, HalfbyteError, RankLost, WorldError
from tests import tiny_run
from tests.distributed import together


def talk() -> dict[str, Any]:
    """Every way in which processes speak to each other."""
    with worlds.open_world() as here:
        parameters = [torch.zeros(2, 3, requires_grad=True), torch.zeros(4, requires_grad=True), torch.zeros(1)]
        summed = StepSum(here, parameters)
        summed.begin()
        for _ in range(2):  # of the second nobody but rank 1 has a gradient
            (parameters[0].sum() * (here.rank + 1)).backward()
        if here.rank == 1:
            (parameters[1] * torch.arange(4)).sum().backward()
        if here.rank == 2:  # as after a failed micro-batch
            parameters[0].grad = parameters[0].grad.clone()  # type: ignore[union-attr]
        loss = torch.tensor(float("nan") if here.rank == 2 else 1.0)
        told = summed.reduce(loss, interrupted=here.rank == 1, stops=False)
        flat = torch.full((3,), float(here.rank))
        here.broadcast_(flat)
        with here.node_first():
            at = time.monotonic()
        link = agree.measure(here)
        return {
            "gathered": here.gather({"rank": here.rank}),
            "first": here.from_first(lambda: ["it was", here.rank]),
            "grads": [None if p.grad is None else p.grad.tolist() for p in parameters],
            "told": (told.interrupted, told.stops, told.not_finite),
            "sums": sums(here, [1.0, float(here.rank)]),
            "broadcast": flat.tolist(),
            "at": at,
            "places": (here.rank, here.size, here.local_rank, here.local_size, here.machines),  # type: ignore[attr-defined]
            "link": link.bytes_s > 0 and link.latency_s > 0,
        }


def test_three_processes_talk() -> None:
    found = together.run(3, talk)
    for rank, each in enumerate(found):
        assert each["gathered"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert each["first"] == ["it was", 0]
        assert each["grads"] == [[[12.0] * 3] * 2, [0.0, 1.0, 2.0, 3.0], None]
        assert each["told"] == (True, False, (2,))
        assert each["sums"] == [3.0, 3.0]
        assert each["broadcast"] == [0.0] * 3
        assert each["places"] == (rank, 3, rank, 3, 1)
        assert each["link"]
    assert found[0]["at"] < min(found[1]["at"], found[2]["at"])


def stale() -> int:
    """As under torchrun, whose store outlives a restart: at first it has the port of a process that is gone."""
    from torch.distributed import TCPStore

    address, at = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ["RANK"] == "0":
        kept = TCPStore(address, at, is_master=True, wait_for_workers=False)
        kept.set("halfbyte/3/port", str(together.port()))
        time.sleep(3)
    else:
        TCPStore(address, at, is_master=False).wait(["halfbyte/3/port"])
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "3"}
    with worlds.open_world() as here:
        return int(sums(here, [1.0])[0])


def test_a_launchers_store_that_knows_an_earlier_attempt() -> None:
    assert together.run(2, stale) == [2, 2]


def late() -> int:
    """Rank 1 has met the first process, and asks where its own store is only when that one has long gone on."""
    if os.environ["RANK"] == "1":
        connected = worlds.Group._connect

        def after_a_while(self: worlds.Group, *args: object) -> object:
            time.sleep(2)
            return connected(self, *args)  # type: ignore[arg-type]

        worlds.Group._connect = after_a_while  # type: ignore[assignment]  # in this process alone
    with worlds.open_world() as here:
        return int(sums(here, [1.0])[0])


def test_who_is_late_still_finds_the_first_ones_store() -> None:
    ended = together.Processes(2, late).end(30)
    assert [(each.code, each.value) for each in ended] == [(0, 2)] * 2


def fails(how: str, told: str = "") -> None:
    """Rank 1 of three ends, while the others compute, wait for each other, or are in a call that does not end.

    Args:
        told: a folder in which each says that it has met the others.
    """
    said: list[str] = []

    def say(error: HalfbyteError) -> None:
        import sys

        sys.stderr.write(f"error: {error}\n")
        said.append(str(error))

    with worlds.open_world(say) as here:
        here.gather(0)
        if told:
            (Path(told) / str(here.rank)).touch()
        if here.rank == 1:
            if how == "ours":
                raise DataError("row 7 is bad.", fix="mend it")
            if how == "any":
                raise ZeroDivisionError("one by none")
            time.sleep(120)  # until it is killed
        if here.rank == 0:
            until = time.monotonic() + 120
            while time.monotonic() < until:  # computes
                sum(range(1000))
        here.sum_(torch.zeros(3))


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("ours", 2, "error: rank 1 of 3 on HOST: row 7 is bad.\n  fix: mend it\n"),
        ("any", 1, "error: rank 1 of 3 on HOST: something that was not foreseen: ZeroDivisionError: one by none"),
    ],
)
def test_all_end_together_with_the_first_ones_reason(how: str, code: int, said: str) -> None:
    began = time.monotonic()
    ended = together.Processes(3, fails, how).end(60)
    assert time.monotonic() - began < 30
    assert [each.code for each in ended] == [code] * 3
    import socket

    assert ended[0].err.startswith(said.replace("HOST", socket.gethostname()))
    assert [each.err for each in ended[1:]] == ["", ""], "it is said once"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_gone_or_silent_ends_all(number: int, rank: int, tmp_path: Path) -> None:
    processes = together.Processes(3, fails, "killed", str(tmp_path))
    until = time.monotonic() + 120
    while len(list(tmp_path.iterdir())) < 3 and time.monotonic() < until:
        time.sleep(0.1)
    processes.kill(rank, number)
    others = [each for each in range(3) if each != rank]
    assert processes.codes([*others, rank], 60) == [1, 1, -9], "who is stopped is killed by the others"


class Store:
    """As much of a TCPStore as the watch uses."""

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}

    def set(self, key: str, value: str) -> None:
        self.kept[key] = value.encode()

    def compare_set(self, key: str, expected: str, value: str) -> None:
        self.kept.setdefault(key, value.encode())

    def check(self, keys: list[str]) -> bool:
        return all(key in self.kept for key in keys)

    def get(self, key: str) -> bytes:
        return self.kept[key]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.kept[key] for key in keys]


def test_the_watch_misses_who_does_not_beat(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    store: Any = Store()
    names, ended = ["a", "b", "c"], list[tuple[int, float]]()
    monkeypatch.setattr(watch.launch, "end", lambda *process: ended.append(process))
    first = watch.Heartbeat(store, 0, names, lambda: None, {0: (10, 0.5)})
    second = watch.Heartbeat(store, 1, names, lambda: None, {1: (11, 1.5), 2: (12, 2.5)})
    assert first._silent_process() is None, "who has not begun is not missed"
    for rank in range(3):
        store.set(f"beat/{rank}", "0")
    assert first._silent_process() is None and second._silent_process() is None
    store.set("beat/2", "done")
    for second_s in range(1, 21):
        now[0] += 1
        store.set("beat/0", str(second_s))
        assert first._silent_process() is None, "not yet"
        assert second._silent_process() is None, "it does not look at itself"
    now[0] += 1
    fault = first._silent_process()
    assert fault is not None and fault.rank == 1 and "b has not been heard of" in fault.message
    assert second._fault_of_others() == fault, "all are told, so that they end at once"
    now[0] += 1000  # all were stopped, as by a machine that sleeps
    assert first._silent_process() is None and second._silent_process() is None
    for _ in range(20):
        now[0] += 1
        assert second._silent_process() is None
    now[0] += 1
    fault = second._silent_process()
    assert fault is not None and fault.rank == 0 and fault.silent
    second._end_by(fault)
    assert ended == [], "the first is on another machine"
    third = watch.Heartbeat(store, 1, names, lambda: None, {1: (11, 1.5), 2: (12, 2.5)})
    for count in range(22):
        assert third._silent_process() is None
        store.set("beat/0", f"again {count}")
        store.set("beat/2", "stopped")
        now[0] += 1
    fault = third._silent_process()
    assert fault is not None and fault.rank == 2
    third._end_by(fault)
    assert ended == [(12, 2.5)]
    told = watch.Fault("why", 2, "do that", 2)
    del store.kept[watch.FAILED]
    store.set(watch.FAILED, told.to_json())
    assert second._fault_of_others() == told


def test_a_question_to_a_stopped_store_that_breaks_is_that_it_is_gone() -> None:
    """Whoever is beside the stopped first process kills it, and its store's connections break."""
    group = worlds.Group(launch.Place(1, 2, 1, 2), None)
    told: Any = SimpleNamespace(fault=watch.Fault("rank 0 is gone", 0, silent=True), store_silent=True)
    group._heartbeat = told
    error = group.failed(RuntimeError("Connection reset by peer"))
    assert isinstance(error, RankLost) and "rank 0 is gone" in str(error)


class Seen(World):
    """A world whose processes have these."""

    def __init__(self, *found: Mapping[str, Any]) -> None:
        self.found, self.size = found, len(found)
        self.names = tuple(f"rank {n}" for n in range(self.size))

    def gather(self, value: Any) -> list[Any]:
        return [json.loads(json.dumps(each)) for each in self.found]


def test_what_differs_is_named_with_who_has_it() -> None:
    same = {"recipe": {"seed": 1}, "rows": {"digest": "a" * 64}}
    agree.check(Seen(same, same), same)
    other = {"recipe": {"seed": 2}, "rows": {"digest": "a" * 63 + "b"}, "more": 1}
    with pytest.raises(WorldError) as caught:
        agree.check(Seen(same, other, same), same)
    text = str(caught.value)
    assert "recipe.seed: 1, but 2 (rank 1)" in text
    assert "rows.digest" in text and "more: None, but 1 (rank 1)" in text
    long = [{"base": "x" * 30 + end} for end in "aab"]  # alike where they are cut
    with pytest.raises(WorldError, match=r"base: x+\.\.\., but x+\.\.\. \(rank 2\)"):
        agree.check(Seen(*long), {})
    with pytest.raises(WorldError, match=r"quant\.compute_dtype"):
        agree.check(Seen({"compute_dtype": "bf16"}, {"compute_dtype": "fp32"}), {})


def command(*args: str) -> int:
    from halfbyte.cli import main

    return main._guard(lambda: main.app(list(args)), args)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "said"),
    [("rows", "rows.train.digest"), ("dtype", "compute_dtype: fp32, but bf16 (rank 1"), ("store", "base"),
     ("recipe", "recipe.train.max_steps: 4, but 5 (rank 1"), ("missing", "/nowhere.jsonl: no such file")],
)  # fmt: skip
def test_a_process_with_something_else_is_refused_by_one_message(what: str, said: str, tmp_path: Path) -> None:
    mine, other = (tiny_run.recipe(tmp_path / name, output=tmp_path / "run") for name in ("a", "b"))
    tiny_run.rows(tmp_path / "b" / "train.jsonl", seed=5)
    tiny_run.checkpoint(tmp_path / "c" / "model", seed=7)
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / "c/model" / name).write_bytes((tmp_path / "a/model" / name).read_bytes())
    more = {
        "rows": [], "dtype": ["quant.compute_dtype=bf16"], "store": [f"model={tmp_path}/c/model"],
        "recipe": ["train.max_steps=5"], "missing": ["data.train=/nowhere.jsonl"],
    }[what]  # fmt: skip

    def args(rank: int) -> tuple[str, ...]:
        if rank != 1:
            return ("train", str(mine.path))
        path = other.path if what == "rows" else mine.path
        return ("train", str(path), *(word for each in more for word in ("--set", each)))

    began = time.monotonic()
    ended = together.Processes(3, command, each=args).end()
    assert time.monotonic() - began < 60
    assert [each.code or each.value for each in ended] == [2, 2, 2]
    assert "error: " in ended[0].err and said in ended[0].err
    assert [each.out + each.err for each in ended[1:]] == ["", ""]
    assert not (tmp_path / "run").exists()

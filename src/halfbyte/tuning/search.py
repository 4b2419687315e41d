"""Successive halving over short runs: which are made, for how long, and which of their settings go on.

What: a rung is some arms (values of a recipe) that train on the same number of rows, each with a rate that falls to 0
within them. The better half goes on to a rung with more rows, until one is left or the time is over. What is decided is
written down before it is done, so a search that is killed goes on with the probe that was under way.
Why so: a rate that does not fall to 0 says nothing of a run that ends; the best rate falls a little with the rows of a
run, as rows^-0.1, so an arm's rate is that of the run that the search is for, and a probe of fewer rows has more.
Source: successive halving, arXiv:1502.07943. Best rates over rows: measured at 32 and 320 rows on two models
(docs/log/2026-12.md; the 0.26 of arXiv:2602.04998 is of far longer runs); over rows a step as in `plan/rate.py`; with a
constant lora_alpha they do not depend on the rank ("LoRA Without Regret").
Cost: none of its own; no torch.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

import numpy as np

from halfbyte.models.lora_sites import ALL_LINEAR
from halfbyte.runs.folder import read_json, write_json
from halfbyte.scoring import intervals
from halfbyte.training.deadline import Clock
from halfbyte.types import Document

RATE = "train.learning_rate"
TARGETS, RANK = "lora.target_modules", "lora.r"
BATCH, ACCUMULATION = "train.per_device_train_batch_size", "train.gradient_accumulation_steps"
ROWS_EXPONENT, STEP_EXPONENT = 0.1, 0.5
TIMES = (1.0, 2.0, 0.5, 4.0)  # of the rate that is known beforehand, the likeliest first
LEAST_STEPS = 6  # of a probe, and of a run: fewer show nothing of a rate that falls to 0
MOST_LONGER = 4.0  # a rung's rows over those of the rung before
Arms = Callable[[Document], list[Document]]
"""What is tried from the best arm so far, the likeliest first."""
Probe = Callable[[Document, float, int], "Result | None"]
"""Trains an arm at a rate on so many rows; None where it was stopped by a signal."""


@dataclass
class Result:
    """Of a probe: its highest rate, its steps, the seconds with its evaluation, and by the hash of each row the sums
    that this adds up, loss and count first; none where it diverged."""

    rate: float
    steps: int
    sums: dict[str, list[float]]
    seconds: float = 0.0

    def on(self, names: Sequence[str]) -> intervals.RowSums:
        values = np.array([self.sums[name] for name in names])
        return intervals.RowSums(values[:, 0], values[:, 1])


@dataclass
class Rung:
    """`arms` (values of a recipe by their dotted names) that differ in `what`, and the `results` there are."""

    what: str
    rows: int
    arms: list[Document]
    results: list[Result] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """The rows that all of its probes were evaluated on."""
        sums = [set(result.sums) for result in self.results if result.sums]
        return sorted(set.intersection(*sums)) if sums else []

    def losses(self) -> list[float]:
        values = [result.on(self.names).value if result.sums else math.inf for result in self.results]
        return [value if math.isfinite(value) else math.inf for value in values]

    @property
    def order(self) -> list[int]:
        """Its arms that have a result, the best first; among equals the first."""
        return sorted(range(len(self.results)), key=self.losses().__getitem__)

    def behind(self, number: int) -> tuple[float, intervals.Interval] | None:
        """How much more an arm has lost than the best, with the interval of the paired difference."""
        best, other = self.results[self.order[0]], self.results[number]
        if not (best.sums and other.sums):
            return None
        a, b = other.on(self.names), best.on(self.names)
        limits = intervals.interval_of_difference(a, b, resamples=2000, seed=0)
        return None if limits is None else (a.value - b.value, limits)


@dataclass
class SearchState:
    """A search as its file has it: what was decided, and what came of it.

    `until_s`: when the probes have to be done; `ends_s`: when the steps of the run have to; `spent_s`: as of the last
    result. `run_rows`: of the run that the search is for, `most_rows` that it may have. `whats`: what is searched;
    `skipped`: why something was not, in words. `alone`: no run follows. `winner`: None until the search is over.
    `held_out`: rows that are evaluated.
    """

    within_s: float
    until_s: float
    run_rows: int
    most_rows: int
    start: Document
    whats: list[str]
    ends_s: float
    held_out: int | None
    spent_s: float
    alone: bool = False
    rungs: list[Rung] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    winner: Document | None = None

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """A search that was begun; None where there is none."""
        if not (values := read_json(path)):
            return None
        rungs = [Rung(**{**rung, "results": [Result(**r) for r in rung["results"]]}) for rung in values["rungs"]]
        return cls(**{**values, "rungs": rungs})

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    @property
    def best(self) -> Document:
        """The arm that is ahead."""
        last = next((rung for rung in reversed(self.rungs) if rung.results), None)
        return self.start if last is None else last.arms[last.order[0]]


def of_rate(best: Document) -> list[Document]:
    return [{**best, RATE: best[RATE] * times} for times in TIMES]


def of_all(linear: Sequence[str]) -> dict[str, Arms]:
    """All that can be searched. `linear`: the full names of the linear layers that may get an adapter."""
    groups: dict[str, set[str]] = {"": {name.rpartition(".")[2] for name in linear}}
    for name in linear:
        groups.setdefault(name.rpartition(".")[0].rpartition(".")[2], set()).add(name.rpartition(".")[2])

    def targets(best: Document) -> list[Document]:
        now = best[TARGETS]
        same = groups[""] if now == ALL_LINEAR else {now} if isinstance(now, str) else set(now)
        other = [sorted(names) for names in groups.values() if names != same]
        return [best, *({**best, TARGETS: names} for names in other)]

    def rows(best: Document) -> list[Document]:
        sizes = (best[BATCH], best[BATCH] // 2, 2 * best[BATCH])
        rates = [best[RATE] * (size / best[BATCH]) ** STEP_EXPONENT for size in sizes]
        return [{**best, BATCH: size, RATE: rate} for size, rate in zip(sizes, rates, strict=True) if size]

    def ranks(best: Document) -> list[Document]:
        return [{**best, RANK: rank} for rank in (best[RANK], 2 * best[RANK], best[RANK] // 2) if rank]

    return {"rate": of_rate, "targets": targets, "rows a step": rows, "rank": ranks}


def probe_rate(arm: Document, rows: int, run_rows: int) -> float:
    """The rate of a probe on so many rows, for an arm whose rate is that of a run on `run_rows`."""
    return float(arm[RATE]) * (run_rows / rows) ** ROWS_EXPONENT


@dataclass
class Search:
    """Runs one stage of `arms` after the other; `save` is called with each decision and each result. `row_s`,
    `evaluation_s`: what a row and an evaluation are planned to take. `per_step`: rows of a step."""

    state: SearchState
    arms: Mapping[str, Arms]
    probe: Probe
    clock: Clock
    save: Callable[[], None]
    row_s: float
    evaluation_s: float
    per_step: int
    tell: Callable[[Rung, int], None] = lambda rung, number: None

    def run(self) -> bool:
        """Until there is a winner; False where a signal came first."""
        state = self.state
        while (rung := self._rung()) is not None:
            self.save()
            while len(rung.results) < len(rung.arms):
                began, took = self.clock.spent, max((result.seconds for result in rung.results), default=0.0)
                if rung.results and began + 0.8 * took > state.until_s:
                    rung.arms = rung.arms[: len(rung.results)]  # the time is over
                    break
                arm = rung.arms[len(rung.results)]
                result = self.probe(arm, probe_rate(arm, rung.rows, state.run_rows), rung.rows)
                if result is None:
                    return False
                state.spent_s = self.clock.spent
                result.seconds = state.spent_s - began
                rung.results.append(result)
                self.save()
                self.tell(rung, len(rung.results) - 1)
        state.winner = self._at_this_pace(state.best)
        self.save()
        return True

    def _at_this_pace(self, arm: Document) -> Document:
        """An arm at the rate of the rows that the run will have at the pace of its probes."""
        state = self.state
        paces = [result.seconds / rung.rows for rung in state.rungs for result in rung.results if result.sums]
        if state.alone or not paces:
            return arm
        rows = max(self.per_step, min(state.most_rows, int((state.ends_s - state.spent_s) / float(np.median(paces)))))
        rate = probe_rate(arm, rows, state.run_rows)
        state.run_rows = rows
        return {**arm, RATE: float(f"{rate:.3g}")}

    def _rung(self) -> Rung | None:
        """The rung that is under way, or the next one; None where all is decided."""
        state = self.state
        last = state.rungs[-1] if state.rungs else None
        if last is None or len(last.results) == len(last.arms):
            whats = [what for what in state.whats if what not in {*state.skipped, *(rung.what for rung in state.rungs)}]
            if last is not None and self._wider(last, len(whats)):
                return last
            following = None if last is None else self._longer(last, len(whats))
            while following is None and whats:
                following = self._first(whats[0], (state.until_s - state.spent_s) / len(whats))
                whats = whats[1:]
            state.rungs += [] if following is None else [following]
            return following
        return last

    def _left(self, rung: Rung, later: int) -> float:
        """Seconds that the stage of a rung has beside so many `later` ones."""
        taken = sum(result.seconds for other in self.state.rungs if other.what == rung.what for result in other.results)
        return (self.state.until_s - self.state.spent_s + taken) / (later + 1) - taken

    def _wider(self, rung: Rung, later: int) -> bool:
        """Whether the first rung of a stage gets one more arm, as the machine was faster than planned."""
        every = self.arms[rung.what](rung.arms[0])
        first = [other.what for other in self.state.rungs].count(rung.what) == 1
        if first and len(rung.arms) < len(every) and self._left(rung, later) > max(r.seconds for r in rung.results):
            rung.arms.append(every[len(rung.arms)])
            return True
        return False

    def _longer(self, rung: Rung, later: int) -> Rung | None:
        """The better half of a rung, on as many rows as the time has room for."""
        good = [number for number in rung.order if rung.losses()[number] < math.inf]
        arms = [rung.arms[number] for number in good[: len(rung.results) // 2]]
        if len(arms) < 2:
            return None
        row_s = max(result.seconds for result in rung.results) / rung.rows  # its evaluation in it
        rows = min(int(self._left(rung, later) / len(arms) / row_s), int(MOST_LONGER * rung.rows), self.state.run_rows)
        rows -= rows % self.per_step
        return Rung(rung.what, rows, arms) if rows >= 1.5 * rung.rows else None

    def _first(self, what: str, seconds: float) -> Rung | None:
        """The first rung of a stage: as many arms as there is time for, or none and why."""
        arms = self.arms[what](self.state.best)
        rates = [result.seconds / rung.rows for rung in self.state.rungs for result in rung.results if result.sums]
        row_s, evaluation_s = (float(np.median(rates)), 0.0) if rates else (self.row_s, self.evaluation_s)
        for count in range(len(arms), 1, -1):
            second = count // 2 if count > 3 else 0  # arms of a second rung of twice the rows
            rows = int((seconds - (count + second) * evaluation_s) / (count + 2 * second) / row_s)
            rows = min(rows, self.state.run_rows) // self.per_step * self.per_step
            if rows >= LEAST_STEPS * self.per_step:
                return Rung(what, rows, arms[:count])
        least = 2 * (LEAST_STEPS * self.per_step * row_s + evaluation_s)
        self.state.skipped[what] = f"two short runs take {least:.0f} s, and {max(0.0, seconds):.0f} are given"
        return None

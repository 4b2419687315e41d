"""A rate that falls with the time: linear to 0, ends on time, and is the same again for a run that goes on."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from halfbyte.training.deadline import Clock, Schedule


class Hand:
    """A clock's time, set by hand."""

    def __init__(self) -> None:
        self.t = 0.0

    def __call__(self) -> float:
        return self.t


def course(hand: Hand, steps: list[float], file: Path | None = None, **values: float) -> list[float]:
    """The shares of a run whose steps take so many seconds each."""
    schedule = Schedule(Clock(hand), total=int(values.pop("total", 1000)), warmup=0, file=file, **values)
    shares = [schedule.share(0)]
    for number, seconds in enumerate(steps, start=1):
        hand.t += seconds
        shares.append(schedule.share(number))
        if schedule.over:
            break
    return shares


def test_the_rate_falls_linearly_with_the_time_and_ends_within_half_a_step() -> None:
    hand = Hand()
    hand.t = 100.0
    shares = course(hand, [10.0] * 30, ends_s=100.0, step_s=10.0)
    assert shares == pytest.approx([1 - k / 10 for k in range(10)] + [0.0])


@pytest.mark.parametrize("steps", [[5.0] * 100, [13.0] * 100, [2.0, 30.0, 4.0] * 30, [7.0] * 5 + [21.0] * 20])
def test_a_slower_machine_makes_fewer_steps_and_not_a_later_end(steps: list[float]) -> None:
    hand = Hand()
    shares = course(hand, steps, ends_s=200.0, step_s=1.0)
    made = len(shares) - 1
    assert shares[-1] == 0.0 and min(shares[:-1]) > 0
    assert abs(hand.t - 200.0) <= max(steps), "within one step of the end"
    assert all(a >= b for a, b in itertools.pairwise(shares)), made


@pytest.mark.parametrize(("slower", "made"), [(0.5, 117), (1.0, 77), (2.0, 47), (3.0, 42)])
def test_where_steps_take_longer_what_follows_them_is_granted_as_much_more(slower: float, made: int) -> None:
    """Of 100 s, 40 are as planned, and then a step takes longer, or half as long; 20 s are planned for what follows."""
    hand = Hand()
    steps = [4.0, *[1.0] * 36, *[slower] * 200]  # the first one compiles
    shares = course(hand, steps, ends_s=80.0, step_s=1.0, tail_s=20.0)
    assert len(shares) - 1 == made
    # five of the last eight steps have to show it
    assert abs(hand.t + 20.0 * max(1.0, slower) - 100.0) <= 5 * slower
    assert all(a >= b for a, b in itertools.pairwise(shares))


def test_of_few_rows_the_steps_end_sooner_than_the_time() -> None:
    assert course(Hand(), [1.0] * 9, ends_s=1000.0, step_s=1.0, total=4) == pytest.approx([1, 0.75, 0.5, 0.25, 0])


def test_without_a_time_it_is_linear_in_steps_and_warms_up() -> None:
    schedule = Schedule(Clock(Hand()), total=6, warmup=2)
    assert [schedule.share(k) for k in range(7)] == pytest.approx([1 / 3, 2 / 3, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0])


def test_a_run_that_goes_on_makes_the_same_steps_and_is_not_charged_for_them(tmp_path: Path) -> None:
    file, hand = tmp_path / "schedule.jsonl", Hand()
    whole = course(hand, [10.0] * 30, ends_s=200.0, step_s=10.0)
    course(Hand(), [10.0] * 7, file, ends_s=200.0, step_s=10.0)  # killed after 7 steps
    with file.open("a") as stream:
        stream.write('{"step": 8, "sha')  # in the middle of a line
    later = Hand()
    later.t = 5000.0
    schedule = Schedule(Clock(later), total=1000, warmup=0, ends_s=200.0, step_s=10.0, file=file)
    shares = [schedule.share(0), schedule.share(3)]  # from a checkpoint of step 3
    for step in range(4, 30):
        later.t += 10.0 if step > 3 else 0.0
        if step <= 7:
            later.t += 3.0  # what was made before may take longer now
        shares.append(schedule.share(step))
        if schedule.over:
            break
    assert [shares[0], *shares[1:]] == pytest.approx([whole[0], *whole[3:]])
    assert schedule.last == len(whole) - 1
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == list(range(len(whole)))

"""Sources in exact shares, the same at any step and in any process; rows told apart, limited and held out by source."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halfbyte.data import split
from halfbyte.data.encoding import encode
from halfbyte.data.mixture import Mixture
from halfbyte.data.pack import Steps
from halfbyte.errors import DataError, RecipeError
from halfbyte.recipe.data import Data, DataEntry
from tests import tiny_run

COUNTS = (70, 400, 33)


def mixture(*ways: dict[str, Any], rows_per_step: int = 7) -> Mixture:
    sources = [DataEntry(path=f"{i}.jsonl", name=f"s{i}", **way) for i, way in enumerate(ways)]
    return Mixture.of(sources, np.repeat(range(len(ways)), COUNTS[: len(ways)]), rows_per_step)


def steps(mixed: Mixture, total: int = 1000, rank: int = 0, ranks: int = 1) -> Steps:
    lengths = np.full(len(mixed.of_row), 5)
    return Steps(lengths, lengths, 7, total, 3, 100, None, rank=rank, ranks=ranks, mixture=mixed)


WEIGHTED: list[Any] = [
    ([{"weight": 3}, {"weight": 1}], [Fraction(3, 4), Fraction(1, 4)]),
    ([{"weight": 0.7}, {"weight": 0.2}, {"weight": 0.1}], [Fraction(7, 10), Fraction(1, 5), Fraction(1, 10)]),
    ([{"weight": 2}, {}, {"replay": 0.05}], [Fraction(19, 30), Fraction(19, 60), Fraction(1, 20)]),
]


@pytest.mark.parametrize(("ways", "shares"), WEIGHTED)
def test_shares_are_exact_in_every_step_of_a_thousand(ways: list[Any], shares: list[Fraction]) -> None:
    mixed = mixture(*ways)
    planned, seen = steps(mixed), [0] * len(ways)
    for index in range(len(planned)):
        rows = planned.rows(index)
        assert len(rows) == 7
        for row in rows:
            seen[mixed.of_row[row]] += 1
            total = sum(seen)
            assert all(abs(count - share * total) < 1 for count, share in zip(seen, shares, strict=True))


def test_a_source_is_passed_over_whole_before_it_begins_again() -> None:
    mixed = mixture({"weight": 1}, {"weight": 1})
    taken = [row for step in range(100) for row in steps(mixed).rows(step) if row < 70]
    passes = [sorted(taken[at : at + 70]) for at in range(0, 280, 70)]
    assert passes == [list(range(70))] * 4 and taken[:70] != taken[70:140]


def test_a_resumed_run_and_other_processes_take_the_same_rows() -> None:
    mixed = mixture({"weight": 2}, {}, {"replay": 0.1})
    whole = [steps(mixed).rows(index) for index in range(150)]
    later = steps(mixed)  # asked for step 120 first
    assert [later.rows(index) for index in range(120, 150)] == whole[120:]
    for index in (0, 5, 149):
        parts = [steps(mixed, rank=rank, ranks=3)[index].micro_batches for rank in range(3)]
        assert sorted(r for part in parts for batch in part for r in batch) == sorted(whole[index])


def test_repeat_counts_in_an_epoch_and_replay_is_not_waited_for() -> None:
    mixed = mixture({"repeat": 3}, {})
    assert mixed.epoch_rows == 70 * 3 + 400
    for epoch in (0, 1):
        assert np.bincount(mixed.order(epoch, 1)).tolist() == [3] * 70 + [1] * 400
    assert not np.array_equal(mixed.order(0, 1), mixed.order(1, 1))
    replayed = mixture({}, {"replay": 0.5})  # 70 rows, and as many of the 400
    assert replayed.epoch_rows == 140 and set(range(70)) <= set(replayed.order(0, 1).tolist())
    assert steps(replayed, 20).per_epoch == 20 and steps(replayed, 60).passes(40) == 2
    assert (
        replayed.note(1)
        == "an epoch of 140 rows has of s0 70, s1 70; every step has the same shares, to the nearest row"
    )
    assert steps(mixed, 200).tokens == sum(step.tokens for step in steps(mixed, 200))


def test_one_plain_source_is_in_the_order_of_a_run_without_a_mixture() -> None:
    mixed = mixture({"repeat": 1})
    lengths = np.full(70, 5)
    plain = Steps(lengths, lengths, 7, 25, 3, 100, None)
    assert [steps(mixed, 25).rows(i) for i in range(25)] == [plain.rows(i) for i in range(25)]


def test_an_epoch_longer_than_memory_is_refused_before_it_is_laid_out() -> None:
    with pytest.raises(DataError, match=r"an epoch of [0-9,]+ rows is longer than the 100,000,000"):
        mixture({"repeat": 100_000_000}, {})


def test_weights_of_too_many_digits_and_a_source_without_rows() -> None:
    with pytest.raises(DataError, match="met exactly only after"):
        mixture({"weight": 0.123457}, {"weight": 0.987651})
    with pytest.raises(DataError, match="no row of the source b"):
        Mixture.of([DataEntry(path="a", name="a"), DataEntry(path="b", name="b")], np.zeros(5, int), 4)


def data(folder: Path, **more: Any) -> Data:
    tiny_run.rows(folder / "mine.jsonl", 300, seed=1), tiny_run.rows(folder / "wide.jsonl", 1000, seed=2)
    train = ({"path": f"{folder}/mine.jsonl", "weight": 2}, {"path": f"{folder}/wide.jsonl", "limit": 400})
    return Data(**{"train": train, **more})


def test_rows_are_told_apart_limited_and_held_out_by_source(tmp_path: Path) -> None:
    asked = data(tmp_path)
    rows = split.told_apart(encode.encode(asked.train, tiny_run.tokenizer(), asked), asked.train, 5)
    assert rows.sources is not None and rows.sources.names == ("mine", "wide")
    assert {name: len(n) for name, n in rows.sources.numbers().items()} == {"mine": 300, "wide": 400}
    where = [rows.examples.where(i) for i in range(len(rows.examples))]
    assert all(w.startswith("mine" if of == 0 else "wide") for w, of in zip(where, rows.sources.of_row, strict=True))
    train, held_out = split.split(rows, asked, 5)
    assert held_out is not None and held_out.sources is not None and train.sources is not None
    counts, total = {name: len(n) for name, n in held_out.sources.numbers().items()}, len(held_out.examples)
    assert abs(counts["mine"] - 15) <= 3 and abs(counts["wide"] - 20) <= 3, "5% of each, and rows that are the same"
    assert len(train.examples) + total == 700 and sum(counts.values()) == total
    assert not {*map(train.examples.where, range(len(train.examples)))} & {
        held_out.examples.where(i) for i in range(35)
    }
    again = split.told_apart(encode.encode(asked.train, tiny_run.tokenizer(), asked), asked.train, 6)
    assert [again.examples.where(i) for i in range(700)] != where, "another seed draws others"


BAD: list[Any] = [
    ([{"path": "a", "weight": 1}, {"path": "b", "repeat": 2}], "mix by one of them"),
    ([{"path": "a", "weight": 1, "replay": 0.1}, "b"], "replay is a share of its own"),
    ([{"path": "a", "weight": 1}, {"path": "b"}, {"path": "a", "weight": 2}], "entries 1 and 3 name a, and a row"),
    (["a", {"path": "a", "weight": 2}], "entries 1 and 2 name a, and a row"),
    ([{"path": "a", "mask": "all"}, {"path": "a", "mask": "completion"}], "entries 1 and 2 name a, and a row"),
    ([{"path": "a", "replay": 0.5}], "nothing is left"),
    ([{"path": "a", "replay": 0.5}, {"path": "c", "replay": 0.5}, "b"], "nothing is left"),
    ([{"path": "a", "name": "x"}, {"path": "b", "name": "x"}], "two sources x"),
    ([{"path": "a", "name": "base_text"}, "b"], "base_text is the text"),
    ([{"path": "a", "weight": 0}, "b"], "greater than 0"),
    ([{"path": "a", "wieght": 1}, "b"], "entry 1: wieght: is not a field; did you mean weight?"),
    ([{"pth": "a"}, "b"], "entry 1: pth: is not a field; did you mean path?"),
    ([{"path": "a", "colour": 1}, "b"], "entry 1: colour: is not a field; allowed: path, format"),
    ([{"path": "a", "repeat": 10**15}, "b"], "entry 1: repeat: .* less than or equal to 2147483648"),
]


@pytest.mark.parametrize(("train", "what"), BAD)
def test_what_cannot_be_mixed_is_refused_at_once(tmp_path: Path, train: Any, what: str) -> None:
    with pytest.raises(RecipeError, match=what.replace("?", "[?]")):
        tiny_run.recipe(tmp_path, data__train=train)


def test_a_mixture_is_refused_where_it_would_not_be_read(tmp_path: Path) -> None:
    pair = [{"path": "a", "weight": 1}, "b"]
    with pytest.raises(RecipeError, match="stream lays all texts end to end"):
        tiny_run.recipe(tmp_path, data__train=pair, data__packing="stream", data__format="text")
    with pytest.raises(RecipeError, match="are for data"):
        tiny_run.recipe(tmp_path, data__eval=[{"path": "a", "limit": 3}])
    with pytest.raises(RecipeError, match="max_source_rise is about sources"):
        tiny_run.recipe(tmp_path, train__max_source_rise=0.1)
    with pytest.raises(RecipeError, match="is of no source of the held-out rows; they are of a, b"):
        tiny_run.recipe(tmp_path, data__train=pair, train__metric_for_best_model="c_loss")

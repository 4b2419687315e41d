"""Rows as a tree: against each row on its own, token by token."""

from __future__ import annotations

import random
from itertools import chain, pairwise

import numpy as np
import pytest

from halfbyte.data import collate, pack, prefixes
from halfbyte.data.encoding.examples import IGNORED, Example, in_order


def family(seed: int, *, rows: int = 9, labelled: float = 0.5) -> list[Example]:
    """Rows that branch off one another at random places, one that is another's beginning, two that are equal."""
    draw = random.Random(seed)
    texts = [[draw.randrange(50) for _ in range(draw.randint(20, 60))]]
    for _ in range(rows):
        origin = draw.choice(texts)
        own = [draw.randrange(50) for _ in range(draw.randint(0, 30))]
        texts.append([*origin[: draw.randint(1, len(origin))], *own])
    texts += [texts[0], texts[1][: max(1, len(texts[1]) - 3)]]
    draw.shuffle(texts)
    labels = [tuple(t if i and draw.random() < labelled else IGNORED for i, t in enumerate(text)) for text in texts]
    return [Example(tuple(t), of_row, "", (), "") for t, of_row in zip(texts, labels, strict=True)]


def paths(batch: collate.Batch) -> list[list[int]]:
    """Of each segment the places of its path's tokens and of its own, by the levels."""
    starts, path, every = batch["cu_seq_lens_q"].tolist(), list[list[int]](), []
    for (a, b), level in zip(pairwise(starts), batch["levels"].tolist(), strict=True):
        assert b > a and level <= len(path)
        path[level:] = [list(range(a, b))]
        every.append([place for part in path for place in part])
    return every


@pytest.mark.parametrize("seed", range(8))
def test_each_row_is_a_path_with_its_own_positions_and_labels(seed: int) -> None:
    examples = family(seed)
    batch, plain = collate.collate_tree(examples), collate.collate(examples)
    ids, positions = batch["input_ids"][0], batch["position_ids"][0]
    every = [(ids[path].tolist(), path) for path in paths(batch)]
    beginnings = {tuple(each.tolist()) for each in plain["beginnings"].split([len(e.labels) for e in examples])}
    parts = batch["label_of"].split(batch["label_starts"].diff().tolist())
    for example, labels in zip(examples, parts, strict=True):
        before = [i - 1 for i, label in enumerate(example.labels) if label != IGNORED]
        at = batch["keep"][labels].tolist()
        same = (path for tokens, path in every if tokens == list(example.input_ids))  # equal rows have a path each
        path = next(path for path in same if [path[i] for i in before] == at)
        assert positions[path].tolist() == list(range(len(path)))
        assert tuple(batch["beginnings"][path].tolist()) in beginnings
        assert batch["targets"][labels].tolist() == [example.input_ids[i + 1] for i in before]
    assert batch["counts"].sum() == len(batch["label_of"]) == sum(x != IGNORED for e in examples for x in e.labels)
    assert batch["keep"].tolist() == sorted(set(batch["keep"].tolist()))
    assert batch["sharers"].sum() == sum(len(e.labels) for e in examples)
    assert len(ids) < sum(len(e.labels) for e in examples)
    inner = [n for n, level, after in zip(
        batch["cu_seq_lens_q"].diff().tolist(), batch["levels"].tolist(), [*batch["levels"].tolist()[1:], 0],
        strict=True) if after > level]  # fmt: skip
    assert inner and all(n % prefixes.EVEN == 0 for n in inner)


def test_what_is_shared() -> None:
    a = np.arange(100, dtype=np.uint32)
    for n, wanted in ((100, 98), (41, 40), (40, 38), (18, 16), (17, 16), (16, 0)):
        assert prefixes.common(a, np.concatenate([a[:n], a[:1]])) == wanted
    assert prefixes.common(a, a) == 98
    examples = [Example((1, 2, 3), (IGNORED, 2, 3), "", (), ""), Example((2, 3), (IGNORED, 3), "", (), "")]
    assert "levels" not in collate.collate_tree(examples)


@pytest.mark.parametrize("budget", [64, 100, 10_000])
def test_families_stay_together_where_they_fit(budget: int) -> None:
    examples = [*family(1), *family(2), *family(3)]
    rows = [np.array(e.input_ids, np.uint32) for e in examples]
    lengths = [len(row) for row in rows]
    parts = pack.arrange(range(len(rows)), lengths, budget, None, rows.__getitem__)
    assert sorted(row for part in parts for row in part) == list(range(len(rows)))
    for part in parts:
        tokens = collate.collate_tree([examples[row] for row in part])["input_ids"].numel()
        assert tokens == prefixes.computed(part, lengths, rows.__getitem__)
        assert tokens <= budget or len(part) == 1
    if budget == 10_000:
        assert len(parts) == 1
    of_ranks = pack.share(range(len(rows)), lengths, 3, rows.__getitem__)
    assert sorted(row for part in of_ranks for row in part) == list(range(len(rows)))
    sizes = [prefixes.computed(part, lengths, rows.__getitem__) for part in of_ranks]
    assert max(sizes) <= 4 / 3 * (prefixes.Tree.of(rows).tokens / 3 + max(lengths))


def test_one_family_on_several_processes() -> None:
    common = np.arange(448, dtype=np.uint32)
    rows = [np.concatenate([common, np.full(64, 500 + i, np.uint32)]) for i in range(16)]
    parts = pack.share(range(16), [512] * 16, 3, rows.__getitem__)
    assert max(len(part) for part in parts) == 6 and all(parts)


def test_beginnings_are_equal_where_texts_are() -> None:
    examples = family(4, rows=40)
    batch = collate.collate(examples)
    seen: dict[int, tuple[int, ...]] = {}
    starts = batch["cu_seq_lens_q"].tolist()
    for e, start in zip(examples, starts, strict=False):
        for i in range(len(e.input_ids)):
            key = int(batch["beginnings"][start + i])
            assert seen.setdefault(key, e.input_ids[: i + 1]) == e.input_ids[: i + 1]
    assert len(seen) == len({e.input_ids[: i + 1] for e in examples for i in range(len(e.input_ids))})


def test_a_step_of_families_has_rows_that_begin_alike() -> None:
    draw = random.Random(0)
    begins = [[draw.randrange(9) for _ in range(40)] for _ in range(16)]
    rows = [np.array([*begins[n % 16], draw.randrange(9), n], np.uint32) for n in range(130)]
    neighbours, sizes = np.array(in_order(rows), np.uint32), np.full(130, 42)

    def steps(seed: int, epoch: int) -> list[list[int]]:
        plan = pack.Steps(sizes, sizes, 8, 68, seed, 4096, None, ids=rows.__getitem__, neighbours=neighbours)
        return [plan.rows(index) for index in range(epoch * 17, epoch * 17 + 17)]

    first = steps(3, 0)
    assert sorted(chain(*first)) == list(range(130)) and [len(step) for step in first] == [8] * 16 + [2]
    assert all(len({n % 16 for n in step}) <= 2 for step in first[:-1])  # eight or nine a family
    heads = [min(step) for step in first]
    assert heads != sorted(heads) and first == steps(3, 0)  # steps in a random order, the same again
    cuts = {frozenset(frozenset(step) for step in steps(3, epoch)) for epoch in range(4)}
    assert len(cuts) > 1 and first != steps(4, 0)

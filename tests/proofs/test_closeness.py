import math

import numpy as np
import pytest
import torch

from halfbyte.proofs import closeness

NAN, INF = math.nan, math.inf


def test_distance_is_the_relative_norm_of_all_tensors_together() -> None:
    draw = np.random.default_rng(0)
    wanted = {"a": draw.standard_normal((3, 5)), "b": draw.standard_normal(7) * 10}
    got = {name: x + 0.01 * draw.standard_normal(x.shape) for name, x in wanted.items()}
    flat = [np.concatenate([x[name].ravel() for name in wanted]) for x in (got, wanted)]
    right = np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1])
    as_tensors = [{name: torch.from_numpy(x) for name, x in each.items()} for each in (got, wanted)]
    assert closeness.distance(*as_tensors) == pytest.approx(right, rel=1e-12)
    assert closeness.distance(*(torch.from_numpy(x) for x in flat)) == pytest.approx(right, rel=1e-12)


@pytest.mark.parametrize(
    ("got", "wanted", "distance"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, INF], [1.0, INF], 0.0),  # the same bits
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0, 1e-9], [0.0, 0.0], INF),
        ([1.0, NAN], [1.0, 2.0], INF),
        ([1.0, 2.0], [1.0, NAN], INF),
        ([1.0, NAN], [1.0, NAN], INF),
        ([1.0, INF], [1.0, 2.0], INF),
        ([1.0, 2.0], [1.0, INF], INF),
        ([1.0], [1.0, 2.0], INF),
    ],
)
def test_what_is_not_finite_is_infinitely_far(got: list[float], wanted: list[float], distance: float) -> None:
    assert closeness.distance(torch.tensor(got), torch.tensor(wanted)) == distance


def test_a_tensor_that_is_missing_is_infinitely_far() -> None:
    one = torch.ones(2)
    assert closeness.distance({"a": one}, {"a": one, "b": one}) == INF
    assert closeness.distance({"a": one, "b": one}, {"a": one}) == 0.0


def test_distances_of_rows() -> None:
    wanted = torch.tensor([[3.0, 4.0], [0.0, 2.0], [1.0, 1.0]])
    got = wanted + torch.tensor([[0.0, 0.5], [0.0, 0.0], [0.0, NAN]])
    assert closeness.row_distances(got, wanted).tolist() == [0.1, 0.0, INF]


def test_logits_about_their_mean() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 3.0]])
    assert closeness.centred(logits).tolist() == [[-1.0, 0.0, 1.0], [-1.0, -1.0, 2.0]]
    assert closeness.distance(closeness.centred(logits + 5), closeness.centred(logits)) == 0.0


def test_independent_roundings_add_by_their_squares() -> None:
    """A random walk of 400 steps: its root mean square is 20 steps, and 4 of these are hardly ever passed."""
    steps = torch.randn(20_000, 400, generator=torch.Generator().manual_seed(0)) * 1e-3
    walked = steps.sum(1)
    assert float(walked.square().mean().sqrt()) == pytest.approx(
        closeness.accumulated_rounding(1e-3, 400, margin=1), rel=0.02
    )
    assert float((walked.abs() > closeness.accumulated_rounding(1e-3, 400, margin=4)).float().mean()) < 2e-4

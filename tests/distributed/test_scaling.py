"""What more machines bring, from the plan of one: by hand for the sum of gradients, and monotone where it must be."""

from __future__ import annotations

import pytest

from halfbyte.distributed import scaling
from halfbyte.errors import RecipeError
from halfbyte.plan.estimate import plan_model
from halfbyte.recipe.file import recipe_from


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("1Gb/s", 125e6), ("100 Mb/s", 12.5e6), ("125MB/s", 125e6), ("2.5Gbps", 312.5e6), ("1Gbit/s", 125e6)],
)
def test_the_speed_of_a_link(text: str, wanted: float) -> None:
    assert scaling.link_of(text) == scaling.Link(wanted, scaling.DELAY_S)
    assert scaling.link_of(f"{text},5ms") == scaling.link_of(f"{text}, 5.0 ms") == scaling.Link(wanted, 0.005)


@pytest.mark.parametrize("text", ["", "fast", "0Gb/s", "1G", "-1Gb/s", "1Gb/h", "1Gb/s,5", "1Gb/s,-5ms", "5ms"])
def test_what_is_no_link(text: str) -> None:
    with pytest.raises(RecipeError, match="1Gb/s"):
        scaling.link_of(text)


def test_the_sum_by_hand() -> None:
    """Four machines send and receive 2 x 3/4 of 160 MB at 125 MB/s, in six messages."""
    assert scaling.reduce_seconds(160_000_000, 4, scaling.Link(125e6, 0.001)) == pytest.approx(2 * 0.75 * 1.28 + 0.006)
    assert scaling.reduce_seconds(160_000_000, 1, scaling.Link(125e6)) == 0.0


def test_a_7b_model_on_eight_machines() -> None:
    sets = [
        "train.per_device_train_batch_size=8",
        "train.gradient_accumulation_steps=8",
        "lora.target_modules=all-linear",
    ]
    planned = plan_model(recipe_from("llama-2-7b", "-", sets), device="cpu:64GB", length=512)
    made = scaling.expect(planned, 8, scaling.link_of("1Gb/s"))
    assert made.wire_bytes == 4 * planned.plan.trainable
    assert made.asked.balance == 1.0  # eight rows of 512 tokens each
    assert made.asked.compute_s * 8 == pytest.approx(planned.plan.time.step_s, rel=0.1)
    assert 0.9 * 8 < made.asked.speed_up <= 8.5
    slow = scaling.expect(planned, 8, scaling.link_of("0.1Mb/s"))
    assert slow.asked.speed_up < 2 and slow.last.nodes < made.last.nodes
    assert [each.nodes for each in made.others] == [1, 2, 4, 8, 16, 32, 64]


def test_rows_that_cannot_be_shared_evenly() -> None:
    sets = ["train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=3"]
    planned = plan_model(recipe_from("llama-2-7b", "-", sets), device="cpu:64GB", length=512)
    assert scaling.expect(planned, 2, scaling.Link(125e6)).asked.balance == pytest.approx(4 / 3)

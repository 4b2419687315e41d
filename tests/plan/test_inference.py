"""One planner for training and for use afterwards: what fitted while training fits in an evaluation."""

from __future__ import annotations

from dataclasses import replace

import pytest

from halfbyte.plan import MARGIN, Plan, Rows, RunChoices, plan_inference, plan_training
from tests.plan.test_choose import GB, cards, cpu, job

ROWS = Rows((700,) * 64, evaluated=(600,) * 32)


def trained(plan: Plan) -> RunChoices:
    made = RunChoices.from_json(plan.to_json())
    assert made is not None
    return made


@pytest.mark.parametrize("model", ["smollm2-135m", "llama-2-7b", "gpt2", "bloom-560m"])
@pytest.mark.parametrize("free", [0.8, 1.1, 1.6, 2.5, 3.5, 5, 8, 64])
def test_evaluating_a_run_takes_its_placement_and_tokens_and_never_more_than_training(model: str, free: float) -> None:
    device = cpu(free)
    one = job(device, model, ROWS)
    plan = plan_training(one, device)
    if plan.short_bytes:
        pytest.skip("nothing to use: training does not fit")
    after = plan_inference(one, device, trained(plan), generated_tokens=600)
    # the training's own evaluation: micro-batches of at most so many tokens, from a base in that place
    assert after.max_tokens_per_micro_batch == plan.evaluation_tokens
    assert after.placement == plan.placement
    assert after.evaluating_bytes <= plan.needed_bytes
    assert after.needed_bytes <= max(plan.needed_bytes, (1 - MARGIN) * free * GB) or after.sequences == 1
    assert after.needed_bytes <= free * GB


def test_training_s_evaluation_and_eval_count_the_same_bytes() -> None:
    device = cpu(64)
    one = job(device, rows=ROWS)
    plan = plan_training(one, device)
    after = plan_inference(one, device, trained(plan))
    held = plan.evaluating_bytes - plan.file_bytes + plan.busy_file_bytes
    assert held == after.evaluating_bytes + plan.line("optimiser")


def test_an_evaluation_on_a_smaller_machine_takes_smaller_micro_batches_and_fewer_sequences() -> None:
    large = cpu(64)
    one = job(large, "gpt2", ROWS)
    run = trained(plan_training(one, large))
    assert run.needed_bytes > 1.8 * GB, "no machine as small has trained it"
    seen = []
    for free in (64, 1.8, 1.5, 1.2, 1.0, 0.9, 0.8):
        after = plan_inference(one, cpu(free), run, generated_tokens=1024)
        seen.append((after.max_tokens_per_micro_batch, after.sequences))
        if after.sequences > 1:
            assert after.generating_bytes <= (1 - MARGIN) * free * GB
        if after.max_tokens_per_micro_batch > 700:
            assert after.evaluating_bytes <= (1 - MARGIN) * free * GB
    assert seen == sorted(seen, reverse=True)
    assert seen[0] == (run.evaluation_tokens, 16) and seen[-1][1] < 16


def test_a_base_larger_than_memory_is_streamed_and_one_with_room_again_is_not() -> None:
    small, large = cpu(3.5), cpu(64)
    one = job(small, "llama-2-7b", ROWS)
    assert plan_inference(one, small).placement == "streamed"
    run = trained(plan_training(one, small))
    assert run.placement == "streamed"
    assert plan_inference(one, small, run).placement == "streamed"
    assert plan_inference(one, large, run).placement == "mapped"
    assert plan_inference(one, small, run, placement="mapped").placement == "mapped"


def test_the_recipe_s_placement_wins_and_what_cannot_be_mapped_is_resident() -> None:
    device = cpu(64)
    for asked in ("resident", "mapped", "streamed"):
        plan = plan_inference(job(device, rows=ROWS, quant__placement=asked), device)
        assert (plan.placement, plan.reason) == (asked, "as the recipe says")
    assert plan_inference(job(device, rows=ROWS, mappable=False), device).placement == "resident"
    assert plan_inference(job(cards(80), rows=ROWS), cards(80)).placement == "resident"
    assert plan_inference(job(cards(24, 4), "llama-2-70b", ROWS), cards(24, 4)).placement == "split"


def test_a_small_base_that_is_to_serve_is_copied_into_large_pages_where_there_are_some() -> None:
    device = replace(cpu(64), large_pages=True)
    small, wide, large = (job(device, name, ROWS) for name in ("smollm2-135m", "bloom-560m", "llama-2-7b"))
    assert plan_inference(small, device, lasting=True).placement == "resident"
    assert plan_inference(wide, device, lasting=True).placement == "resident"
    for one, here, lasting in (
        (small, device, False), (small, cpu(64), True), (large, device, True),
        (wide, replace(cpu(2.4), large_pages=True), True),
        (job(device, rows=ROWS, quant__placement="mapped"), device, True),
    ):  # fmt: skip
        assert plan_inference(one, here, lasting=lasting).placement == "mapped", (here, lasting)
    assert plan_inference(small, device, placement="mapped", lasting=True).placement == "mapped"


def test_unproven_packing_is_one_row_and_an_old_plan_is_none() -> None:
    device = cpu(64)
    one = replace(job(device, rows=ROWS), packed=False)
    packed, single = plan_inference(job(device, rows=ROWS), device), plan_inference(one, device)
    assert single.evaluating_bytes < packed.evaluating_bytes
    assert RunChoices.from_json({"placement": "mapped"}) is None

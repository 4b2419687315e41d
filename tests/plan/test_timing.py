"""What a step's seconds are made of, counted again one matrix, one query and one pass at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from halfbyte.plan import memory, timing
from halfbyte.plan.job import Job, Rows
from halfbyte.plan.timing import Rates, pairs_of_a_token, step_time
from tests.plan.test_choose import cpu, job

LENGTH, ROWS, LAYERS = 200, 16, 30
TOKENS = LENGTH * ROWS  # of a step, in one micro-batch
# (out, in) of SmolLM2-135M's layer
MATRICES = {
    "q_proj": (576, 576), "k_proj": (192, 576), "v_proj": (192, 576), "o_proj": (576, 576),
    "gate_proj": (1536, 576), "up_proj": (1536, 576), "down_proj": (576, 1536),
}  # fmt: skip
# One byte and one number a second: the seconds are the bytes and the numbers.
ONE_A_SECOND = Rates(1e30, 1.0, 1e30, 1e30, 1e30, "counted", dropped=1.0)


def of(targets: Any, **fields: Any) -> Job:
    given = {"train__per_device_train_batch_size": ROWS, "lora__target_modules": targets, **fields}
    return job(cpu(64), rows=Rows((LENGTH,) * ROWS), **given)


def parts(one: Job, rates: Rates = ONE_A_SECOND, recompute: Any = "none", tokens: int = TOKENS) -> dict[str, float]:
    return step_time(one, rates, tokens=tokens, recompute=recompute, placement="mapped", read_bytes=0).parts


@pytest.mark.parametrize(("recompute", "forwards"), [("none", 1), ("full", 2)])
def test_products_read_and_write_their_operands(recompute: str, forwards: int) -> None:
    numbers = 0
    for out, wide in MATRICES.values():
        forward = TOKENS * wide + out * wide + 2 * TOKENS * out  # x, W, y read and written
        backward = TOKENS * out + out * wide + 2 * TOKENS * wide  # dy, W, dx read and written
        numbers += LAYERS * (forwards * forward + backward)
    # of x, y and their gradients each thin product of an adapter passes over one
    numbers += LAYERS * sum(3 * TOKENS * (MATRICES[name][0] + MATRICES[name][1]) for name in ("q_proj", "v_proj"))
    # a forward that is done again: in and out count alike on average, exactly so where all matrices are square
    assert parts(of(["q_proj", "v_proj"]), recompute=recompute)["operands"] == pytest.approx(
        2 * numbers, rel=1e-12 if forwards == 1 else 0.05
    )


@pytest.mark.parametrize(("recompute", "passes"), [("none", 3), ("selective", 3), ("full", 4)])
def test_dropout_passes_over_the_inputs_of_adapters(recompute: str, passes: int) -> None:
    """In each forward; in backward over what is dropped again, and over its gradient."""
    targets = ["q_proj", "down_proj"]
    wanted = passes * TOKENS * LAYERS * (576 + 1536)
    assert parts(of(targets), recompute=recompute)["LoRA's dropout"] == wanted
    assert parts(of(targets, lora__lora_dropout=0.0), recompute=recompute)["LoRA's dropout"] == 0


def test_a_rate_of_dropout_that_is_not_known_counts_nothing() -> None:
    assert parts(of(["q_proj"]), Rates(1e30, 1.0, 1e30, 1e30, 1e30, "counted"))["LoRA's dropout"] == 0


def test_each_adapted_layer_has_its_own_overhead_in_each_micro_batch() -> None:
    few, many = of(["q_proj"]), of("all-linear")
    for tokens, micro_batches in ((TOKENS, 1), (TOKENS // 4, 4)):
        more = parts(many, tokens=tokens)["overhead"] - parts(few, tokens=tokens)["overhead"]
        assert more == pytest.approx(micro_batches * 0.001 * LAYERS * 6)  # a millisecond for each of six more


def test_the_optimiser_runs_once_a_step_over_what_trains() -> None:
    """60 bytes are moved for each number; each of two tensors a layer takes a tenth of a millisecond."""
    numbers = LAYERS * 16 * sum(out + wide for out, wide in MATRICES.values())
    for tokens in (TOKENS, TOKENS // 4):
        seconds = parts(of("all-linear", lora__r=16), tokens=tokens)["optimiser"]
        assert seconds == pytest.approx(60 * numbers + 1e-4 * 2 * 7 * LAYERS)


@pytest.mark.parametrize("length", [48, 96, 110, 200, 1024])
def test_scores_are_counted_in_blocks_of_rows(length: int) -> None:
    """The kernel makes the scores of 48 rows up to the last one's own column. The formula has a whole last block: one
    that is cut in half has a quarter of a block's area less, less than a part in 2 length / 48 of all."""
    pairs = sum(min(48, length - first) * min(length, first + 48) for first in range(0, length, 48))
    assert pairs_of_a_token(length) * length == pytest.approx(pairs, rel=24 / length)


@pytest.mark.parametrize(("asked", "products"), [("exact", 0), ("auto", 2), ("int8", 2)])
def test_integer_products_are_counted_at_their_own_rate(asked: str, products: int) -> None:
    """Each frozen product that is an integer one goes from one rate to the other, and costs passes for rounding."""
    one, numbers = of(["q_proj", "v_proj"], quant__compute=asked), LAYERS * sum(o * i for o, i in MATRICES.values())
    slow = Rates(1.0, 1e30, 1e30, 1e30, 1e30, "counted", integer_ops=2.0)
    exact = parts(of(["q_proj", "v_proj"]), slow)["matrix products"]
    full_rate = 1 + 48 / TOKENS  # a micro-batch of 48 tokens multiplies at half the rate of a large one
    saved = products * TOKENS * 2 * numbers * (1 / 1.0 - 1 / 2.0) * full_rate
    assert parts(one, slow)["matrix products"] == pytest.approx(exact - saved)
    assert parts(one, replace(slow, integer_ops=0.0))["matrix products"] == exact
    assert (parts(one, replace(slow, memory_bytes=1.0))["rounding"] > 0) == bool(products)
    if asked == "auto":  # where it does not pay it is not taken
        assert parts(one, replace(slow, integer_ops=1.2))["matrix products"] == exact


def test_integers_are_counted_where_they_may_be_taken() -> None:
    """Where a reference is read by exact products, half of the products of a step that does no forward again; where AMX
    multiplies bf16, none unless they are asked for."""
    one = of(["q_proj"], quant__compute="auto")
    train = one.recipe.train.model_copy(update={"method": "dpo"})
    referenced = replace(one, recipe=one.recipe.model_copy(update={"train": train}))
    rates, numbers = Rates(1.0, 1.0, 1.0, 1.0, 1.0, "counted", integer_ops=2.0), one.linear_numel
    assert timing.integer_products(one, rates, 2.0)[0] == 4 * numbers
    assert timing.integer_products(referenced, rates, 2.0)[0] == 2 * numbers
    amx = replace(cpu(64), isa=(*cpu(64).isa, "amx_bf16"))
    for asked, there in (("auto", False), ("int8", True), ("exact", False)):
        recipe = of(["q_proj"], quant__compute=asked).recipe
        assert Job.of(recipe, one.specs, one.facts, one.rows, amx).integers == there


def test_what_integer_products_hold_is_planned() -> None:
    wide = max(max(shape) for shape in MATRICES.values())
    for asked, tokens in (("exact", 0), ("auto", 3000), ("int8", 400)):
        one = of(["q_proj", "v_proj"], quant__compute=asked)
        lines = memory.integer_lines(one, tokens, "private")
        copies = max(o * i for o, i in MATRICES.values()) + tokens * wide
        sums = 4 * wide * min(tokens, max(512, (3 << 19) // wide))
        assert [line.bytes for line in lines] == ([] if asked == "exact" else [copies + sums])


def test_a_run_counts_its_evaluations_and_what_it_compiles() -> None:
    """An evaluation is a forward: half the products of a step of the same rows that recomputes nothing."""
    rows = Rows((LENGTH,) * ROWS, (LENGTH // 2,) * ROWS, evaluated=(LENGTH,) * ROWS)
    given = {"train__per_device_train_batch_size": ROWS, "lora__target_modules": ["q_proj"], "lora__lora_dropout": 0.0}
    one = job(cpu(64), rows=rows, train__per_device_eval_batch_size=ROWS, **given)
    rates = Rates(1.0, 1e30, 1e30, 1e30, 1e30, "counted")  # one FLOP a second: all else is nothing beside it

    how = {"tokens": TOKENS, "recompute": "none", "placement": "mapped", "read_bytes": 0}

    def around(**changes: Any) -> dict[str, float]:
        return step_time(replace(one, **changes), rates, **how).around

    step = parts(one, rates)["matrix products"]
    without, twice = around(), around(evaluations=2)
    assert set(twice) - set(without) == {"evaluations"}
    thin = (
        6 * one.lora_parameters_per_token - 4 * one.lora_parameters_per_token
    )  # six thin products a step, two forward
    head = one.facts.vocab * one.facts.hidden  # at half of the tokens
    share = (2 * one.linear_numel + head + thin) / (4 * one.linear_numel + 2 * head + 3 * thin)
    assert twice["evaluations"] == pytest.approx(2 * share * step, rel=1e-6)
    forward = step_time(one, rates, **how).forward_s
    assert forward == pytest.approx(share * step / (ROWS * LENGTH), rel=1e-6)
    proof = without["saving"] - timing.SAVING_S - 16 * one.trainable / timing.SAVED_BYTES
    rate = (1 + timing.HALF_RATE_TOKENS / LENGTH) / (1 + timing.HALF_RATE_TOKENS / (ROWS * LENGTH))
    assert proof == pytest.approx(2 * 3 * LENGTH * forward * rate), "logits of three rows, by adapter and base"
    eight = job(cpu(64), rows=rows, quant__compute="int8", **given)
    whole = step_time(eight, replace(rates, integer_ops=4.0), **how)
    of_a_step = min(1.0, 512 / (ROWS * LENGTH))
    assert whole.around["proof of products"] == pytest.approx(2 * of_a_step * whole.step_s), "exact and in integers"
    cold, partly = around(uncompiled=("fp32", "bf16")), around(uncompiled=("bf16",))
    assert set(cold) - set(without) == {"compiling"} and cold["compiling"] > partly["compiling"] > 10
    again = step_time(replace(one, done=one.steps), rates, **how)
    assert again.seconds == pytest.approx(sum(without.values())), "a run that goes on has the steps that are left"
    assert again.run_s == pytest.approx(step * one.steps, rel=1e-6)


def test_an_optimiser_of_8_bits_takes_longer_for_each_number() -> None:
    """bitsandbytes' blocks are read and written one by one: 9.3 ns a number, 1.0 of torch's (docs/log)."""
    fast = replace(ONE_A_SECOND, memory_bytes=1e30)
    plain, eight = (of(["q_proj"], train__optim=optim) for optim in ("adamw_torch", "adamw_bnb_8bit"))
    more = parts(eight, fast)["optimiser"] - parts(plain, fast)["optimiser"]
    assert more == pytest.approx(8.3e-9 * plain.trainable, rel=0.2)

"""plan/choose.py: the choices of the plan on machines of every size; what it says when nothing fits; its lines."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from halfbyte.cli import show, show_plan
from halfbyte.data import pack
from halfbyte.models.describe import references, tensors_of
from halfbyte.models.tensors import facts_of
from halfbyte.plan import MARGIN, Job, Plan, Rows, alternatives, choose, plan_training, result
from halfbyte.plan.alternatives import compare
from halfbyte.plan.timing import Rates, assumed, step_time
from halfbyte.quant.policy import encoded_bytes
from halfbyte.recipe.schema import Recipe
from halfbyte.system.device import Card, Device

GB = 10**9


def cpu(free: float) -> Device:
    return Device("cpu", ("avx512_vnni", "avx512_bf16"), 2, 64 * GB, int(free * GB))


def cards(free: float, count: int = 1, ram: float = 64) -> Device:
    one = Card("card", int(free * GB), int(free * GB), (8, 0))
    return Device("cuda", (), 16, int(ram * GB), int(ram * GB), (one,) * count)


def job(
    device: Device, model: str = "smollm2-135m", rows: Rows | None = None, *, mappable: bool = True, **fields: Any
) -> Job:
    """A job of a bundled shape. `fields` are the recipe's, as `train__optim="sgd"`."""
    values: dict[str, Any] = {"model": model, "data": {"train": "t.jsonl"}}
    for name, value in fields.items():
        section, _, field = name.partition("__")
        values.setdefault(section, {})[field] = value
    specs = tensors_of(references()[model]["config"])
    facts = facts_of(references()[model]["config"], specs)
    return Job.of(Recipe(**values), specs, facts, rows or Rows((200,) * 64), device, mappable=mappable)


def made(device: Device, model: str = "smollm2-135m", rows: Rows | None = None, **fields: Any) -> Plan:
    return plan_training(job(device, model, rows, **fields), device)


def asked_for(device: Device, rows: Rows, *, recompute: bool | str, tokens: int, model: str = "smollm2-135m") -> Plan:
    """The plan of a recipe that leaves no choice open."""
    choices = {"quant__placement": "mapped", "train__gradient_checkpointing": recompute}
    return made(device, model, rows, **choices, train__max_tokens_per_micro_batch=tokens)


def test_with_room_nothing_is_recomputed_and_the_base_is_mapped() -> None:
    plan = made(cpu(64))
    assert (plan.placement, plan.recompute, plan.warnings, plan.fixes) == ("mapped", "none", (), ())
    assert plan.short_bytes == 0
    assert set(plan.reasons) == {"placement", "recompute", "max_tokens_per_micro_batch"}


def test_an_evaluation_takes_more_rows_at_once_than_a_step_and_no_more_memory() -> None:
    """Without gradients a layer's tensors are all there is: those of thirty layers hold a step of 100 tokens."""
    one = {"train__per_device_train_batch_size": 1, "train__gradient_accumulation_steps": 1}
    rows = Rows((100,) * 64, evaluated=(100,) * 200)
    plan, alone = (made(cpu(64), rows=each, **one) for each in (rows, Rows((100,) * 64)))
    assert (plan.max_tokens_per_micro_batch, plan.tokens_in_micro_batch) == (100, 100)
    assert plan.evaluation_tokens >= 4 * 100 and plan.evaluating_bytes <= plan.step_bytes == plan.peak_bytes
    comes = ("gradients", "activations", "backward of a layer", "logits", "dequantised weight", "allocator")
    comes_and_goes = sum(map(plan.line, comes))
    stays = plan.step_bytes - comes_and_goes - plan.line(result.POOL_RESERVE)
    assert plan.evaluating_bytes - stays <= comes_and_goes / 2, "it fits where a step was made smaller, too"
    assert plan.time.forward_s < 0.8 * alone.time.forward_s, "a weight is decoded once for ten times the tokens"
    asked = made(cpu(64), rows=rows, **one, train__max_tokens_per_micro_batch=300)
    assert asked.evaluation_tokens == asked.max_tokens_per_micro_batch == 300
    full = made(cpu(64), rows=Rows((2048,) * 64), train__gradient_checkpointing=False)
    assert full.evaluation_tokens == full.max_tokens_per_micro_batch == choose.MAX_TOKENS_PER_MICRO_BATCH


def test_among_plans_as_fast_as_each_other_the_smallest_is_taken_unless_memory_is_plenty() -> None:
    """Steps of 6400 tokens take two micro-batches, of 4000 tokens and the rest or of 3200 each."""
    rows, device = Rows((400,) * 64), cpu(64)
    large = asked_for(device, rows, recompute=False, tokens=4096)
    assert made(device, rows=rows).max_tokens_per_micro_batch == 4096
    plan = made(cpu(1.4 * large.needed_bytes / GB), rows=rows)
    assert plan.private_bytes < large.private_bytes
    assert plan.time.step_s <= 1.02 * large.time.step_s


def test_less_room_means_the_next_measure_and_none_before_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On ever smaller machines: smaller micro-batches, recomputation, then a warning; until then within the margin."""
    monkeypatch.setattr(result, "torch_build", lambda: "")  # which torch is installed here must not matter
    # not from 1.55 to 1.6, where two rows that recompute what is cheap are 7% faster than one row that does not
    taken = []
    for free in (16, 3, 2, 1.65, 1.3, 1.1, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.35):
        plan = made(cpu(free), rows=Rows((700,) * 64))
        kind = "short" if plan.short_bytes else "recompute" if plan.recompute != "none" else "plain"
        taken.append(kind)
        if kind != "short":
            assert plan.needed_bytes <= free * GB
        if not plan.warnings:
            assert plan.needed_bytes <= (1 - MARGIN) * free * GB
    order = ["plain", "recompute", "short"]
    assert taken == sorted(taken, key=order.index)
    assert set(taken) == set(order)


@pytest.mark.parametrize(
    ("has_cards", "every"), [(False, 3), (False, 1), (True, 1)], ids=["some sizes", "torch for CPUs", "torch for cards"]
)
def test_nothing_is_done_again_where_a_plan_without_it_fits_and_is_as_fast(
    has_cards: bool, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On machines of any size: of all choices that a recipe can ask for, none that fits and does less again is as fast.
    A larger micro-batch with cheap recomputation may be faster than a small one without."""
    monkeypatch.setattr(result, "torch_build", lambda: "cuda" if has_cards else "")
    rows, did_again = Rows((700,) * 64), 0
    for tenths in range(7, 31, every):
        device = cpu(tenths / 10)
        plan = made(device, rows=rows)
        if plan.short_bytes or plan.warnings or plan.recompute == "none":
            continue
        did_again += 1
        less: tuple[bool | str, ...] = (False,) if plan.recompute == "selective" else (False, "selective")
        for recompute in less:
            for tokens in range(700, 16 * 700 + 1, 700):  # of a step's 16 rows, any number together
                other = asked_for(device, rows, recompute=recompute, tokens=tokens)
                if other.short_bytes == 0 and other.needed_bytes <= (1 - MARGIN) * tenths / 10 * GB:
                    assert other.time.step_s > plan.time.step_s, (tenths, recompute, tokens)
    assert did_again >= (3 if every == 1 else 1)


def test_a_base_that_memory_cannot_keep_is_streamed_and_a_smaller_one_is_not() -> None:
    assert made(cpu(64), "llama-2-7b").placement == "mapped"
    small = made(cpu(5), "llama-2-7b", Rows((256,) * 64))
    assert small.placement == "streamed"
    assert "does not stay in" in small.reasons["placement"]
    assert small.line("base") < 3.9e9 / 4
    assert small.time.parts["waiting for disk"] >= 0


@pytest.mark.parametrize("model", ["smollm2-135m", "llama-2-7b", "llama-2-70b"])
@pytest.mark.parametrize("asked", ["auto", "mapped", "streamed"])
def test_a_plan_that_fits_says_so_of_every_number_in_it(model: str, asked: str) -> None:
    """A calibrated disk so fast that reading again costs nothing must not make a base that does not fit `mapped`."""
    rates = Rates(4e11, 5e10, 1e10, 1e11, 1e15, "calibrated")
    for free in (0.7, 3, 4.5, 6, 24.69, 200):
        device = cpu(free)
        one = job(device, model, Rows((512,) * 16), quant__placement=asked)
        plan = plan_training(one, device, rates)
        assert plan.needed_bytes >= plan.step_needed_bytes == plan.private_bytes + plan.busy_file_bytes
        if asked == "auto":
            stays = plan.step_bytes - plan.line("base") + one.base_bytes <= free * GB
            assert plan.placement == "streamed" or (stays and plan.read_bytes == 0)
        if not plan.short_bytes:
            assert plan.needed_bytes <= plan.available_bytes
            assert plan.step_bytes <= plan.available_bytes + plan.line("libraries, mapped")
            # what is not held comes from disk, in a forward and a backward of at least one micro-batch
            assert plan.read_bytes >= 2 * (one.base_bytes - plan.available_bytes)
        assert plan.time.reading_s == plan.read_bytes / rates.disk_bytes
        assert (plan.time.reading_s > 0) == (plan.read_bytes > 0)
        assert plan.to_json()["needed_bytes"] == plan.needed_bytes


def test_a_70b_trains_in_a_few_gigabytes_when_streamed() -> None:
    plan = made(cpu(8), "llama-2-70b", Rows((512,) * 16))
    assert (plan.placement, plan.short_bytes) == ("streamed", 0)
    assert plan.peak_bytes < 8 * GB


def test_a_base_that_cannot_be_mapped_stays_resident() -> None:
    device = cpu(64)
    plan = plan_training(job(device, mappable=False), device)
    assert plan.placement == "resident"
    assert [line.where for line in plan.lines if line.name == "base"] == ["private"]


def test_cards_one_if_it_fits_else_split_else_short() -> None:
    rows = Rows((512,) * 16)
    assert made(cards(80), "llama-2-70b", rows).placement == "resident"
    split = made(cards(24, 4), "llama-2-70b", rows)
    assert (split.placement, split.short_bytes) == ("split", 0)
    assert split.line("base") < 15 * GB
    short = made(cards(24), "llama-2-70b", rows)
    assert short.short_bytes > 10 * GB
    assert short.host_lines


def test_when_nothing_fits_it_says_how_much_is_missing_and_what_is_near() -> None:
    plan = made(cpu(1.2), "llama-2-7b", Rows((2048,) * 8), lora__r=64, lora__target_modules="all-linear")
    assert f"{plan.short_bytes / GB:.1f} GB short of memory" in plan.warnings[0]
    assert 1 <= len(plan.fixes) <= 3
    assert all(fix.short_bytes < plan.short_bytes and fix.slower > 0 for fix in plan.fixes)
    kinds = [fix.setting.partition("=")[0] for fix in plan.fixes]
    assert len(set(kinds)) == len(kinds)


@pytest.mark.parametrize("there", [True, False])
def test_8_bit_states_are_offered_where_they_can_be_had(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    """bitsandbytes before 0.50 has none on a CPU."""
    monkeypatch.setattr(alternatives, "CPU_OPTIMISERS", SimpleNamespace(there=there))
    monkeypatch.setattr(alternatives, "NEAREST", 10)
    rows, large = Rows((64,) * 8), {"lora__r": 512, "lora__target_modules": "all-linear"}

    def offered(device: Device) -> set[str]:
        return {fix.setting.partition("=")[0] for fix in made(device, "llama-3.2-1b", rows, **large).fixes}

    assert ("train.optim" in offered(cpu(2))) is there
    assert "train.optim" in offered(cards(2))


def test_a_change_that_is_said_to_fit_does() -> None:
    rows, device = Rows((4096,) * 16), cpu(3.2)
    fields: Any = {"train__gradient_checkpointing": False}
    plan = made(device, "llama-3.2-1b", rows, **fields)
    fitting = {fix.setting.partition("=")[0]: fix for fix in plan.fixes if not fix.short_bytes}
    assert plan.short_bytes
    assert {"train.gradient_checkpointing", "data.max_length"} <= set(fitting)
    length = int(fitting["data.max_length"].setting.partition("=")[2])
    assert made(device, "llama-3.2-1b", rows.cut(length), **fields).short_bytes == 0
    milder = made(device, "llama-3.2-1b", rows.cut(2 * length), **fields)
    assert milder.short_bytes > 0, "the mildest change that fits is the one that is named"
    assert made(device, "llama-3.2-1b", rows).short_bytes == 0


def test_the_recipes_own_values_win_and_are_counted() -> None:
    plan = made(
        cpu(64), train__max_tokens_per_micro_batch=512, train__gradient_checkpointing=True, quant__placement="streamed"
    )
    assert (plan.max_tokens_per_micro_batch, plan.recompute, plan.placement) == (512, "full", "streamed")
    assert set(plan.reasons.values()) == {"as the recipe says"}
    assert plan.tokens_in_micro_batch == 400  # two rows of 200 fit into 512
    longer = made(cpu(64), rows=Rows((700,) * 20), train__max_tokens_per_micro_batch=512)
    assert (longer.max_tokens_per_micro_batch, longer.tokens_in_micro_batch) == (512, 700)
    assert "the longest example has 700 tokens" in longer.warnings[0]
    paged = made(cpu(64), train__optim="paged_adamw_8bit")
    assert paged.warnings == ("train.optim paged_adamw_8bit: nothing is paged on a CPU, its state stays in memory",)
    assert made(cpu(0.9), train__gradient_checkpointing=False).recompute == "none"


def test_a_micro_batch_always_holds_the_longest_example() -> None:
    plan = made(cpu(1.4), rows=Rows((30,) * 50 + (1500,)))
    assert plan.tokens_in_micro_batch >= 1500


def test_unproven_packing_is_one_example_a_micro_batch() -> None:
    device = cpu(64)
    plan = plan_training(replace(job(device), packed=False), device)
    assert plan.tokens_in_micro_batch == 200


def test_base_and_training_state_are_counted_from_specs_and_parameters() -> None:
    device = cpu(64)
    one = job(device, lora__target_modules=["q_proj", "v_proj"])
    plan = plan_training(one, device)
    assert one.trainable == 30 * 16 * ((576 + 576) + (576 + 192))
    assert plan.line("base") == sum(encoded_bytes(s, one.recipe.quant, 2) for s in one.specs)
    assert plan.line("adapters") == 4 * one.trainable
    # in one micro-batch they come as activations go, a layer's at the peak; but the pool of a CPU keeps what goes. Over
    # several micro-batches all of them are there
    on_card = made(cards(80), train__gradient_checkpointing=False, lora__target_modules=["q_proj", "v_proj"])
    assert on_card.line("gradients") == 4 * one.trainable // 30
    several = made(device, train__max_tokens_per_micro_batch=400, lora__target_modules=["q_proj", "v_proj"])
    assert several.line("gradients") == plan.line("gradients") == 4 * one.trainable
    assert plan.line("optimiser") == 8 * one.trainable
    assert made(device, train__optim="adamw_bnb_8bit", lora__target_modules=["q_proj", "v_proj"]).line("optimiser") == (
        2 * one.trainable
    )


def test_gradients_larger_than_what_a_micro_batch_takes_are_all_there_at_its_end() -> None:
    device = cards(80)
    fields: Any = {"lora__r": 256, "lora__target_modules": "all-linear"}
    one = job(device, rows=Rows((8,) * 16), **fields)
    plan = plan_training(one, device)
    gone = sum(plan.line(name) for name in ("activations", "logits", "backward of a layer", "dequantised weight"))
    assert plan.line("gradients") + gone + plan.line("allocator") == 4 * one.trainable


def test_what_torchs_attention_keeps_has_the_pools_reserve_on_top() -> None:
    """Its slack is the heap's; where all lies in the pool, the slack is free blocks already."""
    for model, names, share in (("gemma-2-2b", ["q_proj"], 1.0), ("smollm2-135m", ["q_proj"], 0.0)):
        plan = made(cpu(64), model, lora__target_modules=names)
        moment = plan.line("backward of a layer") + plan.line("logits")
        wanted = 0.1 * (plan.line("activations") + moment) - (1 - share) * plan.line("allocator")
        assert plan.line(result.POOL_RESERVE) == pytest.approx(max(0, wanted), abs=2)


def test_copies_of_adapters_are_a_layers_where_layers_are_made_again() -> None:
    device = cpu(64)
    one = job(device, lora__target_modules="all-linear")
    kept = made(device, lora__target_modules="all-linear", train__gradient_checkpointing=False)
    again = made(device, lora__target_modules="all-linear", train__gradient_checkpointing=True)
    assert kept.line("adapters' copies") == 2 * one.lora_parameters
    assert again.line("adapters' copies") == 2 * one.lora_parameters // 30


def test_a_streamed_base_holds_a_few_layers_or_one_and_the_head() -> None:
    device = cpu(64)
    deep = job(device, "llama-2-70b", quant__placement="streamed")
    assert made(device, "llama-2-70b", quant__placement="streamed").line("base") == 3 * deep.layer_bytes
    wide = job(device, quant__placement="streamed")  # its head, tied to the embedding, is larger than two layers
    assert made(device, quant__placement="streamed").line("base") == wide.layer_bytes + wide.outer_bytes


def test_scores_that_go_through_memory_take_time() -> None:
    device = cpu(64)
    one = job(device, "gemma-2-2b", train__gradient_checkpointing=False)  # caps its scores
    rates = assumed(device, one.dtype)
    assert one.layer.pair > 0
    bare = replace(one)
    bare.__dict__["layer"] = replace(one.layer, pair=0.0)
    seconds = [
        step_time(j, rates, tokens=3200, recompute="none", placement="mapped", read_bytes=0).step_s for j in (bare, one)
    ]
    assert seconds[0] < seconds[1]


def test_rows_longer_than_a_window_take_more_in_the_layers_that_have_one() -> None:
    """15 of Gemma 3 270M's 18 layers see 512 tokens; where attention is no kernel of ours each longer example has a
    mask of 2 bytes a pair there."""
    device = cpu(64)
    known = [job(device, "gemma-3-270m", Rows((n,) * 16)) for n in (512, 513)]
    assert all(replace(one, whole_attention=True).layer == known[0].layer for one in known)
    short, long = (replace(one, whole_attention=False) for one in known)
    assert (short.layer.pairs, short.layer.pair) == ("flash", 0.0)
    assert long.layer.pair == pytest.approx(2 * 15 / 18)
    copies = 2 * 4 * 256 * 15 / 18  # of what attention returns, for the adapters that read it
    assert long.layer.kept - short.layer.kept == pytest.approx(copies)
    plain, asked = replace(device, isa=()), {"recompute": False, "tokens": 16 * 513, "model": "gemma-3-270m"}
    activations = [asked_for(plain, one.rows, **asked).line("activations") for one in (short, long)]
    assert activations[1] - activations[0] > 16 * 512 * 18 * copies


def test_disk_is_the_store_and_what_the_run_keeps() -> None:
    device = cpu(64)
    one = job(device, train__save_total_limit=2)
    sizes = {line.name: line.bytes for line in plan_training(one, device).disk}
    assert sizes["base store"] == one.store_build.disk_bytes > one.base_bytes
    assert sizes["checkpoints"] == 3 * 12 * one.trainable
    assert sizes["adapter"] == 4 * one.trainable


def test_the_first_run_on_a_machine_compiles_and_the_best_adapter_is_a_line_of_its_own() -> None:
    device = cpu(64)
    one = job(device, rows=Rows((200,) * 64, evaluated=(200,) * 8))
    warm, cold = (plan_training(replace(one, uncompiled=missing), device) for missing in ((), ("fp32", "bf16")))
    assert (warm.line("compiler"), cold.line("compiler")) == (0, cold.private_bytes - warm.private_bytes)
    assert 0.1e9 < cold.line("compiler") < 0.12e9 and cold.time.around["compiling"] > 0
    state = plan_training(replace(one, uncompiled=("state_space",)), device)
    assert state.line("compiler") == 0 < state.time.around["compiling"], "by processes of their own"
    sizes = {line.name: line.bytes for line in warm.disk}
    assert sizes["adapter"] == sizes["best adapter"] == 4 * one.trainable


def test_products_of_an_evaluations_sizes_are_counted() -> None:
    device = cpu(64)
    without, few, many = (
        plan_training(job(device, rows=Rows((200,) * 64, evaluated=(200,) * count)), device).line("compiled products")
        for count in (0, 64, 256)
    )
    assert without < few < many and many - without == 4 * (few - without)


def test_a_build_of_torch_for_cards_holds_more_though_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured with all libraries imported: 165 MB private and 517 of files."""
    seen = []
    for has_cards in (False, True):
        monkeypatch.setattr(result, "torch_build", lambda has_cards=has_cards: "cuda" if has_cards else "")
        plan = made(cpu(64))
        seen.append((plan.line("libraries"), plan.line("libraries, mapped"), plan.building_bytes))
    assert tuple(b - a for a, b in zip(*seen, strict=True)) == (165_000_000, 517_000_000, 682_000_000)


def test_activations_are_counted_for_the_largest_step_that_the_run_will_take() -> None:
    """The four longest rows have 1,600 tokens; in the run's order no four that meet have as many."""
    lengths = [400] * 4 + [100] * 60
    fields: dict[str, Any] = {
        "train__per_device_train_batch_size": 4,
        "train__gradient_accumulation_steps": 1,
        "train__num_train_epochs": 1,
    }
    counted = job(cpu(64), rows=Rows(lengths), **fields)
    steps = pack.Steps(np.array(lengths), np.array(lengths), 4, 16, counted.recipe.train.seed, 4096, None)
    largest = max(step.tokens for step in steps)
    assert counted.steps == 16 and largest < 1600
    assert plan_training(counted, cpu(64)).tokens_in_micro_batch == largest
    assert made(cpu(64), rows=Rows.assume(400), **fields).tokens_in_micro_batch == 1600


def test_building_the_store_is_planned_where_one_is_built() -> None:
    device = cpu(64)
    plan = plan_training(job(device), device)
    assert plan.building_bytes == sum(line.bytes for line in plan.building) > 0
    assert plan.to_json()["building_bytes"] == plan.building_bytes
    assert plan_training(job(device, mappable=False), device).building == ()
    assert plan_training(job(device, quant__type="none"), device).building == ()


def test_a_longer_vocabulary_takes_more_logits_and_fewer_labels_less_time() -> None:
    device = cpu(64)
    rows = Rows((200,) * 64, (100,) * 64)
    rates = assumed(device, "bf16")
    choice: Any = {"tokens": 3200, "recompute": "none", "placement": "mapped", "read_bytes": 0}
    whole, half = (step_time(job(device, rows=r), rates, **choice) for r in (Rows((200,) * 64), rows))
    assert half.step_s < whole.step_s


def test_time_grows_with_what_is_done_again_and_with_what_is_read() -> None:
    device = cpu(64)
    rates = Rates(4e11, 5e10, 1e10, 1e11, 1e9, "calibrated")
    one = job(device, "llama-2-7b")

    def seconds(**change: Any) -> float:
        given: Any = {"tokens": 3200, "recompute": "none", "placement": "mapped", "read_bytes": 0, **change}
        return step_time(one, rates, **given).step_s

    assert 1.2 < seconds(recompute="full") / seconds() < 1.6
    read: dict[str, Any] = {"read_bytes": 2 * one.base_bytes}
    assert seconds(**read) == pytest.approx(seconds() + 2 * one.base_bytes / 1e9)
    assert seconds(placement="streamed", **read) < seconds(**read)
    assert seconds(tokens=400) > seconds()
    time = step_time(one, rates, tokens=3200, recompute="none", placement="mapped", read_bytes=0)
    assert time.step_low_s < time.step_s < time.step_high_s
    assert time.step_s == pytest.approx(sum(time.parts.values()))


def test_three_ways_side_by_side() -> None:
    device = cards(80)
    one = job(device, "llama-2-7b", Rows((512,) * 16), lora__r=8, lora__target_modules=["q_proj", "v_proj"])
    full, lora, qlora = compare(one, device)
    assert [way.trainable for way in (full, lora, qlora)] == [6_738_415_616, 4_194_304, 4_194_304]
    assert f"{lora.percent:.2f}" == "0.06"
    assert full.bytes > 2.5 * lora.bytes > 2.5 * qlora.bytes
    assert full.relative_time == 1.0
    assert qlora.relative_time > lora.relative_time


@pytest.mark.parametrize(
    ("kind", "memory_gb", "wanted"), [("none", 12, "int8"), ("none", 7, "nf4"), ("int8", 8, "nf4"), ("nf4", 4, "")]
)
def test_the_most_bits_that_fit_are_offered(kind: str, memory_gb: int, wanted: str) -> None:
    fields: dict[str, Any] = {"quant__type": kind, "lora__target_modules": ["q_proj"]}
    plan = made(cards(memory_gb), "llama-2-7b", Rows((128,) * 16), mappable=False, **fields)
    assert plan.short_bytes
    offered = [fix for fix in plan.fixes if fix.setting.startswith("quant.type")]
    assert [fix.setting for fix in offered] == ([f"quant.type={wanted}"] if wanted else [])
    assert not any(fix.short_bytes for fix in offered)


def test_8_bits_lie_between_4_and_16_in_bytes_and_take_longest_to_dequantise() -> None:
    device = cards(80)
    jobs = {kind: job(device, "llama-2-7b", quant__type=kind) for kind in ("nf4", "int8", "none")}
    assert jobs["nf4"].base_bytes < jobs["int8"].base_bytes < jobs["none"].base_bytes
    numbers, rows = jobs["int8"].linear_numel, 32 * (4 * 4096 + 2 * 11008 + 4096)
    assert jobs["int8"].base_bytes == numbers + 4 * rows + jobs["int8"].outer_bytes + 2 * 64 * 4096  # and norms
    rates = assumed(device, "bf16")
    seconds = {
        kind: step_time(one, rates, tokens=3200, recompute="none", placement="resident", read_bytes=0).parts
        for kind, one in jobs.items()
    }
    spent = {kind: parts["dequantising"] for kind, parts in seconds.items()}
    assert spent["int8"] > spent["nf4"] > spent["none"] == 0
    ways = [way.bytes for way in compare(jobs["int8"], device)]
    assert ways == [way.bytes for way in compare(jobs["nf4"], device)]


def test_the_plan_prints_and_is_json() -> None:
    plan = made(cpu(0.35))
    with show.out.capture() as captured:
        show_plan.summary(plan)
    text = captured.get()
    for word in ("base", "adapters", "activations", "at most", "time", "max_tokens_per_micro_batch", "warning: "):
        assert word in text
    document = json.loads(json.dumps(plan.to_json()))
    assert document["step_bytes"] == sum(item["bytes"] for item in document["lines"]) == plan.step_bytes
    assert document["private_bytes"] + document["file_bytes"] == document["step_bytes"]
    assert document["short_bytes"] == plan.short_bytes > 0


def test_a_step_has_no_more_rows_than_there_are() -> None:
    few, many = (made(cpu(64), rows=Rows((200,) * n), train__max_steps=4).time.parts for n in (4, 64))
    assert many["matrix products"] > 2 * few["matrix products"]
    assert job(cpu(64), rows=Rows((200,) * 20), train__per_device_train_batch_size=16).mean_rows_per_step == 20
    assert job(cpu(64), rows=Rows((200,) * 65)).mean_rows_per_step == 13  # the last of five steps has one


def test_a_card_is_planned_with_what_is_free_on_it() -> None:
    """The smallest of all counts only where the model is split over all."""
    mixed = replace(cards(24, 2), cards=(Card("a", 24 * GB, 20 * GB, (8, 0)), Card("b", 24 * GB, 3 * GB, (8, 0))))
    assert choose.available_bytes(mixed) == 20 * GB
    assert choose.available_bytes(mixed, "split") == 3 * GB
    plan = made(mixed)
    assert (plan.placement, plan.available_bytes) == ("resident", 20 * GB)


def test_a_plan_of_a_card_has_what_is_no_tensor_the_copy_of_gradients_and_the_store() -> None:
    here = cards(24)
    plan = plan_training(replace(job(here, train__gradient_accumulation_steps=16), stored=True), here)
    on_card = {line.name: line.bytes for line in plan.lines if line.where == "device"}
    assert on_card["CUDA context"] > 300e6 and on_card["cuBLAS workspace"] > 8e6
    assert on_card["gradients' copy"] == on_card["gradients"] > 0
    assert {line.where for line in plan.host_lines} <= {"private", "file"} and plan.host_lines
    assert "base store" in {line.name for line in plan.disk}


def test_a_run_that_never_meets_its_longest_row_is_planned_by_its_largest_step() -> None:
    small = {"train__per_device_train_batch_size": 4, "train__gradient_accumulation_steps": 1, "train__max_steps": 1}
    one = job(cpu(64), rows=Rows((40,) * 15 + (262,)), train__seed=0, **small)
    plan = plan_training(one, cpu(64))
    assert one.step_tokens == 160, "the long row is not among the first four"
    assert (plan.tokens_in_micro_batch, plan.max_tokens_per_micro_batch) == (160, 160)


def test_the_upper_figure_is_what_is_expected_and_what_allocators_may_keep() -> None:
    """glibc: twice 32 MB; the pool: a tenth of what was lent, of which the slack is counted already."""
    plan = made(cpu(64))
    lent = plan.line("activations") + plan.line("logits") + plan.line("backward of a layer")
    reserves = 2 * (32 << 20) + max(0, round(0.1 * lent - plan.line("allocator")))
    assert plan.peak_bytes == plan.step_bytes and plan.peak_bytes - plan.expected_bytes == pytest.approx(
        reserves, abs=1
    )
    assert f"at most {plan.peak_bytes / 1e9:.2f} GB" in plan.memory_line
    assert f"{plan.expected_bytes / 1e9:.2f} expected" in plan.memory_line

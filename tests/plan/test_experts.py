"""A mixture in a plan: bytes of all experts, products of those that a token meets, pages of one layer's experts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from halfbyte.errors import BaseModelError
from halfbyte.models import describe, tensors
from halfbyte.plan import Job, Rows, base_memory, layer, timing
from halfbyte.quant import policy
from halfbyte.recipe.schema import Quant, Recipe
from halfbyte.system import device


def job(name: str) -> Job:
    shape = describe.describe(name)
    recipe = Recipe.model_validate({"model": name, "data": {"train": "x.jsonl"}, "output": "run"})
    return Job.of(recipe, shape.specs, shape.facts, Rows.assume(512), device.detect(), mappable=True)


def test_bytes_of_all_experts_and_products_of_two() -> None:
    made = job("mixtral-8x7b")
    layer = 8 * 3 * 4096 * 14336
    assert made.expert_numel == 32 * layer
    assert made.dequantised_weights(1) == pytest.approx(made.linear_numel)
    assert made.linear_numel == pytest.approx(32 * (layer / 4 + 2 * 4096 * 4096 + 2 * 4096 * 1024))
    assert made.dequantised_weights(100) == pytest.approx(made.linear_numel + 0.75 * 32 * layer, rel=0.01)
    assert 0.5155 < made.layer_bytes / (layer + 2 * 4096 * 4096 + 2 * 4096 * 1024) < 0.5165  # 4.13 bits a weight


@pytest.mark.parametrize(("tokens", "sizes"), [(10, 1), (100, 7), (256, 16), (4096, 16 + 3 * 8)])
def test_products_of_experts_are_of_few_sizes(tokens: int, sizes: int) -> None:
    """Multiples of 16 up to 256, and eight in each doubling from there to 2,048: the most of 4,096 tokens that are
    taken at once where two of eight experts are chosen."""
    facts = job("mixtral-8x7b").facts
    assert layer.expert_products(facts, tokens, adapted=False) == 4 * sizes
    assert layer.expert_products(facts, tokens, adapted=True) == 16 * sizes


def test_of_streamed_layers_ahead_experts_are_not_there() -> None:
    made = job("mixtral-8x7b")
    assert made.dense_layer_bytes < 0.04 * made.layer_bytes
    assert base_memory.busy_file_bytes(made) <= made.layer_bytes + made.outer_bytes  # three layers would be more


def test_an_expert_a_tensor_is_planned_as_the_stack_that_it_becomes() -> None:
    config = {"model_type": "qwen3_moe", "num_experts": 3, "num_experts_per_tok": 2}
    header = {
        f"model.layers.0.mlp.experts.{e}.{part}_proj.weight": {"dtype": "BF16", "shape": shape}
        for e in range(3)
        for part, shape in (("gate", [32, 64]), ("up", [32, 64]), ("down", [64, 32]))
    }
    header["model.layers.0.mlp.gate.weight"] = {"dtype": "BF16", "shape": [3, 64]}
    got = {s.name: (s.shape, s.role, s.layer) for s in tensors.specs_of([header], config)}
    assert got == {
        "model.layers.0.mlp.experts.gate_up_proj": ((3, 64, 64), "expert", 0),
        "model.layers.0.mlp.experts.down_proj": ((3, 64, 32), "expert", 0),
        "model.layers.0.mlp.gate.weight": ((3, 64), "router", 0),
    }


@pytest.mark.parametrize("kind", sorted(policy.FIXED_EXPERTS))
def test_what_opening_refuses_planning_refuses(kind: str) -> None:
    names = {"jetmoe": "mlp.input_linear.weight", "inkling_text": "mlp.shared_experts.gate_proj"}
    name = f"model.layers.0.{names.get(kind, 'feed_forward.experts.gate_up_proj')}"
    config = {"model_type": kind, "num_local_experts": 4, "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    spec = tensors.spec_of(name, (4, 64, 192), "BF16", config)
    with pytest.raises(BaseModelError, match=f"code of a {kind}"):
        policy.check_experts(kind, [spec], Quant())
    modules = policy.FIXED_EXPERTS[kind][1].split(",")
    policy.check_experts(kind, [spec], Quant(skip_modules=tuple(modules)))
    policy.check_experts(kind, [spec], Quant(type="none"))


def test_a_threshold_for_activations_is_not_for_experts() -> None:
    config = {"model_type": "mixtral", "num_local_experts": 4, "hidden_size": 64, "num_hidden_layers": 1}
    spec = tensors.spec_of("model.layers.0.mlp.experts.gate_up_proj", (4, 64, 192), "BF16", config)
    with pytest.raises(BaseModelError, match="experts of a mixtral are none"):
        policy.check_experts("mixtral", [spec], Quant(type="int8", llm_int8_threshold=6.0))
    policy.check_experts("mixtral", [spec], Quant(type="int8"))
    policy.check_experts("mixtral", [spec], Quant(type="nf4", llm_int8_threshold=None))


def test_experts_are_opened_by_their_weights_not_by_their_number() -> None:
    """32 of a quarter of the width are proven as fast as 8."""
    few = job("mixtral-8x7b")
    rates = timing.assumed(device.detect(), few.dtype)
    many = replace(few, facts=replace(few.facts, experts=4 * few.facts.experts))
    opening = [timing.around_the_steps(one, rates, 512)["opening"] for one in (few, many)]
    assert opening[0] == opening[1] > few.expert_numel / rates.dequant_elements


def test_a_gate_of_stock_code_moves_each_number_between_the_stacks() -> None:
    fused = job("mixtral-8x7b")
    stock = replace(fused, facts=replace(fused.facts, model_type="gpt_oss"))
    bytes_a_second = replace(timing.assumed(device.detect(), fused.dtype), memory_bytes=1.0)

    tokens = 512 * fused.rows_per_step

    def elementwise(one: Job) -> float:
        times = timing.step_time(one, bytes_a_second, tokens=512, recompute="none", placement="mapped", read_bytes=0)
        return times.parts["elementwise"] - timing.TRAFFIC * tokens * 32 * (one.layer.kept + one.layer.pair * 512)

    inner = 2 * 14336  # of a token's two experts
    assert elementwise(fused) == pytest.approx(0, abs=1e6)  # of 1e12
    assert elementwise(stock) == pytest.approx(timing.STOCK_GATE_BYTES * tokens * 32 * inner, rel=1e-6)

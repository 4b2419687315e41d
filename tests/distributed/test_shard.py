"""A base shared out over processes computes what the whole one does, whatever each of them runs; each holds a part."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from halfbyte import finetune
from halfbyte.adapters.assembly import assemble
from halfbyte.base import load, stream
from halfbyte.distributed import shard
from halfbyte.distributed import world as worlds
from halfbyte.errors import RecipeError
from halfbyte.layers import loss
from halfbyte.models.sources.lookup import find_model
from halfbyte.quant import formats
from halfbyte.recipe.file import load_recipe
from halfbyte.system import device
from halfbyte.training.pace import recompute_as
from halfbyte.upstream.torch import SHARDS
from tests import tiny, tiny_run
from tests.base import test_gguf_file
from tests.distributed import together
from tests.distributed.test_data_parallel import EVALUATED, same, train, trained

pytestmark = pytest.mark.skipif(bool(SHARDS.reason), reason=SHARDS.reason)
FAMILIES = ("llama", "qwen3", "gpt2")


def computed(model: Any, lengths: tuple[int, ...]) -> tuple[float, dict[str, Tensor]]:
    model.train()
    model.zero_grad()
    batch: Any = tiny.batch(lengths, model.config.vocab_size)
    found = loss.micro_batch_loss(model, batch)
    found.backward()
    return float(found), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def apart(got: tuple[float, dict[str, Tensor]], wanted: tuple[float, dict[str, Tensor]]) -> float:
    assert got[1].keys() == wanted[1].keys() and wanted[1]
    assert any(float(g.abs().sum()) > 0 for g in wanted[1].values())
    off = [float((got[1][n] - w).abs().max() / w.abs().max().clamp_min(1e-9)) for n, w in wanted[1].items()]
    return max(*off, abs(got[0] - wanted[0]) / wanted[0])


def whole_and_shared(recipe: Path, rounds: list[tuple[str, str]]) -> dict[str, Any]:
    """What this process computes of rows of its own, with all of the base and then with its part of it; bytes.

    Args:
        rounds: how to recompute, and where the second pass of rank 1 fails once ("": nowhere).
    """
    loaded = load_recipe(recipe).recipe
    with worlds.open_world() as here:
        base = load.open_base(find_model(loaded), loaded.quant, device.detect())
        stream.place_as_planned(base.model, shard.PLACEMENT, asked=True)
        model = assemble(base, loaded).model
        torch.manual_seed(1)
        for p in model.parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p, std=0.1)
        rows = [(9 + here.rank, 5), (12,), (7, 7, 3 + here.rank)][: 1 + here.rank]  # each has another number of them
        wanted = [computed(model, lengths) for lengths in rows]
        quantised = [m for m in model.modules() if formats.is_quantised(m)]
        shards = shard.Shards(here, model)
        assert all(formats.is_quantised(m) for m in quantised)
        off, empty, failed = [], 0, 0
        for recompute, where in rounds:
            recompute_as(model, recompute)  # type: ignore[arg-type]
            waiting, fails = list(range(len(rows))), where != "" and here.rank == 1
            while shards.more(bool(waiting)):
                with contextlib.suppress(MemoryError), shards.passing():
                    if fails and len(waiting) == 1:
                        fails, failed = False, failed + 1
                        with fails_in(shards.layers[1], where):
                            computed(model, rows[waiting[0]])
                    elif waiting:
                        off.append(apart(computed(model, rows[waiting[0]]), wanted[waiting.pop(0)]))
                    else:
                        empty += 1
                        computed(model, (2,))
        assert failed == (here.rank == 1) * sum(where != "" for _, where in rounds)
        if here.first:  # alone, as the proof before a checkpoint
            off.append(apart(computed(model, rows[0]), wanted[0]))
        shards.settle()
        own = sum(part_bytes(p) for p in model.parameters() if shard_of(p) is not None)
        return {"off": max(off), "empty": empty, "own": own, "said": shards.own_bytes, "all": shards.sharded_bytes}


def shard_of(p: Any) -> Any:
    return p.to_local() if hasattr(p, "to_local") else None


def part_bytes(p: Any) -> int:
    part = shard_of(p)
    return int((p if part is None else part).untyped_storage().nbytes())


@contextlib.contextmanager
def fails_in(layer: Any, where: str) -> Any:
    """An allocation that fails in a layer's forward, or in its backward."""

    def fail(*_: object) -> None:
        raise MemoryError("no room")

    part = next(m for name, m in layer.named_modules() if name.endswith(("mlp", "attn")))
    hook = part.register_full_backward_hook(fail) if where == "backward" else part.register_forward_hook(fail)
    try:
        yield
    finally:
        hook.remove()


NONE = [("none", "")]


def shared(folder: Path, size: int, kind: str, rounds: list[tuple[str, str]], **values: Any) -> None:
    tiny_run.checkpoint(folder / "model", kind)
    made = {"lora__target_modules": "all-linear", **values}
    loaded = tiny_run.recipe(folder, **made)
    found = together.run(size, whole_and_shared, loaded.path, rounds)
    for rank, each in enumerate(found):
        assert each["off"] <= 1e-5
        assert each["empty"] >= min(size, 3) - 1 - rank
        assert each["own"] == each["said"]
        assert each["all"] / size <= each["own"] <= each["all"] / size * 1.05


def test_gradients_of_two_processes_are_those_of_the_whole_base(tmp_path: Path) -> None:
    shared(tmp_path, 2, "llama", NONE)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", FAMILIES)
def test_gradients_are_those_of_the_whole_base(size: int, kind: str, tmp_path: Path) -> None:
    shared(tmp_path, size, kind, [("none", ""), ("selective", ""), ("full", "")])


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["fp4", "int8", "none"])
def test_other_number_formats(quant: str, tmp_path: Path) -> None:
    shared(tmp_path, 2, "llama", NONE, quant__type=quant)


@pytest.mark.slow
def test_a_files_own_blocks(tmp_path: Path) -> None:
    file, _ = test_gguf_file.written(tmp_path, "llama")
    shared(tmp_path, 2, "llama", NONE, model=str(file), quant__type="gguf")


@pytest.mark.slow
def test_an_allocation_that_fails_in_one_process_does_not_hang_the_others(tmp_path: Path) -> None:
    shared(tmp_path, 2, "llama", [(how, where) for how in ("none", "full") for where in ("forward", "backward")])


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_run_on_a_sharded_base_is_that_of_one_process(size: int, kind: str, tmp_path: Path) -> None:
    """With evaluations, a checkpoint each second step and a proof of the adapter, which the first makes alone."""
    tiny_run.checkpoint(tmp_path / "model", kind)
    values = {**EVALUATED, "train__save_strategy": "steps", "train__save_steps": 2, "lora__lora_dropout": 0.1}
    one = trained(tmp_path, 1, **values)
    many = trained(tmp_path, size, quant__placement="sharded", **values)
    same(one, many)
    assert many.proof.is_file()


@pytest.mark.slow
def test_a_sharded_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    from tests.distributed.test_data_parallel import stopped_at_three

    values = {"train__save_strategy": "steps", "train__save_steps": 2, "quant__placement": "sharded", **EVALUATED}
    whole = trained(tmp_path, 1, **{**values, "quant__placement": "auto"})
    loaded = tiny_run.recipe(tmp_path, **({"train__max_steps": 6, "lora__lora_dropout": 0.2} | values))
    together.run(2, stopped_at_three, loaded.path)
    together.run(2, train, loaded.path, True)
    same(whole, type(whole)(tmp_path / "run"))


def test_what_cannot_be_sharded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="this one is alone"):
        finetune.train(tiny_run.recipe(tmp_path, quant__placement="sharded"))
    assert not (tmp_path / "run").exists()
    scored = tiny_run.recipe(tmp_path, quant__placement="sharded", eval__metrics=["exact_match"])
    with pytest.raises(RecipeError, match=r"eval\.metrics"):
        shard.check(scored.recipe, 2)

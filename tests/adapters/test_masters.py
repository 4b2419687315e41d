"""Whatever trains is an fp32 master: it moves, its moments are fp32, the saved file is what trained, and the model
around it computes in its own dtype, with the gradients of plain PEFT."""

from __future__ import annotations

import copy
import json
from itertools import product
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import halfbyte
from halfbyte import finetune
from halfbyte.adapters import lora as adapters
from halfbyte.adapters import targets
from halfbyte.layers import fuse, loss, packing
from halfbyte.proofs.fusing import prove_fused
from halfbyte.recipe.schema import Lora
from halfbyte.runs.folder import RunFolder
from halfbyte.upstream.peft import BIASES
from tests import plain_peft, small_models, tiny, tiny_run

BIASED = {"attention_bias": True, "mlp_bias": True}
SAVED = ((), ("lm_head",), ("embed_tokens", "norm"), ("lm_head", "embed_tokens", "mlp"))
LENGTHS = (5, 9, 30)


def base(*, tied: bool = False, dtype: torch.dtype = torch.bfloat16, layers: int = 1) -> Any:
    changes = {**BIASED, "tie_word_embeddings": tied, "num_hidden_layers": layers}
    return tiny.model("llama", dtype=dtype, changes=changes)


def adapted(model: Any, **lora: Any) -> Any:
    """As a run has it, after its proofs."""
    asked = Lora(**{"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, **lora})
    chosen, _ = adapters.choose_targets(model, asked)
    made = adapters.add(model, asked, chosen, seed=0).train()
    packing.install(made, "cu_seq_lens")
    fuse.install(made)
    return made


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def moved(model: Any, backward: Any) -> dict[str, float]:
    """Of each trained tensor, the share of the numbers with a gradient that four steps have moved."""
    tensors = trained(model)
    before = {name: p.detach().clone() for name, p in tensors.items()}
    seen = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in tensors.items()}
    optimizer = torch.optim.AdamW(tensors.values(), lr=2e-4, weight_decay=0.0)
    for _ in range(4):
        backward()
        for name, p in tensors.items():
            assert p.grad is not None, f"{name} has no gradient"
            seen[name] |= p.grad != 0
        optimizer.step()
        optimizer.zero_grad()
    states = [t for state in optimizer.state.values() for key, t in state.items() if key.startswith("exp_avg")]
    assert len(states) == 2 * len(tensors) and {t.dtype for t in states} == {torch.float32}
    assert all(mask.any() for mask in seen.values())
    return {n: float((p != before[n])[seen[n]].float().mean()) for n, p in tensors.items()}


def named(name: str) -> str:
    """A parameter's name as it is saved."""
    name = name.replace(".modules_to_save.default", "").replace(".default", "")
    return name.removesuffix(".weight") if "lora_magnitude_vector" in name else name


def can_be(tied: bool, saved: tuple[str, ...], bias: str, tokens: tuple[int, ...] | None) -> bool:
    """Rows of an embedding that trains whole, or is the frozen half of a head that does, are refused (`test_lora.py`,
    `test_modules_to_save_that_cannot_train_so_are_an_error`)."""
    return tokens is None or not ("embed_tokens" in saved or (tied and "lm_head" in saved))


@pytest.mark.parametrize(
    ("tied", "saved", "bias", "tokens"),
    [each for each in product((False, True), SAVED, ("none", "lora_only", "all"), (None, (3, 4))) if can_be(*each)],
    ids=lambda value: "+".join(map(str, value)) if isinstance(value, tuple) else str(value),
)
def test_of_whatever_trains_four_steps_move_every_number(
    tied: bool, saved: tuple[str, ...], bias: str, tokens: tuple[int, ...] | None, tmp_path: Path
) -> None:
    if bias == "lora_only" and BIASES.reason:
        pytest.skip(BIASES.reason)
    for dora, rslora in ((False, tied), (True, not tied)):
        asked = {"modules_to_save": saved or None, "bias": bias, "trainable_token_indices": tokens}
        model = adapted(base(tied=tied), **asked, use_dora=dora, use_rslora=rslora)
        assert {p.dtype for p in trained(model).values()} == {torch.float32}
        batch = tiny.batch(LENGTHS, 256)
        shares = moved(model, lambda m=model, b=batch: (loss.micro_batch_loss(m, b) / sum(LENGTHS)).backward())
        assert min(shares.values()) >= 0.99, {name: share for name, share in shares.items() if share < 0.99}
        folder = tmp_path / f"{dora}{rslora}"
        adapters.save(model, folder, base_id="org/name", revision=None)
        file, wanted = load_file(folder / "adapter_model.safetensors"), trained(model)
        assert file.keys() == {named(name) for name in wanted}
        assert all(torch.equal(file[named(name)], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize(
    ("name", "lora"),
    [
        ("llama", {"modules_to_save": ["lm_head", "embed_tokens", "norm"]}),
        ("gemma3", {"modules_to_save": ["lm_head"]}),
        ("gpt2", {"bias": "all", "modules_to_save": ["ln_f"]}),
        ("opt", {"bias": "lora_only"}),
        ("llama", {"trainable_token_indices": [3, 4]}),
    ],
)
def test_a_run_moves_them_and_goes_on_to_the_bit(name: str, lora: dict[str, Any], tmp_path: Path) -> None:
    """In 4 bits, where bitsandbytes' own layer would cast a bias in place; the file and its checkpoint are fp32."""
    if lora.get("bias") == "lora_only" and BIASES.reason:
        pytest.skip(BIASES.reason)
    tiny_run.checkpoint(tmp_path / "model", name, torch.bfloat16)
    values = {f"lora__{key}": value for key, value in lora.items()}
    values |= {"quant__compute_dtype": "bf16", "train__learning_rate": 2e-4, "lora__save_dtype": "fp32"}
    values |= {"train__lr_scheduler_type": "constant", "train__save_strategy": "steps", "train__save_steps": 2}
    loaded = tiny_run.recipe(tmp_path, **values, train__save_total_limit=2, train__weight_decay=0.1)
    finetune.train(loaded)
    run = RunFolder(Path(loaded.recipe.output))
    early, late = (load_file(path / "adapter_model.safetensors") for path in sorted(run.checkpoints.glob("step-*")))
    last = load_file(run.adapter / "adapter_model.safetensors")
    report = json.loads(run.report.read_text())
    planned = {line["name"]: line["planned"] for line in report["lines"]}["adapter on disk"]
    assert planned == sum(tensor.nbytes for tensor in last.values())
    assert late.keys() == last.keys() and all(torch.equal(late[n], last[n]) for n in last)
    beside = [n for n in last if "lora_" not in n]
    assert beside and {last[n].dtype for n in beside} == {torch.float32}
    assert min(float((early[n] != last[n]).float().mean()) for n in beside) >= 0.99  # by weight decay, all of them
    for path in (run.checkpoints / "step-000004", run.adapter, run.report):
        path.rename(tmp_path / path.name)
    finetune.train(loaded, resume=True)
    again = load_file(run.adapter / "adapter_model.safetensors")
    assert all(torch.equal(again[n], last[n]) for n in last)


@pytest.mark.parametrize("lora", [{"modules_to_save": ["lm_head", "norm"]}, {"bias": "all"}], ids=str)
def test_a_script_of_the_drop_in_moves_them(lora: dict[str, Any], tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **lora)
    model = halfbyte.get_peft_model(halfbyte.prepare_model_for_kbit_training(base(layers=2)), config).train()
    ids = torch.stack(plain_peft.texts((20, 20), 256))
    shares = moved(model, lambda: model(input_ids=ids, labels=ids).loss.backward())
    assert min(shares.values()) >= 0.99
    wanted = {named(name): p.detach().clone() for name, p in trained(model).items()}
    model.save_pretrained(tmp_path)
    again = halfbyte.PeftModel.from_pretrained(base(layers=2), str(tmp_path), is_trainable=True)
    assert all(torch.equal(p, wanted[named(name)]) for name, p in trained(again).items())
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits, rtol=0, atol=0)


def test_a_second_adapter_has_masters_too() -> None:
    """Both ways: it trains when it is made active; with no masters asked for, there are none."""
    for cast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"], task_type="CAUSAL_LM")
        model = halfbyte.get_peft_model(base(), config, autocast_adapter_dtype=cast).train()
        model.add_adapter("second", config, autocast_adapter_dtype=cast)
        model.set_adapter("second")
        assert {p.dtype for p in trained(model).values()} == {dtype}
        assert all(".second" in name for name in trained(model))
        ids = torch.stack(plain_peft.texts((20, 20), 256))
        if cast:
            shares = moved(model, lambda m=model, x=ids: m(input_ids=x, labels=x).loss.backward())
            assert min(shares.values()) >= 0.99
        assert model(input_ids=ids).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("more", [{}, {"bias": "all"}, {"modules_to_save": ["embed_out"]}])
def test_in_fp16_whatever_trains_is_fp32(more: dict[str, Any]) -> None:
    """A GradScaler refuses gradients in fp16, which biases and whole modules of an fp16 base had on a card."""
    model = tiny.model("gpt_neox", dtype=torch.float16).requires_grad_(False)
    asked = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **more)
    trained = [p for p in halfbyte.get_peft_model(model, asked).parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}


def test_a_script_that_wants_no_masters_gets_none() -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"], task_type="CAUSAL_LM")
    model = halfbyte.get_peft_model(base(), config, autocast_adapter_dtype=False)
    assert {p.dtype for p in trained(model).values()} == {torch.bfloat16}


@pytest.mark.parametrize("lora", [{"modules_to_save": ["lm_head", "embed_tokens", "norm"]}, {"bias": "all"}], ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_the_first_step_computes_what_the_base_computes(lora: dict[str, Any], recompute: bool) -> None:
    model = base(layers=2)
    ids = torch.arange(3, 23)[None]
    wanted = copy.deepcopy(model)(ids).logits
    made = adapted(model, **lora)
    fuse.remove(made)
    packing.install(made, "single")
    with torch.no_grad():
        got = made(ids).logits
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, wanted)
    if recompute:
        made.enable_input_require_grads()
        made.gradient_checkpointing_enable()
    made(ids).logits.sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in trained(made).values() if p.grad is not None)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "lora",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "norm", "mlp"]},
        {"bias": "all"},
        {"bias": "lora_only", "modules_to_save": ["lm_head", "norm"]},
    ],
    ids=str,
)
def test_gradients_are_plain_pefts_with_masters_under_autocast(lora: dict[str, Any], tied: bool) -> None:
    """Packed, fused and with the head's own loss. Both ways round; neither is farther from fp32 than the other by more
    than the order of sums makes it, 1.5 times, and so they are apart by no more than both distances together."""
    if lora.get("bias") == "lora_only" and BIASES.reason:
        pytest.skip(BIASES.reason)
    rows = plain_peft.texts(LENGTHS, 256)

    def plain(dtype: torch.dtype) -> Any:
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **lora)
        model = base(tied=tied, layers=2).to(dtype)
        made = peft.get_peft_model(model, config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            for name, p in made.named_parameters():
                if "lora_B" in name:
                    p.data = torch.randn_like(p) * 0.2
                if p.requires_grad:
                    p.data = p.data.float()
        return made.train()

    _, truth = plain_peft.learn(plain(torch.float32), rows)
    with torch.autocast("cpu", torch.bfloat16):
        _, theirs = plain_peft.learn(plain(torch.bfloat16), rows)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **lora)
    ours = halfbyte.get_peft_model(base(tied=tied, layers=2), config).train()
    ours.load_state_dict(plain(torch.bfloat16).state_dict())
    packing.install(ours, "cu_seq_lens")
    assert loss.head_of(ours) is not None
    loss.micro_batch_loss(ours, tiny.batch_of(rows)).backward()
    got = plain_peft.gradients(ours)
    assert {g.dtype for g in got.values()} == {torch.float32}
    far = plain_peft.apart(theirs, truth)
    assert plain_peft.apart(got, truth) <= 1.5 * far + 1e-3
    assert plain_peft.apart(got, theirs) <= 2.5 * far + 1e-3


@pytest.mark.parametrize("kind", ["mamba", "bloom", "gpt_oss", "recurrent_gemma"])
def test_a_bias_is_in_the_bases_dtype_also_where_its_module_is_not_called(kind: str) -> None:
    """Mamba reads the bias of its convolution; its own residual stream is fp32."""
    model = small_models.build(kind).to(torch.bfloat16)
    names = targets.matched(model, targets.auto_targets(model))
    config = peft.LoraConfig(r=4, target_modules=names, task_type="CAUSAL_LM", bias="all")
    made = halfbyte.get_peft_model(model, config).train()
    assert prove_fused(made, packed=False).difference < 1e-5
    ids = torch.arange(3, 12)[None]
    made(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert {p.grad.dtype for p in trained(made).values() if p.grad is not None} == {torch.float32}

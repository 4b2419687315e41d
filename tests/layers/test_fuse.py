"""The fused layers on real architectures: gradients as PEFT's, every fallback, and off again without a trace."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import LlamaMLP

import halfbyte
from halfbyte.adapters import targets
from halfbyte.data.collate import collate
from halfbyte.data.encoding.examples import Example
from halfbyte.layers import formulas, fuse, loss
from halfbyte.layers.kernels import cpu
from halfbyte.proofs.packing import prove_packing
from tests import small_models, tiny

LENGTHS = (5, 40, 40, 1, 23)


def adapted(
    name: str, dtype: torch.dtype = torch.float32, *, changes: Any = None, vocab_size: int = 256, **lora: Any
) -> Any:
    model = tiny.model(name, dtype=dtype, changes=changes, vocab_size=vocab_size)
    names = list(targets.auto_targets(model).names)
    config = LoraConfig(**{"r": 4, "target_modules": names, "task_type": "CAUSAL_LM", **lora})
    model = peft.get_peft_model(model, config)
    torch.manual_seed(3)
    for n, p in model.named_parameters():
        if "lora_B" in n:
            p.data = torch.randn_like(p) * 0.2
    prove_packing(model)
    return model.train()


def batch() -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)
    examples = []
    for i, n in enumerate(LENGTHS):
        ids = torch.randint(3, 250, (n,), generator=draw).tolist()
        labels = [-100] * n
        labels[max(1, n // 2) :] = ids[max(1, n // 2) :]
        examples.append(Example(tuple(ids), tuple(labels), f"row {i}", prompt_ids=(), completion=""))
    return collate(examples)


def fused(model: Any) -> bool:
    return any(isinstance(module, fuse._Fast) for module in model.modules())


def gradients(model: Any, *, fused: bool = True) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.micro_batch_loss(model, batch(), fused=fused).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys() and a
    off = sum(float((a[n].double() - b[n].double()).square().sum()) for n in a) ** 0.5
    return off / sum(float(b[n].double().square().sum()) for n in a) ** 0.5


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
@pytest.mark.parametrize("bias", ["none", "all"])
def test_gradients_are_those_of_peft_and_transformers(name: str, bias: str) -> None:
    model = adapted(name, bias=bias)
    own = gradients(model, fused=False)
    counts = fuse.install(model)
    own_linears = name in ("gpt2", "falcon")  # classes of their own in 16-bit; plain 4-bit linears once quantised
    assert bool(counts.counts.get("LoRA linears")) != own_linears, counts
    assert apart(gradients(model), own) < 1e-5
    assert fuse.remove(model) == sum(counts.counts.values())
    assert apart(gradients(model, fused=False), own) == 0.0


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_in_bf16_they_are_as_near_to_the_truth_as_pefts(name: str) -> None:
    truth = gradients(adapted(name), fused=False)
    model = adapted(name, torch.bfloat16)
    own = gradients(model, fused=False)
    fuse.install(model)
    fused = gradients(model)
    assert apart(fused, truth) < 1.5 * apart(own, truth) + 1e-3


def test_what_runs_fused_on_llama() -> None:
    counts = fuse.install(adapted("llama")).counts
    assert counts == {"LoRA linears": 8, "norms": 5, "gated MLPs": 2, "attentions": 2, "layers": 2}


@pytest.mark.parametrize(
    ("lora", "why"), [({"use_dora": True}, "DoRA or another variant"), ({"lora_bias": True}, "lora_bias")]
)
def test_what_peft_can_do_and_is_not_fused_goes_pefts_way_and_is_said(lora: dict[str, Any], why: str) -> None:
    model = adapted("llama", **lora)
    own = gradients(model, fused=False)
    said = fuse.install(model)
    assert said.unfused == {why: 8} and why in str(said)
    assert apart(gradients(model), own) < 1e-5


ROWS = [200, 0, 31]  # not in their order; 0 is the padding


class Largest(TorchDispatchMode):
    """The most numbers of any tensor that is made."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func._schema.is_mutable and "view" not in str(func):
            shared = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
            if out.untyped_storage().data_ptr() not in shared:
                self.numbers = max(self.numbers, out.numel())
        return out


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt"])
def test_trained_rows_learn_what_pefts_do_and_no_matrix_is_made_anew(name: str, tied: bool) -> None:
    changes: dict[str, Any] = {"tie_word_embeddings": tied}
    if name == "opt":  # a relu has a kink: of a number that is 0 to rounding, either of two gradients is right
        changes["activation_function"] = "gelu"
    model = adapted(name, changes=changes, vocab_size=2000, trainable_token_indices=ROWS)
    model.zero_grad()
    embedding = model.get_input_embeddings()
    seen = torch.tensor([[200, 5, 0, 31, 200, 31, 7, 9]])
    many = batch()
    many["input_ids"][0, : seen.numel()] = seen[0]
    many["targets"][:3] = torch.tensor([200, 31, 0])

    def learned(fused: bool) -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss.micro_batch_loss(model, many, fused=fused).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    own = learned(False)
    with torch.no_grad():
        wanted = model(seen).logits, embedding(seen)
    counts = fuse.install(model).counts
    assert counts["trained rows"] == 1 + tied
    with Largest() as largest:
        assert apart(learned(True), own) < 1e-5
        with torch.no_grad():
            got = model(seen).logits, embedding(seen)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert largest.numbers < embedding.token_adapter.base_layer.weight.numel()
    assert loss.head_of(model) is not None
    with torch.no_grad(), model.disable_adapter():
        alone = loss.micro_batch_loss(model, many)
        assert loss.head_of(model) is not None
        torch.testing.assert_close(alone, loss.micro_batch_loss(model, many, fused=False), rtol=1e-5, atol=1e-5)
    fuse.remove(model)
    with Largest() as largest:
        learned(False)
    assert largest.numbers >= embedding.token_adapter.base_layer.weight.numel(), "PEFT's own does make it anew"


def test_merged_disabled_and_several_adapters_go_pefts_way() -> None:
    model = adapted("llama")
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    plain = copy.deepcopy(model)
    fuse.install(model)
    ids = torch.tensor([[5, 6, 7, 8]])

    def same() -> None:
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-5)

    for m in (model, plain):
        m.set_adapter("other")
    same()
    layer = next(m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer))
    with model.disable_adapter():
        assert fuse.unfused_reason(layer) == "adapters disabled"
        with plain.disable_adapter():
            same()
    for m in (model, plain):
        m.base_model.set_adapter(["default", "other"])
    assert fuse.unfused_reason(layer) == "several adapters"
    same()
    for m in (model, plain):
        m.set_adapter("default")
        m.merge_adapter()
    assert fuse.unfused_reason(layer) == "merged"
    same()
    for m in (model, plain):
        m.unmerge_adapter()
    same()
    names = ["default", "other", "__base__"]
    rows = ids.repeat(3, 1)
    model.eval(), plain.eval()
    torch.testing.assert_close(model(rows, adapter_names=names).logits, plain(rows, adapter_names=names).logits)


def test_classes_of_others_are_not_touched_and_instances_come_back() -> None:
    model, other = adapted("llama"), adapted("llama")
    before = {n: type(m) for n, m in model.named_modules()}
    state = set(model.state_dict())
    fuse.install(model)
    fuse.install(model)
    assert fused(model) and not fused(other)
    assert set(model.state_dict()) == state
    for name, module in model.named_modules():
        assert isinstance(module, before[name]) and type(module).__name__ == before[name].__name__
    fuse.remove(model)
    assert {n: type(m) for n, m in model.named_modules()} == before


def test_a_norm_that_computes_something_else_is_not_taken() -> None:
    class OddRMSNorm(torch.nn.Module):
        def __init__(self, width: int, eps: float = 1e-6) -> None:
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.ones(width), requires_grad=False), eps

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight * 2

    model = torch.nn.Sequential(OddRMSNorm(8))
    assert "norms" not in fuse.install(model).counts


def test_a_trained_norm_keeps_its_own_forward_and_learns() -> None:
    model = adapted("llama", modules_to_save=["norm"])
    own = gradients(model, fused=False)
    fuse.install(model)
    got = gradients(model)
    assert any("norm" in n for n in got)
    assert apart(got, own) < 1e-5


def test_the_drop_in_names_install_it() -> None:
    model = tiny.model("llama")
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    assert fused(halfbyte.get_peft_model(model, config))


def test_recomputation_gives_the_same_gradients_with_dropout() -> None:
    model = adapted("llama", lora_dropout=0.3)
    fuse.install(model)
    found = []
    for again in (False, True):
        if again:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(5)
        found.append(gradients(model))
    assert apart(*found) < 1e-6
    torch.manual_seed(6)
    assert apart(gradients(model), found[0]) > 1e-2


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2"])
@pytest.mark.parametrize("again", [False, True], ids=["alone", "under full recomputation"])
def test_selective_recomputation_gives_the_same_gradients_to_the_bit(name: str, again: bool) -> None:
    model = adapted(name, lora_dropout=0.3)
    fuse.install(model)
    if again:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = []
    for on in (False, True):
        fuse.recompute_cheap(model, on=on)
        torch.manual_seed(5)
        found.append(gradients(model))
    assert apart(*found) == 0.0


def test_selective_recomputation_keeps_less() -> None:
    model = adapted("llama")
    fuse.install(model)
    kept = []
    for on in (False, True):
        fuse.recompute_cheap(model, on=on)
        storages: dict[int, int] = {}

        def pack(t: torch.Tensor, storages: dict[int, int] = storages) -> torch.Tensor:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            held = loss.micro_batch_loss(model, batch())
        kept.append(sum(storages.values()))
        del held
    assert kept[1] < kept[0]


@pytest.mark.skipif(not cpu.enabled(), reason="numba does not work here")
def test_without_kernels_everything_is_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("llama", lora_dropout=0.0)
    fuse.install(model)
    fast = gradients(model)
    monkeypatch.setenv("HALFBYTE_KERNELS", "0")
    cpu.enabled.cache_clear()
    try:
        assert apart(gradients(model), fast) < 1e-5
    finally:
        monkeypatch.undo()
        cpu.enabled.cache_clear()


@pytest.mark.parametrize(
    "kind", ["smollm3", "qwen3_5_text", "lfm2", "phi3", "glm4", "granitemoehybrid", "falcon_h1", "gpt2"]
)
def test_an_mlp_is_known_by_what_it_computes(kind: str) -> None:
    changed: dict[str, Any] = {"mlp_multipliers": [0.5, 3.0]} if kind == "falcon_h1" else {}
    model = small_models.build(kind, **changed)
    names = (".mlp", ".feed_forward", ".shared_mlp")
    mlps = [m for name, m in model.named_modules() if name.endswith(names)]
    assert mlps and all((formulas.gated_mlp(m) is not None) == (kind != "gpt2") for m in mlps)
    if kind != "gpt2":
        known = formulas.gated_mlp(mlps[0])
        x = torch.randn(1, 3, known.inputs[0].in_features)
        wanted = mlps[0](x)
        fuse.install(model)
        assert torch.allclose(mlps[0](x), wanted, atol=1e-6)
        assert type(mlps[0]).__mro__[1].__name__ == "_FastGatedMlp"


def test_an_mlp_of_the_same_parts_and_another_formula_is_not_taken() -> None:
    class Scaled(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 1.01

    class Turned(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))

    config = transformers.LlamaConfig(hidden_size=32, intermediate_size=48)
    assert formulas.gated_mlp(LlamaMLP(config)) is not None
    assert formulas.gated_mlp(Scaled(config)) is None and formulas.gated_mlp(Turned(config)) is None

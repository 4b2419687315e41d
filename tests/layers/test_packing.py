"""Packed = each example alone, on ten real architectures: logits, parameter gradients, and no sight of another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from halfbyte.errors import BaseModelError
from halfbyte.layers import packed_attention, packing
from halfbyte.models import structure
from halfbyte.proofs import setting
from halfbyte.proofs.packing import prove_packing
from tests import tiny

LENGTHS = {"uneven": [5, 1, 9, 3], "equal": [6, 6, 6], "ones": [1, 1, 2]}
LAYOUT = dict.fromkeys(tiny.ARCHITECTURES, "cu_seq_lens")
# fp32: sums over 64 to 128 terms in another order, twice a layer, logits of about 1.5
FP32 = {"rtol": 1e-4, "atol": 1e-5}


def examples(lengths: Sequence[int], seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 256, (n,), generator=g) for n in lengths]


def collated(rows_: Sequence[Tensor]) -> dict[str, Any]:
    labels = torch.cat(list(rows_)).clone()
    starts = torch.tensor([0, *map(len, rows_)]).cumsum(0)
    labels[starts[:-1]] = -100
    return {
        "input_ids": torch.cat(list(rows_))[None],
        "position_ids": torch.cat([torch.arange(len(r)) for r in rows_])[None],
        "labels": labels[None],
        "cu_seq_lens_q": starts.int(),
        "cu_seq_lens_k": starts.int(),
        "max_length_q": max(map(len, rows_)),
        "max_length_k": max(map(len, rows_)),
    }


def logits_packed(model: Any, rows_: Sequence[Tensor]) -> Tensor:
    inputs = packing.forward_inputs(model, collated(rows_))
    inputs.pop("labels")
    return model(**inputs).logits[0]  # (T, V)


def logits_alone(stock: Any, rows_: Sequence[Tensor]) -> Tensor:
    return torch.cat([stock(input_ids=r[None], use_cache=False).logits[0] for r in rows_])


def loss_sum(logits: Tensor, rows_: Sequence[Tensor]) -> Tensor:
    targets = torch.cat([torch.cat([r[1:], torch.tensor([-100])]) for r in rows_])
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_packed_is_alone_with_gradients(name: str, lengths: list[int]) -> None:
    stock, model = tiny.model(name), tiny.model(name)
    assert packing.install(model) == packing.installed(model) == LAYOUT[name]
    batch = examples(lengths)
    packed, alone = logits_packed(model, batch), logits_alone(stock, batch)
    torch.testing.assert_close(packed, alone, **FP32)
    got, wanted = gradients(model, loss_sum(packed, batch)), gradients(stock, loss_sum(alone, batch))
    assert got.keys() == wanted.keys() and got
    # Of the largest gradient: some are zero but for rounding (a bias on keys moves all scores of a row alike).
    noise = 1e-5 * max(float(g.abs().max()) for g in wanted.values())
    for key, grad in got.items():
        torch.testing.assert_close(grad, wanted[key], rtol=1e-3, atol=noise, msg=key)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_changing_an_example_changes_no_other(name: str) -> None:
    model = tiny.model(name)
    packing.install(model)
    lengths = LENGTHS["uneven"]
    batch = examples(lengths)
    with torch.no_grad():
        before = logits_packed(model, batch).split(lengths)
        for changed in range(len(batch)):
            others = [(b + 7) % 256 if i == changed else b for i, b in enumerate(batch)]
            after = logits_packed(model, others).split(lengths)
            same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
            assert same == [i != changed for i in range(len(batch))]  # to the bit, and the changed one did change


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_bf16(name: str) -> None:
    stock, model = (tiny.model(name, dtype=torch.bfloat16) for _ in range(2))
    packing.install(model)
    batch = examples(LENGTHS["uneven"])
    with torch.no_grad():
        packed, alone = logits_packed(model, batch).float(), logits_alone(stock, batch).float()
    # 8 bits of mantissa, two layers: 2% of a token's logits; examples that see each other are off by 50% and more
    assert float(((packed - alone).norm(dim=-1) / alone.norm(dim=-1)).max()) < 0.02


@pytest.mark.parametrize("name", ["llama", "gemma3", "bloom", "falcon", "mpt"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    batch = examples(LENGTHS["uneven"])
    wanted, model = tiny.model(name), tiny.model(name)
    for m in (wanted, model):
        packing.install(m)
        m.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    grads = [gradients(m, loss_sum(logits_packed(m, batch), batch)) for m in (wanted, model)]
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][k], grads[1][k]) for k in grads[0])


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_the_models_own_loss_takes_the_same_inputs(name: str) -> None:
    stock, model = tiny.model(name), tiny.model(name)
    packing.install(model)
    batch = examples(LENGTHS["uneven"])
    with torch.no_grad():
        loss = model(**packing.forward_inputs(model, collated(batch))).loss
        alone = loss_sum(logits_alone(stock, batch), batch) / sum(len(b) - 1 for b in batch)
    assert loss.item() == pytest.approx(alone.item(), rel=1e-5)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_logits_of_chosen_tokens(name: str) -> None:
    """Positions count along the pack in every layout, also where the body runs on rows."""
    model = tiny.model(name)
    packing.install(model)
    inputs = packing.forward_inputs(model, collated(examples(LENGTHS["uneven"])))
    inputs.pop("labels")
    keep = torch.tensor([2, 5, 6, 17])
    with torch.no_grad():
        some, every = model(**inputs, logits_to_keep=keep).logits[0], model(**inputs).logits[0]
    torch.testing.assert_close(some, every[keep], **FP32)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_one_example_gets_plain_input(name: str) -> None:
    stock, model = tiny.model(name), tiny.model(name)
    packing.install(model)
    batch = collated(examples([7]))
    with torch.no_grad():
        assert packing.forward_inputs(model, batch).keys() == {"input_ids", "labels", "use_cache"}
        torch.testing.assert_close(logits_packed(model, examples([7])), logits_alone(stock, examples([7])), **FP32)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3", "bloom", "mpt", "falcon"])
def test_padding_and_generation_are_as_before(name: str) -> None:
    stock, model = tiny.model(name), tiny.model(name)
    packing.install(model)
    ids = examples([12])[0].reshape(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        got, wanted = (m(input_ids=ids, attention_mask=mask).logits for m in (model, stock))
        torch.testing.assert_close(got[mask.bool()], wanted[mask.bool()], **FP32)
        texts = [
            m.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False) for m in (model, stock)
        ]
    assert torch.equal(*texts)


@pytest.mark.parametrize("name", ["llama", "bloom", "falcon"])
def test_inside_peft(name: str) -> None:
    model = tiny.model(name)
    packing.install(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    batch = examples(LENGTHS["uneven"])
    assert packing.installed(wrapped) == LAYOUT[name]
    packed = logits_packed(wrapped, batch)
    torch.testing.assert_close(packed, logits_alone(tiny.model(name), batch), **FP32)  # a new adapter is the identity
    grads = gradients(wrapped, loss_sum(packed, batch))
    assert grads and all("lora_" in key for key in grads)


def test_a_cache_asked_for_does_not_let_examples_meet() -> None:
    stock, model = tiny.model("llama"), tiny.model("llama")
    packing.install(model)
    batch = examples(LENGTHS["uneven"])
    inputs = packing.forward_inputs(model, collated(batch)) | {"use_cache": True}
    torch.testing.assert_close(model(**inputs).logits[0], logits_alone(stock, batch), **FP32)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("falcon", {"alibi": True}),
        ("falcon", {"alibi": True, "new_decoder_architecture": True, "num_kv_heads": 2}),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
        ("falcon", {"multi_query": False}),
        ("bloom", {"n_head": 2}),
        ("opt", {"do_layer_norm_before": False}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("gemma3", {"layer_types": ["full_attention", "sliding_attention"]}),
    ],
)
def test_variants_are_proven(name: str, changes: dict[str, Any]) -> None:
    proof = prove_packing(tiny.model(name, changes=changes))
    assert proof.ok and proof.layout == ("rows" if changes.get("alibi") else LAYOUT[name])


@pytest.mark.parametrize("name", ["bloom", "falcon"])
def test_alibi_does_not_lose_precision_far_into_a_bf16_pack(name: str) -> None:
    changes = {"alibi": True} if name == "falcon" else None
    stock, model = (tiny.model(name, dtype=torch.bfloat16, changes=changes) for _ in range(2))
    packing.install(model)
    batch = examples([20] * 60)  # the last example starts at 1180, where a bf16 bias counts in steps of 8
    with torch.no_grad():
        packed, alone = logits_packed(model, batch).float(), logits_alone(stock, batch).float()
        truth = logits_alone(tiny.model(name, changes=changes), batch)
    off = [float(((x - truth).norm(dim=-1) / truth.norm(dim=-1)).max()) for x in (packed, alone)]
    assert off[0] < 1.5 * off[1] < 0.05  # stock attention rounds its biases, too


@pytest.mark.parametrize("name", ["bloom", "mpt", "falcon"])
def test_layers_that_a_proof_did_not_meet_pack_too(name: str) -> None:
    count = {"bloom": "n_layer", "mpt": "n_layers", "falcon": "num_hidden_layers"}[name]
    stock, model = (tiny.model(name, changes={count: 4}) for _ in range(2))
    with structure.shallow(model):
        assert prove_packing(model).layout == "cu_seq_lens"
    batch = examples(LENGTHS["uneven"])
    torch.testing.assert_close(logits_packed(model, batch), logits_alone(stock, batch), **FP32)


def test_mpt_packs_longer_than_its_position_table() -> None:
    stock, model = tiny.model("mpt"), tiny.model("mpt")
    packing.install(model)
    batch = examples([100, 90, 100])
    assert sum(map(len, batch)) > tiny.POSITIONS
    with torch.no_grad():
        torch.testing.assert_close(logits_packed(model, batch), logits_alone(stock, batch), **FP32)


class TestProof:
    @pytest.mark.parametrize("name", tiny.ARCHITECTURES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_ten_architectures(self, name: str, dtype: torch.dtype) -> None:
        model = tiny.model(name, dtype=dtype)
        proof = prove_packing(model)
        assert (proof.ok, proof.mode, proof.layout) == (True, "packed", LAYOUT[name])
        assert packing.installed(model) == LAYOUT[name]
        assert proof.difference < (1e-4 if dtype == torch.float32 else 0.02)

    def test_leaves_modes_randomness_and_weights_alone(self) -> None:
        model = tiny.model("llama").train()
        model.model.layers[0].eval()
        modes = [m.training for m in model.modules()]
        weights = {k: v.clone() for k, v in model.state_dict().items()}
        torch.manual_seed(3)
        state = torch.random.get_rng_state()
        prove_packing(model)
        assert [m.training for m in model.modules()] == modes
        assert torch.equal(torch.random.get_rng_state(), state)
        assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in model.parameters())

    def test_a_state_that_runs_through_examples_is_caught(self) -> None:
        """RWKV has neither positions nor a mask: nothing can tell it where an example ends."""
        config = transformers.RwkvConfig(
            vocab_size=128, hidden_size=64, num_hidden_layers=2, attention_hidden_size=64, intermediate_size=128
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = transformers.RwkvForCausalLM(config).eval()
        proof = prove_packing(model)
        assert (proof.ok, proof.mode, proof.layout) == (False, "single", "single")
        assert "logits differ" in proof.reason
        with pytest.raises(BaseModelError, match="not set up for 2 examples"):
            packing.forward_inputs(model, collated(examples([3, 4])))
        assert packing.forward_inputs(model, collated(examples([3]))).keys() == {"input_ids", "labels", "use_cache"}

    def test_a_hybrid_falls_back_to_rows(self) -> None:
        """Lightning attention next to softmax attention: our attention alone would let half the layers leak."""
        size = {**tiny._LLAMA_LIKE, "head_dim": 16, "num_local_experts": 2, "vocab_size": 256, "block_size": 8}
        config = transformers.MiniMaxConfig(**size, layer_types=["linear_attention", "full_attention"])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = transformers.MiniMaxForCausalLM(config).eval()
        proof = prove_packing(model)
        assert proof.layout == "rows" and "cu_seq_lens: logits differ" in proof.reason
        assert model.config._attn_implementation == "sdpa"

    def test_a_leak_that_the_first_comparison_misses_shows_when_an_example_changes(self) -> None:
        model = tiny.model("llama")
        usual = int(setting.random_examples(model, setting.SHORT)[0][0])

        def leak(_module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            if kwargs["input_ids"].shape[1] == 15 and int(kwargs["input_ids"][0, 0]) != usual:
                output.logits = output.logits + 0.01  # every token hears that the first one is another
            return output

        model.register_forward_hook(leak, with_kwargs=True)
        proof = prove_packing(model)
        assert proof.mode == "single" and "changing example 0 moves example" in proof.reason

    def test_a_model_that_raises_runs_single_with_the_reason(self) -> None:
        model = tiny.model("llama")
        model.model.layers[0].self_attn.register_forward_pre_hook(_refuse_packs, with_kwargs=True)
        model.model.register_forward_pre_hook(_refuse_packs, with_kwargs=True)
        model.set_attn_implementation("eager")
        proof = prove_packing(model)
        assert proof.mode == "single" and "ValueError: no packs here" in proof.reason
        assert model.config._attn_implementation == "eager"  # as the user had it
        assert packing.PaddedRows.attached(model.model) is None

    def test_bitsandbytes_inside_peft(self, tmp_path: Any) -> None:
        quant = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        folder = tiny.save(tmp_path, "llama")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=quant, device_map="cpu")
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        proof = prove_packing(wrapped)
        assert proof.ok and proof.layout == packing.installed(model) == "cu_seq_lens"


def _refuse_packs(module: Any, args: Any, kwargs: Any) -> None:
    mask = kwargs.get("attention_mask")
    if mask is not None and (mask.numel() == 0 or (mask.dim() == 2 and int(mask.max()) > 0)):
        raise ValueError("no packs here")


class TestInstall:
    def test_again_and_to_another_layout_and_back(self) -> None:
        model = tiny.model("llama")
        batch = examples(LENGTHS["uneven"])
        alone = logits_alone(model, batch)
        for layout in ("cu_seq_lens", "cu_seq_lens", "rows", "rows", "single", "rows", "cu_seq_lens"):
            packing.install(model, layout)
            assert packing.installed(model) == layout
            if layout != "single":
                torch.testing.assert_close(logits_packed(model, batch), alone, **FP32)
        packing.install(model, "single")
        assert model.config._attn_implementation == "sdpa" and not model.model._forward_pre_hooks

    def test_register_twice(self) -> None:
        packed_attention.register()
        packed_attention.register()
        assert transformers.AttentionInterface()[packed_attention.NAME] is packed_attention.attention

    def test_a_call_after_a_failed_one_starts_clean(self) -> None:
        model = tiny.model("bloom")
        packing.install(model)
        batch = examples([3, 4])
        broken = packing.forward_inputs(model, collated(batch)) | {"input_ids": torch.full((1, 7), 10_000)}
        with pytest.raises(IndexError):
            model(**broken)
        ids = batch[1][None]
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=ids).logits, tiny.model("bloom")(input_ids=ids).logits, **FP32)

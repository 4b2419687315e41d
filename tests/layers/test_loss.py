"""Cross-entropy from hidden states against whole logits in fp64: scales, caps, smoothing, chunks, odd sizes."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers
from torch.nn import functional as F

from halfbyte.data.collate import collate
from halfbyte.data.encoding.examples import Example
from halfbyte.layers import loss, packing
from halfbyte.layers.kernels import last_layer
from halfbyte.layers.loss import Head, head_loss, head_of
from halfbyte.proofs.packing import prove_packing
from tests import small_models, tiny


def whole(hidden: torch.Tensor, targets: torch.Tensor, head: Head, smoothing: float) -> torch.Tensor:
    logits = F.linear(hidden, head.weight.double(), None if head.bias is None else head.bias.double()) * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trains"])
@pytest.mark.parametrize("chunk", [1, 10**9], ids=["chunks", "whole"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize(("scale", "softcap", "bias"), [(1.0, None, False), (0.25, None, True), (3.0, 5.0, True)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("k", "d", "v"), [(123, 16, 77), (1, 5, 320)])
def test_head_loss(
    k: int, d: int, v: int, dtype: torch.dtype, tolerance: float, scale: float, softcap: float | None, bias: bool,
    smoothing: float, chunk: int, trains: bool, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(loss, "CHUNK", chunk)
    monkeypatch.setattr(loss, "CHUNK32", chunk)
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(k, d, generator=draw).to(dtype).requires_grad_()
    # what trains is an fp32 master, whose numbers are in the dtype of the hidden states while they are computed with
    masters = torch.promote_types(dtype, torch.float32) if trains else dtype
    weight = (torch.randn(v, d, generator=draw) * 0.7).to(dtype).to(masters).requires_grad_(trains)
    added = torch.randn(v, generator=draw).to(dtype).to(masters).requires_grad_(trains) if bias else None
    head = Head(weight, added, scale, softcap, dtype)
    targets = torch.randint(v, (k,), generator=draw)
    got = head_loss(hidden, targets, head, smoothing=smoothing)
    (got * 0.5).backward()
    wide = hidden.detach().double().requires_grad_()
    gradients = [t.grad.clone() if trains and t is not None else None for t in (weight, added)]
    weight.grad = None
    if added is not None:
        added.grad = None
    wanted = whole(wide, targets, head, smoothing)
    (wanted * 0.5).backward()
    for made, tensor in zip(gradients, (weight, added), strict=True):
        if made is not None:
            assert made.dtype == masters
            assert float((made.double() - tensor.grad.double()).norm()) <= tolerance * float(tensor.grad.norm())
    assert got.dtype == torch.float32
    assert float((got.double() - wanted).abs()) <= tolerance * float(wanted.abs())
    assert hidden.grad is not None and wide.grad is not None
    assert float((hidden.grad.double() - wide.grad).norm()) <= tolerance * float(wide.grad.norm())


@pytest.mark.parametrize("chunk", [1, 10**9], ids=["chunks", "whole"])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (3.0, 5.0)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_head_of_which_some_rows_train(
    dtype: torch.dtype, tolerance: float, scale: float, softcap: float | None, chunk: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr(loss, "CHUNK", chunk)
    monkeypatch.setattr(loss, "CHUNK32", chunk)
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 16, generator=draw).to(dtype).requires_grad_()
    weight = (torch.randn(77, 16, generator=draw) * 0.7).to(dtype)
    rows = torch.tensor([70, 3, 12])
    values = (torch.randn(3, 16, generator=draw) * 0.7).to(dtype)
    values = values.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    targets = torch.randint(77, (37,), generator=draw)
    targets[:3] = rows
    got = head_loss(hidden, targets, Head(weight, None, scale, softcap, dtype, rows, values))
    (got * 0.5).backward()
    wide, own = hidden.detach().double().requires_grad_(), values.detach().double().requires_grad_()
    used = weight.double().clone()
    used[rows] = own
    wanted = whole(wide, targets, Head(used, None, scale, softcap), 0.0)
    (wanted * 0.5).backward()
    assert float((got.double() - wanted).abs()) <= tolerance * float(wanted.abs())
    for made, true in ((hidden.grad, wide.grad), (values.grad, own.grad)):
        assert made is not None and true is not None
        assert float((made.double() - true).norm()) <= tolerance * float(true.norm())


def test_without_gradients_a_head_that_trains_makes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd tells a function that a parameter needs a gradient, though none is recorded: one in fp32 as large as the
    head for each text, in each evaluation of a model whose head is not frozen."""
    gradients: list[bool] = []
    part = loss._part
    monkeypatch.setattr(
        loss, "_part", lambda *a, gradient, **k: gradients.append(gradient) or part(*a, gradient=gradient, **k)
    )
    weight, hidden = torch.randn(50, 8).requires_grad_(), torch.randn(9, 8)
    targets = torch.arange(9)
    with torch.no_grad():
        without = head_loss(hidden, targets, Head(weight, None))
    assert gradients == [False] and float(without) == float(head_loss(hidden, targets, Head(weight, None)))


def test_no_gradient_is_made_where_none_is_wanted() -> None:
    hidden = torch.randn(4, 8)
    head = Head(torch.randn(9, 8), None)
    targets = torch.tensor([0, 1, 2, 8])
    got = head_loss(hidden, targets, head)
    assert not got.requires_grad
    torch.testing.assert_close(got, F.cross_entropy(hidden @ head.weight.T, targets, reduction="sum"))


@pytest.mark.parametrize("bias", [False, True])
def test_a_head_of_more_rows_than_are_multiplied_at_once(bias: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    width = 2 * loss.HEAD_ROWS + 3
    hidden = torch.randn(21, 8, generator=draw).requires_grad_()
    head = Head(torch.randn(width, 8, generator=draw), torch.randn(width, generator=draw) if bias else None)
    targets = torch.randint(width, (21,), generator=draw)
    targets[:3] = torch.tensor([width - 1, loss.HEAD_ROWS, loss.HEAD_ROWS - 1])
    got = head_loss(hidden, targets, head)
    got.backward()
    wide = hidden.detach().double().requires_grad_()
    wanted = whole(wide, targets, head, 0.0)
    wanted.backward()
    assert float((got.double() - wanted).abs()) <= 1e-5 * float(wanted.detach())
    assert hidden.grad is not None and wide.grad is not None
    assert float((hidden.grad.double() - wide.grad).norm()) <= 1e-5 * float(wide.grad.norm())


def test_logits_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    real = loss._logits

    def spy(x: Any, weight: Any, bias: Any) -> Any:
        rows.append(x.shape[0])
        return real(x, weight, bias)

    monkeypatch.setattr(loss, "CHUNK32", 32 * 1000)
    monkeypatch.setattr(loss, "_logits", spy)
    head_loss(
        torch.randn(100, 8, requires_grad=True), torch.zeros(100, dtype=torch.long), Head(torch.randn(1000, 8), None)
    )
    assert rows == [32, 32, 32, 16], "the last one is filled up"


def example(ids: tuple[int, ...], labels: tuple[int, ...]) -> Example:
    return Example(ids, labels, "a row", prompt_ids=ids[:1], completion="")


SCALED: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": ("Gemma2Config", {"final_logit_softcapping": 7.0, "head_dim": 16, "query_pre_attn_scalar": 16}),
    "cohere": ("CohereConfig", {"logit_scale": 0.25}),
    "granite": ("GraniteConfig", {"logits_scaling": 6.0}),
}


@pytest.mark.parametrize("name", [*SCALED, "llama", "opt", "gpt2"])
def test_a_micro_batch_is_the_models_own_loss(name: str) -> None:
    if name in SCALED:
        cls, values = SCALED[name]
        config = getattr(transformers, cls)(**{**tiny._LLAMA_LIKE, "vocab_size": 256, "pad_token_id": 0, **values})
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    else:
        model = tiny.model(name)
    model.requires_grad_(False)  # a head that trains is left to the model
    prove_packing(model)
    examples = [
        example(tuple(range(3, 9)), (-100, -100, 5, 6, 7, 8)),
        example((9, 4, 30), (-100, -100, 30)),  # all masked but one
        example((8,), (-100,)),  # a sequence of one token
        example((7, 200), (-100, 200)),
    ]
    batch = collate(examples)
    assert head_of(model) is not None
    fused = loss.micro_batch_loss(model, batch)
    own = sum(
        F.cross_entropy(model(torch.tensor([e.input_ids])).logits[0, :-1], torch.tensor(e.labels[1:]), reduction="sum")
        for e in examples
        if any(label >= 0 for label in e.labels[1:])
    )
    torch.testing.assert_close(fused, own, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss.micro_batch_loss(model, batch, fused=False), own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2", "opt", "phi3"])
@pytest.mark.parametrize("lengths", [(5, 1, 9), (1,), (15, 17)], ids=str)
def test_rows_behind_the_others_change_no_loss_and_no_gradient(
    name: str, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model(name)
    model.requires_grad_(False)
    prove_packing(model)
    assert packing.installed(model) == "cu_seq_lens"
    embedding = model.get_input_embeddings()
    draw = torch.Generator().manual_seed(1)
    ids = [tuple(torch.randint(3, 200, (n,), generator=draw).tolist()) for n in lengths]
    batch = collate([example(row, row) for row in ids])
    trained = next(p for name_, p in model.named_parameters() if p.dim() == 2 and p is not embedding.weight)
    trained.requires_grad_(True)

    def of() -> tuple[torch.Tensor, torch.Tensor]:
        value = loss.micro_batch_loss(model, batch)
        if not value.requires_grad or not len(batch["keep"]):
            return value.detach(), torch.zeros(())
        return value.detach(), torch.autograd.grad(value, trained)[0]

    plain = of()
    monkeypatch.setattr(packing, "ALIGNED_FROM", 1)
    seen: list[int] = []
    hook = embedding.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1]))
    aligned = of()
    hook.remove()
    assert seen == [packing.up_to(sum(lengths))]
    torch.testing.assert_close(aligned, plain, rtol=1e-5, atol=1e-6)


def test_a_small_micro_batch_gets_no_rows() -> None:
    batch = collate([example((5, 6, 7), (5, 6, 7))])
    assert packing.aligned(batch)["input_ids"].shape == (1, 3)


def test_rows_are_added_to_a_batch_that_knows_only_where_its_examples_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a padded batch comes from a script of the user's (`unpad.py`)."""
    monkeypatch.setattr(packing, "ALIGNED_FROM", 1)
    batch = collate([example((5, 6, 7), (5, 6, 7)), example((8, 9), (8, 9))])
    known = {name: batch[name] for name in ("input_ids", "position_ids", "cu_seq_lens_q", "keep", "targets")}
    aligned = packing.aligned(known)
    assert aligned["input_ids"].shape == aligned["position_ids"].shape == (1, 16)
    assert aligned["cu_seq_lens_q"].tolist() == [0, 3, 5, 16]


@pytest.mark.parametrize("count", [4, 6], ids=["alone", "and zeros"])
def test_the_gradient_of_chosen_rows_is_that_of_index_select(count: int) -> None:
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([0, 2, 3, 6])
    assert torch.autograd.gradcheck(lambda t: last_layer.SelectRows.apply(t, rows, count), (x,))
    empty = torch.tensor([], dtype=torch.long)
    assert torch.autograd.grad(last_layer.SelectRows.apply(x, empty, 3).sum(), x)[0].abs().sum() == 0


def test_a_head_that_is_not_plain_is_left_to_the_model() -> None:
    model = tiny.model("llama")
    model.lm_head.weight.requires_grad_(False)
    assert head_of(model) is not None
    with_lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    assert head_of(with_lora) is None
    other = tiny.model("llama").requires_grad_(False)
    own = other.forward
    other.forward = lambda *args, **kwargs: _doubled(own(*args, **kwargs))
    assert head_of(other) is None  # its logits are seen not to be the head's


def _doubled(output: Any) -> Any:
    output.logits = output.logits * 2
    return output


@pytest.mark.parametrize("kind", ["recurrent_gemma", "xlstm", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cap_of_the_logits_is_seen_whatever_its_name(kind: str, dtype: torch.dtype, monkeypatch: Any) -> None:
    """Small logits under a cap of 30 look like logits without one: half a percent, less than bf16 can say."""
    assert loss.head_of(small_models.build(kind).to(dtype).requires_grad_(False)).softcap == 30.0
    monkeypatch.setattr(loss, "_CAPS", ())
    assert loss.head_of(small_models.build(kind).to(dtype).requires_grad_(False)) is None


def test_the_loss_does_not_depend_on_where_in_memory_the_counts_lie() -> None:
    """A dot product of BLAS adds in an order that depends on it."""
    model, count = tiny.model("llama"), 97
    head = loss.head_of(model)
    assert head is not None
    hidden, targets = torch.randn(count, tiny.HIDDEN), torch.randint(0, 256, (count,))
    memory, seen = torch.ones(count + 16), set()
    for offset in range(16):
        counts = memory[offset : offset + count]
        seen.add(float(loss.head_loss(hidden, targets, head, counts=counts)))
    assert len(seen) == 1

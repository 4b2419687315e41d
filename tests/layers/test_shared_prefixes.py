"""Rows that share their beginnings learn what each learns alone: against plain PEFT and transformers, row by row.

The reference has no code of ours. Rows branch at four depths; one is another's beginning, two are equal, one differs in
its last token alone; labels lie in what is shared, of some rows.
"""

from __future__ import annotations

import copy
import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import halfbyte
from halfbyte.adapters import targets, unpad
from halfbyte.data import collate
from halfbyte.data.encoding.examples import IGNORED, Example
from halfbyte.layers import attention, loss
from halfbyte.layers.kernels.cpu import whole_attention
from halfbyte.proofs.fusing import prove_fused
from halfbyte.proofs.packing import prove_packing
from halfbyte.training import pace
from tests import plain_peft, small_models

# fp32, about 60 tokens through two layers: other orders of the same sums
TOLERANCE = 1e-6


def rows(seed: int = 0, vocabulary: int = small_models.VOCAB) -> list[Example]:
    draw = random.Random(seed)

    def more(n: int) -> list[int]:
        return [draw.randrange(3, vocabulary) for _ in range(n)]

    root = more(40)
    branch = [*root[:30], *more(9)]
    long = [*root, *more(12)]
    texts = [
        [*root[:20], *more(5)], branch, [*branch[:34], *more(3)], root, long, long, [*long[:-1], *more(1)], more(25),
        [*long[:46], *more(2)],
    ]  # fmt: skip
    examples = []
    for number, text in enumerate(texts):
        first = 1 if number % 2 else len(text) // 2  # some rows label all, others their second half
        examples.append(Example(tuple(text), (*[IGNORED] * first, *text[first:]), "", (), ""))
    return examples


def learn_alone(model: Any, examples: list[Example]) -> tuple[float, dict[str, Tensor]]:
    total = 0.0
    for example in examples:
        logits = model(input_ids=torch.tensor([example.input_ids]), use_cache=False).logits[0]
        summed = F.cross_entropy(logits[:-1], torch.tensor(example.labels[1:]), reduction="sum")
        summed.backward()
        total += summed.item()
    return total, plain_peft.gradients(model)


CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("llama", {}, "none"),
    "GQA 1": ("llama", {"num_key_value_heads": 4}, "none"),
    "GQA 3": ("llama", {"hidden_size": 96, "num_attention_heads": 6}, "none"),
    "GQA 8": ("llama", {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 8}, "none"),
    "selective": ("llama", {}, "selective"),
    "recomputed": ("llama", {}, "full"),
    "windows": ("mistral", {}, "none"),
    "windows, recomputed": ("gemma3_text", {}, "full"),
    "softcaps": ("gemma2", {}, "none"),
    "norms of heads": ("qwen3", {}, "none"),
    "learned positions": ("gpt2", {}, "none"),
    "sinks and experts": ("gpt_oss", {}, "none"),
    "experts": ("mixtral", {}, "none"),
    "latent attention": ("deepseek_v3", {}, "none"),
    "ALiBi": ("bloom", {}, "none"),
    "ALiBi, recomputed": ("mpt", {}, "full"),
    "attention of its own": ("falcon", {}, "none"),
}


@pytest.mark.parametrize("case", CASES)
def test_rows_that_begin_alike_learn_as_each_alone(case: str) -> None:
    kind, changes, recompute = CASES[case]
    model, examples = small_models.build(kind, **changes), rows()
    names = targets.matched(model, targets.auto_targets(model))
    plain = plain_peft.adapt(copy.deepcopy(model), names)
    plain.get_base_model().set_experts_implementation("eager")  # others have no fp64
    alone = learn_alone(plain, examples)
    wanted = learn_alone(plain.double(), examples)
    allowed = max(TOLERANCE, 2 * plain_peft.apart(alone[1], wanted[1]))  # what plain fp32 itself is off
    got = plain_peft.adapt(model, names)
    longest = max(len(e.labels) for e in examples)
    assert prove_packing(got, longest).layout == "cu_seq_lens" and prove_fused(got, packed=True, longest=longest).ok
    pace.recompute_as(got, recompute)  # type: ignore[arg-type]
    batch = collate.collate_tree(examples)
    assert int(batch["levels"].max()) == 5 and batch["input_ids"].numel() < 0.6 * sum(len(e.labels) for e in examples)
    summed = loss.micro_batch_loss(got, batch)
    summed.backward()
    off = abs(summed.item() - wanted[0]) / wanted[0], plain_peft.apart(plain_peft.gradients(got), wanted[1])
    print(f"{case}: loss {off[0]:.1e}, gradients {off[1]:.1e}, plain fp32 {plain_peft.apart(alone[1], wanted[1]):.1e}")
    assert max(off) <= allowed, (off, allowed)
    each = torch.tensor(loss.text_losses(got.eval(), batch))
    by_row = torch.tensor([loss.text_losses(got, collate.collate([e]))[0] for e in examples])
    assert torch.allclose(each, by_row, rtol=1e-5)


LEVELS = {
    "one family": ([50, 10, 1, 130, 4, 7, 3, 60], [0, 1, 1, 1, 2, 3, 3, 2]),
    "families and rows": ([5, 20, 100, 1, 2, 9, 200, 30, 16], [0, 0, 1, 1, 1, 2, 0, 1, 0]),
    # cut into pieces: six of the first family, two of the second, the last row alone
    "large families": (
        [10, 70, 41, 20, 30, 3, 150, 5, 36, 99, 6, 50, 40, 1, 7],
        [0, 1, 1, 1, 2, 2, 1, 1, 1, 1, 0, 1, 1, 0, 0],
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (8, 1), (2, 2)])
@pytest.mark.parametrize("case", LEVELS)
def test_attention_to_a_path(case: str, heads: tuple[int, int], dtype: torch.dtype) -> None:
    (lengths, levels), d = LEVELS[case], 32
    inner = [after > level for level, after in zip(levels, [*levels[1:], 0], strict=True)]
    lengths = [n + n % 2 if above else n for n, above in zip(lengths, inner, strict=True)]
    tokens, draw = sum(lengths), torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(tokens, n, d, generator=draw).to(dtype) for n in (heads[0], *heads[1:] * 2, heads[0]))
    if not whole_attention(q):
        pytest.skip("attention is no kernel here")
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    starts, path, sees = torch.tensor([0, *lengths]).cumsum(0).tolist(), list[Tensor](), torch.zeros(tokens, tokens)
    for (a, b), level in zip(pairwise(starts), levels, strict=True):
        path[level:] = [torch.arange(a, b)]
        for part in path[:-1]:
            sees[a:b, part] = 1
        sees[a:b, a:b] = torch.ones(b - a, b - a).tril()
    groups = heads[0] // heads[1]
    keys, values = (x.repeat_interleave(groups, 1).transpose(0, 1) for x in exact[1:])
    scores = (exact[0].transpose(0, 1) @ keys.mT * d**-0.5).masked_fill(sees == 0, -torch.inf)
    wanted = (scores.softmax(-1) @ values).transpose(0, 1)
    wanted.backward(grad.double())
    wanted = wanted.detach()
    ours = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attention.attention(*ours, tuple(lengths), d**-0.5, None, None, tuple(levels))
    out.backward(grad)
    out = out.detach()
    allowed = 2e-6 if dtype == torch.float32 else 2e-2  # rounded once or twice more than the reference
    for got, right in ((out, wanted), *((x.grad, y.grad) for x, y in zip(ours, exact, strict=True))):
        assert got is not None and right is not None
        assert float((got.double() - right).norm() / right.norm()) <= allowed
    again = [x.clone().requires_grad_() for x in (q, k, v)]
    attention.attention(*again, tuple(lengths), d**-0.5, None, None, tuple(levels)).backward(grad)
    assert all(torch.equal(x.grad, y.grad) for x, y in zip(ours, again, strict=True))


def test_a_padded_batch_of_a_script_shares_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples = small_models.build("llama"), rows()
    names = targets.matched(model, targets.auto_targets(model))
    wanted = learn_alone(plain_peft.adapt(copy.deepcopy(model), names), examples)
    script = plain_peft.adapt(model, names, halfbyte.get_peft_model)
    ids, labels = ([torch.tensor(getattr(e, name)) for e in examples] for name in ("input_ids", "labels"))
    mask = [torch.ones_like(row) for row in ids]
    pad = torch.nn.utils.rnn.pad_sequence
    given = {"input_ids": pad(ids, True), "attention_mask": pad(mask, True), "labels": pad(labels, True, -100)}
    trees: list[int] = []
    real = unpad.collate_tree
    monkeypatch.setattr(unpad, "collate_tree", lambda some: trees.append(len(some)) or real(some))
    items = int((given["labels"] != IGNORED).sum())
    summed = script(**given, num_items_in_batch=items).loss * items
    summed.backward()
    assert trees == [len(examples)]
    assert abs(summed.item() - wanted[0]) / wanted[0] < 1e-5
    assert plain_peft.apart(plain_peft.gradients(script), wanted[1]) < 1e-5

"""Every causal LM of transformers that can be built small learns here what plain PEFT makes it learn.

Windows and chunks are 8 tokens, rows have 5 to 40; loss and LoRA gradients in fp32, through the path of `train` (packed
micro-batches, fused layers) and through the drop-in (padded batches). The reference has no code of ours
(`plain_peft.py`). What cannot be built is listed with its reason in the output (`pytest -rA` or `-s`).
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from typing import Any

import pytest
import torch

import halfbyte
from halfbyte.adapters import targets, unpad
from halfbyte.layers import loss
from halfbyte.models import structure
from halfbyte.proofs.fusing import prove_fused
from halfbyte.proofs.packing import prove_packing
from tests import plain_peft, small_models, tiny

LENGTHS = (5, 40, 1, 23, 9)
TOLERANCE = 1e-4  # fp32: other orders of the same sums give 1e-6, a lost window 0.1 and more
MOST_PARAMETERS = 5_000_000
FEW = ("llama", "mistral", "mixtral", "phi3", "qwen2", "gemma2", "gemma3_text", "starcoder2", "cohere2", "llama4_text",
       "gpt_oss", "granite", "bloom", "falcon", "mamba", "deepseek_v3")  # fmt: skip


class NotBuilt(Exception):
    """A type that is not looked at, and why."""


def built(kind: str) -> tuple[Any, list[str]]:
    """A small model and the names of the layers that get adapters."""
    try:
        model = small_models.build(kind)
    except Exception as error:
        raise NotBuilt(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
    if sum(p.numel() for p in model.parameters()) > MOST_PARAMETERS:
        raise NotBuilt("its config does not make it small")
    names = targets.matched(model, targets.auto_targets(model))
    try:
        plain_peft.learn(plain_peft.adapt(copy.deepcopy(model), names), plain_peft.texts((5,), small_models.VOCAB))
    except Exception as error:
        raise NotBuilt(f"plain PEFT: {type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
    return model, names


def padded(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    real = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    return {"input_ids": ids, "attention_mask": real.long(), "labels": ids.where(real, -100)}


def learn_padded(model: Any, given: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    """As a script does it: a padded batch, the sum over labelled tokens."""
    logits = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"], use_cache=False).logits
    wanted = given["labels"][:, 1:].flatten()
    summed = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), wanted, reduction="sum")
    summed.backward()
    return summed.item(), plain_peft.gradients(model)


def as_train(model: Any, rows: list[torch.Tensor]) -> tuple[float, dict[str, torch.Tensor], str]:
    with structure.shallow(model):
        proof = prove_packing(model, max(LENGTHS))
        prove_fused(model, packed=proof.ok, longest=max(LENGTHS))
    total = 0.0
    for some in [rows[:3], rows[3:]] if proof.ok else [[row] for row in rows if len(row) > 1]:
        summed = loss.micro_batch_loss(model, tiny.batch_of(some))
        summed.backward()
        total += summed.item()
    return total, plain_peft.gradients(model), proof.layout


def differs(name: str, got: tuple[Any, ...], wanted: tuple[Any, ...]) -> list[str]:
    apart = plain_peft.apart(got[1], wanted[1])
    off = abs(got[0] - wanted[0]) / wanted[0]
    return [] if apart <= TOLERANCE and off <= TOLERANCE else [f"{name}: gradients {apart:.1e}, loss {off:.1e}"]


def compare(kind: str) -> tuple[str, list[str]]:
    """(the layout of `train`, what differs from plain PEFT)."""
    model, names = built(kind)
    rows = plain_peft.texts(LENGTHS, small_models.VOCAB)
    alone = plain_peft.learn(plain_peft.adapt(copy.deepcopy(model), names), rows)
    got = as_train(plain_peft.adapt(copy.deepcopy(model), names), rows)
    wrong = differs("train", got, alone)
    try:
        wanted = learn_padded(plain_peft.adapt(copy.deepcopy(model), names), padded(rows))
    except Exception:  # a type that takes no padded batch
        return got[2], wrong
    dropin = plain_peft.adapt(copy.deepcopy(model), names, halfbyte.get_peft_model)
    wrong += differs("drop-in", learn_padded(dropin, padded(rows)), wanted)
    if unpad.packs(dropin):
        wrong += differs("drop-in, Trainer's loss", learn_by_loss(dropin, padded(rows)), alone)
    return got[2], wrong


def learn_by_loss(model: Any, given: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    items = sum(LENGTHS) - len(LENGTHS)
    summed = model(**given, num_items_in_batch=items).loss * items
    summed.backward()
    return summed.item(), plain_peft.gradients(model)


@pytest.mark.parametrize("kind", FEW)
def test_some_architectures_learn_what_plain_peft_learns(kind: str) -> None:
    assert compare(kind)[1] == []


@pytest.mark.parametrize("scaling", ["longrope", "dynamic"])
def test_a_row_has_the_rotary_frequencies_of_its_own_length(scaling: str) -> None:
    """Beside a row of 40 tokens in a pack, those of up to 16 would have its frequencies."""
    rope = {"rope_type": scaling, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    factors = {"short_factor": [1 + 0.1 * i for i in range(8)], "long_factor": [2 + 0.3 * i for i in range(8)]}
    changes = {"rope_parameters": rope | (factors if scaling == "longrope" else {}), "max_position_embeddings": 16}
    rows = plain_peft.texts((5, 40, 9, 23), small_models.VOCAB)  # transformers' dynamic ones are reset by a short text
    model = small_models.build("llama", **changes)
    wanted = plain_peft.learn(plain_peft.adapt(copy.deepcopy(model), ["q_proj", "down_proj"]), rows)
    got = as_train(plain_peft.adapt(model, ["q_proj", "down_proj"]), rows)
    assert differs("train", got, wanted) == [] and got[2] == "single"
    short = small_models.build("llama", **changes)
    assert prove_packing(short, 16).layout == "cu_seq_lens"


@pytest.mark.slow
def test_every_architecture_learns_what_plain_peft_learns(capsys: pytest.CaptureFixture[str]) -> None:
    layouts: Counter[str] = Counter()
    not_built, wrong = {}, {}
    for kind in small_models.TYPES:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                layout, problems = compare(kind)
        except NotBuilt as error:
            not_built[kind] = str(error)
            continue
        layouts[layout] += 1
        if problems:
            wrong[kind] = problems
    with capsys.disabled():
        print(f"\n{sum(layouts.values())} architectures: {dict(layouts)}; {len(not_built)} not built:")
        print("\n".join(f"  {kind}: {reason}" for kind, reason in not_built.items()))
    assert wrong == {}
    assert sum(layouts.values()) >= 165

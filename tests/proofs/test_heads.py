"""Each fault that a head can have is put into ours, and the proof at start must see it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from halfbyte.data import collate
from halfbyte.errors import BaseModelError
from halfbyte.layers import heads, loss, packing
from halfbyte.proofs.heads import prove_pooling
from halfbyte.proofs.packing import prove_packing
from tests import encoders, tiny

Patch = pytest.MonkeyPatch


def build(name: str, kind: str) -> Any:
    """A model with a head, as a run opens it: of an encoder transformers' class for texts, of others the causal LM."""
    model = tiny.model(name) if name == "llama" else encoders.classifier(name)
    heads.attach(model, 3, kind, seed=0, names=[n for n, _ in model.named_parameters() if "pooler" in n])
    prove_packing(model)
    return model


def a_neighbours_token(patch: Patch) -> None:
    real = loss.labelled_hidden
    moved = lambda m, b: real(m, {**b, "keep": (b["keep"] + 1) % b["input_ids"].shape[1]})  # noqa: E731
    patch.setattr(loss, "labelled_hidden", moved)


def no_types(patch: Patch) -> None:
    real = packing.forward_inputs
    without = lambda m, b: {n: x for n, x in real(m, b).items() if n != "token_type_ids"}  # noqa: E731
    patch.setattr(packing, "forward_inputs", without)


def types_a_token_early(patch: Patch) -> None:
    real = collate.collate_texts

    def early(examples: Any) -> Any:
        batch = real(examples)
        return {**batch, "token_types": batch["token_types"].roll(-1, 1)} if "token_types" in batch else batch

    patch.setattr(collate, "collate_texts", early)


def types_of_the_first_text(patch: Patch) -> None:
    real = collate.collate_texts

    def other(examples: Any) -> Any:
        batch = real(examples)
        return {**batch, "token_types": 1 - batch["token_types"]} if "token_types" in batch else batch

    patch.setattr(collate, "collate_texts", other)


def the_last_part_alone(patch: Patch) -> None:
    """What stands between body and last layer is left out where scores are read, and nowhere else."""
    real = heads.read

    def alone(model: Any, hidden: Any, rows: Any) -> Any:
        last = [part for part in heads.parts(model) if any(True for _ in part.parameters())][-1]
        return last(hidden[:, None]).flatten(1) if hidden.shape[-1] == last_width(last) else real(model, hidden, rows)

    patch.setattr(heads, "read", alone)


def last_width(part: torch.nn.Module) -> int:
    return int(next(p for p in part.parameters() if p.dim() == 2).shape[1])


def scores_of_others(patch: Patch) -> None:
    real = heads.read
    patch.setattr(heads, "read", lambda model, hidden, rows: real(model, hidden.roll(1, 0), rows))


FAULTS: dict[str, tuple[str, str, Callable[[Patch], None]]] = {
    "a tag of the neighbour": ("llama", heads.TOKENS, a_neighbours_token),
    "a tag of the neighbour, to both sides": ("bert", heads.TOKENS, a_neighbours_token),
    "no types of tokens": ("bert", heads.TEXTS, no_types),
    "no types of tokens, tags": ("bert", heads.TOKENS, no_types),
    "types a token early": ("bert", heads.TEXTS, types_a_token_early),
    "the other types": ("bert", heads.TEXTS, types_of_the_first_text),
    "a head without its pooler": ("bert", heads.TEXTS, the_last_part_alone),
    "scores of other texts": ("roberta", heads.TEXTS, scores_of_others),
    "tags of other tokens": ("llama", heads.TOKENS, scores_of_others),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_a_head_is_seen(fault: str, monkeypatch: Patch) -> None:
    name, kind, put_in = FAULTS[fault]
    model = build(name, kind)
    assert "as alone to" in prove_pooling(model, packed=True)
    put_in(monkeypatch)
    with pytest.raises(BaseModelError, match="off by"):
        prove_pooling(model, packed=True)


@pytest.mark.parametrize("kind", [heads.TEXTS, heads.TOKENS])
@pytest.mark.parametrize("name", ["llama", *encoders.NAMES[:5]])
def test_right_heads_are_proven(name: str, kind: str) -> None:
    assert "as alone to" in prove_pooling(build(name, kind), packed=True)

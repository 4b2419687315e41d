"""The auxiliary loss of a mixture counts as in transformers, where the config asks for it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from halfbyte.objectives.causal_lm import CausalLM
from halfbyte.objectives.objective import micro_batch_loss
from halfbyte.proofs.packing import prove_packing
from tests import plain_peft, small_models, tiny


def asking(kind: str, **changes: Any) -> Any:
    model = small_models.build(kind, output_router_logits=True, router_aux_loss_coef=0.5, **changes)
    return plain_peft.adapt(model, ["q_proj", "v_proj"])


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss"])
@pytest.mark.parametrize("tokens", [19, 301], ids=["short", "filled up"])
def test_it_is_the_loss_of_transformers(kind: str, tokens: int) -> None:
    model = asking(kind, max_position_embeddings=512)
    plain = copy.deepcopy(model)
    prove_packing(model, tokens)
    (row,) = plain_peft.texts((tokens,), small_models.VOCAB)
    got = micro_batch_loss(CausalLM(), model, tiny.batch_of([row]))
    wanted = plain(input_ids=row[None], labels=row[None], use_cache=False).loss * (tokens - 1)
    assert abs(float(got - wanted)) <= 1e-5 * float(wanted)
    got.backward()
    wanted.backward()
    assert plain_peft.apart(plain_peft.gradients(model), plain_peft.gradients(plain)) <= 1e-5
    plain.config.output_router_logits = False
    without = plain(input_ids=row[None], labels=row[None], use_cache=False).loss * (tokens - 1)
    assert float(got) > 1.01 * float(without)


def test_a_model_that_is_not_asked_adds_nothing() -> None:
    model = plain_peft.adapt(small_models.build("mixtral"), ["q_proj"])
    (row,) = plain_peft.texts((19,), small_models.VOCAB)
    got = micro_batch_loss(CausalLM(), model, tiny.batch_of([row]))
    assert torch.isclose(got, model(input_ids=row[None], labels=row[None], use_cache=False).loss * 18)

"""Hybrids packed by lengths learn what plain PEFT learns of each example alone; the proof sees what could go wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from halfbyte.adapters import targets
from halfbyte.layers import loss, packing, recurrent
from halfbyte.layers.kernels import cpu
from halfbyte.layers.kernels.cpu import tiles
from halfbyte.models import structure
from halfbyte.proofs.fusing import prove_fused
from halfbyte.proofs.packing import prove_packing
from tests import plain_peft, small_models, tiny

pytestmark = pytest.mark.skipif(not cpu.enabled() or not tiles.available32(), reason="these kernels do not run here")
HYBRIDS = (
    "lfm2", "lfm2_moe", "qwen3_next", "qwen3_5_text", "olmo_hybrid", "granitemoehybrid", "bamba", "falcon_h1",
    "nemotron_h", "zamba2",
)  # fmt: skip
# Each another one, so that none stands for another: of both branches, the recurrence's projection and what leaves it,
# keys, the MLP, the embedding; and of a layer's sums.
FACTORS = {
    "falcon_h1": {
        "attention_in_multiplier": 0.8, "attention_out_multiplier": 1.3, "ssm_in_multiplier": 0.7,
        "ssm_out_multiplier": 1.7, "key_multiplier": 0.6, "mlp_multipliers": [1.2, 0.9], "embedding_multiplier": 1.4,
        "ssm_multipliers": [0.9, 1.1, 1.25, 0.75, 1.5],
    },
    "granitemoehybrid": {"num_local_experts": 0, "residual_multiplier": 0.3},
}  # fmt: skip
CASES = [(kind, {}) for kind in HYBRIDS] + [*FACTORS.items(), ("falcon_h1", FACTORS["falcon_h1"] | {
    "mamba_rms_norm": True, "mamba_proj_bias": True, "mamba_n_groups": 2, "mamba_norm_before_gate": False,
})]  # fmt: skip
CHUNK = recurrent._ChunkMixer.chunk
LENGTHS = (5, CHUNK + 1, 1, CHUNK - 1, CHUNK, 2 * CHUNK + 20)
TOLERANCE = 1e-4


def build(kind: str, **changes: Any) -> Any:
    return small_models.build(kind, max_position_embeddings=512, **changes)


def mixers(model: Any) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, recurrent._Mixer)]


@pytest.mark.parametrize(("kind", "changes"), CASES)
def test_rows_longer_than_chunks_learn_what_plain_peft_learns(
    kind: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(kind, **changes)
    names = targets.matched(model, targets.auto_targets(model))
    rows = plain_peft.texts(LENGTHS, small_models.VOCAB)
    wanted = plain_peft.learn(plain_peft.adapt(copy.deepcopy(model), names), rows)
    ours = plain_peft.adapt(copy.deepcopy(model), names)
    proof = prove_packing(ours, max(LENGTHS))
    assert proof.layout == "cu_seq_lens", proof
    fused = prove_fused(ours, packed=True, longest=max(LENGTHS))
    assert fused.ok, fused
    ran: list[str] = []
    for cls in (recurrent._ShortConvMixer, recurrent._DeltaMixer, recurrent._StateSpaceMixer):
        real = cls.mix
        monkeypatch.setattr(cls, "mix", lambda self, x, examples, real=real: ran.append("") or real(self, x, examples))
    ours.train()
    summed = loss.micro_batch_loss(ours, tiny.batch_of(rows))
    summed.backward()
    assert len(ran) == len(mixers(ours)) > 0
    assert plain_peft.apart(plain_peft.gradients(ours), wanted[1]) <= TOLERANCE
    assert abs(summed.item() - wanted[0]) <= TOLERANCE * wanted[0]


def one_example(patch: pytest.MonkeyPatch) -> None:
    """State and convolution are carried over from one example into the next."""
    real = recurrent.places_of
    patch.setattr(recurrent, "places_of", lambda lengths: real((sum(lengths),)))


def conv_over_the_boundary(patch: pytest.MonkeyPatch) -> None:
    real = recurrent.places_of

    def faulty(lengths: tuple[int, ...]) -> recurrent.PackPlaces:
        return recurrent.PackPlaces(real(lengths).starts, real((sum(lengths),)).places)

    patch.setattr(recurrent, "places_of", faulty)


def around_kernel(patch: pytest.MonkeyPatch, name: str, change: Callable[..., Any]) -> None:
    kernel = recurrent._kernel(name)
    real = kernel.forward
    patch.setattr(kernel, "forward", lambda *tensors, **options: change(real, *tensors, **options))


def decay_of_the_neighbour(patch: pytest.MonkeyPatch) -> None:
    around_kernel(patch, "delta_rule", lambda real, qkv, g, *rest, **options: real(qkv, g.roll(1, 0), *rest, **options))
    around_kernel(patch, "state_space", lambda real, x, a, *rest, **options: real(x, a.roll(1, 0), *rest, **options))


def a_missing_chunk(patch: pytest.MonkeyPatch) -> None:
    """What is before a chunk is forgotten: each is an example of its own."""

    def cut(real: Callable[..., Any], *tensors: Any, **options: Any) -> Any:
        *given, starts = tensors
        chunks = (at for a, b in pairwise(starts.tolist()) for at in range(a, b, CHUNK))
        return real(*given, torch.tensor([*chunks, int(starts[-1])]), **options)

    for name in ("delta_rule", "state_space"):
        around_kernel(patch, name, cut)


FAULTS = {
    "state carried over": (("lfm2", "qwen3_next", "granitemoehybrid"), one_example),
    "convolution over the boundary": (("lfm2", "qwen3_next", "granitemoehybrid"), conv_over_the_boundary),
    "decay of the neighbour": (("qwen3_next", "granitemoehybrid"), decay_of_the_neighbour),
    "a missing chunk": (("qwen3_next", "granitemoehybrid"), a_missing_chunk),
}


@pytest.mark.parametrize(("fault", "kind"), [(f, kind) for f, (kinds, _) in FAULTS.items() for kind in kinds])
def test_a_fault_of_a_recurrent_layer_is_seen(fault: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(kind).requires_grad_(False)
    assert prove_packing(model, max(LENGTHS)).layout == "cu_seq_lens"
    FAULTS[fault][1](monkeypatch)
    proof = prove_packing(model, max(LENGTHS))
    assert proof.layout == "rows" and "cu_seq_lens: " in proof.reason
    assert packing.installed(model) == "rows" and not mixers(model)


@pytest.mark.parametrize("kind", ["lfm2", "qwen3_next", "granitemoehybrid"])
def test_what_the_kernels_do_not_take_runs_one_example_after_another(kind: str) -> None:
    """Where a weight of the layer itself trains."""
    rows = plain_peft.texts((5, 1, 9), small_models.VOCAB)
    wanted, ours = build(kind).train(), build(kind).train()
    packing.install(ours)
    loss.micro_batch_loss(ours, tiny.batch_of(rows)).backward()
    assert plain_peft.apart(plain_peft.gradients(ours), plain_peft.learn(wanted, rows)[1]) <= TOLERANCE
    assert prove_packing(ours).layout == "cu_seq_lens"


@pytest.mark.parametrize(("kind", "count"), [("lfm2", 3), ("qwen3_next", 3), ("granitemoehybrid", 3), ("falcon_h1", 6)])
def test_layers_that_the_proof_has_not_seen_keep_examples_apart_too(kind: str, count: int) -> None:
    """A proof runs on the first layers; the others are set up by the first forward."""
    kinds = {} if kind == "falcon_h1" else {"layer_types": [*small_models.config(kind).layer_types] * 3}
    model = build(kind, num_hidden_layers=6, **kinds).requires_grad_(False)
    names = targets.matched(model, targets.auto_targets(model))
    rows = plain_peft.texts((5, 1, 9, 40), small_models.VOCAB)
    wanted = plain_peft.learn(plain_peft.adapt(copy.deepcopy(model), names), rows)
    ours = plain_peft.adapt(copy.deepcopy(model), names)
    with structure.shallow(ours):
        assert prove_packing(ours, 40).layout == "cu_seq_lens"
    summed = loss.micro_batch_loss(ours, tiny.batch_of(rows))
    summed.backward()
    assert len(mixers(ours)) == count
    assert plain_peft.apart(plain_peft.gradients(ours), wanted[1]) <= TOLERANCE
    assert abs(summed.item() - wanted[0]) <= TOLERANCE * wanted[0]


def test_classes_come_back() -> None:
    model = build("qwen3_next")
    before = [type(m) for m in model.modules()]
    packing.install(model, "cu_seq_lens")
    assert len(mixers(model)) == 1
    packing.install(model, "rows")
    assert [type(m) for m in model.modules()] == before

"""Chunks of transformers' own Mamba-2 scan in a proof: smaller, with the same logits, and as before afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from halfbyte.proofs import setting
from tests import tiny_run


@pytest.mark.parametrize("kind", ["granitemoehybrid", "falcon_h1"])
def test_a_proof_takes_small_chunks_with_the_same_logits(kind: str, tmp_path: Path) -> None:
    tiny_run.hybrid(tmp_path / "model", kind)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    scans = [module for module in model.modules() if hasattr(module, "ssm_state_size")]
    assert scans
    for module in scans:
        module.chunk_size = 256
    ids = torch.randint(3, 60, (1, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        with setting.small_chunks(model):
            assert {module.chunk_size for module in scans} == {setting.CHUNK}
            got = model(input_ids=ids).logits
    assert {module.chunk_size for module in scans} == {256}
    # sums of 100 terms in another order, in fp32, through a few layers
    assert float((got - wanted).norm()) <= 1e-5 * float(wanted.norm())

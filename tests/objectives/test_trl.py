"""Losses and gradients of preferences are TRL's, on a tiny model in fp32, of one micro-batch. Skipped without TRL."""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: pip install trl")

from accelerate import Accelerator

from halfbyte.proofs.packing import prove_packing
from tests import pairs, plain_peft, tiny
from tests.objectives.test_preference import MORE, objective_of

NAMES = ("input_ids", "attention_mask", "completion_mask")


def padded(texts: list[Any]) -> dict[str, torch.Tensor]:
    """Texts as TRL's collators lay them out: padded on the right; the mask is 1 at the answer's tokens."""
    longest = max(len(text.input_ids) for text in texts)
    batch = torch.zeros(3, len(texts), longest, dtype=torch.int64)
    for i, text in enumerate(texts):
        n = len(text.input_ids)
        batch[0, i, :n], batch[1, i, :n] = torch.tensor(text.input_ids), 1
        batch[2, i, :n] = (torch.tensor(text.labels) >= 0).long()
    return dict(zip(NAMES, batch, strict=True))


def log_likelihoods(model: Any, texts: list[Any], alpha: float | None = None) -> torch.Tensor:
    """By transformers and torch alone; with `alpha` of pairs, as LD-DPO counts them."""
    sums = []
    with torch.no_grad():
        for i, text in enumerate(texts):
            ids, labels = torch.tensor([text.input_ids]), torch.tensor(text.labels)[1:]
            every = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, :-1].float(), -1)
            each = every[torch.arange(len(labels)), ids[0, 1:]][labels >= 0]
            n = min(sum(x >= 0 for x in t.labels) for t in texts[i // 2 * 2 : i // 2 * 2 + 2])
            sums.append(each.sum() if alpha is None else each[:n].sum() + alpha * each[n:].sum())
    return torch.stack(sums)


def trainer_of(asks: Any, model: Any, **more: Any) -> Any:
    """What TRL's methods read of a trainer."""
    return SimpleNamespace(
        model=model, accelerator=Accelerator(cpu=True), aux_loss_enabled=False, beta=asks.beta,
        label_smoothing=asks.label_smoothing or 0.0, _metrics=defaultdict(lambda: defaultdict(list)),
        is_encoder_decoder=False, padding_value=0, pad_token_id=0, _total_train_tokens=0, _tp_size=1, **more,
    )  # fmt: skip


def dpo(asks: Any, model: Any, rows: list[Any], reference: torch.Tensor) -> torch.Tensor:
    from trl.trainer.dpo_trainer import DPOTrainer, add_fused_lm_head

    add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    types = ["ipo" if asks.method == "ipo" else asks.loss_type, *(["sft"] if asks.rpo_alpha else [])]
    trainer = trainer_of(
        asks, model, ld_alpha=asks.ld_alpha, precompute_ref_logps=True, f_divergence_type="reverse_kl",
        loss_types=types, loss_weights=[1.0, asks.rpo_alpha][: len(types)], use_weighting=False,
        args=SimpleNamespace(discopop_tau=asks.discopop_tau),
    )  # fmt: skip
    batch = padded([row.texts[0] for row in rows] + [row.texts[1] for row in rows])
    batch |= {"ref_chosen_logps": reference[::2], "ref_rejected_logps": reference[1::2]}
    loss: torch.Tensor = DPOTrainer._compute_loss(trainer, model, batch, False)
    return loss


def kto(asks: Any, model: Any, rows: list[Any], reference: torch.Tensor) -> torch.Tensor:
    from trl.trainer.kto_trainer import KTOTrainer, add_fused_lm_head

    add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "mean_logits"))
    trainer = trainer_of(
        asks, model, loss_type=asks.loss_type, calculate_KL=asks.loss_type == "kto", precompute_ref_logps=True,
        desirable_weight=asks.desirable_weight, undesirable_weight=asks.undesirable_weight,
    )  # fmt: skip
    trainer._compute_kl_logps = lambda model, batch: KTOTrainer._compute_kl_logps(trainer, model, batch)
    batch: dict[str, Any] = padded([row.texts[0] for row in rows])
    batch |= {f"KL_{name}": value for name, value in padded([row.texts[1] for row in rows]).items()}
    batch |= {"ref_logps": reference[::2], "ref_KL_logps": reference[1::2]}
    batch["label"] = torch.tensor([row.desirable for row in rows])
    loss: torch.Tensor = KTOTrainer._compute_loss(trainer, model, batch, False)
    return loss


def without_reference(asks: Any, model: Any, rows: list[Any]) -> torch.Tensor:
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    batch = {}
    for i, side in enumerate(("chosen", "rejected")):
        ids, mask, answers = padded([row.texts[i] for row in rows]).values()
        batch |= {f"{side}_input_ids": ids, f"{side}_attention_mask": mask}
        batch[f"{side}_labels"] = torch.where(answers > 0, ids, -100)
    cls = ORPOTrainer if asks.method == "orpo" else CPOTrainer
    trainer = trainer_of(
        asks, model, cpo_alpha=asks.cpo_alpha, alpha=0.0, simpo_gamma=asks.simpo_gamma,
        loss_type="simpo" if asks.method == "simpo" else asks.loss_type,
    )  # fmt: skip
    trainer.concatenated_inputs, trainer.get_batch_logps = cls.concatenated_inputs, cls.get_batch_logps
    for name in ("concatenated_forward", "odds_ratio_loss", "cpo_loss"):
        if hasattr(cls, name):
            setattr(trainer, name, lambda *args, _name=name: getattr(cls, _name)(trainer, *args))
    loss: torch.Tensor = cls.get_batch_loss_metrics(trainer, model, batch)[0]
    return loss


@pytest.mark.parametrize(("method", "fields"), MORE, ids=[f"{m}-{'-'.join(map(str, f.values()))}" for m, f in MORE])
def test_loss_and_gradients_are_those_of_trl(method: str, fields: dict[str, Any]) -> None:
    asks = (objective := objective_of(method, fields)).asks
    if (method, asks.loss_type) == ("dpo", "sigmoid") and asks.label_smoothing:
        pytest.skip("TRL 1.16 reads label_smoothing in robust and exo_pair alone")
    model = plain_peft.adapt(tiny.model("llama"), "all-linear").eval()
    ours = copy.deepcopy(model)
    prove_packing(ours)
    rows = pairs.examples(verdicts=method == "kto")
    with model.disable_adapter():
        reference = log_likelihoods(model, [text for row in rows for text in row.texts], asks.ld_alpha)
    known = [replace(r, reference=tuple(reference[2 * i : 2 * i + 2].tolist())) for i, r in enumerate(rows)]
    batch = objective.collate_tree(known)
    if method == "kto" and objective.step_names:
        from halfbyte.data.collate import Batches

        sums = objective.step_sums(ours, Batches(known, [tuple(range(len(known)))], objective.collate))
        batch = {**batch, "step": sums}
    got = objective.loss(ours, batch) / len(rows)
    got.backward()
    if asks.referenced:
        wanted = (kto if method == "kto" else dpo)(asks, model, rows, reference)
    else:
        wanted = without_reference(asks, model, rows)
    wanted.backward()
    assert float(got.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert plain_peft.apart(plain_peft.gradients(ours), plain_peft.gradients(model)) < 1e-5

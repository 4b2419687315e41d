"""TextVectors: sentence-transformers' losses, exact over any split into micro-batches, in a folder that it opens."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from halfbyte import finetune
from halfbyte.data.encoding import texts
from halfbyte.data.encoding.examples import Example
from halfbyte.errors import BaseModelError, DataError, RecipeError
from halfbyte.inference import labels
from halfbyte.inference.load import open_run
from halfbyte.layers import heads, loss
from halfbyte.objectives.vectors import TextVectors
from halfbyte.proofs.heads import prove_pooling
from halfbyte.proofs.packing import prove_packing
from halfbyte.recipe import task
from halfbyte.recipe.evaluation import Eval
from halfbyte.recipe.schema import Loaded
from halfbyte.runs.folder import RunFolder
from halfbyte.scoring.sheet import EvalOptions
from halfbyte.training.prepare import prepare
from tests import tiny, tiny_run

WORDS = ["red", "green", "blue", "round", "square", "small", "large", "old", "new", "cup", "box", "tree", "road"]


def recipe(folder: Path, **changes: Any) -> Loaded:
    draw, lines = random.Random(0), []
    for _ in range(16):
        words = draw.sample(WORDS, 5)
        lines.append({"query": " ".join(words[:2]), "passage": " ".join(words), "negative": draw.choice(WORDS)})
        lines[-1]["score"] = draw.random()
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"data__train": folder / "pairs.jsonl", "data__eval": "25%", "quant__type": "none"}
    return tiny_run.recipe(folder, **{"task": "embed", **data, **changes})


def rows_of(draw: torch.Generator, counts: Sequence[int]) -> list[Tensor]:
    return [torch.randn(count, 16, generator=draw) for count in counts]


@pytest.mark.parametrize("name", [task.RANKING, task.COSENT, task.TRIPLET])
def test_losses_are_sentence_transformers_own(name: str) -> None:
    theirs = pytest.importorskip("sentence_transformers.losses")
    rows = rows_of(torch.Generator().manual_seed(0), [3] * 6)
    scores = torch.rand(6, generator=torch.Generator().manual_seed(1))
    embeddings = list(torch.stack(rows, 1))  # of all queries, of all passages, of all negatives
    embeddings = embeddings[:2] if name == task.COSENT else embeddings
    wanted = getattr(theirs, name)(None).compute_loss_from_embeddings(embeddings, scores)
    assert float(TextVectors(task.VectorFields(loss=name)).losses(rows, scores).mean()) == pytest.approx(
        float(wanted), rel=1e-5
    )


def by_definition(name: str, rows: Sequence[Tensor], scores: Tensor) -> float:
    """The mean loss of a batch, row by row and pair by pair."""
    cos = torch.nn.functional.cosine_similarity
    if name == task.TRIPLET:
        each = [torch.relu((r[0] - r[1] + 1e-6).norm() - (r[0] - r[2] + 1e-6).norm() + 5.0) for r in rows]
        return float(torch.stack(each).mean())
    if name == task.COSENT:
        alike = [20 * cos(r[0], r[1], dim=0) for r in rows]
        pairs = [a - b for a, x in zip(alike, scores, strict=True) for b, y in zip(alike, scores, strict=True) if x < y]
        return float(torch.log1p(torch.stack(pairs).exp().sum()))
    passages = [*(r[1] for r in rows), *(n for r in rows for n in r[2:])]
    each = []
    for i, row in enumerate(rows):
        alike = torch.stack([20 * cos(row[0], other, dim=0) for other in passages])
        each.append(alike.logsumexp(0) - alike[i])
    return float(torch.stack(each).mean())


@pytest.mark.parametrize("name", [task.RANKING, task.COSENT, task.TRIPLET])
def test_losses_by_definition(name: str) -> None:
    rows = rows_of(torch.Generator().manual_seed(0), [3] * 6)
    scores = torch.rand(6, generator=torch.Generator().manual_seed(1))
    ours = float(TextVectors(task.VectorFields(loss=name)).losses(rows, scores).mean())
    assert ours == pytest.approx(by_definition(name, rows, scores), rel=1e-5)


def examples(counts: Sequence[int]) -> list[Example]:
    draw, rows = random.Random(0), []
    for number, count in enumerate(counts):
        ids: list[int] = []
        labels_: list[int] = []
        for _ in range(count):
            text = [draw.randrange(3, 256) for _ in range(draw.randint(1, 9))]
            ids, labels_ = ids + text, labels_ + [-100] * (len(text) - 1) + [text[-1]]
        rows.append(Example(tuple(ids), tuple(labels_), "", (), json.dumps(number / 10)))
    return rows


@pytest.mark.parametrize("name", [task.RANKING, task.COSENT])
@pytest.mark.parametrize("pooling", ["lasttoken", "mean"])
def test_any_split_into_micro_batches_is_one_step(name: str, pooling: str) -> None:
    model, objective = tiny.model("llama"), TextVectors(task.VectorFields(loss=name, pooling=pooling))
    heads.attach(model, 0, seed=0)
    prove_packing(model)
    rows = examples([3, 2, 3, 2, 4, 2, 3, 2])
    weight = model.model.layers[0].self_attn.q_proj.weight
    results = []
    for count in (1, 3, 8):
        parts = [range(len(rows))[i::count] for i in range(count)]
        batches = [{**objective.collate([rows[r] for r in part]), "row_numbers": tuple(part)} for part in parts]
        step: dict[int, tuple[Tensor, float]] = {}
        with torch.no_grad():
            for part, batch in zip(parts, batches, strict=True):
                vectors = objective.row_vectors(model, batch)
                step |= dict(zip(part, zip(vectors, batch["targets"].tolist(), strict=True), strict=True))
        coupled = objective.couple(step)
        model.zero_grad()
        total = 0.0
        for batch in batches:
            part_loss = objective.loss(model, {**batch, "step": coupled})
            part_loss.backward()
            total += float(part_loss)
        results.append((total, weight.grad.clone()))
    model.zero_grad()
    whole = objective.loss(model, objective.collate(rows))  # by autograd alone
    whole.backward()
    for total, gradient in results:
        assert total == pytest.approx(float(whole), rel=1e-5)
        assert torch.allclose(gradient, weight.grad, rtol=1e-4, atol=1e-5 * float(weight.grad.abs().max()))


@pytest.mark.parametrize("name", [task.RANKING, task.COSENT, task.TRIPLET])
def test_a_run_learns_and_is_scored(name: str, tmp_path: Path) -> None:
    """Of different micro-batches the same run; what it loses falls."""
    metrics = []
    for tokens in (24, 4096):
        changes = {
            "train__max_tokens_per_micro_batch": tokens,
            "output": tmp_path / f"run{tokens}",
            "vectors__loss": name,
        }
        finetune.train(recipe(tmp_path, **changes, lora__lora_dropout=0.1))
        metrics.append(RunFolder(tmp_path / f"run{tokens}").read_metrics())
    few, many = ([row["loss"] for row in rows if "loss" in row] for rows in metrics)
    assert few == pytest.approx(many, rel=1e-4)
    assert {"eval_loss", "eval_recall_1", "eval_recall_10", "eval_mrr"} <= {key for row in metrics[0] for key in row}
    sides = labels.score(open_run(tmp_path / "run4096"), EvalOptions(Eval(resamples=100), with_base=True))["sides"]
    assert sides["adapter"]["scores"]["loss"]["value"] != sides["base"]["scores"]["loss"]["value"]
    assert 0 <= sides["adapter"]["scores"]["mrr"]["value"] <= 1


def test_sentence_transformers_opens_the_folder(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    finetune.train(recipe(tmp_path, data__query_prompt="ask: ", data__passage_prompt="say: "))
    model = library.SentenceTransformer(str(tmp_path / "run" / "sentence_transformer"), device="cpu")
    assert model.prompts["query"] == "ask: "
    wanted = torch.tensor(model.encode(["red cup", "old road"], prompt_name="query"))
    opened = open_run(tmp_path / "run")
    ids = texts.ids_of(opened.tokenizer, [("ask: red cup",), ("ask: old road",)])
    rows = [Example(tuple(i), (-100,) * len(i), "", (), "") for i in ids]
    objective = TextVectors(opened.recipe.vectors)
    with torch.no_grad():
        ours = torch.cat(objective.row_vectors(opened.model, objective.collate(rows)))
    assert torch.allclose(torch.nn.functional.normalize(ours, dim=-1), wanted, atol=1e-5)


def test_what_it_refuses(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="are for task embed"):
        recipe(tmp_path, task="causal_lm", vectors__loss=task.COSENT)
    loaded = recipe(tmp_path, vectors__loss=task.TRIPLET)
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"query": "a", "passage": "b"}\n' * 8)
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: TripletLoss needs a negative"):
        prepare(loaded.recipe)


def test_a_mean_of_other_tokens_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    heads.attach(model, 0, seed=0)
    prove_packing(model)
    assert "mean of each text" in prove_pooling(model, packed=True, pooling="mean")
    right = loss.every_hidden
    monkeypatch.setattr(loss, "every_hidden", lambda m, batch: right(m, batch).roll(1, 0))
    with pytest.raises(BaseModelError, match="off by"):
        prove_pooling(model, packed=True, pooling="mean")

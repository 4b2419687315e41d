"""TextVectors: sentence-transformers' losses, exact over any split into micro-batches, in a folder that it opens."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel

from halfbyte import finetune
from halfbyte.data.encoding.examples import Example
from halfbyte.errors import BaseModelError, DataError, RecipeError
from halfbyte.inference import labels, vectors
from halfbyte.inference.load import open_run
from halfbyte.layers import heads, loss
from halfbyte.models.sources import hub
from halfbyte.objectives.vectors import TextVectors
from halfbyte.proofs.adapter import compare_logits
from halfbyte.proofs.heads import prove_pooling
from halfbyte.proofs.packing import prove_packing
from halfbyte.recipe import task
from halfbyte.recipe.evaluation import Eval
from halfbyte.recipe.file import load_recipe
from halfbyte.recipe.schema import Loaded
from halfbyte.runs.folder import RunFolder
from halfbyte.scoring.sheet import EvalOptions
from halfbyte.training.prepare import notices, prepare
from tests import encoders, tiny, tiny_run
from tests.distributed import together

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


class Vectors(torch.nn.Module):
    """A model of sentence-transformers' kind whose texts are vectors already."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features["vectors"]}

    def get_embedding_dimension(self) -> int:
        return 16


@pytest.mark.parametrize("name", [task.RANKING, task.COSENT, task.TRIPLET, task.GROUPS])
def test_matryoshka_and_groups_are_sentence_transformers_own(name: str) -> None:
    """Loss and gradient of each vector, with weights and without."""
    theirs, model = pytest.importorskip("sentence_transformers.losses"), Vectors()
    counts = [1] * 8 if name == task.GROUPS else [2 if name == task.COSENT else 3] * 6
    rows = [row.requires_grad_() for row in rows_of(torch.Generator().manual_seed(0), counts)]
    scores = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0]) if name == task.GROUPS else torch.rand(6)
    inner = getattr(theirs, name)(model)
    for dims, weights in (((), ()), ((16, 8, 4), ()), ((4, 16), (0.5, 2.0))):
        loss_ = inner if not dims else theirs.MatryoshkaLoss(model, inner, list(dims), list(weights) or None)
        columns = [{"vectors": torch.stack([row[i] for row in rows])} for i in range(counts[0])]
        wanted = loss_(columns, scores)
        settings = task.VectorFields(loss=name, matryoshka_dims=dims, matryoshka_weights=weights)
        ours = TextVectors(settings).losses(rows, scores.float()).mean()
        assert ours.item() == pytest.approx(wanted.item(), rel=1e-5)
        for a, b in zip(*(torch.autograd.grad(value, rows) for value in (ours, wanted)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_groups_by_definition() -> None:
    rows, labels_ = rows_of(torch.Generator().manual_seed(0), [1] * 7), [0, 1, 0, 1, 2, 0, 1]
    v, each = [row[0] for row in rows], list[Tensor]()
    for a, p, n in itertools.permutations(range(7), 3):
        if labels_[a] == labels_[p] != labels_[n]:
            each.append(torch.relu((v[a] - v[p]).norm() - (v[a] - v[n]).norm() + 5.0))
    wanted = torch.stack([e for e in each if e > 0]).mean()
    objective = TextVectors(task.VectorFields(loss=task.GROUPS))
    assert float(objective.losses(rows, torch.tensor(labels_).float()).mean()) == pytest.approx(float(wanted), rel=1e-5)


class Largest(TorchDispatchMode):
    """The most numbers of a tensor that is made meanwhile."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numbers = max(self.numbers, result.numel())
        return result


def test_groups_keep_what_is_quadratic_in_texts_alone() -> None:
    """48 texts have 25,944 triplets. The gradient is that of the definition, for every text."""
    rows, labels_ = rows_of(torch.Generator().manual_seed(0), [1] * 48), [n % 3 for n in range(48)]
    rows = [row.requires_grad_() for row in rows]
    with Largest() as largest:
        ours = TextVectors(task.VectorFields(loss=task.GROUPS)).losses(rows, torch.tensor(labels_).float())
        gradients = torch.autograd.grad(ours.mean(), rows)
    assert largest.numbers <= 48 * 48
    v, each = [row[0] for row in rows], list[Tensor]()
    apart = [[(v[a] - v[b]).norm() if a != b else torch.zeros(()) for b in range(48)] for a in range(48)]
    for a, p, n in itertools.permutations(range(48), 3):
        if labels_[a] == labels_[p] != labels_[n] and apart[a][p] - apart[a][n] + 5.0 > 0:
            each.append(apart[a][p] - apart[a][n] + 5.0)
    wanted = torch.stack(each).mean()
    assert ours[0].item() == pytest.approx(wanted.item(), rel=1e-5)
    for got, right in zip(gradients, torch.autograd.grad(wanted, rows), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-6)


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


def alone(vectors: Sequence[Tensor], scores: Tensor) -> tuple[list[Tensor], Tensor, slice]:
    return [*vectors], scores, slice(None)


@pytest.mark.parametrize("name", [task.RANKING, task.COSENT])
@pytest.mark.parametrize("pooling", ["lasttoken", "mean"])
def test_any_split_into_micro_batches_is_one_step(name: str, pooling: str) -> None:
    dims = (16, 4) if pooling == "mean" else ()
    settings = task.VectorFields(loss=name, pooling=pooling, matryoshka_dims=dims)
    model, objective = tiny.model("llama"), TextVectors(settings)
    heads.attach(model, 0, seed=0)
    prove_packing(model)
    rows = examples([3, 2, 3, 2, 4, 2, 3, 2])
    weight = model.model.layers[0].self_attn.q_proj.weight
    results = []
    for count in (1, 3, 8):
        parts = [range(len(rows))[i::count] for i in range(count)]
        batches = [{**objective.collate([rows[r] for r in part]), "row_numbers": tuple(part)} for part in parts]
        coupled = objective.step_of(model, zip(parts, batches, strict=True), lambda *of: nullcontext(), alone)
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


def test_a_run_of_an_encoder_keeps_its_vectors_to_be_verified(tmp_path: Path) -> None:
    """Of texts longer than its class has labels; an adapter that is not there is seen."""
    path = encoders.checkpoint(tmp_path / "model", "bert")
    finetune.train(recipe(tmp_path, model=path))
    proof = json.loads((tmp_path / "run" / "proof.json").read_text())
    assert max(max(row["at"]) for row in proof["rows"]) > 2 and proof["moved"] > proof["bound"]
    model = open_run(tmp_path / "run").model
    assert compare_logits(tmp_path / "run" / "proof.json", model).ok
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(0.0 if "lora_B" in name else 1.0)
    assert not compare_logits(tmp_path / "run" / "proof.json", model).ok


def test_sentence_transformers_opens_the_folder(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    finetune.train(recipe(tmp_path, data__query_prompt="ask: ", data__passage_prompt="say: "))
    model = library.SentenceTransformer(str(tmp_path / "run" / "sentence_transformer"), device="cpu")
    assert model.prompts["query"] == "ask: "
    wanted = torch.tensor(model.encode(["red cup", "old road"], prompt_name="query"))
    opened = open_run(tmp_path / "run")
    ours = torch.tensor(vectors.of_texts(opened, ["ask: red cup", "ask: old road"]))
    assert torch.allclose(ours, wanted, atol=1e-5)


def steps(recipe_: Path) -> None:
    finetune.train(load_recipe(recipe_))


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [task.RANKING, pytest.param(task.COSENT, marks=pytest.mark.slow)])
def test_any_number_of_processes_is_one(name: str, size: int, tmp_path: Path) -> None:
    """In-batch negatives of rows that another process has, in steps and in evaluations; with dropout."""
    runs = []
    for count in (1, size):
        changes = {"vectors__loss": name, "vectors__pooling": "mean", "output": tmp_path / f"run{count}"}
        loaded = recipe(tmp_path, **changes, lora__lora_dropout=0.1, train__max_tokens_per_micro_batch=24)
        assert loaded.path is not None
        if count == 1:
            steps(loaded.path)
        else:
            together.run(count, steps, loaded.path)
        runs.append(RunFolder(tmp_path / f"run{count}").read_metrics())
    for key in ("loss", "grad_norm", "eval_loss", "eval_mrr"):
        one, more = ([row[key] for row in rows if key in row] for rows in runs)
        assert more == pytest.approx(one, rel=1e-5), key


def groups(folder: Path, count: int) -> dict[str, Path]:
    """Rows of a text and a label; what a recipe says of them."""
    draw, path = random.Random(0), folder / "groups.jsonl"
    lines = [{"text": " ".join(draw.sample(WORDS, 3)), "label": draw.choice(["a", "b"])} for _ in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"data__train": path}


def test_texts_with_labels_train_and_are_scored(tmp_path: Path) -> None:
    loaded = recipe(tmp_path, vectors__loss=task.GROUPS, vectors__matryoshka_dims=[8, 4], **groups(tmp_path, 24))
    finetune.train(loaded)
    side = labels.score(open_run(tmp_path / "run"), EvalOptions(Eval(resamples=100)))["sides"]["adapter"]
    assert {"recall_1", "mrr", "ndcg_10", "loss"} <= side["scores"].keys()
    with pytest.raises(RecipeError, match="vectors have 64 numbers"):
        prepare(
            recipe(tmp_path, vectors__loss=task.GROUPS, vectors__matryoshka_dims=[65], **groups(tmp_path, 24)).recipe
        )
    with pytest.raises(RecipeError, match="matryoshka_weights has 1 numbers"):
        recipe(tmp_path, vectors__matryoshka_dims=[8, 4], vectors__matryoshka_weights=[1.0])


def test_a_corpus_makes_it_harder_to_find(tmp_path: Path) -> None:
    """Scores of a corpus by its vectors alone; rows with the same query want the passages of all of them."""
    finetune.train(recipe(tmp_path, data__query_prompt="ask: ", vectors__pooling="mean"))
    rows = [("red cup", "red"), ("red cup", "blue"), ("old road", "new road"), ("tree", "box")]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"query": q, "passage": p}) + "\n" for q, p in rows))
    corpus = ["small box", "red", "large tree", "cup", "old old road"]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"passage": p}) + "\n" for p in corpus))
    opened = open_run(tmp_path / "run")
    scored = labels.score(
        opened, EvalOptions(Eval(resamples=100)), data=tmp_path / "test.jsonl", corpus=tmp_path / "corpus.jsonl"
    )
    queries, passages = ["red cup", "old road", "tree"], ["red", "blue", "new road", "box", *corpus[:1], *corpus[2:]]
    fits = [[0, 1], [2], [3]]
    alike = vectors.of_texts(opened, [f"ask: {q}" for q in queries]) @ vectors.of_texts(opened, passages).T
    places = [sorted(int((row > row[i]).sum()) for i in fit) for row, fit in zip(alike, fits, strict=True)]
    got = {name: one["value"] for name, one in scored["sides"]["adapter"]["scores"].items()}
    assert got["recall_1"] == pytest.approx(sum(p[0] == 0 for p in places) / 3)
    assert got["mrr"] == pytest.approx(sum(1 / (p[0] + 1) for p in places) / 3)
    ideal = [1 + 1 / np.log2(3), 1, 1]
    gain = [sum(1 / np.log2(i + 2) for i in p if i < 10) for p in places]
    assert got["ndcg_10"] == pytest.approx(np.mean([a / b for a, b in zip(gain, ideal, strict=True)]))
    (neighbour, *_) = scored["sides"]["adapter"]["neighbours"]
    assert neighbour["place"] == max(p[0] for p in places) + 1 and len(neighbour["nearest"]) == 3


def test_predict_writes_vectors(tmp_path: Path) -> None:
    finetune.train(recipe(tmp_path, data__passage_prompt="say: "))
    opened, out = open_run(tmp_path / "run"), tmp_path / "out.parquet"
    (tmp_path / "rows.csv").write_text("passage\nred cup\nold road\n")
    assert labels.predict(opened, tmp_path / "rows.csv", out)["rows"] == 2
    got = np.array(pyarrow.parquet.read_table(out)["vector"].to_pylist())
    np.testing.assert_allclose(got, vectors.of_texts(opened, ["say: red cup", "say: old road"]), atol=1e-6)


def test_what_it_refuses(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="are for task embed"):
        recipe(tmp_path, task="causal_lm", vectors__loss=task.COSENT)
    loaded = recipe(tmp_path, vectors__loss=task.TRIPLET)
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"query": "a", "passage": "b"}\n' * 8)
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: TripletLoss needs a negative") as short:
        prepare(loaded.recipe)
    other = "--set vectors.loss={}, which these columns fit; or data.fields names others"
    assert short.value.fix == other.format("MultipleNegativesRankingLoss")
    fits = {
        '{"query": "a", "passage": "b", "score": 1}\n': "MultipleNegativesRankingLoss or CoSENTLoss",
        '{"text": "a", "label": "b"}\n': "BatchAllTripletLoss",
    }
    for row, losses in fits.items():
        path.write_text(row * 8)
        with pytest.raises(DataError, match="needs a negative") as short:
            prepare(loaded.recipe)
        assert short.value.fix == other.format(losses)


def test_rows_that_teach_nothing_together_are_refused(tmp_path: Path) -> None:
    loaded, path = recipe(tmp_path, vectors__loss=task.COSENT, data__eval="none"), tmp_path / "pairs.jsonl"
    path.write_text('{"query": "a", "passage": "b", "score": 1}\n' * 8)
    with pytest.raises(DataError, match=r"compares rows with other scores, and all have 1\.0"):
        prepare(loaded.recipe)
    path.write_text('{"query": "a", "passage": "b", "score": 1}\n{"query": "a", "passage": "b", "score": NaN}\n')
    with pytest.raises(DataError, match=r"pairs\.jsonl:2: .*score: a number is needed, a finite one"):
        prepare(loaded.recipe)
    loaded = recipe(tmp_path, vectors__loss=task.GROUPS, data__eval="none")
    for every in ("abcd", "aaaa"):
        path.write_text("".join(json.dumps({"text": f"red {n}", "label": x}) + "\n" for n, x in enumerate(every)))
        with pytest.raises(DataError, match="needs two labels, one of them of two rows"):
            prepare(loaded.recipe)


def test_scores_that_the_loss_does_not_read_are_told(tmp_path: Path) -> None:
    told = [notices(prepare(recipe(tmp_path, vectors__loss=loss).recipe)) for loss in (task.RANKING, task.COSENT)]
    assert [any("whatever its score" in line for line in lines) for lines in told] == [True, False]


def test_a_pair_of_a_low_score_is_no_passage_to_be_found() -> None:
    draw = torch.Generator().manual_seed(0)
    rows, scores = rows_of(draw, [2] * 6), torch.tensor([0.0, 1.0, 0.2, 0.9, 0.5, 0.4])
    objective = TextVectors(task.VectorFields(loss=task.COSENT))
    sums = objective.all_sums(rows, scores)
    assert [row["asked"] for row in sums] == [0, 1, 0, 1, 1, 0]
    queries, passages = (torch.nn.functional.normalize(torch.stack([row[at] for row in rows]), dim=-1) for at in (0, 1))
    order = (queries @ passages.T).argsort(dim=1, descending=True).tolist()
    wanted = sum(1 / (1 + order[n].index(n)) for n in (1, 3, 4)) / 3
    total = {name: sum(row[name] for row in sums) for name in objective.sum_names}
    assert objective.scores(total)["mrr"] == pytest.approx(wanted)
    assert not TextVectors(task.VectorFields()).of_set and objective.of_set
    pairs, few = [[0, 1], [2, 3], [4, 1]], [0.1, 1.0, 0.7]
    for one, queries_ in ((objective, [2, 4]), (TextVectors(task.VectorFields()), [0, 2, 4])):
        asked, candidates = vectors._asked(one, pairs, [], few)
        assert [query for query, *_ in asked] == queries_ and candidates == [1, 3]


def test_a_mean_of_other_tokens_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    heads.attach(model, 0, seed=0)
    prove_packing(model)
    assert "mean of each text" in prove_pooling(model, packed=True, pooling="mean")
    right = loss.every_hidden
    monkeypatch.setattr(loss, "every_hidden", lambda m, batch: right(m, batch).roll(1, 0))
    with pytest.raises(BaseModelError, match="off by"):
        prove_pooling(model, packed=True, pooling="mean")


def test_what_is_shown_of_few_texts_is_near_by_a_number(tmp_path: Path) -> None:
    """Of four texts with labels each has three others at most; itself is none of them."""
    finetune.train(recipe(tmp_path, vectors__loss=task.GROUPS, train__max_steps=1, **groups(tmp_path, 24)))
    rows = [{"text": text, "label": label} for text, label in (("red", "a"), ("blue", "a"), ("old", "b"))]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scored = labels.score(open_run(tmp_path / "run"), EvalOptions(Eval(resamples=100)), data=tmp_path / "few.jsonl")
    neighbours = scored["sides"]["adapter"]["neighbours"]
    assert [len(one["nearest"]) for one in neighbours] == [2, 2]
    assert all(-1.01 <= near["similarity"] <= 1.01 and near["text"] != one["query"]
               for one in neighbours for near in one["nearest"])  # fmt: skip
    json.loads(json.dumps(scored, default=str), parse_constant=pytest.fail)


def test_labels_are_numbered_by_a_table() -> None:
    """Not by a search through all of them, for each row of each step."""
    names = tuple(f"{n:05}" for n in range(20_000))
    objective, asked = TextVectors(task.VectorFields(loss=task.GROUPS), names), list[object]()

    class Name(str):
        def __eq__(self, other: object) -> bool:
            asked.append(other)
            return str(self) == other

        __hash__ = str.__hash__

    assert objective.number_of(Name("19999")) == 19_999 and objective.number_of("") == 0
    assert len(asked) < 10


def test_the_pooling_of_sentence_transformers_folder_is_taken(tmp_path: Path) -> None:
    """Where the recipe leaves it open: in training, of the run, of the base alone, in the folder that is written."""
    path = encoders.checkpoint(tmp_path / "model", "bert")
    (path / "1_Pooling").mkdir()
    (path / "modules.json").write_text("[]")

    def pools(**modes: object) -> None:
        (path / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64, **modes}))

    plain = AutoModel.from_pretrained(path).eval()
    ids = torch.tensor([encoders.tokenizer()("red cup").input_ids])
    hidden = plain(ids).last_hidden_state[0].detach()
    exact = ["quant.type=none", "quant.compute_dtype=fp32"]
    ways = {"cls": hidden[0], "lasttoken": hidden[-1], "mean": hidden.mean(0)}
    for pooling, wanted in ways.items():
        modes = {"cls_token": "cls", "lasttoken": "lasttoken", "mean_tokens": "mean", "max_tokens": "max"}
        pools(**{f"pooling_mode_{name}": mode == pooling for name, mode in modes.items()})
        (ours,) = vectors.of_texts(open_run(path, overrides=exact), ["red cup"])
        np.testing.assert_allclose(ours, torch.nn.functional.normalize(wanted, dim=0), atol=1e-5)
    pools(pooling_mode="cls")  # as later versions write it
    assert prepare(recipe(tmp_path).recipe).objective.settings.pooling == "cls"
    said = prepare(recipe(tmp_path, vectors__pooling="mean").recipe).recipe.vectors.pooling
    assert said == "mean", "the recipe has the last word"
    pools(pooling_mode_max_tokens=True)
    with pytest.raises(RecipeError, match=r"1_Pooling/config.json pools by max, which is not learned here"):
        prepare(recipe(tmp_path).recipe)
    (path / "1_Pooling" / "config.json").write_text("[")
    with pytest.raises(RecipeError, match=r"1_Pooling/config.json cannot be read"):
        prepare(recipe(tmp_path).recipe)


def test_a_download_brings_that_file_and_no_other_folder() -> None:
    names = ["config.json", "1_Pooling/config.json", "onnx/config.json", "original/x.py", "2_Dense/config.json"]
    kept = filter_repo_objects(names, allow_patterns=hub.NO_WEIGHTS, ignore_patterns=hub.NESTED)
    assert list(kept) == ["config.json", "1_Pooling/config.json"]

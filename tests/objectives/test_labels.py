"""Labels and numbers: what is learned is what transformers and PEFT learn, and what is saved opens there."""

from __future__ import annotations

import csv
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline
from transformers.loss.loss_utils import ForSequenceClassificationLoss

from halfbyte import finetune
from halfbyte.adapters import lora
from halfbyte.data.encoding import texts
from halfbyte.data.encoding.encoder import Encoder
from halfbyte.data.reading.formats import Row
from halfbyte.errors import BaseModelError, DataError, RecipeError, RunError
from halfbyte.inference import labels, prediction_file, target
from halfbyte.inference.labels import tags_of
from halfbyte.inference.load import Opened, open_run
from halfbyte.layers import heads, loss
from halfbyte.models.context import Context
from halfbyte.objectives.labels import Labels, Tags, entities
from halfbyte.proofs.heads import prove_pooling
from halfbyte.proofs.packing import prove_packing
from halfbyte.recipe.evaluation import Eval
from halfbyte.recipe.schema import Loaded
from halfbyte.report import page, record
from halfbyte.runs.folder import RunFolder
from halfbyte.scoring import labels as scoring
from halfbyte.scoring.sheet import EvalOptions
from halfbyte.training.prepare import prepare
from tests import tiny, tiny_run

HELD_OUT = 60  # enough for a temperature
WORDS = {"colour": ["red", "green", "blue"], "shape": ["round", "square"], "thing": ["cup", "box", "tree", "road"]}


def rows(path: Path, count: int = 16, seed: int = 0, label: Any = lambda name, text: name) -> Path:
    """Ragged texts of a few words, each with the name of what its words are."""
    draw, lines = random.Random(seed), []
    for _ in range(count):
        name = draw.choice(sorted(WORDS))
        text = " ".join(draw.choices(WORDS[name], k=draw.randint(1, 9)))
        lines.append({"text": text, "label": label(name, text)})
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(lines)
    else:
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def recipe(folder: Path, name: str = "llama", **changes: Any) -> Loaded:
    if not (folder / "model").exists():
        tiny_run.checkpoint(folder / "model", name)
    data = rows(folder / "rows.jsonl")
    settings = {
        "task": "classify",
        "data__train": data,
        "data__eval": "none",
        "quant__type": "none",
        "train__max_steps": 2,
    }
    return tiny_run.recipe(folder, **{**settings, **changes})


def plain_steps(loaded: Loaded) -> list[tuple[float, float]]:
    """Loss and norm of each step by transformers' class and PEFT, a text at a time."""
    train, prepared = loaded.recipe.train, prepare(loaded.recipe)
    names = sorted(WORDS)
    model = AutoModelForSequenceClassification.from_pretrained(loaded.recipe.model, num_labels=3, dtype=torch.float32)
    start = torch.Generator().manual_seed(train.seed)
    model.score.weight.data = torch.empty(model.score.weight.shape).normal_(
        0, model.config.initializer_range, generator=start
    )
    torch.manual_seed(train.seed)
    targets = list(
        lora.choose_targets(
            tiny.model(model.config.model_type.removesuffix("_text"), vocab_size=tiny_run.VOCAB), loaded.recipe.lora
        )[0].names
    )
    config = LoraConfig(
        r=loaded.recipe.lora.r, lora_alpha=loaded.recipe.lora.lora_alpha, target_modules=targets, task_type="SEQ_CLS"
    )
    model = get_peft_model(model, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=train.learning_rate, weight_decay=train.weight_decay)
    tokenizer = AutoTokenizer.from_pretrained(loaded.recipe.model)
    lines = [json.loads(line) for line in Path(loaded.recipe.data.train).read_text().splitlines()]
    order = list(range(len(prepared.train.examples)))
    random.Random(f"{train.seed}/0").shuffle(order)
    steps = []
    for i in range(train.max_steps):
        total = 0.0
        for row in order[i * train.rows_per_step : (i + 1) * train.rows_per_step]:
            ids = tokenizer(lines[row]["text"], return_tensors="pt").input_ids
            label = torch.tensor([names.index(lines[row]["label"])])
            part = model(input_ids=ids, labels=label).loss / train.rows_per_step
            part.backward()
            total += float(part.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(trained, train.max_grad_norm))
        optimizer.step()
        optimizer.zero_grad()
        steps.append((total, norm))
    return steps


@pytest.mark.parametrize(
    "name",
    ["llama", "gpt2", pytest.param("qwen3", marks=pytest.mark.slow), pytest.param("gemma3", marks=pytest.mark.slow)],
)
def test_steps_are_those_of_transformers_and_peft(name: str, tmp_path: Path) -> None:
    loaded = recipe(tmp_path, name, train__lr_scheduler_type="constant")
    finetune.train(loaded)
    ours = [(row["loss"], row["grad_norm"]) for row in RunFolder(tmp_path / "run").read_metrics() if "loss" in row]
    for got, wanted in zip(ours, plain_steps(loaded), strict=True):
        assert got == pytest.approx(wanted, rel=1e-5)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labels")
    finetune.train(
        recipe(
            folder,
            data__eval=str(rows(folder / "held.csv", HELD_OUT, seed=1)),
            quant__type="nf4",
            train__max_steps=6,
            train__learning_rate=5e-2,
        )
    )
    return folder / "run"


@pytest.fixture(scope="module")
def opened(run: Path) -> Opened:
    return open_run(run)


def test_a_run_opens_in_transformers_and_peft(tmp_path: Path) -> None:
    """Of a 16-bit base, as plain PEFT has no other: the same probabilities."""
    report = finetune.train(recipe(tmp_path)).report
    assert report["verdict"]["rows"].endswith(", where the base has a head drawn at random")
    adapter, base = tmp_path / "run" / "adapter", str(tmp_path / "model")
    model = AutoModelForSequenceClassification.from_pretrained(
        base, config=AutoConfig.from_pretrained(adapter / "head")
    )
    model = PeftModel.from_pretrained(model, str(adapter))
    assert model.peft_config["default"].task_type == "SEQ_CLS"
    texts = ["red blue", "box", "round square round"]
    wanted = pipeline(
        "text-classification", model=model.merge_and_unload(), tokenizer=AutoTokenizer.from_pretrained(base)
    )(texts, top_k=None)
    answers = labels.predictions(open_run(tmp_path / "run"), Labels.at(adapter), [(text,) for text in texts])
    for answer, each in zip(answers, wanted, strict=True):
        assert answer["probabilities"] == pytest.approx({one["label"]: one["score"] for one in each}, abs=1e-5)


def test_it_learns_and_is_scored(run: Path, opened: Opened) -> None:
    scored = labels.score(opened, EvalOptions(Eval(resamples=100), with_base=True))
    evaluated = [row for row in RunFolder(run).read_metrics() if "eval_accuracy" in row][-1]
    scores = scored["sides"]["adapter"]["scores"]
    assert scored["labels"] == tuple(sorted(WORDS))
    assert scores["accuracy"]["value"] == pytest.approx(evaluated["eval_accuracy"])
    assert scores["accuracy"]["value"] > scored["sides"]["base"]["scores"]["accuracy"]["value"]
    assert sum(map(sum, scored["sides"]["adapter"]["confusion"])) == scored["rows"] == HELD_OUT


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_predict_goes_on_where_it_was_ended(
    kind: str, opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = rows(tmp_path / "many.csv", 11, seed=3), tmp_path / f"out.{kind}"
    data.write_text(data.read_text() + '"  ",thing\n')  # a row without a text
    monkeypatch.setattr(prediction_file, "CHUNK_ROWS", 4)

    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        labels.predict(opened, data, out, stop)
    with (tmp_path / f"out.{kind}.partial").open("ab") as file:
        file.write(b'{"cut": ')
    assert not out.exists()
    done = labels.predict(opened, data, out)
    assert (done["rows"], done["resumed"], done["bad"]) == (12, 4, 1)
    lines = {
        "jsonl": lambda: [json.loads(line) for line in out.read_text().splitlines()],
        "csv": lambda: list(csv.DictReader(out.open())),
        "parquet": lambda: pyarrow.parquet.read_table(out).to_pylist(),
    }[kind]()
    given = list(csv.DictReader(data.open()))
    assert [line["text"] for line in lines] == [line["text"] for line in given]
    whole = labels.predictions(opened, Labels.at(opened.run / "adapter"), [(row["text"],) for row in given[:-1]])
    assert [line["prediction"] for line in lines[:-1]] == [one["prediction"] for one in whole]
    assert "many.csv:13" in lines[-1]["error"]
    assert list(tmp_path.glob("*partial*")) == []


def test_another_file_does_not_go_on(opened: Opened, tmp_path: Path) -> None:
    (tmp_path / "out.jsonl.partial").write_text('{"adapter": "other"}\n')
    with pytest.raises(DataError, match="of other rows, of another adapter or of other settings"):
        labels.predict(opened, rows(tmp_path / "a.csv", 2), tmp_path / "out.jsonl")


def test_other_settings_do_not_go_on(
    run: Path, opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was said by other columns or of longer texts is not gone on with; held-out rows play no part."""
    data, out = tmp_path / "a.jsonl", tmp_path / "out.jsonl"
    lines = [{"n": "box", "text": "red"}, {"n": "cup", "text": "\ud800"}, {"n": "old", "text": "blue", "p.thing": 7}]
    data.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"n": "x"}]))
    monkeypatch.setattr(prediction_file, "CHUNK_ROWS", 2)

    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        labels.predict(opened, data, out, stop)
    changes = "data.fields.text=n", "data.max_length=7", "data.overlong=truncate", "quant.placement=streamed"
    for recipe_ in (target.find(run, [change], ("classify",)).recipe for change in changes):
        with pytest.raises(DataError, match=r"of other rows, of another adapter or of other settings\."):
            labels.predict(replace(opened, recipe=recipe_), data, out)
    same = target.find(run, ["data.eval=none"], ("classify",)).recipe
    done = labels.predict(replace(opened, recipe=same), data, out)
    error = "a.jsonl:2: text: half a surrogate pair ('\\ud800') is not text"
    assert (done["rows"], done["resumed"], done["bad"], done["first_error"]) == (4, 2, 2, error), "an earlier bad row"
    got = [json.loads(line) for line in out.read_text().splitlines()]
    assert ["prediction" in row for row in got] == [True, False, True, False]
    assert got[1] == {**lines[1], "error": error} and got[3]["error"].startswith("a.jsonl:4: text: missing")
    assert got[2]["input.p.thing"] == 7 and "p.thing" not in got[2]


@pytest.mark.parametrize("kind", ["one", "several", "number"])
def test_losses_are_transformers_own(kind: str) -> None:
    draw = torch.Generator().manual_seed(0)
    objective = Labels() if kind == "number" else Labels(("a", "b", "c"), several=kind == "several")
    scores = torch.randn(5, objective.width, generator=draw)
    values = {
        "one": ["a", "c", "b", "b", "a"],
        "several": [["a", "b"], [], ["c"], ["b"], ["a"]],
        "number": [0.5, 1, -2, 3, "4"],
    }
    targets = objective.targets([json.dumps(value) for value in values[kind]])
    config = AutoConfig.for_model("llama", num_labels=objective.width, problem_type=objective.config["problem_type"])
    wanted = ForSequenceClassificationLoss(targets, scores, config)
    assert float(objective.losses(scores, targets).mean()) == pytest.approx(float(wanted), rel=1e-6)


def test_several_labels_and_numbers_train(tmp_path: Path) -> None:
    several = rows(tmp_path / "several.jsonl", label=lambda name, text: [name, "long"] if len(text) > 20 else [name])
    finetune.train(recipe(tmp_path, data__train=several, output=str(tmp_path / "a")))
    assert Labels.at(tmp_path / "a" / "adapter") == Labels(("colour", "long", "shape", "thing"), several=True)
    numbers = rows(tmp_path / "numbers.csv", label=lambda name, text: len(text))
    finetune.train(recipe(tmp_path, task="regress", data__train=numbers, output=str(tmp_path / "b")))
    assert Labels.at(tmp_path / "b" / "adapter").width == 1
    (answer,) = labels.predictions(open_run(tmp_path / "b"), Labels(), [("red", "blue")])
    assert isinstance(answer["prediction"], float)


def test_labels_that_no_training_row_has(tmp_path: Path) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text('{"text": "red", "label": "color"}\n{"text": "cup", "label": "smell"}\n')
    with pytest.raises(
        DataError, match=r"2 labels of the held-out rows .*'color' \(held.jsonl:1\), 'smell' \(held.jsonl:2\)"
    ):
        prepare(recipe(tmp_path, data__eval=str(held)).recipe)
    with pytest.raises(DataError, match="labels of the training rows are not among colour, shape"):
        prepare(recipe(tmp_path, labels=["colour", "shape"]).recipe)
    with pytest.raises(DataError, match="no numbers") as of_texts:
        prepare(recipe(tmp_path, task="regress").recipe)
    assert of_texts.value.fix == "write numbers in that column (data.fields.label), or task: classify"
    held.write_text('{"text": "red", "label": ["colour", "shape"]}\n{"text": "cup", "label": []}\n')
    with pytest.raises(
        DataError, match=r"2 labels of the held-out .*'\[\"colour\", \"shape\"\]' \(held.jsonl:1\), '\[\]'"
    ):
        prepare(recipe(tmp_path, data__eval=str(held)).recipe)
    held.write_text('{"text": "red", "label": [1.5, -1.5]}\n' * 4)
    with pytest.raises(DataError, match="labels of the training rows are no numbers"):
        prepare(recipe(tmp_path, task="regress", data__train=str(held), data__eval="none").recipe)


@pytest.mark.parametrize(("known", "words"), [((), True), (("tokens", "tags"), True), (("text", "spans"), False)])
def test_which_form_tags_were_learned_in(
    known: tuple[str, ...], words: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a hub dataset no columns are known before it is read."""
    monkeypatch.setattr("halfbyte.data.reading.read.columns", lambda *_: known)
    tiny_run.checkpoint(tmp_path / "model")
    path = tmp_path / "tags.jsonl"
    path.write_text('{"tokens": ["red", "cup"], "tags": ["B-x", "O"]}\n' * 8)
    loaded = tiny_run.recipe(tmp_path, task="tag", data__train=path, data__eval="none", quant__type="none")
    objective = prepare(loaded.recipe).objective
    assert isinstance(objective, Tags) and objective.words is words


def test_a_text_is_cut_into_words_where_the_rows_gave_words(tmp_path: Path) -> None:
    """What is said of `  red\\tcup ` is what is said of its words, by their characters."""
    tiny_run.checkpoint(tmp_path / "model")
    path, said = tmp_path / "tags.jsonl", []
    given = [{"tokens": ["reddish", "cup"], "tags": ["B-x", "O"]}, {"tokens": ["cup", "reddish"], "tags": ["O", "B-x"]}]
    spans = [{"text": "reddish cup", "spans": [{"start": 0, "end": 7, "label": "x"}]}] * 2
    for lines in (given, spans):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines * 8))
        more = {
            "data__train": path,
            "data__eval": "none",
            "quant__type": "none",
            "output": tmp_path / f"run{len(said)}",
        }
        finetune.train(tiny_run.recipe(tmp_path, task="tag", train__learning_rate=0.03, train__max_steps=30, **more))
        opened = open_run(more["output"])
        objective = Labels.at(more["output"] / "adapter")
        assert isinstance(objective, Tags) and objective.words is (lines is given)
        texts = [("  reddish\tcup ",), ("cup reddish",)]
        said.append([answer["entities"] for answer in tags_of(opened, objective, texts, [False, False])])
    assert [[(e["start"], e["end"], e["text"]) for e in answer] for answer in said[0]] == [
        [(2, 9, "reddish")], [(4, 11, "reddish")],
    ]  # fmt: skip
    assert all(entity["label"] == "x" for answer in said[0] for entity in answer)


def test_what_a_task_refuses(run: Path, tmp_path: Path) -> None:
    for change in (
        {"data__mask": "all"},
        {"train__within": "1h"},
        {"quant__compute": "int8"},
        {"task": "regress", "class_weight": "balanced"},
        {"data__format": "text"},
    ):
        with pytest.raises(RecipeError):
            recipe(tmp_path, **change)
    with pytest.raises(RunError, match="task classify"):
        target.find(run)


def test_a_head_that_reads_its_neighbour_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    heads.attach(model, 3, seed=0)
    prove_packing(model)
    assert "as alone" in prove_pooling(model, packed=True)
    right = loss.labelled_hidden
    monkeypatch.setattr(
        loss, "labelled_hidden", lambda m, batch: right(m, {**batch, "keep": (batch["keep"] - 1).clamp_min(0)})
    )
    with pytest.raises(BaseModelError, match="off by"):
        prove_pooling(model, packed=True)


def test_a_temperature_is_found_again() -> None:
    """Labels drawn by probabilities at a temperature: scores divided by it are calibrated, and are not without."""
    draw = np.random.default_rng(0)
    scores = 2 * draw.standard_normal((4000, 4))
    p = scoring.probabilities(scores, several=False)
    truth = (p.cumsum(1) < draw.random((4000, 1))).sum(1).clip(max=3)
    sharp = scoring.probabilities(3 * scores, several=False)
    scored = scoring.of_labels(sharp, truth[:, None] == np.arange(4), Eval(resamples=100), several=False)
    assert scored["temperature"] == pytest.approx(3, rel=0.1)
    assert scored["scores"]["ece"]["value"] > 0.1
    cool = scoring.probabilities(3 * scores, several=False, temperature=scored["temperature"])
    again = scoring.of_labels(cool, truth[:, None] == np.arange(4), Eval(resamples=100), several=False)
    assert again["scores"]["ece"]["value"] < 0.03
    several = scoring.probabilities(2.0 * scores, several=True)
    drawn = draw.random(scores.shape) < scoring.probabilities(scores, several=True)
    scored = scoring.of_labels(several, drawn, Eval(resamples=100), several=True)
    assert scored["temperature"] == pytest.approx(2, rel=0.1)
    assert scored["scores"]["ece_calibrated"]["value"] < 0.03 < scored["scores"]["ece"]["value"]


def test_calibration_is_measured_on_rows_that_it_was_not_fitted_on() -> None:
    """Labels that have nothing to do with scores, 60 rows: the best temperature of these rows makes them look
    calibrated, that of other rows does so less. By hand: each half at the temperature that a fine grid finds on the
    other half."""
    draw = np.random.default_rng(3)
    scores, truth = 3 * draw.standard_normal((60, 3)), draw.integers(0, 3, 60)
    every = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)

    def cooled(heat: float) -> Any:
        powers = np.exp(np.log(every) / heat)
        return powers / powers.sum(1, keepdims=True)

    def loss_of(heat: float, chosen: Any) -> float:
        return -float(np.log(cooled(heat)[chosen, truth[chosen]]).mean())

    grid = np.exp(np.linspace(-4, 4, 4001))
    half = np.random.default_rng(0).permutation(60) % 2 == 0
    calibrated = every.copy()
    for part in (half, ~half):
        best = grid[np.argmin([loss_of(heat, np.flatnonzero(~part)) for heat in grid])]
        calibrated[part] = cooled(best)[part]
    right, sure = every.argmax(1) == truth, calibrated.max(1)
    wanted = sum(abs(sure[b].sum() - right[b].sum()) for k in range(15) for b in [(sure * 15).astype(int) == k]) / 60
    scored = scoring.of_labels(every, truth[:, None] == np.arange(3), Eval(resamples=100, seed=0), several=False)
    assert scored["scores"]["ece_calibrated"]["value"] == pytest.approx(wanted, abs=0.01)
    few = scoring.of_labels(every[:49], truth[:49, None] == np.arange(3), Eval(resamples=100), several=False)
    assert few["temperature"] is None and "ece_calibrated" not in few["scores"]


@pytest.mark.parametrize("few", [0, 256])
def test_intervals_are_of_resampled_rows_one_after_another(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each resample by itself, each pair of rows counted: the same limits. Ties, and a label that few rows have."""
    monkeypatch.setattr(scoring, "FEW", few)
    draw = np.random.default_rng(5)
    every = np.round(draw.dirichlet([1, 1, 1], 30), 1)
    truth = np.array([0] * 14 + [1] * 14 + [2] * 2)[:, None] == np.arange(3)
    answers = every.argmax(1)[:, None] == np.arange(3)

    def area(rows_: Any) -> float:
        found = []
        for i in range(3):
            ours, others = every[rows_][truth[rows_][:, i], i], every[rows_][~truth[rows_][:, i], i]
            if len(ours) and len(others):
                found.append(np.mean([float(a > b) + (a == b) / 2 for a in ours for b in others]))
        return float(np.mean(found))

    def f1(rows_: Any) -> float:
        both = [(answers[rows_][:, i], truth[rows_][:, i]) for i in range(3)]
        return float(np.mean([2 * (a & t).sum() / max(1, a.sum() + t.sum()) for a, t in both]))

    def ece(rows_: Any) -> float:
        sure, right = every[rows_].max(1), (answers & truth).any(1)[rows_]
        bins = np.minimum((sure * 15).astype(int), 14)
        return sum(abs(sure[bins == b].sum() - right[bins == b].sum()) for b in range(15)) / 30

    scores = scoring.of_labels(every, truth, Eval(resamples=200, seed=7), several=False)["scores"]
    for name, measure in (("auroc", area), ("f1_macro", f1), ("ece", ece)):
        again = np.random.default_rng(7)
        values = [measure(again.integers(0, 30, 30)) for _ in range(200)]
        assert scores[name]["value"] == pytest.approx(measure(np.arange(30))), name
        assert scores[name]["interval"] == pytest.approx(np.percentile(values, [2.5, 97.5])), name
    a, b = np.round(draw.random((2, 30)), 1)

    def spearman(rows_: Any) -> float:
        ranks = [[(x[rows_] < v).sum() + ((x[rows_] == v).sum() + 1) / 2 for v in x[rows_]] for x in (a, b)]
        return float(np.corrcoef(*ranks)[0, 1])

    again = np.random.default_rng(7)
    values = [spearman(again.integers(0, 30, 30)) for _ in range(200)]
    got = scoring.spearman(a, b, Eval(resamples=200, seed=7))
    assert got["value"] == pytest.approx(spearman(np.arange(30)))
    assert got["interval"] == pytest.approx(np.percentile(values, [2.5, 97.5]))
    assert scoring.spearman(a, np.ones(30), Eval(resamples=100))["value"] == 0


def test_entities_by_hand() -> None:
    """Two texts. Said: the person at 0-1 (right), a place at 3 that is a person, a place at 5-6 that goes on to 7;
    in the second a place (right), and one more. There: four, of which one is not said at all."""
    there = ["B-per", "I-per", "O", "B-per", "O", "B-loc", "I-loc", "I-loc"], ["B-loc", "O", "O"]
    said = ["B-per", "I-per", "O", "B-loc", "O", "B-loc", "I-loc", "O"], ["B-loc", "O", "B-loc"]
    assert entities(there[0]) == {("per", 0, 1), ("per", 3, 3), ("loc", 5, 7)}
    assert entities(said[0]) == {("per", 0, 1), ("loc", 3, 3), ("loc", 5, 6)}
    assert entities(["I-a", "I-a", "B-a", "O", "S-b", "E-b", "x", "x"]) == {
        ("a", 0, 1), ("a", 2, 2), ("b", 4, 4), ("b", 5, 5), ("x", 6, 7)
    }  # fmt: skip
    texts = [
        scoring.Tagged(entities(b), entities(a), sum(map(str.__eq__, a, b)), len(a))
        for a, b in zip(there, said, strict=True)
    ]
    scored = scoring.of_entities(texts, Eval(resamples=100))
    values = {name: one["value"] for name, one in scored["scores"].items()}
    # right 2, said 5, there 4; tags: 6 of 8 and 2 of 3
    assert values == pytest.approx({"f1": 2 * 2 / 9, "precision": 2 / 5, "recall": 2 / 4, "accuracy": 8 / 11})
    by_kind = dict(zip(scored["labels"], scored["by_label"], strict=True))
    assert by_kind["per"] == pytest.approx({"rows": 2, "f1": 2 / 3, "precision": 1.0, "recall": 1 / 2})
    assert by_kind["loc"] == pytest.approx({"rows": 2, "f1": 1 / 3, "precision": 1 / 4, "recall": 1 / 2})
    sums = {"loss": 22.0, "tags": 11, "right": 8, "found": 2, "said": 5, "there": 4, "tokens": 11}
    assert Tags(("O", "B-per")).scores(sums) == pytest.approx(
        {"loss": 2.0, "accuracy": 8 / 11, "f1": 4 / 9, "tokens": 11}
    )


@pytest.mark.parametrize("asked", ["balanced", {"shape": 3.0, "thing": 0.25}])
def test_class_weights_are_torchs(asked: Any, tmp_path: Path) -> None:
    """The weighted mean of a step, and its gradient, as torch's own loss has it with reduction mean; smoothing too.
    `balanced` is rows / (labels x rows of the label), counted here."""
    prepared = prepare(recipe(tmp_path, class_weight=asked, train__label_smoothing_factor=0.1).recipe)
    objective, names = prepared.objective, sorted(WORDS)
    lines = [json.loads(line)["label"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    weights = [len(lines) / (3 * lines.count(n)) if asked == "balanced" else asked.get(n, 1.0) for n in names]
    assert objective.class_weight == pytest.approx(weights)
    scores = torch.randn(len(lines), 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    truth = torch.tensor([names.index(line) for line in lines])
    theirs = torch.nn.CrossEntropyLoss(weight=torch.tensor(weights), label_smoothing=0.1)(scores, truth)
    targets = objective.targets([e.completion for e in prepared.train.examples])
    each = objective.losses(scores, targets, objective.label_smoothing, objective.class_weight)
    ours = each.sum() / float(objective.weights(prepared.train).sum())
    assert float(ours) == pytest.approx(float(theirs), rel=1e-6)
    for one, other in zip(*(torch.autograd.grad(loss_, scores) for loss_ in (ours, theirs)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    batch = objective.collate(prepared.train.examples[:5])
    assert objective.weight(batch) == pytest.approx(sum(weights[names.index(name)] for name in lines[:5]))


def test_a_row_of_no_token_has_an_error_and_the_others_their_answers(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = texts.tokens_of

    def none(tokenizer: Any, asked: Any, cut: int | None = None) -> Any:
        return [
            ([], []) if text == ("ghost",) else one
            for text, one in zip(asked, real(tokenizer, asked, cut), strict=True)
        ]

    monkeypatch.setattr(texts, "tokens_of", none)
    (tmp_path / "a.csv").write_text("text,error\nred,mine\nghost,\nbox,\ncup,\n")
    done = labels.predict(opened, tmp_path / "a.csv", tmp_path / "out.jsonl")
    assert (done["rows"], done["bad"]) == (4, 1)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert lines[1]["error"] == "a.csv:3: a text of which the tokenizer makes no token: 'ghost'."
    others = labels.predictions(opened, Labels.at(opened.run / "adapter"), [("red",), ("box",), ("cup",)])
    assert [line["prediction"] for n, line in enumerate(lines) if n != 1] == [one["prediction"] for one in others]
    assert lines[0]["input.error"] == "mine" and "error" not in lines[0], "a column of the file"
    encoded = Encoder(opened.tokenizer, opened.recipe.data)
    part, tally = encoded.encode(
        [Row("t:1", parts=("ghost",), completion='"a"'), Row("t:2", parts=("red",), completion='"a"')]
    )
    assert part.num_rows == 1 and "t:1: a text of which the tokenizer makes no token" in tally.skipped.first()


def test_tags_need_a_fast_tokenizer(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(opened.tokenizer), "is_fast", False)
    with pytest.raises(DataError, match=r"task tag needs a fast tokenizer \(tokenizer.json\), and this one is slow"):
        texts.tagged(opened.tokenizer, ("red",), words=True, cut=None)


def test_scores_are_scikit_learns() -> None:
    theirs = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(1)
    every = np.round(draw.dirichlet([1, 1, 1], 60), 1)
    truth = draw.integers(0, 3, 60)
    values = scoring.of_labels(every, truth[:, None] == np.arange(3), Eval(resamples=100), several=False)
    area = np.mean([theirs.roc_auc_score(truth == i, every[:, i]) for i in range(3)])
    assert values["scores"]["auroc"]["value"] == pytest.approx(area)
    assert values["scores"]["f1_macro"]["value"] == pytest.approx(
        theirs.f1_score(truth, every.argmax(1), average="macro")
    )
    stats = pytest.importorskip("scipy.stats")
    a, b = np.round(draw.random((2, 40)), 1)
    assert scoring.spearman(a, b, Eval(resamples=100))["value"] == pytest.approx(stats.spearmanr(a, b).statistic)


def likeliest(folder: Path, lines: list[dict[str, str]]) -> tuple[list[str], list[int]]:
    """The label of each row that plain transformers finds the likeliest answer, its end with it, to the question; and
    the tokens of the longest of these."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asks, chosen, lengths = "Which of these fits it best: colour, shape, thing? Answer with that alone.", [], []
    for line in lines:
        talk = f"<|im_start|>user\n{line['text']}\n\n{asks}<|im_end|>\n<|im_start|>assistant\n"
        prompt, of_label = tokenizer(talk).input_ids, {}
        answers = {name: tokenizer(name).input_ids + tokenizer("<|im_end|>").input_ids for name in sorted(WORDS)}
        lengths.append(len(prompt) + max(map(len, answers.values())) + 1)  # and a line's end
        for name, answer in answers.items():
            with torch.no_grad():
                logp = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            of_label[name] = sum(float(logp[len(prompt) + i - 1, token]) for i, token in enumerate(answer))
        chosen.append(max(of_label, key=of_label.__getitem__))
    return chosen, lengths


@pytest.mark.parametrize("overlong", ["error", "skip", "truncate"])
def test_the_base_chooses_by_likelihood(overlong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the head: the label that the base alone finds likeliest, as plain transformers has it of one row. Rows may
    have 32 tokens, and a row with its question has more; of one that the model cannot read no label is likelier."""
    held = rows(tmp_path / "held.jsonl", 12, seed=1)
    more = {"data__max_length": 32, "data__overlong": overlong, "train__max_steps": 1}
    finetune.train(recipe(tmp_path, data__eval=str(held), **more))
    opened, options = open_run(tmp_path / "run"), EvalOptions(Eval(resamples=100), with_base=True)
    scored = labels.score(opened, options)
    base, lines = scored["sides"]["base"], [json.loads(line) for line in held.read_text().splitlines()]
    assert base["by_likelihood"] and not scored["sides"]["adapter"]["by_likelihood"]
    (chosen, lengths), names = likeliest(tmp_path / "model", lines), sorted(WORDS)
    both = [(line["label"], name) for line, name in zip(lines, chosen, strict=True)]
    assert base["confusion"] == [[both.count((a, b)) for b in names] for a in names] and base["not_asked"] == 0
    assert [m["prediction"] for m in base["mistakes"]] != [] and all(m["text"] for m in base["mistakes"])
    most = sorted(lengths)[6]
    monkeypatch.setattr(labels, "context_of", lambda config: Context(most, "as it is here"))
    short = labels.score(opened, options)["sides"]["base"]
    assert short["not_asked"] == sum(length > most for length in lengths) > 0
    asked = [(pair if length <= most else (pair[0], "colour")) for pair, length in zip(both, lengths, strict=True)]
    assert short["confusion"] == [[asked.count((a, b)) for b in names] for a in names]


def test_a_run_at_its_temperature(run: Path, opened: Opened) -> None:
    with pytest.raises(DataError, match="has no temperature of its adapter"):
        labels.temperature_of(run)
    scored = labels.score(opened, EvalOptions(Eval(resamples=100)))
    (run / "eval").mkdir()
    (run / "eval" / "scores.json").write_text(json.dumps(scored, default=str))
    heat, objective = labels.temperature_of(run), Labels.at(run / "adapter")
    assert heat != 1
    assert heat == scored["sides"]["adapter"]["temperature"]
    plain, cool = (labels.predictions(opened, objective, [("red",)], t)[0]["probabilities"] for t in (1.0, heat))
    wanted = np.array([*plain.values()]) ** (1 / heat)
    assert [*cool.values()] == pytest.approx(wanted / wanted.sum())
    html = page.html(record.read(run))
    assert "Rows by label (down) and prediction (across)" in html and "How often it is right" in html


def test_scores_by_definition() -> None:
    """Accuracy, macro F1, calibration error and confusion of ten rows, counted by hand."""
    draw = np.random.default_rng(0)
    every = draw.dirichlet([1, 1, 1], 10)
    truth = draw.integers(0, 3, 10)
    scored = scoring.of_labels(every, truth[:, None] == np.arange(3), Eval(resamples=100), several=False)
    answers = every.argmax(1)
    f1 = [
        2 * ((answers == i) & (truth == i)).sum() / max(1, (answers == i).sum() + (truth == i).sum()) for i in range(3)
    ]
    ece = sum(
        abs(every.max(1)[bin_ == b].sum() - (answers == truth)[bin_ == b].sum()) / 10
        for bin_ in [np.minimum((every.max(1) * 15).astype(int), 14)] for b in range(15)
    )  # fmt: skip
    values = {name: score["value"] for name, score in scored["scores"].items()}
    area = [
        np.mean([float(a > b) + (a == b) / 2 for a in every[truth == i, i] for b in every[truth != i, i]])
        for i in range(3)
    ]
    wanted = {"accuracy": (answers == truth).mean(), "f1_macro": np.mean(f1), "ece": ece, "auroc": np.mean(area)}
    assert {name: values[name] for name in wanted} == pytest.approx(wanted)
    assert values["f1_micro"] == pytest.approx(values["accuracy"])
    assert sum(one["count"] for one in scored["reliability"]) == 10
    assert scored["confusion"] == [[int(((truth == i) & (answers == j)).sum()) for j in range(3)] for i in range(3)]

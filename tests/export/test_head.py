"""`halfbyte merge` of a run with a head: transformers' own class and pipeline give the run's answers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer, pipeline

from halfbyte import finetune
from halfbyte.errors import ExportError, RunError
from halfbyte.export import export, head, hub
from halfbyte.export.job import ExportJob
from halfbyte.inference import labels
from halfbyte.inference.load import open_run
from halfbyte.recipe.schema import Loaded
from tests import encoders, tiny_run

pytestmark = pytest.mark.usefixtures("forked_children")
CLOSE = 1e-5
TEXTS = ["red blue", "box", "round square round", "old road red"]


def recipe(folder: Path, name: str, task: str, **changes: Any) -> Loaded:
    """A few coarse steps, so that head and adapter are far from where they began."""
    save = encoders.checkpoint if name in encoders.NAMES else tiny_run.checkpoint
    if not (folder / "model").exists():
        save(folder / "model", name)
    draw, lines = random.Random(0), list[dict[str, Any]]()
    for _ in range(24):
        words = draw.sample(["red", "blue", "cup", "box", "old", "road"], 3)
        value = {"label": "abc"["rbo".find(words[0][0])]}
        if task == "regress":
            value = {"text_pair": words[-1], "label": draw.random()}
        lines.append({"text": " ".join(words), **value})
        if task == "tag":
            lines[-1] = {"tokens": words, "tags": ["B-x" if word in ("red", "box") else "O" for word in words]}
        elif task == "several":
            lines[-1]["label"] = sorted({lines[-1]["label"], "long"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = {"task": "classify" if task == "several" else task, "data__train": folder / "rows.jsonl",
              "data__eval": "25%", "quant__type": "none", "train__max_steps": 4}  # fmt: skip
    if task == "regress":
        values["data__fields"] = {"text_pair": "text_pair"}
    return tiny_run.recipe(folder, **{**values, **changes})


def run(folder: Path, name: str, task: str, **changes: Any) -> Path:
    finetune.train(recipe(folder, name, task, **changes))
    return folder / "run"


def scores(path: Path, texts: Any, auto: Any = AutoModelForSequenceClassification) -> torch.Tensor:
    """By transformers alone, a text at a time."""
    model, tokenizer = auto.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    with torch.no_grad():
        every = [model(**tokenizer(*text, return_tensors="pt")).logits[0] for text in texts]
    return torch.cat([one.reshape(-1, one.shape[-1]) for one in every])


@pytest.mark.parametrize(
    "name", ["llama", "bert", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gpt2", "modernbert", "qwen3"))]
)
def test_the_pipeline_gives_the_runs_probabilities(name: str, tmp_path: Path) -> None:
    where = run(tmp_path, name, "classify")
    seen = export.merge(ExportJob(where))
    assert seen.path == where / "merged" and "rounding explains" in seen.notes[-1]
    assert 'pipeline("text-classification", model=FOLDER)' in (seen.path / "README.md").read_text()
    wanted = pipeline("text-classification", model=str(seen.path))(TEXTS, top_k=None)
    opened = open_run(where)
    answers = labels.predictions(opened, labels.objective_of(opened), [(text,) for text in TEXTS])
    for answer, each in zip(answers, wanted, strict=True):
        assert answer["probabilities"] == pytest.approx({one["label"]: one["score"] for one in each}, abs=CLOSE)
    names = load_file(seen.path / "model.safetensors").keys()
    assert not [name for name in names if "lm_head" in name or name.startswith("cls.")]
    with hub.folder_of(where) as pushed:  # a run's adapter and its head
        assert "text-classification" in (pushed / "README.md").read_text() and (pushed / "head/config.json").is_file()


@pytest.mark.parametrize(("name", "task"), [("llama", "several"), ("llama", "regress"), ("bert", "regress")])
def test_several_labels_and_numbers_of_pairs(name: str, task: str, tmp_path: Path) -> None:
    """A reranker is the second: of a pair BERT's second text has its own type."""
    where = run(tmp_path, name, task)
    texts = [(text, "cup") if task == "regress" else (text,) for text in TEXTS]
    got = scores(export.merge(ExportJob(where)).path, texts)
    opened = open_run(where)
    answers = labels.predictions(opened, labels.objective_of(opened), texts)
    if task == "regress":
        assert got[:, 0].tolist() == pytest.approx([one["prediction"] for one in answers], abs=CLOSE)
    else:
        for answer, each in zip(answers, got.sigmoid().tolist(), strict=True):
            assert [*answer["probabilities"].values()] == pytest.approx(each, abs=CLOSE)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_tags(name: str, tmp_path: Path) -> None:
    where = run(tmp_path, name, "tag")
    merged = export.merge(ExportJob(where)).path
    opened = open_run(where)
    model = AutoModelForTokenClassification.from_pretrained(merged).eval()
    tokenizer = AutoTokenizer.from_pretrained(merged)
    (answer,) = labels.answers_of(opened, labels.objective_of(opened), [("red", "cup", "box")], [True])
    given = tokenizer("red cup box", return_tensors="pt")
    with torch.no_grad():
        best = model(**given).logits[0].argmax(-1).tolist()
    starts = [given.char_to_token(at + 1) for at in (0, 4, 8)]  # a token may begin with the space
    assert [model.config.id2label[best[at]] for at in starts] == answer["tags"]


@pytest.mark.parametrize("base", ["16bit", "4bit"])
def test_a_quantised_run_is_merged_into_either_weights(base: Any, tmp_path: Path) -> None:
    """Into those that were trained on, dequantised, it answers as the run does; `auto` takes these."""
    where = run(tmp_path, "llama", "classify", quant__type="nf4")
    seen = export.merge(ExportJob(where), base)
    assert seen.base == base and "rounding explains" in seen.notes[-1]
    opened = open_run(where)
    answers = labels.predictions(opened, labels.objective_of(opened), [(text,) for text in TEXTS])
    wanted = torch.tensor([[*one["probabilities"].values()] for one in answers])
    off = float((scores(seen.path, [(text,) for text in TEXTS]).softmax(-1) - wanted).abs().max())
    assert (off < CLOSE) is (base == "4bit")
    if base == "4bit":
        assert export.merge(ExportJob(where, tmp_path / "auto", prove=False)).base == "4bit"


def test_a_head_that_is_another_one_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where, right = run(tmp_path, "llama", "classify"), head.run_child

    def spoil(module: list[str], doing: str) -> None:
        place = Path(json.loads(Path(module[-1]).read_text())["place"])
        state = load_file(place / "model.safetensors")
        state["score.weight"] = state["score.weight"].roll(1, 0)
        save_file(state, place / "model.safetensors", metadata={"format": "pt"})
        right(module, doing)

    monkeypatch.setattr(head, "run_child", spoil)
    with pytest.raises(ExportError, match="scores of 6 rows by transformers differ by"):
        export.merge(ExportJob(where))
    assert not (where / "merged").exists()


def test_what_a_head_is_not_exported_to(tmp_path: Path) -> None:
    where = run(tmp_path, "llama", "classify")
    with pytest.raises(RunError, match="of task classify"):
        export.to_gguf(ExportJob(where), "Q8_0")
    with pytest.raises(ExportError, match="not quantised again"):
        export.merge(ExportJob(where), quantise=True)

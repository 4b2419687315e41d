"""`halfbyte init --for NAME`: each preset fits rows of its kind, and what is said of it was measured."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import yaml
from benchmarks import presets as measured

from halfbyte.data.reading import read
from halfbyte.recipe.file import load_recipe
from halfbyte.recipe.start import START, preset, presets
from tests import tiny_run
from tests.in_process import Cli

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", presets())
def test_a_preset_fits_rows_of_its_kind(halfbyte: Cli, name: str) -> None:
    """What `init` writes passes `data check` and has the preset's values."""
    rows = measured.write(name, Path())
    short = list(islice(rows.open(encoding="utf-8"), 13))
    rows.write_text("".join(short), encoding="utf-8")
    ended = halfbyte("init", "r.yaml", "--model=model", f"--data={rows}", f"--for={name}")
    assert ended.code == 0 and f"for {name}: " in ended.out, ended
    written = yaml.safe_load(Path("r.yaml").read_text(encoding="utf-8"))
    for field, value in preset(name).values.items():
        section, _, key = field.rpartition(".")
        assert (written[section] if section else written)[key] == value, field
    loaded = load_recipe(Path("r.yaml")).recipe
    read.look(loaded.data.train, loaded.data)


@pytest.mark.parametrize(("given", "loss"), [((), "BatchAll"), (("--set=vectors.loss=CoSENTLoss",), "CoSENT")])
def test_texts_with_a_label_get_the_loss_that_reads_them(halfbyte: Cli, given: tuple[str, ...], loss: str) -> None:
    Path("rows.csv").write_text("text,label\n" + "red cup,a\nold road,b\n" * 6)
    assert halfbyte("init", "r.yaml", "--model=model", "--data=rows.csv", "--for=embed", *given).code == 0
    assert yaml.safe_load(Path("r.yaml").read_text())["vectors"]["loss"].startswith(loss)
    assert halfbyte("data", "check", "r.yaml").code == (2 if given else 0)


def test_every_kind_is_there_and_its_figures_are_on_the_page() -> None:
    assert set(presets()) == {"tickets", "json", "chat", "style", "tools", "classify", "embed"}
    page = (ROOT / "docs" / "presets.md").read_text(encoding="utf-8")
    for name in presets():
        start = preset(name)
        assert f"| `{name}` | {start.what} | {start.rows} | {start.measured or 'not yet'} |" in page
        assert not start.measured or (" s; " in start.measured and "held-out rows" in start.measured)


def test_what_is_set_is_stronger_than_a_preset_and_that_than_the_start(halfbyte: Cli) -> None:
    tiny_run.rows(Path("train.jsonl"))
    words = ("--for", "style", "--set", "train.num_train_epochs=5", "--set", "data.fields={prompt: prompt}")
    ended = halfbyte("init", "--model=model", *words)
    assert ended.code == 0, ended
    recipe = load_recipe(Path("recipe.yaml")).recipe
    assert recipe.train.num_train_epochs == 5 and recipe.train.per_device_train_batch_size == 8
    assert recipe.train.learning_rate == START["train.learning_rate"].value


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--for", "poems"), "--for poems: there is no such preset; allowed: chat, classify, embed, json"),
        (("--set", "train.nothing=1"), "train.nothing"),
        (("--set", "lora.r=0"), "lora.r"),
        (("--for", "classify", "--data", "pairs.jsonl"), "pairs.jsonl"),
    ],
)
def test_what_cannot_be_writes_nothing(halfbyte: Cli, words: tuple[str, ...], said: str) -> None:
    Path("pairs.jsonl").write_text('{"a": 1.5, "b": [2]}\n' * 3)
    tiny_run.rows(Path("train.jsonl"))
    ended = halfbyte("init", "--model=model", *words)
    assert ended.code == 2 and said in ended.err, ended
    assert not Path("recipe.yaml").exists()


def test_columns_of_other_names_become_those_of_the_task(halfbyte: Cli) -> None:
    Path("train.csv").write_text("id,body,topic\n" + "".join(f"{n},red cup {n},{'ab'[n % 2]}\n" for n in range(12)))
    assert halfbyte("init", "--model=model", "--data=train.csv", "--for=classify").code == 0
    fields = load_recipe(Path("recipe.yaml")).recipe.data.fields
    assert (fields.text, fields.label) == ("body", "topic")

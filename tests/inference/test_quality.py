"""The quality of a base in each number format: errors as numpy has them, losses as plain transformers has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from typer.testing import CliRunner

from halfbyte.base.quantize import quantize
from halfbyte.base.store import shelf
from halfbyte.cli.main import app
from halfbyte.errors import DataError, StoreError
from halfbyte.inference import quality
from halfbyte.recipe.schema import Loaded
from tests import tiny_run
from tests.base import dequantised

MAX = 32
NAMES = ["fp32", "int8", "nf4", "nf4 double", "fp4"]
# What each format is for plain transformers.
PLAIN: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
}


def asked(folder: Path, **more: Any) -> Loaded:
    return tiny_run.recipe(folder, data__max_length=MAX, **more)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def measured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, quality.Report]:
    """A model and its report on a plain text of several windows."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_run.checkpoint(folder / "model", request.param)
    loaded = asked(folder)
    text = folder / "text.txt"
    text.write_text("a red cup and a small green tree on the old road " * 9)
    return folder, quality.measure(loaded.recipe, text, store=quantize(loaded.recipe).path)


def held(folder: Path, name: str, store: Path) -> dict[str, torch.Tensor]:
    """The dequantised weights of a format, quantised by plain transformers while it loads."""
    config = BitsAndBytesConfig(**PLAIN[name])
    made = AutoModelForCausalLM.from_pretrained(
        folder / "model", quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    )
    made.save_pretrained(store)
    return dequantised.weights(store)


def plain_loss(model: Any, ids: list[int], window: int) -> float:
    """Mean over every token but the first of each window, one window at a time, by transformers' own loss."""
    total, count = 0.0, 0
    for first in range(0, len(ids), window):
        piece = torch.tensor([ids[first : first + window]])
        if piece.shape[1] > 1:
            with torch.no_grad():
                total += float(model(input_ids=piece, labels=piece).loss) * (piece.shape[1] - 1)
            count += piece.shape[1] - 1
    return total / count


def test_errors_and_losses_are_those_of_plain_transformers_on_dequantised_weights(
    measured: tuple[Path, quality.Report], tmp_path: Path
) -> None:
    folder, report = measured
    assert [row.name for row in report.formats] == NAMES
    plain, tokenizer = (kind.from_pretrained(folder / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    ids = [*tokenizer((folder / "text.txt").read_text()).input_ids, tokenizer.eos_token_id]
    assert report.tokens == len(ids) and report.labelled_tokens == len(ids) - -(-len(ids) // MAX)
    for row in report.formats:
        weights = held(folder, row.name, tmp_path / row.name) if row.name != "fp32" else {}
        # two orders of the same fp32 sums
        assert row.loss == pytest.approx(plain_loss(dequantised.of(plain, weights), ids, MAX), rel=2e-5), row.name
        assert row.perplexity == pytest.approx(np.exp(row.loss))
        assert row.errors.keys() == weights.keys()
        lost = {n: (dequantised.source(plain, n) - w).double().numpy() for n, w in weights.items()}
        whole = {n: dequantised.source(plain, n).double().numpy() for n in weights}
        for n, error in row.errors.items():
            assert error.relative == pytest.approx(np.linalg.norm(lost[n]) / np.linalg.norm(whole[n]), rel=1e-5)
            assert error.worst == pytest.approx(np.abs(lost[n]).max(), rel=1e-5)
        for key in (quality.layer_of, quality.kind_of):
            for group, error in row.by(key).items():
                a, b = ([x[n].ravel() for n in weights if key(n) == group] for x in (lost, whole))
                a, b = np.linalg.norm(np.concatenate(a)), np.linalg.norm(np.concatenate(b))
                assert error.relative == pytest.approx(a / b, rel=1e-5)
                assert error.sqnr_db == pytest.approx(20 * np.log10(b / a), rel=1e-5)


def test_a_fault_in_the_dequantised_weights_would_be_seen(
    measured: tuple[Path, quality.Report], tmp_path: Path
) -> None:
    """The comparison above, with one matrix of one format wrong by a hundredth."""
    folder, report = measured
    plain, tokenizer = (kind.from_pretrained(folder / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    ids = [*tokenizer((folder / "text.txt").read_text()).input_ids, tokenizer.eos_token_id]
    weights = held(folder, "nf4", tmp_path)
    next(iter(weights.values())).mul_(1.01)
    assert report.formats[2].loss != pytest.approx(plain_loss(dequantised.of(plain, weights), ids, MAX), rel=2e-5)


def test_only_the_own_store_stays_and_the_report_lies_in_it(measured: tuple[Path, quality.Report]) -> None:
    folder, report = measured
    own = [e for e in shelf.listing() if e.manifest and e.manifest.source["path"] == str(folder / "model")]
    assert [entry.manifest.quant["type"] for entry in own if entry.manifest] == ["nf4"]
    assert report.path == own[0].path / "quality.json"
    kept = json.loads(report.path.read_text())
    assert [row["name"] for row in kept["formats"]] == NAMES
    assert kept == json.loads(json.dumps(report.to_json()))
    assert kept["formats"][2]["by_layer"].keys() == {"0", "1"}


def test_16_bits_are_read_from_a_copy_where_the_source_is_not_in_the_compute_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = asked(tmp_path, quant__compute_dtype="bf16")  # the source is in fp32
    store = quantize(loaded.recipe).path
    placed: list[bool] = []
    opened = quality.open_target

    def seen(*arguments: Any) -> Any:
        from halfbyte.base import stream

        made = opened(*arguments)
        placed.append(stream.is_mapped(made.model))
        return made

    monkeypatch.setattr(quality, "open_target", seen)
    loaded = asked(tmp_path, quant__compute_dtype="bf16", quant__placement="mapped", data__mask="all")
    report = quality.measure(loaded.recipe, tmp_path / "train.jsonl", store=store, limit=3)
    assert placed == [True] * 5 and report.rows == 3
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    total = count = 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    for line in (tmp_path / "train.jsonl").read_text().splitlines()[:3]:
        row = json.loads(line)
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        ids = torch.tensor([tokenizer.apply_chat_template(turns, return_dict=False)])
        total += float(plain(input_ids=ids, labels=ids).loss.detach()) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert report.labelled_tokens == count
    # bf16 rounds each of a few sums by 2^-9
    assert report.formats[0].loss == pytest.approx(total / count, rel=2**-7)
    assert not [e.key for e in shelf.listing() if "-none-" in e.key]


def test_a_recipes_own_format_and_its_mask_are_read(tmp_path: Path) -> None:
    loaded = asked(tmp_path, quant__type="fp4")
    store = quantize(loaded.recipe).path
    report = quality.measure(loaded.recipe, tmp_path / "train.jsonl", store=store, limit=4)
    assert [row.name for row in report.formats] == [*NAMES, "fp4 double"]
    assert report.labelled_tokens < report.tokens - report.rows


def test_the_command_shows_it_and_refuses_what_makes_no_sense(tmp_path: Path) -> None:
    tiny_run.checkpoint(tmp_path / "model")
    model, run = str(tmp_path / "model"), CliRunner().invoke
    shown = run(app, ["quantize", model, "--report", "--set", "data.max_length=64"])
    assert shown.exit_code == 0, shown.output
    for words in ("a small text of halfbyte's own", "nf4 double", "mlp.down_proj", "perplexity", "quality.json"):
        assert words in shown.output
    asked_json = run(app, ["quantize", model, "--report", "--json", "--set", "data.max_length=64"])
    assert [row["name"] for row in json.loads(asked_json.stdout)["quality"]["formats"]][2] == "nf4"
    read = ["quantize", model, "--report", "--json", "--text", str(tiny_run.rows(tmp_path / "r.jsonl", 3))]
    whole, few = (json.loads(run(app, [*read, *more]).stdout)["quality"]["rows"] for more in ([], ["--limit", "1"]))
    assert (whole, few) == (3, 1)
    alone = run(app, ["quantize", model, "--text", "f.txt"])
    assert "--text and --limit say what --report reads" in str(alone.exception)
    missing = run(app, ["quantize", model, "--report", "--text", str(tmp_path / "no.jsonl")])
    assert isinstance(missing.exception, DataError) and "no such file" in str(missing.exception)


def test_a_text_of_one_token_is_refused(tmp_path: Path) -> None:
    loaded = asked(tmp_path)
    empty = tmp_path / "rows.jsonl"
    empty.write_text('{"text": ""}\n')
    with pytest.raises(DataError):
        quality.measure(loaded.recipe, empty, store=tmp_path)


def test_without_room_for_a_format_the_others_are_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from halfbyte.base.store import build

    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    loaded = asked(tmp_path)
    store = quantize(loaded.recipe).path
    monkeypatch.setattr(build.files, "free_bytes", lambda path: 0)
    with pytest.raises(StoreError, match="no space left for the store"):
        quality.measure(loaded.recipe, tmp_path / "train.jsonl", store=store)
    assert [entry.path for entry in shelf.listing() if entry.state == "whole"] == [store]

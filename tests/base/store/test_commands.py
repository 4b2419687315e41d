"""`halfbyte quantize` and `halfbyte store list | verify | gc` as their user sees them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from halfbyte.base.store import manifest, shelf
from halfbyte.system import files
from tests import tiny, tiny_run
from tests.base.store.helpers import flip, opened
from tests.in_process import Cli, runner


@pytest.fixture
def halfbyte(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.chdir(tmp_path)
    tiny_run.checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    return runner(tmp_path, capsys)


def only_store() -> Path:
    (entry,) = shelf.listing()
    return entry.path


def test_quantize_builds_then_finds_and_train_opens_it(halfbyte: Cli, tmp_path: Path) -> None:
    first = halfbyte("quantize", "model", "--json")
    assert (first.code, first.err) == (0, "")
    built = json.loads(first.out)
    assert built["built"] is True and built["path"] == str(only_store())
    assert built["manifest"]["quant"]["type"] == "nf4" and built["bytes"] > 10_000
    assert json.loads(halfbyte("quantize", "model", "--json").out)["built"] is False
    again = halfbyte("quantize", "model")
    assert "was there already" in again.out and built["path"] in again.out
    tiny_run.recipe(tmp_path, quant__compute_dtype="auto")
    ran = halfbyte("train", "recipe.yaml")
    assert ran.code == 0, ran.err
    assert only_store() == Path(built["path"])
    assert built["path"] in halfbyte("quantize", "recipe.yaml").out


def test_quiet_leaves_out_how_the_build_goes(halfbyte: Cli) -> None:
    halfbyte("quantize", "model")
    for quiet, told in (((), True), (("--quiet",), False)):
        os.truncate(sorted(only_store().glob("*.safetensors"))[0], 10)
        ended = halfbyte("quantize", "model", *quiet)
        assert ended.code == 0 and ("a damaged store is built again" in ended.err) == told and "built in" in ended.out


def test_quantize_into_a_folder_that_is_a_model(halfbyte: Cli, tmp_path: Path) -> None:
    before = set(os.listdir())
    ended = halfbyte("quantize", "model", "--out", "four", "--set", "quant.type=fp4")
    assert ended.code == 0 and "built in" in ended.out
    assert set(os.listdir()) - before == {"four"}  # no lock lies beside it
    assert manifest.read(tmp_path / "four").quant["type"] == "fp4" and shelf.listing() == []
    again = halfbyte("quantize", "four")
    assert again.code == 2 and "four is quantised already" in again.err and "it opens as it is" in again.err
    assert opened(tmp_path / "four").origin == str(tmp_path / "four") and shelf.listing() == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("model", "--set", "quant.type=none"), "error: quant.type none keeps the base in 16 bits"),
        (("model", "--set", "quant.typ=nf4"), "quant.typ"),
        (("nothing-here",), "error: "),
        (("model", "--out", "model"), "error: model is not a store"),
    ],
)
def test_a_mistake_is_one_message(arguments: tuple[str, ...], said: str, halfbyte: Cli) -> None:
    ended = halfbyte("quantize", *arguments)
    assert ended.code == 2 and said in ended.err and "Traceback" not in ended.err
    assert shelf.listing() == []


@pytest.mark.parametrize(
    ("damage", "said"),
    [("missing", "model-00002-of-"), ("cut", "model-00002-of-"), ("stranger", "model-00009.safetensors")],
)
def test_a_checkpoint_that_is_not_whole_is_named(damage: str, said: str, halfbyte: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    tiny.model("llama", dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="60KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    if damage == "missing":
        shard.unlink()
    elif damage == "cut":
        os.truncate(shard, shard.stat().st_size - 100)
    else:
        index = folder / "model.safetensors.index.json"
        index.write_text(index.read_text().replace(shard.name, "model-00009.safetensors"))
    ended = halfbyte("quantize", "sharded")
    assert ended.code == 2 and said in ended.err and "Traceback" not in ended.err
    assert shelf.listing() == []


def test_the_shelf_is_empty_at_first(halfbyte: Cli) -> None:
    assert halfbyte("store", "list").out == f"nothing in {shelf.folder().parent}\n"
    assert json.loads(halfbyte("store", "list", "--json").out) == []
    assert halfbyte("store", "verify").out == "there are no stores\n"
    assert halfbyte("store", "gc").out == "removed: 0, 0.00 GB\n"


def test_list_verify_and_gc(halfbyte: Cli, tmp_path: Path) -> None:
    for setting in ("quant.type=nf4", "quant.type=fp4"):
        assert halfbyte("quantize", "model", "--set", setting).code == 0
    listed = halfbyte("store", "list").out
    assert "2 in" in listed and listed.count("whole, in use") == 2 and listed.count(str(tmp_path / "model")) == 2
    entries = {entry["quant"]["type"]: entry for entry in json.loads(halfbyte("store", "list", "--json").out)}
    assert entries["nf4"]["state"] == "whole" and len(entries["nf4"]["content_sha256"]) == 64

    assert halfbyte("store", "verify").code == 0
    weights = Path(entries["fp4"]["path"]) / "model-layer-0001.safetensors"
    flip(weights, weights.stat().st_size - 2000)
    wrong = halfbyte("store", "verify")
    assert wrong.code == 1
    assert f"{entries['nf4']['key']}: whole" in wrong.out
    assert (
        f"{entries['fp4']['key']}: model-layer-0001.safetensors has another sha256 than when it was built" in wrong.out
    )
    assert halfbyte("store", "verify", entries["nf4"]["key"][:20]).code == 0
    assert halfbyte("store", "verify", entries["fp4"]["path"]).code == 1
    named = json.loads(halfbyte("store", "verify", str(tmp_path / "model"), "--json").out)
    assert {key: value["whole"] for key, value in named.items()} == {
        entries["nf4"]["key"]: True, entries["fp4"]["key"]: False,
    }  # fmt: skip
    unknown = halfbyte("store", "verify", "nobody")
    assert unknown.code == 2 and "no store is called nobody; there are: " in unknown.err

    os.truncate(weights, 100)
    used = halfbyte("store", "gc", "--all")
    assert "removed: 0" in used.out  # this process has both open
    for file in shelf._in_use.values():
        file.close()
    shelf._in_use.clear()
    dry = json.loads(halfbyte("store", "gc", "--dry-run", "--json").out)
    assert dry["dry_run"] is True and [entry["key"] for entry in dry["removed"]] == [entries["fp4"]["key"]]
    gone = halfbyte("store", "gc").out
    assert gone.startswith("removed: 1") and "(broken)" in gone and only_store() == Path(entries["nf4"]["path"])
    assert "removed: 0" in halfbyte("store", "gc", "--unused-days", "30").out
    assert "removed: 1" in halfbyte("store", "gc", "--all").out
    assert shelf.listing() == []


def test_what_lies_beside_the_stores_is_listed_and_goes(halfbyte: Cli, cache: Path, tmp_path: Path) -> None:
    for name in ("gguf/m-1/model.safetensors", "gguf/half.partial/config.json", "packaged/p.gguf", "tokens/t.arrow"):
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_bytes(b"x" * 10)
    (cache / "gguf/half.lock").touch()
    elsewhere = tmp_path / "elsewhere"
    entries = {entry["key"]: entry for entry in json.loads(halfbyte("store", "list", "--json").out)}
    assert {key: (entry["state"], entry["bytes"]) for key, entry in entries.items()} == {
        "gguf/m-1": ("whole", 10), "gguf/half.partial": ("interrupted", 10),
        "packaged/p.gguf": ("whole", 10), "tokens/t.arrow": ("whole", 10),
    }  # fmt: skip
    assert "packaged/p.gguf" in halfbyte("store", "list").out
    with (cache / "gguf/half.lock").open("a") as file:
        assert files.lock(file, wait=False)
        assert halfbyte("store", "gc").out.startswith("removed: 0"), "a conversion is under way"
    assert halfbyte("store", "gc").out == "removed: 1, 0.00 GB\n  gguf/half.partial (interrupted)\n"
    os.utime(cache / "tokens/t.arrow", (0, 0))
    assert "tokens/t.arrow" in halfbyte("store", "gc", "--unused-days", "30").out
    (cache / "packaged").rename(elsewhere)
    (cache / "packaged").symlink_to(elsewhere)
    assert halfbyte("store", "gc", "--all").out == "removed: 1, 0.00 GB\n  gguf/m-1 (whole)\n"
    assert (elsewhere / "p.gguf").is_file(), "a link leads to what is somebody else's"

"""A GGUF file opened in its own blocks: what it computes, what is mapped, what is refused; and a run on it."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from halfbyte import finetune
from halfbyte.base import load, stream
from halfbyte.base.load import Base
from halfbyte.errors import AdapterError, HalfbyteError, RecipeError, SourceError
from halfbyte.inference import target
from halfbyte.inference.generate import generate
from halfbyte.inference.load import open_target
from halfbyte.inference.verify import verify
from halfbyte.layers.decoding.tape import Tape
from halfbyte.models.gguf import blocks
from halfbyte.models.sources.lookup import find_model, resolve
from halfbyte.quant import formats, gguf_blocks
from halfbyte.quant.number_format import BlockRows
from halfbyte.quant.stack import ExpertStack
from halfbyte.recipe.schema import Quant
from halfbyte.system import device, pages
from halfbyte.writing.places import FastPathUnavailable
from halfbyte.writing.sampling import SamplingParams
from halfbyte.writing.text import Text
from halfbyte.writing.writer import Writer
from tests import tiny_run
from tests.models.gguf import files
from tests.models.gguf.test_architectures import CASES, QUICK, RULES, SIZES, TABLES, logits, sizes_of

pytestmark = pytest.mark.usefixtures("forked_children")
# fp32 sums of a few hundred products, in another order where experts are computed one by one
CLOSE = 2.0**-24 * 256


def written(folder: Path, name: str, kind: Type = Type.Q8_0) -> tuple[Path, Any]:
    """A file, and the model with the values that the gguf package reads from it, not rounded."""
    architecture, model_type, values, said = CASES[name]
    model = files.model_of(model_type, **{**SIZES, "tie_word_embeddings": False, **values})
    file = folder / f"{name}.gguf"
    reference = files.write(
        file, architecture, model, {**sizes_of(model.config), **said}, kind,
        rule=RULES.get(architecture, "smollm"), tables=TABLES.get(name, {}), rounded=False,
    )  # fmt: skip
    return file, reference


def opened(file: Path, **quant: Any) -> Base:
    checkpoint = resolve(str(file), in_blocks=True)
    return load.open_base(checkpoint, Quant(type="gguf", compute_dtype="fp32", **quant), device.detect())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]
)
def test_an_architecture_computes_on_its_files_blocks(tmp_path: Path, name: str, cache: Path) -> None:
    file, reference = written(tmp_path, name)
    base = opened(file)
    expected = logits(reference)
    assert (logits(base.model) - expected).abs().max() <= CLOSE * expected.abs().max()
    held = [m for m in base.model.modules() if formats.of_module(m).name == "gguf"]
    held += [p for p in base.model.parameters() if isinstance(p, ExpertStack)]
    assert held and base.resident_bytes == pytest.approx(base.expected_bytes, rel=0.02)
    maps = pages.FileMaps.read()
    codes = [each.data if isinstance(each, ExpertStack) else each.weight.data for each in held]
    assert all(maps.holds(each.data_ptr(), each.nbytes) for each in codes)
    assert not list(cache.rglob("*.safetensors")) and base.store is None


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4"])
def test_types_of_the_package_side_by_side(tmp_path: Path, kind: str) -> None:
    file, reference = written(tmp_path, "llama", Type[kind])
    base = opened(file, skip_modules=["layers.1.mlp.up_proj"])
    expected = logits(reference)
    assert (logits(base.model) - expected).abs().max() <= CLOSE * expected.abs().max()
    plain = base.model.get_submodule("model.layers.1.mlp.up_proj")
    assert type(plain) is torch.nn.Linear and formats.of_module(base.model.model.layers[0].mlp.up_proj).name == "gguf"


def test_bitsandbytes_is_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its import takes longer than all else that opening a file of 4 GB does."""
    file, _ = written(tmp_path, "llama")

    class Refusal:
        @staticmethod
        def find_spec(name: str, *_: Any) -> None:
            assert name != "bitsandbytes"

    for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Refusal, *sys.meta_path])
    assert opened(file).resident_bytes and "bitsandbytes" not in sys.modules


def test_a_file_in_16_bits_has_nothing_to_hold_in_blocks(tmp_path: Path) -> None:
    file, reference = written(tmp_path, "mixtral", Type.F16)
    base = opened(file)
    expected = logits(reference)
    assert (logits(base.model) - expected).abs().max() <= CLOSE * expected.abs().max()
    assert not any(formats.is_quantised(module) for module in base.model.modules())


def test_a_streamed_base_is_the_resident_one(tmp_path: Path) -> None:
    file, _ = written(tmp_path, "llama")
    base = opened(file)
    mapped = logits(base.model)
    for placement in ("streamed", "mapped", "resident"):
        place = stream.place(base.model, placement)
        assert torch.equal(logits(base.model), mapped)
        place.remove()


def test_a_fault_in_a_product_on_blocks_is_seen_before_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of one matrix's rows is not that of the others: a wrong row here and there."""
    file, _ = written(tmp_path, "llama", Type.Q4_0)
    model, prompt = opened(file).model, list(range(3, 40))

    def answered() -> list[int]:
        text = Text(prompt, SamplingParams(6), ())
        writer = Writer(model, 1, 64)
        writer.insert([text])
        while not text.ended:
            writer.step()
        return text.tokens

    right, own = answered(), Tape.blocks
    assert len(right) == 6

    def wrong(tape: Tape, rows: BlockRows, *args: Any, **more: Any) -> None:
        order = torch.arange(rows.shape[0], dtype=torch.int32).roll(1)
        own(tape, dataclasses.replace(rows, order=order), *args, **more)

    monkeypatch.setattr(Tape, "blocks", wrong)
    with pytest.raises(FastPathUnavailable, match="logits"):
        answered()


def run_of(folder: Path, file: Path, **more: Any) -> Path:
    recipe = tiny_run.recipe(
        folder, model=str(file), quant__type="gguf", quant__compute_dtype="fp32", **{"train__max_steps": 4, **more}
    )
    finetune.train(recipe)
    return folder / "run"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("llama", "mixtral", "gpt2", "gpt-oss") else pytest.mark.slow)
        for name in CASES
    ],
)
def test_an_architecture_trains_on_its_files_blocks(tmp_path: Path, name: str) -> None:
    file, _ = written(tmp_path, name)
    tiny_run.rows(tmp_path / "train.jsonl", 4)
    run = run_of(tmp_path, file, train__learning_rate=0.003)
    report = json.loads((run / "report.json").read_text())
    assert report["steps"] == 4 and report["verdict"]["adapter"] < report["verdict"]["base"]  # without dropout


def test_a_run_is_opened_verified_and_knows_its_file(tmp_path: Path, cache: Path) -> None:
    file, _ = written(tmp_path, "llama", Type.Q4_0)
    run = run_of(tmp_path, file)
    assert not (cache / "bases").exists()  # no store
    (folder,) = (path for path in (cache / "gguf").iterdir() if path.is_dir())
    left = {path.name for path in folder.iterdir()}
    assert blocks.MANIFEST in left and not any(name.endswith((".safetensors", ".bin", ".gguf")) for name in left)
    checked = verify(run)
    assert checked.ok and any(str(file) in check.seen for check in checked.checks if check.what == "base")
    found = target.find(run)
    answers = generate(open_target(found).model, tiny_run.tokenizer(), [[3, 40, 50, 60]], SamplingParams(4))
    assert len(answers) == 1
    same = file.read_bytes()
    values = bytearray(same)
    values[-40] ^= 1  # one bit of a code
    file.write_bytes(values)
    with pytest.raises(AdapterError, match=r"base: trained on .*\(weights [0-9a-f]{12}\), here is"):
        open_target(target.find(run))
    assert not verify(run).ok
    file.unlink()
    file.write_bytes(same)
    assert open_target(target.find(run)).base is not None
    elsewhere = file.rename(tmp_path / "elsewhere.gguf")
    assert open_target(target.find(run, [f"model={elsewhere}"])).base is not None
    elsewhere.write_bytes(values)
    with pytest.raises(AdapterError, match=r"here is .*elsewhere"):
        open_target(target.find(run, [f"model={elsewhere}"]))


def test_what_cannot_be_held_is_refused_by_name(tmp_path: Path) -> None:
    tiny_run.checkpoint(tmp_path / "model")
    with pytest.raises(SourceError, match=r"quant\.type gguf is a GGUF file's own blocks"):
        find_model(tiny_run.recipe(tmp_path / "a", model=str(tmp_path / "model"), quant__type="gguf").recipe)
    with pytest.raises(RecipeError, match=r"block_size cannot be set with quant\.type gguf"):
        tiny_run.recipe(tmp_path / "b", quant__type="gguf", quant__block_size=64)
    file, _ = written(tmp_path, "llama")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:-64])
    with pytest.raises(SourceError, match="is cut short"):
        opened(cut)


def test_a_file_that_was_edited_behind_its_manifest_and_a_damaged_manifest_are_refused(tmp_path: Path) -> None:
    """The same size and time, so that the manifest in the cache is found again."""
    file, _ = written(tmp_path, "llama")
    checkpoint, stat = resolve(str(file), in_blocks=True), file.stat()
    file.write_bytes(file.read_bytes().replace(b"blk.1.ffn_gate.weight", b"blk.1.ffn_gatf.weight"))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(
        SourceError, match=r"is not what it was when its manifest was written: 1 weights(.|\n)*fix: touch"
    ):
        opened(file)
    manifest = checkpoint.path / blocks.MANIFEST
    good = manifest.read_text()
    for bad in (good[:-9], good.replace("Q8_0", "Q9_9"), good.replace('"shape": [', '"shape": [[')):
        manifest.write_text(bad)
        with pytest.raises(SourceError, match=r"halfbyte-gguf.json is damaged(.|\n)*fix: rm -r "):
            opened(file)


def test_an_unknown_type_and_a_scale_that_is_not_finite_are_named(tmp_path: Path) -> None:
    file, _ = written(tmp_path, "llama")
    tensor = next(t for t in gguf.GGUFReader(file).tensors if t.name == "blk.1.ffn_up.weight")
    values = bytearray(file.read_bytes())
    start = int(tensor.data_offset)
    values[start : start + 2] = b"\x00\x7c"  # infinity
    (tmp_path / "infinite.gguf").write_bytes(values)
    with pytest.raises(SourceError, match=r"tensor blk\.1\.ffn_up\.weight holds values that are not finite"):
        opened(tmp_path / "infinite.gguf")
    assert blocks.BLOCKS.keys() == set(gguf_blocks._TYPES.values())
    with pytest.raises(HalfbyteError, match=r"its tensor .* is in IQ4_XS, which quant\.type gguf does not hold"):
        opened(_in_iq4_xs(tmp_path))


def _in_iq4_xs(folder: Path) -> Path:
    import numpy as np

    model = files.model_of("llama", **{**SIZES, "hidden_size": 256, "intermediate_size": 256, "head_dim": 64})
    file = folder / "xs.gguf"
    own = files.stored

    def stored(value: Any, kind: Type) -> Any:
        if value.ndim < 2:
            return own(value, kind)
        return np.zeros((len(value), value.shape[-1] // 256 * 136), np.uint8), value

    files.stored = stored  # type: ignore[assignment]
    try:
        files.write(file, "llama", model, {**sizes_of(model.config), "attention.key_length": 64}, Type.IQ4_XS)
    finally:
        files.stored = own  # type: ignore[assignment]
    return file

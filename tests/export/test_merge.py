"""Merging: what is written beside PEFT's own `merge_and_unload`, on the 16-bit and on the dequantised base."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from halfbyte import finetune
from halfbyte.base.store.supply import Tell
from halfbyte.base.store.writer import SafetensorsWriter
from halfbyte.errors import AdapterError, ExportError
from halfbyte.export import folder, weights
from halfbyte.export import job as exporting
from halfbyte.export.export import merge, to_gguf
from halfbyte.export.job import ExportJob
from halfbyte.export.weights import BaseKind, MergedModel
from halfbyte.inference import target
from halfbyte.inference.target import Target
from halfbyte.system import files
from tests import tiny_run
from tests.export import runs


@pytest.fixture(autouse=True)
def some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "CHUNK_NUMBERS", 1000)  # matrices of 64 columns in pieces of 15 rows


def written(found: Target, base: BaseKind, out: Path) -> Any:
    out.mkdir()
    folder.write(MergedModel(found, base), out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    return dict(model.named_parameters(remove_duplicate=False))


def plain_base(path: Path, base: BaseKind) -> Any:
    """The base by transformers and bitsandbytes, dense."""
    if base == "16bit":
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=config).dequantize()


def merged_by_peft(base: Any, adapter: Path) -> dict[str, torch.Tensor]:
    merged = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload()
    return dict(merged.named_parameters(remove_duplicate=False))


def is_conv1d(kind: str, name: str) -> bool:
    return runs.KINDS[kind][0] == "gpt2" and ".c_" in name and name.endswith(".weight")


@pytest.mark.parametrize("base", ["16bit", "4bit"])
@pytest.mark.parametrize("kind", sorted(runs.KINDS))
def test_as_peft_merges(kind: str, base: BaseKind, tmp_path: Path) -> None:
    found = runs.make(tmp_path, kind)
    if kind == "experts" and base == "4bit":
        pytest.skip("bitsandbytes leaves stacks of experts in 16 bits: no plain reference (see the next test)")
    plain = plain_base(tmp_path / "model", base)
    before = {n: p.detach().clone() for n, p in plain.named_parameters(remove_duplicate=False)}
    wanted = merged_by_peft(plain, tmp_path / "adapter")
    if kind.startswith("dora") and base == "16bit":
        pytest.skip("PEFT takes the norm of what it merges into; see test_dora_has_the_norm_of_what_it_was_trained_on")
    got = written(found, base, tmp_path / "out")
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        value = value.T if base == "4bit" and is_conv1d(kind, name) else value  # bitsandbytes makes it a Linear
        # fp32 sums of four terms and of one in another order
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert any(got[n].shape == before[n].shape and not torch.equal(got[n], before[n]) for n in before)


@pytest.mark.parametrize("kind", ["dora", "dora of Conv1D"])
def test_dora_has_the_norm_of_what_it_was_trained_on(kind: str, tmp_path: Path) -> None:
    found = runs.make(tmp_path, kind)
    got = written(found, "16bit", tmp_path / "out")
    full, held = (dict(plain_base(tmp_path / "model", b).named_parameters()) for b in ("16bit", "4bit"))
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    names = [n.removesuffix(".lora_A.weight") for n in saved if n.endswith(".lora_A.weight")]
    assert names
    for name in names:
        weight = f"{name.removeprefix('base_model.model.')}.weight"
        turned = is_conv1d(kind, weight)
        delta = 9 / 4 * saved[f"{name}.lora_B.weight"] @ saved[f"{name}.lora_A.weight"]  # (out, in)
        own = full[weight].T if turned else full[weight]
        norm = (held[weight] + delta).norm(dim=1)
        wanted = (saved[f"{name}.lora_magnitude_vector"] / norm)[:, None] * (own + delta)
        torch.testing.assert_close(got[weight], wanted.T if turned else wanted, rtol=1e-5, atol=1e-5)
        wrong = (saved[f"{name}.lora_magnitude_vector"] / (own + delta).norm(dim=1))[:, None] * (own + delta)
        assert (wanted - wrong).abs().max() > 1e-3  # PEFT's, by the norm of the 16-bit weight


def test_experts_from_the_store(tmp_path: Path) -> None:
    """Each expert's delta by hand, on what its store gives for it; PEFT keeps B's last axis over experts."""
    found = runs.make(tmp_path, "experts")
    got = written(found, "4bit", tmp_path / "out")
    bare = replace(found, adapter=None)
    held = written(bare, "4bit", tmp_path / "bare")
    adapted = peft.PeftModel.from_pretrained(plain_base(tmp_path / "model", "16bit"), tmp_path / "adapter")
    checked = 0
    for name, module in adapted.get_base_model().named_modules():
        if hasattr(module, "parameter_name"):
            weight = f"{name.replace('.base_layer', '')}.{module.parameter_name}"
            delta = module.get_delta_weight("default")
            torch.testing.assert_close(got[weight] - held[weight], delta, rtol=1e-4, atol=1e-4)
            checked += 1
    assert checked == 4


@pytest.mark.parametrize(("subject", "adapter"), [("run", "run/adapter"), ("run/checkpoints/step-000002",) * 2])
def test_a_residual_start_is_not_added_to_16_bits(subject: str, adapter: str, tmp_path: Path) -> None:
    """Into 16 bits goes what was learned since the start; factors that have learned nothing change nothing."""
    saves = {"train__save_strategy": "steps", "train__save_steps": 2}
    loaded = tiny_run.recipe(tmp_path, lora__init_lora_weights="residual", lora__r=8, **saves)
    finetune.train(loaded)
    found = target.find(tmp_path / subject)
    saved = load_file(tmp_path / adapter / "adapter_model.safetensors")
    full = dict(plain_base(tmp_path / "model", "16bit").named_parameters())
    held = dict(plain_base(tmp_path / "model", "4bit").named_parameters())
    got = written(found, "16bit", tmp_path / "out")
    for name in (n.removesuffix(".lora_A.weight") for n in saved if n.endswith(".lora_A.weight")):
        weight = f"{name.removeprefix('base_model.model.')}.weight"
        now = saved[f"{name}.lora_B.weight"] @ saved[f"{name}.lora_A.weight"]
        u, s, v = torch.linalg.svd(full[weight] - held[weight])
        began = (u[:, :8] * s[:8]) @ v[:8]
        wanted = full[weight] + now - began
        # the start's directions are found by sketching: nearer to the true ones than a tenth of what they hold
        assert (got[weight] - wanted).norm() < 0.1 * began.norm(), weight
        assert (full[weight] + now - wanted).norm() > 0.9 * began.norm()  # what adding its factors would be off by


def test_an_adapter_that_began_with_one_that_is_gone(tmp_path: Path) -> None:
    finetune.train(tiny_run.recipe(tmp_path))
    shutil.copytree(tmp_path / "run/adapter", tmp_path / "first")
    finetune.train(tiny_run.recipe(tmp_path, lora={"adapter": str(tmp_path / "first")}, output=tmp_path / "second"))
    found = target.find(tmp_path / "second")
    MergedModel(found, "16bit")
    shutil.rmtree(tmp_path / "first")
    with pytest.raises(AdapterError, match="not there any more"):
        MergedModel(found, "16bit")
    MergedModel(found, "4bit")


def test_untouched_tensors_are_the_sources(tmp_path: Path) -> None:
    found = runs.make(tmp_path, "plain")
    (tmp_path / "out").mkdir()
    folder.write(MergedModel(found, "16bit"), tmp_path / "out")
    source, got = (load_file(tmp_path / n / "model.safetensors") for n in ("model", "out"))
    same = {n for n in source if torch.equal(source[n], got[n])}
    assert {n for n in source if not n.endswith(("q_proj.weight", "v_proj.weight"))} == same
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads(
        (tmp_path / "model/config.json").read_text()
    )
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (tmp_path / "model/tokenizer.json").read_bytes()


def test_several_files(tmp_path: Path) -> None:
    found = runs.make(tmp_path, "plain")
    whole = written(found, "16bit", tmp_path / "out")
    AutoModelForCausalLM.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "model", max_shard_size="100KB")
    (tmp_path / "model/model.safetensors").unlink(missing_ok=True)
    parts = written(found, "16bit", tmp_path / "parts")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    assert all(torch.equal(whole[n], parts[n]) for n in whole)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = runs.make(tmp_path, "plain")
    put, calls = SafetensorsWriter.put, list[int]()

    def full(self: SafetensorsWriter, *args: Any) -> None:
        calls.append(1)
        if len(calls) == 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        put(self, *args)

    monkeypatch.setattr(SafetensorsWriter, "put", full)
    with (
        pytest.raises(ExportError, match=r"No space left.*Nothing of it is left"),
        folder.whole_or_absent(tmp_path / "o") as t,
    ):
        folder.write(MergedModel(found, "16bit"), t)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith((".o", "o"))]


KILLED = """
import os, signal, sys
from pathlib import Path
from halfbyte.base.store.supply import Tell
from halfbyte.base.store.writer import SafetensorsWriter
from halfbyte.export.export import merge, to_gguf
from halfbyte.export.job import ExportJob
put, calls = SafetensorsWriter.put, []
def killed(self, *args):
    calls.append(1)
    if len(calls) == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    put(self, *args)
SafetensorsWriter.put = killed
merge(ExportJob(Path(sys.argv[1]), Path(sys.argv[2]), ("quant.type=none",), prove=False), "16bit")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9")
def test_a_killed_merge_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    runs.make(tmp_path, "plain")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "adapter"), str(tmp_path / "out")]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    (left,) = (p for p in tmp_path.iterdir() if "out" in p.name)
    assert left.name.startswith(".out.") and not list(left.rglob("*.safetensors"))
    merge(ExportJob(tmp_path / "adapter", tmp_path / "out", ("quant.type=none",), prove=False), "16bit")
    assert [p.name for p in tmp_path.iterdir() if "out" in p.name] == ["out"]


def test_what_a_killed_proof_has_left_goes_without_a_proof_too(tmp_path: Path) -> None:
    runs.make(tmp_path, "plain")
    left = tmp_path / f".out-asked.{2**22 + 1}"  # of no process: numbers end at 2^22
    left.mkdir()
    merge(ExportJob(tmp_path / "adapter", tmp_path / "out", ("quant.type=none",), prove=False))
    assert (tmp_path / "out/config.json").is_file() and not left.exists()


def test_no_format_to_quantise_to_is_told_before_the_run_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.make(tmp_path, "plain")
    monkeypatch.setattr(exporting, "ask_run", lambda questions: pytest.fail("the run was asked"))
    with pytest.raises(ExportError, match="the run's base is in 16 bits") as refused:
        merge(ExportJob(tmp_path / "adapter", tmp_path / "out", ("quant.type=none",)), quantise=True)
    assert refused.value.fix == f"halfbyte export {tmp_path / 'adapter'} --gguf Q8_0"


@pytest.mark.parametrize("export", [lambda job: merge(job, "16bit"), lambda job: to_gguf(job, "Q8_0")])
def test_no_room_is_told_before_the_run_is_asked(
    export: Callable[[ExportJob], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.make(tmp_path, "plain")
    monkeypatch.setattr(files, "free_bytes", lambda path: 10_000)  # of the 100 MB that config and tokenizer may take
    said = list[str]()
    job = ExportJob(
        tmp_path / "adapter", tmp_path / "o", ("quant.type=none",), tell=Tell(None, lambda *note: said.extend(note))
    )
    with pytest.raises(
        ExportError, match=f"no space left for {tmp_path / 'o'}: it needs [12]0[0-9]\\.[0-9]+ MB, and 10.00 kB are free"
    ):
        export(job)
    assert said == [] and not list(tmp_path.glob("*o-asked*")) and not (tmp_path / "o").exists()

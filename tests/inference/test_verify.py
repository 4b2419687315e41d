"""`halfbyte verify`: a run that is as it was written, and one that is not, part by part."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from halfbyte import finetune
from halfbyte.adapters import passport
from halfbyte.base import stream
from halfbyte.inference import verify as verifying
from halfbyte.inference.verify import Verified, verify
from halfbyte.recipe.adapter_folder import ADAPTER_FILES
from halfbyte.system import files
from tests import tiny_run
from tests.in_process import runner


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny_run.rows(folder / "eval.jsonl", 6, seed=5)
    eval_rows = folder / "eval.jsonl"
    finetune.train(tiny_run.recipe(folder, data__eval=eval_rows, train__save_strategy="steps", train__save_steps=2))
    return folder


@pytest.fixture
def run(world: Path, tmp_path: Path) -> Path:
    shutil.copytree(world / "run", tmp_path / "run")
    return tmp_path / "run"


def failed(verified: Verified) -> dict[str, str]:
    return {check.what: check.seen for check in verified.checks if not check.ok}


def signed(run: Path) -> None:
    """Make the passport name the weights that are there now: what is left is what they say."""
    path = run / "adapter/halfbyte.json"
    values = json.loads(path.read_text()) | {"adapter_sha256": files.sha256(run / "adapter" / ADAPTER_FILES[0])}
    path.write_text(json.dumps(values))


def test_a_run_as_it_was_written(run: Path) -> None:
    verified = verify(run)
    assert verified.ok, failed(verified)
    assert [check.what for check in verified.checks] == [
        "step-000002", "step-000004", "metrics", "passport", "base", "adapter",
    ]  # fmt: skip


def test_what_is_kept_are_the_logits_of_plain_peft(run: Path, world: Path) -> None:
    """On dequantised weights, by code that is not ours."""
    finetune.train(tiny_run.recipe(world, quant__type="none", output=run.parent / "plain"))
    kept = json.loads((run.parent / "plain/proof.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32).eval()
    adapted = PeftModel.from_pretrained(base, str(run.parent / "plain/adapter")).eval()
    moved, largest = 0.0, 0.0
    assert len(kept["rows"]) == 3
    for row in kept["rows"]:
        ids, at, tokens = torch.tensor([row["ids"]]), torch.tensor(row["at"]), torch.tensor(row["tokens"])
        with torch.no_grad():
            said = adapted(input_ids=ids).logits[0][at]
            with adapted.disable_adapter():
                alone = adapted(input_ids=ids).logits[0][at]
        was = torch.tensor(row["logits"])
        # fp32, the same sums in another order
        assert torch.allclose(said.gather(1, tokens), was, rtol=0, atol=1e-5 * float(was.abs().max()))
        assert tokens[:, 0].tolist() == [row["ids"][i + 1] for i in row["at"]]
        assert torch.equal(tokens[:, 1:].sort().values, said.topk(5).indices.sort().values)
        moved = max(moved, float((alone - said).gather(1, tokens).abs().max()))
        largest = max(largest, float(was.abs().max()))
    assert kept["moved"] == pytest.approx(moved / largest, rel=1e-3) and kept["moved"] > 0.01


@pytest.mark.parametrize("factor", [0.0, 1.01])
def test_an_adapter_that_says_something_else_is_seen(run: Path, factor: float) -> None:
    file = run / "adapter" / ADAPTER_FILES[0]
    tensors = load_file(file)
    save_file({k: v * factor if "lora_B" in k else v for k, v in tensors.items()}, file)
    signed(run)
    verified = verify(run, hashes=False)
    assert list(failed(verified)) == ["adapter"] and "logits differ by" in failed(verified)["adapter"]


def test_what_is_damaged_is_named(run: Path) -> None:
    weights = run / "checkpoints/step-000002" / ADAPTER_FILES[0]
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (run / "metrics.jsonl").write_text("{}\nnonsense\n")
    tensors = load_file(run / "adapter" / ADAPTER_FILES[0])
    save_file({k: v + 1e-7 for k, v in tensors.items()}, run / "adapter" / ADAPTER_FILES[0])
    said = failed(verify(run))
    assert sorted(said) == ["adapter", "metrics", "step-000002"]
    assert said["step-000002"] == f"{ADAPTER_FILES[0]} has another sha256"
    assert "metrics.jsonl:2" in said["metrics"] and "not the file that halfbyte.json" in said["adapter"]


def test_a_store_that_was_damaged_is_built_again_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    tiny_run.rows(tmp_path / "eval.jsonl", 6, seed=5)
    finetune.train(tiny_run.recipe(tmp_path, quant__compute_dtype="auto", data__eval=tmp_path / "eval.jsonl"))
    file = sorted(tmp_path.glob("cache/bases/*/*.safetensors"))[0]
    for damage in (True, False):
        if damage:
            with file.open("r+b") as store:
                store.truncate(10)
        verified = verify(tmp_path / "run")
        (base,) = (check.seen for check in verified.checks if check.what == "base")
        assert verified.ok and ("a damaged store is built again" in base and file.name in base) == damage


@pytest.mark.parametrize("content", ["{", "[]", '{"rows": 3, "moved": 1, "bound": 1}'])
def test_a_record_that_cannot_be_read_is_said(run: Path, content: str) -> None:
    (run / "proof.json").write_text(content)
    assert "proof.json cannot be read" in failed(verify(run, hashes=False))["adapter"]


@pytest.mark.parametrize("name", ["plan.json", "report.json"])
def test_a_file_that_is_cut_short_and_says_nothing_of_the_adapter_is_in_no_ones_way(
    run: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    call = runner(run.parent, capsys)
    (run / name).write_text('{"steps":')
    for command in (f"verify {run}", f"generate {run} --prompt red --max-new-tokens 2", f"train {run} --resume"):
        ended = call(*command.split())
        assert ended.code == 0, (command, ended)


def test_the_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = runner(run.parent, capsys)
    ended = call("verify", str(run), "--quick")
    assert ended.code == 0 and "ok      adapter: logits differ by" in ended.out
    (run / "proof.json").write_text("{")
    ended = call("verify", str(run), "--quick", "--json")
    assert ended.code == 1 and json.loads(ended.out)["ok"] is False
    ended = call("verify", str(run.parent / "none"))
    assert ended.code == 2 and "there is no run folder TMP/none" in ended.err


def test_a_run_of_some_length_is_seen_by_a_process_of_its_own(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifying, "VERIFIED_FROM_S", 0.0)
    monkeypatch.setattr(verifying, "LIMIT_S", 600.0)
    own = passport.write
    recipe = tiny_run.recipe(world, output=tmp_path / "run")
    verified = finetune.train(recipe).report["verified"]
    assert verified["ok"] is True, verified

    def zeroed(folder: Path, *given: object) -> None:  # a disk, or a library, that writes something else
        file = folder / ADAPTER_FILES[0]
        save_file({k: v * 0 for k, v in load_file(file).items()}, file)
        own(folder, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(passport, "write", zeroed)
    outcome = finetune.train(tiny_run.recipe(world, output=tmp_path / "zeroed"))
    assert outcome.exit_code == 1
    assert outcome.report["verified"]["ok"] is False and "logits differ by" in outcome.report["verified"]["seen"]


def test_a_second_process_that_cannot_be_had_ends_no_run(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifying, "VERIFIED_FROM_S", 0.0)
    monkeypatch.setattr(verifying.sys, "executable", str(tmp_path / "none"))
    outcome = finetune.train(tiny_run.recipe(world, output=tmp_path / "alone"))
    assert outcome.exit_code == 0
    assert outcome.report["verified"] == {
        "ok": None,
        "seen": "not seen: the second process ended without a word (FileNotFoundError)",
    }


def test_what_a_second_process_says_of_itself_is_said(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifying, "VERIFIED_FROM_S", 0.0)
    plan, machine = SimpleNamespace(private_bytes=0), SimpleNamespace(on_card=False)
    seen = verifying.after(run / "nowhere", 1.0, plan, machine)["seen"]  # type: ignore[arg-type]
    assert seen == f"not seen: there is no run folder {run / 'nowhere'}."


def test_set_opens_it_otherwise_and_changes_nothing_that_was_trained(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call, placed = runner(run.parent, capsys), []
    real = stream.place_as_planned
    monkeypatch.setattr(stream, "place_as_planned", lambda *args, **kw: placed.append(args[1]) or real(*args, **kw))
    ended = call("verify", str(run), "--quick", "--set", "quant.placement=streamed")
    assert (ended.code, placed) == (0, ["streamed"]), ended
    ended = call("verify", str(run), "--quick", "--set", "lora.r=4")
    assert ended.code != 0 and "--set lora.r=4: an adapter is used with the values" in ended.out + ended.err

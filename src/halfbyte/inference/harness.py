"""Tasks of lm-evaluation-harness on an adapter or its base: its `LM`, answered by this package's own paths.

Why: its tasks are what others report; through `HFLM` a 4-bit base would be dequantised for each token.
Source: `lm_eval.api.model.TemplateLM` (the documented base class: how texts are cut into tokens is its own); what
`HFLM` does with stop strings, long contexts and rolling windows (`lm_eval/models/huggingface.py`).
Cost: likelihoods in packed micro-batches of the plan, answers in one queue (`batch.py`). Import it where lm_eval is.
"""

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from halfbyte.data import collate
from halfbyte.data.encoding.examples import IGNORED, Example
from halfbyte.errors import RecipeError, first_line
from halfbyte.inference import batch
from halfbyte.inference.evaluate import Progress
from halfbyte.inference.generate import eos_ids
from halfbyte.inference.load import Opened
from halfbyte.layers import loss, packing
from halfbyte.models.context import context_of
from halfbyte.proofs import sharing
from halfbyte.types import Document

Pair = tuple[tuple[str, str], list[int], list[int]]
_NEW_TOKENS = 256  # where a task names none, as in HFLM
_NO_CONTEXT = 2048  # of a model without a limit


def run(
    opened: Opened, tasks: Sequence[str], folder: Path | None = None, *, limit: int | None = None,
    with_base: bool = False, progress: Progress = lambda what, done, of: None,
) -> dict[str, Document]:  # fmt: skip
    """Results by side (`base`, `adapter`) and task, as lm-evaluation-harness names them. `folder`: where tasks of one's
    own are (YAML files), beside those that lm_eval knows. Raises RecipeError: a task that is not known, or that cannot
    be read."""
    manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        where = "" if folder is None else f", nor in {folder}"
        raise RecipeError(f"lm-evaluation-harness knows no task {unknown[0]}{where}.", fix="lm-eval ls tasks")
    results: dict[str, Document] = {}
    for name in opened.sides(with_base=with_base):

        def tell(what: str, done: int, total: int, side: str = name) -> None:
            progress(f"{side}: {what}", done, total)

        with opened.using(base=name == "base"):
            lm = HalfbyteLM(opened, tell)
            try:
                scores = lm_eval.simple_evaluate(
                    model=lm, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False
                )
            except (OSError, ValueError, KeyError) as error:
                raise RecipeError(f"{', '.join(tasks)} cannot be run: {first_line(error)}") from error
        results[name] = json.loads(json.dumps((scores or {}).get("results", {}), default=str))
    return results


class HalfbyteLM(TemplateLM):
    """`lm_eval.simple_evaluate(model=HalfbyteLM(opened), tasks=[...])`."""

    backend = "causal"

    def __init__(self, opened: Opened, progress: Progress = lambda what, done, of: None) -> None:
        super().__init__()
        self.model, self.tokenizer, self.plan = opened.model, opened.tokenizer, opened.plan
        self.shares = opened.recipe.data.share_prefixes == "auto"
        self.progress = progress
        context = context_of(opened.model.config)
        self.max_length = _NO_CONTEXT if context is None else context.tokens

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        first = self.tokenizer.bos_token_id
        return int(self.tokenizer.eos_token_id if first is None else first)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        bos = self.tokenizer.bos_token
        if add_special_tokens is None and bos and string.startswith(bos):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **options))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def _loglikelihood_tokens(self, requests: list[Pair], **_: object) -> list[tuple[float, bool]]:
        rows = [_example(context, wanted, self.max_length) for _, context, wanted in requests]
        most = 1 if packing.installed(self.model) == "single" else len(rows)
        shares = self.shares and most > 1 and sharing.shares(self.model, rows)
        batches = collate.Batches.of_rows(rows, self.plan.max_tokens_per_micro_batch, most, shares=shares)
        done = 0
        likelihoods: dict[int, tuple[float, bool]] = {}
        for numbers in batches.micro_batches:
            likelihoods.update(zip(numbers, loss.text_likelihoods(self.model, batches.of(numbers)), strict=True))
            done += len(numbers)
            self.progress("likelihoods", done, len(rows))
        return [likelihoods[i] for i in range(len(rows))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        sums = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            pairs = [(("", ""), *make_disjoint_window(window)) for window in windows]
            sums.append(sum(value for value, _ in self._loglikelihood_tokens(pairs)))
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        asked = [request.args for request in requests]
        order = sorted(range(len(asked)), key=lambda i: json.dumps(asked[i][1], sort_keys=True))
        answers: dict[int, str] = {}
        for _, same in groupby(order, key=lambda i: json.dumps(asked[i][1], sort_keys=True)):
            numbers = list(same)
            answers.update(
                zip(numbers, self._answers([asked[i][0] for i in numbers], asked[numbers[0]][1]), strict=True)
            )
        return [answers[i] for i in range(len(asked))]

    def _answers(self, contexts: Sequence[str], options: Document) -> list[str]:
        if options.get("do_sample") or options.get("temperature"):
            raise RecipeError("tasks that sample are not run here: answers are greedy.", fix="do_sample: false")
        until = options.get("until") or []
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        new = int(next((options[n] for n in ("max_gen_toks", "max_new_tokens") if n in options), _NEW_TOKENS))
        prompts = [self.tok_encode(text)[-max(1, self.max_length - new) :] for text in contexts]
        return batch.answers(
            self.model,
            self.tokenizer,
            prompts,
            [new] * len(prompts),
            at_once=self.plan.sequences,
            tokens_at_once=self.plan.max_tokens_per_micro_batch,
            stops=stops,
            ends={*eos_ids(self.model), self.eot_token_id},
            progress=lambda done, of: self.progress("answers", done, of),
        )


def _example(context: Sequence[int], wanted: Sequence[int], max_length: int) -> Example:
    """A text of which the end is labelled; a longer one loses its beginning, as in HFLM."""
    ids = tuple([*context, *wanted][-(max_length + 1) :])
    return Example(ids, (*[IGNORED] * (len(ids) - len(wanted)), *wanted))

"""What fits into a given time: rows, passes over them, tokens; or the least time that would do.

What: from the time go the opening, the probes, the last evaluation, saving and the look at what was saved; the rest are
steps, at the plan's pace. Held-out rows are as many as a small part of the time evaluates. Cost: none; no torch.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from halfbyte.data.encoding.encoder import EncodedRows
from halfbyte.data.encoding.examples import Subset
from halfbyte.data.encoding.tally import Tally
from halfbyte.errors import RecipeError
from halfbyte.plan import number_format
from halfbyte.plan.result import Plan
from halfbyte.recipe import command
from halfbyte.recipe.schema import Loaded
from halfbyte.runs.folder import VERIFIED_FROM_S
from halfbyte.system import device
from halfbyte.system.words import duration
from halfbyte.training.comparison import text_reading_s
from halfbyte.training.forecast import plan_by_names
from halfbyte.training.prepare import Prepared, look
from halfbyte.training.schedule import count_steps
from halfbyte.tuning.search import LEAST_STEPS

PROBES_SHARE = 0.15  # of the time, at most
EVALUATION_SHARE, FEWEST_ROWS = 0.03, 8  # of the time; base and source are measured on the same rows, once
PROCESS_S, PROCESS_STARTS = 5.0, 1.3  # that one takes so long, or so many times what this one took to start
MORE = 1.1  # of a time that is advised: more held-out rows are evaluated in it, and another start may be slower


@dataclass(frozen=True)
class Fit:
    """Of `within_s`, `before_s` are until the first step, `probes_s` for probes, `tail_s` after the last step; between
    them are `steps` of `step_s`. `held_out`: how many rows are held out, evaluated or not. `verified_s`: of the second
    process, whether this time is long enough for one or not."""

    prepared: Prepared
    within_s: float
    before_s: float
    probes_s: float
    tail_s: float
    step_s: float
    held_out: int
    verified_s: float
    steps: int = 0

    @property
    def trained_rows(self) -> int:
        """Rows that are trained on, each as often as it is met."""
        return self.steps * min(self.prepared.recipe.train.rows_per_step, len(self.prepared.train.examples))

    @property
    def passes(self) -> float:
        return self.trained_rows / len(self.prepared.train.examples)

    def needed(self, steps: int) -> float:
        """The time that so many steps need with all that is around them."""
        seconds = (self.before_s + self.tail_s + steps * self.step_s) / (1 - self.probes_s / self.within_s)
        return seconds + self.verified_s * (self.within_s < VERIFIED_FROM_S <= MORE * seconds)

    @property
    def one_pass(self) -> str:
        """The least time with one pass over the rows, as `--within` takes it."""
        steps = math.ceil(len(self.prepared.train.examples) / self.prepared.recipe.train.rows_per_step)
        return _spoken(self.needed(steps))

    @property
    def line(self) -> str:
        """What fits, in a sentence."""
        stats, longest = self.prepared.train.stats, self.prepared.recipe.data.max_length
        parts = {"probes": self.probes_s, "opening": self.before_s, "evaluation and saving": self.tail_s}
        shown = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items() if seconds)
        rows = 0 if self.prepared.evaluation is None else len(self.prepared.evaluation.examples)
        evaluated = f"; {rows} of {self.held_out} held-out rows are evaluated" if rows < self.held_out else ""
        return (
            f"{duration(self.within_s)} are about {self.trained_rows:,} rows ({self.passes:.2g} passes over "
            f"{stats.rows:,}), {self.trained_rows * stats.mean_length / 1e6:.2g} million tokens, rows of at most "
            f"{stats.max_length:,} tokens (of {longest:,} allowed); {shown}{evaluated}"
        )

    @property
    def remark(self) -> str:
        """What a user should know of so much time; empty for nothing."""
        spare = self.within_s - self.needed(self.steps)
        limit = self.prepared.recipe.train.max_steps
        if 0 < limit <= self.steps:
            left = f"train.max_steps {limit:,} is the limit, and leaves about {duration(spare)} of the time"
            return f"{left}; without it: --set train.max_steps=-1" if spare > 0.1 * self.within_s else ""
        if self.passes < 0.995:
            rows = f"{len(self.prepared.train.examples):,} rows"
            return (
                f"{duration(self.within_s)} are too short for one pass over {rows}: that takes at least --within "
                f"{self.one_pass}; {self.trained_rows:,} rows are trained on"
            )
        if spare > 0.1 * self.within_s:
            more = f"--set train.num_train_epochs={2 * math.ceil(self.passes)}"
            return f"{self.passes:.2g} passes leave about {duration(spare)} of the time; for more of them: {more}"
        return ""


def fit(
    prepared: Prepared, plan: Plan, within_s: float, spent_s: float, *,
    probes: bool, held_out: int = 0, started_s: float = 0.0,
) -> Fit:  # fmt: skip
    """What fits. Raises RecipeError where not even a few steps do: names the least time.

    Args:
        prepared: with the held-out rows that are evaluated, of `held_out`.
        spent_s: seconds of the time that are spent. probes: whether the rate is open. started_s: what the start of this
            process took, imports included.
    """
    time, rows = plan.time, prepared.evaluation
    evaluated_s = 0.0 if rows is None else time.forward_s * float(rows.lengths.sum())
    tail_s = evaluated_s + time.around.get("saving", 0.0) + text_reading_s(prepared, plan)
    verified_s = max(PROCESS_S, PROCESS_STARTS * started_s) + time.around.get("opening", 0.0)
    tail_s += verified_s * (within_s >= VERIFIED_FROM_S)
    before_s = spent_s + _opening_s(plan) + 2 * evaluated_s  # base and source
    probes_s = PROBES_SHARE * within_s if probes and rows is not None else 0.0
    value = Fit(prepared, within_s, before_s, probes_s, tail_s, max(time.step_s, 1e-9), held_out, verified_s)
    left, total = within_s - before_s - probes_s - tail_s, count_steps(prepared)
    if left < (least := min(LEAST_STEPS, total)) * value.step_s:
        raise RecipeError(
            f"{duration(within_s)} are too short: opening, evaluation and saving take about "
            f"{duration(before_s + tail_s)}, a step {value.step_s:.1f} s.",
            fix=f"--within {_spoken(value.needed(least))} would do for {least} steps, --within {value.one_pass} for "
            f"one pass over {len(prepared.train.examples):,} rows",
        )
    return replace(value, steps=min(total, int(left / value.step_s)))


def check_search(plan: Plan, within_s: float, spent_s: float, stages: int) -> None:
    """Raise a RecipeError where a search cannot make two short runs: names the least time."""
    before_s, two_s = spent_s + _opening_s(plan), 2 * LEAST_STEPS * max(plan.time.step_s, 1e-9)

    def needed(count: int) -> float:
        return (before_s + count * two_s) / (1 - 2 * count * EVALUATION_SHARE)

    if within_s < needed(1):
        raise RecipeError(
            f"{duration(within_s)} are too short: opening takes about {duration(before_s)}, and two short runs "
            f"{duration(two_s)}.",
            fix=f"--within {_spoken(needed(1))} would do for one setting, --within {_spoken(needed(stages))} for all",
        )


def _opening_s(plan: Plan) -> float:
    return sum(plan.time.around.get(name, 0.0) for name in ("opening", "compiling", "proof of products"))


def open_rate(loaded: Loaded) -> Loaded:
    """A recipe with a time that gives no rate, with one that is left to the law."""
    train, origin = loaded.recipe.train, loaded.origins["train.learning_rate"]
    follows = "adam" in train.optim and train.loraplus_lr_ratio is None
    opens = train.within is not None and origin.kind == "default" and follows
    return command.with_rate(loaded, "auto", "") if opens else loaded


def forecast(loaded: Loaded, spent_s: float) -> Fit | None:
    """What fits by a plan that builds no model; None where only a built one tells, or nothing is asked. Raises as
    `fit`."""
    if (within_s := loaded.recipe.train.within_s) is None:
        return None
    loaded = number_format.settle(open_rate(loaded))
    prepared = look(loaded.recipe)
    if (planned := plan_by_names(prepared, device.detect())) is None:
        return None
    plan = planned[-1]
    some = limit_held_out(prepared, plan.time.forward_s, within_s)
    return fit(some, plan, within_s, spent_s, probes=loaded.origins["train.learning_rate"].kind == "auto")


def _spoken(seconds: float) -> str:
    """As `--within` takes it: `MORE`, rounded up."""
    seconds *= MORE
    return f"{math.ceil(seconds)}s" if seconds < 120 else f"{math.ceil(seconds / 60)}m"


def limit_held_out(prepared: Prepared, forward_s: float, within_s: float, most: int | None = None) -> Prepared:
    """The same with as many held-out rows as a small part of the time evaluates, or with `most`, once that is known:
    the first in the order of their hashes, so that more time takes the same and others."""
    rows = prepared.evaluation
    if rows is None:
        return prepared
    order = np.argsort(rows.examples.digests(), kind="stable")
    if most is None:
        costs = np.cumsum(rows.lengths[order]) * forward_s
        most = max(FEWEST_ROWS, int((costs <= EVALUATION_SHARE * within_s).sum()))
    if most >= len(order):
        return prepared
    chosen = Subset(rows.examples, np.sort(order[:most]))
    return replace(prepared, evaluation=EncodedRows(chosen, Tally(seen=most, kept=most), texts=rows.texts))

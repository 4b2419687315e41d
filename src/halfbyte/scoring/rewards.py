"""What an answer is worth to a run that learns from rewards: metrics, terms of length and form, a user's functions.

Why: a run should be rewarded by what it is evaluated by, so the parts are the metrics of `metrics.py`, with the
settings of `eval:`. What no metric says is a Python function, `FILE.py:FUNCTION`, run only where a recipe names it.
What: each part is a number for an answer, or nothing where it does not apply; the reward is their weighted sum.
Source: how parts are summed and functions called is TRL's (`GRPOTrainer._calculate_rewards`, TRL 1.16), as is `format`
(`think_format_reward`).
"""

import contextlib
import importlib.util
import inspect
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import dropwhile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from halfbyte.errors import RewardError, first_line, typed
from halfbyte.recipe.evaluation import Eval
from halfbyte.recipe.rewards import LARGEST
from halfbyte.recipe.schema import Train
from halfbyte.scoring import metrics
from halfbyte.types import Document

_THINKS = re.compile(r"<think>(?!.*<think>).*?</think>.*", re.DOTALL)
_OURS = ("prompt", "prompts", "completions", "completion_ids")


@dataclass(frozen=True)
class Attempt:
    """An answer that is to be rewarded, and what its row expects. `record`: the row as it was read, and `prompt` its
    question, text or messages, where a function is given them."""

    expected: str
    text: str
    tokens: Sequence[int]
    record: Document
    prompt: object = ""


Part = Callable[[Sequence[Attempt]], Sequence[float | None]]


@dataclass(frozen=True)
class Rewards:
    """The parts of a reward by their names, and what each counts for."""

    weights: Mapping[str, float]
    parts: Mapping[str, Part]

    @classmethod
    def of(cls, train: Train, settings: Eval, expected: Sequence[str]) -> "Rewards":
        """As a recipe has them, for rows with these expected answers. Raises DataError: a metric that has nothing to
        compare with in any of them."""
        weights, most = train.rewards or {}, train.max_completion_length or 1
        parts: dict[str, Part] = {
            "length": lambda attempts: [len(a.tokens) / most for a in attempts],
            "format": lambda attempts: [float(bool(_THINKS.fullmatch(a.text.strip()))) for a in attempts],
        }
        for metric in metrics.of(settings, [name for name in weights if name in metrics.BUILDERS], expected):
            parts[metric.name] = _of_metric(metric)
        if "choice" in weights:
            among = metrics.choices(settings, expected)
            parts["choice"] = lambda attempts: [float(choice_in(a.text, among) == a.expected) for a in attempts]
        return cls(
            weights, {n: parts[n] if n in parts else RewardFunction(n, train.reward_seconds or 0.0) for n in weights}
        )

    def score(self, attempts: Sequence[Attempt]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The reward of each answer (answers,), and its parts (answers, parts); NaN where none, or a part does not,
        apply. Raises RewardError."""
        columns = [[np.nan if v is None else v for v in part(attempts)] for part in self.parts.values()]
        parts = np.array(columns, np.float64).T
        sums = np.nansum(parts * [*self.weights.values()], 1)
        return np.where(np.isnan(parts).all(1), np.nan, sums), parts


def _of_metric(metric: metrics.Metric) -> Part:
    return lambda attempts: [metric.score(a.expected, a.text)[metric.name] for a in attempts]


def choice_in(text: str, choices: Sequence[str]) -> str | None:
    """The one choice that an answer names in words of its own; None for none or several."""
    spoken = metrics.without_thoughts(text).lower()
    named = [c for c in choices if re.search(rf"(?<!\w){re.escape(c.lower())}(?!\w)", spoken)]
    longest = [c for c in named if not any(c != other and c.lower() in other.lower() for other in named)]
    return longest[0] if len(longest) == 1 else None


@dataclass(frozen=True)
class RewardFunction:
    """`name`: FILE.py:FUNCTION. `seconds`: that it may take for the answers of a step."""

    name: str
    seconds: float

    @cached_property
    def function(self) -> Callable[..., Sequence[object]]:
        file, _, name = self.name.rpartition(":")
        spec = importlib.util.spec_from_file_location(Path(file).stem, file)
        assert spec is not None and spec.loader is not None
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        if (folder := str(Path(file).parent)) not in sys.path:
            sys.path.append(folder)
        spec.loader.exec_module(module)
        return getattr(module, name)

    def __call__(self, attempts: Sequence[Attempt]) -> list[float | None]:
        """The rewards of some answers. Raises RewardError: it raises, takes too long, or returns something else than a
        number of no more than LARGEST or None for each of them."""
        replies = [
            [{"role": "assistant", "content": a.text}] if isinstance(a.prompt, list) else a.text for a in attempts
        ]
        asked: dict[str, object] = {"prompts": [a.prompt for a in attempts], "completions": replies}
        asked["completion_ids"] = [list(a.tokens) for a in attempts]
        for column in sorted({name for a in attempts for name in a.record}.difference(_OURS)):
            asked[column] = [a.record.get(column) for a in attempts]
        try:
            with contextlib.redirect_stdout(sys.stderr), _at_most(self.seconds):
                takes = inspect.signature(self.function).parameters.values()
                if not any(p.kind is p.VAR_KEYWORD for p in takes):
                    asked = {p.name: asked[p.name] for p in takes if p.name in asked}
                values: list[object] = [v.item() if hasattr(v, "item") else v for v in self.function(**asked)]
        except _TooLong:
            what = f"took more than {self.seconds:g} s for a step's answers"
            raise self._error(what, "--set train.reward_seconds=300, or a faster one") from None
        except (Exception, SystemExit) as error:  # of any kind, of the user's code
            frames = traceback.extract_tb(error.__traceback__)
            users = dropwhile(lambda frame: frame.filename != self.name.rpartition(":")[0], frames)
            places = [(frame.filename, frame.lineno) for frame in users if frame.filename[0] != "<"]
            if isinstance(error, SyntaxError) and error.filename:
                places.append((error.filename, error.lineno))
            where = f" ({Path(places[-1][0]).name}:{places[-1][1]})" if places else ""
            reason = error.msg if isinstance(error, SyntaxError) else first_line(error)
            raise self._error(f"raised {type(error).__name__}: {reason}{where}") from error
        if len(values) != len(attempts):
            raise self._error(f"returned {len(values)} values for {len(attempts)} answers")
        for value, attempt in zip(values, attempts, strict=True):
            if value is not None and not (isinstance(value, int | float) and abs(value) <= LARGEST):
                allowed = f"no number from {-LARGEST:g} to {LARGEST:g} (or None)"
                raise self._error(f"returned {value!r}, {allowed}, for {attempt.text[:80]!r}")
        return [float(value) if isinstance(value, int | float) else None for value in values]

    def _error(self, what: str, fix: str | None = None) -> RewardError:
        return RewardError(f"the reward {self.name} {what}.", fix=fix or f"mend {typed(self.name.rpartition(':')[0])}")


class _TooLong(BaseException):
    """No Exception: code that passes over those does not pass over this."""


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Ends what takes longer by an alarm, also a regular expression that backtracks; in the main thread, where the
    system has alarms."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

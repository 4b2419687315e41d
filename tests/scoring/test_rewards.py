"""What answers are worth: metrics, terms and functions, weighted; and a function that does not do what it should."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from typing import Any

import pytest

from halfbyte.errors import DataError, RewardError
from halfbyte.recipe.evaluation import Eval
from halfbyte.recipe.schema import Train
from halfbyte.scoring.rewards import Attempt, RewardFunction, Rewards, choice_in


def attempt(expected: str, text: str, tokens: int = 5, prompt: Any = "", **record: Any) -> Attempt:
    return Attempt(expected, text, (7,) * tokens, record, prompt)


def rewards(weights: Any, expected: list[str], **settings: Any) -> Rewards:
    train = Train(method="grpo", rewards=weights, max_completion_length=10, reward_seconds=20.0)
    return Rewards.of(train, Eval(**settings), expected)


def test_parts_are_weighted_and_summed() -> None:
    expected = ['{"a": 1, "b": 2}', '{"a": 1}']
    both = rewards({"json_fields": 2, "json_valid": 0.5, "length": -1}, expected)
    tries = [attempt(expected[0], '{"a": 1, "b": 3}', 4), attempt(expected[1], "no", 10)]
    totals, parts = both.score(tries)
    assert parts.tolist() == [[0.5, 1.0, 0.4], [0.0, 0.0, 1.0]]
    assert totals.tolist() == pytest.approx([2 * 0.5 + 0.5 - 0.4, -1.0])


@pytest.mark.parametrize(
    ("name", "expected", "text", "worth"),
    [
        ("number", "so #### 12", "it is #### 12.0", 1.0),
        ("number", "so #### 12", "it is 12", 0.0),
        ("regex", "it is 12", "is it? is 12", 1.0),
        ("exact_match", "yes", " yes\n", 1.0),
        ("exact_match", "yes", "<think>well</think> yes", 1.0),
        ("choice", "yes", "I say Yes.", 1.0),
        ("choice", "yes", "yes or no", 0.0),
        ("format", "x", "<think>a</think> b", 1.0),
        ("format", "x", "b", 0.0),
        ("format", "x", "<think>a <think>b</think>", 0.0),
        ("length", "x", "b", 0.5),
    ],
)
def test_what_a_part_is_worth(name: str, expected: str, text: str, worth: float) -> None:
    settings = {"pattern": r"is (\d+)", "choices": ["yes", "no"]} if name in ("regex", "choice") else {}
    assert rewards(name, [expected], **settings).score([attempt(expected, text)])[0].tolist() == [worth]


def test_a_choice_within_a_longer_one_is_the_longer_one() -> None:
    assert choice_in("not good at all", ["good", "not good"]) == "not good"
    assert choice_in("goodness", ["good", "bad"]) is None


def test_a_metric_without_anything_to_compare_is_refused() -> None:
    with pytest.raises(DataError, match="the metric number"):
        rewards("number", ["no number"])


def test_what_does_not_apply_does_not_count() -> None:
    both = rewards({"number": 1, "length": 1}, ["#### 1", "none"])
    totals, parts = both.score([attempt("none", "#### 1")])
    assert math.isnan(parts[0, 0]) and totals.tolist() == [0.5]
    alone = rewards("number", ["#### 1", "none"])
    assert math.isnan(alone.score([attempt("none", "x")])[0][0])


# ------------------------------------------------------------------ functions
@pytest.fixture
def function(tmp_path: Path) -> Any:
    def of(code: str, seconds: float = 20.0) -> RewardFunction:
        (tmp_path / "mine.py").write_text(code, encoding="utf-8")
        return RewardFunction(f"{tmp_path / 'mine.py'}:score", seconds)

    return of


TRIES = [attempt("a", "one", 1, "Which?", answer=1), attempt("b", "two", 2, "Why?", answer=2)]


def test_a_function_is_called_as_trl_calls_it(function: Any, capsys: pytest.CaptureFixture[str]) -> None:
    own = function(
        "calls = []\n"
        "def score(prompts, completions, completion_ids, answer, **kwargs):\n"
        "    print('seen')\n"
        "    calls.append(1)\n"
        "    assert prompts == ['Which?', 'Why?'] and completions == ['one', 'two'], (prompts, completions)\n"
        "    assert kwargs == {}\n"
        "    return [len(calls) + len(ids) / 10 + a for ids, a in zip(completion_ids, answer)]\n"
    )
    assert own(TRIES) == pytest.approx([2.1, 3.2])
    assert own(TRIES) == pytest.approx([3.1, 4.2]), "it is loaded once"
    out, err = capsys.readouterr()
    assert "seen" in err and not out
    talk = [{"role": "user", "content": "Which?"}]
    told = function("def score(completions):\n    return [float(c[0]['content'] == 'one') for c in completions]\n")
    assert told([attempt("a", "one", 1, talk), attempt("a", "two", 1, talk)]) == [1.0, 0.0]
    assert function("def score(**kwargs):\n    return [None, True]\n")(TRIES) == [None, 1.0]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def score(**k):\n    return 1 / 0\n", r"raised ZeroDivisionError: division by zero \(mine.py:2\)"),
        ("def score(**k):\n    return [1.0]\n", "returned 1 values for 2 answers"),
        (
            "def score(**k):\n    return [1.0, float('nan')]\n",
            r"returned nan, no number from -1e\+09 to 1e\+09 .*for 'two'",
        ),
        ("def score(**k):\n    return [1e300, 0]\n", r"returned 1e\+300, no number from .*for 'one'"),
        ("def score(**k):\n    return ['x', 1]\n", "returned 'x', no number"),
        ("def score(**k):\n    return 3.0\n", r"raised TypeError: 'float' object is not iterable\."),
        ("import sys\ndef score(**k):\n    sys.exit(3)\n", r"raised SystemExit: 3 \(mine.py:3\)"),
        ("import nowhere\n", r"raised ModuleNotFoundError: No module named 'nowhere' \(mine.py:1\)"),
        ("x = 1\n", r"raised AttributeError: module 'mine' has no attribute 'score'\."),
        ("def score(**k)\n    pass\n", r"raised SyntaxError: expected ':' \(mine.py:1\)\."),
    ],
)
def test_what_a_function_does_wrong_is_named(function: Any, code: str, message: str) -> None:
    with pytest.raises(RewardError, match=rf"the reward .*mine.py:score {message}"):
        function(code)(TRIES)


def test_a_function_that_hangs_is_ended(function: Any) -> None:
    # a regular expression that backtracks holds the interpreter: no other thread could end it
    hangs = ["re.match(r'(a+)+$', 'a' * 40 + 'b')", "sleep(60)"]
    for hang in hangs:
        code = f"def score(**k):\n    try:\n        {hang}\n    except Exception:\n        pass\n"
        code = f"import re\nfrom time import sleep\n{code}"
        with pytest.raises(RewardError, match=r"took more than 0.2 s .*\n  fix: --set train.reward_seconds=300"):
            function(code, 0.2)(TRIES)
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL and signal.getitimer(signal.ITIMER_REAL)[0] == 0

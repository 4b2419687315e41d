"""Metrics against cases by hand, and what has nothing to compare with."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest

from halfbyte.errors import DataError, RecipeError
from halfbyte.recipe.evaluation import METRICS, Eval
from halfbyte.scoring import metrics, sheet


def scores(name: str, expected: str, text: str, **settings: Any) -> metrics.Scores:
    (metric,) = metrics.of(Eval(**settings), [name], [expected])
    made = metric.score(expected, text)
    assert set(made) == set(metric.names)
    return made


@pytest.mark.parametrize(
    ("name", "expected", "text", "value"),
    [
        ("exact_match", "yes", " yes\n", 1),
        ("exact_match", "yes", "Yes", 0),
        ("exact_match", "yes", "yes.", 0),
        ("normalized_match", "The cat, and a dog!", "the Cat and dog", 1),
        ("normalized_match", "x  y", "x\ty", 1),
        ("normalized_match", "another", "nother", 0),  # an article inside of a word is none
        ("normalized_match", "ﬁne", "fine", 1),  # one letter that is two
        ("normalized_match", "cat", "cats", 0),
        ("number", "so\n#### 18", "It is 9 * 2.\n#### 18", 1),
        ("number", "#### 1,234", "#### 1234.0", 1),
        ("number", "#### -3", "#### - 3", 0),
        ("number", "#### .5", "#### $0.50 each", 1),
        ("number", "#### 5", "the answer is 5", 0),  # no mark
        ("number", "#### 5", "#### five", 0),
        ("number", "#### 5", "#### 5\nQuestion: ...\n#### 7", 1),  # what is written on after the answer
        ("json_valid", "", '{"a": [1, 2]}', 1),
        ("json_valid", "", " 3 ", 1),
        ("json_valid", "", "{'a': 1}", 0),
        ("json_valid", "", '{"a": NaN}', 0),
        ("json_valid", "", '{"a": 1} and more', 0),
        ("json_valid", "", "", 0),
        ("json_valid", "", "[" * 100_000, 0),
        ("exact_match", "56", "<think>\n30 plus 26 makes 56.\n</think>\n\n56", 1),
        ("exact_match", "56", "30 plus 26.\n</think>\n\n56", 1),  # the prompt opens the thoughts
        ("exact_match", "<think>Add.</think>56", "<think>They want a sum.</think>\n56", 1),
        ("exact_match", "56", "<think>\n30 plus 26 makes 57.\n</think>\n\n57", 0),
        ("number", "#### 5", "<think>#### 6?</think>#### 5", 1),
        ("number", "#### 5", "<think>It may be #### 5", 0),  # cut before the answer
        ("json_valid", "", "<think>An object.</think>{}", 1),
    ],
)
def test_a_score_of_one_answer(name: str, expected: str, text: str, value: float) -> None:
    assert scores(name, expected, text) == {name: value}


def test_the_number_may_stand_behind_another_mark() -> None:
    assert scores("number", "Answer: 7 apples", "Answer: 7", mark="Answer:") == {"number": 1}
    assert metrics.number_after("=", "1 + 1 = 2e3") == Decimal(2)


@pytest.mark.parametrize(
    ("pattern", "text", "value"),
    [
        (r"is (\d+)", "so it is 12.", 1),
        (r"is (\d+)", "so it is 13", 0),
        (r"is (\d+)", "12", 0),
        (r"\d+", "12 or 13", 1),
    ],
)
def test_a_regular_expression_counts_by_its_first_group_or_all_of_it(pattern: str, text: str, value: float) -> None:
    assert scores("regex", "it is 12", text, pattern=pattern) == {"regex": value}


FORM = {"a": 1, "b": {"c": [1, "x"]}, "d": True}


@pytest.mark.parametrize(
    ("text", "each"),
    [
        (FORM, (1, 1, 1)),
        ({"d": True, "b": {"c": [1, "x"]}, "a": 1.0, "more": 2}, (1, 1, 1)),
        ({"a": "1", "b": {"c": ["x", 1]}, "d": 1}, (0, 0, 0)),  # text is no number, lists have an order, 1 is not true
        ({"a": 1, "b": {"c": [1, "x"], "e": None}}, (1, 0, 0)),
        ([FORM], (0, 0, 0)),
        ("no JSON", (0, 0, 0)),
    ],
)
def test_json_is_compared_field_by_field(text: object, each: tuple[int, ...]) -> None:
    said = text if isinstance(text, str) else json.dumps(text)
    made = scores("json_fields", json.dumps(FORM), said)
    assert [made[f"json_fields.{name}"] for name in "abd"] == list(each)
    assert made["json_fields"] == pytest.approx(sum(each) / 3)


def test_json_fields_may_be_some_and_may_be_missing_in_a_row() -> None:
    expected = [json.dumps({"a": 1}), json.dumps({"b": 2}), "text"]
    (metric,) = metrics.of(Eval(json_fields=("a",)), ["json_fields"], expected)
    none = {"json_fields": None, "json_fields.a": None}
    assert [metric.score(e, '{"a": 1}') for e in expected] == [{"json_fields": 1, "json_fields.a": 1}, none, none]


def test_a_row_without_a_number_is_not_counted() -> None:
    (metric,) = metrics.of(Eval(), ["number"], ["#### 1", "no number"])
    assert [metric.score(e, "#### 1")["number"] for e in ("#### 1", "no number")] == [1, None]


@pytest.mark.parametrize(
    ("name", "settings", "expected", "said"),
    [
        ("number", {}, ["1", "2"], r"not one of the 2 expected answers has a number after the mark '####'"),
        ("number", {"mark": "Answer:"}, ["#### 1"], r"fix: say what stands before the number: --set"),
        ("regex", {"pattern": "x"}, ["y" * 200], r"eval.pattern 'x' matches not one .* first one: 'y+\.\.\.'"),
        ("json_fields", {}, ["text", "[1]"], r"not one of the 2 expected answers is a JSON object"),
        ("json_fields", {"json_fields": ["z"]}, ['{"a": 1}'], r"no expected answer has the field 'z' .*there are a\."),
        ("exact_match", {}, [], r"no row asks for an answer"),
    ],
)
def test_a_metric_with_nothing_to_compare_says_so(
    name: str, settings: dict[str, Any], expected: list[str], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        metrics.of(Eval(**settings), [name], expected)


def test_what_can_be_told_without_rows_is_told_at_once() -> None:
    with pytest.raises(RecipeError, match=f"there is no metric rouge; known: loss, perplexity, {', '.join(METRICS)}"):
        sheet.EvalOptions.of(Eval(), ["rouge"])
    with pytest.raises(RecipeError, match=r"regex needs a pattern \(eval.pattern\)"):
        sheet.EvalOptions.of(Eval(), ["regex"])
    assert sheet.EvalOptions.of(Eval(), ["loss"]).names == ()
    assert sheet.EvalOptions.of(Eval(metrics=("number",))).names == ("number",)
    assert sheet.EvalOptions.of(Eval(metrics=("number",)), ["json_valid"]).names == ("json_valid",)

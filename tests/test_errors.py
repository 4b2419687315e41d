"""Messages as a user reads them: what, where, and the fix on a line of its own."""

from __future__ import annotations

import shlex

import pytest

from halfbyte import errors
from halfbyte.errors import HalfbyteError, RecipeError, TrainError, first_line, typed, without_secrets


def test_a_fix_has_a_line_of_its_own() -> None:
    assert str(HalfbyteError("this is wrong.")) == "this is wrong."
    error = HalfbyteError("this is wrong.", fix="do that")
    assert str(error) == "this is wrong.\n  fix: do that"
    assert (error.message, error.fix) == ("this is wrong.", "do that")


def test_a_path_as_it_is_typed_is_no_option() -> None:
    names = ("a.yaml", "-a.yaml", "-", "my run", "-my 'run'", "a-b", "é")
    assert [shlex.split(typed(name)) for name in names] == [["./" * name.startswith("-") + name] for name in names]


@pytest.mark.parametrize(
    ("problems", "where", "text"),
    [
        ("r must be >= 1", None, "r must be >= 1"),
        (["r must be >= 1"], "a.yaml", "a.yaml: r must be >= 1"),
        (["one", "two"], "a.yaml", "a.yaml: 2 problems\n  - one\n  - two"),
        (["one", "two"], None, "2 problems\n  - one\n  - two"),
    ],
)
def test_a_recipe_lists_all_its_problems(problems: str | list[str], where: str | None, text: str) -> None:
    error = RecipeError(problems, where=where, fix="halfbyte init")
    assert str(error) == f"{text}\n  fix: halfbyte init"
    assert error.problems == ([problems] if isinstance(problems, str) else problems)


def test_a_mistake_leaves_with_2_and_a_failed_run_with_1() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, HalfbyteError)]
    assert {kind.__name__: kind.exit_code for kind in kinds if kind.exit_code != 2} == {
        "TrainError": 1,
        "RewardError": 1,
        "DiskFull": 1,
        "ExportError": 1,
        "Unforeseen": 1,
    }
    assert TrainError in kinds and len(kinds) == 15


def test_the_first_line_of_a_library() -> None:
    assert first_line(ValueError("\n  one\ntwo")) == "one"
    assert first_line(ValueError("x" * 500), 10) == "x" * 10
    assert first_line(KeyboardInterrupt()) == "KeyboardInterrupt"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("401 for hf_abcdefghijklmnopqrstuvwxyz", "401 for hf_***"),
        ("Authorization: Bearer my-own-value-123", "Authorization: Bearer ***"),
        ("https://me:pass-word@host/model", "https://***@host/model"),
        ("sk-abcdefghijklmnop and hf_short", "sk-*** and hf_short"),
        ("a run of 30 steps, runs/hf_test", "a run of 30 steps, runs/hf_test"),
    ],
)
def test_tokens_are_hidden(text: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "my-own-value-123")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert without_secrets(text) == said

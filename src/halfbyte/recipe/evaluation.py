"""The `eval:` section of a recipe: what answers are scored by. No torch; pydantic."""

import re
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from halfbyte.recipe.data import Int, Section, field, is_list_of_names
from halfbyte.recipe.values import Count, Names, Seed

# Name -> what it is the share of; `halfbyte eval --metric NAME`.
METRICS = {
    "exact_match": "answers equal to the expected one, up to white space around them",
    "normalized_match": "the same without case, punctuation, articles (a, an, the) and repeated white space",
    "number": "the number after the mark (eval.mark) is that of the expected answer",
    "regex": "what eval.pattern finds is what it finds in the expected answer",
    "json_valid": "answers that are JSON",
    "json_fields": "fields of the expected JSON that the answer has with the same value",
    "choice": "the expected answer is the most likely of the row's choices (eval.choices)",
}
LOSSES = ("loss", "perplexity")
OF_PAIRS = ("margin", "chosen_reward", "chosen_logp", "rejected_logp")  # any numbers, and no shares


def _metrics(value: object) -> object:
    names = (value,) if isinstance(value, str) else value
    if names is None:
        return None
    if not is_list_of_names(names) or not set(names) <= {*METRICS, *LOSSES}:
        raise ValueError(f"must be a list of {', '.join(METRICS)} (loss and perplexity are always among them)")
    return tuple(dict.fromkeys(name for name in names if name not in LOSSES))


def _pattern(value: str | None) -> str | None:
    try:
        re.compile(value or "")
    except re.error as error:
        raise ValueError(f"must be a regular expression ({error})") from None
    return value


def _choices(value: object) -> object:
    if isinstance(value, (tuple, list)):
        if any(isinstance(name, bool) for name in value):
            texts = 'a list of texts; YAML reads yes and no as true and false: write ["yes", "no"]'
            raise ValueError(f"must be {texts}")
        value = tuple(str(name) if isinstance(name, int | float) else name for name in value)
    if value is not None and not (is_list_of_names(value) and len(set(value)) == len(value) > 1):
        raise ValueError("must be a list of two answers or more")
    return value


Choices = Annotated[tuple[str, ...] | None, BeforeValidator(_choices)]


class Eval(Section):
    """What answers are scored by, in `halfbyte eval` and, where `metrics` names any, while training."""

    metrics: Annotated[tuple[str, ...] | None, BeforeValidator(_metrics)] = field(
        None, f"beside loss and perplexity: {', '.join(METRICS)}; null: exact_match after a training, none in it"
    )
    mark: str = field("####", "number: the first number after it counts", min_length=1)
    pattern: Annotated[str | None, AfterValidator(_pattern)] = field(
        None, "regex: a regular expression; its first group counts, or all that it matches, at its first match"
    )
    json_fields: Names | None = field(None, "json_fields: only these, such as [name, date]; null: all of the expected")
    choices: Choices = field(None, "choice: the answers to choose from; null: those that the rows expect")
    max_new_tokens: Count = field(256, "the longest answer, in tokens")
    rows: Count | None = field(None, "held-out rows that are answered in an evaluation of a training; null: all")
    resamples: Annotated[Int, Field(ge=100)] = field(2000, "resamples of the rows, of an interval of losses (95%)")
    seed: Seed = field(0, "seed of the resamples")

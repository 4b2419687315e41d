"""The named tables: whole, without contradictions, and the one place of each default."""

from __future__ import annotations

from typing import Any

import pytest

from halfbyte.recipe import fields
from halfbyte.recipe.schema import SECTIONS, Lora, Recipe, Train

TABLES: dict[str, tuple[Any, dict[str, str]]] = {
    "lora": (Lora, fields.LORA_REFUSED),
    "train": (Train, fields.TRAIN_REFUSED),
}


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_says_what_it_does(section: str) -> None:
    for name, info in SECTIONS[section].model_fields.items():
        assert info.description, name


def test_every_default_is_itself_a_valid_value() -> None:
    """Defaults are not validated when they are used, so a wrong one would pass in silence."""
    recipe = Recipe.model_validate({"model": "m", "data": {"train": "t"}})
    again = Recipe.model_validate(recipe.model_dump())
    assert again == recipe
    assert again.model_dump() == recipe.model_dump()


@pytest.mark.parametrize("section", TABLES)
def test_nothing_is_both_taken_and_refused_and_each_refusal_has_a_reason(section: str) -> None:
    model, refused = TABLES[section]
    assert not set(model.model_fields) & set(refused)
    for name, reason in refused.items():
        assert 10 < len(reason) < 110 and not reason.endswith("."), name


def test_hints_point_to_fields_that_exist() -> None:
    known = {f"{section}.{name}".lstrip(".") for section, model in SECTIONS.items() for name in model.model_fields}
    names = {dotted.rsplit(".", 1)[-1] for dotted in known}
    for old, hint in fields.ELSEWHERE.items():
        assert hint.split(":")[0].split(",")[0] in known, old
        assert old not in names, f"{old} is a field; nobody would see its hint"
    assert not set(fields.NOT_NEEDED) & {*fields.ELSEWHERE, *names}


def test_what_a_schedule_needs_is_among_what_it_takes() -> None:
    for schedule, needed in fields.SCHEDULES_NEED.items():
        assert set(needed) <= set(fields.SCHEDULES[schedule])
    assert not set(fields.SCHEDULES) & set(fields.SCHEDULES_REFUSED)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "null"), (True, "true"), (False, "false"), ((), "[]"), ({}, "{}"), (["a"], '["a"]'), (2e-4, "0.0002")],
)
def test_values_are_shown_as_yaml_writes_them(value: object, text: str) -> None:
    assert fields.shown(value) == text

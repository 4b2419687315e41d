"""What a model is trained to be (`task:`), what each task reads of a recipe and refuses. No torch; pydantic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from pydantic import model_validator

from halfbyte.recipe.data import Section
from halfbyte.recipe.values import one_of
from halfbyte.types import Document

CAUSAL_LM, *HEADED = TASKS = ("causal_lm", "classify", "regress")
CLASSIFY, REGRESS = HEADED
REFUSED = {"tag": "labels of single tokens are not built; classify labels whole texts", "embed": "it is not built"}
Task = Annotated[Literal["causal_lm", "classify", "regress"], one_of(TASKS, REFUSED)]
FORMAT = "labels"  # of the rows of other tasks than causal_lm
# Fields that these do not read, and why.
_UNREAD = {
    "data.mask": "a text has one label",
    "data.packing": "rows are texts of their own",
    "data.chat_template": "texts are read as they are",
    "train.method": "labels are learned by the loss of the head",
    "train.max_forgetting": "nothing is written that could be forgotten",
    "train.within": "its learning rates are probed for a causal LM's loss",
    "quant.compute": "8-bit products are proven on a causal LM's loss",
    "eval.metrics": "halfbyte eval scores labels by themselves",
    "lora.modules_to_save": "the head trains whole by itself",
    "lora.adapter": "an adapter of another task has no head",
}


class FormatOfTask(Section):
    """A recipe whose rows have the format of its task, where it leaves that open."""

    @model_validator(mode="before")
    @classmethod
    def _with_format(cls, values: object) -> object:
        data = values.get("data") if isinstance(values, Mapping) and values.get("task") in HEADED else None
        if not isinstance(values, Mapping) or not isinstance(data, Mapping) or data.get("format", "auto") != "auto":
            return values
        return {**values, "data": {**data, "format": FORMAT}}


def problems(given: Document) -> Iterator[str]:
    """What excludes each other of task and other fields, in sentences. `given`: a recipe's values but for defaults."""
    task, shape = given.get("task", CAUSAL_LM), given["data"].get("format", "auto")
    if (shape == FORMAT) != (task != CAUSAL_LM):
        yield f"data.format {FORMAT} is of task {CLASSIFY} and {REGRESS}; data.format is {shape}, and task is {task}"
    if task != CLASSIFY and "labels" in given:
        yield f"labels names those of task classify, and task is {task}"
    if task == REGRESS and "label_smoothing_factor" in given.get("train", {}):
        yield f"train.label_smoothing_factor is for labels, and task is {task}"
    for name, why in _UNREAD.items() if task != CAUSAL_LM else ():
        section, _, leaf = name.partition(".")
        if leaf in given.get(section, {}):
            yield f"{name} is not read with task {task}: {why}"

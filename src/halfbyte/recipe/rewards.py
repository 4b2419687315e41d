"""The fields of `train:` that GRPO and RLOO read: how answers are drawn, what they are rewarded by. No torch; pydantic.

Source: names and defaults of TRL 1.16's `GRPOConfig` and `RLOOConfig`, but for `max_completion_length` (512 there) and
`mask_truncated_completions` (false there); `rewards` are its `reward_funcs` with their `reward_weights`.
"""

import ast
import re
import symtable
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from halfbyte.errors import RecipeError, typed
from halfbyte.recipe.data import Section, field
from halfbyte.recipe.evaluation import METRICS
from halfbyte.recipe.values import Bool, Count, Float

TERMS = ("length", "format")  # what an answer may be rewarded by beside metrics and functions
LARGEST = 1e9  # of a function's values and of weights: their squares and sums are numbers, in fp32 too
REWARD = "reward"  # the score of an evaluation that says which adapter is the best
LOSS_TYPES = ("dapo", "grpo", "dr_grpo", "bnpo")
# Method -> its fields with their defaults, and defaults of others.
_BOTH = {"rewards": None, "num_generations": 8, "max_completion_length": 256, "temperature": 1.0, "epsilon": 0.2,
         "epsilon_high": None, "mask_truncated_completions": True, "reward_seconds": 60.0,
         "metric_for_best_model": REWARD}  # fmt: skip
METHODS: dict[str, dict[str, object]] = {
    "grpo": {**_BOTH, "loss_type": "dapo", "scale_rewards": "group"},
    "rloo": {**_BOTH, "num_generations": 2},
}
# What a base is that answers are written with: `quant.` field -> what it may not be, what instead, and why.
_WRITES = {"compute": ("int8", "exact or auto", "by exact products, and trains by the same forward"),
           "placement": ("sharded", "auto or streamed", "in each process with the whole base")}  # fmt: skip
_FUNCTION = re.compile(r".+\.py:[^\W\d]\w*")


def _rewards(value: object) -> object:
    """Names with their weights; a function's file by its whole path, as a run may be resumed elsewhere."""
    given = {value: 1.0} if isinstance(value, str) else value
    given = dict.fromkeys(given, 1.0) if isinstance(given, list | tuple) else given
    if given is None:
        return None
    if not isinstance(given, Mapping) or not given:
        raise ValueError("must be a name, a list, or names with weights, such as {json_fields: 1, length: -0.1}")
    weights = dict[str, float]()
    for name, weight in given.items():
        function = _FUNCTION.fullmatch(str(name))
        if not function and name not in {*METRICS, *TERMS}:
            raise ValueError(f"must name {', '.join((*METRICS, *TERMS))}, or a function as FILE.py:FUNCTION")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) <= LARGEST:
            raise ValueError(f"must give {name} a number from {-LARGEST:g} to {LARGEST:g} as its weight")
        weights[str(Path(name).absolute()) if function else name] = float(weight)
    return weights


_NO_FUNCTION = (ast.Constant, ast.JoinedStr, ast.List, ast.Tuple, ast.Dict, ast.Set)


def check_function(name: str) -> None:
    """Raises RecipeError: the file of FILE.py:FUNCTION is not there, is not Python, or has no such function, as far as
    that is seen without running it."""
    file, _, function = name.rpartition(":")
    fix = "name one that is there: --set train.rewards=FILE.py:FUNCTION"
    if not Path(file).is_file():
        raise RecipeError(f"train.rewards: there is no file {file}.", fix=fix)
    try:
        with tokenize.open(file) as source:
            text = source.read()
        tree, names = ast.parse(text, file), symtable.symtable(text, file, "exec")
    except (SyntaxError, ValueError) as error:  # ValueError: a zero byte, no UTF-8
        line, what = getattr(error, "lineno", None), getattr(error, "msg", error)
        where = file if line is None else f"{file}:{line}"
        raise RecipeError(f"train.rewards: {where} is not Python: {what}.", fix=f"mend {typed(file)}") from None
    symbol = names.lookup(function) if function in names.get_identifiers() else None
    if symbol is None or not (symbol.is_assigned() or symbol.is_imported()):
        if not re.search(r"import\s*\*", text):
            raise RecipeError(f"train.rewards: {file} has no function {function}.", fix=fix)
        return
    assigns = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    values = [a.value for a in assigns if any(isinstance(t, ast.Name) and t.id == function for t in a.targets)]
    is_value = bool(values) and all(isinstance(value, _NO_FUNCTION) for value in values)
    if is_value and not (symbol.is_namespace() or symbol.is_imported()):
        raise RecipeError(f"train.rewards: {file}:{values[-1].lineno} {function} is not a function.", fix=fix)


class RewardFields(Section):
    """What grpo and rloo read; null with another method."""

    rewards: Annotated[dict[str, float] | None, BeforeValidator(_rewards)] = field(
        None,
        "grpo, rloo: what an answer is worth: metrics as in eval.metrics, length, format, FILE.py:FUNCTION (TRL's "
        "signature); a name, a list, or names with weights",
    )
    num_generations: Annotated[Count, Field(ge=2)] | None = field(
        None, "grpo, rloo: answers to each prompt, a group; a step has batch x accumulation answers"
    )
    max_completion_length: Count | None = field(None, "grpo, rloo: the longest answer, in tokens")
    temperature: Annotated[Float, Field(gt=0)] | None = field(None, "grpo, rloo: of what is drawn", "0.7 to 1")
    epsilon: Annotated[Float, Field(gt=0, lt=1)] | None = field(
        None, "grpo, rloo: a ratio of probabilities counts from 1 - epsilon to 1 + epsilon"
    )
    epsilon_high: Annotated[Float, Field(gt=0)] | None = field(None, "grpo, rloo: to 1 + this instead, as 0.28 (DAPO)")
    scale_rewards: Literal["group", "none"] | None = field(
        None, "grpo: advantages are in standard deviations of their group, or as they are (Dr. GRPO)"
    )
    mask_truncated_completions: Bool | None = field(
        None, "grpo, rloo: leave out answers that are cut off at max_completion_length"
    )
    reward_seconds: Annotated[Float, Field(gt=0)] | None = field(
        None, "grpo, rloo: that a function may take for a step's answers"
    )

    @property
    def draws(self) -> bool:
        """Whether a run writes the answers that it learns from."""
        return self.num_generations is not None


def problems(train: RewardFields, pattern: str | None, dropout: float, quant: Mapping[str, str]) -> Iterator[str]:
    """What a method that writes answers excludes, in sentences. `pattern`: of `eval:`; `dropout`: of `lora:`."""
    values = train.model_dump()
    name, answers = values["method"], values["per_device_train_batch_size"] * values["gradient_accumulation_steps"]
    if getattr(train, "referenced", False) and quant["compute"] == "int8":
        yield f"quant.compute int8: train.method {name} reads its reference by exact products; exact or auto"
    if not train.draws:
        if values["metric_for_best_model"] == REWARD:
            yield f"train.metric_for_best_model {REWARD} is for grpo and rloo, and train.method is {name}"
        return
    if not train.rewards:
        yield f"train.method {name} needs train.rewards, such as exact_match, {{length: -0.1}} or FILE.py:FUNCTION"
    if "regex" in (train.rewards or ()) and not pattern:
        yield "train.rewards has regex, which needs eval.pattern, a regular expression"
    if answers % (train.num_generations or 1):
        yield (
            f"train.per_device_train_batch_size x train.gradient_accumulation_steps is {answers} answers a step, no "
            f"multiple of train.num_generations {train.num_generations}"
        )
    if dropout:
        yield f"lora.lora_dropout {dropout:g}: train.method {name} draws answers without dropout; 0"
    for field_name, (given, instead, why) in _WRITES.items():
        if quant[field_name] == given:
            yield f"quant.{field_name} {given}: train.method {name} writes {why}; {instead}"

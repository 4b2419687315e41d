"""`train.method`: what is learned of the rows, and the fields that each method reads. No torch; pydantic.

Source: names and defaults of TRL 1.16: `DPOConfig`, `KTOConfig`, `ORPOConfig`, `CPOConfig`; SimPO, a `loss_type` there,
is a method here, with the beta of its paper (arXiv:2405.14734).
"""

from collections.abc import Iterator, Mapping
from typing import Annotated

from pydantic import Field, model_validator

from halfbyte.recipe import rewards
from halfbyte.recipe.data import Data, DataEntry, field
from halfbyte.recipe.values import Float, one_of

# Method -> its fields with their defaults; None: off.
METHODS: dict[str, dict[str, object]] = {
    "sft": {},
    "dpo": {"beta": 0.1, "loss_type": "sigmoid", "label_smoothing": 0.0, "ld_alpha": None, "rpo_alpha": None,
            "discopop_tau": 0.05},
    "ipo": {"beta": 0.1, "ld_alpha": None, "rpo_alpha": None},
    "kto": {"beta": 0.1, "loss_type": "kto", "desirable_weight": 1.0, "undesirable_weight": 1.0},
    "orpo": {"beta": 0.1},
    "cpo": {"beta": 0.1, "loss_type": "sigmoid", "label_smoothing": 0.0, "cpo_alpha": 1.0},
    "simpo": {"beta": 2.0, "simpo_gamma": 0.5, "label_smoothing": 0.0, "cpo_alpha": 0.0},
    **rewards.METHODS,
}  # fmt: skip
# Method -> its losses by name; the others have one.
LOSS_TYPES = {
    "dpo": ("sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard",
            "apo_zero", "apo_down", "discopop"),
    "kto": ("kto", "apo_zero_unpaired"),
    "cpo": ("sigmoid", "hinge", "ipo"),
    "grpo": rewards.LOSS_TYPES,
}  # fmt: skip
_SORTS = "it sorts the texts of a whole batch, which no split into micro-batches can do"
LOSSES_REFUSED = {"aot": _SORTS, "aot_unpaired": _SORTS, "sft": "train.rpo_alpha says how much of it is added",
                  "simpo": "it is a method: train.method: simpo"}  # fmt: skip
# Method -> the format of its rows, where it is not one of supervised fine-tuning.
FORMATS = {**dict.fromkeys(("dpo", "ipo", "orpo", "cpo", "simpo"), "preference"), "kto": "unpaired_preference"}
REFERENCED = frozenset({"dpo", "ipo", "kto"})  # their losses are measured from the model that a run begins with
FOR_SFT = ("label_smoothing_factor", "max_forgetting", "within")  # of `train:`
RATE = 5e-5  # unless the recipe has one: a quarter of supervised fine-tuning's

NotNegative = Annotated[Float, Field(ge=0)] | None
Positive = Annotated[Float, Field(gt=0)] | None
LossType = Annotated[str, one_of(lambda: [n for names in LOSS_TYPES.values() for n in names], LOSSES_REFUSED)] | None


class MethodFields(rewards.RewardFields):
    """What is learned of the rows. A field of another method is null."""

    method: Annotated[str, one_of(METHODS)] = field(
        "sft",
        "what is learned: sft (the rows' answers), which answer is better (dpo, ipo, kto, orpo, cpo, simpo), or what "
        "is rewarded of answers that the model writes itself (grpo, rloo)",
    )
    beta: Positive = field(
        None, "how much a difference of log-probabilities counts; with a reference, how near it is kept", "0.01 to 0.5"
    )
    loss_type: LossType = field(None, "dpo, kto, cpo, grpo: which loss, by TRL's name; null: the first of the method")
    label_smoothing: Annotated[Float, Field(ge=0, lt=0.5)] | None = field(
        None, "dpo, cpo, simpo: the share of pairs that are thought to be the wrong way round"
    )
    ld_alpha: Annotated[Float, Field(ge=0, le=1)] | None = field(
        None, "dpo, ipo: what a token counts that the longer answer has more than the other (LD-DPO); null: as others"
    )
    rpo_alpha: NotNegative = field(None, "dpo, ipo: weight of the better answers' own loss (TRL: [sigmoid, sft])")
    discopop_tau: Positive = field(None, "dpo with loss_type discopop: its temperature")
    desirable_weight: NotNegative = field(None, "kto: what a good answer counts")
    undesirable_weight: NotNegative = field(None, "kto: what a bad answer counts")
    cpo_alpha: NotNegative = field(None, "cpo, simpo: weight of the better answers' own loss")
    simpo_gamma: NotNegative = field(None, "simpo: the margin that the better answer shall have")

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_method(cls, value: object) -> object:
        """What the method reads and nobody gave."""
        return {**METHODS.get(str(value.get("method")), {}), **value} if isinstance(value, Mapping) else value

    @property
    def referenced(self) -> bool:
        return self.method in REFERENCED


def with_defaults(values: object) -> object:
    """A recipe's values with what its method takes where nobody says: how rows are read, dropout and learning rate."""
    if not isinstance(values, Mapping) or not isinstance(train := values.get("train"), Mapping):
        return values
    if (method := str(train.get("method", "sft"))) not in METHODS or method == "sft":
        return values
    unset: dict[str, dict[str, object]] = {"train": {"learning_rate": RATE}, "lora": {"lora_dropout": 0.0}, "data": {}}
    if wanted := FORMATS.get(method):
        unset["data"] = {"mask": "assistant", "format": wanted}
    given = {name: {} if values.get(name) is None else values[name] for name in unset}
    known = {name: {**unset[name], **section} for name, section in given.items() if isinstance(section, Mapping)}
    if wanted and known.get("data", {}).get("format") == "auto":
        known["data"]["format"] = wanted
    return {**values, **known}


def problems(method: MethodFields, data: Data) -> Iterator[str]:
    """What the method of a recipe's `train:` excludes, in sentences."""
    name, loss = method.method, method.loss_type
    wanted = FORMATS.get(name)
    for other in MethodFields.model_fields:
        if getattr(method, other) is not None and other not in ("method", *METHODS[name]):
            readers = ", ".join(m for m, fields in METHODS.items() if other in fields)
            yield f"train.{other} is not read with train.method {name}; {readers} read it"
    if loss is not None and loss not in LOSS_TYPES.get(name, (loss,)):
        yield f"train.loss_type {loss} is not one of train.method {name}: {', '.join(LOSS_TYPES[name])}"
    if loss == "exo_pair" and not method.label_smoothing:
        yield "train.loss_type exo_pair needs train.label_smoothing above 0, such as 0.001"
    entries = [e for names in (data.train, data.eval) if not isinstance(names, str) for e in names]
    for given in {data.format, *(e.format or data.format for e in entries if isinstance(e, DataEntry))}:
        if given != wanted and {given, wanted} & {*FORMATS.values()}:
            learns = f"reads rows of data.format {wanted or 'messages, prompt_completion and the like'}"
            yield f"train.method {name} {learns}, and data.format is {given}"
    if name == "sft":
        return
    if data.weights:
        yield f"data.weights is for train.method sft, and train.method is {name}"
    if data.mask == "all":
        yield f"data.mask all is not for train.method {name}: answers are compared, and prompts are not"
    for other in FOR_SFT:
        if (given := getattr(method, other)) != type(method).model_fields[other].default:
            yield f"train.{other} {given} is for train.method sft, and train.method is {name}"
    if getattr(method, "learning_rate", None) == "auto":
        yield f"train.learning_rate auto is a law of sft, and train.method is {name}; a number, such as {RATE:g}"

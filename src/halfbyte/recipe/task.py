"""What a model is trained to be (`task:`), what each task reads of a recipe and refuses. No torch; pydantic."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from halfbyte.errors import RecipeError
from halfbyte.recipe.data import Section, field
from halfbyte.recipe.fields import UNREAD
from halfbyte.recipe.values import Count, Float, one_of
from halfbyte.system import limits
from halfbyte.types import Document

TASKS = ("causal_lm", "classify", "regress", "tag", "embed")
CAUSAL_LM, CLASSIFY, REGRESS, TAG, EMBED = TASKS
HEADS = (CLASSIFY, REGRESS, TAG)
Task = Annotated[Literal["causal_lm", "classify", "regress", "tag", "embed"], one_of(TASKS)]
FORMATS = {CLASSIFY: "labels", REGRESS: "labels", TAG: "tags", EMBED: "vectors"}  # of rows
RANKING, COSENT = "MultipleNegativesRankingLoss", "CoSENTLoss"
TRIPLET, GROUPS = "TripletLoss", "BatchAllTripletLoss"
POOLING_FILE = "1_Pooling/config.json"  # sentence-transformers', beside a model


ClassWeight = Literal["balanced"] | dict[str, Annotated[float, Field(gt=0)]] | None


class VectorFields(Section):
    """Of task embed: the loss, and how a vector is made of a text."""

    loss: Literal["MultipleNegativesRankingLoss", "CoSENTLoss", "TripletLoss", "BatchAllTripletLoss"] = field(
        RANKING,
        "MultipleNegativesRankingLoss (query, passage, negatives), CoSENTLoss (two texts, score), TripletLoss, "
        "BatchAllTripletLoss (text, label)",
    )
    scale: Float = field(20.0, "the similarity is multiplied by it before softmax or CoSENT's exponential", gt=0)
    margin: Float = field(5.0, "of triplets: how much nearer what fits must be than what does not", gt=0)
    matryoshka_dims: tuple[Count, ...] = field(
        (), "MatryoshkaLoss around it: the loss of so many first numbers, summed"
    )
    matryoshka_weights: tuple[Float, ...] = field((), "what each of matryoshka_dims counts for; empty: all 1")
    pooling: Literal["auto", "lasttoken", "mean", "cls"] = field(
        "auto",
        "a text's vector: of its last token, of its first (cls), or their mean",
        "the model's 1_Pooling/config.json; else encoders mean, others lasttoken",
    )

    def of_folder(self, folder: Path) -> Self:
        """With the pooling of sentence-transformers' own file in a model's folder, where the recipe leaves it open.
        Raises RecipeError: it pools otherwise than a recipe can."""
        if self.pooling != "auto" or not (path := folder / POOLING_FILE).is_file():
            return self
        try:
            given: Document = limits.read_config(path)  # type: ignore[assignment]
            modes = {name.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
                     for name, on in given.items() if name.startswith("pooling_mode_") and on is True}  # fmt: skip
        except (OSError, ValueError, AttributeError) as error:
            raise RecipeError(f"{path} cannot be read: {error}.", fix="--set vectors.pooling=mean") from None
        modes = {given["pooling_mode"]} if "pooling_mode" in given else modes
        if len(modes) != 1 or not modes <= {"cls", "mean", "lasttoken"}:
            what = f"{path} pools by {', '.join(sorted(map(str, modes))) or 'nothing'}, which is not learned here."
            raise RecipeError(what, fix="--set vectors.pooling=mean; or cls, or lasttoken")
        return self.model_copy(update={"pooling": modes.pop()})


class FormatOfTask(Section):
    """A recipe whose rows have the format of its task, where it leaves that open."""

    @model_validator(mode="before")
    @classmethod
    def _with_format(cls, values: object) -> object:
        data = values.get("data") if isinstance(values, Mapping) and values.get("task") in FORMATS else None
        if not isinstance(values, Mapping) or not isinstance(data, Mapping) or data.get("format", "auto") != "auto":
            return values
        return {**values, "data": {**data, "format": FORMATS[values["task"]]}}


def problems(given: Document) -> Iterator[str]:
    """What excludes each other of task and other fields, in sentences. `given`: a recipe's values but for defaults."""
    task, shape = given.get("task", CAUSAL_LM), given["data"].get("format", "auto")
    if FORMATS.get(task) != (shape if shape in FORMATS.values() else None):
        own = "labels is of task classify and regress, tags of tag, vectors of embed"
        yield f"data.format {own}; it is {shape}, and task is {task}"
    if task != EMBED and ("vectors" in given or {"query_prompt", "passage_prompt"} & given["data"].keys()):
        yield f"vectors, data.query_prompt and data.passage_prompt are for task embed, and task is {task}"
    vectors = given.get("vectors", {})
    dims, weights = vectors.get("matryoshka_dims", ()), vectors.get("matryoshka_weights")
    if weights is not None and len(weights) != len(dims):
        yield f"vectors.matryoshka_weights has {len(weights)} numbers, and vectors.matryoshka_dims {len(dims)}"
    for name in {"labels", "class_weight"} & given.keys() if task not in (CLASSIFY, TAG) else ():
        yield f"{name} is for the labels of task classify or tag, and task is {task}"
    if task in (REGRESS, EMBED) and "label_smoothing_factor" in given.get("train", {}):
        yield f"train.label_smoothing_factor is for labels, and task is {task}"
    for name, why in UNREAD.items() if task != CAUSAL_LM else ():
        section, _, leaf = name.partition(".")
        if leaf in given.get(section, {}):
            yield f"{name} is not read with task {task}: {why}"

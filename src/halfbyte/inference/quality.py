"""How good a base is in each number format: what each matrix has lost, and the loss on a text of what is left.

Why: what 4 bits cost depends on the model, and a loss of one's own text says it. It is that of the model's own forward,
opened as a run opens it (store, placement, engine); so it is what a training begins with.
Cost: for each format its store is built (one that was not there is removed afterwards), the source is read once
more, and the text goes through the base once; memory as for an evaluation, whatever the size of the model.
"""

import gc
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path

import torch

from halfbyte.base import load, quantisation_error
from halfbyte.base.config import open_config, open_tokenizer
from halfbyte.base.store import shelf, supply
from halfbyte.data import base_text
from halfbyte.data.encoding import encode
from halfbyte.data.encoding.examples import IGNORED, Example
from halfbyte.errors import DataError, StoreError
from halfbyte.inference import evaluate
from halfbyte.inference.load import open_target
from halfbyte.inference.target import Target
from halfbyte.models import tensors
from halfbyte.models.context import context_of
from halfbyte.models.lora_sites import split_at_layer
from halfbyte.models.sources.checkpoint import Checkpoint
from halfbyte.models.sources.lookup import find_model
from halfbyte.objectives.causal_lm import CausalLM
from halfbyte.objectives.objective import mean_scores
from halfbyte.quant import policy
from halfbyte.recipe import number_formats
from halfbyte.recipe.schema import Lora, Quant, Recipe
from halfbyte.system import device, files
from halfbyte.system.libraries import versions
from halfbyte.types import Config, Document

FILE = "quality.json"
GGUF = (
    "the source is a GGUF file: where that is in few bits, its weights lie on a grid of their own already, and what is "
    "lost here comes on top of what it has lost"
)
SAFETENSORS = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}


@dataclass(frozen=True)
class Error:
    """What matrices have lost, together: sums over their numbers, from which the usual measures follow."""

    lost: float = 0.0  # of (source - held) squared
    whole: float = 0.0  # of source squared
    worst: float = 0.0  # the largest |source - held|

    def __add__(self, other: "Error") -> "Error":
        return Error(self.lost + other.lost, self.whole + other.whole, max(self.worst, other.worst))

    @property
    def relative(self) -> float:
        """The Frobenius norm of what is lost, over that of the source."""
        return math.sqrt(self.lost / self.whole) if self.whole else 0.0

    @property
    def sqnr_db(self) -> float:
        """Signal to quantisation noise, in decibels."""
        return 10 * math.log10(self.whole / self.lost) if self.lost and self.whole else math.inf

    def to_json(self) -> Document:
        return {"relative": self.relative, "sqnr_db": self.sqnr_db, "largest": self.worst}


@dataclass(frozen=True)
class FormatQuality:
    """One number format. `errors`: of each quantised matrix, by its module's name; none in 16 bits. `nbytes` is the
    base's as it is held; `loss` is the mean of the text's labelled tokens."""

    name: str
    quant: Quant
    nbytes: int
    parameters: int
    loss: float
    perplexity: float
    errors: dict[str, Error]

    @property
    def bits(self) -> float:
        """Of each parameter, those that are not quantised too."""
        return 8 * self.nbytes / self.parameters if self.parameters else math.nan

    @property
    def error(self) -> Error:
        return sum(self.errors.values(), Error())

    def by(self, key: Callable[[str], str | None]) -> dict[str, Error]:
        """Errors together by a part of the module's name: `layer_of` or `kind_of`; in the model's order."""
        groups: dict[str, Error] = {}
        for name, error in self.errors.items():
            if (group := key(name)) is not None:
                groups[group] = groups.get(group, Error()) + error
        return groups

    def to_json(self) -> Document:
        values = {key: getattr(self, key) for key in ("name", "nbytes", "parameters", "loss", "perplexity")}
        return {
            **values,
            "quant": self.quant.model_dump(),
            "bits_per_parameter": self.bits,
            "error": self.error.to_json() if self.errors else None,
            **{
                f"by_{what}": {group: e.to_json() for group, e in self.by(key).items()}
                for what, key in (("layer", layer_of), ("kind", kind_of), ("module", str))
            },
        }


@dataclass(frozen=True)
class Report:
    """`text` says what was read; `notes` what the figures do not show; `path`: where it is kept."""

    model: str
    text: str
    rows: int
    tokens: int
    labelled_tokens: int
    formats: tuple[FormatQuality, ...]
    notes: tuple[str, ...]
    path: Path | None = None

    def to_json(self) -> Document:
        values = {k: v for k, v in asdict(self).items() if k not in ("formats", "path")}
        values |= {"formats": [row.to_json() for row in self.formats], "versions": versions()}
        document: Document = json.loads(files.as_json(values))  # without infinities
        return document


def layer_of(module: str) -> str | None:
    """The number of a module's layer; None outside of the layers."""
    return next((part for part in module.split(".") if part.isdigit()), None)


def kind_of(module: str) -> str:
    """What a module is called in its layer: `mlp.down_proj`; experts together."""
    inner = split_at_layer(module)[1] or [module]
    return ".".join("*" if part.isdigit() else part for part in inner)


def measure(
    recipe: Recipe, text: Path | None, *, store: Path, limit: int | None = None, tell: supply.Tell | None = None
) -> Report:
    """Compare 16 bits, the usual formats and the recipe's own on a text; kept as `quality.json` in `store`.

    Args:
        text: rows in any format that training reads, or a plain text; None for a small text of ours.
        store: the folder of the recipe's own store.
        limit: only the first rows.

    Raises:
        DataError: rows that cannot be read.
        StoreError: a store cannot be built, such as for want of space.
    """
    tell, checkpoint, machine = tell or supply.Tell(), find_model(recipe), device.detect()
    config = open_config(checkpoint.path, trust_remote_code=recipe.trust_remote_code)
    examples, rows = _examples(recipe, checkpoint, config, text, limit)
    specs = tuple(tensors.read_checkpoint(checkpoint.path)) if not checkpoint.pickle else ()
    measuring = _Measuring(recipe.model_copy(update={"lora": Lora()}), checkpoint, config, machine, specs, examples)
    formats: list[FormatQuality] = []
    for quant in _formats(recipe.quant):
        formats.append(measuring.format(quant, tell))
        tell.say(f"{formats[-1].name}: loss {formats[-1].loss:.4f}", label="measured")
    report = Report(
        model=checkpoint.id,
        text=str(text) if text is not None else "a small text of halfbyte's own",
        rows=rows,
        tokens=sum(len(e.input_ids) for e in examples),
        labelled_tokens=sum(label != IGNORED for e in examples for label in e.labels),
        formats=tuple(formats),
        notes=(GGUF,) if checkpoint.kind in ("gguf", "packaged") else (),
        path=store / FILE,
    )
    try:
        files.write(store / FILE, files.as_json(report.to_json()))
    except OSError as error:
        tell.say(f"not kept: {store / FILE}: {error.strerror or error}", label="report")
        return replace(report, path=None)
    return report


def _formats(asked: Quant) -> list[Quant]:
    """16 bits, those that are compared, and the recipe's own."""
    named = number_formats.compared()
    compared = [asked.in_type("none"), *(asked.in_type(name).model_copy(update=dict(fields)) for name, fields in named)]
    return [*compared, *([asked] if asked not in compared else [])]


def name_of(quant: Quant, dtype: str) -> str:
    """What a format is called in a table."""
    if not quant.quantises:
        return dtype
    rounded = "" if quant.llm_int8_threshold is None else f" threshold {quant.llm_int8_threshold:g}"
    return f"{quant.type}{' double' * quant.double_quant}{rounded}"


@dataclass(frozen=True)
class _Measuring:
    recipe: Recipe
    checkpoint: Checkpoint
    config: Config
    machine: device.Device
    specs: tuple[tensors.TensorSpec, ...]
    examples: Sequence[Example]

    def format(self, quant: Quant, tell: supply.Tell) -> FormatQuality:
        """One format, measured."""
        dtype, _ = device.compute_dtype(self.machine, quant.compute_dtype)
        recipe, errors = self.recipe.model_copy(update={"quant": quant}), dict[str, Error]()
        with self._stored(quant, dtype, tell) as stored:
            if stored is not None and quant.quantises:
                errors = errors_of(*stored)
                gc.collect()
            elif stored is not None:
                recipe = recipe.model_copy(update={"model": str(stored[1]), "revision": None, "allow_pickle": False})
            opened = open_target(Target(Path(recipe.model), recipe), tell)
            with opened.using(base=True):
                scores = mean_scores(CausalLM(), opened.model, evaluate.micro_batches(opened, self.examples)[0])
            del opened
            gc.collect()
        itemsize = load.DTYPES[dtype].itemsize
        return FormatQuality(
            name=name_of(quant, dtype),
            quant=quant,
            nbytes=sum(policy.encoded_bytes(spec, quant, itemsize) for spec in self.specs),
            parameters=sum(spec.numel for spec in self.specs),
            loss=scores["loss"],
            perplexity=scores["perplexity"],
            errors=errors,
        )

    @contextmanager
    def _stored(self, quant: Quant, dtype: str, tell: supply.Tell) -> Iterator[tuple[shelf.StoreSpec, Path] | None]:
        """The store of a format, which is removed afterwards if it was not there before. In 16 bits a copy in the
        compute dtype, as only what is on disk as it is computed with can be mapped; None where the source is one."""
        matrices = [spec for spec in self.specs if len(spec.shape) > 1]
        if not quant.quantises and matrices and all(spec.dtype == SAFETENSORS[dtype] for spec in matrices):
            yield None
            return
        spec, built = load.store_spec(self.checkpoint, self.config, quant, self.machine, self.specs), list[bool]()
        try:
            try:
                path = supply.ensure(spec, tell=replace(tell, built=lambda: built.append(True)))
            except shelf.CannotHold as reason:
                raise StoreError(f"{self.checkpoint.id} cannot be held in a store: {reason}.") from reason
            yield spec, path
        finally:
            if built:
                with suppress(StoreError):
                    shelf.remove_held(path.name)


def errors_of(spec: shelf.StoreSpec, store: Path) -> dict[str, Error]:
    """What each matrix of a store has lost, by its module's name, layer after layer; experts one by one."""
    model = load.open_store(spec, store)
    errors: dict[str, Error] = {}
    for matrix in quantisation_error.matrices(model, spec, with_experts=True):
        difference = matrix.difference()
        norms = [float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in (difference, matrix.source)]
        errors[matrix.name] = Error(norms[0] ** 2, norms[1] ** 2, float(difference.abs().max()))
    number = {name: i for i, (name, _) in enumerate(model.named_modules())}
    order = {name: number.get(name, number.get(name.rsplit(".", 2)[0], len(number))) for name in errors}
    return {name: errors[name] for name in sorted(errors, key=order.__getitem__)}


def _examples(
    recipe: Recipe, checkpoint: Checkpoint, config: Config, text: Path | None, limit: int | None
) -> tuple[list[Example], int]:
    """A text as rows that the model reads, and of how many rows they are pieces. A long row goes on in the next piece.
    What counts is what would be trained: under `mask: all` the chat template's own words, which no model has learned
    to write and which are the same in each row, outweigh everything else."""
    tokenizer = open_tokenizer(checkpoint)
    data = recipe.data.model_copy(update={"overlong": "error", "packing": "rows"})
    context = context_of(config)
    size = min(data.max_length, context.tokens) if context is not None else data.max_length
    with resources.as_file(base_text.FILE) as sample:
        rows = encode.encode(text or sample, tokenizer, data, cores=device.cores()).examples[:limit]
    pieces = [piece for row in rows for piece in _pieces(row, size)]
    if not pieces:
        raise DataError(f"{text} has no row of two tokens, so there is nothing to predict.", fix="give a longer text")
    return pieces, len(rows)


def _pieces(row: Example, size: int) -> Iterator[Example]:
    for first in range(0, len(row.input_ids), size):
        ids, labels = row.input_ids[first : first + size], row.labels[first : first + size]
        if any(label != IGNORED for label in labels[1:]):
            yield replace(row, input_ids=ids, labels=(IGNORED, *labels[1:]), weights=())

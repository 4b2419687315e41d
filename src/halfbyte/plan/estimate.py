"""`halfbyte plan`: from a model's name or a recipe to a plan, before a weight is downloaded or loaded.

What: shapes from headers; LoRA's sites from names; lengths of rows from the recipe's files, counted with the tokenizer
where it is at hand, else estimated from characters. A run plans again from its real tokens.
Cost: under a second, and counting the tokens of the rows; no torch.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice

import numpy as np

from halfbyte.data.mixture import Mixture
from halfbyte.data.reading.formats import ChatMessage, Row
from halfbyte.errors import RecipeError
from halfbyte.models import describe
from halfbyte.models.context import context_in
from halfbyte.plan import FAMILIES, Job, Plan, Rows, calibrate, plan_training
from halfbyte.plan.alternatives import Method, compare
from halfbyte.plan.timing import Rates
from halfbyte.recipe.command import NO_ROWS
from halfbyte.recipe.data import Data, Mask, Sources
from halfbyte.recipe.schema import Loaded, Recipe
from halfbyte.system import usage
from halfbyte.system.cards import Card
from halfbyte.system.device import Device, detect
from halfbyte.types import Document

Count = Callable[[Sequence[str]], list[int]]

DEFAULT_LENGTH = 512
CHARACTERS_PER_TOKEN = 3.6  # English text under vocabularies of 32,000 to 150,000; other scripts have fewer
TEMPLATE_TOKENS = 24  # what a chat template puts around one question and its answer
_DEVICE = re.compile(r"(?:(?P<count>\d+)\s*x\s*)?(?P<size>\d+(?:\.\d+)?)\s*(?P<unit>[KMGT]i?B?)", re.IGNORECASE)
_UNITS = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
DEVICE_HELP = "24GB or 4x80GB for cards, cpu:16GB for a machine without one"


@dataclass(frozen=True)
class Estimate:
    """What `halfbyte plan` shows. The plan follows from `job` and `rates`."""

    shape: describe.Shape
    recipe: Recipe
    device: Device
    plan: Plan
    notes: tuple[str, ...]
    job: Job
    rates: Rates | None
    methods: tuple[Method, ...] = ()

    def to_json(self) -> Document:
        shape = {name: getattr(self.shape, name) for name in ("name", "origin", "parameters", "read_bytes")}
        shown = ("name", "bytes", "trainable", "percent", "relative_time")
        methods = [
            {**{name: getattr(method, name) for name in shown}, "lines": [asdict(line) for line in method.lines]}
            for method in self.methods
        ]
        return {
            "model": shape,
            "machine": self.device.to_json(),
            "plan": self.plan.to_json(),
            "notes": list(self.notes),
            **({"compare": methods} if methods else {}),
        }


def plan_model(
    loaded: Loaded, *, device: str | None = None, length: int | None = None, side_by_side: bool = False
) -> Estimate:
    """Plan a recipe (or a model under the default one).

    Args:
        device: of another machine, as `parse_device` reads it; None for this one.
        length: tokens of every row, instead of the recipe's data.
        side_by_side: also full fine-tuning, LoRA and QLoRA.
    """
    recipe = loaded.recipe
    machine = detect() if device is None else parse_device(device)
    shape = describe.describe(recipe.model, recipe.revision, in_blocks=recipe.quant.in_file)
    rows, notes = rows_of(loaded, shape, length)
    job = job_of(recipe, shape, rows, machine, here=device is None)
    notes = [*format_note(loaded), *notes]
    if job.uncompiled:
        notes.append("the first run on this machine: it compiles kernels once, in processes of 0.5 GB")
    rates = calibrate.cached(machine, job.dtype) if device is None else None
    plan = plan_training(job, machine, rates)
    methods = compare(job, machine, rates) if side_by_side else ()
    context, kind = context_in(shape.config), shape.facts.model_type
    if context is not None and rows.longest > context.tokens:
        notes.append(f"rows of {rows.longest:,} tokens: the model reads {context.tokens:,} at once ({context.why})")
    if kind not in FAMILIES:
        notes.append(f"{kind} is not among the measured architectures; counted as a stock gated decoder")
    pressure = usage.pressure() if device is None else None
    if pressure is not None and pressure > calibrate.BUSY_PRESSURE:
        notes.append(f"the machine is busy: some process waited for a core {pressure:.0%} of the last ten seconds")
    if device is not None:
        notes.append("a machine that is not here: all of its memory is taken to be free")
    return Estimate(shape, recipe, machine, plan, tuple(notes), job, rates, methods)


def format_note(loaded: Loaded) -> list[str]:
    """The number format and why it was chosen, where the recipe leaves it open."""
    origin = loaded.origins.get("quant.type")
    chosen = origin is not None and origin.kind == "auto"
    return [f"quant.type {loaded.recipe.quant.type}: {origin.why}"] if origin is not None and chosen else []


def parse_device(text: str, option: str = "--device") -> Device:
    """A machine that is not here: `24GB`, `4x80GB` (cards), `cpu:16GB` (RAM alone). Raises RecipeError, which names
    the `option`: anything else, or no memory at all."""
    kind, _, rest = text.rpartition(":")
    match = _DEVICE.fullmatch(rest.strip())
    if match is None or kind not in ("", "cpu", "cuda", "gpu"):
        raise RecipeError(f"{option} {text!r} is not a machine; allowed: {DEVICE_HELP}.", fix=f"{option} 24GB")
    count = int(match["count"] or 1)
    size = int(float(match["size"]) * _UNITS[match["unit"].upper().removesuffix("B")])
    if size < 10**8 or not 1 <= count <= 1024:
        amount = "no" if size == 0 or count == 0 else "an unlikely amount of"
        raise RecipeError(f"{option} {text!r} has {amount} memory; allowed: {DEVICE_HELP}.", fix=f"{option} 24GB")
    if kind == "cpu" and count > 1:
        raise RecipeError(
            f"{option} {text!r}: a machine has one RAM; allowed: {DEVICE_HELP}.", fix=f"{option} cpu:64GB"
        )
    if kind == "cpu":
        here = detect()
        return Device("cpu", here.isa, here.cores, size, size, cpu=here.cpu)
    card = Card(f"card of {match['size']} {match['unit']}", size, size, (8, 0))
    ram = max(64 * 10**9, count * size)  # the host of cards is not planned for from afar
    return Device("cuda", (), 16, ram, ram, (card,) * count)


def job_of(recipe: Recipe, shape: describe.Shape, rows: Rows, machine: Device, *, here: bool) -> Job:
    """The job of a model that is known by its shape. `here`: on this machine."""
    job = Job.of(recipe, shape.specs, shape.facts, rows, machine, mappable=True if recipe.quant.quantises else None)
    return job.in_folder(shape.path, here=here)


def rows_of(loaded: Loaded, shape: describe.Shape, length: int | None) -> tuple[Rows, list[str]]:
    """Row lengths and how they were found. `length`: of every row, instead of the recipe's data."""
    recipe, given = loaded.recipe, loaded.path is not None or loaded.recipe.data.train != NO_ROWS
    if length is not None:
        return Rows.assume(length), [f"rows of {length} tokens each, all labelled, as --length says"]
    if not given:
        context = context_in(shape.config)
        assumed = min(DEFAULT_LENGTH, context.tokens) if context is not None else DEFAULT_LENGTH
        return Rows.assume(assumed), [f"rows of {assumed} tokens each are assumed, all labelled: --length N"]
    count, how = _counter(shape)
    data, train = recipe.data, recipe.train
    parts = [(_sizes((one,), data, count), one.limit) for one in data.sources] or [
        (_sizes(data.train, data, count), None)
    ]
    sizes = [
        (*row, number) for number, (part, limit) in enumerate(parts) for row in list(zip(*part, strict=True))[:limit]
    ]
    evaluated, splits = list[int](), data.held_out_of(len(sizes))
    if (names := data.eval_names) is not None:
        evaluated, _ = _sizes(names, data, count)
    elif splits and splits < len(sizes) and train.eval_strategy != "no":
        held_out = {i * len(sizes) // splits for i in range(splits)}
        evaluated = [sizes[i][0] for i in sorted(held_out)]
        sizes = [size for i, size in enumerate(sizes) if i not in held_out]
    lengths, labelled, of_row = zip(*sizes, strict=True)
    mixture = Mixture.of(data.sources, np.array(of_row), train.rows_per_step) if data.sources else None
    rows = "blocks" if recipe.data.packing == "stream" else "rows"
    mean = sum(lengths) / len(lengths)
    note = f"{len(lengths):,} {rows} of about {mean:.0f} tokens, the longest {max(lengths)}: {how}"
    return Rows(lengths, labelled, evaluated, mixture=mixture), [note]


def longest_row(recipe: Recipe) -> int:
    """About how many tokens the longest row to train on has, however long a row may be; 0 of plain text in blocks."""
    if recipe.data.packing == "stream":
        return 0
    count, _ = _counter(describe.describe(recipe.model, recipe.revision))
    unlimited = recipe.data.model_copy(update={"max_length": 1 << 30})
    return max(_sizes(recipe.data.train, unlimited, count)[0], default=0)


STREAMED_ROWS = 20_000  # of files of any size


def _sizes(names: Sources, data: Data, count: Count) -> tuple[list[int], list[int]]:
    """About how many tokens each row has, and how many labelled ones; of blocks where texts are packed into them."""
    from halfbyte.data.reading.files import find
    from halfbyte.data.reading.read import CHUNK_ROWS, Reader

    reader, sizes = Reader(sources := find(names), data), list[tuple[int, int]]()
    every = ((row, data.of(source.entry).mask) for source in sources for row in reader.rows_of(source))
    rows = islice(every, STREAMED_ROWS if data.streaming else None)
    limit = (1 << 30) if data.packing == "stream" else data.max_length
    while some := list(islice(rows, CHUNK_ROWS)):
        answers = [([_texts(answer) for answer in row.texts], mask) for row, mask in some]  # a better and a worse one
        counts = iter(count([text for each, _ in answers for texts in each for text in texts]))
        for each, mask in answers:
            of_row = [_size([next(counts) for _ in texts], mask) for texts in each]
            tokens, labelled = (sum(min(limit, size) for size in part) for part in zip(*of_row, strict=True))
            sizes.append((tokens, labelled))
    reader.check()
    if data.packing == "stream":
        full, rest = divmod(sum(tokens for tokens, _ in sizes), data.max_length)
        blocks = [data.max_length] * full + [rest] * (rest > 0)
        return blocks, blocks
    return [tokens for tokens, _ in sizes], [labelled for _, labelled in sizes]


def _texts(row: Row) -> tuple[str, ...]:
    """What a row of any format asks and what it answers; its text alone, of plain text."""
    if row.text is not None:
        return (row.text,)
    if row.parts:  # of a label nothing is written
        return ("\n".join(row.parts),)
    if row.messages is not None:
        *before, answer = map(_said, row.messages)
        return "".join([_as_json(row.tools), *before]), answer
    return row.prompt or "", row.completion or ""


def _said(message: ChatMessage) -> str:
    """All that a message says: its thoughts, its text and its calls."""
    more = message.more
    return f"{more.get('reasoning_content', '')}{message.content}{_as_json(more.get('tool_calls'))}"


def _as_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str) if value else ""


def _size(counts: Sequence[int], mask: Mask) -> tuple[int, int]:
    """Tokens of a row, and labelled ones: what is answered, or all of it. `counts`: of each of its texts."""
    if len(counts) == 1:
        return counts[0] + 1, counts[0] + 1  # and its end
    tokens = sum(counts) + TEMPLATE_TOKENS
    return tokens, tokens if mask == "all" else min(tokens, counts[1] + 2)


def _counter(shape: describe.Shape) -> tuple[Count, str]:
    """A function from texts to their numbers of tokens, and what it rests on."""
    file = shape.path / "tokenizer.json" if shape.path is not None else None
    if file is not None and file.is_file():
        from tokenizers import Tokenizer

        encode = Tokenizer.from_file(str(file)).encode_batch_fast
        return (
            lambda texts: [len(e.ids) for e in encode(texts, add_special_tokens=False)]
        ), "counted, but for the template"
    how = f"estimated at {CHARACTERS_PER_TOKEN} characters a token"
    return (lambda texts: [round(len(text) / CHARACTERS_PER_TOKEN) for text in texts]), how

"""What a call asks for, in one form: ours, transformers' `BitsAndBytesConfig` or accelerate's `BnbQuantizationConfig`.

A caller's configuration is read and never written to: accelerate puts names of its own into the lists of the object
that it is given (`accelerate/utils/bnb.py`), so that a second call with it does something else.
"""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import torch
from pydantic import ValidationError

from halfbyte.base.load import DTYPES
from halfbyte.errors import RecipeError
from halfbyte.quant import formats
from halfbyte.recipe import number_formats
from halfbyte.recipe.messages import sentences
from halfbyte.recipe.schema import Quant, in_quant
from halfbyte.system import device as machine
from halfbyte.types import Document

if TYPE_CHECKING:
    from accelerate.utils import BnbQuantizationConfig
    from transformers import BitsAndBytesConfig

Asked: TypeAlias = "str | Quant | Mapping[str, object] | BitsAndBytesConfig | BnbQuantizationConfig"
# What may be set of both configurations: what is read here, and what is about the loading that halfbyte does itself.
_KNOWN = frozenset(
    {
        "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage",
        "llm_int8_threshold", "llm_int8_skip_modules", "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight",
        "skip_modules", "keep_in_fp32_modules", "torch_dtype", "target_dtype",
    }
)  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class ModuleSettings:
    """How a module is held. `skip`: names that stay in `rest`, beside output layers; None for those alone; empty: not
    even those."""

    quant: Quant
    compute: torch.dtype  # what quantised layers multiply in
    rest: torch.dtype  # dtype of what is not quantised
    skip: tuple[str, ...] | None = None
    fp32: tuple[str, ...] = ()  # names that stay in fp32
    storage: torch.dtype = torch.uint8  # dtype that packed 4-bit codes are seen as


def read(
    asked: Asked, dtype: str | torch.dtype = "auto", skip: Iterable[str] | None = None,
    fp32: Iterable[str] | None = None, *, on_card: bool = False,
) -> ModuleSettings:  # fmt: skip
    """The settings of a call. `dtype`: auto, bf16, fp16, fp32 or a torch.dtype; anything but auto goes before what
    `asked` says. Raises RecipeError: values that are unknown or exclude each other; all of them at once."""
    values, rest_dtype = _fields(asked)
    wanted = _NAMES.get(dtype, str(dtype)) if isinstance(dtype, torch.dtype) else dtype
    if wanted != "auto":
        values, rest_dtype = {**values, "compute_dtype": wanted}, None
    quant = _validated(values)
    device = machine.detect() if on_card else replace(machine.detect(), kind="cpu")
    chosen: list[tuple[str, torch.dtype]] = []
    for name in (quant.compute_dtype, rest_dtype or quant.compute_dtype):
        got, reason = machine.compute_dtype(device, name)
        if name == "fp16" and got != "fp16" and "fp16" not in [one for one, _ in chosen]:
            warnings.warn(f"float16 was asked for; computing in {got} ({reason}).", stacklevel=3)
        chosen.append((name, DTYPES[got]))
    skipped = [_list(names, "skip_modules") for names in (skip, quant.skip_modules or None) if names is not None]
    return ModuleSettings(
        quant,
        compute=chosen[0][1],
        rest=chosen[1][1],
        skip=tuple(name for names in skipped for name in names) if skipped else None,
        fp32=(*_list(fp32 or (), "keep_in_fp32_modules"), *quant.fp32_modules),
        storage=getattr(asked, "bnb_4bit_quant_storage", None) or torch.uint8,
    )


def _validated(values: Mapping[str, object]) -> Quant:
    """A `Quant` of these fields, or RecipeError with every problem in a sentence."""
    try:
        quant = Quant(**values)
        problems = list(in_quant(quant))
        no_format = {"gguf": "a GGUF file's own blocks", number_formats.AUTO: "the planner's choice for a recipe"}
        problems += [
            f"quant.type {n} is {what}, and no format for modules" for n, what in no_format.items() if n == quant.type
        ]
    except ValidationError as error:
        items = [{**item, "loc": ("quant", *item["loc"])} for item in error.errors()]
        problems = [text for item in items for text in sentences(item, {}, {})]
    if problems:
        raise RecipeError(problems)
    return quant


def _list(names: Iterable[str], argument: str) -> tuple[str, ...]:
    if isinstance(names, str):
        raise RecipeError(f"{argument} must be a list of module names, got {names!r}", fix=f"{argument}=[{names!r}]")
    return tuple(names)


def _unknown(asked: object) -> set[str]:
    """Fields of transformers' or accelerate's configuration that were set, and are not known here."""
    plain = vars(type(asked)(**{name: getattr(asked, name) for name in ("load_in_4bit", "load_in_8bit")}))
    changed = {name for name, value in vars(asked).items() if name not in plain or plain[name] != value}
    return changed - _KNOWN


def _fields(asked: Asked) -> tuple[Document, str | None]:
    """(fields of `Quant`, dtype of the rest where the configuration has one of its own)."""
    if isinstance(asked, str):
        return {"type": asked}, None
    if isinstance(asked, (Quant, Mapping)):
        return dict(asked), None
    if not hasattr(asked, "bnb_4bit_quant_type"):
        raise RecipeError(
            f"quant must be a type (nf4, fp4, int8), fields of `quant:`, a BitsAndBytesConfig or a "
            f"BnbQuantizationConfig, got {type(asked).__name__}"
        )
    if unknown := sorted(_unknown(asked)):
        raise RecipeError(
            f"{type(asked).__name__}: {', '.join(unknown)} not known to this version of halfbyte",
            fix="pip install -U halfbyte, or leave it out",
        )
    skipped = asked.skip_modules if hasattr(asked, "skip_modules") else asked.llm_int8_skip_modules
    rest = getattr(asked, "torch_dtype", None)  # accelerate's alone
    rest_dtype = None if rest is None else _NAMES.get(rest, "auto")
    compute = rest_dtype or "auto" if asked.load_in_8bit else _NAMES.get(asked.bnb_4bit_compute_dtype, "auto")
    values: Document = {
        "compute_dtype": compute,
        **formats.settings_of(asked),
        "skip_modules": tuple(skipped or ()),
        "fp32_modules": tuple(getattr(asked, "keep_in_fp32_modules", None) or ()),
    }
    return values, rest_dtype

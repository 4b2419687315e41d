"""The registry of number formats. A new one is a file with a subclass of `NumberFormat`, and a line here."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from halfbyte.quant.four_bit import FourBit
from halfbyte.quant.gguf_blocks import GgufBlocks
from halfbyte.quant.int8 import RowWise8
from halfbyte.quant.number_format import NumberFormat
from halfbyte.recipe.schema import Quant
from halfbyte.types import Config, Document

if TYPE_CHECKING:
    from torch import nn

NONE = NumberFormat("none")
QUANTISING: tuple[NumberFormat, ...] = (FourBit("nf4"), FourBit("fp4"), RowWise8("int8"), GgufBlocks("gguf"))
FORMATS = {each.name: each for each in (*QUANTISING, NONE)}


def of(quant: Quant) -> NumberFormat:
    """The format that a recipe asks for."""
    return FORMATS[quant.type]


def of_module(module: "nn.Module") -> NumberFormat:
    """The format that a layer's weight is in."""
    return next((each for each in QUANTISING if each.holds(module)), NONE)


def is_quantised(module: "nn.Module") -> bool:
    return of_module(module) is not NONE


def settings_of(config: Config) -> Document:
    """What a `BitsAndBytesConfig` asks for, as fields of `Quant`; modules that it names are left out."""
    every = (each.settings_of(config) for each in QUANTISING)
    unknown = {"type": config.bnb_4bit_quant_type if config.load_in_4bit else NONE.name}
    return next((settings for settings in every if settings is not None), unknown)


def settle(model: "nn.Module") -> None:
    """Make a model's quantised layers safe to train and evaluate in turns, whoever made them."""
    for each in {type(each): each for each in QUANTISING}.values():
        each.settle(model)


@contextmanager
def without_rounding(model: "nn.Module") -> Iterator[None]:
    """A model whose layers round no inputs, for comparisons that a rounding the other way would drown."""
    with ExitStack() as stack:
        for each in {type(each): each for each in QUANTISING}.values():
            stack.enter_context(each.without_rounding(model))
        yield

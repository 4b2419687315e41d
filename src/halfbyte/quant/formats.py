"""The registry of number formats. A new one is a file with a subclass of `NumberFormat`, and a line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from halfbyte.quant.four_bit import FourBit
from halfbyte.quant.int8 import RowWise8
from halfbyte.quant.number_format import NumberFormat
from halfbyte.recipe.schema import Quant

if TYPE_CHECKING:
    from torch import nn

NONE = NumberFormat("none")
QUANTISING: tuple[NumberFormat, ...] = (FourBit("nf4"), FourBit("fp4"), RowWise8("int8"))
FORMATS = {each.name: each for each in (*QUANTISING, NONE)}


def of(quant: Quant) -> NumberFormat:
    """The format that a recipe asks for."""
    return FORMATS[quant.type]


def of_module(module: nn.Module) -> NumberFormat:
    """The format that a layer's weight is in."""
    return next((each for each in QUANTISING if each.holds(module)), NONE)


def is_quantised(module: nn.Module) -> bool:
    return of_module(module) is not NONE

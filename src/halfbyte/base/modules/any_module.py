"""`quantize_model`: any `nn.Module` held in few bits, streamed from its weights; and accelerate's name for the same.

Why beside `load_base`: that opens causal LMs of transformers, from a store. Here the module is the caller's, on the
meta device or loaded, and is changed in place. accelerate's own function stops on a machine without a card, quantises
nothing where the last child holds everything, and writes into its caller's configuration (`accelerate/utils/bnb.py`).
Cost: the result, a few chunks of 4 M numbers, and one tensor where it has to be turned (Conv1D).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from halfbyte.base.modules import fill, offload, places, settings
from halfbyte.base.modules import weights as numbers
from halfbyte.base.modules.survey import survey
from halfbyte.base.residency import computes_in_fp32
from halfbyte.errors import BaseModelError
from halfbyte.layers.experts import interface
from halfbyte.quant import experts, formats
from halfbyte.recipe import number_formats
from halfbyte.system import device as machine

if TYPE_CHECKING:
    from accelerate.utils import BnbQuantizationConfig

Module = TypeVar("Module", bound=nn.Module)
Location = str | os.PathLike[str]


def quantize_model(
    module: Module, weights: Location | None = None, *, quant: settings.Asked = "nf4",
    skip_modules: Iterable[str] | None = None, keep_in_fp32_modules: Iterable[str] | None = None,
    device_map: str | Mapping[str, object] | None = None, offload_folder: Location | None = None,
    dtype: str | torch.dtype = "auto", max_memory: Mapping[object, object] | None = None,
    no_split_module_classes: Iterable[str] | None = None,
) -> Module:  # fmt: skip
    """Hold the linear layers and the stacked experts of a module in few bits; it is changed in place and returned.

    Args:
        module: on the meta device, or loaded.
        weights: a .safetensors (or .bin, .pt) file, an index, or a folder. None: the module's own numbers.
        quant: `nf4`, `fp4`, `int8` or `none`; fields of a recipe's `quant:`; a BitsAndBytesConfig; or a
            BnbQuantizationConfig, whose torch_dtype is that of what is not quantised. It is not changed.
        skip_modules: names that are not quantised, each one or several whole parts of a dotted name. Output layers and
            tied weights stay anyway; with an empty list only tied weights do.
        keep_in_fp32_modules: names that are kept in fp32; their inputs and outputs are cast.
        device_map: {name: card, cpu or disk}, or auto, balanced, balanced_low_0, sequential. None: the card, or memory.
        offload_folder: where what goes to disk is written, a file for each part; needed as long as the module.
        dtype: of the products and of what is not quantised: auto, bf16, fp16 (on a card) or fp32.
        max_memory: bytes, or text such as `10GB`, for each device of an automatic map.
        no_split_module_classes: names of classes whose modules come and go as a whole.

    Raises:
        RecipeError: settings that are unknown or exclude each other.
        SourceError: no weights there, or a file that is cut short.
        BaseModelError: names that are not there, weights that do not fit, a folder that cannot take them: told before
            anything is changed. A weight that is not finite, or a disk that fills up: the module is not whole then.
    """
    if hasattr(module, "tie_weights") and any(p.is_meta for p in module.parameters()):
        module.tie_weights()  # accelerate's init_empty_weights undoes ties
    on_card = places.uses_card(device_map, machine.detect())
    asked = settings.read(quant, dtype, skip_modules, keep_in_fp32_modules, on_card=on_card)
    surveyed = survey(module, asked)
    put = places.resolve(
        module, surveyed, asked, device_map, max_memory=max_memory, unsplit_classes=tuple(no_split_module_classes or ())
    )
    folder = None if offload_folder is None else Path(offload_folder)
    places.check_folder(put, surveyed, asked, folder)
    source = None if weights is None else numbers.open_source(Path(weights))
    matched = numbers.match(module, surveyed.tensors, source, str(weights))
    numbers.make_buffers(module)
    if folder is not None and places.DISK in put.device_of.values():
        _make(folder)
    fill.Filling(module, asked, matched, put, folder).all(surveyed.tensors)
    for name, is_head in surveyed.fp32:
        computes_in_fp32(module.get_submodule(name), None if is_head else asked.rest)
    _call_quantised_layers(module)
    if asked.quant.quantises:  # PEFT asks for these
        bits = number_formats.FORMATS[asked.quant.type].bits
        module.is_loaded_in_8bit, module.is_loaded_in_4bit = bits == 8, bits == 4
    offload.attach(module, surveyed, put)
    return module


def load_and_quantize_model(
    model: Module, bnb_quantization_config: BnbQuantizationConfig, weights_location: Location | None = None,
    device_map: str | Mapping[str, object] | None = None, no_split_module_classes: Iterable[str] | None = None,
    max_memory: Mapping[object, object] | None = None, offload_folder: Location | None = None,
    offload_state_dict: bool = False,
) -> Module:  # fmt: skip
    """`quantize_model` under the names of accelerate's function. `offload_state_dict` changes nothing: no state dict is
    ever in memory."""
    return quantize_model(
        model,
        weights_location,
        quant=bnb_quantization_config,
        device_map=device_map,
        offload_folder=offload_folder,
        max_memory=max_memory,
        no_split_module_classes=no_split_module_classes,
    )


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BaseModelError(f"offload_folder {folder} cannot be made: {error.strerror or error}.") from error


def _call_quantised_layers(root: nn.Module) -> None:
    """Compute stacks of experts by our function; and keep torch's encoder from its fast path in evaluation, which takes
    the weights of its linears without calling them (`torch/nn/modules/transformer.py`): attributes of instances that
    the path asks for."""
    for module in root.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(map(formats.is_quantised, module.children())):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    if any(experts.stacks(root)):
        interface.compute_all(root)

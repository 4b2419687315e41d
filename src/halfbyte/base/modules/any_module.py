"""`quantize_model`: any `nn.Module` held in few bits, streamed from its weights; and accelerate's name for the same.

Why beside `load_base`: that opens causal LMs of transformers, from a store. Here the module is the caller's, on the
meta device or loaded, and is changed in place. accelerate's own function stops on a machine without a card, quantises
nothing where the last child holds everything, and writes into its caller's configuration (`accelerate/utils/bnb.py`).
Cost: the result, a few chunks of 4 M numbers, and one tensor where it has to be turned (Conv1D).

Read, quantise and install a module's tensors one by one, into memory, onto a card or into files.

Several threads take a tensor each and read it in chunks (`base/store/encode.py`), so what is held beside the result
does not grow with it. A tensor of the module itself goes as soon as its successor is there. On disk, a part of the
module is one file, opened memory-mapped when it is whole; a file that is not finished has another name.
"""

import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from halfbyte.base.modules import offload, places, settings
from halfbyte.base.modules import weights as numbers
from halfbyte.base.modules.places import DISK, Places
from halfbyte.base.modules.settings import ModuleSettings
from halfbyte.base.modules.survey import ModuleTensor, owner_of, survey
from halfbyte.base.modules.weights import ModuleSource, Weights, tensor_at
from halfbyte.base.residency import computes_in_fp32
from halfbyte.base.store.encode import Memory, TensorReader, slots
from halfbyte.base.store.writer import SafetensorsWriter
from halfbyte.errors import BaseModelError
from halfbyte.layers.experts import interface
from halfbyte.quant import experts, formats
from halfbyte.recipe import number_formats
from halfbyte.system import device as machine
from halfbyte.system import files

if TYPE_CHECKING:
    from accelerate.utils import BnbQuantizationConfig


# More would hold more chunks than they save time.
THREADS = 4


@dataclass(frozen=True)
class Filling:
    """One module on its way. `folder`: where what goes to disk is written."""

    root: nn.Module
    settings: ModuleSettings
    weights: Weights
    places: Places
    folder: Path | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def all(self, tensors: Iterable[ModuleTensor]) -> None:
        """Install every tensor; errors of any thread end it. Raises BaseModelError: a weight that is not finite; a disk
        that is full. The module is not whole then."""
        memory: list[ModuleTensor] = []
        disk: dict[str, list[ModuleTensor]] = {}
        for tensor in tensors:
            on_disk = self.places.device_of[tensor.name] == DISK
            (disk.setdefault(self.places.part_of(tensor.name) or "", []) if on_disk else memory).append(tensor)
        with self.weights.source, ThreadPoolExecutor(min(THREADS, machine.detect().cores)) as pool:
            try:
                for _ in pool.map(self._into_memory, memory):
                    pass
                for part, members in disk.items():
                    self._into_file(part, members, pool)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _reader(self) -> TensorReader:
        return TensorReader(self.weights.source, self.settings.quant)

    def _into_memory(self, tensor: ModuleTensor) -> None:
        if not tensor.quantised and isinstance(self.weights.source, ModuleSource):
            whole = tensor_at(self.root, tensor.name).detach().to(tensor.dtype)
            self._install(tensor, lambda name: whole)
            return
        plan = self.weights.plan(tensor)
        memory = Memory(slots([plan], self.settings.quant))
        memory.finish(self._reader().write(plan, memory))
        self._install(tensor, memory.tensors.__getitem__)

    def _into_file(self, part: str, tensors: Sequence[ModuleTensor], pool: ThreadPoolExecutor) -> None:
        """One part of the module, written and opened again."""
        assert self.folder is not None
        path = self.folder / (re.sub(r"[^A-Za-z0-9_.-]+", "-", part or "module") + ".safetensors")
        plans = [self.weights.plan(tensor) for tensor in tensors]
        try:
            with SafetensorsWriter(path, slots(plans, self.settings.quant)) as out:
                late = pool.map(lambda plan: self._reader().write(plan, out), plans)
                out.finish({name: data for each in late for name, data in each.items()})
        except OSError as error:
            raise BaseModelError(
                f"{path} cannot be written: {error.strerror or error}; {files.free_bytes(path) / 1e9:.2f} GB are free.",
                fix="name another offload_folder, or send less to disk in device_map",
            ) from error
        with safe_open(path, framework="pt") as file:
            for tensor in tensors:
                self._install(tensor, file.get_tensor)

    def _install(self, tensor: ModuleTensor, get: Callable[[str], Tensor]) -> None:
        """Put a tensor into the module; `get` gives what was made of it, by name."""
        quant, place = self.settings.quant, self.places.device_of[tensor.name]
        number_format = formats.of(quant)
        stored = number_format.parts(tensor.held_shape, quant) if tensor.quantised else ()
        parts = {part.suffix: get(part.name(tensor.name)) for part in stored} or {"": get(tensor.name)}
        if place != DISK:
            parts = {suffix: value.to(place) for suffix, value in parts.items()}
        with self._lock:  # a layer takes its bias along, which another thread may be about to fill
            if not tensor.quantised:
                old = tensor_at(self.root, tensor.name)
                value = parts[""]
                self._set(tensor, nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value)
            elif tensor.stack:
                self._set(tensor, number_format.stack(parts, tensor.shape, quant, self.settings.compute))
            else:
                self._replace(tensor, parts)

    def _set(self, tensor: ModuleTensor, value: Tensor) -> None:
        for name in tensor.names:
            setattr(self.root.get_submodule(owner_of(name)), name.rpartition(".")[2], value)

    def _replace(self, tensor: ModuleTensor, parts: dict[str, Tensor]) -> None:
        """A layer in the place of a linear one."""
        codes, storage = parts[""], self.settings.storage
        if codes.dtype == torch.uint8 != storage and not codes.nbytes % storage.itemsize:
            parts = {**parts, "": codes.view(-1).view(storage).unsqueeze(1)}
        old = self.root.get_submodule(owner_of(tensor.name))
        (rows, columns), quant = tensor.held_shape, self.settings.quant
        layer = formats.of(quant).layer(parts, (rows, columns), quant, self.settings.compute)
        layer.bias = old.bias
        layer.requires_grad_(False).train(old.training)
        for name in tensor.names:
            self.root.set_submodule(owner_of(name), layer)


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
    Filling(module, asked, matched, put, folder).all(surveyed.tensors)
    for name, is_head in surveyed.fp32:
        computes_in_fp32(module.get_submodule(name), None if is_head else asked.rest)
    _call_quantised_layers(module)
    if asked.quant.quantises:  # PEFT asks for these
        bits = number_formats.FORMATS[asked.quant.type].bits
        module.is_loaded_in_8bit, module.is_loaded_in_4bit = bits == 8, bits == 4
    offload.attach(module, surveyed, put)
    return module


def load_and_quantize_model(
    model: Module, bnb_quantization_config: "BnbQuantizationConfig", weights_location: Location | None = None,
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

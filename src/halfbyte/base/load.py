"""Open a base: the frozen model in few bits, its tokenizer, and the proof that it is resident as the policy says.

transformers leaves what it cannot quantise in 16 bits without a word, fills missing weights with random numbers under a
warning, and loads a Linear4bit that an eval forward breaks (`residency.py`, `quant/bnb.py`).

Of a GGUF file in its own blocks (`quant/gguf_blocks.py`) a state dict is opened, whose quantised weights are views of
the mapped file, with a config that asks for our quantiser. Embeddings, heads, norms and what else is no matrix of a
layer are made of their values, in the compute dtype; so is a matrix whose values a converter has changed, or whose file
has it in 16 or 32 bits. Cost: the header, and the embeddings' values; no page of a block is read.
"""

import copy
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from halfbyte.base import quantisation_error, residency
from halfbyte.base.config import is_quantised_already, open_config, open_tokenizer
from halfbyte.base.store import conversion, reading, shelf, supply
from halfbyte.base.store.in_file import FileParameters
from halfbyte.errors import BaseModelError, first_line
from halfbyte.layers.experts import interface
from halfbyte.models import structure, tensors, text_half
from halfbyte.models.sources.checkpoint import Checkpoint
from halfbyte.models.sources.lookup import resolve
from halfbyte.quant import bnb as codec
from halfbyte.quant import experts, formats, loader, policy
from halfbyte.quant.experts import stacks
from halfbyte.recipe import number_formats
from halfbyte.recipe.schema import Quant
from halfbyte.system import device as machine
from halfbyte.types import Config, Document, Model


@dataclass
class InBlocks:
    """What `from_pretrained` is given. `dense`: modules and stacks of experts that are made of their values."""

    config: Config
    state: dict[str, Tensor] = field(default_factory=dict)
    dense: list[str] = field(default_factory=list)


def open_blocks(checkpoint: Checkpoint, config: Config, quant: Quant, dtype: torch.dtype) -> InBlocks:
    """The base of a checkpoint whose weights stay in its GGUF file. Raises SourceError: the file is not what it was
    when its manifest was written."""
    there, opened = FileParameters(checkpoint, config), InBlocks(copy.deepcopy(config))
    modules = dict(there.model.named_modules())
    stacks = {each.path: each for each in experts.expert_parameters(there.model, quant.exempt)}
    linear = {name for name, module in modules.items() if type(module) in (nn.Linear, Conv1D)}
    linear |= {name for name, _ in loader.plain_linears(there.model, ())}
    of_stack: dict[str, list[conversion.Member]] = {}
    for name, (target, rule) in conversion.renamed(there.model, there.sources, there.model.state_dict()).items():
        home = target.rpartition(".")[0]
        if target in stacks:
            source = reading.SourceTensor(name, "BF16", there.shapes[name], 0, Path(), 0)
            of_stack.setdefault(target, []).append((source, rule))
        elif home in linear and rule is None and policy.encoding(there.spec(name), quant) == "quantised":
            opened.state |= {f"{name}{suffix}": part for suffix, part in there.matrix(there.sources[name]).items()}
        else:
            opened.state[name] = there.values(name, dtype)
            opened.dense += [home] if home in linear and target.endswith(".weight") else []
    for target, members in of_stack.items():
        ordered = conversion.in_order(target, members)
        parts = there.stack(there.sources[source.name] for source in ordered)
        if parts is None:
            opened.dense.append(target)
            opened.state |= {source.name: there.values(source.name, dtype) for source in ordered}
        else:
            opened.state |= {f"{experts.stored_name(target)}{suffix}": part for suffix, part in parts.items()}
    as_stored = quant.model_copy(update={"skip_modules": (*quant.skip_modules, *opened.dense)})
    opened.config.quantization_config = loader.stored_config(
        as_stored, dtype, residency.heads_to_skip(config, as_stored), marked=False
    )
    return opened


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Quantising at load holds the source's pages and the result: measured 18.3 GB for 13.5 (docs/log).
LOADING_SHARE = 1.4
ON_ONE_CARD = 0.8  # of its free memory: a larger base is split over all of them


@dataclass(frozen=True)
class Base:
    """An open base. `expected_bytes` is what the TensorSpecs say under the policy, `resident_bytes` what is there;
    `store` is the folder of its store, None where it has none; `origin` says that in words, or why there is none.
    `store_spec`: what was quantised into the store."""

    model: Model
    checkpoint: Checkpoint
    specs: tuple[tensors.TensorSpec, ...]
    compute_dtype: str
    dtype_reason: str
    resident_bytes: int
    expected_bytes: int
    origin: str = ""
    store: Path | None = None
    store_spec: shelf.StoreSpec | None = None


def open_base(
    checkpoint: Checkpoint, quant: Quant, device: machine.Device, *, trust_remote_code: bool = False,
    device_map: str | Document = "auto", use_store: bool = True, tell: supply.Tell | None = None,
) -> Base:  # fmt: skip
    """Open a checkpoint under the policy of `quant`: its store, memory-mapped, which is built first if there is none.

    Args:
        device_map: `auto`: one card where the base fits, else `split`: as many layers on each; or one of transformers'.
        use_store: False quantises while loading, with the 16-bit weights in memory.
        tell: how a build goes.

    Raises:
        StoreError: the store can neither be built nor done without.
        BaseModelError: the checkpoint asks for code of its own, lacks weights or their scales, is quantised in another
            way, or stays larger in memory than the policy says.
    """
    config = open_config(checkpoint.path, trust_remote_code=trust_remote_code)
    dtype_name, reason = machine.compute_dtype(device, quant.compute_dtype)
    specs = tuple(tensors.read_checkpoint(checkpoint.path)) if not checkpoint.pickle else ()
    policy.check_experts(config.model_type, specs, quant)
    quantised = is_quantised_already(config, checkpoint.path)
    folder, origin = checkpoint.path, str(checkpoint.path)
    stored, spec = None, None
    if checkpoint.blocks:
        origin = f"mapped from {checkpoint.blocks[0]}"
        if device.on_card:
            raise BaseModelError(
                "quant.type gguf computes on the CPU: no kernel here reads a GGUF's blocks on a card.",
                fix="--set quant.type=nf4; or CUDA_VISIBLE_DEVICES= in front of the command, to compute on the CPU",
            )
    elif use_store and quant.quantises and not quantised and not hasattr(config, "auto_map"):
        spec = store_spec(checkpoint, config, quant, device, specs)
        stored, why = stored_base(spec, device, tell)
        folder, origin = (stored, f"store {stored}") if stored is not None else (folder, f"{folder}: {why}")
    opening = _Opening(checkpoint, folder, config, quant, DTYPES[dtype_name], quantised)
    expected = sum(policy.encoded_bytes(s, quant, opening.dtype.itemsize) for s in specs)
    if device_map == "auto":
        fits = len(device.cards) < 2 or expected <= ON_ONE_CARD * device.cards[0].free_bytes
        device_map = {"": device.main} if fits else "split"
    if device_map == "split":
        empty = structure.meta_model(config, trust_remote_code=trust_remote_code)
        device_map = structure.split_map(empty, [f"{device.kind}:{card.index}" for card in device.cards])
    where = device_map if device.on_card else {"": "cpu"}
    model = opening.model(device_map=where, trust_remote_code=trust_remote_code)
    resident = codec.resident_bytes(model)
    if not quantised:
        residency.check_resident(model, quant, resident, expected, checkpoint.id)
    return Base(model, checkpoint, specs, dtype_name, reason, resident, expected, origin, stored, spec)


@dataclass(frozen=True)
class _Opening:
    """One call of `from_pretrained` and what makes its model safe. `folder` is the store's, or the checkpoint's own;
    `quantised`: the checkpoint itself holds codes."""

    checkpoint: Checkpoint
    folder: Path
    config: Config
    quant: Quant
    dtype: torch.dtype
    quantised: bool

    def model(self, **how: object) -> Model:
        """The model, whole and safe to train. `how` is handed on to `from_pretrained`."""
        if self.checkpoint.blocks:
            opened = open_blocks(self.checkpoint, self.config, self.quant, self.dtype)
            return self._settled(self._from_pretrained(config=opened.config, state_dict=opened.state, **how))
        from_store = self.folder != self.checkpoint.path
        opened = open_config(self.folder) if from_store else self.config
        config = loader.opening_config(opened) or (opened if text_half.is_half(opened) else None)
        bits = None
        if self.quant.quantises and not self.quantised and not from_store:
            heads = residency.heads_to_skip(self.config, self.quant)
            bits = loader.load_config(structure.meta_model(self.config), self.quant, self.dtype, heads)
        if bits is not None and tensors.read_config(self.folder).get("quantization_config") is not None:
            raise BaseModelError(
                f"{self.checkpoint.id} has its experts in MXFP4, which are decoded while a store is built; without one "
                "it cannot be opened.",
                fix="export HALFBYTE_CACHE=/path/with/space",
            )
        if bits is None:
            reading.read_first_pages(self.folder)
        how |= {} if bits is None else {"quantization_config": bits}
        how |= {} if config is None else {"config": config}
        model = self._from_pretrained(use_safetensors=from_store or not self.checkpoint.pickle, **how)
        return self._settled(model, forget=bits is None)

    def _settled(self, model: Model, *, forget: bool = True) -> Model:
        if forget:
            codec.forget_deserialising(model)
        loader.settle(model, self.dtype)
        formats.settle(model)
        residency.check_scales(model, self.checkpoint.id)
        codec.set_compute_dtype(model, self.dtype)
        if next(stacks(model), None) is not None:
            interface.install(model)  # upstream's functions take dense stacks
        residency.keep_fp32(model, self.quant.fp32_modules, self.dtype)
        if getattr(model.config, "rescale_every", 0):  # RWKV, between training and evaluation: rewrites frozen weights
            model.config.rescale_every = 0  # halves weights and states alike, for the range of fp16
        model.name_or_path = model.config.name_or_path = self.checkpoint.id
        return model

    def _from_pretrained(self, **how: object) -> Model:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                auto = structure.auto_class(self.config)
                if self.checkpoint.blocks:  # the automatic class asks for a folder
                    auto = auto._model_mapping[type(self.config)]
                model, info = auto.from_pretrained(
                    None if self.checkpoint.blocks else self.folder,
                    dtype=self.dtype,
                    weights_only=True,
                    ignore_mismatched_sizes=True,  # they are named in residency.check_complete
                    output_loading_info=True,
                    use_kernels=False,  # a hub's code in place of the model's, from transformers 5.25 on unless refused
                    **how,
                )
        except UnpicklingError as error:
            raise reading.unsafe_pickle(self.checkpoint, error) from error
        except (ValueError, RuntimeError, OSError, KeyError, EOFError) as error:
            raise BaseModelError(
                f"{self.checkpoint.id} could not be opened from {self.folder}: {first_line(error)}"
            ) from error
        residency.check_complete(model, info, self.checkpoint, self.quant)
        return model


def open_store(spec: shelf.StoreSpec, folder: Path) -> Model:
    """The model of a store, mapped; without adapters, to be read matrix by matrix."""
    opening = _Opening(spec.checkpoint, folder, spec.config, spec.quant, spec.dtype, quantised=False)
    return opening.model(device_map={"": "cpu"})


def store_spec(
    checkpoint: Checkpoint, config: Config, quant: Quant, device: machine.Device, specs: tuple[tensors.TensorSpec, ...]
) -> shelf.StoreSpec:
    """The store that `open_base` opens for these settings; what cannot be held as asked is told before it is built."""
    dtype = DTYPES[machine.compute_dtype(device, quant.compute_dtype)[0]]
    heads = residency.heads_to_skip(config, quant)
    expected = sum(policy.encoded_bytes(s, quant, dtype.itemsize) for s in specs)

    def check(model: Model, info: Document) -> None:
        residency.check_complete(model, info, checkpoint, quant)
        residency.named_fp32(model, quant.fp32_modules)
        residency.check_resident(model, quant, codec.planned_bytes(model, quant), expected, checkpoint.id)

    return shelf.StoreSpec(checkpoint, config, quant, dtype, heads, cores=device.cores, check=check)


def stored_base(
    spec: shelf.StoreSpec, device: machine.Device, tell: supply.Tell | None = None
) -> tuple[Path | None, str]:
    """The folder of the store, found or built; or None, and why the base is quantised while it is loaded instead.
    Raises StoreError: no store can be written, and the 16-bit weights do not fit in memory either."""
    tell = tell or supply.Tell()
    try:
        return supply.ensure(spec, tell=quantisation_error.tell_gguf_error(spec, tell)), ""
    except shelf.CannotHold as reason:
        why = str(reason)
    except shelf.NotWritable as error:
        nbytes = sum(file.stat().st_size for file in shelf.source_files(spec.checkpoint))
        if nbytes * LOADING_SHARE > device.ram_available_bytes:
            raise
        why = error.message
    tell.say(f"no store, the base is quantised while it is loaded: {why}")
    return None, why


def load_base(
    model_id: str, *, load_in_4bit: bool = True, load_in_8bit: bool = False, quantization_config: Any = None,
    device_map: str | Document = "auto", dtype: str = "auto", revision: str | None = None,
    trust_remote_code: bool = False, allow_pickle: bool = False,
) -> Any:  # fmt: skip
    """The classic reload line, `load_in_4bit=True, device_map="auto"`, which transformers 5 itself refuses.

    Args:
        model_id: hub id (with `@revision` or `revision`), folder, `.gguf` file or packaged name.
        load_in_4bit: NF4 with double quantisation; False keeps 16 bits.
        load_in_8bit: LLM.int8's weights instead.
        quantization_config: a `BitsAndBytesConfig` whose bits, 4-bit type, double quantisation, compute dtype and
            8-bit threshold are taken.
        dtype: compute dtype `auto`, `bf16`, `fp16` or `fp32`, unless `quantization_config` names one.

    Returns:
        The model, safe to evaluate and train in turns, with `name_or_path` set to what was asked for.
    """
    bits = 8 if load_in_8bit else 4 if load_in_4bit else 16
    values: Document = {"compute_dtype": dtype, "type": number_formats.of_bits(bits)}
    if quantization_config is not None:
        skipped = tuple(quantization_config.llm_int8_skip_modules or ())
        values = {"compute_dtype": dtype, **formats.settings_of(quantization_config), "skip_modules": skipped}
    device = machine.detect()
    base = open_base(
        resolve(f"{model_id}@{revision}" if revision else model_id, allow_pickle=allow_pickle),
        Quant(**values),
        device,
        trust_remote_code=trust_remote_code,
        device_map=device_map,
    )
    if values["compute_dtype"] == "fp16" and base.compute_dtype != "fp16":
        warnings.warn(f"float16 was asked for; computing in {base.compute_dtype} ({base.dtype_reason}).", stacklevel=2)
    return base.model


def load_tokenizer(model_id: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of whatever `load_base` opens, also where `AutoTokenizer` knows no such name: of a GGUF file or a
    packaged model."""
    name = f"{model_id}@{revision}" if revision else model_id
    return open_tokenizer(resolve(name), trust_remote_code=trust_remote_code)

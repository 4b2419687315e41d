"""The drop-in names: PEFT's functions and classes on a base that is safe to evaluate, in a dtype that is multiplied.

Why: the classic QLoRA script must run as it is. On a CPU it would compute in fp16 (whose backward is about a thousand
times slower), its Trainer's autocast would cast every layer's input, and an evaluation would end its gradients.
What: functions and classes of PEFT's names. A trainer that adapts its model itself (TRL's `peft_config`) calls PEFT's
own `get_peft_model`: our `LoraConfig` is then seen by `_adopt`, a hook of torch's for every module that gets a part.
Source: `peft/mapping_func.py`, `peft/peft_model.py`, `peft/utils/other.py`; torch documents the hook among those "for
all modules" (`register_module_module_registration_hook`).
Cost: none; nothing is upcast.
"""

import difflib
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary, WeakSet

import peft
import torch
from peft import PeftConfig
from peft.tuners.lora import LoraModel
from torch.nn.modules.module import register_module_module_registration_hook
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import ModelOutput

from halfbyte.adapters import first_step, masters, unpad
from halfbyte.errors import BaseModelError, RecipeError
from halfbyte.layers import fuse, packing
from halfbyte.models import structure, tensors
from halfbyte.plan import layer as decoder
from halfbyte.quant import bnb as codec
from halfbyte.quant import formats
from halfbyte.system import accelerator, device, threads
from halfbyte.types import Model
from halfbyte.upstream import transformers as upstream

threads.keep_few_products()

# What a script of unknown batch size is prepared for: 4 examples of 1024 tokens, a plan's largest micro-batch.
PREPARED_TOKENS = 4096
# What PEFT's class for causal LMs keeps of its base, for its `generate`.
_PREPARES = "prepare_inputs_for_generation"
COMFORT = 0.5  # share of free memory that activations may take before they are made again
# PEFT asks its base by the older name; no script can mend that.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def peft_attribute(name: str, beside: Sequence[str]) -> object:
    """PEFT's own `name`, of which halfbyte has no form; an AttributeError with the nearest of PEFT's and `beside`."""
    if name in peft.__all__:
        return getattr(peft, name)
    near = difflib.get_close_matches(name, [*beside, *peft.__all__], 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise AttributeError(f"module 'halfbyte' has no attribute {name!r}{hint}")


_LOGITS = "_halfbyte_logits"


class LossAlone(CausalLMOutputWithPast):
    """Of a forward that was asked for its loss. Logits are made when they are read, by a forward of their own, which
    the loss carries: accelerate makes a new output of the parts of this one."""

    def __getattribute__(self, name: str) -> object:
        if name == "logits":
            LossAlone._fill(self)
        return super().__getattribute__(name)

    def __getitem__(self, key: object) -> object:
        if key not in ("loss", 0):
            LossAlone._fill(self)
        return super().__getitem__(key)

    def _fill(self) -> None:
        logits = getattr(vars(self).get("loss"), _LOGITS, None)
        if logits is not None and "logits" not in [*self]:
            super().__setitem__("logits", logits())


class LoraConfig(peft.LoraConfig):
    """PEFT's `LoraConfig`. Who hands it to PEFT's own `get_peft_model`, as TRL's trainers do, gets our model."""


class _Ours:
    """One of PEFT's models, computing in the base's own dtype, whatever autocast its caller has entered, and running
    the padded batches of a training script without their padding (`unpad.py`). The first training forward proves the
    fused layers on a few layers of the model; if they are wrong there, PEFT's own run instead.
    """

    writes = False  # it is a causal LM

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    @classmethod
    def from_pretrained(cls, model: Model, model_id: str, *args: Any, **kwargs: Any) -> Model:
        return PeftModel.from_pretrained(model, model_id, *args, **kwargs)

    @torch.compiler.disable  # its kernels are compiled already; torch would trace the proofs too, for many minutes
    def forward(self, *args: object, **kwargs: object) -> ModelOutput:
        with torch.autocast(self.device.type, enabled=False):
            if not (self.training and torch.is_grad_enabled()):
                return self._plain(args, kwargs)
            step = None
            if self not in first_step.SEEN:
                _refuse_apples_gpu(next(self.parameters()), *kwargs.values())
                compute = _COMPUTE.get(structure.causal_lm(self), "exact")
                step = first_step.prove(self, {} if args else kwargs, raised=_hold(self), compute=compute)
            unpad.attach(self)
            unpad.see_labels(self, kwargs)
            loss, why = None, "positional arguments" if args else ""
            if self.writes and not args:
                loss, why = unpad.training_loss(self, kwargs)
            if loss is None:
                out = self._plain(args, kwargs)
            else:
                out = LossAlone(loss=loss)
                setattr(loss, _LOGITS, partial(self._logits, kwargs))
            if step is not None:
                step.say(self, why)
            return out

    def _logits(self, kwargs: dict[str, object]) -> torch.Tensor:
        inputs = {name: x for name, x in kwargs.items() if name not in ("labels", "num_items_in_batch")}
        with torch.autocast(self.device.type, enabled=False):
            logits: torch.Tensor = self._plain((), inputs).logits
        return logits

    def _plain(self, args: tuple[object, ...], kwargs: dict[str, object]) -> ModelOutput:
        asks = kwargs.get("output_attentions") or getattr(self.config, "output_attentions", False)
        with packing.attention_as_opened(self) if asks else nullcontext():
            out: Any = super().forward(*args, **_beside(self, kwargs))  # type: ignore[misc]
        if isinstance(labels := kwargs.get("labels"), torch.Tensor) and getattr(out, "loss", None) is not None:
            out.loss = out.loss.to(labels.device)  # a Trainer takes it from nowhere else
        return out

    def add_adapter(
        self, adapter_name: str, peft_config: PeftConfig, low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:  # fmt: skip
        super().add_adapter(  # type: ignore[misc]
            adapter_name, peft_config, low_cpu_mem_usage, autocast_adapter_dtype
        )
        if not autocast_adapter_dtype:
            _ROUNDED.add(self)
        _hold(self)

    def load_adapter(self, *args: object, **kwargs: object) -> object:
        _hold(self)  # a checkpoint's fp32 numbers must find fp32 ones
        return super().load_adapter(*args, **kwargs)  # type: ignore[misc]

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode)  # type: ignore[misc]
        _hold(self)  # what trains beside LoRA in another adapter trains from now on


class PeftModelForCausalLM(_Ours, peft.PeftModelForCausalLM):
    """PEFT's `PeftModelForCausalLM` as `_Ours`."""

    writes = True


class PeftModelForSequenceClassification(_Ours, peft.PeftModelForSequenceClassification):
    """PEFT's class of this name as `_Ours`."""


class PeftModelForTokenClassification(_Ours, peft.PeftModelForTokenClassification):
    """PEFT's class of this name as `_Ours`."""


class PeftModelForFeatureExtraction(_Ours, peft.PeftModelForFeatureExtraction):
    """PEFT's class of this name as `_Ours`."""


_OURS = {
    cls.__mro__[2]: cls
    for cls in (
        PeftModelForCausalLM, PeftModelForSequenceClassification, PeftModelForTokenClassification,
        PeftModelForFeatureExtraction,
    )
}  # fmt: skip


class AutoPeftModelForCausalLM(peft.AutoPeftModelForCausalLM):
    """PEFT's class of this name, giving our model."""

    _target_peft_class = PeftModelForCausalLM


# Of which a script has asked for no fp32 masters.
_ROUNDED: WeakSet[torch.nn.Module] = WeakSet()
# What the products of a base's layers are asked to be (exact, auto or int8); of each base that was prepared here.
_COMPUTE: WeakKeyDictionary[torch.nn.Module, str] = WeakKeyDictionary()


def _beside(model: Model, inputs: dict[str, object]) -> dict[str, object]:
    """Inputs where the base begins: a Trainer brings them to the machine's card, also for a base that is on the CPU."""
    where = model.get_input_embeddings().weight.device
    return {name: x.to(where) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}


def _hold(model: Model) -> int:
    """Make fp32 what trains and is not (TRL makes LoRA bf16 on a 4-bit base). Returns how many parameters were."""
    return 0 if model in _ROUNDED else masters.hold(model)


def _adopt(module: torch.nn.Module, name: str, part: torch.nn.Module | None) -> None:
    """A model that PEFT builds becomes ours while it is built, where its config or its base comes from here."""
    if name != "base_model" or not isinstance(part, LoraModel) or not isinstance(module, peft.PeftModel):
        return
    lm = part.model
    ours = lm in _COMPUTE or any(isinstance(config, LoraConfig) for config in part.peft_config.values())
    if type(module) is peft.PeftModel and ours and type(lm).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        setattr(module, f"base_model_{_PREPARES}", getattr(lm, _PREPARES))  # no task_type was given
    elif type(module) not in _OURS or not ours:
        return
    make_ready(lm)
    module.__class__ = _OURS.get(type(module), PeftModelForCausalLM)
    fuse.install(part)


register_module_module_registration_hook(_adopt)


def get_peft_model(model: Model, peft_config: PeftConfig, adapter_name: str = "default", **kwargs: object) -> Model:
    """PEFT's `get_peft_model` on a base that is safe to evaluate in between, computing without autocast.

    Same arguments and result type (a subclass of `PeftModelForCausalLM`) as PEFT's own. What trains is fp32, beside
    LoRA too, unless `autocast_adapter_dtype` is False.
    """
    _refuse_apples_gpu(next(model.parameters()))
    formats.settle(model)
    adapted = peft.get_peft_model(model, peft_config, adapter_name, **kwargs)
    if kwargs.get("autocast_adapter_dtype", True):
        masters.hold(adapted)
    else:
        _ROUNDED.add(adapted)
    return own_class(adapted)


def _refuse_apples_gpu(*values: object) -> None:
    """A BaseModelError if a model or its inputs lie there: nothing of ours has ever run on it."""
    if any(isinstance(value, torch.Tensor) and value.device.type == "mps" for value in values):
        raise BaseModelError(
            "halfbyte does not compute on Apple's GPU (mps): none of its layers has ever been run there.",
            fix='load the model with device_map="cpu", and train with TrainingArguments(use_cpu=True)',
        )


def own_class(adapted: Model) -> Model:
    """Give a plain model of PEFT's our class, which adds no state, and fused forwards; other task types stay, but for
    LoRA on quantised experts, which only our function computes."""
    if type(adapted) in (*_OURS, *_OURS.values()):
        adapted.__class__ = _OURS.get(type(adapted), type(adapted))
        fuse.install(adapted)
    else:
        fuse.install_quantised_experts(adapted)
    return adapted


class PeftModel(peft.PeftModel):
    """PEFT's PeftModel with the same `from_pretrained`, on a base that is safe to evaluate while training."""

    @classmethod
    def from_pretrained(
        cls, model: Model, model_id: str, adapter_name: str = "default", is_trainable: bool = False, **kwargs: object
    ) -> Model:
        make_ready(model)
        adapted = peft.PeftModel.from_pretrained(model, model_id, adapter_name, is_trainable, **kwargs)
        if is_trainable and kwargs.get("autocast_adapter_dtype", True) and masters.hold(adapted):
            kwargs.pop("config", None)
            adapted.load_adapter(model_id, adapter_name, is_trainable=True, **kwargs)  # anew: they were rounded
        return own_class(adapted)


def prepare_model_for_kbit_training(
    model: Model, use_gradient_checkpointing: bool | None = None,
    gradient_checkpointing_kwargs: dict[str, object] | None = None, auto_clear_cache: bool = True,
    compute: Literal["auto", "exact", "int8"] = "exact",
) -> Model:  # fmt: skip
    """Make a loaded base ready for LoRA: frozen, safe, in a dtype that this machine multiplies.

    Unlike PEFT's, nothing is upcast to fp32 except what would otherwise compute in fp16 on a CPU, whose fp16 backward
    is about a thousand times slower: there the model is moved to the dtype of `device.compute_dtype`, and a warning
    says so once.

    Args:
        use_gradient_checkpointing: None (where PEFT's has True) turns recomputation on where it is needed: on a card,
            and on a CPU where the activations of `PREPARED_TOKENS` tokens would take more than half of free memory.
        gradient_checkpointing_kwargs, auto_clear_cache: as PEFT's (`peft/utils/other.py`).
        compute: as a recipe's `quant.compute`; the first training forward decides on its batch, and says how.
    """
    if compute not in ("auto", "exact", "int8"):
        raise RecipeError(f"compute must be auto, exact or int8, got {compute!r}")
    _COMPUTE[structure.causal_lm(model)] = compute
    model.requires_grad_(False)
    on_cpu = make_ready(model)
    if use_gradient_checkpointing is None:
        use_gradient_checkpointing = gradient_checkpointing_kwargs is not None or not on_cpu or _needs_recompute(model)
    if use_gradient_checkpointing:
        model.enable_input_require_grads()
        upstream.recompute(model, gradient_checkpointing_kwargs or {})
    if auto_clear_cache:
        accelerator.empty_cache()
    return model


def _needs_recompute(model: Model) -> bool:
    if not hasattr(model, "gradient_checkpointing_enable"):  # a module that is not transformers'
        return False
    facts = tensors.facts_of(model.config.to_dict(), ())
    itemsize = torch.finfo(model.dtype).bits // 8
    layer = decoder.layer_of(facts, (), itemsize, kernels=True, dropout=False)
    kept_bytes = PREPARED_TOKENS * facts.layers * (layer.kept + 2 * itemsize * facts.hidden)  # and what adapters read
    return kept_bytes > COMFORT * device.detect().ram_available_bytes


def make_ready(model: Model) -> bool:
    """Safe to evaluate, and in one dtype, which the machine multiplies. Returns whether the model is on a CPU."""
    _refuse_apples_gpu(next(model.parameters()))
    formats.settle(model)
    where = next(model.parameters()).device
    on_cpu = where.type == "cpu"
    dtypes = {layer.compute_dtype for _, layer in codec.linears_4bit(model)} | {p.dtype for p in model.parameters()}
    wrong = torch.float16 if on_cpu else None if accelerator.multiplies_bf16(where) else torch.bfloat16
    if wrong not in dtypes:
        # forward and backward dequantise to one dtype, the one that the residual stream has
        dtype = getattr(model, "dtype", None) or next(d for d in dtypes if d is not None and d.is_floating_point)
        usual = dtype in (torch.bfloat16, torch.float32) or not on_cpu
        codec.set_compute_dtype(model, dtype if usual else torch.float32)
        return on_cpu
    if on_cpu:
        name, reason = device.compute_dtype(device.detect(), "auto")
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
        _say_once(f"float16 was asked for, but a CPU cannot train in it; computing in {name} ({reason}).")
    else:
        dtype = torch.float16
        _say_once(
            "this card has no bf16 multiply: computing in float16, whose loss TrainingArguments(fp16=True) scales."
        )
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype in (torch.float16, torch.bfloat16):
            tensor.data = tensor.data.to(dtype)
    codec.set_compute_dtype(model, dtype)
    model.config.dtype = dtype
    return on_cpu


@cache
def _say_once(text: str) -> None:
    warnings.warn(text, stacklevel=4)

"""What a trained adapter makes of each weight of its base, one weight at a time.

Why: PEFT merges a whole model in memory, in its own dtype, and DoRA with the norm of whatever weight is there then.
What: PEFT's own layers on a model without weights; each is asked for its delta, which is added in fp32. DoRA is scaled
by the norm of the weight that it was trained on, whichever weight it is merged into. Of a residual start only what was
learned since is added: its factors hold a part of what quantising has lost, which 16-bit weights still have.
Source: `peft/tuners/lora/layer.py` (`get_delta_weight`), `variants.py` (`DoraLinearVariant.merge_safe`).
Cost: the adapter in fp32, and while a weight is asked for, that weight and its delta in fp32.
"""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from halfbyte.errors import AdapterError, first_line
from halfbyte.models.structure import meta_model
from halfbyte.recipe.adapter import read_config
from halfbyte.recipe.adapter_folder import ADAPTER_FILES
from halfbyte.types import Config, Model

_WRAPPING = re.compile(r"\.(?:base_layer|original_module|token_adapter)(?=\.|$)")
Factors = dict[str, tuple[Tensor, Tensor]]
"""B (O, R) and A (R, D) of each layer, as `base.residual.read` gives them."""


@dataclass(frozen=True)
class WeightChange:
    """How one weight is changed. One of these is set; a layer may have a `start`, and a
    `value` is that of `rows` alone where they are set too."""

    layer: LoraLayer | None = None  # PEFT's layer, whose delta is added
    experts: ParamWrapper | None = None  # PEFT's wrapper of a stack, (E, a, b)
    value: Tensor | None = None  # takes the weight's place
    rows: Tensor | None = None  # these rows of it are `value`
    bias: Tensor | None = None  # is added
    start: tuple[Tensor, Tensor] | None = None  # B and A of a residual start, taken away again

    @property
    def norms(self) -> bool:
        """Whether it asks for the weight that was trained on (DoRA)."""
        return self.layer is not None and bool(self.layer.use_dora.get(_key(self.layer)))

    @property
    def by_rows(self) -> bool:
        """Whether `apply_to_rows` can be asked: LoRA on a matrix (out, in), without a norm over the whole."""
        layer = self.layer
        return bool(layer is not None and layer.lora_A and not (layer.lora_variant or layer.fan_in_fan_out))

    @torch.no_grad()
    def apply_to_rows(self, weight: Tensor, first_row: int) -> Tensor:
        """Rows of a weight, (rows, in) fp32, changed in place; the first of them is `first_row` of the whole."""
        assert self.layer is not None
        key, rows = _key(self.layer), slice(first_row, first_row + len(weight))
        b, a = self.layer.lora_B[key].weight, self.layer.lora_A[key].weight
        weight.addmm_(b[rows], a, alpha=self.layer.scaling[key])
        if self.start is not None:
            b, a = (factor.float() for factor in self.start)
            weight.addmm_(b[rows], a, alpha=-1)
        return weight

    @torch.no_grad()
    def apply(self, weight: Tensor, trained_on: Callable[[], Tensor] | None = None) -> Tensor:
        """The changed weight, fp32, in the memory of `weight` where it can be. `weight`: fp32, as a checkpoint has it
        (a Conv1D's is (in, out)). `trained_on`: gives the one trained on, alike."""
        if self.value is not None:
            weight[self.rows] = self.value.float()
            return weight
        if self.bias is not None:
            return weight.add_(self.bias)
        assert self.layer is not None
        key = _key(self.layer)
        delta = self.layer.get_delta_weight(key)
        if self.norms:
            magnitude, transposed = self.layer.lora_magnitude_vector[key], self.layer.fan_in_fan_out
            trained = weight if trained_on is None else trained_on().float()
            norm = magnitude.get_weight_norm(trained, delta.T if transposed else delta, scaling=1)
            factor = (magnitude.weight / norm).view(-1, 1)
            return weight.add_(delta).mul_(factor.T if transposed else factor)
        weight.add_(delta)
        if self.start is not None:
            b, a = (factor.float() for factor in self.start)
            (weight.T if self.layer.fan_in_fan_out else weight).addmm_(b, a, alpha=-1)
        return weight

    @torch.no_grad()
    def apply_to_expert(self, weight: Tensor, expert: int, first_row: int = 0) -> Tensor:
        """The same for rows of one expert's matrix, (rows, in), beginning at a row of the stack's."""
        assert self.experts is not None
        key = _key(self.experts)
        b, a = self.factors(expert)
        if self.experts._did_swap_in_out_features:  # (experts, out, in)
            return weight.addmm_(b[first_row : first_row + len(weight)], a, alpha=self.experts.scaling[key])
        return weight.addmm_(a.T[first_row : first_row + len(weight)], b.T, alpha=self.experts.scaling[key])

    def factors(self, expert: int) -> tuple[Tensor, Tensor]:
        """B (out, R) and A (R, in) of an expert, as PEFT keeps them: B's last axis runs over experts."""
        assert self.experts is not None
        key, count = _key(self.experts), self.experts.num_experts
        a, b = self.experts.lora_A[key].weight, self.experts.lora_B[key].weight
        return b.reshape(len(b), -1, count)[..., expert], a.reshape(count, -1, a.shape[-1])[expert]


def changes(config: Config, folder: Path, start: Factors | None = None, auto: Any = None) -> dict[str, WeightChange]:
    """The weights that an adapter changes, by the model's names of them. `folder`: the adapter, in PEFT's format.
    `start`: of a residual start that is not in the weights merged into. `auto`: the class of a model with a head.
    Raises AdapterError: it does not fit the model, or is of a kind that no weight can take up."""
    inner, changed = _on_nothing(meta_model(config, auto), folder).get_base_model(), dict[str, WeightChange]()
    for name, module in inner.named_modules():
        plain = _WRAPPING.sub("", name)
        if isinstance(module, ParamWrapper):
            changed[f"{plain}.{module.parameter_name}"] = WeightChange(experts=module)
        elif isinstance(module, LoraLayer) and _key(module):
            _check(name, module)
            changed[f"{plain}.weight"] = WeightChange(layer=module, start=None if start is None else start[plain])
            if module.lora_bias.get(_key(module)):
                key = _key(module)
                changed[f"{plain}.bias"] = WeightChange(
                    bias=module.lora_B[key].bias.detach().float() * module.scaling[key]
                )
        elif isinstance(module, ModulesToSaveWrapper):
            for leaf, parameter in module.modules_to_save[module.active_adapters[0]].named_parameters():
                changed[f"{plain}.{leaf}"] = WeightChange(value=parameter.detach())
        elif isinstance(module, TrainableTokensWrapper):
            rows = module.token_adapter
            key = rows.active_adapters[0]
            indices, values = torch.tensor(rows.token_indices[key]), rows.trainable_tokens_delta[key].detach()
            changed[f"{plain}.weight"] = WeightChange(value=values, rows=indices)
    inside = (".modules_to_save.", ".lora_", ".trainable_tokens")
    for name, parameter in inner.named_parameters():  # biases, which PEFT trains in the base
        if parameter.device.type != "meta" and not any(part in f".{name}" for part in inside):
            changed.setdefault(_WRAPPING.sub("", name), WeightChange(value=parameter.detach()))
    return changed


def _key(layer: LoraLayer) -> str:
    return str(next((name for name in layer.active_adapters if name in layer.scaling), ""))


def _check(name: str, layer: LoraLayer) -> None:
    key = _key(layer)
    base = layer.get_base_layer()
    if layer.use_dora.get(key) and isinstance(base, nn.Embedding):
        raise AdapterError(f"DoRA on the embedding {name} is not merged here.", fix="use it with its base")
    if layer.lora_bias.get(key) and getattr(base, "bias", None) is None:
        raise AdapterError(
            f"lora.lora_bias has trained a bias for {name}, which has none, so no weight can take it up.",
            fix="use the adapter with its base: halfbyte chat RUN",
        )


def _on_nothing(model: Model, folder: Path) -> PeftModel:
    """PEFT's model on one of the meta device with the adapter's own tensors in it, as they are saved."""
    real: dict[str, Tensor] = {}
    saved = read_config(folder)

    def keep(module: nn.Module, _: object) -> None:
        # PEFT moves them to the base's device, where they would lose their values
        real.update({n: p.detach() for n, p in module.named_parameters() if p.device.type != "meta"})

    hook = nn.Module.register_load_state_dict_post_hook
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            settings = LoraConfig.from_pretrained(str(folder))
            settings = replace(settings, init_lora_weights=True, inference_mode=True)
            adapted = get_peft_model(model, settings, low_cpu_mem_usage=True)
            handle = hook(adapted, keep)
            set_peft_model_state_dict(adapted, load_file(folder / ADAPTER_FILES[0]), low_cpu_mem_usage=True)
            handle.remove()
    except (RuntimeError, ValueError, KeyError, TypeError, OSError) as error:
        raise AdapterError(
            f"the adapter in {folder} does not fit this model: {first_line(error)}",
            fix=f"it was trained on {saved.get('base_model_name_or_path')!r}",
        ) from error
    with safe_open(folder / ADAPTER_FILES[0], "pt") as file:
        count = len(list(file.keys()))
    if len(real) != count:
        raise AdapterError(
            f"the adapter in {folder} has {count} tensors, of which this model has a place for {len(real)}.",
            fix=f"it was trained on {saved.get('base_model_name_or_path')!r}",
        )
    _put(adapted, real)
    return adapted


def _put(adapted: nn.Module, real: dict[str, Tensor]) -> None:
    """Tensors in the place of parameters of these names, in fp32."""
    for name, value in real.items():
        home, _, leaf = name.rpartition(".")
        module = adapted.get_submodule(home)
        parameter = nn.Parameter(value.float(), requires_grad=False)
        if isinstance(module, nn.ParameterDict):
            module[leaf] = parameter
        else:
            module._parameters[leaf] = parameter

"""Put adapters on a base, save them, load them again on their base. With `layers`, the only door to peft.

Source: LoRA, arXiv:2106.09685; `peft/tuners/lora/model.py`.
Cost: rank x (in + out) parameters a layer, fp32 while training.
"""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TypeAlias

import torch
from peft import LoraConfig, PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.optim import Optimizer

from halfbyte.adapters.dropin import PeftModel, get_peft_model

from halfbyte.adapters.targets import (  # isort: skip
    Targets, matched, matched_stacks, remark_on_experts, resolve_targets, without_match,
)  # fmt: skip
from halfbyte.errors import AdapterError, first_line
from halfbyte.layers import heads
from halfbyte.models.lora_sites import leaf_of
from halfbyte.quant.stack import ExpertStack
from halfbyte.recipe.adapter import read_config
from halfbyte.recipe.adapter_folder import ADAPTER_FILES
from halfbyte.recipe.schema import Lora
from halfbyte.runs import checkpoint
from halfbyte.types import Document, Model
from halfbyte.upstream import peft as upstream

# Names under `lora:` that are not fields of peft.LoraConfig.
OWN_FIELDS = frozenset({"adapter", "save_dtype"})
# Parameters, each with a copy of what it was.
Saved: TypeAlias = list[tuple[torch.nn.Parameter, torch.Tensor]]


def lora_config(lora: Lora, targets: Targets) -> LoraConfig:
    """The recipe's `lora:` as PEFT's own config. The two share their names, so every set value is passed on."""
    values = lora.model_dump(exclude={"target_modules", *OWN_FIELDS, *targets.holds}, exclude_none=True)
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
    if lora.init_lora_weights == "residual":  # ours; its factors are put in afterwards
        values["init_lora_weights"] = True
    return LoraConfig(**values, target_modules=targets.for_peft)


def add(model: Model, lora: Lora, targets: Targets, *, seed: int) -> Model:
    """Put fresh adapters on a base. `seed`: of LoRA A's random start; the global random state is left as
    `torch.manual_seed(seed)` makes it. Raises AdapterError: nothing matches (with near names), or PEFT refuses the
    settings."""
    model.requires_grad_(False)
    torch.manual_seed(seed)
    try:
        with warnings.catch_warnings():  # PEFT looks for parameters in patterns, and not when it warns
            warnings.filterwarnings(
                "ignore", "The following (rank|alpha)_pattern keys did not match any targeted module"
            )
            config = lora_config(lora, targets)
            config.task_type = _under_head(model)
            adapted = get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        fix = "`halfbyte train RECIPE.yaml --dry-run` shows each value"
        raise AdapterError(f"lora: {first_line(error)}", fix=fix) from error
    return adapted


def _under_head(model: Model) -> str | None:
    """PEFT's name of what a base is, whatever head is on it: an encoder cannot write."""
    return "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None


def choose_targets(model: Model, lora: Lora) -> tuple[Targets, list[str]]:
    """The target names, and the full names of modules and parameters that they hit under the recipe's limits."""
    if lora.bias == "lora_only" and upstream.BIASES.reason:
        fix = "--set lora.bias=all or none; or pip install -U peft"
        raise AdapterError(f"lora.bias lora_only: {upstream.BIASES.reason}.", fix=fix)
    parameters = matched_stacks(model, lora.target_parameters or ())
    if parameters and not lora.target_modules:
        chosen, modules = Targets((), "no module"), []
    else:
        chosen = resolve_targets(model, lora.target_modules, lora)
        modules = matched(model, chosen, lora)
    check_names(model, lora, [*modules, *parameters])
    chosen = replace(chosen, reason=chosen.reason + remark_on_experts(model, parameters))
    return chosen, [*modules, *parameters]


def check_names(model: Model, lora: Lora, modules: Sequence[str]) -> None:
    """Refuse names and numbers under `lora:` that hit nothing; PEFT only warns of some, says nothing of others."""
    names = [name for name, _ in model.named_modules() if name]
    if missing := without_match(names, lora.modules_to_save or ()):  # PEFT skips them without a word
        # a tied head's weight is the embedding's, and is a module of its own all the same
        leaves = sorted({leaf_of(n.rpartition(".")[0]) for n, _ in model.named_parameters(remove_duplicate=False)})
        near = [leaf for name in missing for leaf in get_close_matches(leaf_of(name), leaves)]
        raise AdapterError(
            f"lora.modules_to_save names {', '.join(missing)}, which the model does not have.",
            fix=f"did you mean {' or '.join(near)}?" if near else f"choose among {', '.join(leaves)}",
        )
    problems = []
    for field, pattern in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        used = {get_pattern_key(pattern, name) for name in modules}
        unused = [key for key in pattern if key not in used]
        problems += [f"lora.{field}: {key!r} is the key of no layer with an adapter" for key in unused]
    unmatched = without_match(names, lora.exclude_modules or ())
    problems += [f"lora.exclude_modules: {name!r} matches no module" for name in unmatched]
    layers = lora.layers_to_transform
    asked = (layers,) if isinstance(layers, int) else layers or ()
    absent = [layer for layer in asked if not any(f".{layer}." in name for name in names)]
    problems += [f"lora.layers_to_transform: the model has no layer {layer}" for layer in absent]
    rows = model.get_input_embeddings().weight.shape[0]
    beyond = [token for token in lora.trainable_token_indices or () if token >= rows]
    problems += [f"lora.trainable_token_indices: {t} is beyond the {rows} rows of the embedding" for t in beyond]
    biased = {name.removesuffix(".bias") for name, _ in model.named_parameters() if name.endswith(".bias")}
    if lora.bias != "none" and not (biased if lora.bias == "all" else biased & set(modules)):
        problems.append(f"lora.bias {lora.bias}: there is no bias to train")
    problems += _trained_twice(model, lora)
    if problems:
        raise AdapterError("; ".join(problems) + ".", fix="correct them, or leave them out")


def _trained_twice(model: Model, lora: Lora) -> list[str]:
    """`modules_to_save` and `trainable_token_indices` that train the same numbers; PEFT passes over the former."""
    if not lora.trainable_token_indices:
        return []
    kinds = {"": model.get_input_embeddings()}
    if getattr(model.config, "tie_word_embeddings", False):
        kinds["the embedding that it is tied to"] = model.get_output_embeddings()
    named = [(name, module) for name, module in model.named_modules(remove_duplicate=False) if name]
    return [
        f"lora.modules_to_save trains {asked} whole, lora.trainable_token_indices rows of {what or 'it'}: one of both"
        for asked in lora.modules_to_save or ()
        for what, module in kinds.items()
        if any(module is other for name, other in named if name.endswith(asked))
    ]


def summary(adapted: Model) -> str:
    """What LoRA was put on, by the last part of the names, and how much trains."""
    counts = Counter(
        getattr(m, "parameter_name", leaf_of(n)) for n, m in adapted.named_modules() if isinstance(m, BaseTunerLayer)
    )
    names = ", ".join(f"{name} x{count}" for name, count in sorted(counts.items()))
    trainable, total = adapted.get_nb_trainable_parameters()
    total += sum(math.prod(p.shape) - p.numel() for p in adapted.parameters() if isinstance(p, ExpertStack))
    return f"{names}; {trainable:,} of {total:,} parameters train ({trainable / total:.2%})"


def loraplus_optimizer(adapted: Model, cls: type[Optimizer], ratio: float, decay: float, kwargs: Document) -> Optimizer:
    """An optimiser whose learning rate for B is `ratio` times that for A (LoRA+, arXiv:2402.12354)."""
    kwargs = {**kwargs, "loraplus_lr_ratio": ratio, "loraplus_weight_decay": decay}
    if upstream.LORAPLUS.reason:
        raise AdapterError(
            f"train.loraplus_lr_ratio: {upstream.LORAPLUS.reason}.", fix="leave it out, or pip install -U peft"
        )
    return upstream.loraplus()(adapted, cls, **kwargs)


def save(
    adapted: Model, folder: Path, *, base_id: str, revision: str | None, dtype: torch.dtype = torch.float32,
    beside: Callable[[Path], None] = lambda folder: None,
) -> None:  # fmt: skip
    """Write `folder` in PEFT's format, whole or not at all; an older one there is replaced. `beside` writes more files
    into it, after the adapter's own."""
    with checkpoint.whole_or_absent(f"the adapter {folder}", folder) as temporary:
        writer(adapted, base_id=base_id, revision=revision, dtype=dtype)(temporary)
        beside(temporary)


def writer(
    adapted: Model, *, base_id: str, revision: str | None, dtype: torch.dtype | None, copied: bool = False
) -> Callable[[Path], None]:
    """Writes PEFT's two adapter files (`adapter_model.safetensors`, `adapter_config.json`) into a folder, in another
    thread too, until the optimiser's next step. The tensors are chosen now, as while a forward lasts a model may hold
    others in their places (`masters.py`); `copied` for a writing that may be later than that step.

    Args:
        base_id: hub id, folder or packaged name that the base came from; never a path inside a cache.
        dtype: of the saved tensors; None keeps each in its own (training masters are fp32).
    """
    config = copy(adapted.peft_config[adapted.active_adapter])
    config.base_model_name_or_path, config.revision = base_id, revision
    config.inference_mode = True
    config.task_type = heads.task_type(adapted) or config.task_type
    if isinstance(config.target_modules, set):  # its order changes from process to process
        config.target_modules = sorted(config.target_modules)
    saved = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    # under `bias: all` PEFT adds what is in its own wrappers under their names too
    inner = (".original_module.", ".modules_to_save.")
    chosen = {name: value.detach() for name, value in saved.items() if not any(part in name for part in inner)}
    chosen = {name: value.clone() for name, value in chosen.items()} if copied else chosen

    def write(folder: Path) -> None:
        config.save_pretrained(str(folder))
        state = {k: v.to("cpu", dtype or v.dtype).contiguous() for k, v in chosen.items()}
        save_file(state, folder / ADAPTER_FILES[0], metadata={"format": "pt"})

    return write


def load(model: Model, folder: Path, *, trainable: bool = False) -> Model:
    """Put a saved adapter on its base; unless it shall be `trainable`, nothing trains. Raises AdapterError: it does not
    fit: names tensors whose shape differs or that the base has no place for."""

    def put() -> Model:
        how: Document = {}
        if heads.task_type(model) is not None:
            how["config"] = PeftConfig.from_pretrained(str(folder))
            how["config"].task_type = _under_head(model)
        return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable, **how)

    adapted = _fitting(folder, put)
    if not trainable:
        adapted.requires_grad_(False)  # PEFT leaves the biases that an adapter has trained as trainable
    return adapted


def load_beside(adapted: Model, folder: Path, name: str) -> None:
    """Put one more saved adapter on the same base, under a name; the active one stays active, nothing trains. Raises
    AdapterError: as `load`."""

    def put() -> Model:
        result = adapted.load_adapter(str(folder), adapter_name=name)
        if lost := [key for key in result.missing_keys if f".{name}." in f"{key}."]:
            warnings.warn(f"missing adapter keys: {', '.join(lost)}", stacklevel=1)
        return adapted

    _fitting(folder, put, name)
    adapted.requires_grad_(False)


def _fitting(folder: Path, put: Callable[[], Model], name: str = "default") -> Model:
    """A model after `put` has put the adapter on it. Raises AdapterErrors, also where PEFT says nothing."""
    other_base = f"it was trained on {read_config(folder).get('base_model_name_or_path')!r}; open it on that model"
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            adapted = put()
    except SafetensorError as error:
        raise damaged(folder, first_line(error)) from error
    except (RuntimeError, ValueError, KeyError, TypeError, OSError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        shown = next((line for line in lines if "size mismatch" in line), lines[0] if lines else type(error).__name__)
        raise AdapterError(f"the adapter in {folder} does not fit this base: {shown[:300]}", fix=other_base) from error
    if strange := _without_place(adapted, folder, name):
        raise AdapterError(
            f"the adapter in {folder} has {len(strange)} tensors that this base has no place for: "
            f"{', '.join(strange[:3])}{', ...' if len(strange) > 3 else ''}.",
            fix=other_base,
        )
    if lost := [str(w.message) for w in caught if "missing adapter keys" in str(w.message)]:
        raise AdapterError(
            f"the adapter in {folder} lacks weights that its config promises: {lost[0][:300]}",
            fix="the file is damaged or of another version; save it again",
        )
    return adapted


def biases(model: Model) -> Saved:
    """The base's own biases, copied: to be taken before an adapter that has trained them is put on."""
    return [(p, p.detach().clone()) for name, p in model.named_parameters() if "bias" in name]


@contextmanager
def base_alone(adapted: Model, biases: Saved) -> Iterator[None]:
    """The base without its adapter. PEFT's `disable_adapter` leaves trained biases (`bias: all`) in place."""
    trained = [(parameter, parameter.detach().clone()) for parameter, _ in biases]
    with adapted.disable_adapter():
        try:
            for parameter, value in biases:
                parameter.data.copy_(value)
            yield
        finally:
            for parameter, value in trained:
                parameter.data.copy_(value)


@contextmanager
def using(adapted: Model, name: str | None, biases: Saved) -> Iterator[None]:
    """One of several adapters; None: the base alone."""
    if name is None:
        with base_alone(adapted, biases):
            yield
        return
    if adapted.active_adapter != name:
        adapted.set_adapter(name)
        adapted.requires_grad_(False)
    yield


def _without_place(adapted: Model, folder: Path, name: str = "default") -> list[str]:
    """Saved tensors that PEFT has read and dropped: a deeper model's, most often."""
    known = {*get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False)}
    known.update(name for name, _ in adapted.named_parameters())  # whole embeddings, which PEFT may save unasked
    with safe_open(folder / ADAPTER_FILES[0], "pt") as file:
        return sorted(set(file.keys()) - known)


def put_weights(adapted: Model, folder: Path) -> None:
    """Set the adapter's weights to those saved in `folder`."""
    set_peft_model_state_dict(adapted, load_file(folder / ADAPTER_FILES[0]))


def start_from(adapted: Model, folder: Path) -> None:
    """Give fresh adapters the weights of a trained one, of which they have the settings. Raises AdapterError: it is of
    another model: names tensors that are missing, too many, or of another shape."""
    other_base = f"it was trained on {read_config(folder).get('base_model_name_or_path')!r}; name that as the model"
    fresh = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    try:
        with safe_open(folder / ADAPTER_FILES[0], "pt") as file:
            saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise damaged(folder, first_line(error)) from error
    shapes = {name: tuple(value.shape) for name, value in fresh.items()}
    if strange := sorted(name for name in {*saved, *shapes} if saved.get(name) != shapes.get(name)):
        of = ", ".join(f"{name} ({saved.get(name)} there, {shapes.get(name)} here)" for name in strange[:3])
        raise AdapterError(
            f"the adapter in {folder} does not fit this base: {len(strange)} tensors differ: {of}.", fix=other_base
        )
    put_weights(adapted, folder)


def start_at(adapted: Model, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Begin fresh adapters at a low-rank part of what quantising lost, so that base + scaling B A is nearer to what was
    quantised. `factors`: B (O, R) and A (R, D) of each layer, R at least its rank, the largest direction first."""
    layers = {name: m for name, m in adapted.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    if without := [name for name in layers if name not in factors]:
        raise AdapterError(
            f"lora.init_lora_weights residual is for linear layers, and {without[0]} is none (an expert).",
            fix="lora.init_lora_weights: true, or targets without experts",
        )
    for name, layer in layers.items():
        for key, scaling in layer.scaling.items():
            (b, a), rank = factors[name], layer.r[key]
            root = math.sqrt(scaling)
            with torch.no_grad():
                layer.lora_A[key].weight.copy_(a[:rank] / root)
                layer.lora_B[key].weight.copy_(b[:, :rank] / root)


def damaged(folder: Path, why: str) -> AdapterError:
    """The error for an adapter's weights that are not as they were written."""
    return AdapterError(
        f"{folder / ADAPTER_FILES[0]} is cut short or damaged: {why}.",
        fix="copy it again; a run's checkpoints/ hold earlier states of its adapter",
    )

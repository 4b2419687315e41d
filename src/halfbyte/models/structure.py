"""The parts of a causal LM that others ask for, found in any architecture; torch is imported inside functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from halfbyte.errors import BaseModelError, SourceError
from halfbyte.models.families import FAMILIES
from halfbyte.types import Config, Model

if TYPE_CHECKING:
    from torch import nn


def meta_model(config: Config, auto: Any = None, *, trust_remote_code: bool = False) -> Model:
    """The model of a transformers config on the meta device: shapes without weights. `auto`: another class."""
    import torch

    try:
        with torch.device("meta"):
            return (auto or auto_class(config)).from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError) as error:
        kind = getattr(config, "model_type", type(config).__name__)
        raise SourceError(f"{kind}: transformers cannot build this model: {error}") from error


def is_encoder(config: Config) -> bool:
    """Whether a config is one of an encoder: it reads texts to both sides, and writes none."""
    family = FAMILIES.get(getattr(config, "model_type", ""))
    return family is not None and family.encoder and not getattr(config, "is_decoder", False)


def auto_class(config: Config) -> Any:
    """The automatic class that opens a base of this config: with a language model's head; of an encoder with one for
    texts, in whose place `layers/heads.py` puts the task's."""
    import transformers

    return transformers.AutoModelForSequenceClassification if is_encoder(config) else transformers.AutoModelForCausalLM


def of_head(lm: Model, name: str) -> bool:
    """Whether a weight of an encoder is one of its head: outside of the body, or its pooler."""
    inside = f"{lm.base_model_prefix}."
    return is_encoder(lm.config) and (not name.startswith(inside) or name.startswith(f"{inside}pooler."))


def causal_lm(model: Model) -> Model:
    """The transformers model inside DDP and PEFT wrappers."""
    from torch.nn.parallel import DistributedDataParallel

    if isinstance(model, DistributedDataParallel):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def body(lm: Model) -> Model:
    """The decoder below the output head: input_ids and a mask -> hidden states. `lm` itself where there is none."""
    decoder = lm.get_decoder()
    return lm.base_model if decoder is lm else decoder


def around(lm: Model) -> tuple[nn.Module, nn.Module]:
    """The embedding and the output head, without the wrapper that PEFT puts around one of which some rows train."""
    ends = (lm.get_input_embeddings(), lm.get_output_embeddings())
    embedding, head = (getattr(getattr(x, "token_adapter", None), "base_layer", x) for x in ends)
    return embedding, head


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a model, in the order in which they run."""
    return list(getattr(*layer_list(model)))


def layer_list(model: nn.Module) -> tuple[nn.Module, str]:
    """(module, attribute) of the list of decoder layers: the list of modules with the most parameters."""
    lists = _layer_lists(model)
    if not lists:
        raise BaseModelError(
            f"{type(model).__name__} has no list of layers, so it cannot be streamed.",
            fix="--set quant.placement=mapped leaves the paging to the system",
        )
    return max(lists, key=lambda pair: sum(p.numel() for p in getattr(*pair).parameters()))


def layers_of_body(body: nn.Module) -> tuple[nn.Module, str]:
    """`layer_list` of a model's body, found once and noted on it: the walk takes milliseconds, and forwards ask."""
    noted: tuple[nn.Module, str] | None = body.__dict__.get("_halfbyte_layers")
    if noted is None:
        noted = body.__dict__["_halfbyte_layers"] = layer_list(body)
    return noted


def _layer_lists(model: nn.Module) -> list[tuple[nn.Module, str]]:
    from torch import nn

    return [
        (module, name)
        for module in model.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList) and len(child) > 0
    ]


def split_map(lm: Model, devices: Sequence[str]) -> dict[str, str]:
    """A `device_map` by which each device has as many decoder layers as another, one after the other. What comes before
    them lies on the first device, the last norm and the head on the last; a tied head beside its embedding."""
    holder, name = layer_list(lm)
    layers = getattr(holder, name)
    device_of = {id(layer): devices[n * len(devices) // len(layers)] for n, layer in enumerate(layers)}
    head = lm.get_output_embeddings()
    inside = {id(m) for m in layers.modules()}
    after_layers, device_map = False, dict[str, str]()
    for path, module in lm.named_modules():
        if id(module) in device_of:
            device_map[path], after_layers = device_of[id(module)], True
        elif id(module) not in inside and not list(module.children()):
            has_parameters = any(True for _ in module.parameters(recurse=False))
            tied = module is head and getattr(lm.config.get_text_config(), "tie_word_embeddings", False)
            device_map[path] = devices[-1] if after_layers and has_parameters and not tied else devices[0]
    return device_map


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """Without dropout and gradients; the mode is put back."""
    import torch

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


@contextmanager
def shallow(model: Model) -> Iterator[int]:
    """The model with its first layers only: two, or as many as hold one of each kind and something that trains.

    For proofs at start: a forward through all of a base costs a second, and reads all of a base that is on disk. Hooks
    that a proof sets reach these layers alone. Afterwards the model has all its layers again. Yields how many there are
    meanwhile; 0 for a model without a list of layers, which stays as it is.
    """
    from torch import nn

    if not _layer_lists(model):
        yield 0
        return
    holder, name = layer_list(model)
    layers = list(getattr(holder, name))
    kinds = getattr(causal_lm(model).config.get_text_config(), "layer_types", None) or [""] * len(layers)
    enough = max(kinds.index(kind) for kind in set(kinds)) + 1
    trained = [i for i, layer in enumerate(layers) if any(p.requires_grad for p in layer.parameters())]
    count = min(len(layers), max(2, enough, *[i + 1 for i in trained[:1]]))
    with replaced((holder, name, nn.ModuleList(layers[:count]))):
        yield count


@contextmanager
def replaced(*changes: tuple[object, str, object]) -> Iterator[None]:
    """Attributes with other values while it lasts, (owner, name, value) each; put back afterwards, the last first."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(before):
            setattr(owner, name, value)

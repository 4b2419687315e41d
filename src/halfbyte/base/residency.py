"""What an open model holds, compared with what the policy and the checkpoint say; and modules that stay in fp32.

The same questions are asked of the empty model, before anything is built for it.
"""

import torch
from torch import nn
from transformers.quantizers.base import get_keys_to_not_convert

from halfbyte.errors import BaseModelError
from halfbyte.models import structure
from halfbyte.models.sources.checkpoint import Checkpoint
from halfbyte.quant import bnb as codec
from halfbyte.quant import formats
from halfbyte.quant.policy import matches
from halfbyte.quant.stack import ExpertStack
from halfbyte.recipe.schema import Quant
from halfbyte.types import Config, Document, Model

# Resident bytes may exceed what the specs say by this share before it is an error: scales of odd sizes, padding.
RESIDENT_TOLERANCE = 0.02


def check_resident(model: Model, quant: Quant, resident: int, expected: int, name: str) -> None:
    """Compare what is in memory with what the policy says. Raises BaseModelError: matrices that the policy quantises
    stayed in 16 bits (fused experts), naming the largest."""
    if not quant.quantises:
        return
    stayed = [] if quant.in_file else big_unquantised(model, quant)  # a file may have any of them in 16 bits
    stayed_bytes = sum(p.nbytes for _, p in stayed)
    too_large = expected > 0 and resident > expected * (1 + RESIDENT_TOLERANCE) + 1e6
    if stayed_bytes > resident * RESIDENT_TOLERANCE or (too_large and stayed):
        names = sorted(stayed, key=lambda item: -item[1].numel())[:3]
        listed = ", ".join(f"{n} {tuple(p.shape)}" for n, p in names)
        kind = "expert tensors of a layout not known here" if any(p.ndim == 3 for _, p in stayed) else "matrices"
        leaf = names[0][0].rsplit(".", 1)[0].rsplit(".", 1)[-1]
        raise BaseModelError(
            f"{name}: {len(stayed)} {kind} stayed in {8 * stayed[0][1].element_size()} bits, "
            f"{stayed_bytes / 1e9:.3f} of {resident / 1e9:.3f} GB resident where quant.type {quant.type} gives "
            f"{expected / 1e9:.3f} GB. The largest: {listed}.",
            fix=f"this build cannot quantise them; to accept 16 bits: --set 'quant.skip_modules=[{leaf}]'",
        )
    if too_large:
        raise BaseModelError(
            f"{name}: {resident / 1e9:.3f} GB are resident, the checkpoint's tensors under quant.type {quant.type} "
            f"give {expected / 1e9:.3f} GB.",
            fix="name the modules you want unquantised in `quant.skip_modules`, so that the plan counts them",
        )


def check_scales(model: Model, name: str) -> None:
    """Refuse a checkpoint whose config says that it is quantised, where weights came without scales (BaseModelError):
    floats would have been cut to whole numbers without a word."""
    without = [path for path, module in codec.quantised_linears(model) if not formats.is_quantised(module)]
    if without:
        listed = f"{', '.join(without[:3])}{', ...' if len(without) > 3 else ''}"
        raise BaseModelError(
            f"{name}: config.json says that the weights are quantised, but {len(without)} matrices have no scales: "
            f"{listed}.",
            fix="remove `quantization_config` from config.json if the weights are in 16 bits, or download them again",
        )


def big_unquantised(model: Model, quant: Quant) -> list[tuple[str, nn.Parameter]]:
    """Weight matrices that are neither quantised, nor an embedding or head, nor exempted by the recipe. Small ones
    (routers: under 1/1000 of the model's parameters each) and convolutions of one channel each are not meant."""
    exempt = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    exempt |= {id(m.weight) for _, m in codec.quantised_linears(model) if m.weight.is_meta}  # still to be filled
    exempt.add(id(getattr(model.get_output_embeddings(), "weight", None)))
    skipped = getattr(getattr(model, "hf_quantizer", None), "modules_to_not_convert", None) or ()
    in_fp32 = getattr(model, "_keep_in_fp32_modules", None) or ()
    total = sum(p.numel() for p in model.parameters())
    return [
        (name, p)
        for name, p in model.named_parameters()
        if p.ndim >= 2
        and p.is_floating_point()
        and not isinstance(p, ExpertStack)
        and id(p) not in exempt
        and not (p.ndim == 3 and p.shape[1] == 1)
        and p.numel() * 1000 > total
        and not name.endswith("_bias")  # one row for each expert
        and not matches(name, (*quant.exempt, *skipped, *in_fp32))
        and not structure.of_head(model, name)
    ]


def keep_fp32(model: Model, patterns: tuple[str, ...], compute_dtype: torch.dtype) -> None:
    """Hold the named modules in fp32 and convert at their border, so that the residual stream keeps its dtype."""
    for module in named_fp32(model, patterns):
        module.float()
        computes_in_fp32(module, None if module is model.get_output_embeddings() else compute_dtype)


def computes_in_fp32(module: nn.Module, back_to: torch.dtype | None) -> None:
    """Cast what goes into a module to fp32, and what comes out to `back_to`."""
    module.register_forward_pre_hook(
        lambda _, args, kwargs: (_cast(args, torch.float32), _cast(kwargs, torch.float32)), with_kwargs=True
    )
    if back_to not in (None, torch.float32):
        module.register_forward_hook(lambda _module, _args, output: _cast(output, back_to))


def _cast(value: object, dtype: torch.dtype | None) -> object:
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return type(value)(_cast(each, dtype) for each in value)
    return {k: _cast(each, dtype) for k, each in value.items()} if type(value) is dict else value


def named_fp32(model: Model, patterns: tuple[str, ...]) -> list[nn.Module]:
    """The modules with parameters of their own that the recipe wants in fp32."""
    if not patterns:
        return []
    chosen = [
        module
        for name, module in model.named_modules()
        if matches(name, patterns) and next(module.parameters(recurse=False), None) is not None
    ]
    if not chosen:
        raise BaseModelError(
            f"quant.fp32_modules {list(patterns)} name no module of {type(model).__name__}.",
            fix="use module names as in `model.named_modules()`, such as `norm` or `input_layernorm`",
        )
    return chosen


def heads_to_skip(config: Config, quant: Quant) -> tuple[str, ...]:
    """The output head's names, where the recipe names modules of its own to be left unquantised."""
    empty = structure.meta_model(config) if quant.exempt or structure.is_encoder(config) else None
    if empty is not None and structure.is_encoder(config):  # beside the head what stands before it
        heads = (name.rpartition(".")[0] for name, _ in empty.named_parameters() if structure.of_head(empty, name))
        return tuple(dict.fromkeys(heads))
    return () if empty is None else tuple(get_keys_to_not_convert(empty))


def check_complete(model: Model, info: Document, checkpoint: Checkpoint, quant: Quant) -> None:
    """Refuse a model that would have random weights, or lacks a module that the recipe skips (BaseModelError). `info`:
    what transformers says of the load."""
    missing = sorted(name for name in info.get("missing_keys", ()) if not structure.of_head(model, name))
    mismatched = sorted(
        f"{name} is {tuple(there)}, not {tuple(needed)}" for name, there, needed in info.get("mismatched_keys", ())
    )
    if missing or mismatched:
        problem = "has not the shape of" if mismatched else "lacks"
        wrong = mismatched or missing
        raise BaseModelError(
            f"{checkpoint.id} {problem} {len(wrong)} of the weights that {type(model).__name__} needs: "
            f"{', '.join(wrong[:5])}{', ...' if len(wrong) > 5 else ''}. They would be random numbers.",
            fix="download the checkpoint again, or check that config.json belongs to it",
        )
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    absent = [pattern for pattern in quant.skip_modules if not any(matches(name, (pattern,)) for name in names)]
    if absent:
        raise BaseModelError(
            f"quant.skip_modules {absent} name no module of {type(model).__name__}.",
            fix="use module names as in `model.named_modules()`, such as `lm_head` or `mlp.down_proj`",
        )

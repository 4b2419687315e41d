"""What a module computes, seen on the module: which formula a norm has, an activation, an MLP.

Why: architectures share formulas under many names, and have other formulas under the same names.
How: an instance of its class is made, or its forward called on plain functions, and computes a few numbers; once a
class.
Cost: under a millisecond a class.
"""

import re
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halfbyte.layers import norm_gate
from halfbyte.layers.instances import cached, plain_class

_NORMS, _ACTIVATIONS = re.compile("Norm(1P)?$"), re.compile("gelu|silu|relusq", re.IGNORECASE)
_KINDS = norm_gate.SILU, norm_gate.GELU_TANH, norm_gate.GELU, norm_gate.RELU2
_CLOSE = 2e-6  # fp32 numbers of at most 6, sums of 64


def norm_of(norm: nn.Module) -> tuple[float, norm_gate.NormKind, Tensor | None] | None:
    """(eps, which formula it computes, its bias) of a norm over a vector; None for anything else."""
    weight = getattr(norm, "weight", None)
    if not _NORMS.search(type(norm).__name__) or weight is None or weight.dim() != 1:
        return None
    kind = _norm_kind(plain_class(type(norm)))
    eps = float(getattr(norm, "variance_epsilon", 0.0) or getattr(norm, "eps", 0.0))
    return None if kind is None else (eps, kind, getattr(norm, "bias", None))


@cached
def _norm_kind(cls: type[nn.Module]) -> norm_gate.NormKind | None:
    """Which formula a norm class computes, seen on random numbers; None for another."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 64, generator=generator)
    try:
        norm = cls(64, eps=1e-5)
        for p in norm.parameters():
            p.data = torch.rand(64, generator=generator)
        y = norm(x)
    except Exception:  # of any kind: another constructor than a plain norm's; it stays as it is
        return None
    for kind in (norm_gate.NormKind(one_plus, centred) for centred in (False, True) for one_plus in (False, True)):
        z = norm_gate.norm_formula(x, norm.weight, 1e-5, kind, getattr(norm, "bias", None))
        if torch.allclose(y, z, atol=_CLOSE):
            return kind
    return None


def activation_kind(module: nn.Module) -> int | None:
    """Which activation of `norm_gate` a module is; None for anything else."""
    if not _ACTIVATIONS.search(type(module).__name__) or any(True for _ in module.children()):
        return None
    return _activation_kind(plain_class(type(module)), str(getattr(module, "approximate", "")))


@cached
def _activation_kind(cls: type[nn.Module], approximate: str) -> int | None:
    """Which activation a class computes, seen on some numbers; None for another."""
    x = torch.linspace(-6, 6, 97)
    try:
        y = cls(approximate=approximate)(x) if approximate else cls()(x)
    except Exception:  # of any kind: no activation that can be made like this
        return None
    return next((k for k in _KINDS if torch.allclose(y, norm_gate.activation_formula(x, k), atol=_CLOSE)), None)


@dataclass(frozen=True)
class GatedMlp:
    """out_scale down(act(scale gate(x)) * up(x)). inputs: gate and up, or one layer with both side by side."""

    inputs: list[nn.Module]
    down: nn.Module
    activation: int
    scale: float = 1.0
    out_scale: float = 1.0


# Names of gate, up and down; of both in one, and down.
_GATED = (
    ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("gate_up_proj", "down_proj"),
    ("input_linear", "output_linear"), ("Wi", "Wo"),
)  # fmt: skip
_ACTIVATION_NAMES = "act_fn", "activation_fn", "activation", "act"
_SCALES = "gate_multiplier", "down_multiplier"


def gated_mlp(mlp: nn.Module) -> GatedMlp | None:
    """What an MLP with a gate is made of; None for anything else, also where it drops some of the inner product."""
    parts = {name: part for name, part in mlp.named_children() if not isinstance(part, nn.Dropout)}
    if any(isinstance(part, nn.Dropout) and part.p and part.training for part in mlp.children()):
        return None
    acts = [name for name in _ACTIVATION_NAMES if name in parts]
    names = next((some for some in _GATED if set(some) == set(parts) - set(acts)), None)
    if names is None or len(acts) > 1:
        return None
    kind = activation_kind(parts[acts[0]]) if acts else norm_gate.SILU
    scales = [float(getattr(mlp, name, 1.0)) for name in _SCALES]
    scaled = any(hasattr(mlp, name) for name in _SCALES)
    if kind is None or kind not in norm_gate.GATES or not _is_gated(plain_class(type(mlp)), names, scaled):
        return None
    *inputs, down = (parts[name] for name in names)
    return GatedMlp(inputs, down, kind, *scales)


@cached
def _is_gated(cls: type[nn.Module], names: tuple[str, ...], scaled: bool) -> bool:
    """Whether a class computes it, seen on random numbers; with SiLU, which those without an activation have."""
    generator = torch.Generator().manual_seed(0)
    x, gate, up, down = torch.randn(4, 8, 8, generator=generator)
    weights = (gate, up, down) if len(names) == 3 else (torch.cat((gate, up)), down)
    linears = {name: partial(F.linear, weight=w) for name, w in zip(names, weights, strict=True)}
    scale, out_scale = (0.5, 3.0) if scaled else (1.0, 1.0)
    scales = dict(zip(_SCALES, (scale, out_scale), strict=True))
    known = SimpleNamespace(**linears, **scales, **dict.fromkeys(_ACTIVATION_NAMES, F.silu), drop=nn.Identity())
    try:
        y = cls.forward(known, x)
    except Exception:  # of any kind: it needs more than these
        return False
    wanted = out_scale * F.linear(F.silu(scale * F.linear(x, gate)) * F.linear(x, up), down)
    return isinstance(y, Tensor) and torch.allclose(y, wanted, rtol=1e-5, atol=1e-5)

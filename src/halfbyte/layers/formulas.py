"""What a module computes, seen on the module: which formula a norm has, which one an activation.

Why: architectures share formulas under many names, and have other formulas under the same names.
How: an instance of its class is made, and computes a few numbers; once a class.
Cost: under a millisecond a class.
"""

import re

import torch
from torch import Tensor, nn

from halfbyte.layers import norm_gate
from halfbyte.layers.instances import cached, plain_class
from halfbyte.layers.norm_gate import NormKind

_NORMS, _ACTIVATIONS = re.compile("Norm(1P)?$"), re.compile("gelu|silu|relusq", re.IGNORECASE)
_KINDS = norm_gate.SILU, norm_gate.GELU_TANH, norm_gate.GELU, norm_gate.RELU2
_CLOSE = 2e-6  # fp32 numbers of at most 6, sums of 64


def norm_of(norm: nn.Module) -> tuple[float, NormKind, Tensor | None] | None:
    """(eps, which formula it computes, its bias) of a norm over a vector; None for anything else."""
    weight = getattr(norm, "weight", None)
    if not _NORMS.search(type(norm).__name__) or weight is None or weight.dim() != 1:
        return None
    kind = _norm_kind(plain_class(type(norm)))
    eps = float(getattr(norm, "variance_epsilon", 0.0) or getattr(norm, "eps", 0.0))
    return None if kind is None else (eps, kind, getattr(norm, "bias", None))


@cached
def _norm_kind(cls: type[nn.Module]) -> NormKind | None:
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
    for kind in (NormKind(one_plus, centred) for centred in (False, True) for one_plus in (False, True)):
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


def activation_of(mlp: nn.Module) -> str:
    config = getattr(mlp, "config", None)
    return str(getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None))

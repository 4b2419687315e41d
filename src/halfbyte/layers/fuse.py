"""Put the fused layers on a model, and take them off: linears with and without LoRA, norms, gated MLPs, attention,
trained rows of an embedding.

What: an instance gets a subclass of its own class, whose forward takes the fast path where it may and is the class's
own forward where it may not. No state is added: names in state dicts, PEFT's isinstance checks, saving, merging and
unloading stay as they were, and `remove` puts the classes back.
Why by instance: classes of transformers, peft and bitsandbytes are never assigned to; another model in the same process
is not touched. A norm or an MLP is taken only after it was seen to compute what the fused formula computes.
Source: PEFT's own way of adding to a module (`peft/tuners/lora/`); torch documents `__class__` for parametrizations.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn

from halfbyte.errors import AdapterError
from halfbyte.layers import attention, norm_gate, sight
from halfbyte.layers.experts import interface
from halfbyte.layers.experts.layout import is_quantised
from halfbyte.layers.kernels import dropout, last_layer
from halfbyte.layers.kernels.card import PackLengths
from halfbyte.layers.kernels.cpu import available, whole_attention
from halfbyte.layers.lora_linear import REMAKE, Remake, frozen_linear, lora_linear
from halfbyte.layers.packed_attention import LENGTHS
from halfbyte.models import families
from halfbyte.quant import formats
from halfbyte.upstream.peft import LORA_LAYER
from halfbyte.upstream.transformers import CACHE_ARGUMENTS

ADAPTERS_DISABLED, NO_ADAPTER = "adapters disabled", "no active adapter"

_cached: Any = cache  # mypy takes a class as a key for unhashable


@dataclass(frozen=True)
class Fused:
    """What `install` did: how many modules of each kind run fused, and why some LoRA layers do not."""

    counts: dict[str, int]
    unfused: dict[str, int]

    def __str__(self) -> str:
        done = ", ".join(f"{count} {kind}" for kind, count in self.counts.items()) or "nothing"
        left = ", ".join(f"{count} by PEFT's own forward ({why})" for why, count in self.unfused.items())
        return done + (f"; {left}" if left else "")


class _Fast:
    """Marks an instance whose class was put here by `install`; its own class is the second base."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

        def forward(self, *args: Any, **kwargs: Any) -> Any: ...

        def merge(self, *args: object, **kwargs: object) -> None: ...


class _FastFrozenLinear(_Fast):
    """A quantised linear layer without LoRA."""

    def forward(self, x: Tensor) -> Tensor:
        if not _computes(self, x):
            return super().forward(x)
        return frozen_linear(x, self)


class _FastLoraLinear(_Fast):
    """PEFT's LoRA layer over a frozen linear layer, when one plain adapter is active."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        base, why = self.base_layer, unfused_reason(self)
        alone = why == ADAPTERS_DISABLED and not self.merged
        if args or kwargs or (why and not alone) or not _computes(base, x):
            return super().forward(x, *args, **kwargs)
        if alone:  # a reference model is computed as its policy is
            return frozen_linear(x, base, bias_after=True)
        (name,) = self.active_adapters
        if name not in self.lora_A:
            return frozen_linear(x, base)
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        dropout = self.lora_dropout[name]
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        return lora_linear(x, base, a, b, self.scaling[name], p)


class _FastLoraExperts(_Fast):
    """PEFT's LoRA on a stack of experts; several of them are nested, and the outer one gives all to our function."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        base, wrappers = self.get_base_layer(), interface.wrappers_of(self)
        reasons = {unfused_reason(wrapper) for wrapper in wrappers} - {""}
        if interface.takes_lora(base) and not reasons:
            kwargs["loras"] = dict(filter(None, map(interface.lora_of, wrappers)))
        elif not is_quantised(base):  # a quantised stack is none that PEFT's own forward could add to
            return super().forward(x, *args, **kwargs)
        elif reasons - {ADAPTERS_DISABLED, NO_ADAPTER}:
            raise AdapterError(f"LoRA on quantised experts: {', '.join(sorted(reasons))}: this cannot be computed.")
        return base(x, *args, **kwargs)

    def merge(self, *args: object, **kwargs: object) -> None:
        if is_quantised(self.get_base_layer()):
            raise AdapterError(
                "adapters cannot be merged into quantised experts.",
                fix="load the adapter on the 16-bit base, and merge",
            )
        super().merge(*args, **kwargs)


class _TokenRows(_Fast):
    """PEFT's layer over a frozen embedding, or the head tied to it, of which some rows train. Its own forward makes all
    of the matrix anew, and backward a gradient of all of it: 0.34 GB each for 262,144 tokens of 640 numbers."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        base, rows = self.base_layer, trained_rows(self)
        if args or kwargs or rows is None:
            return super().forward(x, *args, **kwargs)
        indices, values = rows
        y: Tensor = base(x)
        if isinstance(base, nn.Linear):
            columns = x @ values.to(x.dtype).T  # (.., D) @ (D, R) -> (.., R)
            return y.index_copy(-1, indices, columns) if columns.requires_grad else y.index_copy_(-1, indices, columns)
        indices, order = indices.sort()
        slots = torch.searchsorted(indices, x).clamp_(max=len(indices) - 1)
        here = indices[slots] == x
        padding = (indices == -1 if base.padding_idx is None else indices == base.padding_idx).nonzero().flatten()
        only = int(padding) if len(padding) else None  # its row has no gradient
        trained = nn.functional.embedding(slots[here], values.to(y.dtype)[order], only)
        scale = self._get_embed_scale()
        return y.index_put((here,), trained if scale is None else trained * scale.to(trained.dtype))


def trained_rows(layer: nn.Module) -> tuple[Tensor, Tensor] | None:
    """(which rows of the matrix train (R,), what stands in their place (R, D)) of PEFT's layer; None where it has to
    run its own forward: merged, switched off, of several adapters, or on a layer that is not plain."""
    base, names = layer.base_layer, [n for n in layer.active_adapters if n in layer.trainable_tokens_delta]
    plain = isinstance(base, nn.Embedding) and base.max_norm is None and not base.scale_grad_by_freq
    if not plain and not (type(base) is nn.Linear and base.bias is None):
        return None
    if len(names) != 1 or layer.disable_adapters or layer.merged or base.weight.requires_grad:
        return None
    indices, values = layer.token_indices[names[0]], layer.trainable_tokens_delta[names[0]]
    return torch.tensor(indices, device=values.device), values


class _FastRmsNorm(_Fast):
    """An RMS norm with a frozen weight, of llama's or gemma's kind."""

    def forward(self, x: Tensor) -> Tensor:
        return self.beside(x)[1] if self.takes(x) else super().forward(x)

    def takes(self, x: Tensor) -> bool:
        """Whether the kernel computes what this norm does to x."""
        return not self.weight.requires_grad and x.dtype == self.weight.dtype and available(x)

    def beside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(x, its norm) for what it `takes`; for a sum with x behind the norm."""
        eps, one_plus = rms_norm_kind(self)
        weight, given = self.weight, x.detach()
        residual, y = norm_gate.residual_and_norm(x, weight, eps, one_plus=bool(one_plus))
        return residual, _cheap(self, y, lambda: norm_gate.rms_norm(given, weight, eps, one_plus=bool(one_plus)))


class _FastGatedMlp(_Fast):
    """down(act(gate(x)) * up(x))."""

    def forward(self, x: Tensor) -> Tensor:
        if not available(x):
            return super().forward(x)
        g, u = self.gate_proj(x), self.up_proj(x)
        kind, inputs = norm_gate.ACTIVATIONS[activation_of(self)], (g.detach(), u.detach())
        h = norm_gate.glu(g, u, kind)
        return self.down_proj(_cheap(self, h, lambda: norm_gate.glu(*inputs, kind)))


class _FastAttention(_Fast):
    """Llama's attention block on a pack: projections, norms of q and k if any, rotary and attention in one."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        *args: object,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        pack = None if args else _pack_lengths(self, hidden_states, position_embeddings, kwargs)
        if pack is None:
            return super().forward(hidden_states, position_embeddings, attention_mask, *args, **kwargs)
        tokens, d = hidden_states.shape[1], self.head_dim
        q, k, v = (p(hidden_states).view(tokens, -1, d) for p in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = (x[0] for x in position_embeddings)  # (T, R)
        out = attention.attention(q, k, v, pack.lengths, self.scaling, cos, sin, pack.levels).view(1, tokens, -1)
        some = last_layer.rows_for(self)
        if some is None:
            return self.o_proj(out), None
        with dropout.select_tokens(some.rows):
            return self.o_proj(some.select(out)), None


class DecoderLayer(_Fast):
    """A layer of two halves, each x + f(norm(x)): its sums in memory of the pool, the norms' gradients added with them,
    and behind the attention only the rows that are needed."""

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: Any) -> Any:
        norms = self.input_layernorm, self.post_attention_layernorm
        if args or not _trains(self) or not all(_runs_fused(norm, hidden_states) for norm in norms):
            return super().forward(hidden_states, *args, **kwargs)
        some = last_layer.rows_for(self)
        if some is not None:
            some.selected = True
        residual, x = norms[0].beside(hidden_states)
        x = self.self_attn(hidden_states=x, **kwargs)[0]
        if some is None:
            return self._second_half(residual, x)
        with dropout.select_tokens(some.rows):
            return self._second_half(some.select(residual), x if x.shape[1] == some.count else some.select(x))

    def _second_half(self, residual: Tensor, x: Tensor) -> Tensor:
        residual, x = self.post_attention_layernorm.beside(norm_gate.residual_sum(residual, x))
        return norm_gate.residual_sum(residual, self.mlp(x))


def _runs_fused(norm: nn.Module, x: Tensor) -> bool:
    """Whether this norm can be computed without its call, which hooks would see."""
    hooked = norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks
    return isinstance(norm, _FastRmsNorm) and not hooked and norm.takes(x)


def install(model: nn.Module) -> Fused:
    """Make every module that can be run fused do so. Calling it again changes nothing but the counts."""
    counts: Counter[str] = Counter()
    unfused: Counter[str] = Counter()
    inside = {id(m.base_layer) for m in model.modules() if isinstance(m, LoraLayer)}
    for module in list(model.modules()):
        if isinstance(module, LoraLayer) and interface.is_lora_of_experts(module):
            counts["LoRA experts"] += 1
            _become(module, _FastLoraExperts)
        elif isinstance(module, LoraLayer):
            layer = module.base_layer
            linear = formats.is_quantised(layer) or (type(layer) is nn.Linear and not layer.weight.requires_grad)
            if not hasattr(module, "parameter_name") and linear:
                reason = unfused_reason(module)
                unfused.update([reason] if reason else [])
                counts["LoRA linears"] += not reason
                _become(module, _FastLoraLinear)
        elif formats.is_quantised(module) and id(module) not in inside:
            counts["frozen linears"] += 1
            _become(module, _FastFrozenLinear)
        elif isinstance(module, TrainableTokensLayer):
            counts["trained rows"] += 1
            _become(module, _TokenRows)
        elif _is_rms_norm(module):
            counts["norms"] += 1
            _become(module, _FastRmsNorm)
        elif (part := _part(module)) is not None:
            counts[part[0]] += 1
            _become(module, part[1])
    if experts := interface.install(model):
        counts["experts"] = experts
    return Fused(dict(counts), dict(unfused))


def frozen_layers(model: nn.Module) -> list[nn.Module]:
    """The frozen linear layers that run fused now, with LoRA or without."""
    adapted = [m.base_layer for m in model.modules() if isinstance(m, _FastLoraLinear) and not unfused_reason(m)]
    return [*adapted, *(m for m in model.modules() if isinstance(m, _FastFrozenLinear))]


def install_quantised_experts(model: nn.Module) -> None:
    """What cannot be left as it is: PEFT's own forward has nothing to add to where experts are quantised."""
    experts = [m for m in model.modules() if interface.is_lora_of_experts(m) and is_quantised(m.get_base_layer())]
    for module in experts:
        _become(module, _FastLoraExperts)
    if experts:
        interface.install(model)


def remove(model: nn.Module) -> int:
    """Give every module its own class back, and experts their own code. Returns how many had another. LoRA on quantised
    experts keeps ours, as PEFT's has nothing to add to; it is computed by definition then."""
    fast = [m for m in model.modules() if isinstance(m, _Fast)]
    fast = [m for m in fast if not (isinstance(m, _FastLoraExperts) and is_quantised(m.get_base_layer()))]
    for module in fast:
        module.__class__ = type(module).__bases__[1]
        module.__dict__.pop("_halfbyte_cheap", None)
    return len(fast) + interface.remove(model)


def recompute_cheap(model: nn.Module, *, on: bool) -> None:
    """Selective recomputation: outputs of norms and the gated MLP's inner product are made again in backward, not kept.
    They cost a pass over memory each; outputs of matrix products stay. Only what an adapter reads is kept otherwise."""
    for module in model.modules():
        if isinstance(module, (_FastRmsNorm, _FastGatedMlp)):
            module.__dict__["_halfbyte_cheap"] = on


def _cheap(module: nn.Module, y: Tensor, make: Callable[[], Tensor]) -> Tensor:
    if module.__dict__.get("_halfbyte_cheap") and torch.is_grad_enabled():
        setattr(y, REMAKE, Remake(make))
    return y


def is_lora(module: nn.Module) -> bool:
    return isinstance(module, LoraLayer)


def unfused_reason(layer: nn.Module) -> str:
    """Why this LoRA layer must run PEFT's own forward now; empty if it need not."""
    if not LORA_LAYER.there:
        return LORA_LAYER.reason
    if layer.disable_adapters:
        return ADAPTERS_DISABLED
    if layer.merged:
        return "merged"
    names = [n for n in layer.active_adapters if n in layer.lora_A]
    if len(layer.active_adapters) != 1:
        return "several adapters" if layer.active_adapters else NO_ADAPTER
    return not_plain(layer, names)


def not_plain(layer: nn.Module, names: list[str]) -> str:
    """What these adapters of a LoRA layer do beside the plain sum; empty if nothing."""
    if any(n in getattr(layer, "lora_variant", {}) for n in names):
        return "DoRA or another variant"
    if any(getattr(layer, "lora_bias", {}).get(n) for n in names):
        return "lora_bias"
    if any(not isinstance(layer.lora_dropout[n], (nn.Dropout, nn.Identity)) for n in names):
        return "its dropout"
    return ""


def _become(module: nn.Module, mixin: type) -> None:
    if not isinstance(module, _Fast):
        module.__class__ = subclass(mixin, type(module))


@_cached
def subclass(mixin: type, cls: type) -> type:
    """`cls` with the mixin's forward. Named alike, since PEFT and transformers look for words in class names."""
    return type(cls.__name__, (mixin, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def _trains(module: nn.Module) -> bool:
    """Whether this forward is one of a training: also one without gradients, as of DPO's reference, whose numbers are
    compared with the policy's."""
    return torch.is_grad_enabled() or module.training


def _computes(layer: nn.Module, x: Tensor) -> bool:
    """Whether `layer` multiplies in x's own dtype, so that no cast is left out. Single tokens stay upstream, where
    upstream dequantises rightly."""
    if not isinstance(x, Tensor):
        return False
    few = not torch.is_grad_enabled() and x.numel() < 8 * x.shape[-1]
    number_format = formats.of_module(layer)
    if few and number_format.upstream_is_right(layer):
        return False
    return number_format.multiplies_in(layer, x.dtype)


def _is_rms_norm(module: nn.Module) -> bool:
    if isinstance(module, _FastRmsNorm):
        return True
    if not type(module).__name__.endswith("RMSNorm") or getattr(module, "weight", None) is None:
        return False
    return module.weight.dim() == 1 and not module.weight.requires_grad and is_one_plus(type(module)) is not None


def rms_norm_kind(norm: nn.Module) -> tuple[float, bool | None]:
    """Its eps, and which formula it computes: (1 + w), w, or neither (None)."""
    return float(getattr(norm, "variance_epsilon", 0.0) or getattr(norm, "eps", 0.0)), is_one_plus(type(norm))


@_cached
def is_one_plus(cls: type[nn.Module]) -> bool | None:
    """Which formula a norm class computes, seen on random numbers: (1 + w), w, or neither (None)."""
    if issubclass(cls, _Fast):
        return is_one_plus(cls.__bases__[1])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 64, generator=generator)
    try:
        norm = cls(64, eps=1e-5)
        norm.weight.data = torch.rand(64, generator=generator)
        y = norm(x)
    except Exception:  # of any kind: another constructor than a plain norm's; it stays as it is
        return None
    for one_plus in (False, True):
        if torch.allclose(y, norm_gate.rms_norm_formula(x, norm.weight, 1e-5, one_plus=one_plus), atol=1e-6):
            return one_plus
    return None


def activation_of(mlp: nn.Module) -> str:
    config = getattr(mlp, "config", None)
    return str(getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None))


def _part(module: nn.Module) -> tuple[str, type[_Fast]] | None:
    """What this part of a layer is counted as, and the forward that takes its place; by its class's name, which a
    subclass of ours keeps, and of an MLP by what it is made of."""
    part = families.fused_part(type(module).__name__)
    if part == "mlp":
        parts = {name for name, _ in module.named_children()}
        if parts != families.GATED_MLP_PARTS or activation_of(module) not in norm_gate.ACTIVATIONS:
            return None
        return "gated MLPs", _FastGatedMlp
    if part is None:
        return None
    return ("attentions", _FastAttention) if part == "attention" else ("layers", DecoderLayer)


def _pack_lengths(module: nn.Module, x: Tensor, positions: Any, kwargs: dict[str, Any]) -> PackLengths | None:
    """The lengths of the examples in x (1, T, D) if the fused attention may take them; None if not."""
    cu = kwargs.get("cu_seq_lens_q")
    if x.dim() != 3 or x.shape[0] != 1 or positions is None or not available(x):
        return None
    if cu is None or any(kwargs.get(name) is not None for name in CACHE_ARGUMENTS):
        return None
    if not _trains(module) or (module.training and module.attention_dropout):
        return None
    pack: PackLengths = kwargs.get(LENGTHS) or PackLengths(tuple(cu.diff().tolist()))
    seen = sight.of(module)
    if seen is None or not seen.is_causal(pack.longest) or (pack.levels and not whole_attention(x)):
        return None
    if getattr(module, "attn_logit_softcapping", None) is not None or module.head_dim % 2:
        return None
    return pack

"""Put the fused layers on a model, and take them off: linears with and without LoRA, norms, gated MLPs, attention,
trained rows of an embedding.

What: an instance gets a subclass of its own class, whose forward takes the fast path where it may and is the class's
own forward where it may not. No state is added: names in state dicts, PEFT's isinstance checks, saving, merging and
unloading stay as they were, and `remove` puts the classes back.
A norm, an activation or an MLP is taken only after it was seen to compute what the fused formula computes.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn

from halfbyte.errors import AdapterError
from halfbyte.layers import attention, formulas, instances, norm_gate, shared_input
from halfbyte.layers.experts import interface
from halfbyte.layers.experts.layout import is_quantised
from halfbyte.layers.kernels import dropout, last_layer
from halfbyte.layers.kernels.cpu import available
from halfbyte.layers.lora_linear import REMAKE, Remake, frozen_linear, lora_linear
from halfbyte.layers.packed_attention import head_size, lengths_for
from halfbyte.models import families, structure
from halfbyte.quant import formats
from halfbyte.upstream.peft import LORA_LAYER

ADAPTERS_DISABLED, NO_ADAPTER = "adapters disabled", "no active adapter"


@dataclass(frozen=True)
class Fused:
    """What `install` did: how many modules of each kind run fused, and why some LoRA layers do not."""

    counts: dict[str, int]
    unfused: dict[str, int]

    def __str__(self) -> str:
        done = ", ".join(f"{count} {kind}" for kind, count in self.counts.items()) or "nothing"
        left = ", ".join(f"{count} by PEFT's own forward ({why})" for why, count in self.unfused.items())
        return done + (f"; {left}" if left else "")


class _Fast(instances.Instance):
    """Marks an instance whose class was put here by `install`."""

    if TYPE_CHECKING:

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
        uncalled = base, *(m for part in (self.lora_A, self.lora_B, self.lora_dropout) for m in part.values())
        slow = args or kwargs or (why and not alone) or not _computes(base, x)
        if slow or any(instances.is_hooked(m, known="is_cast") for m in uncalled):
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


class _FastNorm(_Fast):
    """A norm with frozen weights: RMS norm of llama's or gemma's kind, layer norm."""

    def forward(self, x: Tensor) -> Tensor:
        return self.beside(x)[1] if self.takes(x) else super().forward(x)

    def takes(self, x: Tensor) -> bool:
        """Whether the kernel computes what this norm does to x."""
        frozen = not any(p.requires_grad for p in self.parameters(recurse=False))
        return frozen and x.dtype == self.weight.dtype and available(x)

    def beside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(x, its norm) for what it `takes`; for a sum with x behind the norm."""
        formula, given = formulas.norm_of(self), x.detach()
        assert formula is not None
        residual, y = norm_gate.residual_and_norm(x, self.weight, *formula)
        return residual, _cheap(self, y, lambda: norm_gate.norm(given, self.weight, *formula))


class _FastGatedMlp(_Fast):
    """down(act(gate(x)) * up(x)), also with both in one linear layer, and with factors."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.takes(x):
            return super().forward(x)
        y, factor = self.unscaled(x)
        return y if factor == 1.0 else y * factor

    def takes(self, x: Tensor) -> bool:
        """Whether x is computed here; not where an activation has hooks, as it is not called, or is another by now."""
        plain = not any(instances.is_hooked(m) for m in self.children() if not isinstance(m, (nn.Linear, LoraLayer)))
        return plain and available(x) and formulas.gated_mlp(self) is not None

    def unscaled(self, x: Tensor) -> tuple[Tensor, float]:
        """What it returns, and what that has to be multiplied with; for what it `takes`."""
        known = formulas.gated_mlp(self)
        assert known is not None
        given = shared_input.read(x, known.inputs)
        inputs, how = [each.detach() for each in given], (known.activation, known.scale)
        y: Tensor = known.down(_cheap(self, norm_gate.glu(given, *how), lambda: norm_gate.glu(inputs, *how)))
        return y, known.out_scale


class _FastActivation(_Fast):
    """An activation without weights."""

    def forward(self, x: Tensor) -> Tensor:
        kind = formulas.activation_kind(self)
        if kind is None or not available(x) or not x.is_contiguous():  # a copy would be kept
            return super().forward(x)
        given = x.detach()
        return _cheap(self, norm_gate.activation(x, kind), lambda: norm_gate.activation(given, kind))


class _FastDropout(_Fast):
    """A model's own dropout: a hash of each token, where torch draws and keeps a mask."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p or not available(x) or x.shape[-1] % 2:
            return super().forward(x)
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        return norm_gate.Dropout.apply(flat, self.p, dropout.some_seed(self, flat)).view(x.shape)


class _FastAttention(_Fast):
    """Llama's attention block on a pack: projections, norms of q and k if any, rotary and attention in one; and those
    that differ in names, in a projection for all three, or in norms over all heads."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        known = None if args or not computes_as_trained(self) else lengths_for(self, hidden_states, kwargs)
        if known is None:
            return super().forward(hidden_states, *args, **kwargs)
        (pack, reach), tokens = known, hidden_states.shape[1]
        q, k, v = self._heads(hidden_states)
        cos, sin = (x[0] for x in kwargs["position_embeddings"])  # (T, R)
        scale = getattr(self, "scaling", head_size(self) ** -0.5) * getattr(self, "key_multiplier", 1.0)  # Falcon-H1's
        out = attention.attention(q, k, v, pack.lengths, scale, cos, sin, pack.levels, reach=reach)
        out, some = out.view(1, tokens, -1), last_layer.rows_for(self)
        project = instances.part_of(self, ("o_proj", "dense", "Wo"))
        assert project is not None
        if some is None:
            return project(out), None
        with dropout.select_tokens(some.rows):
            return project(some.select(out)), None

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(1, T, D) -> queries, keys and values, (T, heads, d) each."""
        d = head_size(self)
        if hasattr(self, "query_key_value"):  # head by head
            return self.query_key_value(x).squeeze(0).unflatten(-1, (-1, 3, d)).unbind(2)
        if hasattr(self, "Wqkv"):
            return self.Wqkv(x).squeeze(0).unflatten(-1, (3, -1, d)).unbind(1)
        q, k, v = (y.squeeze(0) for y in shared_input.read(x, (self.q_proj, self.k_proj, self.v_proj)))
        if hasattr(self, "q_norm") and len(self.q_norm.weight) == q.shape[1] != d:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (each.view(x.shape[1], -1, d) for each in (q, k, v))
        if hasattr(self, "q_norm") and len(self.q_norm.weight) == d:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v


# Names of a layer's parts: of the norms, of an attention, of a recurrence, of the MLP.
_PARTS = (
    ("input_layernorm", "operator_norm", "attn_norm"),
    ("post_attention_layernorm", "pre_ff_layernorm", "ffn_norm", "mlp_norm"),
    ("self_attn", "attn"), ("mamba", "linear_attn", "conv"), ("mlp", "feed_forward", "shared_mlp"),
)  # fmt: skip
_OF_ATTENTION = "attention_mask", "position_embeddings", "position_ids", "use_cache"  # a recurrence has its own mask


class DecoderLayer(_Fast):
    """A layer of two halves, each x + f(norm(x)), with factors: its sums in memory of the pool, the norms' gradients
    added with them, and behind the attention only the rows that are needed. The first half is an attention, a
    recurrence, or both (Falcon-H1's, which returns a tuple)."""

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: Any) -> Any:
        first, second, attends, recurrence, mlp = (instances.part_of(self, names) for names in _PARTS)
        fast = not args and computes_as_trained(self) and not getattr(self, "has_experts", False)
        fast = fast and (recurrence is None or kwargs.get("cu_seq_lens_q") is not None)
        if not fast or not all(
            isinstance(norm, _FastNorm) and not instances.is_hooked(norm) and norm.takes(hidden_states)
            for norm in (first, second)
        ):  # a norm is computed without its call, which hooks would see
            return super().forward(hidden_states, *args, **kwargs)
        some = last_layer.rows_for(self)
        if some is not None:
            some.selected = True
        residual, x = first.beside(hidden_states)
        parts: list[tuple[Tensor, float]] = []
        mask = kwargs.pop("mamba_attention_mask", kwargs.get("attention_mask"))
        of_both = getattr(self, "residual_multiplier", 1.0)
        if recurrence is not None:
            more = {name: given for name, given in kwargs.items() if name not in _OF_ATTENTION}
            y = recurrence(hidden_states=x, attention_mask=mask, **more)
            parts.append((y, of_both * getattr(self, "ssm_out_multiplier", 1.0)))
        if attends is not None:
            factor = getattr(self, "attention_in_multiplier", 1.0)
            y = attends(hidden_states=x if factor == 1.0 else x * factor, **kwargs)[0]
            parts.append((y, of_both * getattr(self, "attn_out_multiplier", 1.0)))
        with nullcontext() if some is None else dropout.select_tokens(some.rows):
            if some is not None:
                residual = some.select(residual)
                parts = [(y if y.shape[1] == some.count else some.select(y), factor) for y, factor in parts]
            (y, factor), *others = sorted(parts, key=lambda part: -abs(part[1]))
            for other, its in others:
                y = norm_gate.residual_sum(y, other, its / (factor or 1.0))
            residual, x = second.beside(norm_gate.residual_sum(residual, y, factor))
            alone = isinstance(mlp, _FastGatedMlp) and not instances.is_hooked(mlp) and mlp.takes(x)
            y, factor = mlp.unscaled(x) if alone else (mlp(x), 1.0)
            y = norm_gate.residual_sum(residual, y, factor * of_both)
        return y if len(parts) == 1 else (y,)


def install(model: nn.Module) -> Fused:
    """Make every module that can be run fused do so. Calling it again changes nothing but the counts."""
    counts: Counter[str] = Counter()
    unfused: Counter[str] = Counter()
    inside = {id(m.base_layer) for m in model.modules() if isinstance(m, LoraLayer)}
    inside |= {id(p) for m in model.modules() if isinstance(m, LoraLayer) for p in m.lora_dropout.values()}
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
        elif (part := _part(module)) is not None and id(module) not in inside:
            counts[part[0]] += 1
            _become(module, part[1])
            if part[1] is _FastGatedMlp:  # which computes its activation itself
                inside |= {id(m) for m in module.children() if formulas.activation_kind(m) is not None}
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
    fast = instances.of(model, _Fast)
    fast = [m for m in fast if not (isinstance(m, _FastLoraExperts) and is_quantised(m.get_base_layer()))]
    for module in fast:
        instances.give_back(module)
        module.__dict__.pop("_halfbyte_cheap", None)
    return len(fast) + interface.remove(model)


def recompute_cheap(model: nn.Module, *, on: bool) -> None:
    """Selective recomputation: outputs of norms and the gated MLP's inner product are made again in backward, not kept.
    They cost a pass over memory each; outputs of matrix products stay. Only what an adapter reads is kept otherwise."""
    for module in model.modules():
        if isinstance(module, (_FastNorm, _FastGatedMlp, _FastActivation)):
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
    if len(layer.active_adapters) != 1:
        return "several adapters" if layer.active_adapters else NO_ADAPTER
    return not_plain(layer, [n for n in layer.active_adapters if n in layer.lora_A])


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
        instances.become(module, mixin)


_now = SimpleNamespace(as_trained=False)


def as_trained() -> AbstractContextManager[None]:
    """While it lasts forwards without gradients compute as those of a training do, but for what is random in these."""
    return structure.replaced((_now, "as_trained", True))


def computes_as_trained(module: nn.Module | None = None) -> bool:
    """Whether a forward now, of this module, is one of a training: also one without gradients, as of DPO's reference,
    whose numbers are compared with the policy's, or of an evaluation."""
    return torch.is_grad_enabled() or _now.as_trained or (module is not None and module.training)


def _computes(layer: nn.Module, x: Tensor) -> bool:
    """Whether `layer` multiplies in x's own dtype, so that no cast is left out. Single tokens stay upstream, where
    upstream dequantises rightly."""
    if not isinstance(x, Tensor):
        return False
    few = not computes_as_trained(layer) and x.numel() < 8 * x.shape[-1]
    number_format = formats.of_module(layer)
    if few and number_format.upstream_is_right(layer):
        return False
    return number_format.multiplies_in(layer, x.dtype)


def _part(module: nn.Module) -> tuple[str, type[_Fast]] | None:
    """What this part of a layer is counted as, and the forward that takes its place: by its formula, or by its class's
    name, which a subclass of ours keeps."""
    if formulas.norm_of(module) is not None:
        trains = any(p.requires_grad for p in module.parameters())
        return None if trains and not isinstance(module, _FastNorm) else ("norms", _FastNorm)
    if isinstance(module, nn.Dropout):
        plain = instances.plain_class(type(module)) is nn.Dropout
        return ("dropouts", _FastDropout) if plain and module.p else None
    if formulas.activation_kind(module) is not None:
        return "activations", _FastActivation
    if formulas.gated_mlp(module) is not None:
        return "gated MLPs", _FastGatedMlp
    part = families.fused_part(type(module).__name__)
    if part is None:
        return None
    return ("attentions", _FastAttention) if part == "attention" else ("layers", DecoderLayer)

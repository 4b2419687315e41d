"""Recurrent layers that keep examples laid end to end apart: short convolutions, delta rule, state-space scan.

Why: transformers' own forward of these layers carries state and convolution from one example into the next, and its
torch code for a CPU holds every chunk's scores in memory.
What: on a model that is packed by lengths (`packing.install`) an instance gets a subclass of its own class. With
`cu_seq_lens_q` that runs the kernels of `kernels/cpu/recurrent` between the layer's own projections, which have LoRA or
none. What these do not compute (a weight of the layer trains, another activation, another dtype) the class's own
forward does, one example after another. Without lengths, and on a cache, the class's own forward runs.
Source: `Lfm2ShortConv`, `Qwen3NextGatedDeltaNet`, `GraniteMoeHybridMambaLayer` and their like, in transformers.

Letters: T tokens, W channels, H heads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from halfbyte.layers import instances, norm_gate
from halfbyte.layers.kernels import pool
from halfbyte.layers.kernels.cpu import available
from halfbyte.layers.packed_attention import LENGTHS
from halfbyte.upstream.transformers import CACHE_ARGUMENTS

_OF_A_PACK = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "position_ids", LENGTHS}


@dataclass(frozen=True)
class PackPlaces:
    """Where examples begin (N + 1,), and each token's number in its example (T,): int64, on the CPU."""

    starts: Tensor
    places: Tensor


@lru_cache(maxsize=8)
def places_of(lengths: tuple[int, ...]) -> PackPlaces:
    starts = torch.tensor([0, *lengths]).cumsum(0)
    return PackPlaces(starts, torch.arange(int(starts[-1])) - starts[:-1].repeat_interleave(starts.diff()))


# Of a kernel, by name: numbers of heads and widths, switches.
Options: TypeAlias = dict[str, float]


class Kernel(torch.autograd.Function):
    """A kernel of `kernels/cpu/recurrent` by its name: of its tensors the first ones get a gradient."""

    @staticmethod
    def forward(ctx: FunctionCtx, name: str, options: Options, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.name, ctx.options = name, options
        return _kernel(name).forward(*tensors, **options)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        given = _kernel(ctx.name).backward(grads[0].contiguous(), *tensors, **ctx.options)
        return None, None, *given, *[None] * (len(tensors) - len(given))


def _kernel(name: str) -> ModuleType:
    """Compiled when it is first asked for."""
    return import_module(f"halfbyte.layers.kernels.cpu.recurrent.{name}")


class GatedConv(torch.autograd.Function):
    """C conv(B x) of each example, of B, C and x side by side: (T, 3 W) -> (T, W). Only these are kept."""

    @staticmethod
    def forward(ctx: FunctionCtx, bcx: Tensor, w: Tensor, bias: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(bcx, w, bias, places)
        b, c, x = bcx.chunk(3, 1)
        y: Tensor = _kernel("conv").forward(b * x, w, bias, places, silu=False)
        return y.mul_(c)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (bcx, *taps), (dy,) = ctx.saved_tensors, grads
        b, c, x = bcx.chunk(3, 1)
        inner, out = b * x, pool.empty_like(bcx)
        db, dc, dx = out.chunk(3, 1)
        torch.mul(dy, _kernel("conv").forward(inner, *taps, silu=False), out=dc)
        (inside,) = _kernel("conv").backward(dy * c, inner, *taps, silu=False)
        torch.mul(inside, x, out=db)
        torch.mul(inside, b, out=dx)
        return out, None, None, None


class StateSpace(torch.autograd.Function):
    """Mamba-2 between its projections, (T, W) -> (T, H P). Of W the gate, what the convolution reads, and dt lie side
    by side, and so are their gradients written. Kept: W, what convolution and scan return, dt.

    norm: weights (.., D) of the gated one and its options, where there is one. limits: of dt. fixed: the convolution's
    taps and bias, A (H,), skip (H,), and of dt factor and bias (H,).
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, given: Tensor, examples: PackPlaces, options: Options, gate_scale: float,
        norm: tuple[Tensor, Options] | None, limits: tuple[float, float], *fixed: Tensor,
    ) -> Tensor:  # fmt: skip
        from halfbyte.layers.kernels.cpu import gate

        w, bias, a, skip, factor, dt_bias = fixed
        ctx.sizes = [given.shape[1] - w.shape[1] - len(a), w.shape[1], len(a)]
        z, xbc, raw = given.split(ctx.sizes, 1)
        xbc = _kernel("conv").forward(xbc, w, bias, examples.places, silu=True)
        dt = F.softplus(raw.float() * factor + dt_bias).clamp(*limits)
        y = _kernel("state_space").forward(xbc, dt * a, dt, skip, examples.starts, **options)
        ctx.save_for_backward(given, xbc, dt, y, *fixed)
        ctx.given = examples, options, gate_scale, norm, limits
        if norm is None:
            return gate.glu(z, y, norm_gate.SILU, gate_scale)
        groups = y.view(-1, norm[0].shape[1])
        out: Tensor = _kernel("gated_norm").forward(groups, z, norm[0], **norm[1], scale=gate_scale)
        return out.view(y.shape)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from halfbyte.layers.kernels.cpu import gate

        given, xbc, dt, y, w, bias, a, skip, factor, dt_bias = ctx.saved_tensors
        examples, options, gate_scale, norm, (low, high) = ctx.given
        dout, out = grads[0].contiguous(), pool.empty_like(given)
        (z, before, raw), (dz, dbefore, draw) = given.split(ctx.sizes, 1), out.split(ctx.sizes, 1)
        if norm is None:
            dy = pool.empty_like(y)
            gate.glu_backward(dout, z, y, norm_gate.SILU, dz, dy, gate_scale)
        else:
            groups = (each.view(-1, norm[0].shape[1]) for each in (dout, y))
            dy, _ = _kernel("gated_norm").backward(*groups, z, norm[0], **norm[1], scale=gate_scale, dz=dz)
        scan = dy.view(y.shape), xbc, dt * a, dt, skip, examples.starts
        dxbc, da, ddt = _kernel("state_space").backward(*scan, **options)
        _kernel("conv").backward(dxbc, before, w, bias, examples.places, silu=True, out=dbefore)
        slope = (raw.float() * factor + dt_bias).sigmoid_().mul_(factor).mul_((dt > low) & (dt < high))
        draw.copy_(ddt.addcmul_(da, a).mul_(slope))
        return out, *[None] * 11


class _Mixer(instances.Instance):
    """Marks an instance whose class was put here."""

    chunk = 1  # tokens at once

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        stock: Callable[..., Tensor] = super().forward
        starts = kwargs.get("cu_seq_lens_q")
        on_cache = any(kwargs.get(name) is not None for name in CACHE_ARGUMENTS)
        if args or on_cache or not isinstance(starts, Tensor):
            return stock(hidden_states, *args, **kwargs)
        lengths = tuple(starts.diff().tolist())
        if available(hidden_states) and not _trains_itself(self) and self.takes():
            return self.mix(hidden_states, places_of(lengths))
        alone = {name: x for name, x in kwargs.items() if name not in _OF_A_PACK}
        return torch.cat([stock(x, **alone) for x in hidden_states.split(lengths, 1)], 1)

    def takes(self) -> bool:
        """Whether the kernels compute what this layer does."""
        raise NotImplementedError

    def mix(self, x: Tensor, examples: PackPlaces) -> Tensor:
        """(1, T, D) -> (1, T, D)."""
        raise NotImplementedError


def _trains_itself(mixer: nn.Module) -> bool:
    """Whether a parameter trains that is in no projection: the layer's own, its convolution's, its norm's."""
    inner = [m for m in mixer.children() if isinstance(m, nn.Conv1d) or "Norm" in type(m).__name__]
    return any(p.requires_grad for m in (mixer, *inner) for p in m.parameters(recurse=m is not mixer))


def _taps(conv: nn.Conv1d) -> tuple[Tensor, Tensor]:
    """(weight (J, W), the newest tap first; bias (W,)) of a depthwise convolution, fp32."""
    w = conv.weight[:, 0].float().T.flip(0).contiguous()
    return w, w.new_zeros(w.shape[1]) if conv.bias is None else conv.bias.float()


class _ShortConvMixer(_Mixer):
    """LFM2's: out(C conv(B x)), with B, C and x of one projection."""

    def takes(self) -> bool:
        return isinstance(self.conv, nn.Conv1d)

    def mix(self, x: Tensor, examples: PackPlaces) -> Tensor:
        y = GatedConv.apply(self.in_proj(x).squeeze(0), *_taps(self.conv), examples.places)
        return self.out_proj(y[None])


class _ChunkMixer(_Mixer):
    """A recurrence that is computed a chunk of tokens at a time, with a convolution and SiLU before it."""

    chunk = 96  # as in `kernels/cpu/recurrent/chunks.py`

    def takes(self) -> bool:
        from halfbyte.layers.kernels.cpu import tiles

        return isinstance(self.conv1d, nn.Conv1d) and self.activation == "silu" and tiles.available32()


class _DeltaMixer(_ChunkMixer):
    """The gated delta rule of Qwen3-Next, Qwen3.5 and OLMo hybrid, which differ in their projections."""

    def mix(self, x: Tensor, examples: PackPlaces) -> Tensor:
        qkv, gate, b, a = self._projected(x)
        qkv = Kernel.apply("conv", {"silu": True}, qkv, *_taps(self.conv1d), examples.places)
        g = -self.A_log.float().exp() * F.softplus(a.float() + self.dt_bias.float())  # (T, H)
        beta = b.float().sigmoid() * (2.0 if getattr(self, "allow_neg_eigval", False) else 1.0)
        options = {"keys": self.num_k_heads, "d": self.head_k_dim}
        y = Kernel.apply("delta_rule", options, qkv, g.contiguous(), beta.contiguous(), examples.starts)
        norm, out = (self.o_norm, self.o_proj) if hasattr(self, "o_proj") else (self.norm, self.out_proj)
        width = y.shape[1] // self.num_v_heads
        options = {"eps": norm.variance_epsilon, "gate_first": False}
        z = Kernel.apply("gated_norm", options, y.view(-1, width), gate, norm.weight.float()[None])
        return out(z.view(1, *y.shape))

    def _projected(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values side by side (T, W), the gate (T, H O), and what beta and g are made of (T, H)."""
        if hasattr(self, "in_proj_qkv"):
            return tuple(p(x).squeeze(0) for p in (self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a))
        if hasattr(self, "in_proj_qkvz"):
            mixed = self.fix_query_key_value_ordering(self.in_proj_qkvz(x), self.in_proj_ba(x))
            q, k, v, gate, b, a = (part.squeeze(0).flatten(1) for part in mixed)
        else:
            projections = self.q_proj, self.k_proj, self.v_proj, self.g_proj, self.b_proj, self.a_proj
            q, k, v, gate, b, a = (p(x).squeeze(0) for p in projections)
        return torch.cat((q, k, v), 1), gate, b, a


class _StateSpaceMixer(_ChunkMixer):
    """Mamba-2 as Granite 4, Bamba, Nemotron-H, Zamba2 and Falcon-H1 have it."""

    def mix(self, x: Tensor, examples: PackPlaces) -> Tensor:
        # Falcon-H1's factors, where they cost no pass over memory
        before, sizes = getattr(self, "ssm_in_multiplier", 1.0), [self.intermediate_size, self.conv_dim, self.num_heads]
        if before != 1.0 and (self.in_proj.bias is not None or any(getattr(self.in_proj, "lora_bias", {}).values())):
            x, before = x * before, 1.0
        factors = self.mup_vector.flatten().float() if hasattr(self, "mup_vector") else torch.ones(sum(sizes))
        of_gate, of_xbc, of_dt = (factors * before).split(sizes)
        (w, bias), norm = _taps(self.conv1d), None
        if not isinstance(self.norm, nn.Identity):
            gate_first = not getattr(self.norm, "norm_before_gate", False)
            of_norm = {"eps": self.norm.variance_epsilon, "gate_first": gate_first}
            norm = self.norm.weight.float().view(self.n_groups, -1), of_norm
        options = {"groups": self.n_groups, "n": self.ssm_state_size}
        fixed = w * of_xbc, bias, -self.A_log.float().exp(), self.D.float(), of_dt, self.dt_bias.float()
        how = options, float(of_gate[0]), norm, self.time_step_limit
        return self.out_proj(StateSpace.apply(self.in_proj(x).squeeze(0), examples, *how, *fixed)[None])


def _kind(module: nn.Module) -> type[_Mixer] | None:
    """What takes the place of a module's forward, by its class's name and what it holds."""
    name = type(module).__name__
    if name.endswith("ShortConv"):
        return _ShortConvMixer
    if name.endswith("GatedDeltaNet"):
        return _DeltaMixer
    return _StateSpaceMixer if hasattr(module, "ssm_state_size") and hasattr(module, "n_groups") else None


def install(body: nn.Module) -> None:
    """Make every recurrent layer of a known kind keep examples apart."""
    for module in body.modules():
        if not isinstance(module, _Mixer) and (kind := _kind(module)) is not None:
            instances.become(module, kind)


def complete(body: nn.Module) -> None:
    """The same for layers that a proof on the first ones did not meet."""
    if chunk_of(body):
        install(body)


def remove(body: nn.Module) -> None:
    """Give every recurrent layer its own class back."""
    for module in instances.of(body, _Mixer):
        instances.give_back(module)


def chunk_of(body: nn.Module) -> int:
    """Tokens that the recurrent layers take at once; 0 where none is installed, and carries a state."""
    return max((mixer.chunk for mixer in instances.of(body, _Mixer)), default=0)

"""Cards that are not there, for tests: tensors on `sdaa:0`, `sdaa:1` whose numbers lie on the CPU.

Every operation runs. One that mixes two cards, or a card with a CPU tensor of more than no dimension, raises as CUDA
would; one that makes the host wait for a card is counted (`Cards.syncs`); so is every byte that lives on a card, and
beyond `Cards.limit_bytes` an allocation fails as CUDA's does. torch's packed attention, which has no CPU kernel, is
computed by its formula. The device has the name of one that accelerate takes for a card without its library.

Use: `with fake_card.cards() as cards: ...`, or the fixture `cards` (tests/conftest.py).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip("a fake card needs torch >= 2.10: a backend that is written in Python", allow_module_level=True)

KIND = "sdaa"
TOTAL_BYTES = 8 * 2**30
OWN_CARD = ("aten.new_empty_strided.default", "aten._to_copy.default")
SYNCS = ("_local_scalar_dense", "nonzero", "aten.equal", "is_nonzero", "unique", "masked_select")


@dataclass
class Cards(TorchDispatchMode):
    """The mode under which cards are there, and what was seen of them."""

    count: int = 1
    limit_bytes: int = TOTAL_BYTES
    syncs: list[str] = field(default_factory=list)
    held: dict[int, int] = field(default_factory=dict)  # bytes alive, by card
    peak: dict[int, int] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._storages: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat, _ = tree_flatten((args, kwargs))
        if any(isinstance(a, Card) or (isinstance(a, torch.device) and a.type == KIND) for a in flat):
            return run(func, args, kwargs)
        return func(*args, **kwargs)

    def took(self, tensor: Card) -> None:
        """Count a storage that was not there yet."""
        storage = tensor.real_.untyped_storage()
        key, size, card = storage._cdata, storage.nbytes(), tensor.device.index
        if key in self._storages:
            return
        if self.held.get(card, 0) + size > self.limit_bytes:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes.")
        self.held[card] = self.held.get(card, 0) + size
        self.peak[card] = max(self.peak.get(card, 0), self.held[card])

        def gone(_: object) -> None:
            self._storages.pop(key, None)
            self.held[card] -= size

        self._storages[key] = weakref.ref(storage, gone)

    def reset(self) -> None:
        self.syncs.clear()
        self.calls.clear()
        self.peak = dict(self.held)


_NOW: list[Cards] = []
_LIBRARIES: list[torch.library.Library] = []


class _Module(backend_registration._DummyBackendModule):
    """What `torch.cuda` is for CUDA."""

    def device_count(self) -> int:
        return _NOW[-1].count if _NOW else 0

    def is_available(self) -> bool:
        return bool(_NOW)

    def current_device(self) -> int:
        return 0

    def set_device(self, device: object) -> None: ...

    def get_rng_state(self, device: object = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: object = None) -> None: ...

    def get_rng_state_all(self) -> list[torch.Tensor]:
        return [torch.get_rng_state()] * self.device_count()

    def set_rng_state_all(self, states: object) -> None: ...

    def is_bf16_supported(self, including_emulation: bool = True) -> bool:
        return True

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_device_capability(self, device: object = None) -> tuple[int, int]:
        return (9, 0)

    def mem_get_info(self, device: object = None) -> tuple[int, int]:
        return TOTAL_BYTES - sum(_NOW[-1].held.values()), TOTAL_BYTES

    def synchronize(self, *_: object) -> None: ...

    def empty_cache(self) -> None: ...

    def memory_allocated(self, device: Any = 0) -> int:
        return _NOW[-1].held.get(torch.device(KIND, device).index if isinstance(device, int) else device.index, 0)

    memory_reserved = memory_allocated

    def max_memory_allocated(self, device: Any = 0) -> int:
        return _NOW[-1].peak.get(device if isinstance(device, int) else device.index, 0)

    max_memory_reserved = max_memory_allocated

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        _NOW[-1].peak = dict(_NOW[-1].held)


class _Hook(backend_registration._DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return bool(_NOW)


@cache
def _registered() -> None:
    backend_registration._setup_privateuseone_for_python_backend(KIND, backend_module=_Module(), hook=_Hook())
    # What CUDA has as one kernel and other devices as several operations. Never called: Python's key comes before.
    library = torch.library.Library("aten", "IMPL")
    library.impl("silu_backward", lambda *_: None, "PrivateUse1")
    _LIBRARIES.append(library)
    torch.ones(1, requires_grad=True).sum().backward()  # autograd counts devices now, and once


def device(index: int = 0) -> torch.device:
    _registered()
    return torch.device(KIND, index)


class Card(torch.Tensor):
    """A tensor on a card; `real_` has its numbers. For torch's own code all cards are one, as its autograd knows one
    device of a kind that is written in Python; what Python sees as `device`, and all checks, tell them apart.
    """

    real_: torch.Tensor
    card_: int

    @staticmethod
    def __new__(cls, real: torch.Tensor, device: torch.device, requires_grad: bool = False) -> Card:
        made: Card = torch.Tensor._make_wrapper_subclass(
            cls,
            real.size(),
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            layout=real.layout,
            device=torch.device(KIND, 0),
            requires_grad=requires_grad,
        )
        made.real_, made.card_ = real.detach(), device.index or 0
        _NOW[-1].took(made)
        return made

    @property
    def device(self) -> torch.device:
        return torch.device(KIND, self.card_)

    def to(self, *args: Any, copy: bool = False, **kwargs: Any) -> torch.Tensor:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is None or device.type != KIND:
            return super().to(*args, copy=copy, **kwargs)
        if (device.index or 0) != self.card_:
            return _Moved.apply(self, torch.device(KIND, device.index or 0), dtype)
        if dtype is None:
            return self.clone() if copy else self
        return super().to(dtype, copy=copy)

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, new: torch.Tensor) -> None:
        torch.Tensor.data.__set__(self, new)
        self.real_ = new.real_

    def tolist(self) -> Any:
        _NOW[-1].syncs.append("tolist")
        return self.real_.tolist()

    def data_ptr(self) -> int:
        return self.real_.data_ptr()

    def untyped_storage(self) -> Any:
        return self.real_.untyped_storage()

    def __repr__(self, **_: object) -> str:
        return f"Card({self.real_}, {self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Card:
        copied = Card(self.real_.clone(), self.device, self.requires_grad)
        if getattr(self, "_is_param", False):
            copied._is_param = True
        return copied

    def __reduce_ex__(self, protocol: object) -> Any:
        raise RuntimeError("a tensor of a fake card cannot be pickled")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class _Moved(torch.autograd.Function):
    """From one card to another, and its gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Card, device: torch.device, dtype: torch.dtype | None) -> Card:
        ctx.device, ctx.dtype = x.device, x.dtype
        return Card(x.real_.to(dtype or x.dtype, copy=True), device)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return Card(grads[0].real_.to(ctx.dtype, copy=True), ctx.device), None, None


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """One operation that a card takes part in."""
    now, name = _NOW[-1], str(func)
    now.calls.append(name)
    flat, _ = tree_flatten((args, kwargs))
    where = {a.device for a in flat if isinstance(a, Card)}
    asked = kwargs.get("device")
    if name in OWN_CARD and where and asked is not None and torch.device(asked).type == KIND:
        asked = next(iter(where))  # from torch's own code, for which all cards are one; others say `to`
    target = torch.device(asked) if asked is not None else next(iter(where), None)
    if not any(k in name for k in ("_to_copy", "aten.copy_", "aten.to.", "set_.source")):
        _refuse_mixing(name, flat, where)
    if where and any(part in name for part in SYNCS):
        now.syncs.append(name)
    if where and "_to_copy" in name and target is not None and target.type == "cpu":
        now.syncs.append(f"{name} to the CPU")
    args, kwargs = tree_map(_real, args), tree_map(_real, kwargs)
    kwargs |= {"device": torch.device("cpu")} if asked is not None else {}
    kwargs |= {"pin_memory": False} if "pin_memory" in kwargs else {}
    out = _ATTENTION.get(name, func)(*args, **kwargs)
    if target is None or target.type != KIND:
        return out
    target = torch.device(KIND, target.index or 0)
    known = {id(a.real_): a for a in flat if isinstance(a, Card)}

    def wrapped(o: Any) -> Any:
        if isinstance(o, torch.Tensor) and not isinstance(o, Card):
            return known[id(o)] if id(o) in known else Card(o, target)
        return o

    return tree_map(wrapped, out)


def _real(a: Any) -> Any:
    return a.real_ if isinstance(a, Card) else a


def _refuse_mixing(name: str, flat: list[Any], where: set[torch.device]) -> None:
    plain = [a for a in flat if isinstance(a, torch.Tensor) and not isinstance(a, Card) and a.dim() > 0]
    if name.startswith(("aten._foreach", "aten._fused_adam")) or (
        name == "aten.mul_.Tensor" and getattr(flat[-1], "ndim", 0) == 0
    ):
        return  # torch's own code sorts tensors by device, and for it all cards are one
    taken_along = "index" in name and "index_copy" not in name and "index_select" not in name  # x[cpu indices]
    if len(where) > 1 or (where and plain and not taken_along):
        seen = sorted({*map(str, where), *(str(a.device) for a in plain)})
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {', '.join(seen)}! ({name})")


def _varlen(q: Any, k: Any, v: Any, cu: Any, _cu_k: Any, _max_q: int, _max_k: int, _causal: bool, *rest: Any) -> Any:
    """torch_attn::_varlen_attn by its definition; of `rest` scale and window: how many tokens back, and ahead."""
    assert q.dtype in (torch.bfloat16, torch.float16), "flash attention takes 16 bits alone"
    out = torch.cat([_attend(*parts, *rest[:2]) for parts in _examples(q, k, v, cu)])
    return out, q.new_zeros((q.shape[1], q.shape[0]), dtype=torch.float32), torch.zeros(2, dtype=torch.uint64)


def _varlen_backward(grad: Any, q: Any, k: Any, v: Any, _out: Any, _lse: Any, cu: Any, *rest: Any) -> Any:
    """The gradients of q, k and v, by FlashAttention-2's formulas with whole scores."""
    scale, window = rest[5:7]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    per_text = []
    for (a, b, c), d in zip(_examples(q, k, v, cu), grad.split(cu.diff().tolist()), strict=True):
        p, (a, b, c) = _weights(a, b, c, scale, window)
        d = d.float().transpose(0, 1)
        dp = d @ c.transpose(1, 2)
        ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
        grads = [ds @ b, ds.transpose(1, 2) @ a, p.transpose(1, 2) @ d]  # (H, L, D)
        heads = [q.shape[1], k.shape[1], k.shape[1]]
        summed = [x.unflatten(0, (n, -1)).sum(1).transpose(0, 1) for x, n in zip(grads, heads, strict=True)]
        per_text.append([x.to(q.dtype) for x in summed])
    return tuple(torch.cat(parts) for parts in zip(*per_text, strict=True))


def _examples(q: Any, k: Any, v: Any, cu: Any) -> Iterator[tuple[Any, Any, Any]]:
    lengths = cu.diff().tolist()
    yield from zip(*(x.split(lengths) for x in (q, k, v)), strict=True)


def _weights(q: Any, k: Any, v: Any, scale: float, window: Any) -> Any:
    """Softmax of one example's scores (H, L, L), and q, k, v as (H, L, D), in fp32."""
    groups = q.shape[1] // k.shape[1]
    q, k, v = (x.float().transpose(0, 1) for x in (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)))
    at = torch.arange(q.shape[1])
    back = at[:, None] - at[None, :]
    left, right = window or (-1, -1)
    seen = (back >= -right if right >= 0 else back == back) & (back <= left if left >= 0 else back == back)
    return ((q @ k.transpose(1, 2)) * scale).masked_fill(~seen, -torch.inf).softmax(-1), (q, k, v)


def _attend(q: Any, k: Any, v: Any, scale: Any, window: Any) -> Any:
    """(L, H, D), (L, K, D) -> (L, H, D): one example."""
    p, (_, _, values) = _weights(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale, window)
    return (p @ values).transpose(0, 1).to(q.dtype)


_ATTENTION: dict[str, Callable[..., Any]] = {
    "torch_attn._varlen_attn.default": _varlen,
    "torch_attn._varlen_attn_backward.default": _varlen_backward,
}


class _Sdpa(torch.autograd.Function):
    """SDPA by a kernel that keeps no scores, as a card's: computed by the CPU's, and again for backward."""

    @staticmethod
    def forward(ctx: Any, q: Card, k: Card, v: Card, options: dict[str, Any]) -> Card:
        _NOW[-1].calls.append("scaled_dot_product_attention")
        _refuse_mixing("scaled_dot_product_attention", [q, k, v], {q.device, k.device, v.device})
        ctx.save_for_backward(q, k, v)
        ctx.options = options
        return Card(_SDPA(q.real_, k.real_, v.real_, **options), q.device)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v = ctx.saved_tensors
        with torch.enable_grad():
            leaves = [x.real_.detach().requires_grad_() for x in (q, k, v)]
            gradients = torch.autograd.grad(_SDPA(*leaves, **ctx.options), leaves, grads[0].real_)
        return *(Card(x, q.device) for x in gradients), None


_SDPA = torch.nn.functional.scaled_dot_product_attention


def _sdpa(q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
          scale: Any = None, enable_gqa: bool = False) -> Any:  # fmt: skip
    options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    if not isinstance(q, Card):
        return _SDPA(q, k, v, attn_mask, **options)
    return _Sdpa.apply(q, k, v, {"attn_mask": _real(attn_mask), **options})


class _Generator(torch.Generator):
    """`torch.Generator(device="sdaa")`; torch has none for this device."""

    def __new__(cls, device: object = "cpu") -> Any:
        return super().__new__(cls, device="cpu")


def from_prequantized(cls: type, data: Any, quantized_stats: Any, requires_grad: bool = False, device: Any = "cpu",
                      module: Any = None, **_: object) -> Any:  # fmt: skip
    """`bitsandbytes.nn.Params4bit.from_prequantized`, whose own makes a subclass of a subclass."""
    from bitsandbytes.functional import QuantState

    parameter = torch.nn.Parameter(data.to(device), requires_grad=False)
    parameter.quant_state = state = QuantState.from_dict(qs_dict=quantized_stats, device=device)
    parameter.blocksize, parameter.compress_statistics = state.blocksize, state.nested
    parameter.quant_type = state.quant_type
    parameter.bnb_quantized, parameter.quant_storage, parameter.module = True, data.dtype, module
    if module is not None:
        module.quant_state = state
    return parameter


@contextmanager
def cards(count: int = 1) -> Iterator[Cards]:
    """Machine with so many fake cards, for what is run inside."""
    import bitsandbytes as bnb

    _registered()
    environment = {"HF_DEACTIVATE_ASYNC_LOAD": "1", "ACCELERATE_TORCH_DEVICE": f"{KIND}:0"}
    stand_ins = Cards(count)
    own = bnb.nn.Params4bit.from_prequantized

    def prequantized(data: Any, *args: Any, device: Any = "cuda", **kwargs: Any) -> Any:
        make = (
            own if torch.device(device).type != KIND else lambda *a, **k: from_prequantized(bnb.nn.Params4bit, *a, **k)
        )
        return make(data, *args, device=device, **kwargs)

    _NOW.append(stand_ins)
    lifts = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # so that `torch.tensor(0.0, device=...)` is seen by the mode
    try:
        with (
            mock.patch.dict("os.environ", environment),
            mock.patch.object(torch, "Generator", _Generator),
            mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", _sdpa),
            mock.patch.object(bnb.nn.Params4bit, "from_prequantized", prequantized),
            stand_ins,
        ):
            yield stand_ins
    finally:
        torch._C._set_only_lift_cpu_tensors(lifts)
        _NOW.pop()

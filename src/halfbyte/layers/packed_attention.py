"""Attention over examples laid end to end, none of which sees another.

Why: transformers' own path builds a dense block mask over the whole pack (16 examples of 128 tokens: 140 ms a layer,
against 36 here), and builds none when a cache is asked for, so examples then see each other silently.
Where examples share their beginnings, a segment sees its path (`kernels.card.PackLengths`), by our kernel or, one at a
time, by torch.
What: a function registered under `NAME` in transformers' AttentionInterface, with stock SDPA's mask under the same
name in AttentionMaskInterface. Given `cu_seq_lens_q` it runs torch SDPA on each example; equal neighbours go as one
batch; a card's flash kernel takes all of them in one call (`kernels/card.py`). Without it (padding, generation with a
cache) it is stock SDPA.
Whatever the fused kernel cannot say (score softcap, attention sinks) runs by the eager formula, example by example;
whatever is not understood raises `PackingError`, which `proofs/packing.py` turns into one example a micro-batch.
Source: the contract is the one flash attention has upstream: `cu_seq_lens_*` and `sliding_window` are the whole mask.
Cost: one split of q, k, v and one concatenation of the outputs; both are copies once in the backward pass.

Letters: N examples, H query heads, K key/value heads, T tokens in the pack, L tokens in one example, D head size.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halfbyte.errors import BaseModelError
from halfbyte.layers import attention as block_attention
from halfbyte.layers import sight
from halfbyte.layers.kernels import ALL_TOKENS, CAUSAL, card
from halfbyte.layers.kernels import dropout as masks
from halfbyte.layers.kernels.cpu import available, whole_attention
from halfbyte.system import accelerator
from halfbyte.types import Document
from halfbyte.upstream import transformers as upstream

NAME = "halfbyte_packed"
LENGTHS = "packed_lengths"  # what attention reads the lengths from, where they are known as numbers


class PackingError(BaseModelError):
    """A model asks of packed attention what it cannot do. Such a model runs one example a micro-batch."""


@dataclass(frozen=True)
class Formula:
    """What a model asks of attention, by transformers' names."""

    scaling: float | None  # None: D ** -0.5
    dropout: float
    softcap: float | None
    s_aux: Tensor | None  # (H,): sinks, a learned score per head for looking at nothing
    sliding_window: int | None
    causal: bool = True

    @property
    def is_plain(self) -> bool:
        """Whether softmax(q k^T scale) v says it all, as the fused kernels have it."""
        return self.softcap is None and self.s_aux is None

    def scale(self, query: Tensor) -> float:
        return query.shape[-1] ** -0.5 if self.scaling is None else self.scaling


def register() -> None:
    """Make `NAME` known to transformers. Calling it again changes nothing. Both registries are needed: without the mask
    function transformers drops a 2-D padding mask silently."""
    upstream.attention().register(NAME, attention)
    upstream.attention_masks().register(NAME, _mask)


def _mask(
    *, q_length: int, mask_function: Callable[..., Tensor], device: torch.device, **rest: object
) -> Tensor | None:
    """Stock SDPA's mask; while `sight.look` asks what layers see, what it takes in the place of one."""
    plain = not rest.get("use_vmap") or getattr(rest.get("config"), "use_bidirectional_attention", False)  # Gemma 3's
    marked = sight.mark(mask_function, q_length, device, plain=plain)
    if marked is not None:
        return marked
    stock = upstream.attention_masks()()["sdpa"]
    return stock(q_length=q_length, mask_function=mask_function, device=device, **rest)


def no_mask(device: torch.device | str, pack: card.PackLengths | None = None) -> Tensor:
    """The `attention_mask` of a packed forward: no element, four dimensions. transformers hands a 4-D mask through as
    it is, so the dense block mask is never built; and any code that would add this one to its scores fails on the
    shape, instead of attending to everything. It brings the lengths to a layer that gets nothing else."""
    mask = torch.empty((1, 1, 0, 0), dtype=torch.bool, device=device)
    if pack is not None:
        setattr(mask, LENGTHS, pack)
    return mask


def lengths_on(mask: Tensor | None) -> card.PackLengths | None:
    """The lengths that a mask of `no_mask` brings; None for any other."""
    pack = getattr(mask, LENGTHS, None)
    return pack if isinstance(pack, card.PackLengths) else None


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, is_causal: bool | None = None, sliding_window: int | None = None,
    softcap: float | None = None, s_aux: Tensor | None = None, cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None, **rest: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention interface (its signature; `rest` holds what only some models pass).

    Args:
        query: (N, H, T, D); packed: N = 1.
        key, value: (N, K, T, D), K dividing H; the value's D may differ.
        sliding_window: how many tokens a token sees, itself included.

    Returns:
        The output (N, T, H, D), and None for the attention weights.
    """
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    asked = Formula(scaling, dropout, softcap, s_aux, sliding_window, causal)
    pack = lengths_on(attention_mask)
    if cu_seq_lens_q is None and pack is not None:  # a layer that hands on no more than the mask
        cu_seq_lens_q, rest[LENGTHS] = torch.tensor([0, *pack.lengths]).cumsum(0), pack
    if cu_seq_lens_q is not None:
        seen = sight.of(module)
        as_seen = seen is not None and seen.ahead and seen.causal > 0
        lengths = _check_packed(query, key, causal or as_seen, cu_seq_lens_q, cu_seq_lens_k, rest)
        if causal and as_seen:
            raise PackingError(f"{type(module).__name__} asks for a causal mask; by its mask: {seen}")
        if seen is not None and not seen.is_window(sliding_window):
            raise PackingError(f"{type(module).__name__} asks for sliding_window={sliding_window}; by its mask: {seen}")
        return _packed(module, query, key, value, lengths, asked), None
    if attention_mask is not None and attention_mask.numel() == 0:
        raise PackingError(f"{type(module).__name__} was handed packed examples without their lengths (cu_seq_lens_q)")
    if asked.is_plain:
        stock = upstream.attention()()["sdpa"]
        return stock(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **rest
        )
    if rest.get("position_bias") is not None:
        raise PackingError("a position bias together with softcap or sinks is not supported")
    if attention_mask is None and causal and query.shape[2] > 1:  # transformers left the mask to `is_causal`
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        attention_mask = _visible(query.shape[2], None, query.device)
    return _eager(query, key, value, attention_mask, asked).transpose(1, 2).contiguous(), None


def _check_packed(
    query: Tensor, key: Tensor, causal: bool, cu_q: Tensor, cu_k: Tensor | None, rest: dict[str, object]
) -> card.PackLengths:
    """The lengths of the examples, after everything that would be silently wrong has been refused."""
    pack = rest.pop(LENGTHS, None)
    told = isinstance(pack, card.PackLengths)  # by `packing.packed_inputs`; else they are read from the tensor
    if not isinstance(pack, card.PackLengths):
        pack = card.PackLengths(tuple(cu_q.diff().tolist()), card.kernel_name())
    lengths, problems = pack.lengths, []
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        problems.append(f"one pack and no earlier keys, got query {tuple(query.shape)}, key {tuple(key.shape)}")
    if sum(lengths) != query.shape[2]:
        problems.append(f"cu_seq_lens_q must cover the {query.shape[2]} tokens, got {sum(lengths)}")
    if not told and cu_k is not None and cu_k is not cu_q and not torch.equal(cu_k, cu_q):
        problems.append("cu_seq_lens_k must equal cu_seq_lens_q")
    if not causal:
        problems.append("causal attention only")
    # Positions have done their work in the model; any other tensor would change the scores in a way not known here.
    odd = sorted(k for k, v in rest.items() if isinstance(v, Tensor) and k not in {"position_ids", "cache_position"})
    if odd:
        problems.append(f"arguments that are not understood: {', '.join(odd)}")
    if problems:
        raise PackingError("packed attention: " + "; ".join(problems))
    return pack


def _packed(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, pack: card.PackLengths, asked: Formula
) -> Tensor:
    """Attention as asked; on a card all examples at once where its kernel can, else each run of neighbours of equal
    length L as one batch. Returns (1, T, H, D)."""
    lengths, levels = pack.lengths, pack.levels
    slides = asked.sliding_window is not None and pack.longest > asked.sliding_window
    if asked.is_plain:
        # (T, heads, D); of x[0] the gradient would be a copy into zeros
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        on_card = query.device.type != "cpu" and asked.causal
        if on_card and not levels and not asked.dropout and card.takes(q, k, v, pack.kernel):
            return card.attention(q, k, v, pack, asked.scale(query), asked.sliding_window if slides else None)[None]
        reach = reach_of(asked.sliding_window if slides else None, causal=asked.causal)
        if reach != CAUSAL:
            blocks = whole_attention(query) and not levels
        else:  # without gradients torch's own kernel is as good as blocks
            blocks = whole_attention(query) or (query.requires_grad and not levels and not asked.dropout)
        if blocks and block_attention.takes(q, k, v):
            seed = masks.some_seed(module, q) if asked.dropout else None
            out = block_attention.attention(
                q, k, v, lengths, asked.scale(query), None, None, levels, None, asked.dropout, seed, reach
            )
            return out[None]
    if levels and not asked.causal:
        raise PackingError("segments of a tree are attended to causally alone")
    if levels:
        return _paths(query, key, value, pack, asked)
    runs = [(length, sum(1 for _ in same)) for length, same in groupby(lengths)]  # (L, how many)
    # split, not slices: its backward is one concatenation, where each slice would add a zero-filled (T, D) tensor
    sizes = [length * count for length, count in runs]
    pieces = (x.squeeze(0).transpose(0, 1).split(sizes) for x in (query, key, value))  # each (n L, heads, D)
    outputs = []
    for (length, count), q, k, v in zip(runs, *pieces, strict=True):
        q, k, v = (x.unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v))  # (n, heads, L, D)
        out = _one_length(q, k, v, asked)  # (n, H, L, D)
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # (n L, H, D)
    return torch.cat(outputs)[None]


def _paths(query: Tensor, key: Tensor, value: Tensor, pack: card.PackLengths, asked: Formula) -> Tensor:
    """Attention of each segment of a tree to its path, one at a time. Returns (1, T, H, D)."""
    outputs, path = [], list[tuple[Tensor, Tensor]]()
    pieces = (x.split(pack.lengths, 2) for x in (query, key, value))  # each (1, heads, L, D)
    for level, q, k, v in zip(pack.levels, *pieces, strict=True):
        path[level:] = [(k, v)]
        keys, values = (torch.cat(parts, 2) for parts in zip(*path, strict=True))
        outputs.append(_one_length(q, keys, values, asked).transpose(1, 2))
    return torch.cat(outputs, 1)


def _one_length(query: Tensor, key: Tensor, value: Tensor, asked: Formula) -> Tensor:
    """Attention of n examples of one length, or of their last tokens: (n, H, L, D), (n, K, S, D) -> (n, H, L, D), S at
    least L."""
    length, seen = query.shape[2], key.shape[2]
    window = asked.sliding_window
    slides = window is not None and seen > window
    visible = _visible(length, window if slides else None, query.device, seen, ahead=not asked.causal)
    if not asked.is_plain:
        return _eager(query, key, value, visible, asked)
    mask = visible if slides or seen > length else None
    grouped = query.shape[1] != key.shape[1]
    on_card = query.device.type != "cpu"
    # enable_gqa saves 10% on a CPU. On a card only the flash kernel knows it: without that one, with a mask, or with
    # large heads, it would select the formula, with scores in memory.
    flash = mask is None and key.shape[-1] == value.shape[-1] <= card.LARGEST_HEAD
    if grouped and on_card and not (flash and accelerator.fast_attention(query.device, query.dtype)):
        key, value = _repeat(key, query), _repeat(value, query)
        grouped = False
    with card.without_cudnn() if on_card else nullcontext():
        return F.scaled_dot_product_attention(
            query, key, value, mask, asked.dropout, is_causal=mask is None and asked.causal, scale=asked.scaling,
            enable_gqa=grouped,
        )  # fmt: skip


def _eager(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, asked: Formula) -> Tensor:
    """The formula itself, scores in memory: softmax(softcap(q k^T scale) | sink) v, as gemma2 and gpt_oss have it."""
    scores = query @ _repeat(key, query).transpose(2, 3) * asked.scale(query)  # (n, H, Lq, Lk)
    if asked.softcap is not None:
        scores = torch.tanh(scores / asked.softcap) * asked.softcap
    if mask is not None:
        hidden = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, hidden) if mask.dtype == torch.bool else scores + mask
    if asked.s_aux is not None:
        sink = asked.s_aux.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
    softmax_dtype = torch.promote_types(scores.dtype, torch.float32)
    weights = F.softmax(scores, dim=-1, dtype=softmax_dtype).to(query.dtype)
    if asked.s_aux is not None:
        weights = weights[..., :-1]
    return F.dropout(weights, asked.dropout) @ _repeat(value, query)


def reach_of(window: int | None, *, causal: bool) -> tuple[int, int]:
    """How many tokens before and after itself a token sees, where it sees `window` to a side, itself included."""
    before = ALL_TOKENS if window is None else window - 1
    return before, 0 if causal else before


def _visible(
    length: int, sliding_window: int | None, device: torch.device, seen: int = 0, *, ahead: bool = False
) -> Tensor:
    """(L, S) bool: which key (column) a query (row) sees, of the last L of S tokens; 0: of L. `ahead`: both ways."""
    positions = torch.arange(max(length, seen), device=device)
    back = positions[-length:, None] - positions[None, :]
    back = back.abs() if ahead else back
    return back >= 0 if sliding_window is None else (back >= 0) & (back < sliding_window)


def _repeat(kv: Tensor, query: Tensor) -> Tensor:
    """(n, K, L, D) -> (n, H, L, D): each key/value head under the query heads it serves."""
    return kv.repeat_interleave(query.shape[1] // kv.shape[1], dim=1)


def head_size(module: nn.Module) -> int:
    return int(module.head_dim if hasattr(module, "head_dim") else module.head_size)


def lengths_for(module: nn.Module, x: Tensor, kwargs: Document) -> tuple[card.PackLengths, tuple[int, int]] | None:
    """The lengths of the examples in x (1, T, D), and how many tokens before and after itself a token sees, if the
    fused attention may take them; None if not."""
    cu, pack = kwargs.get("cu_seq_lens_q"), kwargs.get(LENGTHS) or lengths_on(kwargs.get("attention_mask"))
    if x.dim() != 3 or x.shape[0] != 1 or kwargs.get("position_embeddings") is None or not available(x):
        return None
    if any(kwargs.get(name) is not None for name in (*upstream.CACHE_ARGUMENTS, "layer_past")):
        return None
    if cu is not None and pack is None:
        pack = card.PackLengths(tuple(cu.diff().tolist()))
    if pack is None:
        return None
    if module.training and (module.attention_dropout or getattr(module, "residual_dropout", 0)):
        return None
    if getattr(module, "qk_layernorm", False) or getattr(module.config, "clip_qkv", None) is not None:
        return None
    sees = sight.of(module)
    reach = None if sees is None else sees.reach(pack.longest)
    tree, windowed = bool(pack.levels), reach != CAUSAL
    if reach is None or (tree and windowed) or ((tree or windowed) and not whole_attention(x)):
        return None
    if getattr(module, "attn_logit_softcapping", None) is not None or head_size(module) % 2:
        return None
    return pack, reach

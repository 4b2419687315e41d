"""What one decoder layer takes of a token: what backward needs of it, and what is there for a moment while it runs.

Source: the engine itself. Every formula here was read off `torch.autograd.graph.saved_tensors_hooks` on real models of
the family, and `tests/plan/test_layer.py` compares both again, byte for byte, so that they cannot drift apart.
Engine: frozen linears keep nothing; LoRA linears their input (once where several read the same) and (N, R); a fused RMS
norm its input and one fp32 a row; a gated MLP gate and up; attention rotated q, k, v, output and log-sum-exp. What no
kernel runs (another architecture, a card) keeps what its own code keeps.
Cost: none; no torch.

Letters: T tokens of a micro-batch, L of an example, D hidden, A = heads x head size, KV the same of keys, I the MLP's
width, R rank, c bytes of the compute dtype, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from halfbyte.models.lora_sites import Site
from halfbyte.models.tensors import Facts
from halfbyte.plan.lines import Recompute

Mlp = Literal["gated", "gated_stock", "formula", "one", "relu"]
Attention = Literal["flash", "eager", "alibi", "padded", "dropped"]
PADDED = ("alibi", "padded")  # the body runs on rows padded to the longest example


@dataclass(frozen=True)
class Family:
    """How an architecture's layer is built, as far as memory can tell.

    `norms` that keep an input of their own. `mlp`: gated by the engine's kernel or by stock code; `formula`: GELU
    written as a formula (keeps four tensors); `one`: keeps its input; `relu`: keeps its output, which the
    next linear reads.
    `attention`: `flash` keeps no scores; `eager` (softcap) keeps them for each pair of tokens of an example, `alibi`
    and `padded` for each pair of a row; `dropped` is what `flash` becomes where the model drops some of its scores
    in training (GPT-2), which torch's flash kernel cannot. `parallel`: attention and MLP read one normed input.
    """

    norms: int = 2
    rms: bool = True
    qk_norms: bool = False
    mlp: Mlp = "gated"
    attention: Attention = "flash"
    parallel: bool = False
    fused_attention: bool = True
    window: bool = False


# An architecture that is not here is counted as the stock gated kind: an estimate, and the plan says so.
UNKNOWN = Family(mlp="gated_stock", fused_attention=False)
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "gemma"), Family()),
    "qwen3": Family(qk_norms=True),
    "gemma3_text": Family(norms=4, qk_norms=True, window=True),
    "gemma2": Family(norms=4, attention="eager", fused_attention=False),
    **dict.fromkeys(("granite", "smollm3", "phi3"), Family(mlp="gated_stock")),
    "gpt2": Family(rms=False, mlp="formula"),
    **dict.fromkeys(("phi", "gptj"), Family(norms=1, rms=False, mlp="formula", parallel=True)),
    "gpt_neox": Family(norms=1, rms=False, mlp="one"),
    "opt": Family(rms=False, mlp="relu"),
    "bloom": Family(rms=False, mlp="one", attention="alibi"),
    "mpt": Family(rms=False, mlp="one", attention="alibi"),
    "falcon": Family(norms=1, rms=False, mlp="one", attention="padded", parallel=True),
}


@dataclass(frozen=True)
class Layer:
    """Bytes of one token in one layer.

    kept: for backward, without recomputation. selective: where norms' outputs and the MLP's inner product are made
    again. entry: its input, which full recomputation keeps. idle: what the first layer does not keep, as nothing before
    it trains. mlp, mlp_again: for a moment above what is kept, in the MLP's backward, without and with selective
    recomputation. attention: the same in attention's backward, when the MLP's part is free again. pair, pair_moment:
    of each pair of tokens that attention keeps a score for, and for a moment; pair_again: what is more of them while a
    forward is done again (seen: one tensor in the compute dtype, where scores are made by the model's own code).
    """

    kept: float
    selective: float
    entry: float
    idle: float
    mlp: float
    mlp_again: float
    attention: float
    pair: float = 0.0
    pair_moment: float = 0.0
    pair_again: float = 0.0
    pairs: Attention = "flash"

    def of(self, recompute: Recompute) -> float:
        """Bytes a token and layer that stay until backward."""
        return {"none": self.kept, "selective": self.selective, "full": self.entry}[recompute]

    def moment(self, recompute: Recompute, rows: float, pairs: float, scores: float) -> float:
        """The largest moment of a layer's backward for `rows` tokens, above what is kept.

        Args:
            scores: bytes of attention's scores at once, where they are made in memory and not kept.
        """
        mlp = self.mlp_again if recompute == "selective" else self.mlp
        attention = self.attention * rows + self.pair_moment * pairs + scores
        again = (self.kept - self.entry) * rows + (self.pair + self.pair_again) * pairs if recompute == "full" else 0.0
        return again + max(mlp * rows, attention)


def family_of(facts: Facts) -> Family:
    return FAMILIES.get(facts.model_type, UNKNOWN)


def layer_of(
    facts: Facts, sites: Sequence[Site], itemsize: int, *, kernels: bool, dropout: bool, fused: bool = True
) -> Layer:
    """The mean layer of a decoder.

    Args:
        sites: every layer with an adapter; a layer's share is the mean over all layers.
        kernels: the engine's kernels run (a CPU, bf16 or fp32); else torch's own operations, as on a card.
        dropout: LoRA's, whose mask is made again by a kernel and kept (a byte a number) without one.
        fused: LoRA linears are the engine's; else PEFT's own, whose inputs are kept in fp32, twice with dropout.
    """
    family, c = family_of(facts), itemsize
    attention: Attention = family.attention
    if attention == "flash" and facts.attention_dropout and kernels:
        attention = "dropped"
    hidden, inner = facts.hidden, facts.intermediate * max(1, facts.experts_per_token)
    wide = facts.heads * facts.head_size or hidden
    narrow = facts.key_heads * facts.head_size or hidden
    norm = 4 + (c if kernels else 4) * hidden if family.rms else c * hidden + 2 * c
    before = _attention_kept(family, attention, facts, c, norm=norm, kernels=kernels)
    mlp: float = max(0, family.norms - max(1, family.norms // 2)) * norm
    mlp += _mlp(family.mlp, inner, c, kernels=kernels)
    if facts.residual_dropout:  # torch's dropout for CPUs keeps its mask as numbers
        before += (c if kernels else 1) * hidden
        mlp += (c if kernels else 1) * hidden

    adapters = _adapters_kept(
        sites, family, attention, c, layers=max(1, facts.layers), kernels=kernels, dropout=dropout, fused=fused
    )
    before, mlp = before + adapters.attention, mlp + adapters.mlp
    again, adapted, gated = adapters.again, adapters.reads, family.mlp == "gated"

    heads = facts.heads
    pair, pair_moment = {
        "flash": (0.0, 0.0), "eager": (heads * (4 + 2 * c) + 1.0, heads * (4 + 2 * c) + 1.0),
        "alibi": (heads * (4.0 + c), heads * (4.0 + c)), "padded": (heads * 4.0, heads * 4.0),
        "dropped": (heads * 12.0, heads * 4.0),  # scores, their mask and both together; the gradient of one
    }[attention]  # fmt: skip
    idle = norm if family.norms else 0.0
    if family.norms == 1 and not adapted & {"mlp", "inner"}:  # both branches read the embedding
        idle += _mlp(family.mlp, inner, c, kernels=kernels)
    kept = before + mlp

    def moment(*, again: bool) -> float:
        last = _mlp_moment(family.mlp, c * inner, adapted="inner" in adapted, dropout=dropout, again=again)
        return c * hidden + last

    return Layer(
        kept=kept,
        selective=kept - again,
        entry=c * hidden,
        idle=idle,
        mlp=moment(again=False),
        mlp_again=moment(again=kernels and gated and "inner" in adapted),
        attention=c * (3 * wide + 4 * narrow + hidden) - mlp,
        pair=pair,
        pair_moment=pair_moment,
        pair_again=heads * c if attention == "alibi" else 0.0,
        pairs=attention,
    )


def _attention_kept(family: Family, attention: Attention, facts: Facts, c: int, *, norm: float, kernels: bool) -> float:
    """Bytes a token that norms and attention keep; norms after the MLP not counted."""
    wide = facts.heads * facts.head_size or facts.hidden
    narrow = facts.key_heads * facts.head_size or facts.hidden
    kept = max(1, family.norms // 2) * norm  # attention, and the rest of them before or after the MLP
    if family.qk_norms:
        kept += (c if kernels else 4) * (wide + narrow) + 4 * (facts.heads + facts.key_heads)
    return (
        kept
        + {
            "flash": c * (2 * wide + 2 * narrow) + 4 * facts.heads,
            "eager": c * 3 * wide,  # keys and values under each query head
            "alibi": c * 3 * wide,
            "padded": 4 * 3 * wide,  # torch's own formula works in fp32, with keys and values under each query head
            "dropped": 4 * 3 * wide,  # so does this one
        }[attention]
    )


@dataclass(frozen=True)
class _Adapters:
    """Bytes a token and layer that adapters keep, in attention and in the MLP; `again` of both are made again under
    selective recomputation. `reads`: what linear layers with an adapter read."""

    attention: float
    mlp: float
    again: float
    reads: frozenset[str]


def _adapters_kept(
    sites: Sequence[Site],
    family: Family,
    attention: Attention,
    c: int,
    *,
    layers: int,
    kernels: bool,
    dropout: bool,
    fused: bool,
) -> _Adapters:
    """What adapters read is kept once, whoever reads it; the share of layers that have one. And (N, R) of each."""
    read = {(site.layer, _same(site.reads, parallel=family.parallel)): site.inputs for site in sites}
    kept, again = {False: 0.0, True: 0.0}, 0.0  # by: in the MLP
    for (_, what), width in read.items():
        is_there = (what == "attended" and attention == "flash" and kernels) or (
            what == "inner" and family.mlp == "relu"
        )
        size = 0.0 if is_there else c * width / layers
        remade = family.rms if what != "inner" else family.mlp == "gated"
        again += size if kernels and what in _REMADE and remade else 0
        kept[what in ("mlp", "inner")] += size
    for site in sites:
        size = c * site.rank / layers
        size += site.inputs / layers if dropout and not kernels and fused else 0
        size += site.inputs * (8 if dropout else 4) / layers if not fused else 0
        kept[site.reads in ("mlp", "inner")] += size
    return _Adapters(kept[False], kept[True], again, frozenset(what for _, what in read))


def _mlp_moment(kind: Mlp, inner: float, *, adapted: bool, dropout: bool, again: bool) -> float:
    """Bytes above what is kept at the worst moment of an MLP's backward, but for the gradient that comes in.

    Through the last matrix: the gradient of what it reads, and with an adapter that drops, two more of that size (what
    was dropped, and the adapter's own gradient). Through the activation: that gradient and those of its inputs; what an
    adapter read is free then. `again`: what the last matrix reads is made again, not kept.
    """
    last = inner * ((3 if dropout else 1) + again if adapted else 1)
    activation = inner * (2 if kind in ("one", "relu") else 3)
    if adapted and not again and kind != "relu":
        activation -= inner
    return max(last, activation)


def pairs_of(layer: Layer, lengths: Sequence[int]) -> float:
    """How many pairs of tokens attention keeps scores for, in a micro-batch of examples of these lengths."""
    if layer.pairs == "flash":
        return 0.0
    if layer.pairs in PADDED:
        return float(len(lengths) * max(lengths, default=0) ** 2)
    return float(sum(length * length for length in lengths))


def _mlp(kind: Mlp, inner: int, c: int, *, kernels: bool) -> float:
    tensors = {"gated": 2 if kernels else 3, "gated_stock": 3, "formula": 4, "one": 1, "relu": 1}[kind]
    return tensors * c * inner


_REMADE = ("attention", "mlp", "inner")  # what `fuse.recompute_cheap` makes again: norms' outputs, the inner product


def _same(what: str, *, parallel: bool) -> str:
    return "attention" if parallel and what == "mlp" else what

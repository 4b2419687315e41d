"""What one decoder layer takes of a token: what backward needs of it, and what is there for a moment while it runs.

Source: the engine itself. Every formula here was read off `torch.autograd.graph.saved_tensors_hooks` on real models of
the family, and `tests/plan/test_layer.py` compares both again, byte for byte, so that they cannot drift apart.
Engine: frozen linears keep nothing; LoRA linears their input (once where several read the same) and (N, R); a fused RMS
norm its input and one fp32 a row; a gated MLP gate and up; attention rotated q, k, v, output and log-sum-exp. What no
kernel runs (another architecture, a card) keeps what its own code keeps.
Cost: none; no torch.

Letters: N tokens, R rank, c bytes of the compute dtype.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from halfbyte.layers.experts.sizes import BUSIEST, FILL, LEAST_AT_ONCE, max_at_once, padded_rows
from halfbyte.models.families import FAMILIES, UNKNOWN, UNKNOWN_MIXTURE, AttentionKind, Family, MlpKind
from halfbyte.models.lora_sites import Site
from halfbyte.models.tensors import Facts, Recurrence
from halfbyte.plan.result import Recompute

PADDED = ("alibi", "padded")  # the body runs on rows padded to the longest example
NO_SCORES = ("flash", "window")  # a kernel makes them in cache
# Products of both stacks of experts, forward and backward, without and with LoRA on them.
PRODUCTS, ADAPTED_PRODUCTS = 4, 16
# Of a token and head of a recurrence, in fp32: the decay, what it is multiplied with, and what both are made of.
DECAY_BYTES = 16
# Of a token: its place in the order for each of its experts (three 64-bit numbers), and scores in fp32 for all experts.
ROUTED_BYTES, SCORED_BYTES = 24, 4
# Tensors as wide as the MLP, that it keeps; and by a kernel, which also makes what the last matrix reads again.
_TENSORS = {"gated": 3, "gated_stock": 3, "formula": 4, "one": 1, "relu": 1}
_BY_KERNELS = {"gated": 2, "formula": 1, "one": 1}


@dataclass(frozen=True)
class Layer:
    """Bytes of one token in one layer.

    kept: for backward, without recomputation. selective: where norms' outputs and the MLP's inner product are made
    again. entry: its input, which full recomputation keeps. idle: what the first layer does not keep, as nothing before
    it trains. mlp, mlp_again: for a moment above what is kept, in the MLP's backward, without and with selective
    recomputation. attention: the same in attention's backward, when the MLP's part is free again. pair, pair_moment:
    of each pair of tokens that attention keeps a score or a mask for, and for a moment; pair_again: extra bytes of each
    pair while a forward is done again (seen: one tensor in the compute dtype, where the model's own code makes scores).
    pairs: the kind of attention, which says what pairs there are; examples longer than `window` have a mask. least: of
    a moment of experts, which take some tokens at once however few there are.
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
    pairs: AttentionKind = "flash"
    window: int = 0
    least: float = 0.0

    def of(self, recompute: Recompute) -> float:
        """Bytes a token and layer that stay until backward."""
        return {"none": self.kept, "selective": self.selective, "full": self.entry}[recompute]

    def moment(self, recompute: Recompute, rows: float, pairs: float, scores: float) -> float:
        """The largest moment of a layer's backward for `rows` tokens, above what is kept. `scores`: bytes of
        attention's scores at once, where they are made in memory and not kept."""
        mlp = self.mlp_again if recompute == "selective" else self.mlp
        attention = self.attention * rows + self.pair_moment * pairs + scores
        again = (self.kept - self.entry) * rows + (self.pair + self.pair_again) * pairs if recompute == "full" else 0.0
        return again + max(mlp * rows + self.least, attention)


def layer_of(
    facts: Facts, sites: Sequence[Site], itemsize: int, *, kernels: bool, dropout: bool, fused: bool = True,
    longest: int = 0,
) -> Layer:  # fmt: skip
    """The mean layer of a decoder.

    Args:
        sites: every layer with an adapter; a layer's share is the mean over all layers.
        kernels: the engine's kernels run (a CPU, bf16 or fp32); else torch's own operations, as on a card.
        dropout: LoRA's, whose mask is made again by a kernel and kept (a byte a number) without one.
        fused: LoRA linears are the engine's; else PEFT's own, whose inputs are kept in fp32, twice with dropout.
        longest: tokens of the longest row; a layer whose window is shorter keeps more. 0: a kernel has all windows.
    """
    c, layers = itemsize, max(1, facts.layers)
    family = FAMILIES.get(facts.model_type, UNKNOWN_MIXTURE if facts.experts else UNKNOWN)
    attention = family.attention
    sliding = {n: window for n, window in enumerate(facts.windows) if 0 < window < longest}
    if attention == "flash" or (attention in PADDED and kernels):
        attention = "window" if sliding else "flash"
    hidden = facts.hidden
    heads, share = facts.heads, len(sliding) / layers
    wide, narrow = heads * facts.head_size or hidden, facts.key_heads * facts.head_size or hidden
    saved, mlp, norm, of_mlp = _frozen_saved(family, attention, facts, c, share, kernels=kernels)
    there = set(range(layers)) - set(sliding) - _unattended(facts) if kernels and attention in NO_SCORES else set[int]()
    (more, more_mlp, remade), adapted = _adapters_saved(
        sites, family, c, layers, there, facts.experts_per_token, kernels=kernels, dropout=dropout, fused=fused
    )
    saved, mlp = saved + more, mlp + more_mlp

    pair, pair_moment = {
        "flash": (0.0, 0.0), "window": (c * share, 0.0),
        "eager": (heads * (4 + 2 * c) + 1.0, heads * (4 + 2 * c) + 1.0),
        "alibi": (heads * (4.0 + c), heads * (4.0 + c)), "padded": (heads * 4.0, heads * 4.0),
    }[attention]  # fmt: skip
    # gradients of what a recurrence reads, before and behind its convolution, and of what it returns
    widest = max((3 * r.channels + 2 * r.inner for r in facts.recurrences), default=0)
    both = family.norms == 1 and not adapted & {"mlp", "inner"}  # branches read the embedding
    moments, least = _moments(family, facts, c, adapted, kernels=kernels, dropout=dropout)
    return Layer(
        kept=saved + mlp, selective=saved + mlp - remade, entry=c * hidden, idle=norm + (of_mlp if both else 0),
        mlp=moments[0], mlp_again=moments[1], attention=c * (max(3 * wide + 4 * narrow, widest) + hidden) - mlp,
        pair=pair, pair_moment=pair_moment, pair_again=heads * c if attention == "alibi" else 0.0, pairs=attention,
        window=max(sliding.values(), default=0), least=least,
    )  # fmt: skip


def _frozen_saved(
    family: Family, attention: AttentionKind, facts: Facts, c: int, share: float, *, kernels: bool
) -> tuple[float, float, float, float]:
    """Bytes a token without adapters: around attention, in the MLP; and of these one norm's, the MLP's without norms.
    `share`: of the layers, that have a window shorter than a row."""
    hidden, inner = facts.hidden, c * facts.intermediate * max(1, facts.experts_per_token)
    wide, narrow = facts.heads * facts.head_size or hidden, facts.key_heads * facts.head_size or hidden
    number = c if kernels else 4  # bytes of a number that a norm keeps

    norm = 4 + number * hidden if family.rms else c * hidden + (8 if kernels else 2 * c)
    around_attention = max(1, family.norms // 2)
    if family.mlp == "experts":
        of_mlp = _experts_saved(facts, c, kernels=kernels) + c * hidden * family.shared_gate
    else:
        of_mlp = inner * ((_BY_KERNELS if kernels else {}).get(family.mlp) or _TENSORS[family.mlp])
    mlp: float = (family.norms - around_attention) * norm + of_mlp
    saved: float = around_attention * norm
    attending = 1.0 - len(_unattended(facts)) / max(1, facts.layers)  # layers' share
    if attention in NO_SCORES:
        saved += attending * (c * (2 * wide + 2 * narrow) + 4 * facts.heads)
        saved += c * (wide + narrow) * share if family.fused_qkv else 0
    else:  # keys and values under each query head; torch's own formula works in fp32
        saved += attending * (4 if attention == "padded" else c) * 3 * wide
    if family.qk_norms:
        # OLMo's are over all heads, and its rotary tables in fp32, so that each layer keeps its own
        more = 8 + 2 * c * facts.head_size if family.post_norms else 4 * (facts.heads + facts.key_heads)
        saved += attending * (number * (wide + narrow) + more)
    if family.gated_attention:
        saved += attending * c * 2 * wide
    saved += sum(_recurrence_saved(r, c) for r in facts.recurrences) / max(1, facts.layers)
    if facts.residual_dropout and not (kernels and family.dropout_modules):  # torch's mask on a CPU is of numbers
        saved, mlp = (part + (c if kernels else 1) * hidden for part in (saved, mlp))
    return saved, mlp, norm, of_mlp


def _unattended(facts: Facts) -> set[int]:
    """Layers without attention."""
    return {r.layer for r in facts.recurrences if r.alone}


def _recurrence_saved(r: Recurrence, c: int) -> float:
    """Bytes a token of one recurrent part: what the convolution reads, which is three parts where it is gated; what the
    recurrence reads behind it; what it returns, and the gate; and its decays."""
    if not r.heads:
        return c * 3 * r.channels
    return c * 2 * (r.channels + r.inner) + DECAY_BYTES * r.heads


def _adapters_saved(
    sites: Sequence[Site], family: Family, c: int, layers: int, there: set[int], per_token: int, *, kernels: bool,
    dropout: bool, fused: bool,
) -> tuple[tuple[float, float, float], set[str]]:  # fmt: skip
    """Bytes a token and layer that adapters keep: around attention, in the MLP, and of both what selective
    recomputation makes again; and what linear layers with an adapter read. `there`: layers in which attention keeps
    what it returns. Elsewhere an adapter reads a copy. `per_token`: experts."""
    # what adapters read is kept once, whoever reads it
    read = {
        (s.layer, "attention" if family.parallel and s.reads == "mlp" else s.reads): s.inputs
        for s in sites
        if s.reads != "experts"
    }
    saved, again = {False: 0.0, True: 0.0}, 0.0  # by: in the MLP
    for (layer, what), width in read.items():
        if (what == "attended" and layer in there) or (what == "inner" and family.mlp == "relu"):
            continue
        size = c * width / layers
        # `fuse.recompute_cheap` makes outputs of norms and the MLP's inner product again
        if kernels and what != "attended" and (family.mlp in _BY_KERNELS if what == "inner" else not family.post_norms):
            again += size
        saved[what in ("mlp", "inner")] += size
    saved[True] += sum(c * s.rank * per_token for s in sites if s.reads == "experts") / layers
    for site in (site for site in sites if site.reads != "experts"):
        size = c * site.rank + (site.inputs if dropout and not kernels and fused else 0)
        size += 0 if fused else site.inputs * (8 if dropout else 4)
        saved[site.reads in ("mlp", "inner")] += size / layers
    return (saved[False], saved[True], again), {what for _, what in read}


def _moments(
    family: Family, facts: Facts, c: int, adapted: set[str], *, kernels: bool, dropout: bool
) -> tuple[list[float], float]:
    """Bytes a token at the worst moment of an MLP's backward, without and with selective recomputation; and bytes that
    it takes however few tokens there are."""
    if family.mlp == "experts":
        moment, least = _experts_moment(facts, c)
        return [c * facts.hidden + moment] * 2, least
    inner = c * facts.intermediate * max(1, facts.experts_per_token)
    return [
        c * facts.hidden + _mlp_moment(family.mlp, inner, adapted="inner" in adapted, dropout=dropout, again=again)
        for again in (False, kernels and family.mlp == "gated" and "inner" in adapted)
    ], 0.0


def _experts_saved(facts: Facts, c: int, *, kernels: bool) -> float:
    """Bytes a token that a mixture keeps: its input, what the first stack makes for each of the token's experts, who
    goes where, the router's scores, and what shared experts keep."""
    pairs = facts.experts_per_token * (2 * c * facts.intermediate + ROUTED_BYTES)
    return (
        c * facts.hidden + pairs + SCORED_BYTES * facts.experts + (2 if kernels else 3) * c * facts.shared_intermediate
    )


def _experts_moment(facts: Facts, c: int) -> tuple[float, float]:
    """(bytes a token, bytes in any case) for a moment in the backward of experts: the fp32 sum of the gradient, and for
    the tokens of one expert that are taken at once, rows as wide as the hidden state and as its inner product."""
    hidden, inner = facts.hidden, facts.intermediate
    a_row = c * (3 * hidden + 4 * inner) + 4 * max(2 * inner, hidden)
    share = min(1.0, BUSIEST * facts.experts_per_token / max(1, facts.experts))
    return 4 * hidden + share * a_row, LEAST_AT_ONCE * a_row


def expert_products(facts: Facts, tokens: int, *, adapted: bool) -> int:
    """Shapes of the products of a mixture's experts in micro-batches of `tokens`: one for each number of rows that one
    expert's may be filled up to."""
    rows_at_once = min(tokens, max_at_once(tokens * facts.experts_per_token, facts.experts))
    sizes = {padded_rows(rows) for rows in range(FILL, rows_at_once + FILL, FILL)}
    return len(sizes) * (ADAPTED_PRODUCTS if adapted else PRODUCTS)


def _mlp_moment(kind: MlpKind, inner: float, *, adapted: bool, dropout: bool, again: bool) -> float:
    """Bytes above what is kept at the worst moment of an MLP's backward, but for the gradient that comes in.

    Through the last matrix: the gradient of what it reads, and with an adapter that drops, two more of that size (what
    was dropped, and the adapter's own gradient). Through the activation: that gradient and those of its inputs; what an
    adapter read is free then. `again`: what the last matrix reads is made again, not kept.
    """
    last = inner * ((3 if dropout else 1) + again if adapted else 1)
    activation = inner * (2 if kind in ("one", "relu", "formula") else 3)
    if adapted and not again and kind != "relu":
        activation -= inner
    return max(last, activation)


def pairs_of(layer: Layer, lengths: Sequence[int]) -> float:
    """How many pairs of tokens attention keeps a score or a mask for, in a micro-batch of examples of these lengths."""
    if layer.pairs == "flash":
        return 0.0
    if layer.pairs in PADDED:
        return float(len(lengths) * max(lengths, default=0) ** 2)
    if layer.pairs == "window":
        lengths = [length for length in lengths if length > layer.window]
        if len(set(lengths)) == 1:  # neighbours of one length share a mask; among rows of many lengths they are few
            lengths = lengths[:1]
    return float(sum(length * length for length in lengths))

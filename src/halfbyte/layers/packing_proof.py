"""The proof at start that a model keeps packed examples apart, on the user's own model, and the setting of all proofs.

What: a few examples packed must give the logits that each gives alone on the stock path, and changing one must leave
the others as they were. The first layout in which that holds is used.
Setting: fp32, so that two orders of the same sums differ by 1e-6 and a fault by more than the tolerance; the first rows
of the vocabulary only, so that embedding and head cost nothing; and a row longer than every window or chunk of the
model, where the run has such rows and it can be afforded.
Why a proof: a model that lets examples see each other trains without any error, on something else.
Cost: some fifteen forward passes of 15 tokens, at start; with a long row two of its length more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from halfbyte.errors import first_line
from halfbyte.layers import sight
from halfbyte.layers.experts.layout import is_routed
from halfbyte.layers.packed_attention import NAME
from halfbyte.layers.packing import Layout, asked_attention, forward_inputs, install, layouts
from halfbyte.models import structure
from halfbyte.quant import bnb, dequantise, formats, int8
from halfbyte.system import accelerator

if TYPE_CHECKING:
    from halfbyte.types import Batch, Model

SHORT = (5, 1, 9)  # uneven, with the shortest possible example inside
TOKENS = 256  # of the vocabulary, as many as a proof uses
PAST_WINDOW = 16  # by so many tokens a long row is longer than a window
LOOK_TOKENS = 8192  # how far is looked for windows where the longest row of a run is not known
# Tokens of a long row times weights of the layers that it runs through: about a second a forward pass on two cores.
LONG_ROW_PRODUCTS = 1e11
EXACT_BYTES = 1e9  # that fp32 copies of what is not quantised may take in a proof
# The largest ||difference|| / ||logits|| of a token, in units of the dtype's epsilon. Packed and alone multiply
# matrices of different shapes, so sums round in another order, once or twice a layer. Measured on a 30-layer model and
# a CPU: 10 in fp32, 0.3 in fp16, 0 in bf16; where examples saw each other, logits differed by 40 to 100%.
_TOLERANCE_EPS = {torch.bfloat16: 6.0, torch.float16: 30.0, torch.float32: 1000.0, torch.float64: 1000.0}

# The same for a mixture in 16 bits, of its median token: where two experts are as good for a token, rounding chooses
# between them. Seen on tiny ones: 63% of one token's logits, 6% of all gradients.
ROUTED = 0.3


@dataclass(frozen=True)
class Proof:
    """What `prove` found. `reason` says in words what was tried; `max_rel_diff` belongs to the layout in use."""

    ok: bool
    reason: str
    max_rel_diff: float
    layout: Layout = "single"

    @property
    def mode(self) -> str:
        return "packed" if self.ok else "single"


def prove(model: Model, longest: int | None = None) -> Proof:
    """Find the first layout in which examples are really apart, and leave the model set up for it.

    The model's modes and the global random state are as before afterwards.

    Args:
        longest: tokens of the longest row of the run, where it is known.
    """
    lm = structure.causal_lm(model)
    install(lm, "single")
    stock: str = lm.config._attn_implementation
    tried: list[str] = []
    with as_given(model), torch.no_grad():
        model.eval()
        for layout in layouts(lm):
            try:
                install(lm, layout)
                long, untried = long_row(lm, longest)
                problem, difference = _compare(lm, layout, stock, long)
            except Exception as error:  # of the model's own code; the repair: the next layout, at last single
                problem, difference, untried = f"{type(error).__name__}: {first_line(error)}", float("inf"), ""
            if problem is None:
                install(lm, layout)
                note = f"; before: {'; '.join(tried)}" if tried else ""
                return Proof(True, f"{layout}: packed = alone{untried}{note}", difference, layout)
            tried.append(f"{layout}: {problem}")
            _stock(lm, stock)
    if asked := asked_attention(lm):
        lm.set_attn_implementation(asked)
    return Proof(False, "; ".join(tried) or "this model has no way to take packed examples", float("inf"))


def _stock(lm: Model, implementation: str) -> None:
    install(lm, "single")
    if lm.config._attn_implementation != implementation:
        lm.set_attn_implementation(implementation)


def _compare(lm: Model, layout: Layout, stock: str, long: int) -> tuple[str | None, float]:
    """(what is wrong or None, the largest relative difference): in fp32 and in the model's own dtype."""
    worst = 0.0
    for exact in precisions(lm):
        with few_tokens(lm, exact=exact):
            allowed = _TOLERANCE_EPS.get(lm.dtype, 6.0) * torch.finfo(lm.dtype).eps
            routed = is_routed(lm) and not exact
            allowed = max(allowed, ROUTED) if routed else allowed
            examples = random_examples(lm, SHORT)
            rows = [*examples, *random_examples(lm, (long,) if long and worst == 0.0 else (), seed=1)]
            _stock(lm, stock)
            alone = [logits(lm, [ids]) for ids in rows]
            install(lm, layout)
            for count in sorted({len(examples), len(rows)}):  # the short ones, and with the long one
                got = logits(lm, rows[:count]).split([len(ids) for ids in rows[:count]])
                worst = max(worst, *(_difference(p, a, routed=routed) for p, a in zip(got, alone, strict=False)))
                if not worst <= allowed:
                    return f"logits differ by {worst:.1e} from each example alone (allowed {allowed:.1e})", worst
            moved = _moved(lm, examples, routed=routed)
            if not moved[0] <= allowed:
                return f"changing example {moved[1]} moves example {moved[2]} by {moved[0]:.1e}", moved[0]
    return None, worst


def _moved(lm: Model, examples: Sequence[Tensor], *, routed: bool) -> tuple[float, int, int]:
    """(the largest difference, the example that was changed, the one that it moved)."""
    before = logits(lm, examples).split(SHORT)
    worst = (0.0, 0, 0)
    for changed, ids in enumerate(examples):
        others = [e if i != changed else (ids + 1) % tokens_of(lm) for i, e in enumerate(examples)]
        after = logits(lm, others).split(SHORT)
        for i in range(len(examples)):
            moved = _difference(after[i], before[i], routed=routed)
            if i != changed and not moved <= worst[0]:
                worst = (moved, changed, i)
    return worst


def _difference(got: Tensor, wanted: Tensor, *, routed: bool = False) -> float:
    """The largest ||got - wanted|| / ||wanted|| of a token; NaN if there is one. `routed`: the median of several."""
    off = (got - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp_min(1e-30)
    if routed and not off.isnan().any():
        return float(off.median()) if len(off) > 1 else 0.0
    return float(off.max())


def logits(lm: Model, examples: Sequence[Tensor]) -> Tensor:
    """(T, V) in fp32: one packed forward, through `forward_inputs` as in training."""
    made: Tensor = lm(**forward_inputs(lm, pack(examples))).logits[0].float()
    return made


def pack(examples: Sequence[Tensor]) -> Batch:
    """Examples laid end to end."""
    lengths = torch.tensor([len(e) for e in examples])
    return {
        "input_ids": torch.cat(list(examples))[None],
        "position_ids": torch.cat([torch.arange(len(e)) for e in examples])[None],
        "cu_seq_lens_q": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int(),
    }


def random_examples(lm: Model, lengths: Sequence[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)  # its own: the run's random numbers stay what they would have been
    return [torch.randint(tokens_of(lm), (n,), generator=generator).to(lm.device) for n in lengths]


def tokens_of(lm: Model) -> int:
    trained = max((len(rows) for m in _of_rows(lm) for rows in m.token_indices.values()), default=0)
    return min(TOKENS + trained, int(lm.config.get_text_config().vocab_size))


def _of_rows(lm: Model) -> list[Any]:
    """PEFT's layers that train rows of an embedding or head; those that are tied share theirs."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    return [m for m in lm.modules() if isinstance(m, TrainableTokensLayer)]


def long_row(lm: Model, longest: int | None) -> tuple[int, str]:
    """(tokens of a row longer than every window and chunk, 0 where none is needed or affordable; what is not tried).

    Windows are those that the layers show; in another layout than ours, which runs transformers' own masks, none do.
    """
    body = structure.body(lm)
    if lm.config._attn_implementation != NAME:
        return 0, ""
    positions = int(getattr(lm.config.get_text_config(), "max_position_embeddings", None) or LOOK_TOKENS)
    most = longest or min(positions, LOOK_TOKENS)
    sight.look(body, most)
    layers = structure.decoder_layers(body)
    seen = [sight.of(layer) for layer in layers]
    windows = [s.causal for s in seen if s is not None and 0 < s.causal < most]
    if not windows:
        return 0, ""
    tokens = min(most, max(windows) + PAST_WINDOW)
    modules = [m for layer in layers for m in layer.modules()]
    weights = sum(p.numel() * (1 + formats.is_quantised(m)) for m in modules for p in m.parameters(recurse=False))
    if tokens * weights <= LONG_ROW_PRODUCTS:
        return tokens, ""
    return 0, f" (rows longer than the window of {max(windows)} were not tried: too slow; it is read off the mask)"


@contextmanager
def as_given(model: Model) -> Iterator[None]:
    """Every module's mode and the random state as they were, afterwards."""
    training = {m: m.training for m in model.modules()}
    try:
        with accelerator.random_kept(p.device for p in model.parameters()):
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def precisions(model: Model) -> tuple[bool, ...]:
    """In which precisions a proof is made: in fp32 (True) where it can be afforded, then in the model's own dtype."""
    lm = structure.causal_lm(model)
    if lm.dtype in (torch.float32, torch.float64):
        return (True,)
    return (True, False) if sum(d.nbytes * 2 for _, d in _widened(model)) <= EXACT_BYTES else (False,)


@contextmanager
def few_tokens(model: Model, *, exact: bool) -> Iterator[None]:
    """The model with the first rows of its vocabulary, computing in fp32 if `exact`. As before afterwards."""
    lm = structure.causal_lm(model)
    (embeddings, _), count = structure.around(lm), tokens_of(lm)
    padding = getattr(embeddings, "padding_idx", None)
    saved = [(t, t.data) for t in (*_vocabulary(lm), *(t for t, _ in _widened(model)))]
    dtypes = [
        (m, m.compute_dtype, m.weight.quant_state.dtype) for _, m in bnb.linears_4bit(model) if formats.is_quantised(m)
    ]
    trained = [(m, dict(m.token_indices)) for m in _of_rows(lm) if m.tied_adapter is None]
    # rows that train are, for the moment, among these, and met by the examples
    first = dict.fromkeys([*torch.cat(random_examples(lm, SHORT)).tolist(), *range(count)])
    try:
        for rows in _vocabulary(lm):
            rows.data = rows.data[:count]
        for module, indices in trained:
            module.token_indices.update({name: [*first][: len(own)] for name, own in indices.items()})
        if padding is not None and padding >= count:
            embeddings.padding_idx = None
        if exact:
            for tensor, _ in _widened(model):
                tensor.data = tensor.data.float()
            bnb.set_compute_dtype(model, torch.float32)
        with int8.without_rounding(model):
            yield
    finally:
        for tensor, data in reversed(saved):
            tensor.data = data
        for module, indices in trained:
            module.token_indices.update(indices)
        for module, compute, stored in dtypes:
            module.compute_dtype, module.weight.quant_state.dtype = compute, stored
        if padding is not None:
            embeddings.padding_idx = padding
        dequantise.forget()


def _widened(model: Model) -> list[tuple[Tensor, Tensor]]:
    """What must be made fp32 for a proof in fp32, and the part of it that is needed."""
    lm = structure.causal_lm(model)
    packed = {id(m.weight) for _, m in bnb.linears_4bit(model)}
    rows = {id(p) for p in _vocabulary(lm)}
    halves = (t for t in (*model.parameters(), *model.buffers()) if t.dtype in (torch.bfloat16, torch.float16))
    return [(t, t.data[: tokens_of(lm)] if id(t) in rows else t.data) for t in halves if id(t) not in packed]


def _vocabulary(lm: Model) -> list[nn.Parameter]:
    """The frozen parameters of embedding and head, which have a row for each token; a tied one once."""
    plain = [m for m in structure.around(lm) if isinstance(m, nn.Embedding) or type(m) is nn.Linear]
    return list({id(p): p for m in plain for p in m.parameters(recurse=False) if not p.requires_grad}.values())

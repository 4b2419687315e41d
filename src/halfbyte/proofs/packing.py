"""The proof at start that a model keeps packed examples apart, on the user's own model.

What: a few examples packed must give the logits that each gives alone on the stock path, and changing one must leave
the others as they were. The first layout in which that holds is used (`setting.py` says in what the proof computes).
Why a proof: a model that lets examples see each other trains without any error, on something else.
Cost: some fifteen forward passes of 15 tokens, at start; with a long row two of its length more.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from halfbyte.layers.experts.layout import is_routed
from halfbyte.layers.packing import Layout, asked_attention, install, layouts
from halfbyte.models import structure
from halfbyte.models.context import rope_changes_at
from halfbyte.proofs import setting
from halfbyte.proofs.closeness import row_distances
from halfbyte.types import Model

# The largest ||difference|| / ||logits|| of a token, in units of the dtype's epsilon. Packed and alone multiply
# matrices of different shapes, so sums round in another order, once or twice a layer. Measured on a 30-layer model and
# a CPU: 10 in fp32, 0.3 in fp16, 0 in bf16; where examples saw each other, logits differed by 40 to 100%.
_TOLERANCE_EPS = {torch.bfloat16: 6.0, torch.float16: 30.0, torch.float32: 1000.0, torch.float64: 1000.0}


def allowed(lm: Model, *, exact: bool) -> float:
    """How far a token's logits may be apart, relative to their norm, in another company. `exact`: in fp32, in which
    hardly any token is between two experts."""
    rounding = _TOLERANCE_EPS.get(lm.dtype, 6.0) * torch.finfo(lm.dtype).eps
    return max(rounding, setting.ROUTED) if is_routed(lm) and not exact else rounding


def prove_packing(model: Model, longest: int | None = None, *, alone: bool = False) -> setting.StartProof:
    """Find the first layout in which examples are really apart, and leave the model set up for it.

    The model's modes and the global random state are as before afterwards.

    Args:
        longest: tokens of the longest row of the run, where it is known.
        alone: no two texts will share a forward; then one that has it for itself must be as on the stock path.
    """
    lm = structure.causal_lm(model)
    install(lm, "single")
    stock: str = lm.config._attn_implementation
    tried: list[str] = []
    edge = None if alone or longest is None else rope_changes_at(lm.config)
    if edge is not None and longest is not None and longest > edge:  # a proof of so long a row is not affordable
        why = f"texts of more than {edge:,} tokens have other rotary frequencies, in a pack all of it"
        return setting.StartProof(False, f"{why}; data.max_length {edge} packs them", math.inf)
    with setting.as_given(model), torch.no_grad():
        model.eval()
        for layout in layouts(lm):
            untried: list[str] = []
            problem, difference = setting.attempt(partial(_compare, lm, layout, stock, longest, untried, alone=alone))
            if not problem:
                install(lm, layout)
                note = f"; before: {'; '.join(tried)}" if tried else ""
                what = "one text = on the stock path" if alone else "packed = alone"
                return setting.StartProof(True, f"{layout}: {what}{''.join(untried)}{note}", difference, layout)
            tried.append(f"{layout}: {problem}")
            _install_stock(lm, stock)
    if asked := asked_attention(lm):
        lm.set_attn_implementation(asked)
    return setting.StartProof(False, "; ".join(tried) or "this model has no way to take packed examples", math.inf)


def _install_stock(lm: Model, implementation: str) -> None:
    install(lm, "single")
    if lm.config._attn_implementation != implementation:
        lm.set_attn_implementation(implementation)


def _compare(
    lm: Model, layout: Layout, stock: str, longest: int | None, untried: list[str], *, alone: bool
) -> tuple[str, float]:
    """(what is wrong or nothing, the largest relative difference): in fp32 and in the model's own dtype. What was not
    tried goes into `untried`."""
    install(lm, layout)
    long, why = setting.long_row(lm, longest)
    untried.append(why)
    worst = 0.0
    for exact in setting.precisions(lm):
        with setting.few_tokens(lm, exact=exact):
            within = allowed(lm, exact=exact)
            routed = is_routed(lm) and not exact
            examples = setting.random_examples(lm, setting.SHORT[-1:] if alone else setting.SHORT)
            rows = [*examples, *setting.random_examples(lm, (long,) if long and worst == 0.0 else (), seed=1)]
            _install_stock(lm, stock)
            each = [setting.logits(lm, [ids]) for ids in rows]
            install(lm, layout)
            # the short ones, and with the long one
            groups = [[row] for row in rows] if alone else [rows[:n] for n in sorted({len(examples), len(rows)})]
            expected = [[logits] for logits in each] if alone else [each[: len(group)] for group in groups]
            for group, wanted in zip(groups, expected, strict=True):
                packed = setting.logits(lm, group).split([len(ids) for ids in group])
                worst = max(worst, *(_difference(p, w, routed=routed) for p, w in zip(packed, wanted, strict=True)))
                if not worst <= within:
                    return f"logits differ by {worst:.1e} from each example alone (allowed {within:.1e})", worst
            if alone:
                continue
            moved, changed, example = _largest_influence(lm, examples, routed=routed)
            if not moved <= within:
                return f"changing example {changed} moves example {example} by {moved:.1e}", moved
    return "", worst


def _largest_influence(lm: Model, examples: Sequence[Tensor], *, routed: bool) -> tuple[float, int, int]:
    """(the largest difference, the example that was changed, the one that it moved)."""
    before = setting.logits(lm, examples).split(setting.SHORT)
    worst = (0.0, 0, 0)
    for changed, ids in enumerate(examples):
        others = [e if i != changed else (ids + 1) % setting.tokens_of(lm) for i, e in enumerate(examples)]
        after = setting.logits(lm, others).split(setting.SHORT)
        for i in range(len(examples)):
            moved = _difference(after[i], before[i], routed=routed)
            if i != changed and moved > worst[0]:
                worst = (moved, changed, i)
    return worst


def _difference(got: Tensor, expected: Tensor, *, routed: bool) -> float:
    """The largest distance of a token; infinite if one is not a number. `routed`: the median of several."""
    distances = row_distances(got, expected)
    if routed and bool(distances.isfinite().all()):
        return float(distances.median()) if len(distances) > 1 else 0.0
    return float(distances.max())

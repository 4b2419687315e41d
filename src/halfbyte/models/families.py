"""Every architecture that is known, described once: how its layers are built, and what its tensors are called.

Why: fusing (`layers/fuse.py`), planning (`plan/layer.py`), decoding (`layers/decoding/llama.py`) and the list of
tensors from a config alone (`describe.py`) read the same line. A new architecture is a line in `families.toml`.
What no line says is seen on the modules themselves: which formula a norm computes, what a mask lets a layer see.
Source: `transformers/models/*/modeling_*.py`; tests build each family there and compare tensors, kept bytes, gradients.
Cost: none; no torch.
"""

import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

MlpKind = Literal["gated", "gated_stock", "formula", "one", "relu", "experts"]
AttentionKind = Literal["flash", "window", "eager", "alibi", "padded"]
FusedPart = Literal["attention", "layer"]


@dataclass(frozen=True)
class Layout:
    """The names of a family's tensors, and a letter for each of their sizes.

    V vocabulary, D hidden, N the embedding's width (D but in OPT), I the MLP's width, G two of them, A all query heads,
    K all key heads, Q both and the values, H one head, T 3 D, F 4 D, P positions, O the two more that OPT has.
    `linears` and `norms` are of one layer, `outer_norms` and `more` around the layers. Linears whose name matches
    `biased` have a bias. `tied`: what the architecture does with its head unless the config says.
    """

    embedding: str
    layers: str
    outer_norms: str
    linears: str
    norms: str = "input_layernorm post_attention_layernorm"
    biased: str = ""
    norm_bias: bool = True
    more: str = ""
    head: str = "lm_head"
    head_bias: bool = False
    tied: bool = False


@dataclass(frozen=True)
class Family:
    """How an architecture's layer is built.

    Args:
        layout: its tensors; None where they do not follow from the config alone.
        classes: what the names of its classes begin with, where their forwards are Llama's, so that the engine's own
            may take their place (`fused_part`).
        norms: that keep an input of their own; four are a sandwich. rms: they are RMS norms, else layer norms.
        qk_norms: queries and keys are normed, head by head.
        mlp: `gated` by the engine's kernel or by stock code (`gated_stock`); `formula`: GELU written as a formula
            (keeps four tensors); `one`: keeps its input; `relu`: keeps its output, which the next linear reads;
            `experts`: those of a mixture by `layers/experts` (its input and the inner product of each of a token's
            experts), beside them what is shared by stock code.
        attention: `flash` keeps no scores; `eager` (softcap) keeps them for each pair of tokens of an example, `alibi`
            and `padded` for each pair of a row, where `layers/by_mask.py` has no kernel. `flash` becomes `window` where
            a layer's window is shorter than a row and attention is no one kernel of ours: that layer takes each example
            by torch's, with a mask, and of a `fused_qkv` projection keeps all for its values.
        parallel: attention and MLP read one normed input.
        own_attention: its attention is not Llama's. own_sums: a layer is not x + factor f(norm(x)) twice.
        post_norms: it norms behind attention and MLP, not before.
        dropout_modules: what it drops of the residual stream goes through modules, which the engine's kernel takes.
        shared_gate: what shared experts give is multiplied by a gate of its own, which keeps it.
        gated_attention: what attention returns is multiplied by a gate, and both are kept.
        stock_gate: what stands between an expert's two stacks is the model's own code.
        encoder: it sees to both sides, and has no head of a language model. pooler: a head of texts reads the body's.
            behind_padding: positions begin behind the number of the padding token.
    """

    layout: Layout | None = None
    classes: str = ""
    norms: int = 2
    rms: bool = True
    qk_norms: bool = False
    mlp: MlpKind = "gated"
    attention: AttentionKind = "flash"
    fused_qkv: bool = False
    parallel: bool = False
    own_attention: bool = False
    own_sums: bool = False
    post_norms: bool = False
    dropout_modules: bool = False
    shared_gate: bool = False
    gated_attention: bool = False
    stock_gate: bool = False
    encoder: bool = False
    pooler: bool = False
    behind_padding: bool = False

    def fused_classes(self) -> dict[str, FusedPart]:
        """Class -> which part of a layer it is, of those whose forward is: attention: project, (norm q and k,) rotate
        both halves, attend, project; layer: x + f(norm(x)) of attention, recurrence or both, and of that of an MLP."""
        names: dict[str, FusedPart] = {}
        if self.classes and self.attention == "flash":
            if not self.own_attention:
                names[f"{self.classes}Attention"] = "attention"
            if self.norms == 2 and not self.own_sums:
                names[f"{self.classes}{'Encoder' if self.encoder else 'Decoder'}Layer"] = "layer"
        return names


def fused_part(name: str) -> FusedPart | None:
    """The part of a layer that a class of this name is, if the engine has its forward."""
    return next((part for family in FAMILIES.values() if (part := family.fused_classes().get(name))), None)


def layout_of(model_type: object) -> Layout | None:
    """How a family's tensors are called; None where that is not known."""
    family = FAMILIES.get(str(model_type))
    return family.layout if family is not None else None


_TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


def _layout(name: str) -> Layout | None:
    """That of a family of the table; None where it has none."""
    row = _TABLE[name].get("layout")
    if not isinstance(row, dict):
        return _layout(row) if row else None
    like = _layout(row["like"]) if "like" in row else None
    return Layout(**row) if like is None else replace(like, **{field: x for field, x in row.items() if field != "like"})


FAMILIES: dict[str, Family] = {name: Family(**{**row, "layout": _layout(name)}) for name, row in _TABLE.items()}
LLAMA = Layout(**_TABLE["llama"]["layout"])
# An architecture that is not here is counted as the stock gated kind: an estimate, and the plan says so.
UNKNOWN, UNKNOWN_MIXTURE = Family(mlp="gated_stock"), Family(mlp="experts")

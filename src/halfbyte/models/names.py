"""What a module's full name says of it: rules on names alone, for a built model and for a list of tensors alike.

The plan chooses LoRA's targets before a model is built; a run chooses them from its modules. Both ask here.
"""

import re

AUTO = "auto"
ALL_LINEAR = "all-linear"

# The containers, between the layer's number and the projection's own name, in which tokens meet each other.
_MIXER = re.compile(r".*(attn|attention)s?|(.*_)?att|mixer|mamba|conv|temporal_block|mlstm_layer", re.IGNORECASE)
# Inside such a container, but not a query, key, value or output: gates and decays (small, or saturating), compressors,
# positions, sinks, expert layers, and the MLPs that Nemotron-H keeps under the name `mixer`.
_NOT_A_PROJECTION = re.compile(
    r"(.*_)?(experts|mlp|ffn)|compressor|sconv|relative_pos\w*|in_proj_(a|b|ba|z)"
    r"|((output|forget|message)_)?gate(_proj)?|[oif]gate_preact|(a|b|g|g_a|g_b|f|f_a|f_b|dt|up|down|sink|weight)_proj"
)
# A causal LM without an encoder never runs these.
_CROSS = re.compile(r"encoder_attn|cross_attn|crossattention|cross_attention")
# nn.Linear modules that choose experts. An adapter there moves tokens between experts and upsets the load balance.
_ROUTER = re.compile(r"gate|(.*_)?router(_.*)?|shared_expert_gate|wg")
# No gradient reaches these in text fine-tuning: towers and bridges of other senses, BLT's frozen entropy model, extra
# heads that predict several tokens, poolers, and the indexers of sparse attention (behind a top-k).
_ASIDE = re.compile(
    r".*(vision|visual|image|img|audio|speech|projector).*|.*_tower|embed_tokens_extend|patcher|mtp(_.*)?|pooler|indexer"
)


def split_at_layer(name: str) -> tuple[str, list[str]]:
    """`model.layers.3.self_attn.q_proj` -> (`model.layers`, [`self_attn`, `q_proj`]); no layer number: (name, [])."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[:place]), parts[place + 1 :]
    return name, []


def endings_of(name: str) -> list[str]:
    """`a.b.c` -> [`c`, `b.c`, `a.b.c`]: what PEFT's list form can match it by."""
    parts = name.split(".")
    return [".".join(parts[place:]) for place in reversed(range(len(parts)))]


def leaf_of(name: str) -> str:
    return name.rpartition(".")[2]


def is_aside(name: str) -> bool:
    """Whether a module is a router, or belongs to what text fine-tuning never runs."""
    return any(_ASIDE.fullmatch(p) or _ROUTER.fullmatch(p) or _CROSS.fullmatch(p) for p in name.split("."))


def is_mixer_projection(name: str) -> bool:
    """Whether a linear layer of this name is one of a layer's token mixer: query, key, value, output or the like."""
    stack, inner = split_at_layer(name)
    if not inner or any(_NOT_A_PROJECTION.fullmatch(part) for part in inner):
        return False
    return any(_MIXER.fullmatch(part) for part in [leaf_of(stack), *inner[:-1]])

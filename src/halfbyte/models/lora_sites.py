"""Where LoRA sits, from names and shapes alone: what a plan needs to know of adapters before a model is built.

The rules on names serve a built model (`adapters/targets.py`, which reads its modules and takes torch) and a list of
tensors alike. A run asks the modules; a test compares both.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from halfbyte.errors import AdapterError
from halfbyte.models.tensors import HEADS, TensorSpec
from halfbyte.recipe.schema import Lora

# What a linear layer reads: the normed input of attention or MLP, the attention's output, the MLP's inner activation.
# "experts": a stack of them, which keeps no input of its own.
Reads = Literal["attention", "attended", "mlp", "inner", "experts"]
_ATTENDED = re.compile(r"o_proj|out_proj|dense|c_proj|wo")
_INNER = re.compile(r"down_proj|fc2|c_proj|dense_4h_to_h|fc_out|w2")

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


@dataclass(frozen=True)
class Site:
    """One linear layer with an adapter of rank `rank`; or a stack of experts, each with one. A stack's `inputs` and
    `outputs` are in the order in which it is stored."""

    name: str
    layer: int | None
    inputs: int
    outputs: int
    rank: int
    reads: Reads
    experts: int = 1

    @property
    def parameters(self) -> int:
        return self.rank * (self.inputs + self.outputs) * self.experts


def sites(specs: Sequence[TensorSpec], lora: Lora, names: Sequence[str] | str | None = None) -> tuple[Site, ...]:
    """The layers that get an adapter. `names`: target modules as `targets.resolve_targets` chose them for the built
    model; None reads the recipe's. Raises AdapterError: nothing matches; says what there is."""
    linears = {s.name.removesuffix(".weight"): s for s in specs if s.role == "linear" and s.layer is not None}
    targets = lora.target_modules if names is None else names
    saved = "|".join(lora.modules_to_save or ())  # what trains whole gets no adapter
    hit = {name for name in _targeted(targets, linears) if not saved or not re.search(rf"(^|\.)({saved})($|\.)", name)}
    chosen = [name for name in linears if name in hit and not _matches(name, lora.exclude_modules or ())]
    if (layers := lora.layers_to_transform) is not None:
        layers = (layers,) if isinstance(layers, int) else layers
        chosen = [name for name in chosen if linears[name].layer in layers]
    stacks = _stacks(specs, lora)
    if not chosen and not stacks:
        leaves = sorted({leaf_of(name) for name in linears})
        raise AdapterError(
            f"lora.target_modules {targets!r} match no linear layer. There are: {', '.join(leaves) or 'none'}.",
            fix="lora.target_modules: auto",
        )
    return (*(_site(name, linears[name], lora.r, lora.rank_pattern) for name in chosen), *stacks)


def _stacks(specs: Sequence[TensorSpec], lora: Lora) -> list[Site]:
    """The stacks of experts that `lora.target_parameters` reaches: by the last part of a name and the layer's number,
    as checkpoints have names of their own for what is between."""
    by_tensor: dict[str, Site] = {}
    stacks = [s for s in specs if s.role == "expert" and len(s.shape) == 3 and s.layer is not None]
    for asked in lora.target_parameters or ():
        layer = re.search(r"\.(\d+)\.", asked)
        matched = [s for s in stacks if leaf_of(s.name) == leaf_of(asked) and (not layer or int(layer[1]) == s.layer)]
        if not matched:
            leaves = sorted({leaf_of(s.name) for s in stacks})
            raise AdapterError(
                f"lora.target_parameters: no stack of experts ends in {asked!r}. There are: "
                f"{', '.join(leaves) or 'none'}.",
                fix="leave lora.target_parameters out, or name what there is",
            )
        for s in matched:
            name = f"model.layers.{s.layer}.mlp.experts.{leaf_of(s.name)}"  # as transformers calls most of them
            rank = next((r for key, r in lora.rank_pattern.items() if re.match(rf"(.*\.)?({key})$", name)), lora.r)
            count, inputs, outputs = s.shape
            by_tensor[s.name] = Site(s.name, s.layer, inputs, outputs, rank, "experts", count)
    return list(by_tensor.values())


def trainable(placed: Sequence[Site], specs: Sequence[TensorSpec], lora: Lora) -> int:
    """How many numbers train: LoRA, and what the recipe trains beside it (whole modules, biases, token rows)."""
    total = sum(site.parameters + (site.outputs if lora.use_dora or lora.lora_bias else 0) for site in placed)
    saved = saved_tensors(specs, lora)
    total += sum(s.numel for s in saved)
    if lora.bias != "none":
        counted, adapted = {s.name for s in saved}, {site.name for site in placed}
        biases = (s for s in specs if "bias" in leaf_of(s.name) and s.name not in counted)
        total += sum(s.numel for s in biases if lora.bias == "all" or s.name.removesuffix(".bias") in adapted)
    width = max((s.shape[-1] for s in specs if s.role == "embedding"), default=0)
    return total + len(lora.trainable_token_indices or ()) * width


def saved_tensors(specs: Sequence[TensorSpec], lora: Lora) -> list[TensorSpec]:
    """The tensors of `modules_to_save`: PEFT copies every module whose full name ends in one of these names. A head
    that is tied to the embedding is copied too, and is no longer tied."""
    ends = tuple(lora.modules_to_save or ())
    if not ends:
        return []
    saved = [s for s in specs if any(m.endswith(ends) for m in accumulate(s.name.split(".")[:-1], "{}.{}".format))]
    if not any(s.role == "head" for s in specs) and any(head.endswith(ends) for head in HEADS):
        saved += [s for s in specs if s.role == "embedding"][:1]
    return saved


def _targeted(targets: Sequence[str] | str, linears: Mapping[str, TensorSpec]) -> set[str]:
    if isinstance(targets, str):
        if targets.lower() == AUTO:
            mixers = {name for name in linears if is_mixer_projection(name) and not is_aside(name)}
            # GPT-2's convention: both blocks of a layer end in a `c_proj`, and PEFT takes both by that name
            both = any(name.endswith(".c_attn") for name in mixers)
            return mixers | {name for name in linears if both and name.endswith(".c_proj")} or set(linears)
        if targets.lower() == ALL_LINEAR:
            return {name for name in linears if not is_aside(name)}
    return {name for name in linears if _matches(name, targets)}


def _matches(name: str, targets: Sequence[str] | str) -> bool:
    if isinstance(targets, str):
        try:
            return re.fullmatch(targets, name) is not None
        except re.error as error:
            raise AdapterError(f"lora.target_modules: {targets!r} is no regular expression: {error}") from error
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _site(name: str, spec: TensorSpec, rank: int, patterns: Mapping[str, int]) -> Site:
    outputs, inputs = reversed(spec.shape) if spec.transposed else spec.shape
    rank = next((r for key, r in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), rank)
    reads: Reads = "inner" if _INNER.fullmatch(leaf_of(name)) else "mlp"
    if is_mixer_projection(name):
        reads = "attended" if _ATTENDED.fullmatch(leaf_of(name)) else "attention"
    return Site(name, spec.layer, inputs, outputs, rank, reads)

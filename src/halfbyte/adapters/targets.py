"""Which modules of a model get a LoRA adapter: `auto`, `all-linear`, a list of name endings or a regex.

Why: PEFT's own table knows 35 architectures, mostly without o_proj, and goes stale with every release. Here the choice
is read from the model: the projections of each layer's token mixer (attention, linear attention, the input of a
state-space block), in the shortest names that hit nothing else; never heads, routers, gates and other senses' towers.
Source: matching is PEFT's own (`peft.tuners.tuners_utils.check_target_module_exists`): what is listed is adapted.
PEFT can wrap any parameter (`lora.target_parameters`). Here an adapter of a parameter is computed where the experts are
(`layers/experts`), so a name must hit stacks of experts whose layout is known; everything else is refused by name.
Cost: a walk over module names. torch and peft are imported inside functions.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from halfbyte.errors import AdapterError

from halfbyte.models.lora_sites import (  # isort: skip
    ALL_LINEAR, AUTO, endings_of, is_aside, is_mixer_projection, leaf_of, split_at_layer,
)  # fmt: skip
from halfbyte.models.text_half import is_half
from halfbyte.recipe.schema import Lora
from halfbyte.upstream import peft as upstream

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn

# Read as raw weights by the fused kernels (`outproj_weight=self.out_proj.weight`), so an adapter there would be ignored
# without a word. Only the input of a state-space block is always called as a module.
_STATE_SPACE_INPUT = "in_proj"
_LIMITS = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
# GPT-2's convention: both blocks of a layer write to the residual stream through a `c_proj`, and both are meant.
_GPT2_OUTPUT, _GPT2_INPUT = "c_proj", "c_attn"
_WITHOUT_EXPERTS = "leave lora.target_parameters out: lora.target_modules reaches linear layers"


@dataclass(frozen=True)
class Targets:
    """What `LoraConfig.target_modules` gets: name endings, or one regex over full names; and why."""

    names: tuple[str, ...] | str
    reason: str

    @property
    def for_peft(self) -> list[str] | str:
        return self.names if isinstance(self.names, str) else list(self.names)

    @property
    def holds(self) -> frozenset[str]:
        """Fields under `lora:` that a regex has in itself, and PEFT does not take beside one."""
        return frozenset({"layers_to_transform", "layers_pattern"} if isinstance(self.names, str) else ())


def auto_targets(model: nn.Module) -> Targets:
    """The projections of every layer's token mixer; of every linear layer where the mixer has none (XLNet)."""
    architecture, usable = _architecture(model), _usable(model)
    chosen = {name for name in usable if is_mixer_projection(name)}
    if any(leaf_of(name) == _GPT2_INPUT for name in chosen):
        chosen |= {name for name in usable if leaf_of(name) == _GPT2_OUTPUT}
    if chosen:
        kinds = {False: "the attention projections", True: f"{_STATE_SPACE_INPUT} of the state-space blocks"}
        used = sorted({_in_state_space(model, name) for name in chosen})
        reason = f"auto: {' and '.join(kinds[kind] for kind in used)} of {architecture}"
    else:
        chosen = {name for name in usable if split_at_layer(name)[1]}
        reason = f"auto: {architecture} has no linear projections in its attention; those of its layers instead"
    if not chosen:
        raise AdapterError(
            f"lora.target_modules: auto finds no linear layer in {architecture}.{_what_exists(model)}",
            fix="name the modules: --set 'lora.target_modules=[...]'",
        )
    return Targets(_shortest_names(model, chosen), reason)


def all_linear(model: nn.Module) -> Targets:
    """What PEFT's `all-linear` takes, less routers, heads of any name, and other senses' towers. In some MoE
    architectures PEFT rewrites names such as `gate_proj` into the fused 3-D expert parameters. Those names are left out
    too (shared experts with them): such experts are not adapted here."""
    architecture, usable = _architecture(model), _usable(model)
    leaves = sorted({leaf_of(name) for name in usable})
    any_is = bool(leaves) and _become_expert_parameters(model, *leaves)  # of most models none
    rewritten = [leaf for leaf in leaves if any_is and _become_expert_parameters(model, leaf)]
    chosen = {name for name in usable if leaf_of(name) not in rewritten}
    reason = f"all-linear: every linear layer of {architecture} but head and routers"
    if rewritten:
        reason += f"; without {', '.join(rewritten)}, which PEFT would turn into the fused experts"
    if not chosen:
        raise AdapterError(f"lora.target_modules: all-linear finds nothing in {architecture}.{_what_exists(model)}")
    return Targets(_shortest_names(model, chosen), reason)


def resolve_targets(model: nn.Module, asked: str | Sequence[str], lora: Lora | None = None) -> Targets:
    """`lora.target_modules` as the recipe has it -> what PEFT is given. Every entry must match something. For a text
    half a regex over full names, as towers have layers of the same endings; a regex holds the `layers_to_transform` of
    `lora`, which PEFT does not read beside one. Raises AdapterError: nothing matches; names near to what was asked and
    the linear layers that exist are listed."""
    targets = _resolved(model, asked)
    layers = None if lora is None else lora.layers_to_transform
    layers = (layers,) if isinstance(layers, int) else layers
    if isinstance(targets.names, str) and layers is not None:
        every = matched(model, targets)
        chosen = {n for n in every if _layer(n) in map(str, layers)}
    elif is_half(model) and not isinstance(targets.names, str):
        chosen = set(matched(model, targets, lora))
    else:
        return targets
    if not chosen:
        raise AdapterError(f"lora.target_modules: {_show(targets)} match, but nothing is left in layers {layers}")
    if layers is None:
        return Targets(_regex(chosen), targets.reason)
    each = (_regex({n for n in chosen if _layer(n) == str(i)}, str(i)) for i in sorted(layers))  # they may differ
    return Targets("|".join(filter(None, each)), targets.reason)


def _layer(name: str) -> str:
    """The number of the layer that a module is in; empty for one beside them."""
    return name.removeprefix(split_at_layer(name)[0]).partition(".")[2].partition(".")[0]


def _resolved(model: nn.Module, asked: str | Sequence[str]) -> Targets:
    if isinstance(asked, str):
        if asked.lower() == AUTO:
            return auto_targets(model)
        if asked.lower() == ALL_LINEAR:
            return all_linear(model)
        targets = Targets(asked, "a regular expression over full names")
    else:
        targets = Targets(tuple(dict.fromkeys(asked)), "as listed")
    matched(model, targets)
    return targets


def matched(model: nn.Module, targets: Targets, lora: Lora | None = None) -> list[str]:
    """Full names of the modules that PEFT will adapt under the limits of `lora`, in the model's order. Raises
    AdapterError: an entry matches nothing, or something that cannot carry an adapter."""
    from peft.tuners.tuners_utils import check_target_module_exists

    _refuse_unmatched(model, targets)
    asked = {key: getattr(lora, key, None) for key in _LIMITS if key not in targets.holds}
    # PEFT takes lists, a recipe holds tuples
    limits = {k: list(v) if isinstance(v, tuple) else v for k, v in asked.items() if v not in (None, ())}
    config = _peft_config(model, targets, **limits)
    names = [name for name, _ in model.named_modules() if name and check_target_module_exists(config, name)]
    if not names:
        after = ", ".join(f"{key} {value!r}" for key, value in limits.items())
        raise AdapterError(f"lora.target_modules: {_show(targets)} match, but nothing is left after {after}")
    if problems := dict.fromkeys(problem for name in names if (problem := _cannot_carry(model, name))):
        fix = "lora.target_modules: auto, or leave them out"
        raise AdapterError(f"lora.target_modules: {'; '.join(problems)}", fix=fix)
    return names


def _is_matmul(module: nn.Module) -> bool:
    """Whether the module is y = xW and nothing more, in any storage (plain, Conv1D, bitsandbytes)."""
    from torch import nn
    from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        return True
    # nn.MultiheadAttention reads the weight of its out_proj and never calls it.
    if not isinstance(module, nn.Linear) or isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    kind = type(module)
    # transformers derives routers and grouped projections from nn.Linear, with another forward; Falcon's is plain.
    own_forward = kind.forward is not nn.Linear.forward and kind.__module__.startswith("transformers.models.")
    return not own_forward or kind.__name__ == "FalconLinear"


def _usable(model: nn.Module) -> set[str]:
    """Linear layers that auto and all-linear may take: inside the language model, no head, no router."""
    base = getattr(model, "base_model", model)
    prefix = next((name for name, module in model.named_modules() if module is base), "")
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    inside = f"{prefix}." if prefix else ""
    return {
        name
        for name, module in model.named_modules()
        if name.startswith(inside)
        and _is_matmul(module)
        and module is not head
        and not is_aside(name)
        and leaf_of(name) not in {"lm_head", "score", "embed_out", "classifier"}
        and not _raw_in_state_space(model, name)
    }


def _in_state_space(model: nn.Module, name: str) -> bool:
    parent = model.get_submodule(name.rpartition(".")[0])
    return hasattr(parent, "conv1d") and hasattr(parent, _STATE_SPACE_INPUT)


def _raw_in_state_space(model: nn.Module, name: str) -> bool:
    return leaf_of(name) != _STATE_SPACE_INPUT and _in_state_space(model, name)


def _cannot_carry(model: nn.Module, name: str) -> str | None:
    from torch import nn

    module, leaf = model.get_submodule(name), leaf_of(name)
    if not _is_matmul(module):
        kind = type(module).__name__
        return None if isinstance(module, nn.Embedding) else f"{leaf!r} is a {kind}, which cannot carry an adapter"
    if _raw_in_state_space(model, name):
        return f"{leaf!r} of a state-space block is read as a raw weight by its kernel, which would ignore an adapter"
    return None


def _shortest_names(model: nn.Module, chosen: set[str]) -> tuple[str, ...] | str:
    """The shortest endings that hit `chosen` and nothing else; a regex where there are none."""
    modules = [name for name, _ in model.named_modules()]
    # every ending of every other module: PEFT matches by ending, whatever the module's type
    taken = {ending for name in modules if name not in chosen for ending in endings_of(name)}
    endings: dict[str, None] = {}
    for name in (name for name in modules if name in chosen):
        # Without the layer's own number, and never beginning with another.
        short = endings_of(".".join(split_at_layer(name)[1]) or name)
        ending = next((end for end in short if end not in taken and not end[0].isdigit()), None)
        if ending is None:
            return _regex(chosen)
        endings[ending] = None
    return tuple(endings)


def _regex(chosen: set[str], layers: str = r"\d+") -> str:
    """One regex over full names: of each stack of `layers` its modules at any depth, and the modules beside them."""
    stacks: dict[str, set[str]] = {}
    whole = set()
    for name in chosen:
        stack, inner = split_at_layer(name)
        if inner:
            pattern = r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in inner)
            stacks.setdefault(re.escape(stack), set()).add(pattern)
        else:
            whole.add(re.escape(name))
    by_inner: dict[str, list[str]] = {}
    for stack, patterns in sorted(stacks.items()):
        by_inner.setdefault("|".join(sorted(patterns)), []).append(stack)
    parts = [rf"({'|'.join(names)})\.{layers}\.({inner})" for inner, names in by_inner.items()]
    return "|".join([*parts, *sorted(whole)])


def _peft_config(model: nn.Module, targets: Targets, **limits: object) -> LoraConfig:
    """The LoraConfig as PEFT will see it, after its renames for fused experts."""
    from peft import LoraConfig

    try:
        config = LoraConfig(target_modules=targets.for_peft, **limits)
    except ValueError as error:
        raise AdapterError(f"lora: PEFT refuses these settings: {error}") from error
    try:
        if upstream.EXPERT_NAMES.there:
            upstream.convert_expert_names()(config, model=model, conversions=None)
        experts = sorted(config.target_parameters or ())
    except ValueError as error:
        experts = [str(error)]
    if routers := [name.removesuffix(".weight") for name in experts if name.endswith(".weight")]:
        raise AdapterError(
            f"lora.target_modules: {_show(targets)} match routers of {_architecture(model)} ({', '.join(routers)}), "
            "which cannot carry an adapter.",
            fix=f"lora.modules_to_save: [{', '.join(routers)}] trains them whole; or lora.target_modules: auto, or "
            "all-linear (both leave them out)",
        )
    if experts:
        raise AdapterError(
            f"lora.target_modules: {_show(targets)} name fused experts of {_architecture(model)} "
            f"({', '.join(experts)}), which are parameters.",
            fix="lora.target_parameters adapts them: [gate_up_proj, down_proj]; or lora.target_modules: auto, or "
            "all-linear (both leave them out)",
        )
    return config


def _become_expert_parameters(model: nn.Module, *leaves: str) -> bool:
    """Whether PEFT would turn any of these names into experts' parameters."""
    try:
        _peft_config(model, Targets(leaves, ""))
    except AdapterError:
        return True
    return False


def _refuse_unmatched(model: nn.Module, targets: Targets) -> None:
    modules, fix = [name for name, _ in model.named_modules() if name], "lora.target_modules: auto"
    leaves = sorted({leaf_of(name) for name in modules if _is_matmul(model.get_submodule(name))})
    if not targets.names:
        raise AdapterError(f"lora.target_modules is empty.{_what_exists(model)}", fix=fix)
    try:
        missing = without_match(modules, targets.names)
    except re.error as error:
        raise AdapterError(f"lora.target_modules: {targets.names!r} is no regular expression: {error}") from error
    if not missing:
        return
    if isinstance(targets.names, str):
        listed = [part.strip() for part in targets.names.split(",")]
        if all(part in leaves for part in listed):
            fix = f"a string is a regular expression over full names; for endings write a list: [{', '.join(listed)}]"
    if stacks := names_of(stacks_of(model)):
        fix += f"; its experts are for lora.target_parameters: [{', '.join(stacks)}]"
    lines = []
    for name in missing:
        near = [leaf for leaf in difflib.get_close_matches(leaf_of(name), leaves, n=3, cutoff=0.6) if leaf != name]
        hint = f" (near: {', '.join(near)})" if near else ""
        lines.append(f"no module of {_architecture(model)} matches {name!r}{hint}")
    raise AdapterError(f"lora.target_modules: {'; '.join(lines)}.{_what_exists(model)}", fix=fix)


def without_match(modules: Sequence[str], asked: str | Sequence[str]) -> list[str]:
    """Which of the name endings, or the one regex over full names, hit no module."""
    if isinstance(asked, str):
        return [] if any(re.fullmatch(asked, name) for name in modules) else [asked]
    endings = {ending for name in modules for ending in endings_of(name)}
    return [name for name in asked if name not in endings]


def _what_exists(model: nn.Module) -> str:
    counts = Counter(leaf_of(name) for name, module in model.named_modules() if _is_matmul(module))
    return " Its linear layers: " + (", ".join(f"{leaf} x{count}" for leaf, count in counts.items()) or "none")


def _architecture(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__)


def _show(targets: Targets) -> str:
    return targets.names if isinstance(targets.names, str) else ", ".join(targets.names)


def matched_stacks(model: nn.Module, asked: Sequence[str]) -> list[str]:
    """Full names of the stacks that PEFT will adapt, in the model's order. Raises AdapterError: a name hits nothing, or
    something other than a stack of experts, or experts of a layout that is not known here."""
    from halfbyte.layers.experts import layout

    if not asked:
        return []
    if upstream.EXPERT_LORA.reason:
        fix = f"{_WITHOUT_EXPERTS}; or pip install -U peft"
        raise AdapterError(f"lora.target_parameters: {upstream.EXPERT_LORA.reason}.", fix=fix)
    outside = layout.outside_interface(model)
    stacks = stacks_of(model)
    hit = [name for name, _ in model.named_parameters() if any(_hits(name, target) for target in asked)]
    problems = []
    for name in hit:
        module = name.rpartition(".")[0]
        if module in outside:
            problems.append(
                f"{name} is of {outside[module]}, whose file does not use transformers' experts interface; its layout "
                "is not known here"
            )
        elif name not in stacks:
            problems.append(f"{name} is no stack of experts")
    for target in asked:
        if not any(_hits(name, target) for name in hit):
            leaves = sorted({name.rpartition(".")[2] for name in stacks})
            near = difflib.get_close_matches(target.rpartition(".")[2], leaves, n=2)
            hint = f" (near: {', '.join(near)})" if near else f"; its stacks: {', '.join(leaves)}" if leaves else ""
            kinds = f"; its experts are {', '.join(sorted(set(outside.values())))}" if outside and not stacks else ""
            problems.append(f"no parameter of {_architecture(model)} ends in {target!r}{hint}{kinds}")
    if problems:
        short = problems[:3] + [f"and {len(problems) - 3} more"] * (len(problems) > 3)
        fix = _WITHOUT_EXPERTS if not stacks else f"lora.target_parameters: [{', '.join(names_of(stacks))}]"
        raise AdapterError(f"lora.target_parameters: {'; '.join(short)}.", fix=fix)
    return hit


def stacks_of(model: nn.Module) -> list[str]:
    """Full names of all stacks of experts of a known layout."""
    from halfbyte.layers.experts import layout

    return [f"{name}.{stack}" for name, module in layout.experts_of(model) for stack in layout.stacks_of(module)]


def names_of(stacks: Sequence[str]) -> list[str]:
    """Their last parts, each once."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in stacks))


def remark_on_experts(model: nn.Module, adapted: Sequence[str]) -> str:
    """What the choice of targets does with experts, to be said behind its reason; nothing for a model without any."""
    if adapted:
        return f"; and of the experts {', '.join(names_of(adapted))}"
    stacks = names_of(stacks_of(model))
    return f"; its experts get none: lora.target_parameters: [{', '.join(stacks)}]" if stacks else ""


def _hits(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")

"""A model as a list of TensorSpecs, read from the headers of its checkpoint: no weight is touched.

Planning, storing, loading and checking must agree on what each tensor is; this list is the one place that says it.
Names and shapes are the checkpoint's, which transformers may rename or merge at loading.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from halfbyte.errors import SourceError
from halfbyte.models.families import FAMILIES
from halfbyte.models.sources.checkpoint import no_config
from halfbyte.models.sources.safetensors import DTYPE_BITS, read_header, weight_files
from halfbyte.models.text_half import text_config, text_tensors
from halfbyte.system import limits
from halfbyte.types import ConfigFile

Role = Literal["linear", "embedding", "head", "norm", "bias", "expert", "router", "other"]

PER_LAYER = "embed_tokens_per_layer"
# The last dotted part before `.weight` decides; these are the names met in transformers' causal-LM checkpoints.
_EMBEDDINGS = re.compile(r"embed(ding)?s?$|^embed_(tokens|tokens_per_layer|in|positions)$|^w[tp]e$|^shared$")
HEADS = frozenset(("lm_head", "embed_out", "output_projection"))
_ROUTERS = frozenset(("gate", "router", "shared_expert_gate", "wg"))
# One expert's own matrix, as most checkpoints have it, and what it is.
_ONE_EXPERT = re.compile(r"(.*\.experts)\.\d+\.(gate_proj|up_proj|down_proj|w[123]|fc[123])\.weight$")
_PART_OF_EXPERT = {
    "gate_proj": "gate", "w1": "gate", "fc1": "gate", "up_proj": "up", "w3": "up", "fc3": "up",
    "down_proj": "down", "w2": "down", "fc2": "down",
}  # fmt: skip
_NORM = re.compile(r"norm|^ln(_|$)|(^|_)ln$|layernorm", re.IGNORECASE)
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")
# Buffers that older checkpoints hold and transformers passes over: causal masks, rotary tables.
_PASSED_OVER = re.compile(
    r"(?:^|\.)(?:attn|attention)\.(?:bias|masked_bias)$|rotary_emb\.(?:inv_freq|cos_cached|sin_cached)$"
    r"|embeddings\.position_ids$"
)
# Of encoders: heads that no task of ours reads, and what stands between body and head.
_OTHER_HEADS = re.compile(r"(cls|lm_head|decoder|lm_predictions|mask_predictions|classifier|score|qa_outputs)\.")
_BEFORE_HEAD = re.compile(r"(\w+\.)?pooler\.|head\.")
# Dropout by default, in transformers' config classes; everyone else's is 0.
_OWN_DROPOUT = {"gpt2": {"attention_dropout": 0.1, "resid_pdrop": 0.1}, "opt": {"resid_pdrop": 0.1}}
_OWN_WINDOW = dict.fromkeys(("mistral", "gemma2", "gemma3_text"), 4096)  # by default, as above
_PERIOD = {"gemma2": 2, "gemma3_text": 6}  # of so many layers the last one sees everything
# Their attention knows no shared keys, whatever number a config carries.
_EVERY_HEAD_ITS_KEYS = frozenset(("gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "bloom", "codegen"))
_LAST_OF_MLP = re.compile(r"\.(feed_forward\.w2|down_proj|output_linear)\.weight$")
_CONV1D_TYPES = frozenset(("gpt2", "openai-gpt", "imagegpt", "decision_transformer"))


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a checkpoint, under the checkpoint's own name; beside towers under the one that the whole class has
    for it. `role` "linear" is what the policy may quantise as a matrix, "expert" the same for fused or unnamed expert
    tensors; `transposed`: stored (in, out), as GPT-2's Conv1D does, where nn.Linear stores (out, in). `blocks`: the
    types of the GGUF blocks in which its file has it, in parts of one size; empty where it has none that could be
    computed with as they are."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: Role
    layer: int | None
    transposed: bool = False
    blocks: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def per_layer(self) -> bool:
        """Whether it is a table with a row of each token for every layer, such as Gemma 3n's: rows are read alone."""
        return self.name.endswith(f"{PER_LAYER}.weight")

    @property
    def out_in(self) -> tuple[int, ...]:
        """The shape of the matrix that is multiplied with: (out, in), or (experts, out, in)."""
        return self.shape[::-1] if self.transposed and len(self.shape) == 2 else self.shape

    @property
    def nbytes(self) -> int:
        return (self.numel * DTYPE_BITS[self.dtype] + 7) // 8


@dataclass(frozen=True)
class Recurrence:
    """A layer's recurrent part: how many numbers of a token its convolution reads, the heads of its state (0: it is a
    convolution alone), the numbers that its last projection reads; `alone`: the layer has no attention; rows: of a
    head's state, 0 where the config does not say; `scan`: it is Mamba-2, not the delta rule."""

    layer: int
    channels: int
    heads: int
    inner: int
    alone: bool
    rows: int
    scan: bool


@dataclass(frozen=True)
class Facts:
    """Sizes of a decoder, under one name whatever its `config.json` calls them; 0 for what it does not say.

    `heads` of queries share `key_heads` of keys and values, each `head_size` wide; `positions` is the longest text.
    `shared_intermediate`: the width of what every token goes through beside a mixture's experts.
    `attention_dropout` and `residual_dropout` are the model's own, which act in training beside LoRA's. `windows`: how
    many tokens each layer sees, 0 for all of them; empty where no layer has a window. `recurrences`: of the layers that
    have one.
    """

    model_type: str
    hidden: int
    intermediate: int
    layers: int
    vocab: int
    experts: int = 0
    experts_per_token: int = 0
    shared_intermediate: int = 0
    tied_head: bool = False
    heads: int = 0
    key_heads: int = 0
    head_size: int = 0
    positions: int = 0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    windows: tuple[int, ...] = ()
    recurrences: tuple[Recurrence, ...] = ()


def read_checkpoint(folder: Path) -> list[TensorSpec]:
    """Every tensor that loading will use, in the order of the files' names and then of their data. A head that the
    config ties to the embedding is listed once, as the embedding. Raises SourceError: no config, no safetensors, a
    shard missing, or a file that is cut short or not what it says."""
    from halfbyte.models.gguf import blocks as gguf_blocks

    config, in_file = read_config(folder), gguf_blocks.read(folder)
    if in_file is None:
        return specs_of(map(read_header, weight_files(folder)), config)
    blocks = {each.name: each.blocks for each in in_file.parameters}
    return specs_of([{e.name: {"shape": e.shape, "dtype": e.dtype} for e in in_file.parameters}], config, blocks)


def specs_of(
    headers: Iterable[Mapping[str, ConfigFile]], config: ConfigFile,
    blocks: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
) -> list[TensorSpec]:  # fmt: skip
    """The tensors of all files of one checkpoint; a tied head once, without what loading passes over (buffers, towers).
    `blocks`: by a tensor's name, as in `TensorSpec`."""
    entries = {name: entry for header in headers for name, entry in header.items()}
    read = text_tensors(entries, config)
    specs = [
        replace(spec_of(read[name], tuple(entry["shape"]), entry["dtype"], config), blocks=blocks.get(name, ()))
        for name, entry in entries.items()
        if name in read and _PASSED_OVER.search(name) is None and not _unread(name, config)
    ]
    if _experts(config) and config.get("auto_map") is None:
        specs = _stacked(specs)
    if _get(config, "tie_word_embeddings") and any(s.role == "embedding" for s in specs):
        specs = [s for s in specs if s.role != "head"]
    return specs


def _unread(name: str, config: ConfigFile) -> bool:
    """Whether a tensor of an encoder is of a head that is not read."""
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None or not family.encoder:
        return False
    return ("pooler." in name and not family.pooler) or _OTHER_HEADS.match(name) is not None


def _stacked(specs: list[TensorSpec]) -> list[TensorSpec]:
    """Matrices of single experts as transformers' classes hold them: all of a layer in one tensor, gate above up; and
    blocks of MXFP4 as the weights that they stand for. Where the first of them stood."""
    groups: dict[str, dict[str, list[TensorSpec]]] = {}
    for spec in specs:
        if (match := _ONE_EXPERT.match(spec.name)) is not None and len(spec.shape) == 2:
            groups.setdefault(match[1], {}).setdefault(_PART_OF_EXPERT[match[2]], []).append(spec)
    stacks: dict[str, TensorSpec] = {}
    for home, parts in groups.items():
        gates, ups = parts.get("gate", []), parts.get("up", [])
        for name, members in (("gate_up_proj" if gates else "up_proj", gates + ups), ("down_proj", parts.get("down"))):
            if not members or len({m.shape for m in members}) != 1 or (gates and len(gates) != len(ups)):
                continue
            both, (rows, width) = 1 + (members[-1] in ups and bool(gates)), members[0].shape
            shape = (len(members) // both, both * rows, width)
            kinds = [members[0].blocks, members[-1].blocks][:both]
            types = tuple(chain.from_iterable(kinds)) if all(kinds) else ()
            stack = replace(members[0], name=f"{home}.{name}", shape=shape, role="expert", blocks=types)
            stacks |= {members[0].name: stack} | {m.name: stack for m in members[1:]}
    for spec in specs:
        if spec.name.endswith("_blocks") and spec.dtype == "U8" and len(spec.shape) == 4:
            count, rows, blocks, nbytes = spec.shape
            shape = (count, 2 * nbytes * blocks, rows)
            name = spec.name.removesuffix("_blocks")
            stacks[spec.name] = replace(spec, name=name, shape=shape, dtype="F4", role="expert")
            stacks[f"{name}_scales"] = stacks[spec.name]
    stacked = [stacks.get(spec.name, spec) for spec in specs]
    return list({spec.name: spec for spec in stacked}.values())


def is_quantised(config: ConfigFile) -> bool:
    """Whether a checkpoint's matrices are in few bits, so that their headers do not say their shapes; MXFP4's do."""
    settings = config.get("quantization_config")
    return settings is not None and not (isinstance(settings, Mapping) and settings.get("quant_method") == "mxfp4")


def read_config(folder: Path) -> ConfigFile:
    """What its config.json says of the language model."""
    path = folder / "config.json"
    if not path.is_file():
        raise no_config(folder, str(folder))
    try:
        value = limits.read_config(path)
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(value, dict):
        raise SourceError(f"{path} holds a JSON {type(value).__name__}, not an object.")
    return text_config(value)


def spec_of(name: str, shape: tuple[int, ...], dtype: str, config: ConfigFile) -> TensorSpec:
    """What one tensor is, from its name, its shape and the config."""
    layer = _LAYER.search(name)
    role = _role(name, shape, config, in_layer=layer is not None)
    transposed = role == "linear" and layer is not None and config.get("model_type") in _CONV1D_TYPES
    return TensorSpec(name, shape, dtype, role, int(layer[1]) if layer else None, transposed)


def facts_of(config: ConfigFile, specs: Iterable[TensorSpec]) -> Facts:
    """Sizes from the config; what it does not say is read from the tensors."""
    specs = list(specs)
    kind = str(config.get("model_type", ""))
    heads = _first(config, "num_attention_heads", "n_head", "n_heads", "num_heads")
    embedding = max((s.shape for s in specs if s.role == "embedding" and not s.per_layer), default=(0, 0))
    hidden = _first(config, "hidden_size", "n_embd", "d_model", "model_dim", "dim") or embedding[-1]
    deepest = max((s.layer for s in specs if s.layer is not None), default=-1) + 1
    layers = _first(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers") or deepest
    of_expert = ["moe_intermediate_size"] if _experts(config) else []  # of one expert, where others are wider
    recurrences = _recurrences(specs, config)
    # of hybrids some say another width in their config than that of their MLP
    inner = (s.out_in[1] for s in specs if recurrences and _LAST_OF_MLP.search(s.name) and s.out_in[0] == hidden)
    shared = _first(config, "n_shared_experts") * _first(config, "moe_intermediate_size")
    return Facts(
        model_type=kind,
        hidden=hidden,
        intermediate=(0 if of_expert else next(inner, 0))
        or _first(config, *of_expert, "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
        or 4 * hidden,
        layers=layers,
        vocab=_first(config, "vocab_size") or embedding[0],
        experts=_experts(config),
        experts_per_token=_first(config, "num_experts_per_tok", "moe_topk", "top_k") if _experts(config) else 0,
        shared_intermediate=_first(config, "shared_expert_intermediate_size") or shared,
        tied_head=not any(s.role == "head" for s in specs),
        heads=heads,
        key_heads=_key_heads(config, kind, heads),
        head_size=_first(config, "head_dim") or (hidden // heads if heads else 0),
        positions=_first(config, "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx"),
        attention_dropout=_dropout(config, kind, "attention_dropout", "attn_pdrop", "attention_probs_dropout_prob"),
        residual_dropout=_dropout(config, kind, "resid_pdrop", "hidden_dropout", "dropout", "hidden_dropout_prob"),
        windows=_windows(config, kind, layers),
        recurrences=recurrences,
    )


def _recurrences(specs: Iterable[TensorSpec], config: ConfigFile) -> tuple[Recurrence, ...]:
    """Layers with a depthwise convolution, by the names and shapes beside it."""
    layers: dict[int, dict[str, TensorSpec]] = {}
    for spec in (spec for spec in specs if spec.layer is not None):
        layers.setdefault(int(spec.layer or 0), {})[spec.name] = spec
    return tuple(
        Recurrence(
            number, spec.shape[0],
            next((there[n].shape[0] for n in (f"{home}.A_log",) if n in there), 0),
            next((there[n].out_in[1] for n in (f"{home}.out_proj.weight", f"{home}.o_proj.weight") if n in there), 0),
            not any("k_proj" in name or "qkv" in name for name in there if not name.startswith(f"{home}.")),
            _first(config, "mamba_d_state", "ssm_state_size", "state_size", "linear_key_head_dim"),
            f"{home}.D" in there,
        )
        for number, there in layers.items()
        for name, spec in there.items()
        if len(spec.shape) == 3 and spec.shape[1] == 1 and (home := name.rpartition(".conv")[0])
    )  # fmt: skip


def _windows(config: ConfigFile, kind: str, layers: int) -> tuple[int, ...]:
    """The window of each layer. What the file does not say is as transformers' config class has it."""
    has_one = kind in _OWN_WINDOW and "sliding_window" not in config
    window = _OWN_WINDOW[kind] if has_one else _first(config, "sliding_window")
    optional = kind.startswith(("qwen", "smollm"))  # off unless the file turns it on
    if not window or not config.get("use_sliding_window", not optional):
        return ()
    period = _first(config, "sliding_window_pattern", "_sliding_window_pattern") or _PERIOD.get(kind, 0)
    first = _first(config, "max_window_layers") if optional else 0
    kinds = _get(config, "layer_types") or [
        "sliding_attention" if n >= first and (not period or (n + 1) % period) else "full_attention"
        for n in range(layers)
    ]
    return tuple(window if each == "sliding_attention" else 0 for each in kinds)


def _dropout(config: ConfigFile, kind: str, *names: str) -> float:
    """The first of these that is there; what transformers' config class has where the file says nothing."""
    inner = _get(config, "attn_config")  # MPT's
    values = [_get(source, name) for source in (config, inner) if isinstance(source, Mapping) for name in names]
    numbers = (float(v) for v in values if isinstance(v, (int, float)) and not isinstance(v, bool))
    return next(numbers, _OWN_DROPOUT.get(kind, {}).get(names[0], 0.0))


def _key_heads(config: ConfigFile, kind: str, heads: int) -> int:
    """Falcon says how its keys are shared in three ways; everyone else by a number, or not at all."""
    if kind in _EVERY_HEAD_ITS_KEYS:
        return heads
    if kind == "falcon" and not _get(config, "new_decoder_architecture"):
        return 1 if config.get("multi_query", True) else heads
    return _first(config, "num_key_value_heads", "num_kv_heads") or heads


def _role(name: str, shape: tuple[int, ...], config: ConfigFile, *, in_layer: bool) -> Role:
    parts = name.split(".")
    tail = parts[-1]
    named = tail in ("weight", "bias")
    module = parts[-2] if named and len(parts) > 1 else tail
    if _NORM.search(module) is not None and len(shape) <= 1:
        return "norm"
    if tail == "bias" or tail.endswith("_bias"):
        return "bias"
    if len(shape) == 3 and ("expert" in name or ("conv" not in module and shape[0] == _experts(config) != 0)):
        return "expert"
    if len(shape) != 2:
        return "other"
    if not named:  # a bare Parameter: no nn.Linear, so nothing that quantises by module type will find it
        return "expert" if "expert" in name else "other"
    if _experts(config) and is_router(name.rpartition(".")[0]):
        return "router"
    if module in HEADS or (name in ("output.weight", "model.output.weight") and not in_layer):
        return "head"
    if is_embedding(module) or (not in_layer and shape[0] == _first(config, "vocab_size")):
        return "embedding"
    if not in_layer and _BEFORE_HEAD.match(name):
        return "other"
    return "linear"


def is_router(module: str) -> bool:
    """Whether a dotted module name of a mixture is that of a layer that chooses experts, or of a part of it."""
    return not _ROUTERS.isdisjoint(module.split(".")[-2:])


def is_embedding(module: str) -> bool:
    """Whether a dotted module name is that of an embedding."""
    return _EMBEDDINGS.search(module.rpartition(".")[2]) is not None


def _experts(config: ConfigFile) -> int:
    return _first(config, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def _first(config: ConfigFile, *names: str) -> int:
    """The first of these config values that is a positive number; 0 if none is."""
    values = (_get(config, name) for name in names)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0), 0)


def _get(config: ConfigFile, name: str) -> Any:
    """A config value; models with several towers keep the language model's under `text_config`."""
    inner = config.get("text_config")
    value = config.get(name)
    return inner.get(name) if value is None and isinstance(inner, Mapping) else value

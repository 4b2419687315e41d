"""Which tensor of a GGUF file is which parameter of transformers' model, and what llama.cpp's converter did to it.

A parameter without a tensor, a tensor without a parameter, or another shape: the file is refused. A layout that is only
nearly right computes fluent nonsense.
Source: the gguf package's own name map, which llama.cpp's converter uses; the converter itself (llama.cpp, conversion/)
for the tensors whose values or rows it rearranges. Checked against it: docs/log, 2026-11-26.
"""

import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from halfbyte.models.gguf.header import GgufHeader
from halfbyte.models.gguf.reader import PLAIN, FileNumbers, GgufError, GgufReader, Order, Transform

# Tables that the config describes; no weights.
ROPE_TABLES = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_STACKED = re.compile(r"\.experts\.(\d+)\.")
_BLOCK = re.compile(r"^blk\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class ParameterSource:
    """Where the values of one parameter are: a tensor of the file (or one expert of it), or several `parts` that
    `compose` puts together, of which `name` is the first."""

    name: str
    expert: int | None = None
    transform: Transform = PLAIN
    parts: tuple[str, ...] = ()
    compose: Callable[..., Iterator[np.ndarray]] | None = None

    def pieces(self, file: GgufReader) -> Iterator[np.ndarray]:
        """Float32 values in the order of the parameter."""
        return self.compose(file, *self.parts) if self.compose else file.pieces(self.name, self.expert, self.transform)


def parameter_sources(
    header: GgufHeader, model_type: str, shapes: Mapping[str, tuple[int, ...]], prefix: str, layers: int
) -> dict[str, ParameterSource]:
    """Where each parameter of a checkpoint comes from, given the shapes that transformers' class has for it. `prefix`:
    the class's base_model_prefix, which the name map has only for some. `layers`: of the model; what the file holds for
    further ones (prediction of several tokens) is left out. Raises GgufError: anything that does not match."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    file = GgufReader(header)
    kinds = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
    if header.architecture not in kinds:
        raise GgufError(f"the installed gguf package does not know {header.architecture!r}: pip install -U gguf")
    names = get_tensor_name_map(kinds[header.architecture], layers)
    sources: dict[str, ParameterSource] = {}
    used, missing = set(ROPE_TABLES), list[str]()
    wrong: list[str] = []
    for name, shape in shapes.items():
        composed = _composed_source(model_type, name, file)
        if composed is not None:
            sources[name] = composed
            used |= set(composed.parts)
            continue
        source = _mapped_source(header.architecture, name, prefix, names, file)
        if source is None:
            missing.append(name)
            continue
        sources[name] = source
        used.add(source.name)
        in_file = file.shape(source.name, source.expert)
        file.places(source.transform.order, source.name, in_file[0])
        file.places(source.transform.columns, source.name, in_file[-1])
        in_file = in_file[::-1] if source.transform.transposed else in_file
        if _squeezed(in_file) != _squeezed(shape):
            wrong.append(f"{source.name} is {list(in_file)}, and {name} of the model {list(shape)}")
    if missing:
        raise GgufError(f"{len(missing)} weights of the model are not in the file, such as {', '.join(missing[:3])}")
    if wrong:
        raise GgufError(f"{len(wrong)} of its tensors have other shapes than the model: {'; '.join(wrong[:3])}")
    blocks = {name: _BLOCK.match(name) for name in file.tensors if name not in used}
    if left := [name for name, block in blocks.items() if block is None or int(block[1]) < layers]:
        raise GgufError(
            f"{len(left)} of its tensors have no place in transformers' {model_type}, such as {', '.join(left[:3])}: "
            f"this kind of {header.architecture} is another model"
        )
    return sources


def _mapped_source(kind: str, name: str, prefix: str, names: object, file: GgufReader) -> ParameterSource | None:
    stacked = _STACKED.search(name)
    plain = _STACKED.sub(".experts.", name)
    # What is no weight or bias of a module: converters call it one.
    ways = [plain, re.sub(r"_bias$", ".bias", plain), re.sub(r"dt_bias$", "dt_proj.bias", plain)]
    ways.append(plain.removeprefix(f"{prefix}."))
    for way in ways:
        mapped = names.get_name(way, try_suffixes=(".weight", ".bias"))  # type: ignore[attr-defined]
        for ending in ("", ".weight", ".bias"):
            if mapped is not None and mapped + ending in file.tensors:
                transform = transform_of(kind, mapped + ending)
                number = int(stacked[1]) if stacked is not None else None
                if number is not None and not 0 <= number < file.shape(mapped + ending)[0]:
                    return None
                return ParameterSource(mapped + ending, number, transform)
    return None


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


# --- rows in another order -------------------------------------------------------------------------------------------


def _rotary(heads_key: str) -> Order:
    """llama.cpp turns neighbours where transformers turns halves: (head, pair, half) -> (head, half, pair)."""

    def order(numbers: FileNumbers, name: str, rows: int) -> np.ndarray:
        heads = numbers.number(heads_key) or numbers.number("attention.head_count")
        return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)

    return order


def _fused_by_head(numbers: FileNumbers, name: str, rows: int) -> np.ndarray:
    """(q, k, v) of all heads -> each head's own q, k, v."""
    heads = numbers.number("attention.head_count")
    return np.arange(rows).reshape(3, heads, rows // heads // 3).swapaxes(0, 1).reshape(-1)


def _fused_by_group(numbers: FileNumbers, name: str, rows: int) -> np.ndarray:
    """All queries, all keys, all values -> each group's queries, its key, its value (Falcon)."""
    groups = numbers.number("attention.head_count_kv")
    size = rows // (numbers.number("attention.head_count") + 2 * groups)
    queries, keys, values = np.split(np.arange(rows), [rows - 2 * groups * size, rows - groups * size])
    parts = [part.reshape(groups, -1) for part in (queries, keys, values)]
    return np.concatenate(parts, axis=1).reshape(-1)


def _grouped_values(numbers: FileNumbers, name: str, rows: int, *, after_keys: bool = False) -> np.ndarray:
    """Value heads (turn, key head) -> (key head, turn); `after_keys`: they follow queries and keys (Qwen3.5)."""
    keys, heads = numbers.number("ssm.group_count"), numbers.number("ssm.time_step_rank")
    first = 2 * keys * numbers.number("ssm.state_size") if after_keys else 0
    tail = np.arange(first, rows).reshape(heads // keys, keys, -1).swapaxes(0, 1).reshape(-1)
    return np.concatenate([np.arange(first), tail])


def _log_of_negated(values: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.log(-values)


_LLAMA = {
    "attn_q.*": Transform(order=_rotary("attention.head_count")),
    "attn_k.*": Transform(order=_rotary("attention.head_count_kv")),
}
_MINUS_ONE = {"*norm.weight": Transform(value=lambda values: values - 1, back=lambda values: values + 1)}
_GROUPED_AFTER_KEYS = partial(_grouped_values, after_keys=True)
_BY_HEAD = {"attn_qkv.*": Transform(order=_fused_by_head)}
_QWEN35 = {
    "ssm_norm.weight": PLAIN,
    **_MINUS_ONE,
    "ssm_a": Transform(order=_grouped_values, value=_log_of_negated),
    "ssm_dt.bias": Transform(order=_grouped_values),
    "ssm_alpha.weight": Transform(order=_grouped_values),
    "ssm_beta.weight": Transform(order=_grouped_values),
    "attn_gate.weight": Transform(order=_grouped_values),
    "attn_qkv.weight": Transform(order=_GROUPED_AFTER_KEYS),
    "ssm_conv1d.weight": Transform(order=_GROUPED_AFTER_KEYS),
    "ssm_out.weight": Transform(columns=_grouped_values),
}
# Architecture of the file -> tensor, without its block -> how it is read. The first pattern that fits counts.
_TRANSFORMS: dict[str, dict[str, Transform]] = {
    **dict.fromkeys(("llama", "granite", "granitemoe", "olmo", "smollm3", "arcee"), _LLAMA),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "nemotron"), _MINUS_ONE),
    **dict.fromkeys(("bloom", "gptneox"), _BY_HEAD),
    **dict.fromkeys(("qwen35", "qwen35moe"), _QWEN35),
    "falcon": {"attn_qkv.weight": Transform(order=_fused_by_group)},
    "gpt2": dict.fromkeys(
        ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight"), Transform(transposed=True)
    ),
    "mamba": {"ssm_a": Transform(value=_log_of_negated)},
}


def transform_of(architecture: str, name: str) -> Transform:
    """What turns a tensor of an architecture's file into the parameter."""
    match = _BLOCK.match(name)
    leaf = match[2] if match is not None else name
    rules = _TRANSFORMS.get(architecture, {})
    return next((transform for pattern, transform in rules.items() if fnmatch.fnmatchcase(leaf, pattern)), PLAIN)


# --- parameters of several tensors -----------------------------------------------------------------------------------


def _composed_source(model_type: str, name: str, file: GgufReader) -> ParameterSource | None:
    """The source of a parameter that is made of several tensors."""
    layer = re.search(r"\.layers\.(\d+)\.", name)
    for kind, ending, leaves, make in _COMPOSED:
        if model_type in kind.split() and name.endswith(ending) and layer is not None:
            parts = [f"blk.{layer[1]}.{leaf}" for leaf in leaves.split()]
            if all(part in file.tensors for part in parts):
                return ParameterSource(parts[0], parts=tuple(parts), compose=make)
    return None


def _experts(file: GgufReader, name: str) -> range:
    return range(file.shape(name)[0])


def _interleaved(file: GgufReader, gate: str, up: str) -> Iterator[np.ndarray]:
    """(E, I, H) twice -> (E, H, 2I), gate and up in turns."""
    for expert in _experts(file, gate):
        both = np.stack([file.whole(gate, expert), file.whole(up, expert)], axis=1)  # (I, 2, H)
        yield np.ascontiguousarray(both.reshape(-1, both.shape[-1]).T)


def _interleaved_bias(file: GgufReader, gate: str, up: str) -> Iterator[np.ndarray]:
    """(E, I) twice -> (E, 2I)."""
    both = np.stack([file.whole(gate), file.whole(up)], axis=-1)
    yield both.reshape(len(both), -1)


def _transposed(file: GgufReader, name: str) -> Iterator[np.ndarray]:
    """(E, out, in) -> (E, in, out)."""
    for expert in _experts(file, name):
        yield np.ascontiguousarray(file.whole(name, expert).T)


def _stacked(file: GgufReader, gate: str, up: str) -> Iterator[np.ndarray]:
    """(E, I, H) twice -> (E, 2I, H), an expert's gate before its up."""
    for expert in _experts(file, gate):
        yield from file.pieces(gate, expert)
        yield from file.pieces(up, expert)


def _absorbed(file: GgufReader, keys: str, values: str) -> Iterator[np.ndarray]:
    """(heads, R, nope) and (heads, v, R) -> (heads * (nope + v), R)."""
    for head in _experts(file, keys):
        yield np.ascontiguousarray(file.whole(keys, head).T)
        yield file.whole(values, head)


# What puts whole blocks together: all experts of a layer, each of one tensor's rows below another's, or turned too.
TURNED = (_interleaved, _transposed)
OF_EXPERTS = (_stacked, *TURNED)
# (model types, ending of the parameter, tensors, what makes it)
_COMPOSED: tuple[tuple[str, str, str, Callable[..., Iterator[np.ndarray]]], ...] = (
    ("gpt_oss", "experts.gate_up_proj", "ffn_gate_exps.weight ffn_up_exps.weight", _interleaved),
    ("gpt_oss", "experts.gate_up_proj_bias", "ffn_gate_exps.bias ffn_up_exps.bias", _interleaved_bias),
    ("gpt_oss", "experts.down_proj", "ffn_down_exps.weight", _transposed),
    ("granitemoe", "block_sparse_moe.input_linear.weight", "ffn_gate_exps.weight ffn_up_exps.weight", _stacked),
    ("qwen3_5_moe_text", "experts.gate_up_proj", "ffn_gate_exps.weight ffn_up_exps.weight", _stacked),
    ("deepseek_v2 deepseek_v3", "kv_b_proj.weight", "attn_k_b.weight attn_v_b.weight", _absorbed),
)

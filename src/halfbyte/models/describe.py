"""What a model is, without its weights: its config and the list of its tensors, from headers alone.

A plan is asked for before anything is downloaded, and must not wait for a library that can load models. A bundled name
needs nothing; a folder gives config.json and headers (or the config alone, where the architecture is known); a GGUF its
own header; a hub id the same through HTTP range requests (RFC 9110, section 14): kilobytes, not the model.

From a config alone to the list of tensors, for the architectures that are met most: what a header would say.

Why: `halfbyte plan llama-2-70b` must answer without the model and without a network, and transformers, which knows
every architecture, costs seconds to import.
What: the `Layout` of a family (`families.py`) names its tensors as transformers does, with a letter for each size.
Source: a test builds each family in transformers on the meta device and compares.
"""

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path

from halfbyte.errors import SourceError, typed
from halfbyte.models import tensors
from halfbyte.models.families import FAMILIES, LLAMA, Layout, layout_of
from halfbyte.models.gguf import header as gguf_header
from halfbyte.models.gguf.blocks import BLOCKS
from halfbyte.models.gguf.reader import GgufError
from halfbyte.models.sources import hub, lookup, safetensors
from halfbyte.models.tensors import Facts, TensorSpec, facts_of, spec_of
from halfbyte.types import ConfigFile, Document

_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


def tensors_of(config: ConfigFile) -> list[TensorSpec]:
    """The tensors of a model as its checkpoint would list them; a tied head once, as the embedding. Raises SourceError:
    the architecture has no layout in `FAMILIES`, or the config lacks what the list follows from."""
    kind = str(config.get("model_type", ""))
    if layout_of(kind) is None:
        raise SourceError(
            f"the tensors of the architecture {kind or '(config.json has no model_type)'!r} are not known from its "
            f"config alone. Known: {', '.join(sorted(filter(layout_of, FAMILIES)))}.",
            fix="download the model's .safetensors files (their headers are enough) and give their folder, or give its "
            "hub id: hf download ORG/NAME",
        )
    sizes = facts_of(config, [])
    lacking = [name for name in ("hidden", "layers", "vocab", "heads") if not getattr(sizes, name)]
    if lacking:
        raise SourceError(
            f"the config of a {kind} gives no {', '.join(lacking)} (a positive number), so its tensors do not follow.",
            fix="use the config.json that belongs to the model",
        )
    dtype = _DTYPES.get(str(config.get("dtype") or config.get("torch_dtype") or ""), "BF16")
    return [spec_of(name, shape, dtype, config) for name, shape in _named(_layout(config), config, sizes)]


def _named(layout: Layout, config: ConfigFile, f: Facts) -> Iterator[tuple[str, tuple[int, ...]]]:
    wide, narrow = f.heads * f.head_size, f.key_heads * f.head_size
    sizes = {"V": f.vocab, "D": f.hidden, "I": f.intermediate, "A": wide, "K": narrow, "H": f.head_size}
    sizes |= {"Q": wide + 2 * narrow, "G": 2 * f.intermediate, "T": 3 * f.hidden, "F": 4 * f.hidden}
    sizes |= {"N": int(config.get("word_embed_proj_dim") or f.hidden), "P": f.positions, "O": f.positions + 2}

    def tensors(prefix: str, names: str, biased: str = "") -> Iterator[tuple[str, tuple[int, ...]]]:
        words = names.split()
        for name, letters in zip(words[::2], words[1::2], strict=True):
            shape = tuple(sizes[letter] for letter in letters)
            yield f"{prefix}{name}.weight", shape
            if biased and re.search(biased, name):  # GPT-2's Conv1D is stored (in, out)
                yield f"{prefix}{name}.bias", shape[-1:] if f.model_type == "gpt2" else shape[:1]

    def norms(prefix: str, names: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        return tensors(prefix, " ".join(f"{name} D" for name in names.split()), "." if layout.norm_bias else "")

    yield from tensors("", f"{layout.embedding} VN {layout.more}")
    for n in range(f.layers):
        yield from tensors(f"{layout.layers}.{n}.", layout.linears, layout.biased)
        if FAMILIES[f.model_type].qk_norms:
            yield from tensors(f"{layout.layers}.{n}.", "self_attn.q_norm H self_attn.k_norm H")
        yield from norms(f"{layout.layers}.{n}.", layout.norms)
    yield from norms("", layout.outer_norms)
    if layout.head_bias or not config.get("tie_word_embeddings", layout.tied):
        yield from tensors("", f"{layout.head} VN", "." if layout.head_bias else "")


def _layout(config: ConfigFile) -> Layout:
    """The layout of the config's family, with what other values of the config change."""
    kind = config["model_type"]
    family, layout = FAMILIES[kind], layout_of(kind)
    assert layout is not None
    if layout.linears == LLAMA.linears:
        biased = [layout.biased or "self_attn"] if config.get("attention_bias", bool(layout.biased)) else []
        biased += ["mlp"] if config.get("mlp_bias") else []
        more = " pre_feedforward_layernorm post_feedforward_layernorm" if family.norms == 4 else ""
        return replace(layout, norms=layout.norms + more, biased="|".join(biased))
    if kind == "gpt_neox" and not config.get("attention_bias", True):
        return replace(layout, biased="mlp")
    if kind == "falcon":
        new = config.get("new_decoder_architecture", False)
        norms = "ln_attn ln_mlp" if new else "input_layernorm" if config.get("parallel_attn", True) else layout.norms
        keys = "QD" if new or config.get("multi_query", True) else "TD"
        linears = layout.linears.replace("QD", keys)
        return replace(layout, norms=norms, linears=linears, biased="." if config.get("bias") else "")
    if kind == "opt":
        has_last = config.get("do_layer_norm_before", True) and not config.get("_remove_final_layer_norm", False)
        narrow = config.get("word_embed_proj_dim") not in (None, config.get("hidden_size"))
        more = " model.decoder.project_out ND model.decoder.project_in DN" if narrow else ""
        return replace(layout, outer_norms=layout.outer_norms if has_last else "", more=layout.more + more)
    return layout


# Packaged models under the name of the reference that has their shape.
ALIASES = {"gemma3-270m": "gemma-3-270m"}
# What is added to a model's name on the hub and changes no tensor's shape: how it was tuned, its version, its context.
_SAME_SHAPE = re.compile(r"(-(hf|instruct|it|pt|chat|base|thinking|v\d+(\.\d+)?|\d+k|\d{4}))$")
_QUANTISED = "config.json (weights are quantised already)"  # packed codes; the architecture says what they stand for
# The first request for a file: the header of a shard with a few hundred tensors fits.
FIRST_BYTES = 64 * 1024
# `general.architecture` of a GGUF -> model_type of transformers, where the two differ.
_GGUF_TYPES = {"gptneox": "gpt_neox", "gemma3": "gemma3_text", "phi2": "phi"}
# config.json's name -> the GGUF's, below its architecture.
_GGUF_FIELDS = {
    "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length", "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length", "max_position_embeddings": "context_length", "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count", "moe_intermediate_size": "expert_feed_forward_length",
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A model without its weights. `origin` says where the list of tensors is from, `read_bytes` what that took."""

    name: str
    config: ConfigFile
    specs: tuple[TensorSpec, ...]
    facts: Facts
    origin: str
    read_bytes: int = 0
    path: Path | None = None

    @property
    def parameters(self) -> int:
        return sum(s.numel for s in self.specs)


def describe(model: str, revision: str | None = None, *, in_blocks: bool = False) -> Shape:
    """The shape of a bundled name, a folder, a `.gguf` file or a hub id `org/name[@revision]`. `in_blocks`: of a model
    that stays in its GGUF file, with the types of its blocks. Raises SourceError: nothing is there under that name; a
    file is damaged; the architecture is unknown and no header is at hand; the config says nothing that a decoder could
    be made of."""
    model = model.strip()
    if in_blocks:
        return _of_gguf(lookup.blocks_at_hand(model), model)
    name = ALIASES.get(model.lower(), model.lower())
    if name in references():
        return _of_reference(model, name, "bundled shape")
    path = Path(model).expanduser()
    if path.is_dir():
        return of_folder(path)
    if path.is_file():
        if path.suffix == ".gguf":
            return _of_gguf(path, str(path))
        folder = (path.parent / "config.json").is_file()
        rows = f"halfbyte data check {typed(path)} --model MODEL, if it holds rows"
        raise SourceError(
            f"{path} is one file; a model is a folder, a .gguf file or a name.",
            fix=f"give {path.parent}" if folder else rows,
        )
    match = hub.HUB_ID.fullmatch(model)
    if match is None or model.startswith((".", "/", "~")):
        near = difflib.get_close_matches(name, [*sorted(references()), *ALIASES], n=3, cutoff=0.5)
        raise SourceError(
            f"there is no {model}: not a folder, not a .gguf file, and not a bundled shape.",
            fix=f"did you mean {' or '.join(near)}?" if near else f"bundled are {', '.join(sorted(references()))}",
        )
    try:
        return _of_hub(match["id"], revision or match["revision"])
    except hub.NotAtHand as error:
        reference = reference_of(match["id"])
        if reference is None:
            raise
        return _of_reference(model, reference, f"bundled shape of {reference}: {error.message}")


def reference_of(repo: str) -> str | None:
    """The bundled shape of a hub id: `Qwen/Qwen3-8B` or `meta-llama/Meta-Llama-3-8B-Instruct`."""
    name, known = repo.rpartition("/")[2].lower().removeprefix("meta-"), references()
    while name not in known:
        if name == (shorter := _SAME_SHAPE.sub("", name)):
            return None
        name = shorter
    return name


@cache
def references() -> dict[str, Document]:
    """Shapes of well-known models, from `references.json`: name -> `config`, and of a mixture `tensors`: a name, `0-31`
    for the numbers of its layers -> shape. Only what shapes follow from is kept. Source: the models' published
    `config.json`; the numbers of parameters that follow are compared with the published ones in a test."""
    return json.loads(resources.files(__package__).joinpath("references.json").read_text("utf-8"))


def reference_tensors(name: str) -> list[tuple[str, tuple[int, ...]]] | None:
    """Every tensor of a bundled mixture, with its shape; None where they follow from the config."""
    patterns = references()[name].get("tensors")
    return None if patterns is None else [each for pattern in patterns.items() for each in _of_every_layer(*pattern)]


def _of_every_layer(pattern: str, shape: list[int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    span = re.search(r"\.(\d+)-(\d+)\.", pattern)
    for layer in range(int(span[1]), int(span[2]) + 1) if span else (None,):
        yield pattern if span is None else pattern.replace(span[0], f".{layer}."), tuple(shape)


def _of_reference(model: str, name: str, origin: str) -> Shape:
    config, named = references()[name]["config"], reference_tensors(name)
    specs = None if named is None else [tensors.spec_of(each, shape, "BF16", config) for each, shape in named]
    return _of(model, config, origin, specs)


def of_folder(folder: Path, name: str | None = None) -> Shape:
    """From a folder's headers; from its config alone where it has no safetensors, or holds a quantised base."""
    config = tensors.read_config(folder)
    read = (folder / "config.json").stat().st_size
    name = name or str(folder)
    if tensors.is_quantised(config):
        return _of(name, config, _QUANTISED, read=read, path=folder)
    try:
        files = safetensors.weight_files(folder)
    except SourceError:
        if layout_of(config.get("model_type")) is None:
            raise
        return _of(name, config, "config.json alone", read=read, path=folder)
    for file in files:
        with file.open("rb") as stream:
            read += 8 + int.from_bytes(stream.read(8), "little")
    specs = tensors.specs_of((safetensors.read_header(file) for file in files), config)
    return _of(name, config, _headers(files), specs, read, folder)


def _headers(files: Sequence[object]) -> str:
    return f"headers of {len(files)} file{'s' * (len(files) > 1)}"


def _of(
    name: str, config: ConfigFile, origin: str, specs: list[TensorSpec] | None = None, read: int = 0,
    path: Path | None = None,
) -> Shape:  # fmt: skip
    """The shape; its tensors by the architecture where they are not given."""
    specs = tensors_of(config) if specs is None else specs
    facts = tensors.facts_of(config, specs)
    lacking = [what for what in ("hidden", "layers", "vocab") if not getattr(facts, what)]
    if lacking:
        raise SourceError(
            f"{name}: neither its config nor its tensors say {', '.join(lacking)}; this is no language model that can "
            "be planned for.",
            fix="give the folder of a causal language model (config with hidden_size, num_hidden_layers, vocab_size)",
        )
    return Shape(name, config, tuple(specs), facts, origin, read, path)


def _of_gguf(path: Path, name: str) -> Shape:
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    from halfbyte.models.gguf.architectures import check_architecture  # what it imports takes half a second

    header = gguf_header.read_header(path)
    try:
        check_architecture(header)
    except GgufError as refusal:
        raise SourceError(f"{path} cannot be used: {refusal}") from refusal
    kind = header.architecture
    values = {key: header.metadata.get(f"{kind}.{field}") for key, field in _GGUF_FIELDS.items()}
    config: Document = {key: value for key, value in values.items() if isinstance(value, int)}
    shapes_by_name = {tensor.name: tensor.shape for tensor in header.tensors}
    if "token_embd.weight" in shapes_by_name:
        config["vocab_size"] = shapes_by_name["token_embd.weight"][0]
    config["model_type"] = _GGUF_TYPES.get(kind, kind)
    config["tie_word_embeddings"] = "output.weight" not in shapes_by_name
    config["attention_bias"] = "blk.0.attn_q.bias" in shapes_by_name
    specs = None
    types = {tensor.name: (tensor.type,) for tensor in header.tensors if tensor.type in BLOCKS}
    # A Mixtral's file calls itself a llama.
    if layout_of(config["model_type"]) is None or config.get("num_experts"):
        names = [re.sub(r"^output\.weight$", "lm_head.weight", t.name) for t in header.tensors]
        names = [name.replace("blk.", "layers.").replace("token_embd", "embed_tokens") for name in names]
        names = [name.replace("ffn_gate_inp.", "gate.") for name in names]
        specs = [
            replace(tensors.spec_of(name, t.shape, "BF16", config), blocks=types.get(t.name, ()))
            for name, t in zip(names, header.tensors, strict=True)
        ]
    else:
        known = get_tensor_name_map(
            {name: k for k, name in MODEL_ARCH_NAMES.items()}[kind], config["num_hidden_layers"]
        )
        there = ((spec, known.get_name(spec.name, (".weight", ".bias"))) for spec in tensors_of(config))
        specs = [replace(spec, blocks=types.get(tensor or "", ())) for spec, tensor in there]
    return _of(name, config, "GGUF header", specs, header.header_bytes, path)


def _of_hub(repo: str, revision: str | None) -> Shape:
    """Through the hub's cache where it has the model, else by range requests."""
    config_path = hub.small_file(repo, "config.json", revision)
    if config_path is None:
        raise SourceError(f"{repo} has no config.json, so it is not a model.", fix="check the name on the hub")
    folder = config_path.parent
    commit = folder.name
    name = repo if revision is None else f"{repo}@{revision}"
    if (folder / safetensors.SINGLE).is_file():
        return of_folder(folder, name)
    index = hub.small_file(repo, safetensors.INDEX, commit)
    files = [safetensors.SINGLE] if index is None else safetensors.indexed_files(index)
    if index is not None and all((folder / file).is_file() for file in files):
        return of_folder(folder, name)
    config = tensors.read_config(folder)
    read = config_path.stat().st_size + (index.stat().st_size if index is not None else 0)
    headers = []
    for file in files:
        remote = hub.Remote.open(repo, file, commit)
        if remote is None:
            if layout_of(config.get("model_type")) is None:
                raise SourceError(
                    f"{name} has no safetensors, and the tensors of a {config.get('model_type')!r} are not known from "
                    "its config.",
                    fix=f"download it, and give its folder: hf download {repo}",
                )
            return _of(name, config, "config.json alone", read=read)
        start = remote.read(0, FIRST_BYTES)
        length = safetensors.header_length(start[:8], remote.size, f"{repo}/{file}")
        if 8 + length > len(start):
            start += remote.read(len(start), 8 + length)
        headers.append(safetensors.parse_header(start[8 : 8 + length], remote.size, f"{repo}/{file}"))
        read += remote.read_bytes
    if tensors.is_quantised(config):
        return _of(name, config, _QUANTISED, read=read)
    return _of(name, config, f"{_headers(files)} on the hub", tensors.specs_of(headers, config), read)

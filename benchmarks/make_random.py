"""Random models of real architectures for the benchmarks, with a tokenizer of one-token words; no download.

    python benchmarks/make_random.py llama FOLDER              # one of ten architectures, small
    python benchmarks/make_random.py lfm2-350m FOLDER          # LFM2-350M's shape, or qwen3_5-350m: 0.7 GB in bf16
    python benchmarks/make_random.py llama-2-7b-nf4 FOLDER     # Llama-2-7B in NF4, as bitsandbytes writes it: 3.9 GB
    python benchmarks/make_random.py llama-2-7b-q4_k_m FILE    # the same shape as llama.cpp quantises it: 4.1 GB

Speed and memory of a step do not depend on the values of the weights, so random ones measure them as well.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

WIDTH, LAYERS, HEADS, VOCABULARY, POSITIONS = 512, 4, 8, 8192, 1024
WORDS = 200

_LLAMA = {
    "hidden_size": WIDTH, "intermediate_size": 1536, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS // 2, "max_position_embeddings": POSITIONS,
}  # fmt: skip
_GEMMA = {
    **_LLAMA, "head_dim": WIDTH // HEADS, "query_pre_attn_scalar": WIDTH // HEADS, "sliding_window": 512,
    "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
}  # fmt: skip
_GPT2 = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS}
_OPT = {**_LLAMA, "ffn_dim": 2048, "word_embed_proj_dim": WIDTH}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _LLAMA),
    "qwen3": ("Qwen3Config", {**_LLAMA, "head_dim": WIDTH // HEADS}),
    "gemma3": ("Gemma3TextConfig", _GEMMA),
    "phi3": ("Phi3Config", {**_LLAMA, "original_max_position_embeddings": POSITIONS}),
    "gpt2": ("GPT2Config", _GPT2),
    "bloom": ("BloomConfig", {"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS}),
    "gpt_neox": ("GPTNeoXConfig", {**_LLAMA, "intermediate_size": 2048}),
    "falcon": ("FalconConfig", {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}),
    "opt": ("OPTConfig", _OPT),
    "mpt": ("MptConfig", {"d_model": WIDTH, "n_heads": HEADS, "n_layers": LAYERS, "max_seq_len": POSITIONS}),
    "mixtral": ("MixtralConfig", {**_LLAMA, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**_LLAMA, "moe_intermediate_size": 384, "num_experts": 32, "num_experts_per_tok": 8},
    ),
    "gpt_oss": (
        "GptOssConfig",
        {**_LLAMA, "intermediate_size": 512, "num_local_experts": 16, "num_experts_per_tok": 4},
    ),
    # LiquidAI/LFM2-350M; and layers like those of Qwen3.5-0.8B, 12 of its 24, with a smaller vocabulary
    "lfm2-350m": ("Lfm2Config", {
        "hidden_size": 1024, "block_ff_dim": 6656, "num_hidden_layers": 16, "num_attention_heads": 16,
        "num_key_value_heads": 8, "full_attn_idxs": [2, 5, 8, 10, 12, 14], "vocab_size": 65536,
    }),
    "qwen3_5-350m": ("Qwen3_5TextConfig", {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 16,
        "tie_word_embeddings": True, "vocab_size": 65536,
    }),
    "llama-128k": ("LlamaConfig", {**_LLAMA, "num_hidden_layers": 2, "vocab_size": 128_256}),
}  # fmt: skip
MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss")
HYBRIDS = ("lfm2-350m", "qwen3_5-350m")
ARCHITECTURES = tuple(name for name in _CONFIGS if name not in ("llama-128k", *MIXTURES, *HYBRIDS))
# What a user would name for "q and v": the fused matrix where the architecture has one.
QV: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_CONFIGS, ("q_proj", "v_proj")),
    "phi3": ("qkv_proj",), "gpt2": ("c_attn",), "mpt": ("Wqkv",),
    **dict.fromkeys(("bloom", "gpt_neox", "falcon"), ("query_key_value",)),
}  # fmt: skip
LLAMA_2_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "max_position_embeddings": 4096, "vocab_size": 32000,
}  # fmt: skip


def tokenizer() -> Any:
    """Words w0 to w199, a token each, split at spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(WORDS))]
    made = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        chat_template="{% for message in messages %}{{ message['content'] }} {% endfor %}",
    )  # fmt: skip


def small(folder: Path, name: str, changes: Mapping[str, Any] | None = None) -> Path:
    """A checkpoint of `name` in bf16, weights and tokenizer. `changes`: fields of its config."""
    import torch
    import transformers

    cls, values = _CONFIGS[name]
    config = getattr(transformers, cls)(
        **{
            "vocab_size": VOCABULARY,
            **values,
            **(changes or {}),
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def rows(folder: Path, n: int, seed: int = 0) -> str:
    """Questions and answers of 60 to 400 words, as long as GSM8K's are; returns the file."""
    draw = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(f"w{draw.randrange(WORDS)}" for _ in range(draw.randint(low, high)))

    lines = [json.dumps({"prompt": words(30, 150), "completion": words(30, 250)}) + "\n" for _ in range(n)]
    path = folder / "rows.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def sharded_llama(
    folder: Path, values: dict[str, int], shard_bytes: int = 2_000_000_000, *, alike: bool = False
) -> int:
    """A Llama in bf16, every weight drawn for itself, written shard by shard: no more than one is in memory.

    Args:
        alike: layers hold the same numbers, which takes a tenth of the time.

    Returns:
        Bytes of the shards.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(**values, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    shards: list[list[str]] = [[]]
    held = 0
    for name, shape in shapes.items():
        if held + 2 * shape.numel() > shard_bytes and shards[-1]:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += 2 * shape.numel()
    index: dict[str, str] = {}
    drawn: dict[str, Any] = {}
    total = 0

    def draw(name: str) -> Any:
        kind = re.sub(r"\.\d+\.", ".", name) if alike else name
        if kind in drawn:
            return drawn[kind].clone()
        tensor = torch.empty(shapes[name], dtype=torch.bfloat16)
        tensor = tensor.fill_(1) if tensor.ndim == 1 else tensor.normal_(0, 0.02, generator=generator)
        return drawn.setdefault(kind, tensor) if alike else tensor

    for number, names in enumerate(shards, start=1):
        tensors = {name: draw(name) for name in names}
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(names, file))
        total += (folder / file).stat().st_size
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    config.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return total


def quantised_llama(folder: Path, values: dict[str, int]) -> Path:
    """A pre-quantised checkpoint (NF4, double quantisation, bf16) of a Llama shape, one file a decoder layer.

    The layers hold the same numbers: a layer is drawn and quantised once and written under every layer's name.
    """
    import torch
    from bitsandbytes.functional import quantize_4bit
    from safetensors.torch import save_file
    from transformers import BitsAndBytesConfig, LlamaConfig

    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(**values, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Any:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    hidden, inner = config.hidden_size, config.intermediate_size
    keys = config.num_key_value_heads * (hidden // config.num_attention_heads)
    shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    layer: dict[str, Any] = {f"{n}.weight": torch.ones(hidden, dtype=torch.bfloat16)
                             for n in ("input_layernorm", "post_attention_layernorm")}  # fmt: skip
    for name, shape in shapes.items():
        packed, state = quantize_4bit(draw(*shape), quant_type="nf4", compress_statistics=True)
        layer[f"{name}.weight"] = packed
        layer |= {f"{name}.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    index: dict[str, str] = {}

    def write(file: str, tensors: dict[str, Any]) -> None:
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, file))

    for number in range(config.num_hidden_layers):
        write(f"layer-{number:03}.safetensors", {f"model.layers.{number}.{k}": v for k, v in layer.items()})
    write("ends.safetensors", {
        "model.embed_tokens.weight": draw(config.vocab_size, hidden),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        "lm_head.weight": draw(config.vocab_size, hidden),
    })  # fmt: skip
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = torch.bfloat16
    config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    config.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def gguf_llama(path: Path, values: Mapping[str, int], types: tuple[str, str] = ("Q4_K", "Q6_K")) -> Path:
    """A GGUF file of this shape, random blocks, in the types of Q4_K_M (llama.cpp's `use_more_bits`) or in others. One
    tensor at a time is in memory."""
    import gguf
    import numpy as np

    small, large = (gguf.GGMLQuantizationType[kind] for kind in types)
    generator, scale = np.random.default_rng(0), np.array([1e-4], np.float16).view(np.uint8)
    layers, d, inner, words = (
        values[k] for k in ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
    )
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(values["max_position_embeddings"])
    writer.add_embedding_length(d)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(values["num_attention_heads"])
    writer.add_head_count_kv(values["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(d // values["num_attention_heads"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M if types[0] == "Q4_K" else gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"w{i}" for i in range(words)])
    writer.add_token_scores([0.0] * words)
    writer.add_token_types([1] * words)

    tensors: list[Callable[[], Any]] = []

    def add(name: str, o: int, width: int, kind: Any) -> None:
        weights, nbytes = gguf.GGML_QUANT_SIZES[kind]
        shape = (o, width // weights * nbytes)
        writer.add_tensor_info(f"{name}.weight", shape, np.dtype(np.uint8), o * shape[1], raw_dtype=kind)

        def blocks() -> Any:
            made = generator.integers(0, 256, (o * width // weights, nbytes), np.uint8)
            for at in {"Q4_K": (0, 2), "Q6_K": (208,), "Q4_0": (0,)}[kind.name]:
                made[:, at : at + 2] = scale
            return made.reshape(shape)

        tensors.append(blocks)

    def norm(name: str) -> None:
        writer.add_tensor_info(f"{name}.weight", (d,), np.dtype(np.float32), 4 * d)
        tensors.append(lambda: np.ones(d, np.float32))

    add("token_embd", words, d, small)
    add("output", words, d, large)
    norm("output_norm")
    for i in range(layers):
        more = large if i < layers // 8 or i >= 7 * layers // 8 or (i - layers // 8) % 3 == 2 else small
        for name, o, width, kind in (
            ("attn_q", d, d, small), ("attn_k", d, d, small), ("attn_v", d, d, more), ("attn_output", d, d, small),
            ("ffn_gate", inner, d, small), ("ffn_up", inner, d, small), ("ffn_down", d, inner, more),
        ):  # fmt: skip
            add(f"blk.{i}.{name}", o, width, kind)
        norm(f"blk.{i}.attn_norm")
        norm(f"blk.{i}.ffn_norm")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor())
    writer.close()
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*_CONFIGS, "llama-2-7b-nf4", "llama-2-7b-q4_k_m", "llama-2-7b-q4_0"])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    if args.name == "llama-2-7b-nf4":
        quantised_llama(args.folder, LLAMA_2_7B)
    elif args.name == "llama-2-7b-q4_k_m":
        gguf_llama(args.folder, LLAMA_2_7B)
    elif args.name == "llama-2-7b-q4_0":
        gguf_llama(args.folder, LLAMA_2_7B, ("Q4_0", "Q4_0"))
    else:
        small(args.folder, args.name)
    print(args.folder)


if __name__ == "__main__":
    main()

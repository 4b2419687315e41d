"""Shapes of well-known models, by name: `halfbyte plan llama-2-70b` needs no file and no network.

Mixtures of experts stand in `mixtures.json`, each with its tensors, `0-31` for the number of a layer.

Source: the models' published `config.json`; the numbers of parameters that follow are compared with the published ones
in a test. Only what shapes follow from is kept.
"""

import json
import re
from collections.abc import Iterator
from functools import cache, partial
from importlib import resources

from halfbyte.types import Document

_KEYS = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size"
_OLD: Document = {"positions": 2048, "dtype": "float16"}
_WRITTEN = {"positions": "max_position_embeddings", "tied": "tie_word_embeddings"}


def _config(keys: str, *sizes: int, kind: str, **more: object) -> Document:
    """A `config.json` with these sizes under these keys, and more values."""
    named = {_WRITTEN.get(key, key): value for key, value in more.items()}
    return {"model_type": kind, **dict(zip(keys.split(), sizes, strict=True)), **named}


_llama = partial(_config, _KEYS, kind="llama", positions=4096, tied=False)
_qwen2 = partial(_llama, kind="qwen2", positions=32768)
_qwen3 = partial(_llama, kind="qwen3", positions=40960, head_dim=128)
_gemma = partial(_llama, positions=8192, tied=True, head_dim=256)
_phi3 = partial(_llama, kind="phi3")
_phi = partial(_llama, kind="phi", positions=2048)
_gpt2 = partial(_config, "n_embd n_layer n_head", kind="gpt2", n_positions=1024, vocab_size=50257, dtype="float32")
_bloom = partial(_config, "hidden_size n_layer n_head", kind="bloom", vocab_size=250880)
_neox = partial(_config, _KEYS.replace("num_key_value_heads ", ""), kind="gpt_neox", tied=False, **_OLD)
_opt = partial(
    _config, "hidden_size ffn_dim num_hidden_layers num_attention_heads", kind="opt", vocab_size=50272, **_OLD
)
_falcon = partial(
    _config, "hidden_size num_hidden_layers num_attention_heads", kind="falcon", vocab_size=65024, positions=2048
)
_mpt = partial(_config, "d_model n_layers n_heads max_seq_len", kind="mpt", vocab_size=50432)

REFERENCES: dict[str, Document] = {
    "llama-2-7b": _llama(4096, 11008, 32, 32, 32, 32000),
    "llama-2-13b": _llama(5120, 13824, 40, 40, 40, 32000),
    "llama-2-70b": _llama(8192, 28672, 80, 64, 8, 32000),
    "llama-3-8b": _llama(4096, 14336, 32, 32, 8, 128256, positions=8192),
    "llama-3-70b": _llama(8192, 28672, 80, 64, 8, 128256, positions=8192),
    "llama-3.1-8b": _llama(4096, 14336, 32, 32, 8, 128256, positions=131072),
    "llama-3.1-70b": _llama(8192, 28672, 80, 64, 8, 128256, positions=131072),
    "llama-3.1-405b": _llama(16384, 53248, 126, 128, 8, 128256, positions=131072),
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, 8, 128256, head_dim=64, positions=131072, tied=True),
    "llama-3.2-3b": _llama(3072, 8192, 28, 24, 8, 128256, head_dim=128, positions=131072, tied=True),
    "llama-3.3-70b": _llama(8192, 28672, 80, 64, 8, 128256, positions=131072),
    "tinyllama-1.1b": _llama(2048, 5632, 22, 32, 4, 32000, positions=2048),
    "codellama-7b": _llama(4096, 11008, 32, 32, 32, 32016, positions=16384),
    "yi-6b": _llama(4096, 11008, 32, 32, 4, 64000),
    "yi-34b": _llama(7168, 20480, 60, 56, 8, 64000),
    "smollm2-135m": _llama(576, 1536, 30, 9, 3, 49152, positions=8192, tied=True),
    "smollm2-360m": _llama(960, 2560, 32, 15, 5, 49152, positions=8192, tied=True),
    "smollm2-1.7b": _llama(2048, 8192, 24, 32, 32, 49152, positions=8192, tied=True),
    "smollm3-3b": _llama(2048, 11008, 36, 16, 4, 128256, kind="smollm3", positions=65536, tied=True),
    "mistral-7b": _llama(4096, 14336, 32, 32, 8, 32000, kind="mistral", positions=32768),
    "mistral-nemo-12b": _llama(5120, 14336, 40, 32, 8, 131072, kind="mistral", head_dim=128, positions=131072),
    "mistral-small-24b": _llama(5120, 32768, 40, 32, 8, 131072, kind="mistral", head_dim=128, positions=32768),
    "qwen2.5-0.5b": _qwen2(896, 4864, 24, 14, 2, 151936, tied=True),
    "qwen2.5-1.5b": _qwen2(1536, 8960, 28, 12, 2, 151936, tied=True),
    "qwen2.5-3b": _qwen2(2048, 11008, 36, 16, 2, 151936, tied=True),
    "qwen2.5-7b": _qwen2(3584, 18944, 28, 28, 4, 152064),
    "qwen2.5-14b": _qwen2(5120, 13824, 48, 40, 8, 152064),
    "qwen2.5-32b": _qwen2(5120, 27648, 64, 40, 8, 152064),
    "qwen2.5-72b": _qwen2(8192, 29568, 80, 64, 8, 152064),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, 8, 151936, tied=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, 8, 151936, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, 8, 151936, tied=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, 8, 151936),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40, 8, 151936),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64, 8, 151936),
    "gemma-2b": _gemma(2048, 16384, 18, 8, 1, 256000, kind="gemma"),
    "gemma-7b": _gemma(3072, 24576, 28, 16, 16, 256000, kind="gemma"),
    "gemma-2-2b": _gemma(2304, 9216, 26, 8, 4, 256000, kind="gemma2"),
    "gemma-2-9b": _gemma(3584, 14336, 42, 16, 8, 256000, kind="gemma2"),
    "gemma-2-27b": _gemma(4608, 36864, 46, 32, 16, 256000, kind="gemma2", head_dim=128),
    "gemma-3-270m": _gemma(640, 2048, 18, 4, 1, 262144, kind="gemma3_text", sliding_window=512),
    "gemma-3-4b": _gemma(2560, 10240, 34, 8, 4, 262208, kind="gemma3_text", sliding_window=1024, positions=131072),
    "gemma-3-12b": _gemma(3840, 15360, 48, 16, 8, 262208, kind="gemma3_text", sliding_window=1024, positions=131072),
    "gemma-3-27b": _gemma(
        5376, 21504, 62, 32, 16, 262208, kind="gemma3_text", sliding_window=1024, positions=131072, head_dim=128
    ),
    "gemma-3-1b": _gemma(1152, 6912, 26, 4, 1, 262144, kind="gemma3_text", sliding_window=512),
    "phi-1.5": _phi(2048, 8192, 24, 32, 32, 51200),
    "phi-2": _phi(2560, 10240, 32, 32, 32, 51200),
    "phi-3-mini": _phi3(3072, 8192, 32, 32, 32, 32064),
    "phi-3-medium": _phi3(5120, 17920, 40, 40, 10, 32064),
    "phi-3.5-mini": _phi3(3072, 8192, 32, 32, 32, 32064, positions=131072),
    "phi-4": _phi3(5120, 17920, 40, 40, 10, 100352, positions=16384),
    "phi-4-mini": _phi3(3072, 8192, 32, 24, 8, 200064, positions=131072, tied=True),
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "distilgpt2": _gpt2(768, 6, 12),
    "gpt-j-6b": _gpt2(4096, 28, 16, kind="gptj", n_positions=2048, vocab_size=50400, dtype="float16"),
    "gpt-neox-20b": _neox(6144, 24576, 44, 64, 50432),
    "pythia-70m": _neox(512, 2048, 6, 8, 50304),
    "pythia-160m": _neox(768, 3072, 12, 12, 50304),
    "pythia-410m": _neox(1024, 4096, 24, 16, 50304),
    "pythia-1b": _neox(2048, 8192, 16, 8, 50304),
    "pythia-1.4b": _neox(2048, 8192, 24, 16, 50304),
    "pythia-2.8b": _neox(2560, 10240, 32, 32, 50304),
    "pythia-6.9b": _neox(4096, 16384, 32, 32, 50432),
    "pythia-12b": _neox(5120, 20480, 36, 40, 50688),
    "bloom-560m": _bloom(1024, 24, 16),
    "bloom-1b1": _bloom(1536, 24, 16),
    "bloom-1b7": _bloom(2048, 24, 16),
    "bloom-3b": _bloom(2560, 30, 32),
    "bloom-7b1": _bloom(4096, 30, 32),
    "bloom-176b": _bloom(14336, 70, 112),
    "falcon-7b": _falcon(4544, 32, 71, multi_query=True, parallel_attn=True),
    "falcon-40b": _falcon(8192, 60, 128, num_kv_heads=8, new_decoder_architecture=True),
    "opt-125m": _opt(768, 3072, 12, 12),
    "opt-350m": _opt(1024, 4096, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "opt-1.3b": _opt(2048, 8192, 24, 32),
    "opt-2.7b": _opt(2560, 10240, 32, 32),
    "opt-6.7b": _opt(4096, 16384, 32, 32),
    "opt-13b": _opt(5120, 20480, 40, 40),
    "opt-30b": _opt(7168, 28672, 48, 56),
    "opt-66b": _opt(9216, 36864, 64, 72),
    "mpt-7b": _mpt(4096, 32, 32, 2048),
    "mpt-30b": _mpt(7168, 48, 64, 8192),
}  # fmt: skip


@cache
def mixtures() -> dict[str, Document]:
    """Bundled mixtures of experts: name -> `config` and `tensors` (a name with the numbers of its layers -> shape)."""
    found: dict[str, Document] = json.loads(resources.files(__package__).joinpath("mixtures.json").read_text("utf-8"))
    return found


def tensors_of_mixture(name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of a bundled mixture, with its shape."""
    for pattern, shape in mixtures()[name]["tensors"].items():
        span = re.search(r"\.(\d+)-(\d+)\.", pattern)
        for n in range(int(span[1]), int(span[2]) + 1) if span else (None,):
            yield pattern if span is None else pattern.replace(span[0], f".{n}."), tuple(shape)


def bundled() -> list[str]:
    """The names of all bundled shapes."""
    return sorted([*REFERENCES, *mixtures()])

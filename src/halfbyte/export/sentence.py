"""The adapter of a run of task embed as a folder that `SentenceTransformer(path)` opens.

What: PEFT's two files, with the names that the layers have below `AutoModel`; tokenizer; and sentence-transformers' own
few files of JSON: the modules, pooling, length and prompts.
Source: what `SentenceTransformer.save` writes (sentence-transformers 5). Cost: a copy of the adapter.
"""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from halfbyte.layers import heads
from halfbyte.models.sources.checkpoint import Checkpoint
from halfbyte.recipe.adapter_folder import ADAPTER_FILES
from halfbyte.recipe.schema import Recipe
from halfbyte.runs import checkpoint
from halfbyte.types import Model, Tokenizer

FOLDER = "sentence_transformer"
_MODULES = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}


def write(folder: Path, adapter: Path, lm: Model, tokenizer: Tokenizer, recipe: Recipe, base: Checkpoint) -> None:
    """Write `folder`, whole or not at all. `adapter`: the saved one; `lm`: the base that it is on, of `base`."""
    inner, data = f"{lm.base_model_prefix}.", recipe.data
    pooling = heads.settled(recipe.vectors.pooling, lm.config)
    config = json.loads((adapter / ADAPTER_FILES[1]).read_text())
    if base.kind in ("packaged", "gguf"):  # a name that others do not know: where its checkpoint lies
        config["base_model_name_or_path"] = str(base.path)
    if isinstance(config["target_modules"], str):  # a regex is over whole names
        config["target_modules"] = config["target_modules"].replace(inner.replace(".", r"\."), "")
    documents: dict[str, object] = {
        ADAPTER_FILES[1]: config,
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
            for i, (path, name) in enumerate(_MODULES.items())
        ],
        "sentence_bert_config.json": {"max_seq_length": data.max_length, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": {"query": data.query_prompt, "document": data.passage_prompt}, "similarity_fn_name": "cosine",
        },
        "1_Pooling/config.json": {
            "word_embedding_dimension": lm.config.get_text_config().hidden_size, "include_prompt": True,
            **{f"pooling_mode_{name}": name.startswith(pooling) for name in ("cls_token", "mean_tokens", "lasttoken")},
        },
        "2_Normalize/config.json": {},
    }  # fmt: skip
    state = load_file(adapter / ADAPTER_FILES[0])
    below = {n.replace(f"base_model.model.{inner}", "base_model.model.", 1): value for n, value in state.items()}
    with checkpoint.whole_or_absent(f"the folder {folder}", folder) as temporary:
        tokenizer.save_pretrained(temporary)
        save_file(below, temporary / ADAPTER_FILES[0], metadata={"format": "pt"})
        for name, value in documents.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_text(json.dumps(value, indent=2))

"""The parts of a causal LM that others ask for, found in any architecture.

Cost: walks over modules; `meta_model` allocates no weight. torch and transformers are imported inside functions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from halfbyte.errors import SourceError


def meta_model(config: Any, *, trust_remote_code: bool = False) -> Any:
    """The model of a checkpoint folder, or of a transformers config, on the meta device: shapes without weights."""
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    where = ""
    if isinstance(config, (str, Path)):
        where = str(config)
        if not (Path(config) / "config.json").is_file():
            raise SourceError(f"{where}: no config.json there", fix="give a checkpoint folder")
        try:
            config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code, local_files_only=True)
        except (ValueError, OSError, KeyError, StrictDataclassError) as error:
            raise SourceError(f"{where}/config.json cannot be used: {error}") from error
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError) as error:
        kind = getattr(config, "model_type", type(config).__name__)
        raise SourceError(f"{where or kind}: transformers cannot build this model: {error}") from error

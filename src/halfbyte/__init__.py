"""halfbyte: fine-tune a language model at half a byte per weight, on the machine you have.

Drop-in: `from peft import X` becomes `from halfbyte import X` for the names below, and the classic QLoRA script runs as
it is. Everything is imported when it is first used, so `import halfbyte` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate.utils import BnbQuantizationConfig
    from peft import LoraConfig

    from halfbyte.adapters.dropin import PeftModel, get_peft_model, prepare_model_for_kbit_training
    from halfbyte.base.load import load_base, load_tokenizer
    from halfbyte.base.modules.any_module import load_and_quantize_model, quantize_model
    from halfbyte.errors import HalfbyteError

__version__ = "0.1.0"
__all__ = [
    "BnbQuantizationConfig",
    "HalfbyteError",
    "LoraConfig",
    "PeftModel",
    "__version__",
    "get_peft_model",
    "load_and_quantize_model",
    "load_base",
    "load_tokenizer",
    "prepare_model_for_kbit_training",
    "quantize_model",
]

_HOMES = {
    "BnbQuantizationConfig": "accelerate.utils",
    "LoraConfig": "peft",
    "PeftModel": "halfbyte.adapters.dropin",
    "get_peft_model": "halfbyte.adapters.dropin",
    "prepare_model_for_kbit_training": "halfbyte.adapters.dropin",
    "load_base": "halfbyte.base.load",
    "load_tokenizer": "halfbyte.base.load",
    "load_and_quantize_model": "halfbyte.base.modules.any_module",
    "quantize_model": "halfbyte.base.modules.any_module",
    "HalfbyteError": "halfbyte.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'halfbyte' has no attribute {name!r}; it offers {', '.join(sorted(_HOMES))}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

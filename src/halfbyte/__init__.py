"""halfbyte: fine-tune a language model at half a byte per weight, on the machine you have.

Drop-in: `from peft import X` becomes `from halfbyte import X`, and the classic QLoRA script runs as it is. What has no
form of ours is PEFT's own. Everything is imported when it is first used, so `import halfbyte` costs nothing.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from halfbyte.system import hub_kernel, openmp

if TYPE_CHECKING:
    from accelerate.utils import BnbQuantizationConfig

    from halfbyte.adapters.dropin import (
        AutoPeftModelForCausalLM,
        LoraConfig,
        PeftModel,
        PeftModelForCausalLM,
        get_peft_model,
        prepare_model_for_kbit_training,
    )
    from halfbyte.base.load import load_base, load_tokenizer
    from halfbyte.base.modules.any_module import load_and_quantize_model, quantize_model
    from halfbyte.errors import HalfbyteError

__version__ = "0.1.0"
__all__ = [
    "AutoPeftModelForCausalLM",
    "BnbQuantizationConfig",
    "HalfbyteError",
    "LoraConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "__version__",
    "get_peft_model",
    "load_and_quantize_model",
    "load_base",
    "load_tokenizer",
    "prepare_model_for_kbit_training",
    "quantize_model",
]

_DROPIN = "halfbyte.adapters.dropin"
# Of the names above, those that are not the drop-in's.
_HOMES = {
    "BnbQuantizationConfig": "accelerate.utils",
    "load_base": "halfbyte.base.load",
    "load_tokenizer": "halfbyte.base.load",
    "load_and_quantize_model": "halfbyte.base.modules.any_module",
    "quantize_model": "halfbyte.base.modules.any_module",
    "HalfbyteError": "halfbyte.errors",
}
hub_kernel.silence()
openmp.prepare()


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(_HOMES.get(name, _DROPIN)), name)
    if name.startswith("_") or find_spec(f"halfbyte.{name}") is not None:  # `from halfbyte import cli` asks here first
        raise AttributeError(f"module 'halfbyte' has no attribute {name!r}")
    return import_module(_DROPIN).peft_attribute(name, beside=__all__)


def __dir__() -> list[str]:
    peft = sys.modules.get("peft")  # where it is loaded; Python looks for the nearest name here
    return sorted({*__all__, *getattr(peft, "__all__", ())})

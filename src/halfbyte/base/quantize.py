"""`halfbyte quantize`: build the store of a base ahead of its first use."""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from halfbyte.base import load, quantisation_error, residual
from halfbyte.base.config import open_config
from halfbyte.base.store import manifest, shelf, supply
from halfbyte.errors import BaseModelError, StoreError
from halfbyte.models import tensors
from halfbyte.models.sources.checkpoint import beside_bytes
from halfbyte.models.sources.lookup import find_model
from halfbyte.plan.store_build import StoreBuild
from halfbyte.quant import policy
from halfbyte.recipe.schema import Recipe
from halfbyte.system import device
from halfbyte.types import Document


@dataclass(frozen=True)
class BuildResult:
    """A store that is there now. `built` is False where it was there before; `seconds` is this call's."""

    path: Path
    manifest: manifest.Manifest
    built: bool
    seconds: float
    residual: Path | None = None  # the factors of a residual start, where the recipe asks for one

    def to_json(self) -> Document:
        return {
            "path": str(self.path),
            "built": self.built,
            "seconds": round(self.seconds, 3),
            "bytes": self.manifest.nbytes,
            "residual": self.residual and str(self.residual),
            "manifest": {k: v for k, v in asdict(self.manifest).items() if k != "files"},
        }


def quantize(recipe: Recipe, *, out: Path | None = None, tell: supply.Tell | None = None) -> BuildResult:
    """Build the store that a run of `recipe` opens, or find it. Raises StoreError: it cannot be built: with the reason,
    and what helps. BaseModelError: nothing is to be quantised, or the model is quantised already."""
    if not recipe.quant.quantises:
        raise BaseModelError("quant.type none keeps the base in 16 bits, as it is; there is nothing to quantise.")
    if recipe.quant.in_file:
        raise BaseModelError("quant.type gguf keeps the base in its file's own blocks; there is nothing to quantise.")
    started, built = time.monotonic(), []
    checkpoint = find_model(recipe)
    config = open_config(checkpoint.path, trust_remote_code=recipe.trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise BaseModelError(
            f"{checkpoint.id} is quantised already.", fix="use it as the model of a recipe; it opens as it is"
        )
    specs = tuple(tensors.read_checkpoint(checkpoint.path)) if not checkpoint.pickle else ()
    policy.check_experts(config.model_type, specs, recipe.quant)
    spec = load.store_spec(checkpoint, config, recipe.quant, device.detect(), specs)
    telling = replace(tell or supply.Tell(), built=lambda: built.append(True))
    telling.say(_preflight(spec, specs), label="planned")
    try:
        if hasattr(config, "auto_map"):
            raise shelf.CannotHold("it brings Python code of its own")
        path = supply.ensure(spec, out=out, tell=quantisation_error.tell_gguf_error(spec, telling))
    except shelf.CannotHold as reason:
        raise StoreError(
            f"{checkpoint.id} cannot be held in a store: {reason}.",
            fix="nothing is needed: train, eval and chat quantise it each time they load it",
        ) from reason
    begin = residual.beside(spec, path, recipe.lora, lambda label, text: telling.say(text, label))
    return BuildResult(path, manifest.read(path), bool(built), time.monotonic() - started, begin)


def _preflight(spec: shelf.StoreSpec, specs: tuple[tensors.TensorSpec, ...]) -> str:
    """What building takes, before it begins."""
    if not specs:
        return "unknown: pickled weights have no header to read"
    beside = beside_bytes(spec.checkpoint.path)
    plan = StoreBuild(specs, spec.quant, spec.dtype.itemsize, spec.config.get_text_config().vocab_size, beside)
    ram = sum(line.bytes for line in plan.lines(spec.cores))
    return f"{ram / 1e9:.2f} GB of RAM while it is built, {plan.disk_bytes / 1e9:.3f} GB on disk"

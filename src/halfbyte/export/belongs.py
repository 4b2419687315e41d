"""Whether an adapter belongs to the base that is here, asked without opening it: by its passport.

Why: opening a run asks too, but an export may be unproven, and an adapter folder for others is never opened here.
Cost: hashing the adapter; reading the store's manifest, of a 16-bit base a few MB; a store that is gone is built again.
"""

from __future__ import annotations

from halfbyte.adapters import passport
from halfbyte.base import load
from halfbyte.base.config import open_config
from halfbyte.base.store import supply
from halfbyte.data.encoding.chatml import chat_template
from halfbyte.inference.load import tokenizer_of
from halfbyte.inference.target import Target
from halfbyte.models import tensors
from halfbyte.models.sources.lookup import find_model
from halfbyte.models.structure import meta_model
from halfbyte.recipe.adapter import read_passport
from halfbyte.system import device


def check(found: Target, tell: supply.Tell, *, force: bool = False) -> None:
    """Nothing is asked of an adapter without a passport.

    Raises:
        AdapterError: it belongs to another base, quantiser, tokenizer or chat template, or is not the file that was
            trained.
    """
    if found.adapter is None or read_passport(found.adapter) is None:
        return
    recipe, checkpoint, machine = found.recipe, find_model(found.recipe), device.detect()
    config = open_config(checkpoint.path, trust_remote_code=recipe.trust_remote_code)
    specs = tuple(tensors.read_checkpoint(checkpoint.path)) if not checkpoint.pickle else ()
    name, why = device.compute_dtype(machine, recipe.quant.compute_dtype)
    store = None
    if recipe.quant.quantises and not tensors.is_quantised(config.to_dict()) and not hasattr(config, "auto_map"):
        store, _ = load.stored_base(load.store_spec(checkpoint, config, recipe.quant, machine, specs), machine, tell)
    words = tokenizer_of(found, checkpoint)
    base = load.Base(meta_model(config), words, checkpoint, specs, name, why, 0, 0, store=store)
    here = passport.belongs_to(base, recipe.quant, words, chat_template(words, recipe.data))
    for text in passport.check(found.adapter, here, force=force):
        tell.say(text, label="note")

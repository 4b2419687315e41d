"""The proof at start that a text's scores or vector are its own: of its own tokens, packed as alone.

What: a few texts packed must give what each gives alone by the body's own forward on the stock path.
Why a proof: a head that reads the neighbour's token trains without any error, on another text.
Cost: four forwards of some fifteen tokens, on the first layers.
"""

import torch

from halfbyte.errors import BaseModelError
from halfbyte.layers import heads, packing
from halfbyte.models import structure
from halfbyte.proofs import setting
from halfbyte.proofs.closeness import row_distances
from halfbyte.types import Model

# Relative to a text's scores: in fp32 as `packing` has it of logits; where only 16 bits can be afforded some roundings.
ALLOWED, ALLOWED_HALF = 1000 * torch.finfo(torch.float32).eps, 0.05


def prove_pooling(model: Model, *, packed: bool, pooling: str = heads.LAST) -> str:
    """What was seen, in words; the model is as before. Raises BaseModelError: a text gets what is not its own.

    Args:
        model: after `prove_packing`. packed: texts share a micro-batch. pooling: of vectors, where there is no head.
    """
    lm, layout = structure.causal_lm(model), packing.installed(model)
    options = {"use_cache": False} if packing.takes_use_cache(lm) else {}
    head, tokens = heads.has_head(model), heads.task_type(model) == heads.TOKENS
    pooling = heads.pooling_of(lm.config) if head and not tokens else heads.settled(pooling, lm.config)
    exact = setting.precisions(model)[0]
    with setting.as_given(model), torch.no_grad(), setting.few_tokens(model, exact=exact):
        model.eval()
        texts = setting.random_examples(lm, setting.short_lengths(packed=packed))
        batch = setting.pack(texts)
        batch["keep"] = torch.arange(batch["input_ids"].shape[1]) if tokens else batch["cu_seq_lens_q"][1:].long() - 1
        batch["targets"] = torch.zeros_like(batch["keep"])
        ours = heads.scores(model, batch) if head else heads.vectors(model, batch, pooling)
        packing.install(lm, "single")
        try:
            hidden = [structure.body(lm)(input_ids=text[None], **options)[0][0].float() for text in texts]
        finally:
            packing.install(lm, layout)
        pooled = {heads.FIRST: lambda x: x[0], heads.LAST: lambda x: x[-1], heads.MEAN: lambda x: x.mean(0)}
        alone = torch.cat(hidden) if tokens else torch.stack([pooled[pooling](each) for each in hidden])
        off = float(row_distances(ours, heads.read(model, alone, batch["keep"]) if head else alone).max())
    if not off <= (ALLOWED if exact else ALLOWED_HALF):
        what = f"what is read of a text in a micro-batch is off by {off:.1e} from the text alone"
        raise BaseModelError(f"{type(lm).__name__}: {what}.", fix="report it with the model's config.json")
    return f"{'every token' if tokens else pooling} of each text, as alone to {off:.1e}"

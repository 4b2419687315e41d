"""The proof at start that a text's scores or vector are its own: of its own tokens, packed as alone.

What: a few texts packed, as pairs where the model has types of tokens, must give what each gives alone by the body's
own forward on the stock path, and by the head's modules on the whole of it.
Why a proof: a head that reads the neighbour's token trains without any error, on another text.
Cost: four forwards of some fifteen tokens, on the first layers.
"""

import inspect

import torch
from torch import Tensor

from halfbyte.data import collate
from halfbyte.data.encoding.examples import IGNORED, Example
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
    takes_types = "token_type_ids" in inspect.signature(structure.body(lm).forward).parameters
    pairs = takes_types and getattr(lm.config, "type_vocab_size", 0) > 1
    exact = setting.precisions(model)[0]
    with setting.as_given(model), torch.no_grad(), setting.few_tokens(model, exact=exact):
        model.eval()
        texts = setting.random_examples(lm, setting.short_lengths(packed=packed))
        batch = collate.collate_texts([_example(text.tolist(), pair=pairs) for text in texts])
        if tokens:
            batch["keep"] = torch.arange(batch["input_ids"].shape[1])
            batch["targets"] = torch.zeros_like(batch["keep"])
        ours = heads.scores(model, batch) if head else heads.vectors(model, batch, pooling)
        packing.install(lm, "single")
        try:
            hidden = list[Tensor]()
            for text in texts:
                second = torch.arange(len(text), device=text.device) >= _second(len(text))
                types = {"token_type_ids": second[None].long()} if pairs else {}
                hidden.append(structure.body(lm)(input_ids=text[None], **types, **options)[0][0].float())
        finally:
            packing.install(lm, layout)
        every = [_scored(model, each, mean=pooling == heads.MEAN and not tokens) if head else each for each in hidden]
        pooled = {heads.FIRST: lambda x: x[0], heads.LAST: lambda x: x[-1], heads.MEAN: lambda x: x.mean(0)}
        alone = torch.cat(every) if tokens else torch.stack([pooled[pooling](each) for each in every])
        off = float(row_distances(ours, alone.to(ours.device)).max())
    if not off <= (ALLOWED if exact else ALLOWED_HALF):
        what = f"what is read of a text in a micro-batch is off by {off:.1e} from the text alone"
        raise BaseModelError(f"{type(lm).__name__}: {what}.", fix="report it with the model's config.json")
    return f"{'every token' if tokens else pooling} of each text, as alone to {off:.1e}"


def _example(ids: list[int], *, pair: bool) -> Example:
    """A text as rows of labels have it: its last token is marked, and of a pair where the second one begins."""
    marked = {len(ids) - 1, _second(len(ids)) if pair else -1}
    labels = (token if place in marked else IGNORED for place, token in enumerate(ids))
    return Example(tuple(ids), tuple(labels))


def _second(length: int) -> int:
    """Where the second text of a pair of so many tokens begins; of few it has none."""
    return length // 2 if length > 2 else length


def _scored(model: Model, hidden: Tensor, *, mean: bool) -> Tensor:
    """A text's hidden states (tokens, D) through the head's modules, as transformers' class calls them: (tokens, L), or
    (1, L) where a pooler has taken its token of all."""
    x = hidden[None].mean(1, keepdim=True) if mean else hidden[None]
    for part in heads.parts(model):
        x = part(x.to(next((p.device for p in part.parameters()), x.device)))
    return x if x.dim() == 2 else x[0]

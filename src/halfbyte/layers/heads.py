"""A head that scores a text, and the vector of a text: what classification and retrieval read of a body.

What: a text's vector is the hidden state of its last token, or the mean of all. A head is one linear layer on it, under
the name that transformers' own class for the task has, in fp32 whatever the base computes in, trained whole.
Source: `GenericForSequenceClassification` in `transformers/modeling_layers.py`: `score`, no bias, the last token that
is no padding; sentence-transformers' `Pooling` (lasttoken, mean).
Cost: labels x D numbers; the last layer makes the rows of last tokens alone.

Letters: n texts, T tokens of a micro-batch, D hidden size, L labels.
"""

from __future__ import annotations

import copy
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from halfbyte.errors import BaseModelError
from halfbyte.layers import loss
from halfbyte.models import structure, text_half
from halfbyte.recipe.adapter import HEAD
from halfbyte.types import Batch, Document, Model, Tokenizer

LAST, MEAN = "lasttoken", "mean"
# PEFT's `task_type` of a model that is no causal LM, and the name of its head.
_TASKS: WeakKeyDictionary[nn.Module, tuple[str, str]] = WeakKeyDictionary()


def attach(lm: Model, labels: int, *, seed: int) -> str:
    """Put a fresh head on an open causal LM, or on one without weights; none where there are no labels: then vectors
    are read of it. `seed`: of its random start, as transformers draws it. Returns its name, which PEFT's
    `modules_to_save` takes. Raises BaseModelError: transformers has no class that scores a text of this model by one
    linear layer."""
    if not labels:
        _TASKS[lm] = "FEATURE_EXTRACTION", ""
        return ""
    config, heads = copy.deepcopy(lm.config), list[tuple[str, nn.Module]]()
    config.num_labels = labels
    kind = AutoModelForSequenceClassification._model_mapping.get(type(config), None)
    if kind is not None and not text_half.is_half(lm):
        with torch.device("meta"):
            model = kind(config)
        children = [(n, m) for n, m in model.named_children() if n != model.base_model_prefix]
        heads = [(name, m) for name, m in children if any(True for _ in m.parameters())]
    if len(heads) != 1 or type(heads[0][1]) is not nn.Linear or heads[0][1].bias is not None:
        what = f"transformers scores no text of a {config.model_type} by one linear layer on its last token"
        raise BaseModelError(f"task: {what}.", fix="choose a Llama, Qwen, Gemma, Mistral, Phi or GPT-2")
    ((name, like),) = heads
    head = nn.Linear(like.in_features, labels, bias=False, dtype=torch.float32)
    std = float(getattr(config.get_text_config(), "initializer_range", 0.02))
    nn.init.normal_(head.weight, std=std, generator=torch.Generator().manual_seed(seed))
    lm.add_module(name, head.requires_grad_(False).to(structure.body(lm).device))
    _TASKS[lm] = "SEQ_CLS", name
    return name


def write_config(folder: Path, lm: Model, values: Document, tokenizer: Tokenizer) -> None:
    """Write the config of transformers' class for the task into `HEAD`, beside an adapter: in the folder itself it
    would be taken for that of a whole model. `values`: labels and kind of the head, by the config's names."""
    config = copy.deepcopy(lm.config)
    kind = AutoModelForSequenceClassification._model_mapping[type(config)]
    config.update({**values, "architectures": [kind.__name__]})
    if config.pad_token_id is None:  # batches of the class need one
        config.pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id
    config.save_pretrained(folder / HEAD)


def task_type(model: Model) -> str | None:
    """PEFT's name of what a model is; None for a causal LM."""
    return _TASKS.get(structure.causal_lm(model), (None, ""))[0]


def head_of(model: Model) -> nn.Module | None:
    """The head on a model, PEFT's wrapper around it included; None where it has none."""
    lm = structure.causal_lm(model)
    name = _TASKS.get(lm, (None, ""))[1]
    return getattr(lm, name) if name else None


def vectors(model: Model, batch: Batch, pooling: str = LAST) -> Tensor:
    """The vector of each text of a micro-batch, (n, D) in fp32. `batch`: as `data.collate.collate_texts` makes it."""
    if pooling == LAST:
        return loss.labelled_hidden(model, batch)[0].float()
    hidden = loss.every_hidden(model, batch)  # (T, D)
    lengths = batch["cu_seq_lens_q"].diff().to(hidden.device)
    text = torch.repeat_interleave(torch.arange(len(lengths), device=hidden.device), lengths)  # (T,)
    return hidden.new_zeros(len(lengths), hidden.shape[1]).index_add(0, text, hidden) / lengths[:, None]


def scores(model: Model, batch: Batch) -> Tensor:
    """The head's scores of each text of a micro-batch, (n, L) in fp32."""
    head, hidden = head_of(model), vectors(model, batch)
    assert head is not None, "no head is attached"
    with torch.autocast(hidden.device.type, enabled=False):
        result: Tensor = head(hidden.to(next(head.parameters()).device))
    return result

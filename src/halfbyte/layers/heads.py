"""A head that scores a text: what classification reads of a body.

What: a head is one linear layer on the hidden state of a text's last token, under
the name that transformers' own class for the task has, in fp32 whatever the base computes in, trained whole.
Source: `GenericForSequenceClassification` of transformers: `score`, no bias, the last token that
is no padding.
Cost: labels x D numbers; the last layer makes the rows of last tokens alone.

Letters: n texts, D hidden size, L labels.
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

_HEADS: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # the names of models' heads


def attach(lm: Model, labels: int, *, seed: int) -> str:
    """Put a fresh head on an open causal LM, or on one without weights. `seed`: of its random start, as transformers
    draws it. Returns its name, which PEFT's `modules_to_save` takes. Raises BaseModelError: transformers has no class
    that scores a text of this model by one linear layer."""
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
    _HEADS[lm] = name
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


def head_of(model: Model) -> nn.Module | None:
    """The head on a model, PEFT's wrapper around it included; None where it has none."""
    name = _HEADS.get(structure.causal_lm(model))
    return None if name is None else getattr(structure.causal_lm(model), name)


def scores(model: Model, batch: Batch) -> Tensor:
    """The head's scores of each text of a micro-batch, (n, L) in fp32. `batch`: as `data.collate.collate_texts` has
    it."""
    head, hidden = head_of(model), loss.labelled_hidden(model, batch)[0]
    assert head is not None, "no head is attached"
    with torch.autocast(hidden.device.type, enabled=False):
        result: Tensor = head(hidden.to(next(head.parameters()).device, torch.float32))
    return result

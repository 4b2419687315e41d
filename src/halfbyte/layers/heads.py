"""A head that scores a text or its tokens, and the vector of a text: what classification and retrieval read of a body.

What: a text's vector is the hidden state of its first or last token, or the mean of all. A head is what transformers'
own class for the task has behind the body, under the same names, in fp32 whatever the base computes in. Parts that the
checkpoint brings (BERT's pooler, ModernBERT's `head`) stay as they are, the others are drawn and train whole.
Source: `GenericForSequenceClassification` in `transformers/modeling_layers.py`: `score`, no bias, the last token that
is no padding; the encoders' modeling files: the first token, of ModernBERT also the mean; sentence-transformers'
`Pooling` (cls, lasttoken, mean).
Cost: labels x D numbers; the last layer makes the rows of last tokens alone.

Letters: n texts, T tokens of a micro-batch, K of them that get scores, D hidden size, L labels.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from halfbyte.errors import BaseModelError
from halfbyte.layers import loss
from halfbyte.layers.kernels import dropout
from halfbyte.models import structure, text_half
from halfbyte.recipe.adapter_folder import HEAD
from halfbyte.types import Batch, Config, Document, Model, Tokenizer

# Poolings under sentence-transformers' names, and PEFT's `task_type`.
FIRST = "cls"
LAST = "lasttoken"
MEAN = "mean"
VECTORS = "FEATURE_EXTRACTION"
TEXTS = "SEQ_CLS"
TOKENS = "TOKEN_CLS"
AUTO = {TEXTS: AutoModelForSequenceClassification, TOKENS: AutoModelForTokenClassification}


@dataclass(frozen=True)
class _Task:
    """Of a model that is no causal LM: PEFT's name of what it is, and the modules of its head in their order."""

    kind: str
    parts: tuple[str, ...] = ()


_TASKS: WeakKeyDictionary[nn.Module, _Task] = WeakKeyDictionary()


def wanted(objective: object) -> tuple[int, str]:
    """How many scores an objective reads, 0 for none, and PEFT's name of what is scored."""
    return getattr(objective, "width", 0), getattr(objective, "kind", TEXTS)


def attach(lm: Model, labels: int, kind: str = TEXTS, *, seed: int, names: Iterable[str] = ()) -> tuple[str, ...]:
    """Put a head on an open base, or on one without weights; none where there are no labels: then vectors are read of
    it. `seed`: of its random start. `names`: of the checkpoint's tensors. Returns the names of what was drawn, which
    PEFT's `modules_to_save` takes. Raises BaseModelError: transformers has no class for the task of this model, or one
    that reads it otherwise."""
    if not labels:
        _TASKS[lm] = _Task(VECTORS)
        return ()
    config = copy.deepcopy(lm.config)
    config.num_labels = labels
    cls = AUTO[kind]._model_mapping.get(type(config), None)
    parts = dict[str, nn.Module]()
    if cls is not None and not text_half.is_half(lm):
        with torch.device("meta"):
            parts = _parts_of(cls(config))
    linears = [part for part in parts.values() if any(True for _ in part.parameters())]
    plain = len(linears) == 1 and type(linears[0]) is nn.Linear and (kind == TOKENS or linears[0].bias is None)
    if not plain and not (parts and structure.is_encoder(config)):
        of = "token" if kind == TOKENS else "text"
        what = f"transformers scores no {of} of a {config.model_type} by one linear layer"
        fix = "choose a Llama, Qwen, Gemma, Mistral, Phi, GPT-2, BERT, RoBERTa or ModernBERT"
        raise BaseModelError(f"task: {what}.", fix=fix)
    known, inner = tuple(names), f"{lm.base_model_prefix}."
    # a checkpoint of the body alone has bare names
    brought = {name for name in parts if name != _last(parts) and any(
        f".{name}." in f".{other}" or other.startswith(f"{name.removeprefix(inner)}.") for other in known
    )}  # fmt: skip
    drawn = tuple(name for name in parts if name not in brought and any(True for _ in parts[name].parameters()))
    generator, std = torch.Generator().manual_seed(seed), getattr(config.get_text_config(), "initializer_range", 0.02)
    for name, part in parts.items():
        if name not in brought:
            holder, _, leaf = name.rpartition(".")
            lm.get_submodule(holder).add_module(leaf, part)
            _draw(part.to_empty(device=structure.body(lm).device), generator, float(std))
        lm.get_submodule(name).float().requires_grad_(False)
        if "." in name:  # a pooler, which the body calls too, in its own dtype
            lm.get_submodule(name).register_forward_pre_hook(lambda _, args: tuple(x.float() for x in args))
    _TASKS[lm] = _Task(kind, tuple(parts))
    return tuple(name.rpartition(".")[2] for name in drawn)


def _parts_of(model: Model) -> dict[str, nn.Module]:
    """What transformers' class for a task runs behind the body, in its order: dropout right before the last of them."""
    prefix = model.base_model_prefix
    pooler = getattr(getattr(model, prefix), "pooler", None)
    parts = {} if pooler is None else {f"{prefix}.pooler": pooler}
    parts |= {name: child for name, child in model.named_children() if name != prefix}
    dropouts = {name: part for name, part in parts.items() if isinstance(part, nn.Dropout)}
    others = {name: part for name, part in parts.items() if name not in dropouts}
    last = _last(others)
    return {**{name: part for name, part in others.items() if name != last}, **dropouts, last: others[last]}


def _last(parts: dict[str, nn.Module]) -> str:
    return list(parts)[-1]


def _draw(part: nn.Module, generator: torch.Generator, std: float) -> None:
    for module in part.modules():
        for name, p in module.named_parameters(recurse=False):
            if isinstance(module, nn.Linear) and name == "weight":
                numbers = torch.empty(p.shape).normal_(0, std, generator=generator)
            else:
                numbers = torch.full(p.shape, float(name == "weight"))  # of norms; biases are 0
            p.data = numbers.to(p.device)


def write_config(folder: Path, lm: Model, config: Config, values: Document, tokenizer: Tokenizer) -> None:
    """Write the config of transformers' class for the task into `HEAD`, beside an adapter: in the folder itself it
    would be taken for that of a whole model. `config`: the checkpoint's, as `lm` may be quantised. `values`: of the
    head, by the config's names."""
    config = copy.deepcopy(config)
    config.update({**values, "architectures": [AUTO[_TASKS[lm].kind]._model_mapping[type(config)].__name__]})
    if config.pad_token_id is None:  # batches of the class need one
        config.pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id
    config.save_pretrained(folder / HEAD)


def task_type(model: Model) -> str | None:
    """PEFT's name of what a model is; None for a causal LM."""
    task = _TASKS.get(structure.causal_lm(model))
    return None if task is None else task.kind


def has_head(model: Model) -> bool:
    return bool(parts(model))


def parts(model: Model) -> list[nn.Module]:
    """The head's modules, PEFT's wrappers around them included."""
    lm = structure.causal_lm(model)
    return [lm.get_submodule(name) for name in _TASKS[lm].parts] if lm in _TASKS else []


def pooling_of(config: Config) -> str:
    """Which vector of a text transformers' own class scores."""
    if not structure.is_encoder(config):
        return LAST
    return str(getattr(config, "classifier_pooling", FIRST))


def settled(pooling: str, config: Config) -> str:
    """`vectors.pooling` where a recipe leaves it open."""
    return pooling if pooling != "auto" else MEAN if structure.is_encoder(config) else LAST


def vectors(model: Model, batch: Batch, pooling: str = LAST) -> Tensor:
    """The vector of each text of a micro-batch, (n, D) in fp32. `batch`: as `data.collate.collate_texts` makes it."""
    if (pooling := settled(pooling, structure.causal_lm(model).config)) != MEAN:
        starts = batch["cu_seq_lens_q"].long()
        keep = starts[:-1] if pooling == FIRST else starts[1:] - 1
        return loss.labelled_hidden(model, {**batch, "keep": keep, "targets": keep})[0].float()
    hidden = loss.every_hidden(model, batch)  # (T, D)
    lengths = batch["cu_seq_lens_q"].diff().to(hidden.device)
    text = torch.repeat_interleave(torch.arange(len(lengths), device=hidden.device), lengths)  # (T,)
    return hidden.new_zeros(len(lengths), hidden.shape[1]).index_add(0, text, hidden) / lengths[:, None]


def scores(model: Model, batch: Batch) -> Tensor:
    """The head's scores of each text of a micro-batch, (n, L) in fp32; of single tokens those of `keep`: (K, L)."""
    lm = structure.causal_lm(model)
    if _TASKS[lm].kind == TOKENS:
        return read(model, loss.labelled_hidden(model, batch)[0].float(), batch["keep"])
    starts, pooling = batch["cu_seq_lens_q"].long(), pooling_of(lm.config)
    rows = starts[1:] - 1 if pooling == LAST else starts[:-1]
    return read(model, vectors(model, batch, pooling), rows)


def read(model: Model, hidden: Tensor, rows: Tensor) -> Tensor:
    """Vectors (n, D) through the head: (n, L). A pooler takes a text's first token, so each vector is a text of one.
    `rows`: (n,) tokens of the micro-batch, whose masks the head's dropout has."""
    x = hidden[:, None]  # (n, 1, D)
    with torch.autocast(hidden.device.type, enabled=False), dropout.select_tokens(rows):
        for part in parts(model):
            x = part(x.to(next((p.device for p in part.parameters()), x.device)))
    return x.flatten(1)

"""Cross-entropy of one packed micro-batch: from hidden states of labelled tokens, in chunks, logits never whole.

Why: a vocabulary of 50,000 to 250,000 makes whole logits the largest tensor of a step, and on completion-only data most
rows of it carry no label.
What: the body's hidden states at labelled positions meet the head in chunks; each chunk's gradient takes the place of
its logits and is multiplied back at once. Scaled and softcapped logits (granite, cohere, gemma) are read off the config
and checked against the model's own logits; a model that does anything else gets its logits from its own forward, for
labelled positions only (`logits_to_keep`, a documented argument).
Source: the order of work is that of Liger-Kernel's fused linear cross-entropy (arXiv:2410.10989, section 3.2).
Cost: 2 x K D V x 2 FLOP, `CHUNK` logits, (K, D) kept.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise, starmap
from weakref import WeakKeyDictionary

import torch
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F
from transformers.utils import ModelOutput

from halfbyte.layers import fuse, instances, packing
from halfbyte.layers.kernels import dropout, last_layer, pool
from halfbyte.layers.kernels.cpu import available
from halfbyte.layers.kernels.cpu.matmul import by_kernel, into, product
from halfbyte.models import structure
from halfbyte.types import Batch, Config, Model

# Numbers of logits at once: large enough for the matmul's full rate, in 16 bits small enough for a CPU's third-level
# cache. In fp32 they are too large for it anyway, so twice as many: the head is read and laid out once for each chunk.
CHUNK = 16_000_000
CHUNK32 = 32_000_000
CARD_CHUNK = 128_000_000
# Rows of the head in one fp32 product on a CPU: the library packs them first, which stays in cache for so few.
HEAD_ROWS = 2048


def keeps_some(model: Model) -> bool:
    """Whether a forward takes the positions of the logits it is asked for (`logits_to_keep`), where they lie now: over
    several cards the hidden states end on another one than the input."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    takes = "logits_to_keep" in inspect.signature(type(inner).forward).parameters
    return takes and len({p.device for p in model.parameters()}) == 1


def micro_batch_loss(model: Model, batch: Batch, *, label_smoothing: float = 0.0, fused: bool = True) -> Tensor:
    """Summed cross-entropy over the labelled tokens of one packed micro-batch, fp32. Scalar.

    Args:
        batch: as `data.collate.collate` makes it, with `keep` (positions whose next token is labelled) and `targets`.
        label_smoothing: as `TrainingArguments.label_smoothing_factor`.
        fused: False for the model's own forward and torch's cross-entropy, the reference.
    """
    head, counts = head_of(model) if fused else None, batch.get("counts")
    if head is not None:
        return head_loss(*labelled_hidden(model, batch), head, smoothing=label_smoothing, counts=counts)
    logits, targets = labelled_logits(model, batch)
    losses = F.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=label_smoothing)
    return losses.sum() if counts is None else (losses * counts.to(losses.device)).sum()


def label_losses(model: Model, batch: Batch, *, temperature: float = 1.0) -> Tensor:
    """Cross-entropy of each labelled token of a packed micro-batch, fp32, with its graph: (K,). Less it, the
    log-probability of each label; `log_likelihoods` sums them over texts. A head that trains makes all logits at once.
    `temperature`: what logits are divided by.
    """
    head = head_of(model)
    trains = head and any(x is not None and x.requires_grad for x in (head.weight, head.bias, head.values))
    if head is not None and not trains and (temperature == 1 or head.softcap is None):
        head = replace(head, scale=head.scale / temperature)
        return head_loss(*labelled_hidden(model, batch), head, each=True)
    logits, targets = labelled_logits(model, batch)
    return F.cross_entropy(logits.float() / temperature, targets, reduction="none")


def text_losses(model: Model, batch: Batch) -> list[float]:
    """Summed cross-entropy of each text of a micro-batch, without gradients, as `micro_batch_loss` sums over all."""
    head = head_of(model)
    with torch.no_grad(), fuse.as_trained():
        states, targets = labelled_logits(model, batch) if head is None else labelled_hidden(model, batch)
        each = zip(labels_of_texts(batch), weights_of_texts(batch), strict=True)
        texts = [(states[labels], targets[labels], weights) for labels, weights in each]
        if head is not None:
            return [float(head_loss(hidden, labels, head, counts=weights)) for hidden, labels, weights in texts]
        losses = [F.cross_entropy(logits.float(), labels, reduction="none") for logits, labels, _ in texts]
        weighed = (x if w is None else x * w.to(x.device) for x, (*_, w) in zip(losses, texts, strict=True))
        return [float(x.sum()) for x in weighed]


def text_likelihoods(model: Model, batch: Batch) -> list[tuple[float, bool]]:
    """Log-likelihood of the labelled tokens of each text, from the model's own logits in fp32; and whether each of them
    is the most likely one."""
    likelihoods = []
    with torch.no_grad():
        logits, targets = labelled_logits(model, batch)
        for labels in labels_of_texts(batch):
            log_p, wanted = torch.log_softmax(logits[labels].float(), -1), targets[labels]
            of_labels = log_p.gather(1, wanted[:, None])
            likelihoods.append((float(of_labels.sum()), bool((log_p.argmax(-1) == wanted).all())))
    return likelihoods


def labels_of_texts(batch: Batch) -> Iterator[slice | Tensor]:
    """Where each text's labelled tokens are among the K of a micro-batch; in a tree texts share some."""
    if "label_of" in batch:
        return iter(batch["label_of"].split(batch["label_starts"].diff().tolist()))
    ends = torch.searchsorted(batch["keep"], batch["cu_seq_lens_q"][1:].to(batch["keep"].dtype)).tolist()
    return starmap(slice, pairwise([0, *ends]))


def weights_of_texts(batch: Batch) -> Iterator[Tensor | None]:
    """What each text's labelled tokens count for; None where each counts once."""
    weights, places = batch.get("label_weights"), labels_of_texts(batch)
    sizes = [p.stop - p.start if isinstance(p, slice) else len(p) for p in places]
    return iter([None] * len(sizes) if weights is None else weights.split(sizes))


def labelled_logits(model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
    """The logits (K, V) of the model's own forward that predict the labelled tokens, and the labels (K,), on the same
    device."""
    inputs, keep, targets = _inputs(model, batch)
    # over several cards a forward would index the last one's hidden states with numbers on the first
    if keeps_some(model):
        logits = model(**inputs, logits_to_keep=keep).logits[0]  # (K, V)
    else:
        logits = model(**inputs).logits[0]  # (N, V)
        logits = logits.index_select(0, keep.to(logits.device))  # (K, V)
    return logits, targets.to(logits.device)


def labelled_hidden(model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
    """The hidden states (K, D) that predict the labelled tokens, and the labels (K,)."""
    inputs, keep, targets = _inputs(model, batch)
    with torch.autocast(keep.device.type, enabled=False):
        return _hidden(structure.causal_lm(model), inputs, keep), targets


def every_hidden(model: Model, batch: Batch) -> Tensor:
    """The hidden states of all tokens of a micro-batch: (T, D) in fp32."""
    tokens, (inputs, _, _) = batch["input_ids"].shape[1], _inputs(model, batch)
    with torch.autocast(inputs["input_ids"].device.type, enabled=False):
        hidden: Tensor = structure.body(structure.causal_lm(model))(**inputs)[0][0, :tokens].float()
    return hidden


def _inputs(model: Model, batch: Batch) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """What a forward takes of a micro-batch; its positions whose next token is labelled (K,), and the labels (K,)."""
    device = next(model.parameters()).device
    several = len(batch["cu_seq_lens_q"]) > 2  # one example alone is plain input, but in a training's forward
    if (several or fuse.computes_as_trained()) and packing.installed(model) == "cu_seq_lens":
        batch = packing.aligned(batch)
    inputs = packing.forward_inputs(model, batch)
    inputs.pop("labels", None)
    inputs["input_ids"] = inputs["input_ids"].to(device)
    return inputs, batch["keep"].to(device), batch["targets"].to(device)


def _hidden(lm: Model, inputs: dict[str, Tensor], keep: Tensor) -> Tensor:
    """The hidden states (K, D) of the tokens `keep` (K,), which are all that the last layer makes where it can."""
    (texts, tokens), body = inputs["input_ids"].shape, structure.body(lm)
    count = len(keep) if tokens < packing.ALIGNED_FROM else packing.up_to(len(keep))
    last = _last_layer(body)
    # where its forward is done again it would not be asked again; a mask drawn for all rows is not that of some
    able = last is not None and fuse.computes_as_trained(last) and not last.gradient_checkpointing
    if able and texts == 1 and 0 < count < tokens and (dropout.by_row() or not lm.training):
        some = last_layer.LastLayerRows(last, keep, count)
        with last_layer.only_rows(some):
            hidden: Tensor = body(**inputs)[0][0]  # (count, D), or (T, D)
        if some.selected:
            return hidden[: len(keep)]
    else:
        hidden = body(**inputs)[0][0]  # (T, D)
    return last_layer.SelectRows.apply(hidden, keep.to(hidden.device), len(keep))


def _last_layer(module: nn.Module) -> fuse.DecoderLayer | None:
    """The last fused layer in it; looked for from the end, as a model has thousands of modules."""
    if isinstance(module, fuse.DecoderLayer):
        return module
    layers = (_last_layer(child) for child in reversed(list(module.children())))
    return next((layer for layer in layers if layer is not None), None)


@dataclass(frozen=True, eq=False)
class Head:
    """An output head: logits = cap(scale * (h W^T + b)), with cap(z) = softcap * tanh(z / softcap) if any. W and b may
    train, as fp32 masters: it computes in `dtype`, of the weight where that is None. Or only `rows` of W train:
    `values` stand in their place."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    scale: float = 1.0
    softcap: float | None = None
    dtype: torch.dtype | None = None
    rows: Tensor | None = None  # (R,)
    values: Tensor | None = None  # (R, D)


def head_of(model: Model) -> Head | None:
    """The head of a model whose logits are seen to be this head's; None where they must come from its own forward.
    None: the head carries an adapter or hooks, is not a plain linear layer, or the model (DDP, a prompt, a projection
    after the body) does more between body and logits than `Head` can say. Seen once per model, on three tokens."""
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        return None
    lm = structure.causal_lm(model)
    linear, dtype, rows = _linear_head(lm)
    if type(linear) is not torch.nn.Linear or structure.body(lm) is lm or instances.is_hooked(linear, known="is_cast"):
        return None
    scale, softcap = _scaling(lm.config.get_text_config())
    head = Head(linear.weight, linear.bias, scale, softcap, dtype, *rows)
    seen = _SEEN.get(lm)
    if seen is None or seen[0] is not linear.weight:
        seen = (linear.weight, _computes_logits(lm, head))
        _SEEN[lm] = seen
    return head if seen[1] else None


def _linear_head(lm: Model) -> tuple[Model, torch.dtype | None, tuple[Tensor, ...]]:
    """The module that makes the logits, the dtype that it does so in where that is not its weight's, and the rows of
    it that train with their values, where not all do."""
    head = lm.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper) and isinstance(head.token_adapter, fuse._TokenRows):
        layer = head.token_adapter
        rows = fuse.trained_rows(layer)
        alone = layer.disable_adapters and not layer.merged
        return (head if rows is None and not alone else layer.base_layer), None, rows or ()
    if not isinstance(head, ModulesToSaveWrapper):
        return head, None, ()
    base, active = head.original_module, [name for name in head.active_adapters if name in head.modules_to_save]
    used = head.modules_to_save[active[0]] if active and not head.disable_adapters else base
    return used, getattr(getattr(base, "weight", None), "dtype", None), ()


_SEEN: WeakKeyDictionary[nn.Module, tuple[Tensor, bool]] = WeakKeyDictionary()


# What configs call the cap of the logits: gemma, recurrent_gemma, xlstm. What is called otherwise fails the check.
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
LARGE_LOGITS = 100.0  # larger than any cap in use


def _scaling(config: Config) -> tuple[float, float | None]:
    """What stands between head and logits, by the config: granite divides, cohere multiplies, gemma caps."""
    scale = 1.0
    if getattr(config, "logits_scaling", None):
        scale = 1.0 / float(config.logits_scaling)
    elif getattr(config, "logit_scale", None) and isinstance(config.logit_scale, (int, float)):
        scale = float(config.logit_scale)
    caps = (getattr(config, name, None) for name in _CAPS)
    softcap = next((cap for cap in caps if cap is not None), None)
    return scale, None if softcap is None else float(softcap)


def _computes_logits(lm: Model, head: Head) -> bool:
    """Whether `head` on the body's output gives the logits of the model's own forward, also where they are large. A cap
    that the config does not name as ours does is lost in the rounding of the small logits of a small model."""
    ids = torch.arange(1, 4, device=lm.device)[None] % lm.config.get_text_config().vocab_size
    options = {"use_cache": False} if packing.takes_use_cache(lm) else {}
    training = [m for m in lm.modules() if m.training]
    lm.eval()
    scaled = _ScaleHidden()
    handle = structure.body(lm).register_forward_hook(scaled)
    try:
        with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
            for size in (None, LARGE_LOGITS):
                wanted = lm(input_ids=ids, **options).logits[0].float()
                if size is not None:
                    scaled.factor = size / float(wanted.square().mean().sqrt().clamp_min(1e-6))
                    wanted = lm(input_ids=ids, **options).logits[0].float()
                hidden = structure.body(lm)(input_ids=ids, **options)[0][0].to(head.weight.device)
                got = head_logits(hidden, head).float()
                wanted = wanted.to(got.device)
                if got.shape != wanted.shape or not bool((got - wanted).norm() <= 1e-2 * wanted.norm()):
                    return False
    except Exception:  # of the model's own code; the repair: its own forward makes the logits
        return False
    finally:
        handle.remove()
        for module in training:
            module.training = True
    return True


class _ScaleHidden:
    """A hook after the body: hidden states times a factor."""

    factor = 1.0

    def __call__(self, module: nn.Module, args: object, output: ModelOutput) -> object:
        if self.factor == 1.0:
            return None
        return packing.with_hidden(output, output[0] * self.factor)


def head_logits(hidden: Tensor, head: Head) -> Tensor:
    """(K, D) -> (K, V), in hidden's dtype, as the models' own forward makes them."""
    weight, bias = head.weight.to(hidden.dtype), None if head.bias is None else head.bias.to(hidden.dtype)
    logits = F.linear(hidden, weight, bias)
    if head.rows is not None and head.values is not None:
        logits = logits.index_copy(-1, head.rows, hidden @ head.values.to(hidden.dtype).T)
    if head.scale != 1.0:
        logits = logits * head.scale
    return logits if head.softcap is None else torch.tanh(logits / head.softcap) * head.softcap


def head_loss(
    hidden: Tensor, targets: Tensor, head: Head, *, smoothing: float = 0.0, counts: Tensor | None = None,
    each: bool = False,
) -> Tensor:  # fmt: skip
    """Summed cross-entropy of `targets` (K,) under the head's logits of `hidden` (K, D), in chunks; each as often as
    `counts` (K,) says, None: once. Scalar, fp32. `each`: not summed, (K,), of a head that is frozen."""
    where = head.weight.device  # over several cards, a tied head lies beside its embedding
    hidden, targets = hidden.to(where, head.dtype or head.weight.dtype), targets.to(where)
    counts = None if counts is None else counts.to(where)
    given: tuple[Tensor | None, ...] = hidden, head.weight, head.bias, head.values
    if not torch.is_grad_enabled():  # or autograd says that they need gradients, of a head that trains
        given = tuple(None if x is None else x.detach() for x in given)
    return _HeadLoss.apply(*given, targets, head, smoothing, counts, each)


class _HeadLoss(torch.autograd.Function):
    """Logits live a chunk at a time; their gradient takes their place, and only (K, D) is kept for backward, with the
    gradients of a head that trains, summed in fp32."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor | None, targets: Tensor,
        head: Head, smoothing: float, counts: Tensor | None, each: bool,
    ) -> Tensor:  # fmt: skip
        head_gradients = [
            torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) if x is not None and needed else None
            for x, needed in zip((weight, bias, values), ctx.needs_input_grad[1:4], strict=True)
        ]
        labelled, width = hidden.shape[0], weight.shape[0]
        rows = packing.up_to(labelled)  # filled up with zeros, so that products have few shapes
        hidden = F.pad(hidden, (0, 0, 0, rows - labelled))
        targets = F.pad(targets, (0, rows - labelled))
        grad = pool.empty_like(hidden) if any(ctx.needs_input_grad) else None
        losses = torch.empty(rows, dtype=torch.float32, device=hidden.device)
        on_cpu = CHUNK32 if hidden.dtype == torch.float32 else CHUNK
        at_once = on_cpu if hidden.device.type == "cpu" else CARD_CHUNK
        max_rows = max(1, at_once // width // packing.ROWS) * packing.ROWS
        # even ones, as a short last one costs the head's bytes again
        chunk = min(max_rows, packing.up_to(-(-rows // -(-rows // max_rows)))) if rows else 1
        with torch.no_grad():
            # a master's copy in the dtype that is computed in; a frozen one is in it
            bias_, values_ = (None if x is None else x.to(hidden.dtype) for x in (bias, values))
            cast = replace(head, weight=weight.to(hidden.dtype), bias=bias_, values=values_)
            for first in range(0, rows, chunk):
                part = slice(first, min(rows, first + chunk))
                losses[part], gradient = _part(hidden[part], targets[part], cast, smoothing, gradient=grad is not None)
                if grad is not None:
                    gradient[max(0, labelled - first) :] = 0
                    if counts is not None:
                        several = (counts[first : part.stop] != 1).nonzero()[:, 0]
                        gradient[several] *= counts[first + several, None].to(gradient.dtype)
                    if cast.rows is not None and cast.values is not None:
                        columns = gradient[:, cast.rows]  # (C, R)
                        gradient[:, cast.rows] = 0
                    into(grad[part], gradient, cast.weight)  # (C, V) @ (V, D)
                    if cast.rows is not None and cast.values is not None:
                        grad[part] += columns @ cast.values  # (C, R) @ (R, D)
                        if head_gradients[2] is not None:
                            head_gradients[2] += columns.T @ hidden[part]
                    if head_gradients[0] is not None:
                        head_gradients[0] += gradient.T @ hidden[part]  # (V, C) @ (C, D)
                    if head_gradients[1] is not None:
                        head_gradients[1] += gradient.sum(0, dtype=torch.float32)
                del gradient
        ctx.gradients = (None if grad is None else grad[:labelled], *head_gradients)
        ctx.dtypes = hidden.dtype, weight.dtype, *(None if x is None else x.dtype for x in (bias, values))
        if each:
            return losses[:labelled]
        # no dot product: BLAS adds in an order that depends on where in memory the numbers lie
        return losses[:labelled].sum() if counts is None else (losses[:labelled] * counts).sum()

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("backward a second time through a graph whose buffers are freed")
        gradients, ctx.gradients = ctx.gradients, None
        times = grads[0][:, None] if grads[0].dim() else grads[0]  # of each label its own, or one for all
        scaled = (None if g is None else g.mul_(times.to(g.dtype)) for g in gradients)
        cast = (None if g is None else g.to(dtype) for g, dtype in zip(scaled, ctx.dtypes, strict=True))
        return *cast, None, None, None, None, None


def _part(hidden: Tensor, targets: Tensor, head: Head, smoothing: float, *, gradient: bool) -> tuple[Tensor, Tensor]:
    """Losses (C,) of some rows (C, D), and the gradient (C, V) of what head and hidden multiply to."""
    logits = _logits(hidden, head.weight, head.bias)
    if head.rows is not None and head.values is not None:
        logits.index_copy_(1, head.rows, hidden @ head.values.T)  # (C, D) @ (D, R)
    if head.scale != 1.0:
        logits.mul_(head.scale)
    cap_slope = None
    if head.softcap is not None:
        capped = torch.tanh_(logits.div_(head.softcap))
        cap_slope = 1 - capped * capped if gradient else None
        logits = capped.mul_(head.softcap)
    losses, slopes = _chunk_loss(logits, targets, smoothing, gradient=gradient)
    if cap_slope is not None:
        slopes.mul_(cap_slope)
    if gradient and head.scale != 1.0:
        slopes.mul_(head.scale)
    return losses, slopes


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(C, D) and (V, D) -> (C, V)."""
    if hidden.device.type != "cpu" or hidden.dtype != torch.float32:
        return product(hidden, weight.T, bias)
    logits = pool.empty((hidden.shape[0], weight.shape[0]), hidden)
    if by_kernel(logits, hidden, weight.T):
        return product(hidden, weight.T, bias)
    for rows, part in zip(weight.split(HEAD_ROWS), logits.split(HEAD_ROWS, 1), strict=True):
        torch.mm(hidden, rows.T, out=part)
    return logits if bias is None else logits.add_(bias)


def _chunk_loss(logits: Tensor, targets: Tensor, smoothing: float, *, gradient: bool) -> tuple[Tensor, Tensor]:
    """Losses (C,) in fp32, and the logits' gradient (C, V) in their own dtype, which may be their own memory."""
    if available(logits):
        from halfbyte.layers.kernels.cpu import entropy

        return entropy.cross_entropy_(logits, targets, smoothing=smoothing, gradient=gradient), logits
    log_p = torch.log_softmax(logits, -1, dtype=torch.float32)
    losses = F.nll_loss(log_p, targets, reduction="none")
    if smoothing:
        losses = (1 - smoothing) * losses - smoothing * log_p.mean(-1)
    if not gradient:
        return losses, logits
    p = log_p.exp_().sub_(smoothing / logits.shape[1])
    p[torch.arange(len(targets), device=p.device), targets] -= 1 - smoothing
    return losses, p.to(logits.dtype)

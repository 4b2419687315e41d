"""In what all proofs on the user's own model compute: a few short examples, few tokens of its vocabulary, in fp32.

Why fp32: two orders of the same sums then differ by 1e-6, and a fault by more than any tolerance. Why the first rows
of the vocabulary alone: embedding and head then cost nothing. A row that is longer than every window or chunk of the
model is added where the run has such rows and it can be afforded.
A model is as before after each of these: its weights, modes, gradients and the random state.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn

from halfbyte.errors import first_line
from halfbyte.layers import loss as losses
from halfbyte.layers import recurrent, sight
from halfbyte.layers.packed_attention import NAME
from halfbyte.layers.packing import Layout, forward_inputs
from halfbyte.models import structure
from halfbyte.models.context import context_of
from halfbyte.quant import bnb, dequantise, formats
from halfbyte.system import accelerator
from halfbyte.types import Batch, Model

Gradients = dict[str, Tensor]
Loss = Callable[["Model", "Batch"], Tensor]
"""The summed loss of a micro-batch, a scalar."""

SHORT = (5, 1, 9)  # uneven, with the shortest possible example inside
TOKENS = 256  # of the vocabulary, as many as a proof uses
PAST_WINDOW = 16  # by so many tokens a long row is longer than a window
LOOK_TOKENS = 8192  # how far is looked for windows where the longest row of a run is not known
# Tokens of a long row times weights of the layers that it runs through: about a second a forward pass on two cores.
LONG_ROW_PRODUCTS = 1e11
EXACT_BYTES = 1e9  # that fp32 copies of what is not quantised may take in a proof
# A bound for a mixture in 16 bits, of its median token or of all gradients: where two experts are as good for a token,
# rounding chooses between them. Seen on tiny ones: 63% of one token's logits, 6% of all gradients.
ROUTED = 0.3


@dataclass(frozen=True)
class StartProof:
    """`ok`: the fast way is right, and in use. `reason` says in words what was seen and is done; `difference` is that
    of the two ways; `layout`: in which texts share a forward."""

    ok: bool
    reason: str
    difference: float = 0.0
    layout: Layout = "single"

    @property
    def mode(self) -> str:
        return "packed" if self.ok else "single"


def attempt(compare: Callable[[], tuple[str, float]], *within: AbstractContextManager[object]) -> tuple[str, float]:
    """(what is wrong or nothing, the difference); also what is raised, of any kind, by the model's code or ours, on the
    way into and out of `within` too: the repair is the model's own way."""
    try:
        with ExitStack() as contexts:
            for context in within:
                contexts.enter_context(context)
            return compare()
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}", math.inf


def short_lengths(*, packed: bool) -> tuple[int, ...]:
    """Lengths of the short examples of one micro-batch."""
    return SHORT if packed else SHORT[-1:]


def random_examples(lm: Model, lengths: Sequence[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)  # its own: the run's random numbers stay what they would have been
    rows, padding = [torch.randint(tokens_of(lm), (n,), generator=generator) for n in lengths], -1
    if structure.is_encoder(lm.config):  # which may count no position for padding
        padding = int(getattr(lm.get_input_embeddings(), "padding_idx", None) or 0)
    return [row.masked_fill(row == padding, padding + 1).to(lm.device) for row in rows]


def pack(examples: Sequence[Tensor]) -> Batch:
    """Examples laid end to end."""
    lengths = torch.tensor([len(e) for e in examples])
    return {
        "input_ids": torch.cat(list(examples))[None],
        "position_ids": torch.cat([torch.arange(len(e)) for e in examples])[None],
        "cu_seq_lens_q": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int(),
    }


def labelled(examples: Sequence[Tensor]) -> Batch:
    """A micro-batch of these examples; the first two tokens of each are not labelled."""
    batch = pack(examples)
    batch["keep"] = (batch["position_ids"][0, 1:] > 1).nonzero().squeeze(1)
    batch["targets"] = batch["input_ids"][0][batch["keep"] + 1]
    return batch


def micro_batch_loss(model: Model, batch: Batch, *, fused: bool = True) -> Tensor:
    """The loss of a proof: of a language model its own; of another the sum of all hidden states behind the first two
    tokens of each text, with weights that depend on the token."""
    if has_logits(structure.causal_lm(model)):
        return losses.micro_batch_loss(model, batch, fused=fused)
    hidden = losses.every_hidden(model, batch)  # (T, D)
    angles = torch.outer(batch["input_ids"][0] + 1.0, torch.arange(1.0, hidden.shape[1] + 1))
    weights = angles.cos() * (batch["position_ids"][0] > 1)[:, None]
    return (hidden * weights.to(hidden.device)).sum() / hidden.shape[1] ** 0.5


def has_logits(lm: Model) -> bool:
    """Whether its forward gives logits of the vocabulary."""
    by_name = "logits_to_keep" in inspect.signature(lm.forward).parameters
    return by_name or lm.get_output_embeddings() is not None


def logits(lm: Model, examples: Sequence[Tensor]) -> Tensor:
    """(T, V) in fp32: one packed forward, through `forward_inputs` as in training. Of a model without a language
    model's head its hidden states: (T, D)."""
    inputs = forward_inputs(lm, pack(examples))
    if not has_logits(lm):
        return structure.body(lm)(**inputs)[0][0].float()
    return lm(**inputs).logits[0].float()


def loss_and_gradients(
    model: Model, batches: Sequence[Batch], *, parameters: Mapping[str, Tensor] | None = None,
    loss: Loss = micro_batch_loss,
) -> tuple[float, Gradients]:  # fmt: skip
    """Of some micro-batches together, with dropout off; gradients of all that trains, or of these parameters. By
    `autograd.grad`, which leaves `.grad` alone and calls no hook that waits for it (of DDP, for one)."""
    model.eval()
    if parameters is None:
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.enable_grad():
        summed = sum(loss(model, batch) for batch in batches if len(batch["keep"]))
        grads = torch.autograd.grad(summed, list(parameters.values()), allow_unused=True)
    return float(summed.detach()), {n: g for n, g in zip(parameters, grads, strict=True) if g is not None}


def tokens_of(lm: Model) -> int:
    """How many tokens of a model's vocabulary a proof uses."""
    trained = max((len(rows) for m in _trained_tokens(lm) for rows in m.token_indices.values()), default=0)
    return min(TOKENS + trained, int(lm.config.get_text_config().vocab_size))


def _trained_tokens(lm: Model) -> list[Any]:
    """PEFT's layers that train rows of an embedding or head; those that are tied share theirs."""
    return [m for m in lm.modules() if isinstance(m, TrainableTokensLayer)]


def long_row(lm: Model, longest: int | None) -> tuple[int, str]:
    """(tokens of a row longer than every window and chunk, 0 where none is needed or affordable; what is not tried).
    Windows are those that the layers show; in another layout than ours, which runs transformers' own masks, none do.
    `longest`: tokens of the longest row of the run, where it is known."""
    body = structure.body(lm)
    if lm.config._attn_implementation != NAME:
        return 0, ""
    positions = int(getattr(lm.config.get_text_config(), "max_position_embeddings", None) or LOOK_TOKENS)
    longest = longest or min(positions, LOOK_TOKENS)
    if structure.is_encoder(lm.config) and (context := context_of(lm.config)) is not None:  # a table of positions
        longest = min(longest, context.tokens)
    sight.look(body, longest)
    sights = [sight.of(layer) for layer in structure.decoder_layers(body)]
    windows = [s.causal for s in sights if s is not None and 0 < s.causal < longest]
    windows += [chunk] if 1 < (chunk := recurrent.chunk_of(body)) < longest else []
    if not windows:
        return 0, ""
    tokens = min(longest, max(windows) + PAST_WINDOW)
    if tokens <= affordable_tokens(lm):
        return tokens, ""
    return 0, f" (rows longer than the window of {max(windows)} were not tried: too slow; it is read off the mask)"


def affordable_tokens(model: Model) -> int:
    """How many tokens a proof may run through a model's layers."""
    modules = [m for layer in structure.decoder_layers(model) for m in layer.modules()]
    weights = sum(p.numel() * (1 + formats.is_quantised(m)) for m in modules for p in m.parameters(recurse=False))
    return int(LONG_ROW_PRODUCTS / max(1, weights))


@contextmanager
def as_given(model: Model) -> Iterator[None]:
    """Every module's mode and the random state as they were, afterwards."""
    modes = structure.replaced(*((m, "training", m.training) for m in model.modules()))
    with modes, accelerator.keep_random_state(p.device for p in model.parameters()):
        yield


def precisions(model: Model) -> tuple[bool, ...]:
    """In which precisions a proof is made: in fp32 (True) where it can be afforded, then in the model's own dtype."""
    if structure.causal_lm(model).dtype in (torch.float32, torch.float64):
        return (True,)
    return (True, False) if sum(d.nbytes * 2 for _, d in _widened(model)) <= EXACT_BYTES else (False,)


# Tokens of a chunk of transformers' own scan in a proof, whose result is that of any chunk. It fills texts up to whole
# chunks, and makes chunk x chunk x heads x state numbers for each: 1.6 GB for 256 at Granite 4's sizes.
CHUNK = 32


def small_chunks(model: Model) -> AbstractContextManager[None]:
    """Mamba-2's layers with chunks of at most `CHUNK` tokens."""
    scans = [m for m in model.modules() if hasattr(m, "ssm_state_size") and isinstance(vars(m).get("chunk_size"), int)]
    return structure.replaced(*((m, "chunk_size", min(CHUNK, m.chunk_size)) for m in scans))


@contextmanager
def few_tokens(model: Model, *, exact: bool) -> Iterator[None]:
    """The model with the first rows of its vocabulary, computing in fp32 if `exact`. As before afterwards."""
    lm = structure.causal_lm(model)
    (embeddings, _), count = structure.around(lm), tokens_of(lm)
    padding = getattr(embeddings, "padding_idx", None)
    saved = [(t, t.data) for t in (*_vocabulary(lm), *(t for t, _ in _widened(model)))]
    dtypes = [
        (m, m.compute_dtype, m.weight.quant_state.dtype) for _, m in bnb.linears_4bit(model) if formats.is_quantised(m)
    ]
    trained = [(m, dict(m.token_indices)) for m in _trained_tokens(lm) if m.tied_adapter is None]
    # rows that train are, for the moment, among these, and met by the examples
    first = dict.fromkeys([*torch.cat(random_examples(lm, SHORT)).tolist(), *range(count)])
    try:
        for rows in _vocabulary(lm):
            rows.data = rows.data[:count]
        for module, indices in trained:
            module.token_indices.update({name: [*first][: len(tokens)] for name, tokens in indices.items()})
        if padding is not None and padding >= count:
            embeddings.padding_idx = None
        if exact:
            for tensor, _ in _widened(model):
                tensor.data = tensor.data.float()
            bnb.set_compute_dtype(model, torch.float32)
        with formats.without_rounding(model), small_chunks(model):
            yield
    finally:
        for tensor, data in reversed(saved):
            tensor.data = data
        for module, indices in trained:
            module.token_indices.update(indices)
        for module, compute, stored in dtypes:
            module.compute_dtype, module.weight.quant_state.dtype = compute, stored
        if padding is not None:
            embeddings.padding_idx = padding
        dequantise.forget()


def _widened(model: Model) -> list[tuple[Tensor, Tensor]]:
    """What must be made fp32 for a proof in fp32, and the part of it that is needed."""
    lm = structure.causal_lm(model)
    packed = {id(m.weight) for _, m in bnb.linears_4bit(model)}
    rows = {id(p) for p in _vocabulary(lm)}
    halves = (t for t in (*model.parameters(), *model.buffers()) if t.dtype in (torch.bfloat16, torch.float16))
    return [(t, t.data[: tokens_of(lm)] if id(t) in rows else t.data) for t in halves if id(t) not in packed]


def _vocabulary(lm: Model) -> list[nn.Parameter]:
    """The frozen parameters of embedding and head, which have a row for each token; a tied one once."""
    plain = [m for m in structure.around(lm) if isinstance(m, nn.Embedding) or type(m) is nn.Linear]
    return list({id(p): p for m in plain for p in m.parameters(recurse=False) if not p.requires_grad}.values())

"""A decoder-only model as a tape: embedding aside, a token's whole way from hidden state to logits.

What is recognised is structure, not names of classes: norms, attention projections (one or three), output projection,
an MLP (its two inner projections in one or apart), and where the norms stand (`layer.py` has their names). What a model
does beside that is not looked for: `writing/writer.py` compares logits with the model's own before a token is used.
Source: transformers' modeling files.
Cost: tens of milliseconds to write; LoRA is copied in the compute dtype.

Letters: M texts, H query heads, K key heads, T max_tokens of a cache.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from halfbyte.layers import sight
from halfbyte.layers.decoding import head as int8_heads
from halfbyte.layers.decoding import linears
from halfbyte.layers.decoding.decoder import Decoder
from halfbyte.layers.decoding.layer import LayerWriter, formula_of
from halfbyte.layers.decoding.linears import Unsupported
from halfbyte.layers.decoding.operands import Int8Head
from halfbyte.layers.decoding.tape import Tape, TextAdapters
from halfbyte.models import structure
from halfbyte.models.context import CHANGING_ROPES
from halfbyte.quant import bnb, policy
from halfbyte.types import Config, Model

FINAL_NORMS = "norm", "final_layernorm", "ln_f", "final_layer_norm", "norm_f", "embedding_norm"
POSITIONS, EMBEDDING_NORMS = ("wpe", "embed_positions"), ("word_embeddings_layernorm",)


def decoder(
    model: Model, texts: int, max_tokens: int, *, adapters: TextAdapters | None = None, beside: Decoder | None = None,
    largest: bool = False, reads: bool = False,
) -> Decoder:  # fmt: skip
    """Write the tape of a model for so many texts of up to `max_tokens` tokens. Raises Unsupported, saying why.

    Args:
        adapters: which adapter each text uses, at each step as it is then; None for the active one.
        beside: a decoder for more texts, of the same max_tokens, whose caches are used: those of its first texts.
        largest: only the largest logit will be looked at; then the others may be rough (`head.py`).
        reads: for `Decoder.read`, of any tokens of the texts in `beside`.
    """
    try:
        return _write(model, texts, max_tokens, adapters, beside, largest, reads)
    except (AttributeError, IndexError, TypeError) as why:  # a part that has another name, or none
        raise Unsupported(f"{type(structure.causal_lm(model)).__name__} is not built like Llama: {why}") from why


def _write(
    model: Model, texts: int, max_tokens: int, adapters: TextAdapters | None, beside: Decoder | None, largest: bool,
    reads: bool,
) -> Decoder:  # fmt: skip
    lm = structure.causal_lm(model)
    body, config = structure.body(lm), lm.config.get_text_config()
    head, norm = lm.get_output_embeddings(), _named(body, FINAL_NORMS)
    if norm is None or not isinstance(getattr(head, "weight", None), Tensor):
        raise Unsupported(f"{type(lm).__name__} is not built like Llama")
    dtype = next(lm.get_input_embeddings().parameters()).dtype
    max_tokens = -(-max_tokens // 64) * 64
    try:
        tape = Tape(dtype, texts, max_tokens, adapters)
    except ValueError as error:
        raise Unsupported(str(error)) from error
    layers = structure.decoder_layers(body)
    sight.look(body, max_tokens)
    decoder = Decoder(
        tape,
        hidden=tape.buffer(texts, norm.weight.shape[0]),
        logits=tape.buffer(texts, head.weight.shape[0]),
        positions=tape.buffer(texts, dtype=torch.int64),
        final_cap=float(getattr(config, "final_logit_softcapping", 0) or 0),
        residual_multiplier=float(getattr(config, "residual_multiplier", 1.0)),
        logits_divisor=float(getattr(config, "logits_scaling", 1.0))
        / float(getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0),
        places=tape.buffer(texts, dtype=torch.int64) if reads else None,
        array=torch.tensor,
    )
    slopes = _enter_by(decoder, body, config)
    ropes: dict[str | None, tuple[Tensor, Tensor]] = {}
    for number, layer in enumerate(layers):
        kind = _rope_kind(config, number)
        if kind not in ropes:
            ropes[kind] = _ropes(decoder, getattr(body, "rotary_emb", None), config, kind)
        LayerWriter(
            decoder, layer, config, ropes[kind], slopes, beside, None if reads else texts, 2 * len(layers)
        ).write()
        decoder.ends.append(len(tape))
    _write_head(decoder, norm, head, _int8_head(layers, head, dtype) if largest else None)
    return decoder


def _int8_head(layers: list[nn.Module], head: nn.Module, dtype: torch.dtype) -> Int8Head | None:
    """The head in 8 bits, where that is worth its memory."""
    others = sum(t.nbytes for layer in layers for t in bnb.held_tensors(layer))
    worth = policy.head_in_eight_bits(head.weight.nbytes, others)
    return int8_heads.of(head, dtype) if worth else None


def _write_head(decoder: Decoder, norm: nn.Module, head: nn.Module, int8_head: Int8Head | None) -> None:
    tape, hidden = decoder.tape, decoder.hidden
    x = tape.vectors(hidden.shape[1])
    integers = None if int8_head is None else tape.int16_vectors(x, hidden.shape[1])
    formula = formula_of(norm, hidden.shape[1], tape.dtype)
    tape.norm(hidden, x, replace(formula, eps=formula.eps / decoder.residual_multiplier**2), integers)
    tape.then()
    decoder.normed, decoder.body = x.plain, len(tape)
    if int8_head is not None and integers is not None:
        first, before = len(tape), tape.before
        tape.largest(head.weight.data, int8_head, x.plain, integers, decoder.logits)
        tape.then()
        decoder.rough, tape.before = range(first, len(tape)), before  # the whole head needs no more than that one
    linears.write(tape, x, [(head, decoder.logits)])


def _named(body: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    return next((part for name in names if (part := getattr(body, name, None)) is not None), None)


def enters_plainly(lm: Model) -> bool:
    """Whether what enters the first layer is the embedding, or a multiple of it."""
    return _named(structure.body(lm), POSITIONS + EMBEDDING_NORMS) is None


def _enter_by(decoder: Decoder, body: nn.Module, config: Config) -> Tensor | None:
    """What is done to embeddings before the first layer; and ALiBi's slopes (H,), if any."""
    tape, d = decoder.tape, decoder.hidden.shape[1]
    table, norm = _named(body, POSITIONS), _named(body, EMBEDDING_NORMS)
    if getattr(body, "project_in", None) is not None or getattr(config, "alibi", False):
        raise Unsupported(f"a variant of {config.model_type}")
    if table is not None:
        decoder.places_of = table.weight.data[int(getattr(table, "offset", 0)) :]
    if norm is not None:
        decoder.entry = tape.buffer(tape.m, d)
        tape.add_norm(decoder.entry, decoder.hidden, formula_of(norm, d, tape.dtype), add=False)
        tape.then()
    if hasattr(body, "build_alibi_tensor"):
        ones = torch.ones((1, 2), dtype=torch.int64)
        slopes: Tensor = body.build_alibi_tensor(ones, config.num_attention_heads, torch.float32)[:, 0, 1]
        return slopes.contiguous()
    if hasattr(body, "build_mpt_alibi_tensor"):
        bias = body.build_mpt_alibi_tensor(config.num_attention_heads, 2)
        return (bias[:, 0, 1] - bias[:, 0, 0]).contiguous()
    return None


def _rope_kind(config: Config, number: int) -> str | None:
    """The layer type whose rotary embedding layer `number` uses, where a model has several."""
    types = getattr(config, "layer_types", None)
    parameters = getattr(config, "rope_parameters", None) or {}
    return types[number] if types and types[number] in parameters else None


def _ropes(decoder: Decoder, rotary: nn.Module | None, config: Config, kind: str | None) -> tuple[Tensor, Tensor]:
    """Buffers (M, R) of cos and sin, with their tables (T, R) noted; of one column, that is none, without rotary."""
    tape, parameters = decoder.tape, getattr(config, "rope_parameters", None) or {}
    if rotary is None:
        return tape.buffer(tape.m, 1), tape.buffer(tape.m, 1)
    parameters = parameters[kind] if kind is not None else parameters
    if parameters.get("rope_type") in CHANGING_ROPES:
        raise Unsupported(f"rotary embedding of type {parameters['rope_type']}")
    positions, like = torch.arange(tape.max_tokens)[None], torch.zeros(1, dtype=torch.float32)
    tables = rotary(like, positions) if kind is None else rotary(like, positions, kind)
    if not all(isinstance(table, Tensor) and table.is_floating_point() for table in tables):
        raise Unsupported("a rotary embedding that is no cos and sin")
    rows = []
    for table in tables:
        rows.append(tape.buffer(tape.m, table.shape[-1]))
        if torch.equal(table[..., ::2], table[..., 1::2]):  # as neighbours are turned, each twice
            table = torch.cat([table[..., ::2]] * 2, -1)
        decoder.ropes.append((table[0].float().contiguous(), rows[-1]))
    return rows[0], rows[1]

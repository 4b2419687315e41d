"""Writes texts by the model's own forward, with the caches that transformers makes for it.

Why: for what a tape cannot write: cards, architectures that are not built like Llama, DoRA, whole trained modules. It
has the same interface as `writer.Writer`.
What: texts that are inserted together are one batch, padded on the left, as in transformers' `generate`, which prepares
it (`custom_generate`, a documented argument); the loop is that of `GenerationMixin._sample`.
Cost: each token dequantises the base once a batch.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from halfbyte.models import structure
from halfbyte.proofs import packing
from halfbyte.proofs.closeness import row_distances
from halfbyte.types import Document, Model
from halfbyte.writing.sampling import Processors
from halfbyte.writing.text import Text, TextWriter, by_prompt

# Of a model's generation_config: what changes logits whatever is drawn from them.
PROCESSORS = (
    "repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "bad_words_ids", "min_length", "min_new_tokens", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens",
    "begin_suppress_tokens", "sequence_bias", "exponential_decay_length_penalty", "guidance_scale",
    "watermarking_config",
)  # fmt: skip


def processors(lm: Model, text: Text) -> Processors | None:
    """What the model's generation_config does to the logits of a text, its own repetition penalty being stronger; None:
    nothing."""
    config, own = lm.generation_config, text.params.repetition_penalty
    settings = {name: getattr(config, name, None) for name in PROCESSORS}
    if own is not None:
        settings["repetition_penalty"] = own
    if all(value in (None, 0, 1, False, [], {}) for value in settings.values()):
        return None
    ids = torch.tensor([list(text.prompt)], device=lm.device)
    return _prepared(lm, ids, torch.ones_like(ids), text)["logits_processor"]


def _prepared(lm: Model, ids: Tensor, mask: Tensor, text: Text) -> Document:
    """What transformers' `generate` hands to a loop: the inputs of the forward with an empty cache, and processors."""
    prepared: Document = {}

    def note(lm: Model, input_ids: Tensor, **inputs: object) -> Tensor:
        prepared.update(inputs)
        return input_ids

    own = text.params.repetition_penalty
    lm.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=text.params.max_tokens, do_sample=False, temperature=None,
        top_p=None, top_k=None, num_beams=1, num_return_sequences=1, eos_token_id=sorted(text.stop_ids) or None,
        pad_token_id=0, use_cache=True, custom_generate=note, **({} if own is None else {"repetition_penalty": own}),
    )  # fmt: skip
    return prepared


@dataclass(eq=False)
class _PaddedBatch:
    """Texts of one forward; None: one that has left. logits: (n, V), until the next step takes them."""

    adapter: str | None
    texts: list[Text | None]
    ids: Tensor
    inputs: Document
    logits: Tensor | None = None

    @classmethod
    def read(cls, lm: Model, texts: Sequence[Text]) -> "_PaddedBatch":
        width = max(len(text.prompt) for text in texts)
        ids = torch.zeros((len(texts), width), dtype=torch.int64, device=lm.device)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            text.sampler.processors = processors(lm, text)
            ids[row, width - len(text.prompt) :] = torch.tensor(list(text.prompt))
            mask[row, width - len(text.prompt) :] = 1
        longest = max(texts, key=lambda text: text.params.max_tokens)
        inputs = _prepared(lm, ids, mask, longest)
        for name in ("logits_processor", "stopping_criteria", "generation_config"):
            del inputs[name]
        batch = cls(texts[0].adapter, list(texts), ids, inputs)
        batch._forward(lm, is_first_iteration=True)
        return batch

    def next_logits(self, lm: Model) -> list[tuple[Text, Tensor]]:
        if self.logits is None:
            last = [[0 if text is None else text.last] for text in self.texts]
            self.ids = torch.cat([self.ids, torch.tensor(last, device=self.ids.device)], 1)
            self._forward(lm, next_sequence_length=1 if self.inputs["use_cache"] else None)
        assert self.logits is not None
        logits, self.logits = self.logits, None
        return [(text, logits[row]) for row, text in enumerate(self.texts) if text is not None]

    def _forward(self, lm: Model, **how: object) -> None:
        outputs = lm(**lm.prepare_inputs_for_generation(self.ids, **how, **self.inputs), return_dict=True)
        self.inputs = lm._update_model_kwargs_for_generation(outputs, self.inputs)
        self.logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32)

    def copied(self, text: Text) -> "_PaddedBatch":
        """For another text after the same prompt."""
        return _PaddedBatch(self.adapter, [text], self.ids, copy.deepcopy(self.inputs), self.logits)


class PlainWriter(TextWriter):
    """Args: using: makes one of several adapters active."""

    def __init__(
        self, model: Model, using: Callable[[str | None], AbstractContextManager[None]] = lambda adapter: nullcontext()
    ) -> None:
        self.lm, self.using = structure.causal_lm(model), using
        self.batches: list[_PaddedBatch] = []

    def insert(self, texts: Sequence[Text], *, packed: bool = False) -> None:
        """packed: as one batch, where rounding may change a text with its neighbours; else each by itself, as where
        the model takes padding for text."""
        with self.using(texts[0].adapter):
            if packed:
                together = _PaddedBatch.read(self.lm, texts)
                if not self._reads_padding(together, texts):
                    self.batches.append(together)
                    return
            for text, *others in by_prompt(texts):
                batch = _PaddedBatch.read(self.lm, [text])
                for other in others:
                    other.sampler.processors = processors(self.lm, other)
                self.batches += [batch, *map(batch.copied, others)]

    def _reads_padding(self, together: _PaddedBatch, texts: Sequence[Text]) -> bool:
        """Whether a padded text has other logits than alone: its state begins with the padding (RWKV), or keys are
        taken together from the first place on (DeepSeek-V4). It shows most where there is most padding, or most text:
        the shortest text and the longest padded one are read again."""
        width = together.ids.shape[1]
        padded = sorted(
            (n for n, text in enumerate(texts) if len(text.prompt) < width), key=lambda n: len(texts[n].prompt)
        )
        bound = packing.allowed(self.lm, exact=self.lm.dtype == torch.float32)
        for row in {*padded[:1], *padded[-1:]}:
            alone = _PaddedBatch.read(self.lm, [texts[row]]).logits
            assert together.logits is not None and alone is not None
            if not float(row_distances(together.logits[row], alone[0])) <= bound:
                return True
        return False

    def next_logits(self) -> list[tuple[Text, Tensor]]:
        rows = []
        for adapter, batches in groupby(sorted(self.batches, key=lambda b: str(b.adapter)), key=lambda b: b.adapter):
            with self.using(adapter):
                for batch in batches:
                    rows += batch.next_logits(self.lm)
        return rows

    def remove(self, text: Text) -> None:
        for batch in self.batches:
            batch.texts = [None if other is text else other for other in batch.texts]
        self.batches = [batch for batch in self.batches if any(batch.texts)]

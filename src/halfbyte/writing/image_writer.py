"""One text after the other by an image of a tape: the tokens of `writer.Writer`; without torch, if they are greedy.

What: `keep` makes an image of a writer that has been proven, for prompts up to the longest one that was, and looks
whether it gives the same logit. Of a conversation only what is new is read.
Cost: keeping takes a few hundred milliseconds, with a proof on a longer prompt a second more.
"""

import shutil
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from halfbyte.errors import HalfbyteError
from halfbyte.layers.decoding import image as images
from halfbyte.layers.decoding.decoder import CannotKeep
from halfbyte.layers.decoding.image import TapeImage
from halfbyte.types import Document
from halfbyte.writing.sampling import SamplingParams
from halfbyte.writing.text import Text, same_beginning

if TYPE_CHECKING:
    from halfbyte.writing.writer import Writer

MOST_TOKENS = 4096  # of a text; a longer one is left to the model
# Tokens of the longer prompt times the bytes of all layers: a second or two on two cores.
_PROOF_PRODUCTS = 1e11


class ImageWriter:
    """A folder's image. threads: to compute with. Raises CannotKeep: it is not whole."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.facts = images.read(folder)
        self._folder, self._threads = folder, threads
        self._tokens: list[int] = []  # in the cache

    @cached_property
    def image(self) -> TapeImage:
        return TapeImage(self._folder, self.facts, self._threads)

    def takes(self, prompt: Sequence[int], params: SamplingParams) -> bool:
        """Whether a text is one of those that the proof was for."""
        fits = len(prompt) + params.max_tokens <= self.facts["most"]
        return fits and len(prompt) <= self.facts["longest"] and params.repetition_penalty is None

    def write(self, text: Text, after_step: Callable[[Sequence[Text]], bool]) -> None:
        """A whole text, until it ends or `after_step` says so. Raises HalfbyteError: a token cannot be chosen."""
        logits = self.begin(text)
        while True:
            text.take(logits)
            if text.error is not None:
                raise HalfbyteError(f"the answer has failed: {text.error}.") from text.error
            if after_step([text]) or text.ended:
                break
            logits = self._step(text)

    def begin(self, text: Text) -> np.ndarray:
        """Read the prompt; the logits (V,) after it."""
        prompt, size = text.prompt[:-1], self.facts["vectors"]
        start = same_beginning(self._tokens, prompt)
        if self.facts["recurrent"] and start < len(self._tokens):
            start = 0  # the states are those behind all that was read
        self._tokens = list(prompt)
        for n in range(start, len(prompt), size):
            tokens = prompt[n : n + size]
            embedded = self.image.embedded(tokens, self.facts["factor"])
            self.image.decoders[1].read(embedded, range(n, n + len(tokens)), [0] * len(tokens))
        return self._step(text)

    def _step(self, text: Text) -> np.ndarray:
        """The logits (V,) after the last token of a text."""
        embedded, at = self.image.embedded([text.last], self.facts["factor"]), len(self._tokens)
        self._tokens.append(text.last)
        return self.image.decoders[0].step(embedded, [at], whole=not text.sampler.greedy)[0]


def keep(writer: "Writer", folder: Path, prompt: Sequence[int], most: int, threads: int, facts: Document) -> None:
    """An image of the tape of a writer, which has answered a prompt as its active adapter does, for texts of up to
    `most` tokens. Raises CannotKeep."""
    import torch

    from halfbyte.layers.decoding import linears, llama
    from halfbyte.writing import prefill
    from halfbyte.writing.places import FastPathUnavailable

    weight, exact = writer.embedding.weight, writer.exact
    text, most = Text(prompt, SamplingParams(1), ()), min(most, MOST_TOKENS)
    layer_bytes = sum(part.nbytes for layer in writer.layers for part in layer.parameters())
    if type(writer.embedding) is not torch.nn.Embedding or not writer.by_tape(text, packed=False):
        raise CannotKeep("the model's own forward is needed")
    exact, writer.exact = writer.exact, True
    try:
        with torch.no_grad():
            longer = min(prefill.LONGEST, most - 1, int(_PROOF_PRODUCTS / layer_bytes))
            if longer > writer.proven.get(None, 0):
                writer.insert([long := Text((list(prompt) * longer)[:longer], SamplingParams(1), ())])
                writer.remove(long)
            writer.insert([text])
            ((_, logits),) = writer.next_logits()
            writer.remove(text)
            first = llama.decoder(writer.lm, 1, most, largest=True)
            reader = llama.decoder(writer.lm, prefill.VECTORS, most, beside=first, reads=True)
    except (FastPathUnavailable, linears.Unsupported) as why:
        raise CannotKeep(str(why)) from why
    finally:
        writer.exact = exact
    if text.sampler.processors is not None or float(torch.tensor(writer.factor, dtype=weight.dtype)) != writer.factor:
        raise CannotKeep("the model changes logits or embeddings in a way of its own")
    facts |= {"factor": writer.factor, "longest": writer.proven[None], "most": most, "vectors": prefill.VECTORS}
    facts["recurrent"] = bool(first.states)
    images.save(folder, [first, reader], weight, facts)
    seen, token = ImageWriter(folder, threads).begin(text), int(logits.argmax())
    if int(seen.argmax()) != token or float(seen[token]) != float(logits[token]):
        shutil.rmtree(folder)
        raise CannotKeep("the image gives other logits than the tape")

"""What answers conversations: a run, an adapter or a base, by an image of its tape where its proof is remembered; else
it is opened and proven, and then remembered.

Why: opening and proving took five seconds before the first token of an answer that takes a tenth of one.
What: an image is used where all is as it was: base, adapter and tokenizer, the recipe, halfbyte's code, libraries,
processor, threads. What has changed is told, and all is proven again.
Cost: hashes of the adapter, the tokenizer and the image; of the base's weights their sizes and times.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.base.store import shelf
from halfbyte.inference.target import Target
from halfbyte.models.context import Context
from halfbyte.models.sources.lookup import at_hand, find_model
from halfbyte.system import device, files, libraries, openmp, threads
from halfbyte.types import Document
from halfbyte.writing.plain_tokenizer import CannotKeep, PlainTokenizer
from halfbyte.writing.text import Detokenizer, Session, Text, sender

if TYPE_CHECKING:
    from halfbyte.inference.load import Opened
    from halfbyte.writing.image_writer import ImageWriter
    from halfbyte.writing.sampling import SamplingParams

    Messages = Sequence[dict[str, str]]
MOST_IMAGES = 8  # of some tens of MB; the oldest goes


class Speaker:
    """Answers conversations.

    Args:
        opens: opens it whole. base: the base alone will answer first. prove: whatever is remembered. keeps: remember
            what is proven.
    """

    def __init__(
        self, subject: Target, opens: Callable[[], Opened], *, base: bool = False, prove: bool = False,
        keeps: bool = True,
    ) -> None:  # fmt: skip
        self.subject, self._opens = subject, opens
        self._prove, self._first = prove, base
        self.run, self.recipe = subject.path, subject.recipe
        self.alone = subject.adapter is None
        self._done = set[bool]() if keeps else {False, True}
        self.changed: list[str] = []
        """What is not as it was when an image was made."""
        self._images: dict[bool, tuple[ImageWriter, PlainTokenizer] | None] = {}

    @cached_property
    def opened(self) -> Opened:
        self._images = {False: None, True: None}
        return self._opens()

    @cached_property
    def _threads(self) -> int:
        asked = threads.asked_threads()
        return min(device.cores(), asked[0] if asked else device.cores())

    @cached_property
    def _made_with(self) -> Document:
        """All that an image depends on, as it is now."""
        base, adapter = find_model(self.recipe), self.subject.adapter
        parts = {"base": base.path, **({} if adapter is None else {"adapter": adapter})}
        around = {**libraries.surroundings(self._threads), "device": device.detect().kind}
        return {**around, **{name: files.state(folder) for name, folder in parts.items()}}

    def _folder(self, *, base: bool) -> Path:
        fields, template = {"model", "revision", "quant", "lora", "trust_remote_code"}, self.recipe.data.chat_template
        if template and "{" not in template and Path(template).is_file():
            template = files.sha256(Path(template))
        asked = self.recipe.model_dump(mode="json", include=fields)
        named = json.dumps([str(self.run.absolute()), asked, template, base or self.alone])
        return files.cache_dir() / "tapes" / hashlib.sha256(named.encode()).hexdigest()[:16]

    def _image(self, *, base: bool) -> tuple[ImageWriter, PlainTokenizer] | None:
        if base not in self._images:
            folder = self._folder(base=base)
            usable = not self._prove and folder.is_dir() and at_hand(self.recipe)
            self._images[base] = self._recall(folder) if usable else None
        return self._images[base]

    def _recall(self, folder: Path) -> tuple[ImageWriter, PlainTokenizer] | None:
        from halfbyte.layers.kernels import cpu

        if not cpu.enabled(self._threads):
            return None
        from halfbyte.writing.image_writer import ImageWriter

        try:
            image = ImageWriter(folder, self._threads)
            was, now = image.facts["made_with"], self._made_with
            self.changed = sorted(name for name in {*was, *now} if was.get(name) != now.get(name))
            tokenizer = PlainTokenizer(folder, image.facts["chat"])
        except (CannotKeep, OSError, KeyError) as why:  # of another version
            self.changed = [str(why)]
        if self.changed:
            return None
        openmp.watch(self._threads, device.core_share())
        for store in {Path(path).parent for path, _ in image.facts["files"]}:
            if store.parent == shelf.folder():
                shelf.hold(store.name)
                shelf.touch(store)
        return image, tokenizer

    def ids(self, messages: Messages) -> list[int]:
        """Token ids of a conversation up to where the assistant speaks."""
        if (image := self._image(base=self._first)) is not None:
            try:
                return image[1].chat_ids(messages)
            except Exception:  # of any kind: transformers' own way says what is wrong  # nosec B110
                pass
        from halfbyte.inference import generate

        return generate.chat_ids(self.opened.tokenizer, messages)

    @property
    def context(self) -> Context | None:
        """How many tokens the model reads."""
        if (image := self._image(base=self._first)) is not None:
            return Context(*known) if (known := image[0].facts["context"]) else None
        from halfbyte.models.context import context_of

        return context_of(self.opened.model.config)

    def check(self, talks: Sequence[Messages], new_tokens: int) -> None:
        """Refuse conversations that are too long with the tokens of an answer (DataError)."""
        if self._image(base=self._first) is None:
            _ = self.opened  # which refuses them
        elif (context := self.context) is not None:
            for talk in talks:
                context.check(len(self.ids(talk)), new_tokens)

    def answer(
        self, ids: Sequence[int], params: SamplingParams, session: Session, *, base: bool = False,
        emit: Callable[[str], None] | None = None, each: Callable[[], bool] | None = None,
    ) -> str:  # fmt: skip
        """Continue a prompt. emit: takes new text as it comes. each: called after each token; True ends the answer.
        session: what was read in it before, by the same side, is not read again."""
        image = self._image(base=base)
        if image is not None and image[0].takes(ids, params):
            writer, tokenizer = image
            text = Text(ids, params, writer.facts["stop_ids"], detokenizer=Detokenizer(tokenizer))
            writer.write(text, sender(emit, each))
            return tokenizer.decode(text.tokens, skip_special_tokens=True)
        from halfbyte.inference import generate

        opened = self.opened
        with opened.using(base=base):
            more: Document = {"emit": emit, "each": each, "session": session}
            return generate.generate(opened.model, opened.tokenizer, [ids], params, **more)[0]

    def remember(self, ids: Sequence[int], session: Session, *, base: bool = False) -> str | None:
        """Keep what was proven for an answer, once; why not, where it cannot be."""
        if "opened" not in self.__dict__ or session.writer is None or base in self._done:
            return None
        from halfbyte.inference.generate import chat_ids, stop_ids
        from halfbyte.writing.image_writer import keep

        self._done.add(base)
        opened, context = self.opened, self.context
        folder = self._folder(base=base)
        try:
            plain = PlainTokenizer.of(opened.tokenizer, folder, chat_ids)
            facts: Document = {"made_with": self._made_with, "chat": plain.chat}
            facts["stop_ids"] = stop_ids(opened.model, opened.tokenizer)
            facts["context"] = None if context is None else [context.tokens, context.why]
            for old in sorted(folder.parent.iterdir(), key=lambda path: path.stat().st_mtime)[:-MOST_IMAGES]:
                shutil.rmtree(old, ignore_errors=True)
            with opened.using(base=base):
                most = context.tokens if context else 1 << 20
                keep(session.writer, folder, ids, most, self._threads, facts)  # type: ignore[arg-type]
        except (CannotKeep, OSError, AttributeError) as why:
            return str(why)
        return None

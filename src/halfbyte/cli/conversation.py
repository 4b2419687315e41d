"""`halfbyte generate` and `halfbyte chat`: answers of the adapter or of the base alone, printed as they come."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from signal import SIGINT
from typing import TYPE_CHECKING

from halfbyte.cli import show
from halfbyte.errors import DataError, HalfbyteError, typed
from halfbyte.training.events import StopRequest, stop_on_signals

if TYPE_CHECKING:
    from halfbyte.inference.speaker import Speaker
    from halfbyte.writing.sampling import SamplingParams
    from halfbyte.writing.text import Session

    Messages = Sequence[dict[str, str]]

HELP = """\
/base [TEXT]   the base alone answers, the last question or this one
/both [TEXT]   base and adapter answer the same
/save [FILE]   add the conversation to a file, as a row to train on
/reset         forget everything said
/quit          leave; so does Ctrl-D
Enter sends, Alt-Enter begins a new line, arrow keys go through what was asked,
Ctrl-C stops an answer."""
MIN_LEFT = 8  # tokens of an answer; where fewer are left the context is full


@dataclass
class TokenWatch:
    """Asked after each token: counts them, and says whether Ctrl-C was pressed. `first_s` is the prompt's time."""

    stop: StopRequest = field(default_factory=StopRequest)
    tokens: int = 0
    first_s: float = 0.0
    last_s: float = 0.0
    _began: float = field(default_factory=time.perf_counter)

    def __call__(self) -> bool:
        self.tokens, self.last_s = self.tokens + 1, time.perf_counter() - self._began
        if self.tokens == 1:
            self.first_s = self.last_s
        return self.stopped

    @property
    def stopped(self) -> bool:
        return self.stop.signal is not None

    @property
    def per_second(self) -> float:
        """Tokens a second after the first one, which waits for the prompt."""
        return (self.tokens - 1) / max(1e-9, self.last_s - self.first_s) if self.tokens > 1 else 0.0


def check_text(text: str, what: str) -> None:
    """Raises DataError: it has bytes that are no UTF-8, which come in as halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{what} is not UTF-8.", fix='"$(iconv -f ISO-8859-1 -t UTF-8 FILE)" in its place') from None


def answer(
    speaker: Speaker, messages: Messages, params: SamplingParams, session: Session, *, base: bool = False,
    silent: bool = False, each: Callable[[], bool] | None = None,
) -> str:  # fmt: skip
    """What the adapter says to a conversation, or the base alone; printed as it comes unless `silent`. `session`: what
    this side has read of the conversation, and need not read again. `each`: called after each token; True ends the
    answer there."""
    ids = speaker.ids(messages)
    text = speaker.answer(ids, params, session, base=base, emit=None if silent else show.stream, each=each)
    if not silent:
        show.text("")
    if (why := speaker.remember(ids, session, base=base)) is not None:
        logging.getLogger(__name__).info("the next start opens the model again: %s", why)
    return text


class Chat:
    """A conversation that grows line by line."""

    def __init__(self, speaker: Speaker, params: SamplingParams, system: str | None) -> None:
        self._speaker, self._params = speaker, params
        self._first = [{"role": "system", "content": system}] if system else []
        self.messages = list(self._first)
        self._file: Path | None = None
        self._sessions: dict[bool, Session] = {}  # of the base, and of the adapter

    def run(self) -> None:
        """Until the user leaves: /quit, Ctrl-D, or Ctrl-C twice at the prompt with no line sent between."""
        who = self._speaker
        show.text(f"{who.recipe.model}{'' if who.alone else f' with the adapter of {who.run}'}\n{HELP}")
        ask, leaving = show.asker(), False
        while True:
            try:
                line, leaving = ask(), False
            except KeyboardInterrupt:
                if leaving:
                    return
                leaving = True
                show.text("(Ctrl-C again leaves, as /quit does)")
                continue
            except EOFError:
                show.text("")
                return
            if line in ("/quit", "/exit"):
                return
            self.say(line)

    def say(self, line: str) -> None:
        try:
            check_text(line, "this line")
        except DataError as error:
            show.warning(error.message)
            return
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        if command == "/reset":
            self.messages = list(self._first)
            self._sessions.clear()
        elif command in ("/base", "/both"):
            self._beside(rest, both=command == "/both")
        elif command == "/save":
            self._save(rest)
        elif command == "/help":
            show.text(HELP)
        elif line.startswith("/"):
            show.text(f"no such command {command}; there are /base, /both, /save, /reset, /quit")
        elif line:
            self.messages.append({"role": "user", "content": line})
            self._keep(self._answered(self.messages))

    def _keep(self, text: str | None) -> None:
        """Add an answer to the conversation; without one its question goes too."""
        if text is None:
            self.messages.pop()
        else:
            self.messages.append({"role": "assistant", "content": text})

    def _beside(self, text: str, *, both: bool) -> None:
        """The base's answer to the last question or to `text`; `both`: then the adapter's, which stays in the talk
        where the question is a new one."""
        if both and self._speaker.alone:
            show.text("there is no adapter here, only the base")
            return
        if text:
            self.messages.append({"role": "user", "content": text})
        asked = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not asked:
            show.text("say something first")
            return
        talk = self.messages[: asked[-1] + 1]
        if both:
            show.heading("base")
        reply = self._answered(talk, base=True)
        if both and reply is not None:
            show.heading("adapter")
            reply = self._answered(talk)
        if text:
            self._keep(reply if both or self._speaker.alone else None)

    def _save(self, name: str) -> None:
        """Add the conversation to a JSONL file: the one named, else the last one, else a new one."""
        if len(self.messages) == len(self._first):
            show.text("there is nothing to save yet")
            return
        path = Path(name).expanduser() if name else self._file or Path(time.strftime("chat-%Y%m%d-%H%M%S.jsonl"))
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            show.warning(f"{path} cannot be written: {error.strerror or error}")
            return
        self._file = path
        show.text(f"added to {path}  (a row of data.format messages: halfbyte data check {typed(path)} --model MODEL)")

    def _answered(self, messages: Messages, *, base: bool = False) -> str | None:
        """An answer, as far as it came where Ctrl-C has stopped it; None where there is none. The chat goes on."""
        from halfbyte.writing.text import Session

        session = self._sessions.setdefault(base, Session())
        try:
            left, context = self._left(messages)
            if context is not None and left < MIN_LEFT:
                used = context - left
                show.warning(
                    f"the context is full: {used:,} of {context:,} tokens are taken. /reset begins anew, after /save"
                )
                return None
            max_tokens = min(left, self._params.max_tokens)
            # so that no forward is torn, the first Ctrl-C ends the answer with the token under way
            with stop_on_signals(signals=(SIGINT,)) as stop:
                watch, params = TokenWatch(stop), replace(self._params, max_tokens=max_tokens)
                text = answer(self._speaker, messages, params, session, base=base, each=watch)
        except KeyboardInterrupt:
            show.text("\n(stopped)")
            return None
        except HalfbyteError as error:
            show.warning(f"{error}\n  or /reset")
            return None
        self._report(watch, left, context, max_tokens)
        return text or None if watch.stopped else text

    def _left(self, messages: Messages) -> tuple[int, int | None]:
        """Tokens that are left for an answer, and those of the context; without a limit as many as are asked for."""
        context = self._speaker.context
        if context is None:
            return self._params.max_tokens, None
        return context.left(len(self._speaker.ids(messages))), context.tokens

    def _report(self, watch: TokenWatch, left: int, context: int | None, max_tokens: int) -> None:
        """How long the answer was and how fast; and why it ends where that is not its own end."""
        if not watch.tokens:
            return
        ended = ""
        if watch.stopped:
            ended = "stopped; "
        elif watch.tokens >= max_tokens:
            full = context is not None and max_tokens == left
            ended = "the context is full, /reset begins anew; " if full else "cut, see --max-new-tokens; "
        taken = "" if context is None else f", {context - left + watch.tokens:,} of {context:,} of the context"
        speed = f", {watch.per_second:.1f} tokens/s" if watch.per_second else ""
        show.aside(f"({ended}{watch.tokens} tokens{speed}, the first after {watch.first_s:.1f} s{taken})")

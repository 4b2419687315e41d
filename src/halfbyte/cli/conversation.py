"""`halfbyte generate` and `halfbyte chat`: answers of the adapter or of the base alone, printed as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from halfbyte.cli import show
from halfbyte.errors import HalfbyteError

if TYPE_CHECKING:
    from halfbyte.inference.generate import Sampling
    from halfbyte.inference.load import Opened

    Messages = Sequence[dict[str, str]]

HELP = "/base  the same of the base alone    /reset  forget    /quit  leave"


def answer(opened: Opened, messages: Messages, sampling: Sampling, *, base: bool = False, silent: bool = False) -> str:
    """What the adapter says to a conversation, or the base alone; printed as it comes unless `silent`."""
    from halfbyte.inference import generate

    ids = generate.chat_ids(opened.tokenizer, messages)
    with opened.using(base=base):
        emit = None if silent else show.stream
        (text,) = generate.generate(opened.model, opened.tokenizer, [ids], sampling, emit=emit)
    if not silent:
        show.text("")
    return text


class Chat:
    """A conversation that grows line by line."""

    def __init__(self, opened: Opened, sampling: Sampling, system: str | None) -> None:
        self._opened, self._sampling = opened, sampling
        self._first = [{"role": "system", "content": system}] if system else []
        self.messages = list(self._first)

    def run(self) -> None:
        """Until the user leaves: /quit, Ctrl-D, or Ctrl-C at the prompt."""
        who = self._opened
        show.text(f"{who.recipe.model}{'' if who.alone else f' with the adapter of {who.run}'}\n{HELP}")
        ask = show.asker()
        while True:
            try:
                line = ask()
            except (EOFError, KeyboardInterrupt):
                show.text("")
                return
            if line in ("/quit", "/exit"):
                return
            self.say(line)

    def say(self, line: str) -> None:
        """Answer a line, or do what a command says."""
        if line == "/reset":
            self.messages = list(self._first)
        elif line == "/base":
            asked = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
            if asked:
                self._answered(self.messages[: asked[-1] + 1], base=True)
            else:
                show.text("say something first")
        elif line == "/help":
            show.text(HELP)
        elif line.startswith("/"):
            show.text(f"no such command {line}; there are /base, /reset, /quit")
        elif line:
            self.messages.append({"role": "user", "content": line})
            text = self._answered(self.messages)
            if text is None:
                self.messages.pop()
            else:
                self.messages.append({"role": "assistant", "content": text})

    def _answered(self, messages: Messages, *, base: bool = False) -> str | None:
        """An answer; None where Ctrl-C stops it, or where the conversation has grown too long. The chat goes on."""
        try:
            return answer(self._opened, messages, self._sampling, base=base)
        except KeyboardInterrupt:
            show.text("\n(stopped)")
        except HalfbyteError as error:
            show.warning(f"{error}\n  or /reset")
        return None

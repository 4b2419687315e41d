"""A Modelfile for Ollama: the model file, the chat template in Ollama's language, and what ends an answer.

Ollama's templates are Go's, a tokenizer's are Jinja's. What stands around each message is found by rendering messages
of known text; it goes into the Go template as quoted strings, which Go's white-space rules leave alone. A template that
is more than messages with something around each is refused.
Source: Ollama, parser/parser.go (commands, quotes of three) and template/template.go (.Messages, .Role, .Content).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from halfbyte.data.encoding.chatml import chat_template
from halfbyte.errors import ExportError
from halfbyte.inference.generate import end_of_turn_id
from halfbyte.recipe.schema import Recipe
from halfbyte.types import Tokenizer

_TEXTS = {"system": "Stext", "user": "Utext", "assistant": "Atext"}
Messages = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Around:
    """What stands before and after a message of each role; `head` before all where no system message comes first;
    `ask` before an answer."""

    before: dict[str, str]
    after: dict[str, str]
    head: str
    ask: str

    def render(self, turns: Messages) -> str:
        """The same as the Go template, in Python."""
        first = turns[0][0] == "system"
        return ("" if first else self.head) + "".join(self.before[r] + t + self.after[r] for r, t in turns) + self.ask

    def as_go(self) -> str:
        """Ollama's template."""
        branches = []
        for number, (role, before) in enumerate(self.before.items()):
            word = "if" if number == 0 else "else if"
            branches.append(
                f'{{{{- {word} eq .Role "{role}" }}}}{_quoted(before)}{{{{ .Content }}}}{_quoted(self.after[role])}'
            )
        head = _quoted(self.head)
        if head and "system" in self.before:
            head = f'{{{{- if ne (index .Messages 0).Role "system" }}}}{head}{{{{- end }}}}'
        return f"{head}{{{{- range .Messages }}}}{''.join(branches)}{{{{- end }}}}{{{{- end }}}}{_quoted(self.ask)}"


def _quoted(text: str) -> str:
    """As a string of Go's; Ollama drops from a Modelfile what is not printable."""
    quoted = "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in json.dumps(text, ensure_ascii=False))
    return f"{{{{- {quoted} }}}}" if text else ""


def write(path: Path, model: str, tokenizer: Tokenizer, recipe: Recipe, *, adapter: str | None = None) -> None:
    """Write a Modelfile. `model` is a file beside it, or an absolute path; `adapter` one beside it. Raises ExportError:
    there is no chat template, or one that cannot be put into Ollama's language."""
    template = chat_template(tokenizer, recipe.data)
    if not template:
        raise ExportError("the run has no chat template, so a Modelfile could not say how to talk to it.")
    go = around(tokenizer, template).as_go()
    if '"""' in go:
        raise ExportError('the chat template holds """, which a Modelfile cannot.')
    stops = [tokenizer.decode([i]) for i in sorted({tokenizer.eos_token_id, end_of_turn_id(tokenizer)} - {None})]
    if lost := [stop for stop in stops if not stop.isprintable() or '"""' in stop]:
        raise ExportError(f"answers end with {lost[0]!r}, which a Modelfile cannot hold.")
    origin = model if Path(model).is_absolute() else f"./{model}"
    lines = [f"FROM {origin}", *([f"ADAPTER ./{adapter}"] if adapter else []), f'TEMPLATE """{go}"""']
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]  # taken as it stands, without escapes
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def around(tokenizer: Tokenizer, template: str) -> Around:
    """What stands around messages; without the beginning-of-text token that llama.cpp puts before a text itself. Raises
    ExportError: the template does more than that."""
    plain = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token if plain[:1] == [tokenizer.bos_token_id] else None

    def render(*roles: str, ask: bool = False, texts: Messages = ()) -> str:
        talk = texts or [(role, _TEXTS[role]) for role in roles]
        text = str(
            tokenizer.apply_chat_template(
                [{"role": r, "content": t} for r, t in talk], tokenize=False, add_generation_prompt=ask,
                chat_template=template,
            )
        )  # fmt: skip
        return text.removeprefix(bos) if bos else text

    try:
        guess = _around_known_texts(render)
        talks: list[Messages] = [
            [("user", "one")], [("user", "one"), ("assistant", "two"), ("user", "three")],
            *([[("system", "zero"), ("user", "one")]] if "system" in guess.before else []),
        ]  # fmt: skip
        if all(guess.render(talk) == render(ask=True, texts=talk) for talk in talks):
            return guess
    except (ValueError, IndexError, KeyError, TypeError):
        pass
    raise ExportError(
        "the chat template does more than put something around each message, which a Modelfile cannot say here.",
        fix="write the Modelfile by hand: https://docs.ollama.com/modelfile",
    )


def _around_known_texts(render: Callable[..., str]) -> Around:
    """What stands around messages of known text. Raises an error of any kind where that cannot be told."""
    user = render("user")
    first, after_user = user.split(_TEXTS["user"])
    one, rest = render("user", "assistant", "user").split(_TEXTS["assistant"])
    after_assistant = render("user", "assistant").split(_TEXTS["assistant"])[1]
    before_assistant = one.split(_TEXTS["user"])[1][len(after_user) :]
    before_user = rest.split(_TEXTS["user"])[0][len(after_assistant) :]
    if not first.endswith(before_user):
        raise ValueError("messages differ by their place")
    without_system = Around(
        before={"user": before_user, "assistant": before_assistant},
        after={"user": after_user, "assistant": after_assistant},
        head=first.removesuffix(before_user),
        ask=render("user", ask=True)[len(user) :],
    )
    try:
        both = render("system", "user")
        before, rest = both.split(_TEXTS["system"])
        after = rest.split(_TEXTS["user"])[0]
    except Exception:  # a template may refuse a system message in its own words
        return without_system
    if not after.endswith(before_user):
        return without_system
    return replace(
        without_system,
        before={"system": before, **without_system.before},
        after={"system": after.removesuffix(before_user), **without_system.after},
    )

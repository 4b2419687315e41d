"""One family of errors. Each message says what is wrong, what was found, what is allowed, and what to do next.

Why: a user's mistake must never end in a traceback; `cli/main.py` prints `str(error)` and leaves with `exit_code`.
Cost: nothing heavy is imported here.
"""

import os
import re
import shlex
from collections.abc import Sequence

# Names of environment variables that hold a secret, and what tokens and passwords in an address look like.
_SECRET_NAME = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD)S?$", re.IGNORECASE)
_SECRET = re.compile(r"\b(hf_|sk-|ghp_|github_pat_|AKIA|xox[bp]-)[A-Za-z0-9_-]{12,}|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")
_SHORTEST_SECRET = 8


class HalfbyteError(Exception):
    """Base of every error that halfbyte raises on purpose. `message`: one or a few plain sentences: what, got, allowed.
    `fix`: the next command or change that helps; appended on a line of its own."""

    exit_code = 2

    def __init__(self, message: str, *, fix: str | None = None) -> None:
        self.message = message
        self.fix = fix
        super().__init__(message if fix is None else f"{message}\n  fix: {fix}")


class RecipeError(HalfbyteError):
    """A recipe, a `--set` or a command-line value that cannot be used. Holds every problem found."""

    def __init__(self, problems: str | Sequence[str], *, where: str | None = None, fix: str | None = None) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        head = "" if where is None else f"{where}: "
        if len(self.problems) == 1:
            text = head + self.problems[0]
        else:
            text = f"{head}{len(self.problems)} problems\n" + "\n".join(f"  - {p}" for p in self.problems)
        super().__init__(text, fix=fix)


class SourceError(HalfbyteError):
    """A model that cannot be found, fetched or read."""


class StoreError(HalfbyteError):
    """A store of a quantised base that cannot be built, found or trusted."""


class BaseModelError(HalfbyteError):
    """A base that could be read but not opened as asked (wrong bytes resident, wrong type, unsafe code)."""


class AdapterError(HalfbyteError):
    """LoRA settings that do not fit the model, or an adapter that does not fit its base."""


class DataError(HalfbyteError):
    """Training data that cannot be used: names file, line and field."""


class RunError(HalfbyteError):
    """A run folder that exists, is missing, is locked or is incomplete."""


class WorldError(HalfbyteError):
    """Processes of one run that do not belong together, or that nobody told of each other."""


class RankLost(WorldError):
    """Another process of the run has failed or is gone. `exit_code` is that of its failure."""

    def __init__(self, message: str, *, fix: str | None = None, exit_code: int = 1) -> None:
        super().__init__(message, fix=fix)
        self.exit_code = exit_code


class TrainError(HalfbyteError):
    """A run that started and failed (non-finite loss, disk full, adapter without a gradient)."""

    exit_code = 1


class RewardError(TrainError):
    """A reward that could not be had of some answers: it raised, took too long, or gave something else than numbers."""


class DiskFull(TrainError):
    """A write of a run that found no room: it can be tried again when there is some."""


class ExportError(HalfbyteError):
    """A run that cannot be written in another form, or whose written form does not say what was trained."""

    exit_code = 1


class Unforeseen(HalfbyteError):
    """A fault of halfbyte or of a library, not of the user; a page with the traceback was written."""

    exit_code = 1


def typed(value: object) -> str:
    """A path or another argument as it is typed in a shell, quoted where it must be; a path that would be an option
    (-a.yaml) as ./-a.yaml."""
    text = str(value)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def first_line(error: BaseException, limit: int = 300) -> str:
    """The first line of a library's own words, for a message of ours; the error's type where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0][:limit] if text else type(error).__name__


def without_secrets(text: str) -> str:
    """A text that may be shown or kept, without what looks like a token and without the values of secret variables."""
    values = (
        value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= _SHORTEST_SECRET
    )
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, "***")
    return _SECRET.sub(lambda match: (match[1] or "") + "***", text)

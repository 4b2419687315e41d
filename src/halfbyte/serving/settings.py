"""Where and for whom is served, and the socket for it: known before a model is opened. No torch."""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from halfbyte.errors import RecipeError, typed

LIBRARIES = ("starlette", "uvicorn", "sse_starlette", "prometheus_client", "llguidance")
KEY = "HALFBYTE_API_KEY"
SHORTEST_KEY = 16
LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Settings:
    """Args: answer_s: seconds of an answer. grace_s: seconds for what is being written when the server shall end.
    uploads: below it the application reads what is PUT, and bounds it."""

    host: str = "127.0.0.1"
    port: int = 8000
    hosts: frozenset[str] = frozenset()
    key: str | None = field(default=None, repr=False)
    answer_s: float = 600.0
    grace_s: float = 60.0
    body_bytes: int = 2_000_000
    uploads: str | None = None


def key_of(file: Path | None) -> str | None:
    """The key: of a file, else of HALFBYTE_API_KEY. Raises RecipeError: it cannot be read, or is too short."""
    if file is not None:
        try:
            key = file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is not ASCII"
            fix = None if file.exists() else f"openssl rand -hex 24 > {typed(file)}"
            raise RecipeError(f"--api-key-file {file} cannot be read: {why}.", fix=fix) from error
    else:
        key = os.environ.get(KEY, "").strip()
        if not key:
            return None
    if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable():
        raise RecipeError(f"the API key has to have {SHORTEST_KEY} printable characters.", fix="openssl rand -hex 24")
    return key


def bind(settings: Settings) -> socket.socket:
    """The socket, before a model is opened. Raises RecipeError: no key where one is needed, or the port is taken."""
    if settings.host not in LOCAL and settings.key is None:
        raise RecipeError(
            f"--host {settings.host} can be reached from other machines, and there is no API key.",
            fix=f"set {KEY}, or give --api-key-file FILE",
        )
    try:
        where = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(where[0], where[1])
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(where[4])
    except (OSError, OverflowError) as error:
        raise RecipeError(
            f"{settings.host}:{settings.port} cannot be used: {getattr(error, 'strerror', None) or error}.",
            fix=f"--port {settings.port + 1}",
        ) from error
    return sock


def check_installed(names: Sequence[str] = LIBRARIES) -> None:
    """Raises RecipeError: what of the extra is not installed."""
    if missing := [name for name in names if find_spec(name) is None]:
        raise RecipeError(
            f"serving needs {', '.join(missing)}, which is not here.", fix="pip install 'halfbyte[serve]'"
        )

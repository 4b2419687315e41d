"""The page of a run while it trains, on this machine alone: 127.0.0.1, and only under that name.

Why: a page of another site can make a browser ask 127.0.0.1 under a name of its own (DNS rebinding), so `Host` is
checked. It can only be read; nothing can be asked of the run.
Source: http.server of the standard library, one thread.
Cost: a page is made when it is asked for, at most a twentieth of the time.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

from halfbyte.errors import RunError
from halfbyte.report import page, record

REST = 20.0  # a page is made again after at least so many times as long as it took
MIN_REST_S = 2.0


class _PageCache:
    """The page as it was last made. One thread makes it; others get the last one."""

    def __init__(self, run: Path) -> None:
        self.run, self.text = run, page.render("waiting.html", (), live=True)
        self.due, self.lock = 0.0, threading.Lock()

    def now(self) -> str:
        if time.monotonic() >= self.due and self.lock.acquire(blocking=False):
            try:
                began = time.monotonic()
                self.text = page.html(record.read(self.run), live=True)
                took = time.monotonic() - began
                self.due = time.monotonic() + max(MIN_REST_S, REST * took)
            except RunError:  # there is no folder yet
                pass
            finally:
                self.lock.release()
        return self.text


class _Handler(BaseHTTPRequestHandler):
    pages: ClassVar[_PageCache]
    hosts: ClassVar[frozenset[str]] = frozenset()
    timeout = 10
    server_version, sys_version = "halfbyte", ""

    def do_GET(self) -> None:
        if self.headers.get("Host") not in self.hosts:
            self._answer(421, "this page is for 127.0.0.1 alone\n", "text/plain")
        elif self.path != "/":
            self._answer(404, "there is only /\n", "text/plain")
        else:
            try:
                self._answer(200, self.pages.now(), "text/html")
            except Exception as error:  # a page that cannot be made must not print a traceback into the run's output
                self._answer(500, f"the page cannot be made: {type(error).__name__}: {error}\n", "text/plain")

    def _answer(self, code: int, text: str, kind: str) -> None:
        body = text.encode()
        self.send_response(code)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the terminal is the run's."""


class _PageServer(ThreadingHTTPServer):
    daemon_threads, block_on_close = True, False

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing: a reader may go at any time."""


@contextmanager
def serve(run: Path, port: int = 0) -> Iterator[str]:
    """Serve the page of a run, which need not be there yet, until the block ends; yields its address. Raises RunError:
    the port is taken."""

    class OfRun(_Handler):
        pages = _PageCache(run)

    try:
        server = _PageServer(("127.0.0.1", port), OfRun)
    except OSError as error:
        raise RunError(f"port {port} of 127.0.0.1 cannot be used: {error.strerror}.", fix="leave --port out") from error
    port = server.server_address[1]
    OfRun.hosts = frozenset({f"127.0.0.1:{port}", f"localhost:{port}"})
    threading.Thread(target=server.serve_forever, name="halfbyte-live", daemon=True, args=(0.2,)).start()
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.shutdown()
        server.server_close()

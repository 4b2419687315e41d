"""`halfbyte studio`: a page from a file to an adapter, on this machine."""

import os
from dataclasses import replace
from pathlib import Path
from threading import Thread

from halfbyte.cli import show
from halfbyte.cli.options import AllowHost, Host, KeyFile, Port, Quiet, argument, option


def serve_studio(
    folder: Path = argument(Path(), "[FOLDER]", "Where files, recipes and runs are."),
    host: Host = "127.0.0.1",
    port: Port = 8765,
    bases: list[Path] = option([], "--bases", "Another folder with bases; repeatable.", metavar="DIR"),
    upload: float = option(2.0, "--upload", "GB of the largest file that is taken.", min=0.001),
    key_file: KeyFile = None,
    allow_host: AllowHost = [],  # noqa: B006
    quiet: Quiet = False,
) -> None:
    """A page on which a file becomes an adapter: rows, plan, training, scores, answers, export. It starts the commands
    that it shows, which go on without it."""
    from halfbyte.runs.folder import check_writable
    from halfbyte.serving import settings as where

    where.check_installed(("starlette", "uvicorn", "sse_starlette"))
    check_writable(folder, "halfbyte studio FOLDER, with one that can be written")
    hosts = frozenset(map(str.lower, allow_host))
    settings = where.Settings(host, port, hosts, where.key_of(key_file), grace_s=2.0, uploads="/api/data/")
    sock = where.bind(settings)
    import uvicorn

    from halfbyte.serving.http import pages
    from halfbyte.studio.app import Studio, application
    from halfbyte.studio.jobs import Jobs
    from halfbyte.studio.worker import Worker
    from halfbyte.studio.workspace import Workspace

    space = Workspace(folder.resolve(), tuple(path.resolve() for path in bases), int(upload * 1e9))
    folders = space.begin()
    key = os.environ[where.KEY] = settings.key or folders  # `serve` takes it from there
    studio = Studio(space, Jobs(space), Worker(space.folder))
    server = uvicorn.Server(pages.config(application(studio), replace(settings, key=key), "off"))
    Thread(target=studio.worker.run, args=("version",), daemon=True).start()  # its libraries, before they are needed
    address = f"http://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}/#key={key}"
    note = "" if quiet else "\n  who has this address can start runs as you; Ctrl-C ends the page, and runs go on"
    pages.run(server, sock, lambda: show.text(f"studio of {space.folder} at {address}{note}"))
    studio.worker.end()

"""Files that a browser gets: pages, scripts, style; under a policy that lets nothing from elsewhere in. No torch."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from starlette.requests import Request as Http
from starlette.responses import Response
from starlette.routing import Route

from halfbyte.web import files as web

TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
WEB = Path(__file__).parent / "web"
# of a server that answers, and of a studio that passes on what is asked
TALK = {"": WEB / "index.html", "page.js": WEB / "page.js"} | {n: web.FOLDER / n for n in ("parts.js", "style.css")}


def routes(files: Mapping[str, Path], below: str = "/", policy: str = POLICY) -> list[Route]:
    """A route for each file, by its name below a path."""
    return [Route(f"{below}{name}", partial(_file, path, policy)) for name, path in files.items()]


async def _file(path: Path, policy: str, http: Http) -> Response:
    headers = {"Content-Security-Policy": policy}
    return Response(path.read_bytes(), media_type=TYPES[path.suffix], headers=headers)

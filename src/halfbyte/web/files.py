"""The look of all pages, and where their files are: one stylesheet, one head, and parts that their scripts share.

What: `style.css` has the colours (light, dark, print) and every part; `page.html` is the template that each page
extends, with its head; `tip.js` reads values off a chart; `parts.js` is what a page that asks a server needs. A report
holds them in itself, a server gives them out.
"""

from functools import cache
from pathlib import Path

from jinja2 import ChainableUndefined, Environment, FileSystemLoader

FOLDER = Path(__file__).parent


def text(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


@cache
def templates(folder: Path) -> Environment:
    """The pages of a room, which may extend those of this one. What is put into them is escaped."""
    return Environment(
        loader=FileSystemLoader([folder, FOLDER]), autoescape=True, undefined=ChainableUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip


def content(path: Path) -> bytes:
    """A file as a server gives it out: a page with its head."""
    if path.suffix != ".html":
        return path.read_bytes()
    return templates(path.parent).get_template(path.name).render().encode()

"""The look of all pages, and where their files are: one stylesheet, and parts that their scripts share.

What: `style.css` has the colours (light, dark, print) and every part; `tip.js` reads values off a chart; `parts.js` is
what a page that asks a server needs. A report holds them in itself, a server gives them out.
"""

from pathlib import Path

FOLDER = Path(__file__).parent


def text(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")

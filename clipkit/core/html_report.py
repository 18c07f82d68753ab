"""Reports: one HTML file that holds its own pictures and refers to nothing outside itself."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from clipkit.core.figures import save_figure
from clipkit.core.files import atomic_write

__all__ = ["Report"]

STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --soft: #626a78; --line: #d9dde4; --card: #f6f7f9; --paper: #fff;
  --hit: #2a9d5c }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e7e9ee; --soft: #9aa3b2; --line: #363c47; --card: #22262e; --paper: #171a20 } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 62rem;
  margin: 2.5rem auto; padding: 0 1.25rem }
h1 { font-size: 1.7rem; margin: 0 0 .3rem } h2 { font-size: 1.2rem; margin: 2.4rem 0 .4rem }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; font-weight: 600 } p { margin: .3rem 0 .8rem; max-width: 46rem }
.soft { color: var(--soft) }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .6rem 0 1rem }
th, td { text-align: left; padding: .3rem 1.1rem .3rem 0; border-bottom: 1px solid var(--line) }
td + td, th + th { text-align: right; padding-right: 0; padding-left: 1.4rem }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(92px, 1fr)); gap: .6rem }
.sheet figure { margin: 0; background: var(--card); border-radius: 6px; padding: 6px; border: 2px solid transparent }
.sheet figure.hit { border-color: var(--hit) }
.sheet img { width: 100%; image-rendering: auto; border-radius: 3px; display: block }
.sheet figcaption { font-size: .72rem; line-height: 1.3; margin-top: .35rem; overflow-wrap: anywhere }
img.plot { max-width: 100%; background: #fff; border-radius: 6px }
.figures { display: flex; gap: .9rem; flex-wrap: wrap; margin: 1rem 0 }
.figures div { background: var(--card); border-radius: 8px; padding: .8rem 1.1rem; min-width: 9rem }
.figures b { display: block; font-size: 1.55rem; font-variant-numeric: tabular-nums }
table.words td + td, table.words th + th { text-align: left }
.words td { overflow-wrap: anywhere; vertical-align: top }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: .6rem }
.pairs figure { margin: 0; background: var(--card); border-radius: 6px; padding: 6px }
.pairs div { display: flex; gap: 6px } .pairs img { width: calc(50% - 3px); object-fit: contain; border-radius: 3px }
.pairs figcaption { font-size: .72rem; line-height: 1.3; margin-top: .35rem; overflow-wrap: anywhere }
pre { background: var(--card); padding: .8rem 1rem; border-radius: 6px; overflow-x: auto; font-size: .85rem }
"""


class Report:
    """Sections that are added one after another and written as one file."""

    def __init__(self, title: str, subtitle: str = ""):
        self.title = title
        self._parts = [f"<h1>{html.escape(title)}</h1>"]
        if subtitle:
            self._parts.append(f'<p class="soft">{html.escape(subtitle)}</p>')

    def heading(self, text: str, note: str = "") -> None:
        """Begin a section."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")
        if note:
            self.text(note)

    def subheading(self, text: str) -> None:
        self._parts.append(f"<h3>{html.escape(text)}</h3>")

    def text(self, text: str) -> None:
        """A paragraph."""
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def code(self, text: str) -> None:
        """Commands or other verbatim text."""
        self._parts.append(f"<pre>{html.escape(text)}</pre>")

    def figures(self, cards: Sequence[tuple[str, str, str]]) -> None:
        """Large numbers: what, value, and what to hold it against."""
        inside = "".join(
            f"<div>{html.escape(what)}<b>{html.escape(value)}</b><span class='soft'>{html.escape(beside)}</span></div>"
            for what, value, beside in cards
        )
        self._parts.append(f'<div class="figures">{inside}</div>')

    def table(self, rows: Sequence[Mapping[str, Any]], words: bool = False) -> None:
        """Rows with the same keys; `words` where the columns after the first hold no numbers."""
        style = ' class="words"' if words else ""
        head = "".join(f"<th>{html.escape(str(key))}</th>" for key in rows[0])
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(str(value))}</td>" for value in row.values()) + "</tr>" for row in rows
        )
        self._parts.append(f"<table{style}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")

    def plot(self, figure: Any, alt: str) -> None:
        """A matplotlib figure; it is closed."""
        buffer = io.BytesIO()
        save_figure(buffer, figure)
        self._parts.append(f'<img class="plot" alt="{html.escape(alt)}" src="{_data_url(buffer.getvalue(), "png")}">')

    def sheet(self, pictures: Sequence[tuple[Image.Image | Path, str, bool]], side: int = 128) -> None:
        """A contact sheet: pictures with what to say under each, and whether to frame it as a hit."""
        cells = []
        for picture, label, hit in pictures:
            mark = ' class="hit"' if hit else ""
            shown = html.escape(label)
            cells.append(
                f'<figure{mark}><img alt="{shown}" src="{_thumbnail(picture, side)}">'
                f"<figcaption>{shown}</figcaption></figure>"
            )
        self._parts.append(f'<div class="sheet">{"".join(cells)}</div>')

    def pairs(self, pairs: Sequence[tuple[Image.Image, Image.Image, str]], side: int = 128) -> None:
        """Two pictures beside each other with what to say under both."""
        cells = []
        for one, other, label in pairs:
            shown = html.escape(label)
            images = "".join(f'<img alt="{shown}" src="{_thumbnail(image, side)}">' for image in (one, other))
            cells.append(f"<figure><div>{images}</div><figcaption>{shown}</figcaption></figure>")
        self._parts.append(f'<div class="pairs">{"".join(cells)}</div>')

    def write(self, path: Path) -> None:
        """Write the page."""
        with atomic_write(path, "w") as handle:
            handle.write(
                '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
                '<meta name="viewport" content="width=device-width, initial-scale=1">'
                f'<link rel="icon" href="data:,"><title>{html.escape(self.title)}</title>'
                f"<style>{STYLE}</style></head>\n<body>\n"
            )
            handle.write("\n".join(self._parts))
            handle.write("\n</body></html>\n")


def _thumbnail(picture: Image.Image | Path, side: int) -> str:
    image = Image.open(picture) if isinstance(picture, Path) else picture
    image = image.convert("RGB")
    image.thumbnail((side, side))
    encoded = {}
    for kind in ("png", "jpeg"):  # the one is smaller for drawings, the other for photos
        buffer = io.BytesIO()
        image.save(buffer, kind, quality=85)
        encoded[kind] = buffer.getvalue()
    kind = min(encoded, key=lambda name: len(encoded[name]))
    return _data_url(encoded[kind], kind)


def _data_url(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"

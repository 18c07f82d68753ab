"""Reports: one HTML file that holds its own pictures and refers to nothing outside itself."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clipkit.artifact import atomic_write

__all__ = ["Report", "confusion_figure", "curve_figure", "histogram_figure", "sizes_figure", "whisker_figure"]

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
        from matplotlib import pyplot

        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
        pyplot.close(figure)
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
    found = {}
    for kind in ("png", "jpeg"):  # the one is smaller for drawings, the other for photos
        buffer = io.BytesIO()
        image.save(buffer, kind, quality=85)
        found[kind] = buffer.getvalue()
    kind = min(found, key=lambda name: len(found[name]))
    return _data_url(found[kind], kind)


def _data_url(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def save_figure(path: Path, figure: Any) -> None:
    """Write a matplotlib figure as PNG; it is closed."""
    from matplotlib import pyplot

    with atomic_write(path) as handle:
        figure.savefig(handle, format="png", dpi=130, bbox_inches="tight")
    pyplot.close(figure)


def _axes(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(width, height))
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def curve_figure(
    x: Sequence[float], y: Sequence[float], x_label: str, y_label: str, level: tuple[float, str] | None = None
) -> Any:
    """A line, and a dashed level with a name to hold it against."""
    figure, axes = _axes(7, 2.8)
    axes.plot(x, y, color="#2f6fde", linewidth=1.8)
    if level is not None:
        axes.axhline(level[0], color="#999", linestyle="--", linewidth=1)
        axes.annotate(
            level[1], (1, level[0]), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="#777"
        )
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_ylim(bottom=0)
    return figure


def histogram_figure(values: np.ndarray, x_label: str, y_label: str, mark: tuple[float, str] | None = None) -> Any:
    """How often values occur, in whole numbers, and a dashed line at one of them with its name."""
    figure, axes = _axes(7, 2.6)
    low, high = int(values.min()), int(values.max())
    step = max(1, -(-(high - low + 1) // 60))
    axes.hist(values, bins=np.arange(low, high + step + 1, step) - 0.5, color="#2f6fde")
    if mark is not None:
        axes.axvline(mark[0], color="#999", linestyle="--", linewidth=1)
        axes.annotate(
            f"{mark[1]} ", (mark[0], 0.97), xycoords=("data", "axes fraction"), ha="right", va="top", color="#777"
        )
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return figure


def tradeoff_figure(
    points: Sequence[tuple[str, float, float, bool]], x_label: str, y_label: str, level: tuple[float, str]
) -> Any:
    """Named points, x on a logarithmic scale, the chosen one filled; and a dashed level to reach."""
    figure, axes = _axes(7, 3.4)
    for name, x, y, chosen in points:
        axes.plot(x, y, "o", color="#2f6fde", markerfacecolor="#2f6fde" if chosen else "white", markersize=8)
        axes.annotate(name, (x, y), xytext=(8, -3), textcoords="offset points", weight="bold" if chosen else "normal")
    axes.set_xscale("log")
    axes.axhline(level[0], color="#999", linestyle="--", linewidth=1)
    axes.annotate(level[1], (0, level[0]), xycoords=("axes fraction", "data"), va="bottom", color="#777")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.margins(x=0.15)
    return figure


def whisker_figure(
    groups: Sequence[str],
    series: Mapping[str, Sequence[tuple[float, float, float] | None]],
    levels: Sequence[float | None],
    x_label: str,
) -> Any:
    """Bars side by side with an interval on each, a group below another; a tick where a level stands, such as chance.

    Args:
        groups: names, from the top.
        series: of each a value, low and high per group; None where there is none.
        levels: per group.
        x_label: of the values.
    """
    names, thick = list(series), 0.8 / max(len(series), 1)
    figure, axes = _axes(7.5, 0.9 + len(groups) * (0.16 + 0.2 * len(names)))
    colours = ["#2f6fde", "#e08a1e", "#2a9d5c", "#a14fc1", "#c8433d", "#5b6577"]
    for number, name in enumerate(names):
        told = [(at, each) for at, each in enumerate(series[name]) if each is not None]
        places = [at - 0.4 + thick * (number + 0.5) for at, _ in told]
        values = [value for _, (value, _, _) in told]
        ends = [[max(v - low, 0) for _, (v, low, _) in told], [max(high - v, 0) for _, (v, _, high) in told]]
        style: dict[str, Any] = {"color": colours[number % len(colours)], "ecolor": "#333", "capsize": 2.5}
        axes.barh(places, values, thick * 0.9, xerr=ends, label=name, error_kw={"linewidth": 1}, **style)
    for at, level in enumerate(levels):
        if level is not None:
            axes.plot([level, level], [at - 0.42, at + 0.42], color="#111", linestyle=":", linewidth=1.8, zorder=3)
    axes.set_yticks(range(len(groups)), groups)
    axes.set_ylim(len(groups) - 0.45, -0.55)
    axes.set_xlabel(x_label)
    axes.set_xlim(left=0)
    if len(names) > 1:
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, fontsize=8)
    return figure


def sizes_figure(widths: np.ndarray, heights: np.ndarray) -> Any:
    """Widths against heights in pixels, darker where there are more images."""
    figure, axes = _axes(4.6, 3.8)
    longest = float(max(widths.max(), heights.max()))
    cells = axes.hexbin(
        widths, heights, gridsize=36, extent=(0, longest, 0, longest), mincnt=1, bins="log", cmap="Blues"
    )
    cells.set_clim(vmin=0.5)
    axes.plot([0, longest], [0, longest], color="#999", linestyle="--", linewidth=1)
    axes.set_xlabel("width in pixels")
    axes.set_ylabel("height in pixels")
    axes.set_aspect("equal")
    return figure


def confusion_figure(counts: np.ndarray, names: Sequence[str], title: str) -> Any:
    """A confusion matrix: rows true, columns predicted, shares of the row as shade, counts as text."""
    side = max(3.2, 0.52 * len(names) + 1)
    figure, axes = _axes(side, side)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.argwhere(counts > 0):
        shade = "white" if share[row, column] > 0.55 else "#333"
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=shade, fontsize=8)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("said")
    axes.set_ylabel("shown")
    axes.set_title(title, fontsize=11)
    axes.spines[["bottom", "left"]].set_visible(False)
    return figure

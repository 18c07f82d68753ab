"""Figures for pages and files: curves, bars, heat maps, confusion matrices. Each function gives a matplotlib figure."""

import textwrap
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any

import numpy as np

from clipkit.core.files import atomic_write

__all__ = [
    "confusion_figure",
    "curve_figure",
    "heat_figure",
    "histogram_figure",
    "reliability_figure",
    "save_figure",
    "sizes_figure",
    "tradeoff_figure",
    "whisker_figure",
]


def save_figure(to: Path | IO[bytes], figure: Any) -> None:
    """Write a matplotlib figure as PNG; it is closed."""
    from matplotlib import pyplot

    with atomic_write(to) if isinstance(to, Path) else nullcontext(to) as handle:
        figure.savefig(handle, format="png", dpi=130, bbox_inches="tight")
    pyplot.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")  # needs no screen
    from matplotlib import pyplot

    return pyplot


def _axes(width: float, height: float) -> tuple[Any, Any]:
    figure, axes = _pyplot().subplots(figsize=(width, height))
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


def reliability_figure(curves: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray]]) -> Any:
    """Reliability diagrams beside each other: the share that is right against the probability, and how many are where.

    Args:
        curves: of each its name, and for each bin how many there are, their mean probability, and the share of right
            ones; NaN in empty bins.
    """
    figure, rows = _pyplot().subplots(
        2, len(curves), figsize=(3.5 * len(curves), 4.4), sharex=True, sharey="row", squeeze=False, height_ratios=[3, 1]
    )
    for (name, counts, probability, right), above, below in zip(curves, *rows, strict=True):
        met = counts > 0
        for axes in (above, below):
            axes.spines[["top", "right"]].set_visible(False)
        above.plot([0, 1], [0, 1], color="#999", linestyle="--", linewidth=1)
        above.vlines(probability[met], probability[met], right[met], color="#e0803a", linewidth=2, alpha=0.7)
        above.plot(probability[met], right[met], "o-", color="#2f6fde", markersize=5, linewidth=1.4)
        above.set_title(name, fontsize=11)
        above.set_xlim(0, 1)
        above.set_ylim(0, 1.02)
        width = 1 / len(counts)
        below.bar((np.arange(len(counts)) + 0.5) * width, counts, width=0.9 * width, color="#2f6fde")
        below.set_xlabel("probability")
    rows[0][0].set_ylabel("share that is right")
    rows[1][0].set_ylabel("examples")
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
        known = [(at, each) for at, each in enumerate(series[name]) if each is not None]
        places = [at - 0.4 + thick * (number + 0.5) for at, _ in known]
        values = [value for _, (value, _, _) in known]
        ends = [[max(v - low, 0) for _, (v, low, _) in known], [max(high - v, 0) for _, (v, _, high) in known]]
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


def heat_figure(
    image: np.ndarray,
    heats: np.ndarray,
    titles: Sequence[tuple[str, str]],
    ends: tuple[str, str],
    signed: bool,
    note: str,
) -> Any:
    """A picture, and beside it copies in grey under maps of heat, all in one scale of colours.

    The colours are told apart by the colour-blind; unsigned ones grow evenly in lightness (inferno, whose zero is
    dark), signed ones fade out towards zero.

    Args:
        image: uint8 ``[height, width, 3]``.
        heats: ``[n, height, width]``; NaN where there is nothing to be said, which is framed and dimmed.
        titles: of each map, in bold and plain.
        ends: what the ends of the scale mean.
        signed: whether values may be below zero.
        note: stands below.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    pyplot = _pyplot()
    figure, grid = _image_grid(len(heats) + 1, image.shape[0], image.shape[1])
    most = float(np.nanmax(np.abs(heats))) or 1.0
    colours = pyplot.get_cmap("RdBu_r" if signed else "inferno")
    scale = Normalize(-most if signed else 0.0, most)
    grey = np.repeat(image @ np.array([0.299, 0.587, 0.114]), 3).reshape(image.shape) / 255
    hidden = np.isnan(heats[0])
    seen = np.where(hidden[..., None], 0.35 * image / 255 + 0.65, image / 255)
    first, *others = grid.flat
    first.imshow(seen)
    _entitle(first, "the image", "pale: not seen by the model" if hidden.any() else "")
    for axes, heat, title in zip(others, heats, titles, strict=False):
        values = np.nan_to_num(heat)
        strength = np.abs(values) / most if signed else np.full_like(values, 0.7)
        strength[hidden] = 0
        backdrop = np.where(hidden[..., None], 0.35 * grey + 0.65, 0.3 + 0.7 * grey if signed else grey)
        axes.imshow(backdrop + strength[..., None] * (colours(scale(values))[..., :3] - backdrop))
        _entitle(axes, *title)
    bar = figure.colorbar(ScalarMappable(scale, colours), ax=grid, location="bottom", shrink=0.6, aspect=40, pad=0.02)
    bar.set_label(f"{ends[0]}  \N{LEFTWARDS ARROW}   \N{RIGHTWARDS ARROW}  {ends[1]}\n{note}", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return figure


def _image_grid(count: int, height: int, width: int) -> tuple[Any, Any]:
    """Panels without axes for so many images of a size in pixels."""
    columns = min(count, 4 if width <= 1.6 * height else 3)
    rows = -(-count // columns)
    panel = 3.0 if width >= height else 3.0 * max(0.6, width / height)
    figure, grid = _pyplot().subplots(
        rows,
        columns,
        figsize=(columns * panel, rows * (panel * height / width + 0.75) + 0.9),
        layout="constrained",
        squeeze=False,
    )
    for axes in grid.flat:
        axes.axis("off")
    return figure, grid


def _entitle(axes: Any, name: str, about: str) -> None:
    axes.set_title(f"{textwrap.fill(name, 34)}\n", fontsize=10, weight="bold")
    axes.text(0.5, 1.02, about, transform=axes.transAxes, ha="center", va="bottom", fontsize=9, color="#444")


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

"""Which patches of an image speak for a text, as numbers on a grid that is laid over the image."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from clipkit.core import BadSample, ClipkitError, Report, heat_figure, progress
from clipkit.images import decode, to_rgb
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.explain.attention import NoAttention, attention_relevance, patch_tokens
from clipkit.models.explain.relevance import cell_means, spread, windows
from clipkit.models.inference import evaluating
from clipkit.models.probability import probabilities

__all__ = ["HEATMAP_METHODS", "ExplainOptions", "Explanation", "check_texts", "explain"]

HEATMAP_METHODS = {
    "relevance": "gradient-weighted attention (Chefer, Gur, Wolf 2021)",
    "occlusion": "what the cosine loses when a part is hidden (Zeiler, Fergus 2014)",
}
CELLS = 16  # of a grid's short side, for towers without patches
LONG_SIDE = 560  # of the pictures in a figure, in pixels

Method = Literal["auto", "relevance", "occlusion"]


@dataclass(frozen=True)
class ExplainOptions:
    """How an image is explained, see `explain`."""

    method: Method = "auto"
    """One of `HEATMAP_METHODS`. ``auto`` is relevance where the image tower is a vision transformer whose attention can
    be read, and occlusion for the others."""
    contrast: bool = False
    """Explain the cosine less the mean of those with the other texts: what speaks for this one rather than for them."""
    window: int | None = None
    """Of occlusion, how many cells wide and high a hidden part is; a fifth of the grid, 2 at least, if None."""
    batch_size: int = 64
    """Of occlusion, images at a time."""


@dataclass(frozen=True)
class Explanation:
    """One image and what each part of it does for each of several texts."""

    image: Image.Image
    """Upright, RGB."""
    texts: Sequence[str]
    method: str
    """One of `HEATMAP_METHODS`."""
    contrast: bool
    """Whether the maps are of each text less the mean of the others."""
    cosines: Float[np.ndarray, " n"]
    """Between the whole image and each text, float64."""
    probabilities: Float[np.ndarray, " n"] | None
    """Of the texts among each other, or, of a model trained with a sigmoid loss, of each alone. None where a single
    text has nothing to be compared with."""
    maps: Float[np.ndarray, "n rows columns"]
    """Float64. Occlusion: what hiding a cell takes from the cosine, below 0 where the cosine rises. Relevance: never
    below 0, without a unit, comparable between the texts of one image."""
    boxes: Float[np.ndarray, "rows columns 4"]
    """Of the cells: left, top, right, bottom in pixels of `image`; beyond it where the tower sees padding."""
    seen: tuple[float, float, float, float]
    """What the tower sees of the image, likewise."""

    @property
    def signed(self) -> bool:
        """Whether a part may speak against a text."""
        return self.method == "occlusion"

    @property
    def source(self) -> str:
        """What the maps are, and whose idea that is."""
        return HEATMAP_METHODS[self.method] + (", each text less the mean of the others" if self.contrast else "")

    def heat(self, size: tuple[int, int]) -> Float[np.ndarray, "n height width"]:
        """The maps laid over the image at a size of one's own, width and height; NaN where the tower sees nothing."""
        scale = np.array(size) / self.image.size
        centres = (self.boxes[..., :2] + self.boxes[..., 2:]) / 2 * scale
        x, y = centres[0, :, 0], centres[:, 0, 1]
        heats = np.stack([spread(each, x, y, size) for each in self.maps])
        left, top = self.boxes[0, 0, :2] * scale
        right, bottom = self.boxes[-1, -1, 2:] * scale
        across, down = np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5
        heats[:, (down < top) | (down > bottom)] = np.nan
        heats[:, :, (across < left) | (across > right)] = np.nan
        return heats

    def figure(self) -> Any:
        """The image, and beside it one map for each text in one scale of colours; a matplotlib figure."""
        scale = LONG_SIDE / max(self.image.size)
        size = max(1, round(self.image.width * scale)), max(1, round(self.image.height * scale))
        titles = []
        for row in self.rows():
            share = "" if row["probability"] is None else f", probability {row['probability']:.1%}"
            titles.append((row["text"], f"cosine {row['cosine']:.3f}{share}"))
        ends = ("speaks against", "speaks for the text") if self.signed else ("matters little", "matters most")
        shown = self.image.resize(size, Image.Resampling.LANCZOS)
        return heat_figure(np.asarray(shown), self.heat(size), titles, ends, self.signed, self.source)

    def write_page(self, path: Path, about: str) -> None:
        """Write a self-contained page with the figure.

        Args:
            path: of the page.
            about: image and model in a line.
        """
        page = Report("Explained", about)
        page.text(f"How to read it: {self.source}.")
        page.plot(self.figure(), "the image, and a heat map over it for each text")
        page.heading("How near each text is to the whole image")
        page.table(
            [
                {"text": row["text"], "cosine": f"{row['cosine']:.4f}"}
                | ({} if row["probability"] is None else {"probability": f"{row['probability']:.1%}"})
                for row in self.rows()
            ]
        )
        page.write(path)

    def rows(self) -> list[dict[str, Any]]:
        """For each text: ``text``, ``cosine``, ``probability``, and ``map`` as a list of rows."""
        shares = [None] * len(self.texts) if self.probabilities is None else self.probabilities.tolist()
        values = zip(self.texts, self.cosines.tolist(), shares, self.maps.tolist(), strict=True)
        return [dict(zip(("text", "cosine", "probability", "map"), each, strict=True)) for each in values]

    def as_json(self) -> dict[str, Any]:
        """All of it in plain numbers."""
        return {
            "width": self.image.width,
            "height": self.image.height,
            "method": self.method,
            "source": self.source,
            "contrast": self.contrast,
            "seen": list(self.seen),
            "boxes": self.boxes.tolist(),
            "texts": self.rows(),
        }


def explain(
    image: Image.Image | bytes | str | Path,
    texts: Sequence[str],
    model: DualEncoder,
    options: ExplainOptions | None = None,
    *,
    show: str | None = None,
) -> Explanation:
    """Say which parts of an image speak for each of several texts.

    >>> found = explain("photo.jpg", ["a dog", "a red car"], model)  # doctest: +SKIP
    >>> found.maps.shape                                             # doctest: +SKIP
    (2, 7, 7)

    Args:
        image: a path, bytes or a Pillow image.
        texts: as they are; no template is put around them.
        model: in float32, best; it is left as it was.
        options: how; those of `ExplainOptions` when not given.
        show: of occlusion, the name of a progress bar.

    Raises:
        ClipkitError: where there is no text, or one is empty or stands twice; where the image cannot be read; for a
            tower that the method does not fit.
    """
    options = options or ExplainOptions()
    check_texts(texts, contrast=options.contrast)
    _check_method(options.method, options.window)
    shown = _opened(image, model.preprocess.background)
    pixels = torch.from_numpy(model.preprocess(shown))[None].to(model.device)
    vectors = torch.from_numpy(model.embed_texts(texts)).to(model.device)
    targets = vectors
    if options.contrast:
        targets = vectors - (vectors.sum(0) - vectors) / (len(texts) - 1)
    with evaluating(model):
        with torch.inference_mode():
            cosines = (model.encode_image(pixels) @ vectors.T)[0].double().cpu().numpy()
        maps = None if options.method == "occlusion" else _relevance(model, pixels, targets, options.method)
        method = "occlusion" if maps is None else "relevance"
        rows, columns = _edges(model, pixels)
        if maps is None:
            maps = _occluded(model, pixels, targets, (rows, columns), options, show)
    shares = None
    bias = None if model.logit_bias is None else float(model.logit_bias.detach())
    if len(texts) > 1 or bias is not None:
        shares = probabilities(cosines[None], float(model.logit_scale.detach().exp()), bias)[0]
    seen = model.preprocess.seen(*shown.size)
    boxes = _boxes(rows, columns, pixels.shape[-2:], seen)
    return Explanation(shown, list(texts), method, options.contrast, cosines, shares, maps, boxes, seen)


def _relevance(model: DualEncoder, pixels: Tensor, targets: Tensor, method: Method) -> np.ndarray | None:
    """None where the tower's attention cannot be read and another method may be taken."""
    try:
        return attention_relevance(model, pixels, targets).double().cpu().numpy()
    except NoAttention:
        if method == "relevance":
            raise
        return None


def check_texts(texts: Sequence[str], *, contrast: bool = False) -> None:
    """Refuse texts that nothing can be explained by; see `explain`."""
    if not texts:
        raise ClipkitError('name a text to explain the image by: clipkit explain IMAGE "a red car"')
    for at, text in enumerate(texts):
        if not text.strip():
            raise ClipkitError(f"text {at + 1} is empty; say what to look for")
        if text in texts[:at]:
            raise ClipkitError(f"the text {text!r} stands twice")
    if contrast and len(texts) < 2:
        raise ClipkitError("--contrast holds texts against each other; give two at least")


def _check_method(method: str, window: int | None) -> None:
    if method not in ("auto", *HEATMAP_METHODS):
        raise ClipkitError(f"no method {method!r}; there are auto, {', '.join(HEATMAP_METHODS)}")
    if window is not None and method != "occlusion":
        raise ClipkitError("--window is of --method occlusion; name that too")
    if window is not None and window < 1:
        raise ClipkitError(f"--window is a number of cells, 1 at least, got {window}")


def _opened(image: Image.Image | bytes | str | Path, background: tuple[int, int, int]) -> Image.Image:
    if isinstance(image, Image.Image):
        return to_rgb(image, background)
    name = "" if isinstance(image, bytes) else f"{image}: "
    if not isinstance(image, bytes) and not Path(image).is_file():
        raise ClipkitError(f"no such image: {image}")
    try:
        return decode(Path(image) if isinstance(image, str) else image, background)
    except BadSample as error:
        raise ClipkitError(f"{name}{error}") from error


def _edges(model: DualEncoder, pixels: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Where the grid's rows and columns begin and end, in the tower's pixels: at its patches, where it has any."""
    height, width = pixels.shape[-2:]
    try:
        down, across = patch_tokens(model).patch
    except NoAttention:
        short = min(height, width)
        rows, columns = (min(length, round(CELLS * length / short)) for length in (height, width))
        return (np.round(np.linspace(0, n, cells + 1)).astype(int) for n, cells in ((height, rows), (width, columns)))  # type: ignore[return-value]
    return np.arange(height // down + 1) * down, np.arange(width // across + 1) * across


@torch.inference_mode()
def _occluded(
    model: DualEncoder,
    pixels: Tensor,
    targets: Tensor,
    grid: tuple[np.ndarray, np.ndarray],
    options: ExplainOptions,
    show: str | None,
) -> np.ndarray:
    """What hiding each cell takes from the score: the mean over the windows that hide it."""
    (rows, columns), window, batch_size = grid, options.window, options.batch_size
    height, width = len(rows) - 1, len(columns) - 1
    short = min(height, width)
    # One patch is too little: what shows in several loses nothing by it.
    side = window or max(1, min(short - 1, max(2, round(short / 5))))
    if side > short:
        raise ClipkitError(f"--window {side} hides everything: the grid has {height} x {width} cells")
    boxes = windows(height, width, side)
    # The mean of what the model was trained on: after normalising it is 0, which says least.
    grey = (torch.tensor(model.preprocess.mean) * 255).round().to(pixels).view(3, 1, 1)
    whole = model.encode_image(pixels) @ targets.T
    drops = []
    starts = range(0, len(boxes), batch_size)
    for start in starts if show is None else progress(starts, show, unit="batches"):
        batch = boxes[start : start + batch_size]
        hidden = pixels.repeat(len(batch), 1, 1, 1)
        for each, (top, bottom, left, right) in zip(hidden, batch, strict=True):
            each[:, rows[top] : rows[bottom], columns[left] : columns[right]] = grey
        drops.append(whole - model.encode_image(hidden) @ targets.T)
    return cell_means(torch.cat(drops).T.double().cpu().numpy(), boxes, height, width)


def _boxes(
    rows: np.ndarray, columns: np.ndarray, size: Sequence[int], seen: tuple[float, float, float, float]
) -> np.ndarray:
    left, top, right, bottom = seen
    x = left + columns / size[1] * (right - left)
    y = top + rows / size[0] * (bottom - top)
    lefts, tops = np.meshgrid(x[:-1], y[:-1])
    rights, bottoms = np.meshgrid(x[1:], y[1:])
    return np.stack([lefts, tops, rights, bottoms], axis=-1)

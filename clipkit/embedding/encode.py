"""From samples to embeddings in memory: images decoded while the towers work, in batches that are stated."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from clipkit.core import progress
from clipkit.data.sources import Source
from clipkit.embedding.loading import Loaded, load_samples
from clipkit.embedding.options import EncodeOptions
from clipkit.embedding.store import Embedded
from clipkit.embedding.update import KnownSample
from clipkit.models import DualEncoder, evaluating, in_blocks

__all__ = ["Encoder", "embed_source"]


def embed_source(
    source: Source,
    model: DualEncoder,
    options: EncodeOptions | None = None,
    *,
    rows: range | None = None,
    known: Mapping[int, KnownSample] | None = None,
    show: str | None = "embed",
) -> Embedded:
    """Embed samples of a source, decoding in threads or processes while the towers work.

    Args:
        source: see `clipkit.data.sources.open_source`.
        model: in the precision that is wanted.
        options: how; those of `EncodeOptions` when not given.
        rows: which samples; all of them when not given.
        known: what is known of rows from before, see `clipkit.embedding.update`: their images are not read, nor are
            they encoded, nor captions that there were before. The others of the rows go into batches together.
        show: title of the progress bar; None for no bar.
    """
    return Encoder(model, options or EncodeOptions()).embed(source, rows, known, show)


class Encoder:
    """A model that embeds samples, with the options for it.

    Args:
        model: in the precision that is wanted.
        options: how.
        encode_image: in place of the model's own, such as `clipkit.models.compiled_image_tower`.
    """

    def __init__(
        self,
        model: DualEncoder,
        options: EncodeOptions,
        encode_image: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        self.model, self.options = model, options
        self._encode_image = encode_image or model.encode_image
        self._block = model.image_block(options.batch_size)

    def embed(
        self,
        source: Source,
        rows: range | None = None,
        known: Mapping[int, KnownSample] | None = None,
        show: str | None = "embed",
    ) -> Embedded:
        """As `embed_source`."""
        rows = range(len(source)) if rows is None else rows
        known = known or {}
        batch_size = self.options.batch_size
        gathered = _Gathered(self, source)
        samples = load_samples(source, self.model, self.options, rows, known)
        with torch.inference_mode(), evaluating(self.model):
            for loaded in progress(samples, show, len(rows), "samples") if show else samples:
                gathered.add(loaded, known.get(loaded.row))
                if known:  # batches of the rows between would be small where most is known already
                    full = gathered.images.waiting == batch_size
                else:
                    full = (loaded.row + 1 - rows.start) % batch_size == 0
                if full or loaded.row == rows[-1]:
                    gathered.images.flush()
            return gathered.embedded()

    def image_vectors(self, pixels: list[Any]) -> np.ndarray:
        """Embeddings of a batch of images, float32 ``[n, dim]``."""
        return in_blocks(self._encode_image, _stacked(pixels, self.model.device), self._block).cpu().numpy()


def _stacked(pixels: list[Any], device: torch.device) -> torch.Tensor:
    if all(isinstance(each, np.ndarray) for each in pixels):
        return torch.from_numpy(np.stack(pixels)).to(device)
    return torch.stack([torch.as_tensor(each).to(device) for each in pixels])  # some were decoded there


class _Gathered:
    """What becomes of the samples of a source, in order."""

    def __init__(self, encoder: Encoder, source: Source):
        self._encoder, self._source = encoder, source
        self._result = Embedded.empty(encoder.model.embed_dim)
        self._image_of_text: list[int] = []
        self._known_texts: dict[int, np.ndarray] = {}
        self.images = _Images(encoder.model.embed_dim, encoder.image_vectors)

    def add(self, loaded: Loaded, known: KnownSample | None) -> None:
        row, sample, pixels, reason, unread = loaded
        result = self._result
        if sample is None:
            result.left_out.append({"row": row, "key": self._source.key(row), "reason": reason})
            result.unread += [row] if unread else []
            return
        if "text" in self._encoder.options.sides:
            self._add_captions(sample.captions, known)
        result.samples.append(sample)
        result.rows.append(row)
        if pixels is not None:
            self.images.add(pixels)
        elif known is not None and known.image is not None:
            self.images.add_known(known.image)

    def _add_captions(self, captions: Sequence[str], known: KnownSample | None) -> None:
        """Captions of the image that comes next."""
        vectors = [None] * len(captions) if known is None else known.text_vectors(captions)
        for caption, vector in zip(captions, vectors, strict=True):
            if vector is not None:
                self._known_texts[len(self._result.captions)] = vector
            self._image_of_text.append(len(self._result.samples))
            self._result.captions.append(caption)

    def embedded(self) -> Embedded:
        """Everything, with the texts encoded."""
        result, model = self._result, self._encoder.model
        new = [at for at in range(len(result.captions)) if at not in self._known_texts]
        result.text = np.empty((len(result.captions), model.embed_dim), np.float32)
        texts = [result.captions[at] for at in new]
        result.text[new] = model.embed_texts(texts, 4 * self._encoder.options.batch_size)
        for at, vector in self._known_texts.items():
            result.text[at] = vector
        result.image = self.images.vectors()
        result.image_of_text = np.array(self._image_of_text, np.int64)
        return result


class _Images:
    """Embeddings of images in order: a batch at a time, or known already."""

    def __init__(self, dim: int, encode: Callable[[list[Any]], np.ndarray]):
        self._encode = encode
        self._batch: list[Any] = []
        self._encoded = [np.zeros((0, dim), np.float32)]
        self._known: list[np.ndarray] = []
        self._places: tuple[list[int], list[int]] = ([], [])  # of those that are encoded, and of those that are known
        self._count = 0

    @property
    def waiting(self) -> int:
        return len(self._batch)

    def add(self, pixels: Any) -> None:
        self._batch.append(pixels)
        self._places[0].append(self._count)
        self._count += 1

    def add_known(self, vector: np.ndarray) -> None:
        self._known.append(vector)
        self._places[1].append(self._count)
        self._count += 1

    def flush(self) -> None:
        if self._batch:
            self._encoded.append(self._encode(self._batch))
            self._batch = []

    def vectors(self) -> np.ndarray:
        encoded = np.concatenate(self._encoded)
        if not self._known:
            return encoded
        vectors = np.empty((self._count, encoded.shape[1]), np.float32)
        vectors[self._places[0]], vectors[self._places[1]] = encoded, np.stack(self._known)
        return vectors

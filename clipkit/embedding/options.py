"""How samples are embedded: what can be chosen for one pass in memory, and for an artifact."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from clipkit.core import Side

if TYPE_CHECKING:
    from clipkit.images import Decoding

__all__ = ["EmbedOptions", "EncodeOptions"]


@dataclass(frozen=True)
class EncodeOptions:
    """How a model embeds samples of a source in memory."""

    sides: Sequence[Side] = ("image", "text")
    """Images, texts or both. A sample whose image is unusable is left out of both."""
    batch_size: int = 64
    """Images at a time, those of so many rows: an image that cannot be used shifts no other into another batch. They
    are encoded in blocks of one height (see `DualEncoder.image_block`), so an image's embedding is the same whichever
    others are embedded with it."""
    decoding: "Decoding" = "exact"
    """Of the images, see `clipkit.images.model_input`."""
    threads: int | None = None
    """That decode; 0 for none beside the calling one; None for as many as this process's share of the cores."""
    workers: int | None = None
    """Processes that decode in place of threads; 0 for none. With None there are none where that share is a few cores,
    or there are few samples, or they are fetched from elsewhere, or a GPU decodes; else one per core but two, as in one
    process Python lets threads compute one at a time between what the decoders do. Fewer where shared memory has no
    room for what they hand over."""


@dataclass(frozen=True)
class EmbedOptions:
    """How an embeddings artifact is made, see `clipkit.embedding.embed`."""

    sides: Sequence[Side] = ("image", "text")
    """Images, captions or both."""
    precision: str = "auto"
    """Of the towers, see `clipkit.models.cast_for_inference`."""
    part_size: int = 10_000
    """Samples per part, which is what a kill can cost."""
    batch_size: int | None = None
    """See `EncodeOptions`; None to find a good one, which is done once: whoever goes on with an unfinished folder, on
    whatever machine, takes the same, so that the bits are the same."""
    decoding: "Decoding" = "fast"
    """See `EncodeOptions`, as for the two below."""
    threads: int | None = None
    workers: int | None = None
    compile: bool | None = None
    """The image tower, see `clipkit.models.compiled_image_tower`; the last bits of the vectors are others. None to find
    out once whether that pays."""
    overwrite: bool = False
    """Replace what is there."""
    update: bool = False
    """Bring embeddings of other input up to date. They stay as they are until the new ones are whole, which are made
    beside them."""

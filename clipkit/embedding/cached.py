"""Embeddings that are computed once: what the cache holds is not read, decoded or encoded again.

Images go block by block the same way: look up what is known, embed what is missing, keep that, join the blocks. Where
nothing is missing, neither torch nor the model is loaded: `embedding.encode` is imported for what is to be embedded.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from clipkit.core import BadSample, ClipkitError, UnreadSample, __version__, progress
from clipkit.data.sources import Sample, Source
from clipkit.embedding.options import EncodeOptions
from clipkit.embedding.store import Embedded
from clipkit.embedding.update import KnownSample
from clipkit.models import LazyModel
from clipkit.storage import Cache, Entry, hash_of

__all__ = ["cached_images", "cached_texts"]

BATCHES = 16  # between two times that something is kept, which is what an interruption can cost
NO_TEXTS = np.zeros((0, 0), np.float32)


def cached_images(
    source: Source,
    model: LazyModel,
    cache: Cache,
    options: EncodeOptions | None = None,
    *,
    rows: range | None = None,
    show: str | None = None,
) -> Embedded:
    """Embed the images of a source, or take them from the cache: by path, size and time, or the source's own stamp.

    The model is not loaded where the cache holds them all. Interrupted, nearly all that was done is kept; batches are
    what they would have been, so the bits are the same. Images that cannot be decoded are kept as such; those that
    cannot be read are tried again, as are those whose words are at fault, of which an image's stamp tells nothing.

    Args:
        source: see `clipkit.data.sources.open_source`.
        model: of which the image tower is asked.
        cache: where they are kept.
        options: how, but for `sides`, which are images alone; decoded fast when not given.
        rows: which samples; all of them when not given.
        show: title of a progress bar.

    Returns:
        Images without texts; the samples have their captions.
    """
    options = replace(options or EncodeOptions(decoding="fast"), sides=("image",))
    rows = range(len(source)) if rows is None else rows
    step = BATCHES * options.batch_size
    blocks = [range(start, min(start + step, rows.stop)) for start in range(rows.start, rows.stop, step)]
    bar = show if len(blocks) == 1 else None
    shown = progress(blocks, show, len(blocks), "blocks") if show and len(blocks) > 1 else blocks
    return _joined([_cached_block(source, block, model, cache, options, bar) for block in shown], model.facts.dim)


def cached_texts(texts: Sequence[str], model: LazyModel, cache: Cache, batch_size: int = 256) -> np.ndarray:
    """Embed texts, or take them from the cache; float32 ``[n, dim]``, unit norm. Each is encoded once."""
    facts = model.facts
    of_model = ("text", __version__, facts.fingerprint, facts.precision)
    keys = [hash_of(*of_model, text) for text in texts]
    vectors = {key: entry.vector for key, entry in cache.entries(list(dict.fromkeys(keys))).items()}
    missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in vectors}
    if missing:
        for key, vector in zip(missing, model.towers.embed_texts(list(missing.values()), batch_size), strict=True):
            vectors[key] = vector
        cache.keep((key, Entry(vectors[key])) for key in missing)
    joined = np.empty((len(texts), facts.dim), np.float32)
    for at, key in enumerate(keys):
        joined[at] = vectors[key]
    return joined


def _cached_block(
    source: Source, rows: range, model: LazyModel, cache: Cache, options: EncodeOptions, bar: str | None
) -> Embedded:
    keys = _keys(source, rows, model, options)
    entries = cache.entries(list(keys.values()))
    known = {row: entries[key] for row, key in keys.items() if key in entries}
    if len(known) == len(rows):
        return _all_known(source, known, model.facts.dim)
    embedded = _embed_missing(source, rows, model, options, known, bar)
    new = {row: Entry(vector) for row, vector in zip(embedded.rows, embedded.image, strict=True)}
    new |= _unusable(source, embedded)
    cache.keep((keys[row], entry) for row, entry in new.items() if row in keys and row not in known)
    return embedded


def _keys(source: Source, rows: range, model: LazyModel, options: EncodeOptions) -> dict[int, bytes]:
    """Under what each row's image is kept; without those that have no stamp."""
    facts = model.facts
    # The stamps of a source are of names within it.
    where = source.spec if "://" in source.spec else str(Path(source.spec).resolve())
    # Another version may decode otherwise. Entries under "image" hold faults of words, too, and are of no use.
    of_model = ("image alone", __version__, facts.fingerprint, facts.precision, options.decoding, where)
    stamps = {row: source.stamp(row).image for row in rows}
    return {row: hash_of(*of_model, stamp) for row, stamp in stamps.items() if stamp is not None}


def _embed_missing(
    source: Source,
    rows: range,
    model: LazyModel,
    options: EncodeOptions,
    entries: dict[int, Entry],
    bar: str | None,
) -> Embedded:
    """All the rows; of those that have an entry nothing is read but the words."""
    from clipkit.embedding.encode import embed_source  # with torch, which takes seconds

    known = {row: KnownSample(entry.reason, entry.vector, (), NO_TEXTS) for row, entry in entries.items()}
    return embed_source(source, model.towers, options, rows=rows, known=known, show=bar)


def _unusable(source: Source, embedded: Embedded) -> dict[int, Entry]:
    """What is kept of images that cannot be decoded, by row: why."""
    unread = set(embedded.unread)
    return {
        line["row"]: Entry(None, line["reason"])
        for line in embedded.left_out
        if line["row"] not in unread and _words_are_sound(source, line["row"])
    }


def _words_are_sound(source: Source, row: int) -> bool:
    """Whether it is the image's own fault that a sample cannot be used; asked of few, as it reads the words again."""
    try:
        source.without_image(row)
    except ClipkitError:
        return False
    return True


def _all_known(source: Source, entries: dict[int, Entry], dim: int) -> Embedded:
    """What `embed_source` gives where every row has an entry, without importing it."""
    embedded, vectors = Embedded.empty(dim), []
    for row, (vector, reason) in entries.items():
        try:
            sample = source.without_image(row) if vector is not None else None
        except BadSample as error:
            sample, reason = None, str(error)
            embedded.unread += [row] if isinstance(error, UnreadSample) else []
        if sample is None or vector is None:
            embedded.left_out.append({"row": row, "key": source.key(row), "reason": reason})
            continue
        embedded.samples.append(Sample(sample.key, None, sample.extension, sample.captions, sample.columns))
        embedded.rows.append(row)
        vectors.append(vector)
    if vectors:
        embedded.image = np.stack(vectors)
    return embedded


def _joined(blocks: Sequence[Embedded], dim: int) -> Embedded:
    joined = Embedded.empty(dim)
    joined.image = np.concatenate([joined.image, *(block.image for block in blocks)])
    for block in blocks:
        joined.samples += block.samples
        joined.rows += block.rows
        joined.left_out += block.left_out
        joined.unread += block.unread
    return joined

"""Embeddings that are computed once: what the cache holds is not read, decoded or encoded again."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from clipkit.core import BadSample, ClipkitError, UnreadSample, __version__, progress
from clipkit.data.sources import Sample, Source
from clipkit.embedding.store import Embedded
from clipkit.embedding.update import Kept
from clipkit.models import LazyModel
from clipkit.storage import Cache, Entry, entry_key

__all__ = ["cached_images", "cached_texts"]

BATCHES = 16  # between two times that something is kept, which is what an interruption can cost
NO_TEXTS = np.zeros((0, 0), np.float32)


def cached_images(
    source: Source,
    model: LazyModel,
    cache: Cache,
    *,
    rows: range | None = None,
    batch_size: int = 64,
    threads: int | None = None,
    show: str | None = None,
    decoding: str = "fast",
) -> Embedded:
    """Embed the images of a source, or take them from the cache: by path, size and time, or the source's own stamp.

    The model is not loaded where the cache holds them all. Interrupted, nearly all that was done is kept; batches are
    what they would have been, so the bits are the same. Images that cannot be decoded are kept as such; those that
    cannot be read are tried again, as are those whose words are at fault, of which an image's stamp tells nothing.

    Args:
        source: see `clipkit.data.sources.open_source`.
        model: of which the image tower is asked.
        cache: where they are kept.
        rows: which samples; all of them when not given.
        batch_size, threads, decoding: see `clipkit.embedding.embed_source`.
        show: title of a progress bar.

    Returns:
        Images without texts; the samples have their captions.
    """
    rows = range(len(source)) if rows is None else rows
    step = BATCHES * batch_size
    starts = range(rows.start, rows.stop, step)
    parts = []
    for start in progress(starts, show, len(starts), "blocks") if show and len(starts) > 1 else starts:
        some = range(start, min(start + step, rows.stop))
        keys = _keys(source, some, model, decoding)
        entries = cache.entries(list(keys.values()))
        known = {row: entries[key] for row, key in keys.items() if key in entries}
        if len(known) == len(some):
            part = _known(source, known, model.facts.dim)
        else:
            from clipkit.embedding.encode import embed_source

            kept = {row: Kept(entry.reason, entry.vector, (), NO_TEXTS) for row, entry in known.items()}
            how = {"sides": ["image"], "rows": some, "kept": kept, "batch_size": batch_size, "threads": threads}
            bar = show if len(starts) == 1 else None
            part = embed_source(source, model.towers, show=bar, decoding=decoding, **how)  # type: ignore[arg-type]
            new = {row: Entry(vector) for row, vector in zip(part.rows, part.image, strict=True)}
            unread = set(part.unread)
            new |= {
                at["row"]: Entry(None, at["reason"])
                for at in part.left_out
                if at["row"] not in unread and _words_are_sound(source, at["row"])
            }
            cache.keep((keys[row], entry) for row, entry in new.items() if row in keys and row not in known)
        parts.append(part)
    return _joined(parts, model.facts.dim)


def cached_texts(texts: Sequence[str], model: LazyModel, cache: Cache, batch_size: int = 256) -> np.ndarray:
    """Embed texts, or take them from the cache; float32 ``[n, dim]``, unit norm. Each is encoded once."""
    facts = model.facts
    of_model = ("text", __version__, facts.fingerprint, facts.precision)
    keys = [entry_key(*of_model, text) for text in texts]
    vectors = {key: entry.vector for key, entry in cache.entries(list(dict.fromkeys(keys))).items()}
    missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in vectors}
    if missing:
        for key, vector in zip(missing, model.towers.embed_texts(list(missing.values()), batch_size), strict=True):
            vectors[key] = vector
        cache.keep((key, Entry(vectors[key])) for key in missing)
    found = np.empty((len(texts), facts.dim), np.float32)
    for at, key in enumerate(keys):
        found[at] = vectors[key]
    return found


def _keys(source: Source, rows: range, model: LazyModel, decoding: str) -> dict[int, bytes]:
    facts = model.facts
    # The stamps of a source are of names within it.
    where = source.spec if "://" in source.spec else str(Path(source.spec).resolve())
    # Another version may decode otherwise. Entries under "image" hold faults of words, too, and are of no use.
    of_model = ("image alone", __version__, facts.fingerprint, facts.precision, decoding, where)
    stamps = {row: source.stamp(row).image for row in rows}
    return {row: entry_key(*of_model, stamp) for row, stamp in stamps.items() if stamp is not None}


def _words_are_sound(source: Source, row: int) -> bool:
    """Whether it is the image's own fault that a sample cannot be used; asked of few, as it reads the words again."""
    try:
        source.without_image(row)
    except ClipkitError:
        return False
    return True


def _known(source: Source, entries: dict[int, Entry], dim: int) -> Embedded:
    """What `embed_source` gives where nothing is to be embedded, without importing what it is done with."""
    found = Embedded(np.zeros((0, dim), np.float32), np.zeros((0, dim), np.float32), [], [], np.zeros(0, np.int64))
    vectors = []
    for row, (vector, reason) in entries.items():
        try:
            sample = source.without_image(row) if vector is not None else None
        except BadSample as error:
            sample, reason = None, str(error)
            found.unread += [row] if isinstance(error, UnreadSample) else []
        if sample is None or vector is None:
            found.left_out.append({"row": row, "key": source.key(row), "reason": reason})
            continue
        found.samples.append(Sample(sample.key, None, sample.extension, sample.captions, sample.columns))
        found.rows.append(row)
        vectors.append(vector)
    if vectors:
        found.image = np.stack(vectors)
    return found


def _joined(parts: Sequence[Embedded], dim: int) -> Embedded:
    found = Embedded(np.zeros((0, dim), np.float32), np.zeros((0, dim), np.float32), [], [], np.zeros(0, np.int64))
    if parts:
        found.image = np.concatenate([part.image for part in parts])
    for part in parts:
        found.samples += part.samples
        found.rows += part.rows
        found.left_out += part.left_out
        found.unread += part.unread
    return found

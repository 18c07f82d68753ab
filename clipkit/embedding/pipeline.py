"""Embeddings as an artifact that survives a kill, made part by part, by one process or several."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipkit.core import BadSample, ClipkitError, Side, UnreadSample, keep_freed_memory, settled_precision
from clipkit.data.sources import Source, Stamp, check_ids
from clipkit.embedding.encode import Encoder
from clipkit.embedding.options import EmbedOptions, EncodeOptions
from clipkit.embedding.store import Embedded, Embeddings, part_table_path, write_part
from clipkit.embedding.update import EarlierEmbeddings, part_files, refuse_unlike, write_stamps
from clipkit.images import shown
from clipkit.models import DualEncoder, cast_for_inference, compiled_image_tower, compiling_pays, find_batch_size
from clipkit.storage import Stage, read_manifest, state_of, write_ledger

__all__ = ["Outcome", "embed"]


@dataclass(frozen=True)
class Outcome:
    """What came of `embed`."""

    manifest: dict[str, Any]
    made_by: Literal["this", "another", "before"]
    """Which process made it whole: this one, another one meanwhile, or one that was done before this one began."""
    taken: int = 0
    """Images (texts, where there are no images) that an update by this process took over as they were."""


def embed(
    source: Source,
    model: DualEncoder,
    out: Path,
    options: EmbedOptions | None = None,
    *,
    model_reference: dict[str, Any],
) -> Outcome:
    """Make an embeddings artifact, part by part; several processes may work on one folder.

    An update gives the rows, in their order, that a run from nothing gives. Those of images that have not changed (by
    name, size and time, or the shard's checksum) keep their vectors bit by bit; captions and columns are read anew.
    The vectors of the others are those of other batches, up to the rounding of that.
    What could not be read the last time is tried again, even where nothing has changed.

    Args:
        source: what to embed.
        model: with what; cast in place.
        out: the folder. On an unfinished one of the same input it goes on, on a finished one it does nothing.
        options: how; those of `EmbedOptions` when not given.
        model_reference: stands in the manifest: ``fingerprint`` and where the model was (``spec``, ``path``).

    Raises:
        ClipkitError: where no sample can be used, two ids collide, or the folder holds something else, or (in an
            update) embeddings by another model, of other sides or of another precision.
    """
    options = options or EmbedOptions()
    made_from = _made_from(source, model, options, model_reference["fingerprint"])
    if options.update:
        refuse_unlike(out, made_from)
    if attempt := _attempt(out, made_from, lambda line: options.update and _can_be_read(line, source, model, options)):
        made_from["attempt"] = attempt
    beside = [out / model_reference["path"]] if "path" in model_reference else []
    inputs = [source.spec, *beside]
    stage = Stage(out, "embeddings", made_from, inputs=inputs, overwrite=options.overwrite, update=options.update)
    if stage.done:
        return Outcome(read_manifest(out, "embeddings"), "before")
    cast_for_inference(model, options.precision)
    if model.device.type == "cpu":
        keep_freed_memory()
    earlier = EarlierEmbeddings(stage.earlier, made_from) if stage.earlier else None
    batch_size, compile = _settled(stage, source, model, options)
    parts = _rows_of_parts(len(source), options.part_size)
    encoding = EncodeOptions(options.sides, batch_size, options.decoding, options.threads, options.workers)
    image_tower = compiled_image_tower(model, model.image_block(batch_size)) if compile else None
    made = _Parts(stage.folder, source, Encoder(model, encoding, image_tower), earlier)
    for name in stage.pending(list(parts)):
        stage.finish_part(name, made.make(name, parts[name], f"embed part {int(name) + 1}/{len(parts)}"))
    records = stage.records(list(parts))
    if records is None:
        return Outcome(read_manifest(out, "embeddings"), "another")
    facts = {"dim": model.embed_dim, "dtype": "float16", "batch_size": batch_size, "compiled": compile}
    manifest = _commit(stage, source, dict(zip(parts, records, strict=True)), options.sides, model_reference, facts)
    return Outcome(manifest, "this", sum(record["taken"] for record in records))


def _made_from(source: Source, model: DualEncoder, options: EmbedOptions, fingerprint: str) -> dict[str, Any]:
    """By what finished embeddings are known to be the ones that are asked for."""
    return {
        "source": source.identity(),
        "model": fingerprint,
        "sides": list(options.sides),
        # As it is settled: parts by two machines of which one is fast at bf16 do not go together.
        "precision": settled_precision(options.precision, model.device),
        "part_size": options.part_size,
        "batch_size": options.batch_size,
        "decoding": options.decoding,
        "compiled": options.compile,
    }


def _attempt(out: Path, made_from: dict[str, Any], can_be_read: Callable[[dict[str, Any]], bool]) -> int:
    """How often what could not be read of this very input was tried again; now once more, where any of it can be read.

    It is part of what the embeddings are made from: readers must see that they are others than before.
    """
    try:
        state, facts = state_of(out)
    except ClipkitError:
        return 0  # said by others
    before = facts.get("made_from", {})
    if facts.get("kind") != "embeddings" or {**before, "attempt": 0} != {**made_from, "attempt": 0}:
        return 0
    again = state == "finished" and any(map(can_be_read, Embeddings(out, facts).ledger()))
    return before.get("attempt", 0) + again


def _can_be_read(line: dict[str, Any], source: Source, model: DualEncoder, options: EmbedOptions) -> bool:
    """Whether a line of the ledger is of a sample that could not be read, and now can be, usable or not."""
    row = line.get("row")
    if row is None or not line.get("unread"):
        return False
    if not source.size(row) and source.stamp(row).image is None:
        return False  # missing, or a dead URL, that would be waited for
    try:
        if "image" in options.sides:
            shown(source[row].read(), model.preprocess, options.decoding)
        else:
            source.without_image(row)
    except BadSample as error:
        return not isinstance(error, UnreadSample)
    return True


def _settled(stage: Stage, source: Source, model: DualEncoder, options: EmbedOptions) -> tuple[int, bool]:
    """The batch size, and whether to compile: as chosen, or found out once for all who work on the folder."""
    sides, samples = options.sides, len(source)
    batch_size = options.batch_size or stage.settled("batch_size", lambda: find_batch_size(model, sides, samples))
    if options.compile is not None:
        return batch_size, options.compile
    return batch_size, stage.settled("compiled", lambda: compiling_pays(model, sides, batch_size, samples))


def _rows_of_parts(samples: int, part_size: int) -> dict[str, range]:
    """The parts by name, each with its rows of the source."""
    starts = range(0, samples, part_size)
    digits = max(4, len(str(len(starts) - 1)))
    return {f"{n:0{digits}d}": range(start, min(start + part_size, samples)) for n, start in enumerate(starts)}


@dataclass(frozen=True)
class _Parts:
    """Makes the parts of an artifact, whichever process asks."""

    folder: Path
    source: Source
    encoder: Encoder
    earlier: EarlierEmbeddings | None

    def make(self, name: str, rows: range, title: str) -> dict[str, Any]:
        """Write one part; gives its record."""
        record = self._write(name, rows, title)
        for path in part_files(self.folder, name):
            if path.relative_to(self.folder).as_posix() not in record["files"]:
                path.unlink(missing_ok=True)  # of one who was killed in this part, when more of it could be used
        return record

    def _write(self, name: str, rows: range, title: str) -> dict[str, Any]:
        sides = self.encoder.options.sides
        # Before anything is read: of a file that is written meanwhile the old stamp counts, and an update reads it.
        stamps = [self.source.stamp(row) for row in rows]
        if "image" not in sides:
            stamps = [Stamp(None, stamp.words) for stamp in stamps]
        number = self.earlier.part_of(stamps) if self.earlier else None
        if self.earlier and number is not None:
            keys = [self.source.key(row) for row in rows]
            return self.earlier.link(number, self.folder, name, rows.start, keys)
        known = self.earlier.take(rows, stamps) if self.earlier else {}
        embedded = self.encoder.embed(self.source, rows, known, title)
        _refuse_nan(embedded)
        files = write_part(self.folder, name, embedded, sides)
        files |= write_stamps(self.folder, name, rows, stamps, embedded)
        return {
            "images": len(embedded.samples),
            "captions": len(embedded.captions),
            "left_out": embedded.ledger(),
            "files": dict(sorted(files.items())),
            "taken": sum(row in known for row in embedded.rows),
        }


def _commit(
    stage: Stage,
    source: Source,
    records: dict[str, dict[str, Any]],
    sides: Sequence[Side],
    model_reference: dict[str, Any],
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Write ledger and manifest; gives the manifest.

    Raises:
        ClipkitError: where no sample could be used, or two ids collide.
    """
    left_out = [*source.problems, *(line for record in records.values() for line in record["left_out"])]
    images, captions = (sum(record[what] for record in records.values()) for what in ("images", "captions"))
    if not images:
        first = left_out[0]
        if any(line.get("unread") for line in left_out):
            shutil.rmtree(stage.work / "parts", ignore_errors=True)  # so that the same command tries again
        raise ClipkitError(f"nothing in {source.spec} can be used; the first: {first['key']}: {first['reason']}")
    _check_ids(stage.folder, [name for name, record in records.items() if record["images"]], images)
    write_ledger(stage.folder, left_out)
    return stage.commit(
        model=model_reference,
        source=source.spec,
        sides=[side for side in sides if side == "image" or captions],
        **facts,
        counts={"images": images, "captions": captions, "left_out": len(left_out), "parts": len(records)},
        parts=[
            {"name": name, **{what: record[what] for what in ("images", "captions", "files")}}
            for name, record in records.items()
        ],
    )


def _refuse_nan(embedded: Embedded) -> None:
    of_image, of_text = (lambda row: embedded.samples[row].key), (lambda row: repr(embedded.captions[row])[:80])
    for vectors, what in ((embedded.image, of_image), (embedded.text, of_text)):
        broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(broken):
            raise ClipkitError(
                f"the model's embedding of {what(broken[0])} is not finite; its weights are broken, or it needs "
                "--precision fp32"
            )


def _check_ids(out: Path, names: Sequence[str], images: int) -> None:
    ids, end = np.empty(images, np.int64), 0
    for name in names:
        part = pq.read_table(part_table_path(out, "image", name), columns=["id"])["id"].to_numpy()
        ids[end : end + len(part)] = part
        end += len(part)

    def keys_of(twin: int) -> list[str]:
        tables = (pq.read_table(part_table_path(out, "image", name), columns=["id", "key"]) for name in names)
        return [key for table in tables for key in table.filter(pc.field("id") == twin)["key"].to_pylist()]

    check_ids(ids, keys_of)

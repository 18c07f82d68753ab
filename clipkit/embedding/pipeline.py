"""Embeddings as an artifact that survives a kill, made part by part, by one process or several."""

import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipkit.core import BadSample, ClipkitError, Side, UnreadSample, keep_freed_memory, settled_precision
from clipkit.data.sources import Source, Stamp, check_ids
from clipkit.embedding.encode import embed_source
from clipkit.embedding.store import Embedded, Embeddings, table_path, write_part
from clipkit.embedding.update import Known, part_files, refuse_unlike, write_stamps
from clipkit.images import Decoding, shown
from clipkit.models import DualEncoder, cast_for_inference, compiled, compiling_pays, find_batch_size
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
    *,
    model_reference: dict[str, Any],
    sides: Sequence[Side] = ("image", "text"),
    precision: str = "auto",
    part_size: int = 10_000,
    batch_size: int | None = None,
    threads: int | None = None,
    workers: int | None = None,
    decoding: Decoding = "fast",
    compile: bool | None = None,
    overwrite: bool = False,
    update: bool = False,
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
        model_reference: stands in the manifest: ``fingerprint`` and where the model was (``spec``, ``path``).
        sides: images, captions or both.
        precision: of the towers, see `cast_for_inference`.
        part_size: samples per part, which is what a kill can cost.
        batch_size: see `embed_source`; None to find a good one, which is done once: whoever goes on with an unfinished
            folder, on whatever machine, takes the same, so that the bits are the same.
        threads, workers, decoding: see `embed_source`.
        compile: see `compiled`; the last bits of the vectors are others. None to find out once whether that pays.
        overwrite: replace what is there.
        update: bring embeddings of other input up to date. They stay as they are until the new ones are whole, which
            are made beside them.

    Raises:
        ClipkitError: where no sample can be used, two ids collide, or the folder holds something else, or (in an
            update) embeddings by another model, of other sides or of another precision.
    """
    made_from = {
        "source": source.identity(),
        "model": model_reference["fingerprint"],
        "sides": list(sides),
        # As it is settled: parts by two machines of which one is fast at bf16 do not go together.
        "precision": settled_precision(precision, model.device),
        "part_size": part_size,
        "batch_size": batch_size,
        "decoding": decoding,
        "compiled": compile,
    }
    if update:
        refuse_unlike(out, made_from)
    if attempt := _attempt(out, made_from, lambda line: update and _can_be_read(line, source, model, made_from)):
        made_from["attempt"] = attempt
    stage = Stage(
        out,
        "embeddings",
        made_from,
        inputs=[source.spec, *([out / model_reference["path"]] if "path" in model_reference else [])],
        overwrite=overwrite,
        update=update,
    )
    if stage.done:
        return Outcome(read_manifest(out, "embeddings"), "before")
    cast_for_inference(model, precision)
    if model.device.type == "cpu":
        keep_freed_memory()
    known = Known(stage.earlier, made_from) if stage.earlier else None
    size = batch_size or stage.settled("batch_size", lambda: find_batch_size(model, sides, len(source)))
    if compile is None:
        compile = stage.settled("compiled", lambda: compiling_pays(model, sides, size, len(source)))
    starts = range(0, len(source), part_size)
    digits = max(4, len(str(len(starts) - 1)))
    names = [f"{number:0{digits}d}" for number in range(len(starts))]
    with compiled(model, model.image_block(size)) if compile else nullcontext():
        for name in stage.pending(names):
            start = starts[int(name)]
            rows = range(start, min(start + part_size, len(source)))
            how = {"batch_size": size, "threads": threads, "workers": workers, "decoding": decoding}
            how["show"] = f"embed part {int(name) + 1}/{len(names)}"
            record = _make_part(stage.folder, name, source, model, rows, sides, known, how)
            for path in part_files(stage.folder, name):
                if path.relative_to(stage.folder).as_posix() not in record["files"]:
                    path.unlink(missing_ok=True)  # of one who was killed in this part, when more of it could be used
            stage.finish_part(name, record)
    records = stage.records(names)
    if records is None:
        return Outcome(read_manifest(out, "embeddings"), "another")
    left_out = [*source.problems, *(line for record in records for line in record["left_out"])]
    images = sum(record["images"] for record in records)
    if not images:
        first = left_out[0]
        if any(line.get("unread") for line in left_out):
            shutil.rmtree(stage.work / "parts", ignore_errors=True)  # so that the same command tries again
        raise ClipkitError(f"nothing in {source.spec} can be used; the first: {first['key']}: {first['reason']}")
    filled = [name for name, record in zip(names, records, strict=True) if record["images"]]
    _check_ids(stage.folder, filled, images)
    write_ledger(stage.folder, left_out)
    present: list[Side] = [side for side in sides if side == "image" or sum(r["captions"] for r in records)]
    manifest = stage.commit(
        model=model_reference,
        source=source.spec,
        sides=present,
        dim=model.embed_dim,
        dtype="float16",
        batch_size=size,
        compiled=compile,
        counts={
            "images": images,
            "captions": sum(r["captions"] for r in records),
            "left_out": len(left_out),
            "parts": len(names),
        },
        parts=[
            {"name": name, **{key: record[key] for key in ("images", "captions", "files")}}
            for name, record in zip(names, records, strict=True)
        ],
    )
    return Outcome(manifest, "this", sum(record["taken"] for record in records))


def _attempt(out: Path, made_from: dict[str, Any], can_be_read: Callable[[dict[str, Any]], bool]) -> int:
    """How often what could not be read of this very input was tried again; now once more, where any of it can be read.

    It is part of what the embeddings are made from: readers must see that they are others than before.
    """
    try:
        state, about = state_of(out)
    except ClipkitError:
        return 0  # said by others
    before = about.get("made_from", {})
    if about.get("kind") != "embeddings" or {**before, "attempt": 0} != {**made_from, "attempt": 0}:
        return 0
    again = state == "finished" and any(map(can_be_read, Embeddings(out, about).ledger()))
    return before.get("attempt", 0) + again


def _can_be_read(line: dict[str, Any], source: Source, model: DualEncoder, made_from: dict[str, Any]) -> bool:
    """Whether a line of the ledger is of a sample that could not be read, and now can be, usable or not."""
    row = line.get("row")
    if row is None or not line.get("unread"):
        return False
    if not source.size(row) and source.stamp(row).image is None:
        return False  # missing, or a dead URL, that would be waited for
    try:
        if "image" in made_from["sides"]:
            shown(source[row].read(), model.preprocess, made_from["decoding"])
        else:
            source.without_image(row)
    except BadSample as error:
        return not isinstance(error, UnreadSample)
    return True


def _make_part(
    out: Path,
    name: str,
    source: Source,
    model: DualEncoder,
    rows: range,
    sides: Sequence[Side],
    known: Known | None,
    how: dict[str, Any],
) -> dict[str, Any]:
    """Write one part; gives its record."""
    # Before anything is read: of a file that is written meanwhile the old stamp counts, and the next update reads it.
    stamps = [source.stamp(row) for row in rows]
    if "image" not in sides:
        stamps = [Stamp(None, stamp.words) for stamp in stamps]
    number = known.part_of(stamps) if known else None
    if known and number is not None:
        return known.link(number, out, name, rows.start, [source.key(row) for row in rows])
    kept = known.take(rows, stamps) if known else {}
    found = embed_source(source, model, sides=sides, rows=rows, kept=kept, **how)
    _refuse_nan(found)
    files = {**write_part(out, name, found, sides), **write_stamps(out, name, rows, stamps, found)}
    counts = {"images": len(found.samples), "captions": len(found.captions)}
    taken = sum(row in kept for row in found.rows)
    return {**counts, "left_out": found.ledger(), "files": dict(sorted(files.items())), "taken": taken}


def _refuse_nan(found: Embedded) -> None:
    of_image, of_text = (lambda row: found.samples[row].key), (lambda row: repr(found.captions[row])[:80])
    for vectors, what in ((found.image, of_image), (found.text, of_text)):
        broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(broken):
            raise ClipkitError(
                f"the model's embedding of {what(broken[0])} is not finite; its weights are broken, or it needs "
                "--precision fp32"
            )


def _check_ids(out: Path, names: Sequence[str], images: int) -> None:
    ids, end = np.empty(images, np.int64), 0
    for name in names:
        part = pq.read_table(table_path(out, "image", name), columns=["id"])["id"].to_numpy()
        ids[end : end + len(part)] = part
        end += len(part)

    def keys_of(twin: int) -> list[str]:
        tables = (pq.read_table(table_path(out, "image", name), columns=["id", "key"]) for name in names)
        return [key for table in tables for key in table.filter(pc.field("id") == twin)["key"].to_pylist()]

    check_ids(ids, keys_of)

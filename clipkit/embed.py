"""From a source and a model to embeddings: in memory for a few thousand, or as an artifact that survives a kill."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from clipkit.artifact import Stage, read_manifest, write_ledger
from clipkit.decode import decode
from clipkit.embeddings import Embedded, Side, table_path, write_part
from clipkit.errors import BadSample, ClipkitError, UnreadSample
from clipkit.launch import processes_here
from clipkit.log import progress
from clipkit.parallel import cores, in_threads
from clipkit.reuse import Kept, Known, refuse_unlike, write_stamps
from clipkit.sources import Sample, Source, Stamp, check_ids
from clipkit.towers import DualEncoder

__all__ = ["Outcome", "cast_for_inference", "embed", "embed_source", "evaluating", "fast_bf16"]


def cast_for_inference(model: DualEncoder, precision: str) -> DualEncoder:
    """Weights in bfloat16 (cast once: autocast would do so at every call) or float32, in evaluation mode.

    Args:
        model: changed in place.
        precision: ``fp32``, ``bf16``, or ``auto``: bf16 where the device multiplies it fast.
    """
    model.backbone.to(torch.bfloat16 if _settled(precision, model.device) == "bf16" else torch.float32)
    return model.eval()


def _settled(precision: str, device: torch.device) -> str:
    return precision if precision != "auto" else "bf16" if fast_bf16(device) else "fp32"


def fast_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16 products."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        found = torch.cpu.get_capabilities()
        return bool(found.get("avx512_bf16") or found.get("amx_bf16") or found.get("bf16"))
    return False


def embed_source(
    source: Source,
    model: DualEncoder,
    *,
    sides: Sequence[Side] = ("image", "text"),
    rows: range | None = None,
    batch_size: int = 64,
    threads: int | None = None,
    show: str | None = "embed",
    kept: Mapping[int, Kept] | None = None,
) -> Embedded:
    """Embed samples of a source, decoding in threads while the towers work.

    Args:
        source: see `clipkit.sources.open_source`.
        model: in the precision that is wanted.
        sides: images, texts or both. A sample whose image is unusable is left out of both.
        rows: which samples; all of them when not given.
        batch_size: images at a time, those of so many rows: an image that cannot be used shifts no other into another
            batch. So the same rows give the same bits, whichever part of the source they are embedded with, as long
            as it begins at a multiple of this. Captions go four times as many at a time.
        threads: that decode; when not given, as many as this process's share of the cores.
        show: title of the progress bar; None for no bar.
        kept: what is known of rows from before, see `clipkit.reuse`: their images are not read, nor are they encoded,
            nor captions that there were before. The others of the rows go into batches together.
    """
    rows = range(len(source)) if rows is None else rows
    kept = {} if kept is None else kept
    found = Embedded(np.zeros(0), np.zeros(0), [], [], np.zeros(0, np.int64))
    image_of_text: list[int] = []
    known_texts: dict[int, np.ndarray] = {}
    images = _Rows(model.embed_dim, lambda pixels: _on(model, torch.from_numpy(np.stack(pixels)), model.encode_image))
    texts = _Rows(model.embed_dim, lambda said: _on(model, model.tokenize(said), model.encode_text))

    def load(i: int) -> _Loaded:
        before, pixels = kept.get(i), None
        if before is not None and before.reason is not None:
            return _Loaded(i, None, None, before.reason)
        try:
            sample = source[i] if "image" in sides and before is None else source.without_image(i)
            if "image" in sides and before is None:
                pixels = model.preprocess(decode(sample.read(), model.preprocess.background))
        except BadSample as error:
            return _Loaded(i, None, None, str(error), isinstance(error, UnreadSample))
        if "image" not in sides and not sample.captions:
            return _Loaded(i, None, None, "the sample has no caption")
        return _Loaded(i, Sample(sample.key, None, sample.extension, sample.captions, sample.columns), pixels)

    threads = threads or max(1, cores() // processes_here())
    loaded = in_threads(load, rows, threads, ahead=4 * batch_size)
    with torch.inference_mode(), evaluating(model):
        for row, sample, pixels, reason, unread in progress(loaded, show, len(rows), "samples") if show else loaded:
            before = kept.get(row)
            if sample is None:
                found.left_out.append({"row": row, "key": source.key(row), "reason": reason})
                found.unread += [row] if unread else []
            else:
                if "text" in sides:
                    for caption, vector in zip(sample.captions, _known(before, sample.captions), strict=True):
                        if vector is not None:
                            known_texts[len(found.captions)] = vector
                        image_of_text.append(len(found.samples))
                        found.captions.append(caption)
                found.samples.append(sample)
                found.rows.append(row)
                if pixels is not None:
                    images.add(pixels)
                elif before is not None and before.image is not None:
                    images.know(before.image)
            # Where most is known already, batches of the rows between would be small.
            full = images.waiting == batch_size if kept else (row + 1 - rows.start) % batch_size == 0
            if full or row == rows[-1]:
                images.flush()
        for at, caption in enumerate(found.captions):
            if at in known_texts:
                texts.know(known_texts[at])
            else:
                texts.add(caption)
            if texts.waiting == batch_size * 4:
                texts.flush()
        texts.flush()
    found.image, found.text = images.joined(), texts.joined()
    found.image_of_text = np.array(image_of_text, np.int64)
    return found


class _Loaded(NamedTuple):
    row: int
    sample: Sample | None
    pixels: np.ndarray | None
    reason: str | None = None
    unread: bool = False


def _known(before: Kept | None, captions: Sequence[str]) -> list[np.ndarray | None]:
    return [None] * len(captions) if before is None else before.known(captions)


def _on(model: DualEncoder, batch: torch.Tensor, encode: Callable[[torch.Tensor], torch.Tensor]) -> np.ndarray:
    return encode(batch.to(model.device)).cpu().numpy()


class _Rows:
    """Embeddings of one side in order: a batch at a time, or known already."""

    def __init__(self, dim: int, encode: Callable[[list[Any]], np.ndarray]):
        self._encode = encode
        self._items: list[Any] = []
        self._blocks = [np.zeros((0, dim), np.float32)]
        self._known: list[np.ndarray] = []
        self._places: tuple[list[int], list[int]] = ([], [])
        self._count = 0

    @property
    def waiting(self) -> int:
        return len(self._items)

    def add(self, item: Any) -> None:
        self._items.append(item)
        self._places[0].append(self._count)
        self._count += 1

    def know(self, vector: np.ndarray) -> None:
        self._known.append(vector)
        self._places[1].append(self._count)
        self._count += 1

    def flush(self) -> None:
        if self._items:
            self._blocks.append(self._encode(self._items))
            self._items = []

    def joined(self) -> np.ndarray:
        new = np.concatenate(self._blocks)
        if not self._known:
            return new
        found = np.empty((self._count, new.shape[1]), np.float32)
        found[self._places[0]], found[self._places[1]] = new, np.stack(self._known)
        return found


@contextmanager
def evaluating(model: DualEncoder) -> Iterator[None]:
    """Evaluation mode for a while; afterwards every module is in the mode it was in, which differs among towers."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


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
    batch_size: int = 64,
    threads: int | None = None,
    overwrite: bool = False,
    update: bool = False,
) -> Outcome:
    """Make an embeddings artifact, part by part; several processes may work on one folder.

    An update gives the rows, in their order, that a run from nothing gives. Those of images that have not changed (by
    name, size and time, or the shard's checksum) keep their vectors bit by bit; captions and columns are read anew.
    The vectors of the others are those of other batches, up to the rounding of that.

    Args:
        source: what to embed.
        model: with what; cast in place.
        out: the folder. On an unfinished one of the same input it goes on, on a finished one it does nothing.
        model_reference: stands in the manifest: ``fingerprint`` and where the model was (``spec``, ``path``).
        sides: images, captions or both.
        precision: of the towers, see `cast_for_inference`.
        part_size: samples per part, which is what a kill can cost.
        batch_size, threads: see `embed_source`.
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
        "precision": _settled(precision, model.device),
        "part_size": part_size,
        "batch_size": batch_size,
    }
    if update:
        refuse_unlike(out, made_from)
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
    known = Known(stage.earlier, made_from) if stage.earlier else None
    starts = range(0, len(source), part_size)
    digits = max(4, len(str(len(starts) - 1)))
    names = [f"{number:0{digits}d}" for number in range(len(starts))]
    for name in stage.pending(names):
        start = starts[int(name)]
        rows = range(start, min(start + part_size, len(source)))
        how = {"batch_size": batch_size, "threads": threads, "show": f"embed part {int(name) + 1}/{len(names)}"}
        stage.finish_part(name, _make_part(stage.folder, name, source, model, rows, sides, known, how))
    records = stage.records(names)
    if records is None:
        return Outcome(read_manifest(out, "embeddings"), "another")
    left_out = [*source.problems, *(line for record in records for line in record["left_out"])]
    images = sum(record["images"] for record in records)
    if not images:
        first = left_out[0]
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
    files = {**write_part(out, name, found, sides), **write_stamps(out, name, rows, stamps, found)}
    counts = {"images": len(found.samples), "captions": len(found.captions)}
    taken = sum(row in kept for row in found.rows)
    return {**counts, "left_out": found.left_out, "files": dict(sorted(files.items())), "taken": taken}


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

"""From any source to webdataset shards, shard by shard; see `clipkit.storage.manifest` for what a kill leaves."""

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from clipkit.core import BadSample, ClipkitError, in_processes, in_threads, meter
from clipkit.data.shards import load_writer, write_shard
from clipkit.data.sources import Sample, Source, check_ids, sample_id
from clipkit.images import IMAGE_SUFFIXES, identify, shrink
from clipkit.storage import Stage, is_remote, read_manifest, write_ledger

__all__ = ["PackOptions", "pack", "shard_keys"]

REMOTE_THREADS = 16  # per process, where every image is a request

Advance = Callable[[tuple[int, int]], None]  # told how many samples and bytes of images are done since the last time


@dataclass(frozen=True)
class PackOptions:
    """How samples are packed, see `pack`."""

    shard_samples: int = 10_000
    """Most samples in a shard."""
    shard_bytes: int = 512 << 20
    """Most bytes of images in a shard, as they are in the source."""
    shards: int | None = None
    """How many shards to make, of as equal a number of samples as can be; instead of the two above."""
    max_side: int | None = None
    """Pixels of the long side over which an image is made smaller, see `clipkit.images.downscale`."""
    quality: int = 95
    """Of images that are encoded anew with loss."""
    workers: int = 1
    """Processes at work, each on a shard of its own, and threads where there are more of them than shards."""
    overwrite: bool = False
    """Replace another artifact that stands there."""


def pack(source: Source, out: Path, options: PackOptions | None = None) -> dict[str, Any]:
    """Write the samples of a source into shards, in source order.

    Which sample goes into which shard is settled before anything is written, from the files' sizes alone; what turns
    out unusable leaves a gap. So shards can be made in any order, by several processes, and the bytes are the same.

    Args:
        source: with captions.
        out: the shards' folder.
        options: how; those of `PackOptions` when not given.

    Returns:
        The manifest.

    Raises:
        ClipkitError: where nothing can be used, or the folder holds something else.
    """
    options = options or PackOptions()
    if options.shards is not None and options.shards > len(source):
        raise ClipkitError(f"{source.spec} has {len(source):,} samples, too few for {options.shards:,} shards")
    stage = Stage(out, "shards", _made_from(source, options), inputs=[source.spec], overwrite=options.overwrite)
    if stage.done:
        return read_manifest(out, "shards")
    keys = _checked_keys(source)
    shards = _rows_of_shards(source, options)
    finished = [stage.is_finished(name) for name in shards]
    processes = max(1, min(options.workers, finished.count(False)))
    threads = _threads(source, options, processes)

    def work(advance: Advance) -> None:
        for name in stage.pending(list(shards)):
            for scratch in out.glob(f".{name}.*.tmp"):
                scratch.unlink()  # of somebody who held this part's lock and was killed
            shard = _Shard(source, keys, options, advance)
            written = write_shard(out / f"{name}.tar", shard.samples(shards[name], threads))
            record = {"tar_bytes": written.bytes, "blake2b": written.blake2b, "samples": written.samples}
            stage.finish_part(name, {**record, **shard.counts, "ledger": shard.ledger})

    done = sum(len(rows) for rows, is_finished in zip(shards.values(), finished, strict=True) if is_finished)
    with meter("pack", len(source), "samples", done) as bar:
        if processes == 1:
            work(lambda step: bar(*step))
        else:
            load_writer()
            for step in in_processes(work, processes):
                bar(*step)
    records = stage.records(list(shards))
    if records is None:
        return read_manifest(out, "shards")
    return _commit(stage, source, dict(zip(shards, records, strict=True)))


def _made_from(source: Source, options: PackOptions) -> dict[str, Any]:
    """By what finished shards are known to be the ones that are asked for."""
    if options.shards is None:
        cutting = {"shard_samples": options.shard_samples, "shard_bytes": options.shard_bytes}
    else:
        cutting = {"shards": options.shards}
    smaller = {} if options.max_side is None else {"max_side": options.max_side, "quality": options.quality}
    return {"source": source.identity(), **cutting, **smaller}


def _checked_keys(source: Source) -> list[str]:
    """Each sample's key in the shards.

    Raises:
        ClipkitError: where two have the same id.
    """
    count = len(source)
    keys = shard_keys([source.key(row) for row in range(count)])
    ids = np.fromiter(map(sample_id, keys), np.int64, count)
    check_ids(ids, lambda twin: [key for key in keys if sample_id(key) == twin])
    return keys


def _rows_of_shards(source: Source, options: PackOptions) -> dict[str, range]:
    """The shards by name, each with its rows of the source."""
    if options.shards is None:
        cuts = _cuts(source, options.shard_samples, options.shard_bytes)
    else:
        count, shards = len(source), options.shards
        cuts = [range(count * k // shards, count * (k + 1) // shards) for k in range(shards)]
    digits = max(6, len(str(len(cuts))))
    return {f"{number:0{digits}d}": rows for number, rows in enumerate(cuts)}


def _threads(source: Source, options: PackOptions, processes: int) -> int:
    """Threads in each process."""
    if source.remote:
        return REMOTE_THREADS
    # Pillow works outside the interpreter's lock; reading and writing small files gains nothing by threads.
    return options.workers // processes if options.max_side and options.workers > processes else 0


def _commit(stage: Stage, source: Source, records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Write ledger and manifest; gives the manifest.

    Raises:
        ClipkitError: where no sample could be used.
    """
    ledger = [*source.problems, *(line for record in records.values() for line in record["ledger"])]
    total = {what: sum(r[what] for r in records.values()) for what in ("samples", "captions", "bytes", "left_out")}
    total["left_out"] += len(source.problems)
    repeated = sum(record["repeated"] for record in records.values())
    if not total["samples"]:
        first = ledger[0]
        raise ClipkitError(f"nothing in {source.spec} can be used; the first: {first['key']}: {first['reason']}")
    write_ledger(stage.folder, ledger)
    return stage.commit(
        source=source.spec,
        counts={**total, "shards": len(records), "repeated_captions": repeated},
        shards=[
            {"name": f"{name}.tar", "samples": r["samples"], "bytes": r["tar_bytes"], "blake2b": r["blake2b"]}
            for name, r in records.items()
        ],
        first_left_out=next((line for line in ledger if not line.get("kept")), None),
    )


def _cuts(source: Source, most_samples: int, most_bytes: int) -> list[range]:
    cuts, start, size = [], 0, 0
    for row in range(len(source)):
        weight = source.size(row)
        if row > start and (row - start == most_samples or size + weight > most_bytes):
            cuts.append(range(start, row))
            start, size = row, 0
        size += weight
    return [*cuts, range(start, len(source))]


@dataclass
class _Shard:
    """What goes into one shard, and what is to be said of it."""

    source: Source
    keys: list[str]
    options: PackOptions
    advance: Advance
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("captions", "bytes", "left_out", "repeated"), 0)
    )
    ledger: list[dict[str, Any]] = field(default_factory=list)

    def samples(self, rows: range, threads: int) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Key and members of each usable sample, in order."""
        last, steps, size = time.monotonic(), 0, 0
        for row, loaded in zip(rows, in_threads(self._load, rows, threads, ahead=4 * threads), strict=True):
            steps += 1
            if isinstance(loaded, BadSample):
                self._note(row, str(loaded))
            else:
                sample, members = loaded
                length = len(next(iter(members.values())))
                size += length
                self.counts["bytes"] += length
                self._count(row, sample)
                yield self.keys[row], members
            if time.monotonic() - last > 0.1:
                self.advance((steps, size))
                last, steps, size = time.monotonic(), 0, 0
        self.advance((steps, size))

    def _load(self, row: int) -> tuple[Sample, dict[str, bytes]] | BadSample:
        try:
            sample = self.source[row]
            return sample, _members(sample, self.options)
        except BadSample as error:
            return error

    def _count(self, row: int, sample: Sample) -> None:
        self.counts["captions"] += len(sample.captions)
        for reason in sample.left_out:
            self._note(row, reason)
        seen: dict[str, int] = {}
        for number, caption in enumerate(sample.captions, 1):
            if (first := seen.setdefault(caption, number)) != number:
                self.counts["repeated"] += 1
                line = {"row": row, "key": self.source.key(row), "kept": True}
                self.ledger.append({**line, "reason": f"caption {number} repeats caption {first}; both are kept"})

    def _note(self, row: int, reason: str) -> None:
        self.counts["left_out"] += 1
        self.ledger.append({"row": row, "key": self.source.key(row), "reason": reason})


def _members(sample: Sample, options: PackOptions) -> dict[str, bytes]:
    """The sample's image, ``txt`` and ``json``, the image first."""
    data = sample.read()
    kind, _, _ = identify(data)
    if not sample.captions:
        raise BadSample("the sample has no caption")
    # The file's own ending where it is an image's, else what its bytes say.
    known = f".{sample.extension}" in IMAGE_SUFFIXES
    extension = sample.extension if known else {"jpeg": "jpg", "mpo": "jpg"}.get(kind.lower(), kind.lower())
    fields: dict[str, Any] = {"captions": list(sample.captions), **sample.columns}
    if options.max_side is not None:
        shrunk = shrink(data, options.max_side, options.quality)
        data, extension = shrunk.data, shrunk.extension or extension
        fields = {"original_width": shrunk.width, "original_height": shrunk.height, **fields}
    return {
        extension: data,
        "txt": sample.captions[0].encode("utf-8", "replace"),
        "json": json.dumps(fields, ensure_ascii=False, default=str).encode("utf-8", "replace"),
        **sample.others,
    }


def shard_keys(names: list[str]) -> list[str]:
    """Keys for webdataset from source-relative paths: no extension, no dot in the last part, none twice.

    A key is the path itself wherever that is possible. Where paths would share one, each carries a hash of its own.
    """
    plain = [_plain_key(name) for name in names]
    count = Counter(plain)
    return [key if count[key] == 1 else f"{key}~{sample_id(name):016x}" for key, name in zip(plain, names, strict=True)]


def _plain_key(name: str) -> str:
    if is_remote(name):
        name = name.partition("://")[2].partition("?")[0].partition("#")[0]
    path = PurePosixPath(name.replace("\\", "/"))
    suffix = path.suffix if len(path.suffix) <= 6 else ""
    stem = path.name.removesuffix(suffix) if suffix else path.name
    parts = [part for part in path.parent.parts if part not in ("/", ".", "..")]
    return "/".join([*parts, re.sub(r"[.\s]", "_", stem) or "_"]).encode("utf-8", "replace").decode()

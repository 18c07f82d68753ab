"""From a source and a model to embeddings: in memory for a few thousand, or as an artifact that survives a kill."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from clipkit.artifact import Stage, read_manifest, write_ledger
from clipkit.decode import decode
from clipkit.embeddings import Embedded, Side, table_path, write_part
from clipkit.errors import BadSample, ClipkitError
from clipkit.log import progress
from clipkit.parallel import cores, in_threads
from clipkit.sources import Sample, Source, check_ids
from clipkit.towers import DualEncoder

__all__ = ["cast_for_inference", "embed", "embed_source", "evaluating", "fast_bf16"]


def cast_for_inference(model: DualEncoder, precision: str) -> DualEncoder:
    """Weights in bfloat16 (cast once: autocast would do so at every call) or float32, in evaluation mode.

    Args:
        model: changed in place.
        precision: ``fp32``, ``bf16``, or ``auto``: bf16 where the device multiplies it fast.
    """
    if precision == "auto":
        precision = "bf16" if fast_bf16(model.device) else "fp32"
    model.backbone.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    return model.eval()


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
        threads: that decode; as many as cores when not given.
        show: title of the progress bar; None for no bar.
    """
    rows = range(len(source)) if rows is None else rows
    found = Embedded(np.zeros(0), np.zeros(0), [], [], np.zeros(0, np.int64))
    image_of_text: list[int] = []
    image_rows, text_rows = _Rows(model), _Rows(model)

    def load(i: int) -> tuple[int, Sample | None, np.ndarray | None, dict[str, Any]]:
        try:
            sample = source[i]
            pixels = model.preprocess(decode(sample.read(), model.preprocess.background)) if "image" in sides else None
        except BadSample as error:
            return i, None, None, {"row": i, "key": source.key(i), "reason": str(error)}
        if "image" not in sides and not sample.captions:
            return i, None, None, {"row": i, "key": source.key(i), "reason": "the sample has no caption"}
        kept = Sample(sample.key, None, sample.extension, sample.captions, sample.columns)
        return i, kept, pixels, {}

    pixels_waiting: list[np.ndarray] = []
    loaded = in_threads(load, rows, threads or cores(), ahead=4 * batch_size)
    with torch.inference_mode(), evaluating(model):
        for row, sample, pixels, complaint in progress(loaded, show, len(rows), "samples") if show else loaded:
            if sample is None:
                found.left_out.append(complaint)
            else:
                if "text" in sides:
                    image_of_text += [len(found.samples)] * len(sample.captions)
                    found.captions += sample.captions
                found.samples.append(sample)
                found.rows.append(row)
            if pixels is not None:
                pixels_waiting.append(pixels)
            ends = (row + 1 - rows.start) % batch_size == 0 or row == rows[-1]
            if ends and pixels_waiting:
                image_rows.add_images(pixels_waiting)
                pixels_waiting = []
        for start in range(0, len(found.captions), batch_size * 4):
            text_rows.add_texts(found.captions[start : start + batch_size * 4])
    found.image, found.text = image_rows.joined(), text_rows.joined()
    found.image_of_text = np.array(image_of_text, np.int64)
    return found


class _Rows:
    def __init__(self, model: DualEncoder):
        self.model = model
        self.blocks = [np.zeros((0, model.embed_dim), np.float32)]

    def add_images(self, pixels: list[np.ndarray]) -> None:
        batch = torch.from_numpy(np.stack(pixels)).to(self.model.device)
        self.blocks.append(self.model.encode_image(batch).cpu().numpy())

    def add_texts(self, texts: list[str]) -> None:
        tokens = self.model.tokenize(texts).to(self.model.device)
        self.blocks.append(self.model.encode_text(tokens).cpu().numpy())

    def joined(self) -> np.ndarray:
        return np.concatenate(self.blocks)


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
) -> dict[str, Any]:
    """Make an embeddings artifact, part by part; several processes may work on one folder.

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

    Returns:
        The manifest.

    Raises:
        ClipkitError: where no sample can be used, two ids collide, or the folder holds something else.
    """
    made_from = {
        "source": source.identity(),
        "model": model_reference["fingerprint"],
        "sides": list(sides),
        "precision": precision,
        "part_size": part_size,
        "batch_size": batch_size,
    }
    stage = Stage(
        out,
        "embeddings",
        made_from,
        inputs=[source.spec, *([out / model_reference["path"]] if "path" in model_reference else [])],
        overwrite=overwrite,
    )
    if stage.done:
        return read_manifest(out, "embeddings")
    cast_for_inference(model, precision)
    starts = range(0, len(source), part_size)
    digits = max(4, len(str(len(starts) - 1)))
    names = [f"{number:0{digits}d}" for number in range(len(starts))]
    for name in stage.pending(names):
        start = starts[names.index(name)]
        rows = range(start, min(start + part_size, len(source)))
        title = f"embed part {int(name) + 1}/{len(names)}"
        found = embed_source(source, model, sides=sides, rows=rows, batch_size=batch_size, threads=threads, show=title)
        files = write_part(out, name, found, sides)
        counts = {"images": len(found.samples), "captions": len(found.captions)}
        record = {**counts, "left_out": found.left_out, "files": files}
        stage.finish_part(name, record)
    records = stage.records(names)
    if records is None:
        return read_manifest(out, "embeddings")
    left_out = [*source.problems, *(line for record in records for line in record["left_out"])]
    images = sum(record["images"] for record in records)
    if not images:
        first = left_out[0]
        raise ClipkitError(f"nothing in {source.spec} can be used; the first: {first['key']}: {first['reason']}")
    _check_ids(out, names, images)
    write_ledger(out, left_out)
    present: list[Side] = [side for side in sides if side == "image" or sum(r["captions"] for r in records)]
    return stage.commit(
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

"""One pass over a source: every sample read, its image decoded in threads, and a few numbers kept of each.

What is wrong becomes a `Finding` and the pass goes on, shard by shard: one that cannot be read stops nothing. Per
sample 86 bytes stay in memory and per caption 20; keys stay in the source, which gives them when they are asked for.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from clipkit.core import BadSample, cores, in_threads, progress
from clipkit.data.check.perceptual_hash import COARSE, FLAT_BELOW, looks_of
from clipkit.data.check.shard_problems import index_problems, named_shards, open_shard
from clipkit.data.shards import Shards, is_shard_spec, shard_names
from clipkit.data.sources import Sample, ShardSource, Source, open_source, sample_id
from clipkit.images import decode, identify
from clipkit.storage import is_remote

__all__ = [
    "FINDING_KINDS",
    "UNUSABLE",
    "CheckOptions",
    "Finding",
    "Scan",
    "ScannedPart",
    "open_parts",
    "scan",
    "text_hash",
]

# What can be found: whether it is a defect (status 1) or a note, and what it means.
FINDING_KINDS: dict[str, tuple[bool, str]] = {
    "shard_missing": (True, "shards that the manifest or the pattern names and that are not there"),
    "shard_empty": (True, "shards without a sample"),
    "shard_unreadable": (True, "shards that are no readable tar"),
    "shard_truncated": (True, "shards that are cut short or damaged inside; what stands before is used"),
    "shard_changed": (True, "shards that are not as the manifest says: checksum, size or samples"),
    "sample_unreadable": (True, "samples that cannot be read"),
    "image_missing": (True, "samples without an image, or whose file is not there"),
    "image_empty": (True, "images of 0 bytes"),
    "image_broken": (True, "images that cannot be decoded to the end"),
    "image_too_large": (True, "images with more pixels than the limit"),
    "caption_missing": (True, "samples without a caption"),
    "caption_empty": (True, "samples whose caption is empty"),
    "caption_broken": (True, "captions that are not UTF-8, or broken JSON"),
    "key_twice": (True, "members that stand twice in one shard"),
    "duplicate": (True, "images with the same bytes as one before them"),
    "shared": (True, "images that are also in the set checked against, the same bytes or near"),
    "near_duplicate": (False, "images that look like one before them"),
    "key_in_other_shard": (False, "keys that another shard has too; clipkit tells them apart by the shard's name"),
}
UNUSABLE = frozenset(kind for kind in FINDING_KINDS if kind.startswith(("sample_", "image_", "caption_")))

SAMPLE = np.dtype(
    [
        ("digest", "u8", 2),
        ("hash", "u8"),
        ("bytes", "u4"),
        ("width", "u4"),
        ("height", "u4"),
        ("read", "?"),
        ("flat", "?"),
        ("colours", "u1", COARSE),
    ]
)
CAPTION = np.dtype([("text", "u8"), ("row", "i8"), ("tokens", "i4")])
TASK = 16  # samples per task of a thread
CAPTIONS_AT_ONCE = 1024  # captions whose tokens are counted together


@dataclass(frozen=True)
class CheckOptions:
    """How a set is checked, see `scan` and `clipkit.data.check.judge`."""

    near: int = 6
    """The most bits of 64 in which the hashes of near pictures differ."""
    quick: bool = False
    """Read headers and hash bytes only; a picture that breaks off inside and pictures that look alike are not found
    then."""
    strict: bool = False
    """Whether notes count too, and a clean copy leaves out near duplicates, see also `Verdict.clean`."""
    threads: int | None = None
    """That decode; as many as cores when not given."""


def text_hash(caption: str) -> int:
    """63 bits of a caption without its case and spacing."""
    return sample_id(" ".join(caption.casefold().split()))


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a check found, at one place."""

    kind: str
    shard: str | None
    key: str | None
    reason: str
    row: int = -1
    """Of the sample in the scan; -1 where a shard as a whole is meant."""
    other: str | None = None
    other_shard: str | None = None
    other_key: str | None = None
    other_row: int = -1
    distance: int | None = None

    @property
    def defect(self) -> bool:
        return FINDING_KINDS[self.kind][0]

    def line(self) -> dict[str, Any]:
        """As it is printed: ``kind, defect, shard, key, reason, other, other_shard, other_key, distance``."""
        shown = ("kind", "defect", "shard", "key", "reason", "other", "other_shard", "other_key", "distance")
        return {name: getattr(self, name) for name in shown}


@dataclass
class ScannedPart:
    """A piece of what is checked that opens or fails by itself: a local shard, or the whole of any other source."""

    source: Source
    name: str | None = None
    """Of a local shard, among all that are checked."""
    start: int = 0
    """The row of its first sample."""

    @property
    def shards(self) -> Shards | None:
        return getattr(self.source, "shards", None)

    def place(self, i: int) -> tuple[str | None, str]:
        """Shard (None where there are none) and key of sample `i` of this part."""
        if self.shards is None:
            return None, self.source.key(i)
        number, row = self.shards.locate(i)
        return self.name or self.shards.names[number], self.shards.index_of(number).key(row)


def open_parts(spec: str, **columns: Any) -> tuple[list[ScannedPart], list[Finding]]:
    """Open whatever `clipkit.data.sources.open_source` opens, local shards one by one.

    Args:
        spec: a folder of images, a list, or shards.
        columns: of a list, as `open_source` takes them: ``image_column``, ``caption_column`` and ``image_root``.

    Returns:
        The parts that can be read, and what is wrong with shards as a whole.

    Raises:
        ClipkitError: where nothing is there.
    """
    findings: list[Finding] = []
    parts: list[ScannedPart] = []
    if is_remote(spec) or not is_shard_spec(spec):
        parts.append(ScannedPart(open_source(spec, **columns)))
        if (shards := parts[0].shards) is not None:  # remote ones, which are known by their indexes alone
            findings += [Finding(kind, name, key, why) for name, (kind, key, why) in index_problems(shards)]
    else:
        named = named_shards(spec)
        names = shard_names([tar for tar, _ in named])
        for (tar, record), name in progress(zip(named, names, strict=True), "shards", len(named), "shards"):
            shards, problems = open_shard(tar, record)
            findings += [Finding(kind, name, key, why) for kind, key, why in problems]
            if shards is not None and len(shards):
                parts.append(ScannedPart(ShardSource(str(tar), shards), name))
    start = 0
    for part in parts:
        part.start = start
        start += len(part.source)
    return parts, findings


class _Look(NamedTuple):
    """What one sample shows."""

    findings: list[tuple[str, str]] = []  # noqa: RUF012  (never changed)
    captions: tuple[str, ...] = ()
    digest: bytes = b""
    bytes: int = 0
    width: int = 0
    height: int = 0
    read: bool = False
    looks: Any = None


_Placed = tuple[ScannedPart, int, _Look]  # with the part and the row there


def _look(part: ScannedPart, i: int, quick: bool, captioned: bool) -> _Look:
    try:
        sample = part.source[i]
    except BadSample as error:
        text = re.search(r"UTF-8|\.json member", str(error))
        return _Look([("caption_broken" if text else "sample_unreadable", str(error))])
    findings: list[tuple[str, str]] = []
    if captioned and not sample.captions:
        present = part.shards is not None and {"txt", "json"} & part.shards.members(i).keys()
        findings.append(
            ("caption_empty", "the caption is empty") if present else ("caption_missing", "the sample has no caption")
        )
    try:
        data = sample.read()
    except BadSample as error:
        return _Look([*findings, ("image_missing", str(error))], sample.captions)
    key = hashlib.blake2b(data, digest_size=16).digest()
    width = height = 0
    looks = None
    try:
        if quick:
            _, width, height = identify(data)
        else:
            image = decode(data)
            width, height = image.size
            looks = looks_of(image)
    except BadSample as error:
        kind = "image_too_large" if "exceed the limit" in str(error) else "image_broken"
        findings.append((kind if data else "image_empty", str(error)))
    return _Look(findings, sample.captions, key, len(data), width, height, width > 0, looks)


@dataclass
class Scan:
    """What one pass has found."""

    spec: str
    parts: list[ScannedPart]
    samples: np.ndarray
    """Of dtype `SAMPLE`: digest of the image's bytes, perceptual hash, bytes, width, height, whether the image could be
    read, whether it is flat (its hash says nothing), coarse colours."""
    captions: np.ndarray
    """Of dtype `CAPTION`: hash of the text without case and spacing, row of the sample, tokens (0 if not counted)."""
    findings: list[Finding]
    quick: bool
    _starts: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self._starts = np.array([part.start for part in self.parts], np.int64)

    def __len__(self) -> int:
        return len(self.samples)

    def locate(self, row: int) -> tuple[ScannedPart, int]:
        """The part that a sample stands in, and its row there."""
        part = self.parts[int(np.searchsorted(self._starts, row, side="right")) - 1]
        return part, row - part.start

    def place(self, row: int) -> tuple[str | None, str]:
        """Shard (None where there are none) and key of a sample."""
        part, i = self.locate(row)
        return part.place(i)

    def sample(self, row: int) -> Sample:
        """The sample itself, read again."""
        part, i = self.locate(row)
        return part.source[i]

    def unusable(self) -> dict[int, str]:
        """Rows of samples that cannot be trained on, with the reason."""
        reasons: dict[int, str] = {}
        for finding in self.findings:
            if finding.row >= 0 and finding.kind in UNUSABLE:
                before = f"{reasons[finding.row]}; " if finding.row in reasons else ""
                reasons[finding.row] = before + finding.reason
        return reasons

    def keep_defects(self) -> None:
        """Store beside each shard what cannot be trained on, so that training leaves it out of its plan."""
        defects: dict[tuple[int, int], dict[str, str]] = {}
        for row, reason in self.unusable().items():
            part, i = self.locate(row)
            if part.shards is not None:
                number, _ = part.shards.locate(i)
                defects.setdefault((part.start, number), {})[part.place(i)[1]] = reason
        for part in self.parts:
            if (shards := part.shards) is not None:
                for number in range(len(shards.tars)):
                    shards.keep_defects(number, defects.get((part.start, number), {}))


def scan(
    spec: str,
    options: CheckOptions | None = None,
    *,
    captions: bool = True,
    count_tokens: Callable[[list[str]], list[int]] | None = None,
    **columns: Any,
) -> Scan:
    """Read every sample of a source once.

    Args:
        spec: what `open_parts` takes, with its `columns`.
        options: how; those of `CheckOptions` when not given.
        captions: whether captions count: those of shards must be there, those of another source where it has any.
        count_tokens: texts to their numbers of tokens.

    Raises:
        ClipkitError: where nothing is there.
    """
    options = options or CheckOptions()
    parts, findings = open_parts(spec, **columns)
    total = sum(len(part.source) for part in parts)
    samples = np.zeros(total, SAMPLE)
    blocks: list[np.ndarray] = [np.zeros(0, CAPTION)]
    waiting: list[tuple[int, str]] = []

    def count() -> None:
        block = np.zeros(len(waiting), CAPTION)
        texts = [text for _, text in waiting]
        block["row"] = [row for row, _ in waiting]
        block["text"] = [text_hash(text) for text in texts]
        block["tokens"] = count_tokens(texts) if count_tokens else 0
        blocks.append(block)
        waiting.clear()

    looks = _looks(parts, options.quick, captions, options.threads or cores())
    for part, i, look in progress(looks, f"check {spec}", total, "samples"):
        row = part.start + i
        record = samples[row]
        if look.digest:
            record["digest"] = np.frombuffer(look.digest, "u8")
        record["bytes"], record["width"], record["height"] = look.bytes, look.width, look.height
        record["read"] = look.read
        if look.looks is not None:
            record["hash"], record["colours"] = look.looks.hash, look.looks.colours
            record["flat"] = look.looks.contrast < FLAT_BELOW
        if look.findings:
            findings += [Finding(kind, *part.place(i), why, row) for kind, why in look.findings]
        if captions:
            waiting += [(row, text) for text in look.captions]
            if len(waiting) >= CAPTIONS_AT_ONCE:
                count()
    count()
    return Scan(spec, parts, samples, np.concatenate(blocks), findings, options.quick)


def _looks(parts: Sequence[ScannedPart], quick: bool, captions: bool, threads: int) -> Iterator[_Placed]:
    """What each sample shows, in order: its part, its row there, its looks."""

    def task(place: tuple[ScannedPart, int]) -> list[_Placed]:
        part, first = place
        rows = range(first, min(first + TASK, len(part.source)))
        wanted = captions and (part.shards is not None or part.source.has_captions)
        return [(part, i, _look(part, i, quick, wanted)) for i in rows]

    places = ((part, first) for part in parts for first in range(0, len(part.source), TASK))
    for placed in in_threads(task, places, threads, ahead=4 * threads):
        yield from placed

"""What is wrong with a set: duplicates within it, samples it shares with others, captions that are cut, and figures."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clipkit.data.check.perceptual_hash import near_duplicates, nearest
from clipkit.data.check.scanning import FINDING_KINDS, CheckOptions, Finding, Scan, text_hash

__all__ = ["FIGURES", "Verdict", "judge"]

FREQUENT = 20  # captions that are shown

# The figures of a check under their stable names; after them comes a count for each of `FINDING_KINDS`.
FIGURES = {
    "shards": "shards that could be read",
    "samples": "samples in them",
    "captions": "captions",
    "bytes": "bytes of images",
    "images_read": "images that could be read",
    "defects": "findings that are defects, all kinds together",
    "flat_images": "even surfaces, which are not compared by their looks",
    "duplicate_captions": "captions (without case and spacing) that several images have",
    "samples_with_duplicate_captions": "samples with such a caption",
    "captions_cut": "captions longer than the model's context, which cuts them",
    "context_length": "tokens in the model's context",
    "tokens_mean": "tokens per caption, beginning and end among them",
    "tokens_median": "the median",
    "tokens_max": "the longest",
    "width_min": "pixels of the narrowest image",
    "width_median": "the median",
    "width_max": "the widest",
    "height_min": "pixels of the lowest image",
    "height_median": "the median",
    "height_max": "the highest",
}


@dataclass
class Verdict:
    """What a check says."""

    figures: dict[str, Any]
    """Plain numbers under the names of `FIGURES` and of the kinds; None where nothing was measured."""
    findings: list[Finding]
    frequent_captions: list[dict[str, Any]]
    """``caption, samples``: the captions that most images have, at most `FREQUENT` of them."""
    against: list[dict[str, Any]]
    """For each set checked against: ``source, samples, unreadable, shared``."""
    strict: bool = False
    left_out: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Rows that a clean copy leaves out, with ``key, kind, reason`` for its ledger."""

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong; under `strict` notes, duplicate captions and captions that are cut count too."""
        counted = ("duplicate_captions", "captions_cut")
        return not self.figures["defects"] and not (
            self.strict and (self.findings or any(self.figures[name] for name in counted))
        )


def judge(
    mine: Scan,
    others: Sequence[Scan] = (),
    options: CheckOptions | None = None,
    *,
    context_length: int | None = None,
) -> Verdict:
    """Compare the samples of a scan with one another and with other sets.

    Args:
        mine: the set that is judged.
        others: sets that must share no image with it.
        options: how, by which the sets were scanned; those of `CheckOptions` when not given.
        context_length: tokens that the model keeps; None where tokens were not counted.
    """
    options = options or CheckOptions()
    findings = [*mine.findings, *_keys_in_several_shards(mine)]
    first = _exact(mine)
    findings += [_pair("duplicate", mine, row, mine, first[row], 0) for row in np.flatnonzero(first >= 0).tolist()]
    findings += _near(mine, first, options.near)
    against = []
    for other in others:
        shared = _shared(mine, other, options.near)
        findings += shared
        unreadable = int((~other.samples["read"]).sum())
        problems = sum(finding.row < 0 and finding.defect for finding in other.findings)
        numbers = {"samples": len(other), "unreadable": unreadable + problems, "shared": len(shared)}
        against.append({"source": other.spec, **numbers})
    frequent, of_captions = _captions(mine, context_length)
    figures = _figures(mine, findings, of_captions)
    return Verdict(figures, findings, frequent, against, options.strict, _left_out(mine, findings, options.strict))


def _figures(mine: Scan, findings: Sequence[Finding], of_captions: dict[str, Any]) -> dict[str, Any]:
    count = Counter(finding.kind for finding in findings)
    sizes = mine.samples[mine.samples["read"]]
    return {
        "shards": sum(len(part.shards.tars) for part in mine.parts if part.shards is not None),
        "samples": len(mine),
        "captions": len(mine.captions),
        "bytes": int(mine.samples["bytes"].sum(dtype=np.int64)),
        "images_read": len(sizes),
        "defects": sum(finding.defect for finding in findings),
        "flat_images": int(mine.samples["flat"].sum()),
        **of_captions,
        **_spread("width", sizes["width"]),
        **_spread("height", sizes["height"]),
        **{kind: count[kind] for kind in FINDING_KINDS},
    }


def _left_out(mine: Scan, findings: Sequence[Finding], strict: bool) -> dict[int, dict[str, Any]]:
    """Rows that a clean copy leaves out, each for the first reason that was found."""
    unusable = mine.unusable()
    dropped = {"duplicate", "shared", *(["near_duplicate"] if strict else [])}
    left_out: dict[int, dict[str, Any]] = {}
    for finding in findings:
        row = finding.row
        if row >= 0 and row not in left_out and (row in unusable or finding.kind in dropped):
            left_out[row] = {"key": finding.key, "kind": finding.kind, "reason": unusable.get(row, finding.reason)}
    return left_out


def _spread(name: str, values: np.ndarray) -> dict[str, Any]:
    if not len(values):
        return dict.fromkeys((f"{name}_min", f"{name}_median", f"{name}_max"))
    return {
        f"{name}_min": int(values.min()),
        f"{name}_median": float(np.median(values)),
        f"{name}_max": int(values.max()),
    }


def _pair(kind: str, mine: Scan, row: int, other: Scan, other_row: int, distance: int, exact: bool = True) -> Finding:
    """A finding that names two samples."""
    shard, key = mine.place(row)
    other_shard, other_key = other.place(other_row)
    there = other_key if other_shard is None else f"{other_shard} {other_key}"
    source = "" if mine is other else f" of {other.spec}"
    like = "the same bytes as" if exact else f"looks like ({distance} of 64 bits differ)"
    name = None if mine is other else other.spec
    return Finding(kind, shard, key, f"{like} {there}{source}", row, name, other_shard, other_key, other_row, distance)


def _unusable(mine: Scan) -> np.ndarray:
    unusable = np.zeros(len(mine), bool)
    unusable[list(mine.unusable())] = True
    return unusable


def _exact(mine: Scan) -> np.ndarray:
    """For each sample the row of the one with the same bytes that stays, or -1 where it is that one itself; int64.

    The first stays, and one that can be trained on before one that cannot.
    """
    rows = np.flatnonzero(mine.samples["read"])
    rows = rows[np.argsort(_unusable(mine)[rows], kind="stable")]
    digests = mine.samples["digest"][rows]
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable
    ordered = digests[order]
    begins = np.ones(len(rows), bool)
    begins[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    heads = rows[order][begins]
    first = np.full(len(mine), -1)
    first[rows[order]] = np.where(begins, -1, heads[np.cumsum(begins) - 1])
    return first


def _comparable(scan: Scan) -> np.ndarray:
    """Whether a picture's looks say something; bool ``[n]``."""
    return scan.samples["read"] & ~scan.samples["flat"] & (not scan.quick)


def _near(mine: Scan, first: np.ndarray, distance: int) -> list[Finding]:
    rows = np.flatnonzero(_comparable(mine) & (first < 0) & ~_unusable(mine))
    hashes = mine.samples["hash"][rows]
    kept = near_duplicates(hashes, mine.samples["colours"][rows], distance)
    bits = np.bitwise_count(hashes ^ hashes[kept])
    return [
        _pair("near_duplicate", mine, int(rows[i]), mine, int(rows[kept[i]]), int(bits[i]), exact=False)
        for i in np.flatnonzero(kept != np.arange(len(rows))).tolist()
    ]


def _shared(mine: Scan, other: Scan, distance: int) -> list[Finding]:
    """One finding for each of my samples that the other set has too, with the nearest one there."""
    here, there = np.flatnonzero(mine.samples["read"]), np.flatnonzero(other.samples["read"])
    both = np.concatenate([other.samples["digest"][there], mine.samples["digest"][here]])
    _, first, inverse = np.unique(both, axis=0, return_index=True, return_inverse=True)
    first = first[inverse.ravel()][len(there) :]  # theirs stand before mine
    exact = np.zeros(len(mine), bool)
    exact[here[first < len(there)]] = True
    findings = [
        _pair("shared", mine, int(row), other, int(there[at]), 0)
        for row, at in zip(here, first, strict=True)
        if at < len(there)
    ]
    rows, theirs = np.flatnonzero(_comparable(mine) & ~exact), np.flatnonzero(_comparable(other))
    near, bits = nearest(
        mine.samples["hash"][rows],
        mine.samples["colours"][rows],
        other.samples["hash"][theirs],
        other.samples["colours"][theirs],
        distance,
    )
    for i in np.flatnonzero(near >= 0).tolist():
        findings.append(_pair("shared", mine, int(rows[i]), other, int(theirs[near[i]]), int(bits[i]), exact=False))
    return sorted(findings, key=lambda finding: finding.row)


def _keys_in_several_shards(mine: Scan) -> list[Finding]:
    numbers = [part.shards for part in mine.parts if part.shards is not None]
    if sum(len(shards.tars) for shards in numbers) < 2:
        return []
    hashes = np.zeros(len(mine), np.int64)
    for part in mine.parts:
        if part.shards is not None:
            keys = (k for n in range(len(part.shards.tars)) for k in part.shards.index_of(n).table["key"].to_pylist())
            hashes[part.start : part.start + len(part.source)] = np.fromiter((hash(k) for k in keys), np.int64)
    _, index, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    findings = []
    for row in np.flatnonzero(index[inverse] != np.arange(len(mine))).tolist():
        before = int(index[inverse[row]])
        (shard, key), (other_shard, other_key) = mine.place(row), mine.place(before)
        if shard != other_shard and key == other_key:
            reason = f"{other_shard} has a sample of this key too"
            findings.append(
                Finding("key_in_other_shard", shard, key, reason, row, None, other_shard, other_key, before)
            )
    return findings


def _captions(mine: Scan, context_length: int | None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The captions that most samples have, and the figures."""
    pairs = np.unique(mine.captions[["text", "row"]])  # one image may say the same twice
    _, index, inverse, count = np.unique(pairs["text"], return_index=True, return_inverse=True, return_counts=True)
    often = np.flatnonzero(count > 1)
    top = often[np.argsort(-count[often], kind="stable")][:FREQUENT]
    frequent = [
        {"caption": _text_of(mine, int(pairs["row"][index[i]]), int(pairs["text"][index[i]])), "samples": int(count[i])}
        for i in top
    ]
    tokens = mine.captions["tokens"]
    counted = context_length is not None and len(tokens) > 0
    return frequent, {
        "duplicate_captions": len(often),
        "samples_with_duplicate_captions": len(np.unique(pairs["row"][(count > 1)[inverse]])),
        "captions_cut": int((tokens > context_length).sum()) if counted else 0,
        "context_length": context_length,
        "tokens_mean": float(tokens.mean()) if counted else None,
        "tokens_median": float(np.median(tokens)) if counted else None,
        "tokens_max": int(tokens.max()) if counted else None,
    }


def _text_of(mine: Scan, row: int, wanted: int) -> str:
    return next((text for text in mine.sample(row).captions if text_hash(text) == wanted), "")

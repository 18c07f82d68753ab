"""Pictures that look alike: a 64-bit hash of what a picture shows, and pairs of hashes that differ in few bits.

The hash is pHash (Zauner 2010, "Implementation and benchmarking of perceptual image hash functions", as the ImageHash
library computes it): 32x32 grey pixels, their discrete cosine transform, and for each of the 8x8 lowest frequencies
whether it lies above the median; here it must do so by a margin, since in symmetric drawings half of them are zero but
for rounding. The hash does not see colour, so two pictures must also agree in 4x4 coarse colours.

Pairs are found by multi-index hashing (Norouzi, Punjani, Fleet 2012): whoever differs in at most `d` of 64 bits differs
in few bits of at least one of four bands, so only samples that meet in a band's table are compared.
"""

from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple

import numpy as np
from PIL import Image

__all__ = [
    "COARSE",
    "FLAT_BELOW",
    "MAX_DISTANCE",
    "Looks",
    "colours_agree",
    "looks_of",
    "near_duplicates",
    "near_pairs",
    "nearest",
]

HASH_SIDE = 32  # of the picture that is transformed
BIT_MARGIN = 8.0  # a wave of half a grey level; finds 99.8 % of drawings that were compressed again instead of 95 %
COARSE = 4 * 4 * 3  # numbers of the coarse colours
# Below this contrast a picture is an even surface: its hash is noise, and all even surfaces would be one another's
# duplicates. Photos have 7 grey levels and more, drawings on white likewise; an even surface after JPEG has 0.3.
FLAT_BELOW = 2.0
# In grey levels, after an even change of brightness is taken out. Copies that were resized, compressed again or made
# 15 % brighter stay below 9; of different drawings with one hash, such as hearts in many colours, half lie above.
MAX_COLOUR_DIFFERENCE = 10.0
MAX_DISTANCE = 12  # more bits than that, and different photos are as near as copies

BANDS, BAND_BITS = 4, 16
CANDIDATES_AT_ONCE = 1 << 21  # candidates compared at a time: some 50 MB


class Looks(NamedTuple):
    """What is kept of a picture to find it again."""

    hash: int
    """64 bits."""
    colours: np.ndarray
    """uint8 ``[48]``: 4x4 mean colours, RGB."""
    contrast: float
    """The standard deviation of the low frequencies, in grey levels of 255."""


def _dct_rows() -> np.ndarray:
    """The 8 lowest rows of the orthonormal DCT-II matrix of order 32."""
    frequency, place = np.arange(8)[:, None], np.arange(HASH_SIDE)[None, :]
    rows = np.sqrt(2 / HASH_SIDE) * np.cos(np.pi * frequency * (2 * place + 1) / (2 * HASH_SIDE))
    rows[0] /= np.sqrt(2)
    return rows.astype(np.float32)


DCT = _dct_rows()


def looks_of(image: Image.Image) -> Looks:
    """Hash, coarse colours and contrast of one RGB picture of any size."""
    small = image.resize((HASH_SIDE, HASH_SIDE), Image.Resampling.BOX)
    grey = np.asarray(small.convert("L"), np.float32)
    low = (DCT @ grey @ DCT.T).ravel()
    bits = np.packbits(low > np.median(low) + BIT_MARGIN)
    cells = np.asarray(small, np.float32).reshape(4, HASH_SIDE // 4, 4, HASH_SIDE // 4, 3).mean(axis=(1, 3))
    contrast = float(np.sqrt(np.square(low[1:]).sum()) / HASH_SIDE)
    return Looks(int.from_bytes(bits.tobytes(), "big"), np.round(cells).astype(np.uint8).ravel(), contrast)


def colours_agree(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Whether coarse colours, uint8 ``[n, 48]`` each, differ by little more than brightness: bool ``[n]``."""
    difference = one.astype(np.float32) - other
    difference -= difference.mean(axis=-1, keepdims=True)
    return np.abs(difference).mean(axis=-1) <= MAX_COLOUR_DIFFERENCE


def near_pairs(
    one: np.ndarray, other: np.ndarray, distance: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Every pair of hashes that differ in at most `distance` bits, in blocks; a pair may come more than once.

    Args:
        one: uint64 ``[n]``.
        other: uint64 ``[m]``.
        distance: 0 to `MAX_DISTANCE`.

    Yields:
        Rows of `one`, rows of `other`, and the number of bits in which they differ: int64 ``[k]`` each. The work grows
        with the product ``n * m`` divided by the 65,536 cells of a band, times 17 cells per band for a distance of 7.
    """
    for band in range(BANDS):
        # Whoever has more than r_b differing bits in each band b differs in more than sum(r_b + 1) - 1 altogether.
        radius = (distance + 1) // BANDS + (band < (distance + 1) % BANDS) - 1
        if radius < 0:
            continue
        shift = np.uint64(band * BAND_BITS)
        mine = (one >> shift).astype(np.uint16)
        theirs = (other >> shift).astype(np.uint16)
        order = np.argsort(theirs, kind="stable")
        starts = np.searchsorted(theirs[order], np.arange((1 << BAND_BITS) + 1))
        for flipped in _masks(radius):
            cell = (mine ^ np.uint16(flipped)).astype(np.int64)
            yield from _compare(one, other, starts[cell], starts[cell + 1], order, distance)


def _masks(radius: int) -> Iterator[int]:
    for count in range(radius + 1):
        for places in combinations(range(BAND_BITS), count):
            yield sum(1 << place for place in places)


def _compare(
    one: np.ndarray, other: np.ndarray, first: np.ndarray, end: np.ndarray, order: np.ndarray, distance: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Row `i` of `one` with the rows ``order[first[i]:end[i]]`` of `other`, `CANDIDATES_AT_ONCE` at a time."""
    asking = np.flatnonzero(end > first)
    total = np.concatenate([[0], np.cumsum((end - first)[asking])])
    for begin in range(0, int(total[-1]), CANDIDATES_AT_ONCE):
        wanted = np.arange(begin, min(begin + CANDIDATES_AT_ONCE, int(total[-1])))
        lo = np.searchsorted(total, begin, "right") - 1
        hi = np.searchsorted(total, wanted[-1], "right")
        which = lo + np.repeat(np.arange(hi - lo), np.diff(np.clip(total[lo : hi + 1], begin, wanted[-1] + 1)))
        rows = asking[which]
        candidates = order[first[rows] + (wanted - total[which])]
        differing = np.bitwise_count(one[rows] ^ other[candidates])
        near = np.flatnonzero(differing <= distance)
        if len(near):
            yield rows[near], candidates[near], differing[near].astype(np.int64)


def nearest(
    hashes: np.ndarray, colours: np.ndarray, known: np.ndarray, known_colours: np.ndarray, distance: int
) -> tuple[np.ndarray, np.ndarray]:
    """For each picture the nearest of a set of known ones.

    Args:
        hashes: uint64 ``[n]``, with `colours` uint8 ``[n, 48]``.
        known: uint64 ``[m]``, with `known_colours` uint8 ``[m, 48]``.
        distance: the most bits in which two near pictures differ.

    Returns:
        The row of the nearest known picture (the first of several) or -1, and its distance: int64 ``[n]`` each.
    """
    # One number orders candidates by distance, then by row, so that the running minimum is a single ufunc.
    best = np.full(len(hashes), np.iinfo(np.int64).max)
    for mine, theirs, differing in near_pairs(hashes, known, distance):
        agree = colours_agree(colours[mine], known_colours[theirs])
        np.minimum.at(best, mine[agree], (differing[agree] << 48) | theirs[agree])
    has_near = best != np.iinfo(np.int64).max
    return np.where(has_near, best & ((1 << 48) - 1), -1), np.where(has_near, best >> 48, 0)


def near_duplicates(hashes: np.ndarray, colours: np.ndarray, distance: int) -> np.ndarray:
    """Which pictures are near to one before them: all but the first of each group of near ones.

    Pictures of one hash are gathered first, so that a placeholder that stands in a set 100,000 times costs as many
    comparisons, not their square. Then each picture is held against the kept ones before it.

    Args:
        hashes: uint64 ``[n]``.
        colours: uint8 ``[n, 48]``.
        distance: the most bits in which two near pictures differ.

    Returns:
        int64 ``[n]``: the row of the kept picture that stands for this one; its own row where it is kept. No two kept
        pictures are near, and each differs from the one that stands for it in at most `distance` bits.
    """
    kept = np.arange(len(hashes))
    order = np.argsort(hashes, kind="stable")
    edges = np.flatnonzero(np.diff(hashes[order])) + 1
    for group in np.split(order, edges):
        while len(group) > 1:
            agree = colours_agree(colours[group[1:]], colours[group[:1]])
            kept[group[1:][agree]] = group[0]
            group = group[1:][~agree]
    rows = np.flatnonzero(kept == np.arange(len(hashes)))
    pairs = [np.zeros((0, 3), np.int64)]
    for one, other, differing in near_pairs(hashes[rows], hashes[rows], distance):
        earlier = one < other
        first, second, differing = rows[one[earlier]], rows[other[earlier]], differing[earlier]
        agree = colours_agree(colours[first], colours[second])
        pairs.append(np.stack([second, differing, first], axis=1)[agree])
    for second, _, first in np.unique(np.concatenate(pairs), axis=0).tolist():
        # Sorted by the later picture: whether the earlier one is kept is settled by now.
        if kept[second] == second and kept[first] == first:
            kept[second] = first
    return kept[kept]

"""The samples of a training run and which of them stands at each position: the plan that ranks and workers divide.

What the shards' indexes and an earlier check already know to be unusable is left out of the plan before it starts, and
the plan remembers that: a check that is made while a run is stopped does not change the order of what it resumes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from clipkit.core import BadSample, ClipkitError
from clipkit.data.shards import Shards, Spool, captions_of, image_extension, keys_repeat, shard_names
from clipkit.data.sources import sample_id
from clipkit.storage import digest
from clipkit.training.batches.order import Mixture, Order
from clipkit.training.settings import DataConfig

__all__ = ["MISSING_HINT", "REMOTE_WINDOW", "Incomplete", "TrainData", "TrainSet", "pick"]

REMOTE_WINDOW = 65_536
MISSING_HINT = "mend it, or set data.missing=skip to leave such samples out"


class Incomplete(BadSample):
    """A sample without image or caption, which `DataConfig.missing` decides about."""


class TrainData(Protocol):
    """What the loader asks of training data, be it indexed shards (`TrainSet`) or a stream."""

    size: int | None
    """Samples in an epoch; None where nobody knows."""
    window: int | None
    """How many samples are shuffled among each other; None for all of them."""
    replacement: bool
    """Whether each sample is drawn from all of them."""
    excluded: list[list[int]]
    """What is left out of the plan: indices in each set of shards."""
    left_out: list[dict[str, Any]]
    """Ledger lines of these; empty where they were given."""

    def identity(self) -> str:
        """A hash of all that decides the sequence, apart from the seed."""
        ...

    def first(self, positions: Sequence[int]) -> list[Any]:
        """References to the samples at these positions, which must come in rising order where data is a stream."""
        ...

    def other(self, reference: Any, rng: np.random.Generator) -> Any:
        """A reference to a sample that stands in for one that cannot be used."""
        ...

    def read(self, reference: Any) -> dict[str, bytes]:
        """The members of a sample, extension to bytes."""
        ...

    def name(self, reference: Any) -> tuple[str, str]:
        """The shard and the key of a sample."""
        ...

    def image_id(self, reference: Any) -> int:
        """The 63-bit id of a sample."""
        ...

    def drain(self) -> list[dict[str, Any]]:
        """Ledger lines of what was passed over since the last call."""
        ...


class _At(NamedTuple):
    part: int  # number of the set of shards
    row: int  # of the sample in it
    position: int  # in the whole sequence


@dataclass
class _Part:
    shards: Shards
    excluded: np.ndarray  # sorted indices of samples that are not used

    def __post_init__(self) -> None:
        ends = np.searchsorted(self.excluded, self.shards.ends)
        self.sizes = np.diff(self.shards.ends - ends, prepend=0)
        self._shift = self.excluded - np.arange(len(self.excluded))

    def index(self, usable: np.ndarray) -> np.ndarray:
        """Indices in the shards of the samples with these numbers among the usable ones."""
        return usable + np.searchsorted(self._shift, usable, side="right")


class TrainSet:
    """Indexed shards, one set of them or several, as one endless sequence.

    Args:
        parts: the sets of shards.
        config: weights, window, replacement, policy.
        seed: chooses the order.
        excluded: for each part the sorted indices of samples to leave out; worked out where not given.

    Raises:
        ClipkitError: where nothing can be used, or too much cannot.
    """

    def __init__(self, parts: Sequence[Shards], config: DataConfig, seed: int, excluded: list[list[int]] | None = None):
        self.left_out: list[dict[str, Any]] = []
        """Ledger lines of what is left out of the plan."""
        if excluded is None:
            excluded = [self._unusable(shards, config) for shards in parts]
        self.excluded = excluded
        self._parts = [_Part(s, np.array(e, np.int64)) for s, e in zip(parts, excluded, strict=True)]
        weights = [part.weight for part in config.parts]
        self.weights = [float(w) for w in weights if w is not None] or None
        remote = any(shards.spool for shards in parts)
        self.window = config.window or (REMOTE_WINDOW if remote else None)
        self.replacement = config.replacement
        together = [list(range(len(parts)))]
        self._groups = [[number] for number in range(len(parts))] if self.weights else together
        self._orders = [
            Order(
                np.concatenate([self._parts[number].sizes for number in group]),
                # A sequence of its own for each, or sets of one size would be shuffled alike.
                seed if len(self._groups) == 1 else sample_id(f"{seed} {at}"),
                window=self.window,
                replacement=config.replacement,
            )
            for at, group in enumerate(self._groups)
        ]
        # Where the samples of each part begin among its group's, and of groups with a window which shard is whose.
        sizes = [[int(self._parts[number].sizes.sum()) for number in group] for group in self._groups]
        self._starts = [np.cumsum([0, *of_group])[:-1] for of_group in sizes]
        self._owners = [
            [(number, shard) for number in group for shard in range(len(self._parts[number].sizes))] if remote else []
            for group in self._groups
        ]
        self._mixture = Mixture(self.weights, seed) if self.weights else None
        self.size: int | None = sum(order.size for order in self._orders)
        self._shard_names = _names_together(parts) if len(parts) > 1 and keys_repeat(parts) else None
        self._check(config)

    def _unusable(self, shards: Shards, config: DataConfig) -> list[int]:
        found: list[int] = []
        self.left_out += shards.problems
        for number, tar in enumerate(shards.tars):
            index = shards.index_of(number)
            reasons = dict.fromkeys(index.without_text, "the sample has no caption")
            reasons |= dict.fromkeys(index.without_image, "the sample has no image")
            if reasons and config.missing == "stop":
                row, reason = next(iter(sorted(reasons.items())))
                raise ClipkitError(f"{tar}: {index.key(row)}: {reason}; {MISSING_HINT}")
            defects = shards.defects(number)
            if defects:
                rows = {key: row for row, key in enumerate(index.table["key"].to_pylist())}
                reasons |= {rows[key]: reason for key, reason in defects.items() if key in rows}
            start = int(shards.ends[number]) - len(index)
            for row, reason in sorted(reasons.items()):
                found.append(start + row)
                self.left_out.append({"shard": shards.names[number], "key": index.key(row), "reason": reason})
        return found

    def _check(self, config: DataConfig) -> None:
        for part, about in zip(self._parts, config.parts, strict=True):
            usable, all_of_them = int(part.sizes.sum()), len(part.shards)
            place = "it is empty"
            if len(part.excluded):
                first = int(part.excluded[0])
                place = f"the first is {part.shards.key(first)!r} in {part.shards.tar_of(first).name}"
            if not usable:
                raise ClipkitError(f"no sample of {about.shards} can be used; {place}")
            if all_of_them - usable > config.max_bad_share * all_of_them:
                raise ClipkitError(
                    f"{all_of_them - usable:,} of {all_of_them:,} samples of {about.shards} cannot be used, more than "
                    f"data.max_bad_share={config.max_bad_share:g} allows; {place}"
                )

    def identity(self) -> str:
        """A hash of all that decides the sequence, apart from the seed."""
        order = [self.weights, self.window, self.replacement]
        return digest([[part.shards.identity() for part in self._parts], self.excluded, order])

    def first(self, positions: Sequence[int]) -> list[_At]:
        """The samples at these positions; remote shards that come next are fetched ahead."""
        at = np.asarray(positions, np.int64)
        which, local = self._mixture.at(at) if self._mixture else (np.zeros_like(at), at)
        found: list[_At | None] = [None] * len(at)
        for group in np.unique(which):
            chosen = np.flatnonzero(which == group)
            usable = self._orders[group].at(local[chosen])
            for place, part, index in zip(chosen, *self._split(int(group), usable), strict=True):
                found[place] = _At(int(part), int(index), int(at[place]))
            self._read_ahead(int(group), int(local[chosen[0]]))
        return [place for place in found if place is not None]

    def _split(self, group: int, usable: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        starts, numbers = self._starts[group], self._groups[group]
        which = np.searchsorted(starts, usable, side="right") - 1
        index = np.empty_like(usable)
        for at, number in enumerate(numbers):
            mine = which == at
            index[mine] = self._parts[number].index(usable[mine] - starts[at])
        return np.array(numbers)[which], index

    def _read_ahead(self, group: int, position: int) -> None:
        owners, order = self._owners[group], self._orders[group]
        if self.window is None or not owners:
            return
        coming: dict[Spool, list[Path]] = {}
        held = 0
        for number in islice(order.shards_from(position), len(owners)):
            part, shard = owners[number]
            shards = self._parts[part].shards
            if shards.spool is not None:
                coming.setdefault(shards.spool, []).append(shards.tars[shard])
            held += int(order.sizes[number])
            if held > 2 * self.window:
                break
        for spool, tars in coming.items():
            spool.ahead(tars)

    def other(self, reference: _At, rng: np.random.Generator) -> _At:
        """A sample drawn to stand in: from the same set of shards, and from the same window where there is one."""
        at = np.array([reference.position])
        group, local = self._mixture.at(at) if self._mixture else (np.zeros(1, np.int64), at)
        usable = self._orders[int(group[0])].another(int(local[0]), rng)
        part, index = self._split(int(group[0]), np.array([usable]))
        return _At(int(part[0]), int(index[0]), reference.position)

    def read(self, reference: _At) -> dict[str, bytes]:
        """The members of the sample."""
        return self._parts[reference.part].shards[reference.row]

    def name(self, reference: _At) -> tuple[str, str]:
        """The shard and the key of the sample."""
        shards = self._parts[reference.part].shards
        shard = shards.names[shards.locate(reference.row)[0]]
        # Sets that are mixed may have shards of one name.
        return shard if len(self._parts) == 1 else str(shards.tar_of(reference.row)), shards.key(reference.row)

    def image_id(self, reference: _At) -> int:
        """The sample's id: what `clipkit.data.sources` says of it where one source names all these shards together."""
        shards = self._parts[reference.part].shards
        if len(self._parts) == 1:
            return sample_id(shards.key(reference.row))
        number, row = shards.locate(reference.row)
        key = shards.index_of(number).key(row)
        return sample_id(f"{self._shard_names[reference.part][number]}/{key}" if self._shard_names else key)

    def drain(self) -> list[dict[str, Any]]:
        """Nothing: what is left out of the plan is known from the start (`left_out`)."""
        return []


def _names_together(parts: Sequence[Shards]) -> list[list[str]]:
    """For each set what its shards are called in keys where one source names those of all sets."""
    names = iter(shard_names([tar.absolute() for shards in parts for tar in shards.tars]))
    return [[next(names).removesuffix(".tar") for _ in shards.tars] for shards in parts]


def pick(members: dict[str, bytes], config: DataConfig, rng: np.random.Generator) -> tuple[bytes, str]:
    """The image of a sample and the text that stands for it this time.

    Args:
        members: extension to bytes.
        config: how one of several captions is chosen, and templates.
        rng: draws.

    Raises:
        BadSample: where there is no image, no caption, no number per caption, or a template's column is missing.
    """
    extension = image_extension(members)
    if extension is None:
        raise Incomplete("the sample has no image")
    captions, columns = captions_of(members)
    if not captions:
        raise Incomplete("the sample has no caption")
    number = 0
    if config.caption_weights:
        weights = columns.get(config.caption_weights)
        try:
            share = np.asarray(weights, np.float64)
            number = int(rng.choice(len(captions), p=share / (share.sum() or np.nan)))
        except (TypeError, ValueError):
            raise BadSample(
                f"column {config.caption_weights!r} must hold a number per caption ({len(captions)}), got {weights!r}"
            ) from None
    elif config.caption == "random":
        number = int(rng.integers(len(captions)))
    text = captions[number]
    if config.templates:
        template = config.templates[int(rng.integers(len(config.templates)))]
        try:
            text = template.format_map({**columns, "caption": text})
        except KeyError as error:
            raise BadSample(f"the template {template!r} asks for column {error}, which the sample lacks") from None
        except (IndexError, ValueError, AttributeError) as error:
            raise BadSample(f"the template {template!r} does not fit the sample: {error}") from None
    return members[extension], text

"""Samples that are in shards already."""

from collections.abc import Collection
from functools import cached_property

from clipkit.core import ClipkitError, UnreadSample
from clipkit.data.shards import Shards, captions_of, image_extension, well_formed
from clipkit.data.sources.sample import Sample, Stamp, own_columns
from clipkit.storage import digest, hash_of

__all__ = ["ShardSource"]


class ShardSource:
    """The samples of webdataset shards, in shard order.

    Args:
        spec: names the shards.
        shards: these, where they are open already.
    """

    def __init__(self, spec: str, shards: Shards | None = None):
        self.spec = spec
        self.shards = Shards.open(spec) if shards is None else shards
        self.remote = False  # a shard is one request, whatever is read of it
        self.problems = [{**problem, "key": problem["key"] or problem["shard"]} for problem in self.shards.problems]
        self.has_captions = bool({"txt", "json"} & self.shards.extensions)

    def __len__(self) -> int:
        return len(self.shards)

    def key(self, i: int) -> str:
        return self.shards.key(i)

    def name(self, i: int) -> str:
        extension = image_extension(self.shards.members(i))
        return f"{self.shards.key(i)}.{extension}" if extension else self.shards.key(i)

    def place(self, i: int) -> None:
        return None

    def size(self, i: int) -> int:
        members = self.shards.members(i)
        extension = image_extension(members)
        return members[extension][1] if extension else 0

    def __getitem__(self, i: int) -> Sample:
        return self._sample(i, None)

    def without_image(self, i: int) -> Sample:
        return self._sample(i, ("txt", "json"))

    def _sample(self, i: int, wanted: Collection[str] | None) -> Sample:
        key = self.shards.key(i)
        try:
            members = self.shards.read(i, wanted)
        except ClipkitError as error:
            if self.shards.spool:
                raise  # the shard cannot be fetched; that its samples are bad is not known
            raise UnreadSample(str(error)) from error  # of a disk that fails; a shard that has changed has other stamps
        captions, columns = captions_of(members)
        extension = image_extension(members if wanted is None else self.shards.members(i))
        image = members.get(extension) if extension else None
        path = columns.pop("path", None)  # what clipkit pack was given
        path = key if path is None else well_formed(str(path))
        others = {ext: data for ext, data in members.items() if ext not in (extension, "txt", "json")}
        return Sample(key, image, extension or "", captions, {"path": path, **own_columns(columns)}, others)

    @cached_property
    def _contents(self) -> list[str]:
        return self.shards.contents()

    def stamp(self, i: int) -> Stamp:
        """By the shard's checksum or stamp, and the sample's place in it."""
        number, row = self.shards.locate(i)
        index = self.shards.index_of(number)
        members = index.members(row)
        # With the name: of two shards without checksums, size and time may be the same by chance.
        where = (self.shards.names[number], self._contents[number], index.key(row))
        extension = image_extension(members)
        image = hash_of(*where, extension, members[extension]) if extension else None
        return Stamp(image, hash_of(*where, self.key(i), members))

    def identity(self) -> str:
        """By content where our manifest has checksums, else by the shards' sizes and times."""
        return digest([self.shards.identity(), self._contents])

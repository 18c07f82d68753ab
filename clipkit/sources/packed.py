"""Samples that are in shards already."""

from clipkit.errors import BadSample, ClipkitError
from clipkit.shards import Shards, captions_of, image_extension
from clipkit.sources.base import Sample, own_columns

__all__ = ["ShardSource"]


class ShardSource:
    """The samples of webdataset shards, in shard order."""

    def __init__(self, spec: str):
        self.spec = spec
        self.shards = Shards.open(spec)
        self.remote = False  # a shard is one request, whatever is read of it
        self.has_captions = bool({"txt", "json"} & self.shards.extensions)

    def __len__(self) -> int:
        return len(self.shards)

    def key(self, i: int) -> str:
        return self.shards.key(i)

    def size(self, i: int) -> int:
        members = self.shards.members(i)
        extension = image_extension(members)
        return members[extension][1] if extension else 0

    def __getitem__(self, i: int) -> Sample:
        key = self.shards.key(i)
        try:
            members = self.shards[i]
        except ClipkitError as error:
            if self.shards.spool:
                raise  # the shard cannot be fetched; that its samples are bad is not known
            raise BadSample(str(error)) from error
        captions, columns = captions_of(members)
        extension = image_extension(members)
        image = members[extension] if extension else None
        path = columns.pop("path", key)  # what clipkit pack was given
        return Sample(key, image, extension or "", captions, {"path": path, **own_columns(columns)})

    def identity(self) -> str:
        return self.shards.identity()

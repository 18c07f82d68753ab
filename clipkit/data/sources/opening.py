"""Open a source by the string that names it: a folder of images, shards, or a list file, here or at a URL."""

from pathlib import Path, PurePosixPath

from clipkit.core import ClipkitError
from clipkit.data.shards import is_shard_spec
from clipkit.data.sources.folder import FolderSource
from clipkit.data.sources.globs import Globs, Selected
from clipkit.data.sources.list_file import ListSource
from clipkit.data.sources.sample import Source
from clipkit.data.sources.shards import ShardSource
from clipkit.data.sources.tables import LIST_SUFFIXES
from clipkit.images import IMAGE_SUFFIXES
from clipkit.storage import is_remote, list_files

__all__ = ["open_source"]


def open_source(
    spec: str | Path,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    image_root: str | Path | None = None,
    captions_required: bool = False,
    globs: Globs | None = None,
) -> Source:
    """Open a folder of images, shards (a folder, a tar or a brace pattern) or a list file.

    Args:
        spec: what to open: a path or a URL that fsspec knows. A list is csv, tsv, jsonl, parquet, or COCO's json.
        image_column: a list's column of image paths; found among the usual names when not given.
        caption_column: a list's column of captions; found likewise, and may be absent when not given.
        image_root: where relative paths in a list start, a folder or a URL; the list's own folder when not given.
        captions_required: refuse a source that has none.
        globs: which images: of a folder by the files' paths below it, of a list by the paths or URLs that it names, of
            shards by the samples' keys with the image's ending.

    Raises:
        ClipkitError: where nothing is there, nothing in it is usable, or a column is missing.
    """
    spec = str(spec)
    remote = is_remote(spec)
    suffix = PurePosixPath(spec.partition("?")[0] if remote else spec).suffix.lower()
    if suffix in LIST_SUFFIXES and (remote or Path(spec).is_file()):
        listed = ListSource(spec, image_column, caption_column, image_root, captions_required)
        return Selected.by(listed, globs) if globs else listed
    if remote:
        source = _open_remote(spec, globs)
    elif is_shard_spec(spec):
        source = ShardSource(spec)
    elif Path(spec).is_dir():
        source = FolderSource(spec, globs=globs)
    elif Path(spec).exists():
        known = ", ".join(LIST_SUFFIXES)
        raise ClipkitError(f"{spec} is no source: expected a folder, shards (.tar) or a list ({known})")
    else:
        raise ClipkitError(f"no such source: {spec}; name a folder of images, shards, or a list file")
    if captions_required and not source.has_captions:
        raise ClipkitError(f"{spec} has no captions: no .txt or .json beside its images; give a list with captions")
    return Selected.by(source, globs) if globs and isinstance(source, ShardSource) else source


def _open_remote(spec: str, globs: Globs | None) -> ShardSource | FolderSource:
    if spec.partition("?")[0].endswith(".tar"):
        return ShardSource(spec)
    urls = list_files(spec)
    suffixes = {PurePosixPath(url.partition("?")[0]).suffix.lower() for url in urls}
    return (
        ShardSource(spec) if ".tar" in suffixes and not IMAGE_SUFFIXES & suffixes else FolderSource(spec, urls, globs)
    )

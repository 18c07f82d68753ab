"""The members of a sample in a tar: which is its image, what its captions are, and text that is well formed."""

import json
from collections.abc import Iterable
from typing import Any

from clipkit.core import BadSample
from clipkit.images import IMAGE_SUFFIXES

__all__ = ["captions_of", "image_extension", "well_formed"]


def image_extension(extensions: Iterable[str]) -> str | None:
    """The extension among a sample's members that is its image."""
    return next((ext for ext in extensions if f".{ext}" in IMAGE_SUFFIXES), None)


def captions_of(members: dict[str, bytes]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Captions and other columns of a sample.

    ``json["captions"]`` where it stands, else ``txt``, else ``json["caption"]`` (img2dataset writes both).

    Raises:
        BadSample: where the text is not UTF-8 or the JSON is broken.
    """
    try:
        columns = json.loads(members["json"]) if "json" in members else {}
        text = members["txt"].decode("utf-8-sig") if "txt" in members else None
    except UnicodeDecodeError as error:
        raise BadSample(f"the caption is not UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:
        raise BadSample(f"the .json member is broken: {error}") from error
    if not isinstance(columns, dict):
        raise BadSample("the .json member is no object")
    listed = columns.pop("captions", None)
    single = columns.pop("caption", None)
    if listed is None:
        listed = text if text is not None else single
    captions = listed if isinstance(listed, list) else [listed]
    return tuple(well_formed(c.strip()) for c in captions if isinstance(c, str) and c.strip()), columns


def well_formed(text: str) -> str:
    """The text with a question mark for each half of a surrogate pair, which JSON can escape and nothing can write."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text

"""Small samples that many tests pack, read and break."""

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image


def png(value: int = 128) -> bytes:
    """A red square of 30 pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", (30, 30), (value % 256, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def photo(seed: int, width: int = 96, height: int = 80) -> Image.Image:
    """Random soft blobs: every seed another picture, as different from the rest as photos are."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    """An image as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tar_of(path: Path, members: Mapping[str, bytes] | Iterable[tuple[str, bytes]]) -> Path:
    """A plain tar, as tarfile writes it; a list may name a member twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def distinct(rows: torch.Tensor) -> int:
    """How many rows a tower is asked for, those that only fill up a block left out."""
    return len(torch.unique(rows.flatten(1), dim=0))


def fake_tokens(texts: list[str]) -> torch.Tensor:
    """Stands in for a tokenizer: length and first letter."""
    return torch.tensor([[len(text), ord(text[0])] for text in texts])

"""From image bytes to upright 8-bit RGB, as a person would see it.

Decoding is ours because image files in the wild are stranger than the training transforms expect: palettes with
transparency, CMYK, 16-bit scans, rotated phone photos. `decode` is the exact way, through Pillow. `Encoded` reads the
header first and decodes when it is known how many pixels are needed, which makes a large JPEG cheap. HEIC is read with
pillow-heif, where that is installed (``pip install pillow-heif``). Everything here may be called from several threads
at once; the decoders release the GIL.

The first image that is opened settles some of Pillow's globals for the process, see `settle_pillow`; importing this
module changes nothing.
"""

import io
import threading
import warnings
from math import ceil
from pathlib import Path
from typing import Literal

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from clipkit.core import BadSample, UnreadSample

__all__ = ["IMAGE_SUFFIXES", "MAX_PIXELS", "Decoding", "Encoded", "decode", "identify", "settle_pillow", "to_rgb"]

Decoding = Literal["fast", "exact", "gpu"]
"""How much of an image is decoded, and where; as the training setting ``data.decode`` has it."""

HEIF_SUFFIXES = frozenset({".heic", ".heif", ".hif"})
IMAGE_SUFFIXES = HEIF_SUFFIXES | {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
MAX_PIXELS = 200_000_000  # a 200-megapixel image takes 600 MB decoded; a bomb takes the machine
LEAST_SIDE = 32  # pixels below which nothing is reduced: it saves no time, and a block's padding would be seen

# Major brands of ISO 23008-12 (HEIF), Annex B; Pillow itself reads AVIF, which shares mif1 and msf1 with it.
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
_heif_lock, _settings_lock = threading.Lock(), threading.Lock()
_settings_are_made = False


def settle_pillow() -> None:
    """Make the settings of Pillow that decoding needs, for the whole process, once; whatever opens an image calls it.

    There is no undoing them after an image: they are globals of Pillow's and of Python's, and other threads decode at
    the same time.
    """
    global _settings_are_made
    if _settings_are_made:
        return
    with _settings_lock:
        if _settings_are_made:
            return
        # Pillow's own bomb check warns at a limit of its own and would hide ours; ours is exact and names the file.
        Image.MAX_IMAGE_PIXELS = None
        # Odd metadata that does not touch the pixels. `catch_warnings` around each image is not safe in threads.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
        # Pillow loads its rarer plugins on first need, and a second thread that opens an image meanwhile may find none.
        # It costs 50 ms. `preinit` first, so that the common formats are tried first.
        Image.preinit()
        Image.init()
        _settings_are_made = True


class Encoded:
    """An image whose header has been read and whose pixels wait until it is known how many are needed.

    `size` is its width and height as it stands upright. A JPEG can be decoded to 1/2, 3/8, 1/4 or 1/8 of its size by
    leaving out the fine terms of its cosine transform: at 12 megapixels that takes a fifth of the time. Whatever is no
    plain JPEG in grey or RGB is decoded exactly, at once. `orientation` is a plain JPEG's Exif tag, 1 where it stands
    upright, and 0 for anything else.

    Args:
        data: the image's bytes, or the file that holds them.
        background: the RGB colour that transparency is laid over.

    Raises:
        BadSample: as `decode` does, now or when pixels are asked for.
    """

    def __init__(self, data: bytes | Path, background: tuple[int, int, int] = (255, 255, 255)):
        self.data, image = _open(data)
        self.background = background
        self._decoded: Image.Image | None = None
        self.orientation = _orientation(image) if image.format in ("JPEG", "MPO") else 0
        if self.orientation and image.mode in ("RGB", "L"):
            self.size = image.size if self.orientation < 5 else image.size[::-1]
        else:
            image = self._decoded = _loaded(image, background)
            self.size, self.orientation = image.size, 0

    def decode(self) -> Image.Image:
        """All pixels, exactly as the function `decode` gives them."""
        if self._decoded is None:
            self._decoded = decode(self.data, self.background)
        return self._decoded

    def at_least(self, width: float, height: float) -> tuple[np.ndarray, float]:
        """All of the image at the smallest size that decoding can give from `width` and `height` on, upright.

        Returns:
            uint8 ``[height, width, 3]``, and the scale: 1, 1/2, 3/8, 1/4 or 1/8. The full size is exact. At a reduced
            size the last row and column may stand for a part of one.
        """
        if self._decoded is None:
            least = [max(LEAST_SIDE, ceil(width)), max(LEAST_SIDE, ceil(height))]
            # Turned, a partial pixel may be the first one, and all others lie off the grid. Cameras write no such.
            off_grid = self.orientation > 1 and any(side % 8 for side in self.size)
            if off_grid or least[0] > self.size[0] or least[1] > self.size[1]:
                least = list(self.size)
            min_width, min_height = least if self.orientation < 5 else least[::-1]
            try:
                # Strict: a truncated or corrupt file is an error, never grey pixels. Scales between 1/2 and 1 are left
                # out, as they take longer than the full size does.
                pixels = simplejpeg.decode_jpeg(self.data, min_width=min_width, min_height=min_height, min_factor=2.0)
            except ValueError:
                pass  # Pillow forgives some of these, and names the others
            else:
                pixels = _upright(pixels, self.orientation)
                return pixels, round(8 * max(pixels.shape[:2]) / max(self.size)) / 8
        return np.asarray(self.decode()), 1.0


def _orientation(image: Image.Image) -> int:
    """1 to 8, or 0 where the metadata cannot be read."""
    try:
        tag = image.getexif().get(ExifTags.Base.Orientation, 1)
        return int(tag) if tag in range(1, 9) else 1  # what is no orientation is passed over, as Pillow does
    except Exception:
        return 0


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo on ``[height, width, 3]`` what the Exif tag tells, as `ImageOps.exif_transpose` does."""
    if orientation == 1:
        return pixels
    if orientation > 4:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.array(pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels, order="C")


def _open(data: bytes | Path) -> tuple[bytes, Image.Image]:
    try:
        if isinstance(data, Path):
            data = data.read_bytes()
        if not data:
            raise BadSample("the file is empty (0 bytes)")
        image = _opened(data)
    except BadSample:
        raise
    except UnidentifiedImageError:
        head = bytes(data[:12]) if isinstance(data, bytes) else b""
        raise BadSample(f"not an image that Pillow knows (it begins with {head!r})") from None
    except OSError as error:
        raise BadSample(f"cannot be read: {error.strerror or error}") from error
    except Exception as error:
        # Format plugins raise whatever their libraries do (RuntimeError, struct.error, ...); none may stop a job.
        raise BadSample(f"broken header: {error}") from error
    if image.width * image.height > MAX_PIXELS:
        raise BadSample(f"{image.width}x{image.height} pixels exceed the limit of {MAX_PIXELS:,}")
    return data, image


def _opened(data: bytes) -> Image.Image:
    settle_pillow()
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        if data[4:8] != b"ftyp" or data[8:12] not in HEIF_BRANDS:
            raise
    # Imported when the first one is met: it takes as long as all of Pillow does. The lock, because a thread that comes
    # while another imports it would find Pillow without the plugin.
    with _heif_lock:
        try:
            from pillow_heif import register_heif_opener  # type: ignore[import-not-found]

            register_heif_opener()
        except ImportError as error:
            # Not remembered as a broken image is: it can be read once that is installed.
            detail = "" if isinstance(error, ModuleNotFoundError) else f" (what is installed does not load: {error})"
            raise UnreadSample(f"HEIC images need another package: pip install pillow-heif{detail}") from None
    return Image.open(io.BytesIO(data))


def identify(data: bytes | Path) -> tuple[str, int, int]:
    """Format, width and height from the header alone, which costs microseconds and decodes nothing.

    Raises:
        BadSample: where there is no image header, the file is empty or missing, or the image is too large.
    """
    with _open(data)[1] as image:
        return image.format or "", image.width, image.height


def decode(data: bytes | Path, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Decode to upright 8-bit RGB (the first frame of an animation).

    Raises:
        BadSample: where the data is empty, truncated, no image, or larger than `MAX_PIXELS`.
    """
    return _loaded(_open(data)[1], background)


def _loaded(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    try:
        image.load()
        return to_rgb(image, background)
    except BadSample:
        raise
    except Exception as error:
        raise BadSample(f"cannot be decoded: {error}") from error


def to_rgb(image: Image.Image, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Any Pillow image as the RGB a person would see: upright, transparency over `background`.

    16-bit grey is scaled, not clipped; CMYK goes through its embedded colour profile where it has one.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = _to_8_bit(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        canvas = Image.new("RGBA", layer.size, (*background, 255))
        return Image.alpha_composite(canvas, layer).convert("RGB")
    if image.mode == "CMYK" and image.info.get("icc_profile"):
        with_profile = _through_profile(image)
        if with_profile is not None:
            return with_profile
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        # Floating TIFFs say nothing of their range; 0..1 and 0..255 are what writers use.
        top = 1.0 if values.size and np.nanmax(values) <= 1.0 else 255.0
    else:
        # Pillow opens 16-bit grey PNGs as I;16 or, with some encodings, as I; a plain 8-bit I stays below 256.
        top = 65535.0 if image.mode.startswith("I;16") or values.max(initial=0) > 255 else 255.0
    scaled = np.clip(np.nan_to_num(values) * (255.0 / top) + 0.5, 0, 255).astype(np.uint8)
    grey = Image.fromarray(scaled)
    if "transparency" in image.info and isinstance(image.info["transparency"], int):
        hidden = values == image.info["transparency"]
        grey.putalpha(Image.fromarray(np.where(hidden, 0, 255).astype(np.uint8)))
    return grey


def _through_profile(image: Image.Image) -> Image.Image | None:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return None  # a broken profile: the plain conversion is what viewers fall back to

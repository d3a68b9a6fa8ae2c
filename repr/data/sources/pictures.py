"""Decoding of pictures: any usual format and mode to upright RGB, any damage to one error that names the picture."""

from __future__ import annotations

import os
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile

from repr.data.sources.plain_files import MAX_BYTES, check_size, open_at_once, read_plain

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm", ".pgm", ".pbm",
)  # fmt: skip

# Pictures, too, but not read: what a folder holds of them is told.
OTHER_SUFFIXES = (
    ".heic", ".heif", ".jxl", ".jpe", ".j2k", ".jpx", ".apng", ".pnm", ".tga", ".ico", ".pcx", ".psd", ".svg", ".exr",
    ".hdr", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".dcm",
)  # fmt: skip
# Pillow's names of the formats that are read. Not all that it knows: some, as PostScript, would start another program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
MAX_PIXELS = 2**28 // 3  # a quarter of a GiB in RGB; a file of some bytes may claim any number
Reduction = Callable[[int, int], int]  # width and height of an upright picture -> 1, 2, 4 or 8, its divisor

# What Pillow's decoders raise on damaged files; a missing entry would end a run instead of costing it one picture.
_DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError, LookupError,
    ArithmeticError, AssertionError, TypeError, AttributeError, MemoryError, RuntimeError,
)  # fmt: skip

# Pillow warns of damaged metadata and of large pictures without naming the file.
warnings.filterwarnings("ignore", module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def read_picture(path: str) -> bytes:
    """The bytes of a picture's file; an OSError names the file."""
    return read_plain(path, MAX_BYTES, "an image")


def decode(data: bytes, name: str, formats: Sequence[str] = FORMATS, reduction: Reduction | None = None) -> Image.Image:
    """Decode a picture's file: RGB, EXIF orientation applied, alpha composited on white.

    Gray levels of 16 bits, and floats from 0 to 1, are brought to 8 bits.

    A JPEG that ``reduction`` divides is decoded at that scale, which leaves out most of the work. Its sides are divided
    and rounded up. ``info["scaled"]`` tells width and height before, and by what they were divided.

    Args:
        data: the file.
        name: what the error calls the picture.
        formats: Pillow's names of the formats to try; all take as long as decoding a small image.
        reduction: None decodes every pixel.

    Raises:
        OSError: it is no image, damaged, too large to decode, or of values whose range is not known.
    """
    try:
        with _opened(data, formats) as image:
            scaled = None if reduction is None else _reduce(image, reduction)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            rgb = as_rgb(image)
            if reduction is not None:
                rgb.info["scaled"] = scaled or (*rgb.size, 1)
            return rgb
    except UnidentifiedImageError as error:  # whose message has an address in memory in place of a name
        fault = f"Pillow reads it as none of {', '.join(formats)}" if data else "an empty file"
        raise OSError(f"{name}: not readable as an image ({fault})") from error
    except _DECODE_ERRORS as error:
        fault = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise OSError(f"{name}: not readable as an image ({fault})") from error


def picture_format(data: bytes) -> tuple[str, str] | None:
    """Pillow's names of format and mode of a picture's file; None where it is none that :func:`decode` reads."""
    try:
        with _opened(data, FORMATS) as image:
            return image.format or "unknown", image.mode
    except _DECODE_ERRORS:
        return None


def is_picture(path: str) -> bool:
    """Whether a file begins as a picture does that :func:`decode` reads."""
    Image.init()
    try:
        with open(path, "rb", opener=open_at_once) as file:
            head = file.read(32) or b""
    except OSError:
        return False
    accepts = (Image.OPEN[kind][1] for kind in FORMATS if kind in Image.OPEN)
    return any(accept is not None and accept(head) for accept in accepts)


def _opened(data: bytes, formats: Sequence[str]) -> Image.Image:
    """The picture's file, its header read; raises ValueError where it claims too many pixels."""
    _check_pixels(*_webp_size(data))  # whose decoder takes memory for all of them as soon as it is opened
    image = Image.open(BytesIO(data), formats=tuple(formats))
    _check_pixels(*image.size)
    return image


def _reduce(image: Image.Image, reduction: Reduction) -> tuple[int, int, int] | None:
    """Have a JPEG decoded at a scale of its own; gives upright width, height and divisor, None where all is decoded."""
    if image.format not in ("JPEG", "MPO"):  # MPO: a JPEG with more pictures, as phones write them
        return None
    width, height = image.size
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    size = (height, width) if orientation in range(5, 9) else (width, height)
    divisor = reduction(*size)
    # Rounding adds a part of a pixel at right and bottom; turned, it would shift all others.
    while orientation in range(2, 9) and (width % divisor or height % divisor):
        divisor //= 2
    if divisor == 1:
        return None
    image.draft(None, (width // divisor, height // divisor))
    return (*size, divisor)


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels, more than {MAX_PIXELS:,}")


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height that the header of a WebP file claims; of anything else (0, 0)."""
    if data[:4] + data[8:12] != b"RIFFWEBP":
        return 0, 0
    if data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if data[12:16] == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode in RGB, alpha composited on white; ValueError where its range of values is unknown."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F" or image.mode.startswith("I"):  # which Pillow's own conversion would clip to white or black
        return _gray(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _gray(image: Image.Image) -> Image.Image:
    """The 8 bits of a picture of floats, or of integers of more bits; raises ValueError where their range is unknown.

    Floats are taken for shares of white from 0 to 1, or for levels from 0 to 255 where some are larger than 1.
    """
    values = np.asarray(image, np.float32)  # (H, W)
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    bits = tags.get(BITSPERSAMPLE, (16,))[0]
    if image.mode == "I" and tags:
        raise ValueError("a TIFF of 32-bit or signed numbers, whose range is not known; save it with 8 or 16 bits")
    if image.mode == "F":
        low, high = float(values.min()), float(values.max())
        if not 0 <= low <= high <= 255:
            raise ValueError(f"floats from {low:g} to {high:g}; save it with values from 0 to 1, or with 8 or 16 bits")
        levels = np.rint(values * 255 if high <= 1 else values)
    else:
        levels = values // 2 ** (bits - 8)
    gray = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
    return ImageOps.invert(gray) if tags.get(PHOTOMETRIC_INTERPRETATION) == 0 else gray  # 0: white is zero


def read_zipped(path: str, file: str) -> bytes:
    """The bytes of a file in a zip; an OSError names both."""
    try:
        archive = open_zip(Path(path), os.getpid())
        check_size(archive.getinfo(file).file_size, MAX_BYTES)
        return archive.read(file)
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, LookupError, RuntimeError, ValueError) as error:
        raise OSError(f"{os.path.join(path, file)}: not readable ({error})") from error


@lru_cache(maxsize=8)
def open_zip(path: Path, process: int) -> zipfile.ZipFile:
    """Open a zip once a process: a handle shared across a fork would share its file position."""
    return zipfile.ZipFile(path)

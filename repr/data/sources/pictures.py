"""Decoding of pictures: any usual format and mode to upright RGB, any damage to one error that names the picture."""

from __future__ import annotations

import os
import struct
import warnings
import zipfile
import zlib
from functools import lru_cache
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm", ".pgm", ".pbm",
)  # fmt: skip

# What Pillow's decoders raise on damaged files; a missing entry would end a run instead of costing it one picture.
_DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError, IndexError,
    KeyError, TypeError, AttributeError, OverflowError, MemoryError, RuntimeError,
)  # fmt: skip

# Pillow warns of damaged metadata and of large pictures without naming the file.
warnings.filterwarnings("ignore", module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def read_picture(path: str) -> bytes:
    """The bytes of a picture's file; an OSError names the file."""
    try:
        if not os.path.isfile(path) and os.path.exists(path):  # reading a pipe would wait for ever
            raise OSError(0, "no plain file")
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise OSError(f"{path}: not readable as an image ({error.strerror})") from error


def decode(data: bytes, name: str, formats: list[str] | None = None) -> Image.Image:
    """Decode a picture's file: RGB, EXIF orientation applied, alpha composited on white.

    Args:
        data: the file.
        name: what the error calls the picture.
        formats: Pillow's names of the formats to try. None: all, which takes as long as decoding a small image.

    Raises:
        OSError: it is no image, damaged, or too large to decode.
    """
    try:
        with Image.open(BytesIO(data), formats=formats) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _rgb(image)
    except UnidentifiedImageError as error:  # whose message has an address in memory in place of a name
        fault = "of no known format" if data else "an empty file"
        raise OSError(f"{name}: not readable as an image ({fault})") from error
    except _DECODE_ERRORS as error:
        raise OSError(f"{name}: not readable as an image ({type(error).__name__}: {error})") from error


def _rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow's own conversion would clip to white
        return image.convert("I").point(lambda value: value / 256).convert("L").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


@lru_cache(maxsize=8)
def open_zip(path: Path, process: int) -> zipfile.ZipFile:
    """Open a zip once a process: a handle shared across a fork would share its file position."""
    return zipfile.ZipFile(path)

"""What a file that is opened as a picture or as captions may be, and how gray levels become 8 bits."""

import io
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from repr.data.sources.folder import Folder
from repr.data.sources.pictures import MAX_PIXELS, decode, picture_format
from repr.data.sources.plain_files import MAX_BYTES, MAX_TEXT
from repr.data.sources.table import Table

RAMP = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)


def stored(image: Image.Image, kind: str = "TIFF", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def tiff(values: np.ndarray) -> bytes:
    return stored(Image.fromarray(values))


def raw_tiff(bits: int, photometric: int, pixels: bytes, side: int = 16) -> bytes:
    """A TIFF of one uncompressed strip of gray levels, without a sign."""
    tags = {256: side, 257: side, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: side, 279: len(pixels)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + struct.pack("<H", len(tags)) + entries + bytes(4)


def packed_12_bits(levels: np.ndarray) -> bytes:
    first, second = levels.reshape(-1, 2).T
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()


LEVELS_12 = np.linspace(0, 4095, 256).round().astype(np.int64)
GRAY = {
    "floats from 0 to 1": tiff(RAMP),
    "floats from 0 to 255": tiff(RAMP * 255),
    "16 bits": tiff((RAMP * 65535).astype(np.uint16)),
    "16 bits, PNG": stored(Image.fromarray((RAMP * 65535).astype(np.uint16)), "PNG"),
    "12 bits": raw_tiff(12, 1, packed_12_bits(LEVELS_12)),
    "16 bits, white is zero": raw_tiff(16, 0, (65535 - (RAMP * 65535).astype("<u2")).astype("<u2").tobytes()),
}


@pytest.mark.parametrize("kind", GRAY)
def test_gray_levels_of_any_depth_keep_their_range(kind: str) -> None:
    pixels = np.asarray(decode(GRAY[kind], kind), np.float64)
    assert pixels.shape == (16, 16, 3)
    assert np.abs(pixels[..., 0] - RAMP * 255).max() <= 1
    assert pixels.mean() == pytest.approx(127, abs=1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (RAMP * 1000, "floats from 0 to 1000; save it with values from 0 to 1"),
        (RAMP - 0.5, "floats from -0.5 to 0.5"),
        (np.full((2, 2), np.nan, np.float32), "floats from nan to nan"),
        ((RAMP * 255).astype(np.int32), "a TIFF of 32-bit or signed numbers"),
        ((RAMP * 2**31).astype(np.uint32), "a TIFF of 32-bit or signed numbers"),
    ],
)
def test_gray_levels_of_unknown_range_are_refused_by_name(values: np.ndarray, message: str) -> None:
    data = tiff(values) if values.dtype != np.uint32 else raw_tiff(32, 1, values.tobytes())
    with pytest.raises(OSError, match=rf"^x\.tif: not readable as an image \({message}"):
        decode(data, "x.tif")


def webp(width: int, height: int, chunk: str) -> bytes:
    """The header of a WebP file, of some bytes."""
    body = {
        "VP8L": b"\x2f" + (width - 1 | (height - 1) << 14).to_bytes(4, "little") + bytes(8),
        "VP8X": bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little"),
        "VP8 ": b"\0\0\0\x9d\x01\x2a" + width.to_bytes(2, "little") + height.to_bytes(2, "little"),
    }[chunk]
    content = b"WEBP" + chunk.encode() + len(body).to_bytes(4, "little") + body
    return b"RIFF" + len(content).to_bytes(4, "little") + content


@pytest.mark.parametrize(
    "data",
    [
        *(webp(*size, chunk) for chunk in ("VP8L", "VP8X", "VP8 ") for size in ((16_383, 16_383), (9460, 9460))),
        stored(Image.new("1", (9460, 9460)), "PNG"),
        stored(Image.new("L", (9460, 9460)), "JPEG"),
        stored(Image.new("1", (1, MAX_PIXELS + 1)), "TIFF", compression="group4"),
    ],
)
def test_a_file_that_claims_many_pixels_is_not_decoded(data: bytes) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(OSError, match=r"^x: not readable as an image \(\d+ x \d+ pixels, more than 89,478,485\)"):
        decode(data, "x")
    assert picture_format(data) is None
    if sys.platform == "linux":  # kB
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


@pytest.mark.parametrize(
    "data",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n",
        stored(Image.new("RGB", (9, 9)), "EPS"),
        stored(Image.new("RGB", (9, 9)), "PDF"),
        stored(Image.new("RGB", (9, 9)), "PCX"),
    ],
)
def test_only_pictures_of_known_formats_are_opened(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # no program could be started
    with pytest.raises(
        OSError, match=r"^a\.jpg: not readable as an image \(Pillow reads it as none of JPEG, PNG, .*PPM\)"
    ):
        decode(data, "a.jpg")
    assert picture_format(data) is None


def test_the_format_of_a_picture_is_told() -> None:
    assert picture_format(stored(Image.new("L", (2, 2)), "PNG")) == ("PNG", "L")


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(stored(Image.new("RGB", (4, 4)), "PNG"))
        (tmp_path / f"{name}.txt").write_text("words")
    return tmp_path


@pytest.mark.parametrize("kind", ["pipe", "device", "sparse", "folder"])
@pytest.mark.parametrize("file", ["b.txt", "b.png"])
def test_what_is_no_plain_file_of_usual_size_costs_one_row(pair: Path, file: str, kind: str) -> None:
    path = pair / file
    path.unlink()
    source = Folder(pair) if kind == "folder" else None
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        if file == "b.txt":
            pytest.skip("a folder is not found as a file of captions")
        Image.new("RGB", (4, 4)).save(path)
        source = Folder(pair, captions=True)
        path.unlink()
        path.mkdir()
    else:
        with path.open("wb") as sparse:
            sparse.truncate((MAX_TEXT if file == "b.txt" else MAX_BYTES) + 1)
    source = source or Folder(pair, captions=True)
    assert source.captions(0) == ["words"]
    assert source.image(0).size == (4, 4)
    reason = {"pipe": "no plain file", "device": "no plain file", "folder": ".*", "sparse": "bytes, more than"}[kind]
    with pytest.raises(OSError, match=rf"{file}: not readable as an? \w+ \(.*{reason}"):
        source.captions(1) if file == "b.txt" else source.image(1)


def test_a_path_with_nul_costs_one_row(pair: Path) -> None:
    (pair / "t.csv").write_bytes(b"image\na.png\na\0.png\n")
    source = Table(pair / "t.csv")
    assert source.image(0).size == (4, 4)
    with pytest.raises(OSError, match=r"not readable as an image .*null byte"):
        source.image(1)


@pytest.mark.parametrize("error", [SyntaxError, struct.error, AssertionError, ZeroDivisionError, RecursionError])
def test_what_a_decoder_raises_names_the_picture(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error("damaged")

    data = stored(Image.new("RGB", (4, 4)), "BMP")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(OSError, match=rf"^the name: not readable as an image \({error.__name__}: damaged"):
        decode(data, "the name")

"""Augmented views, worker half: draw all parameters of a batch, then crop, resize and flip.

Pixels leave a worker as uint8; the colour half (:mod:`repr.data.colour`) runs on the training device. Everything random
comes from the batch's ``seed``, so that a batch can be drawn again by hand with :func:`draw`, :func:`reduction` and
:func:`crop_views`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from repr.seeds import sample_seed, uniform

CROP_TRIES = 10  # as torchvision's RandomResizedCrop
DIVISORS = (1, 2, 4, 8)  # the scales at which a JPEG can be decoded
# Columns of the crop draws: areas, log-ratios, then one each for top, left, flip. Append, never insert.
_RATIO, _TOP, _LEFT, _FLIP = CROP_TRIES, 2 * CROP_TRIES, 2 * CROP_TRIES + 1, 2 * CROP_TRIES + 2
_NUM_CROP_DRAWS = _FLIP + 1


class Colour(IntEnum):
    """The columns of ``colour`` (B, V, P), in the order in which they act (the first four in any order)."""

    BRIGHTNESS = 0  # factor, 1 = none
    CONTRAST = 1  # factor, 1 = none
    SATURATION = 2  # factor, 1 = none
    HUE = 3  # shift in turns, -0.5 to 0.5, 0 = none
    GRAY = 4  # 1 = made gray
    BLUR = 5  # standard deviation in pixels of the view, 0 = none
    SOLARIZE = 6  # 1 = solarized
    ORDER = 7  # which of the 24 orders of the first four (position in itertools.permutations)


class Purpose(IntEnum):
    """Independent random streams of a sample. Append, never renumber: the numbers are part of every run."""

    CAPTION = 0
    CROP = 1
    COLOUR = 2
    HARD_CAPTION = 3
    NEIGHBOUR = 4
    DISTORTION = 5


@dataclass(frozen=True)
class View:
    """How a view is made; every colour option is neutral unless set.

    Raises:
        ValueError: an option outside its range, with what to set.
    """

    size: int  # side of the square view in pixels
    scale: tuple[float, float]  # range of the crop's share of the image area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # range of the crop's width / height, drawn log-uniformly
    count: int = 1  # how many views are drawn so
    flip: float = 0.0  # probability of a horizontal flip
    brightness: float = 0.0  # x: a factor drawn from [max(0, 1 - x), 1 + x]
    contrast: float = 0.0  # likewise
    saturation: float = 0.0  # likewise
    hue: float = 0.0  # x: a shift drawn from [-x, x] turns; at most 0.5
    jitter_prob: float = 1.0  # probability of the four above together
    gray_prob: float = 0.0  # probability of a gray view
    blur_prob: float = 0.0  # probability of a Gaussian blur
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # range of its standard deviation in pixels
    solarize_prob: float = 0.0  # probability of inverting all pixels from 128 of 255 on

    def __post_init__(self) -> None:
        for name, high in {"scale": 1.0, "ratio": math.inf, "blur_sigma": math.inf}.items():
            value = getattr(self, name)
            pair = tuple(map(float, value)) if isinstance(value, Sequence) and not isinstance(value, str) else ()
            if len(pair) != 2 or not 0 < pair[0] <= pair[1] <= high:
                raise ValueError(f"View: {name}={value}; set [low, high] with 0 < low <= high <= {high:g}")
            object.__setattr__(self, name, pair)
        limits = dict.fromkeys(("flip", "jitter_prob", "gray_prob", "blur_prob", "solarize_prob"), 1.0)
        limits |= {"brightness": math.inf, "contrast": math.inf, "saturation": math.inf, "hue": 0.5}
        for name, high in limits.items():
            if not 0 <= getattr(self, name) <= high:
                raise ValueError(f"View: {name}={getattr(self, name)}; set a value from 0 to {high:g}")
        if self.size < 1 or self.count < 1:
            raise ValueError(f"View: size={self.size}, count={self.count}; both must be at least 1")


def expand(views: Iterable[View]) -> list[View]:
    """One entry for each view that is really drawn: a spec with ``count: 2`` appears twice.

    Raises:
        ValueError: no view, or a larger view after a smaller one.
    """
    expanded = [view for view in views for _ in range(view.count)]
    sizes = [view.size for view in expanded]
    if not expanded or sizes != sorted(sizes, reverse=True):
        raise ValueError(f"views of sizes {sizes}: give at least one view, large ones first")
    return expanded


def stream(seed: Tensor, purpose: Purpose, view: int = 0) -> Tensor:
    """The seed of one purpose and view: (B,) int64, independent of those of all others."""
    return sample_seed(purpose, view, seed)  # hashed, so that the small stream numbers of `uniform` stay the flows'


def draw(seed: Tensor, views: Sequence[View]) -> tuple[Tensor, Tensor]:
    """Draw everything random about the V views of a batch with this ``seed``, (B,) int64.

    Returns:
        Crop draws (B, V, 23) float32 in [0, 1), which :func:`crop_record` takes, and ``colour`` (B, V, 8) float32,
        columns as in :class:`Colour`.
    """
    crops = [uniform(stream(seed, Purpose.CROP, v), _NUM_CROP_DRAWS) for v in range(len(views))]
    colour = [_colour(uniform(stream(seed, Purpose.COLOUR, v), 10), view) for v, view in enumerate(views)]
    return torch.stack(crops, dim=1), torch.stack(colour, dim=1)


def _colour(draws: Tensor, view: View) -> Tensor:
    """(B, 10) uniform draws -> the (B, 8) colour columns of one view."""
    jitter, brightness, contrast, saturation, hue, order, gray, blur, sigma, solarize = draws.unbind(dim=1)
    jittered = jitter < view.jitter_prob
    columns = torch.empty(len(draws), len(Colour))
    for column, strength, values in (
        (Colour.BRIGHTNESS, view.brightness, brightness),
        (Colour.CONTRAST, view.contrast, contrast),
        (Colour.SATURATION, view.saturation, saturation),
    ):
        low, high = max(0.0, 1 - strength), 1 + strength
        columns[:, column] = torch.where(jittered, low + (high - low) * values, 1.0)
    columns[:, Colour.HUE] = torch.where(jittered, (2 * hue - 1) * view.hue, 0.0)
    columns[:, Colour.GRAY] = gray < view.gray_prob
    low, high = view.blur_sigma
    columns[:, Colour.BLUR] = torch.where(blur < view.blur_prob, low + (high - low) * sigma, 0.0)
    columns[:, Colour.SOLARIZE] = solarize < view.solarize_prob
    columns[:, Colour.ORDER] = (24 * order).floor()
    return columns


def crop_record(draws: Sequence[float], view: View, height: int, width: int) -> tuple[int, int, int, int, int]:
    """Place one crop: the law of torchvision's RandomResizedCrop, then the flip.

    Args:
        draws: the 23 crop draws of the sample and view.
        view: how the view is made.
        height: of the image, in pixels.
        width: likewise.

    Returns:
        ``(top, left, height, width, flip)`` in pixels of the image, flip 0 or 1. Where none of ten tries fits into the
        image: the largest centred crop with the image's ratio clipped to the range.
    """
    flip = int(draws[_FLIP] < view.flip)
    log_low, log_high = math.log(view.ratio[0]), math.log(view.ratio[1])
    for attempt in range(CROP_TRIES):
        area = height * width * (view.scale[0] + (view.scale[1] - view.scale[0]) * draws[attempt])
        ratio = math.exp(log_low + (log_high - log_low) * draws[_RATIO + attempt])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(draws[_TOP] * (height - h + 1)), int(draws[_LEFT] * (width - w + 1)), h, w, flip
    ratio = min(max(width / height, view.ratio[0]), view.ratio[1])
    w, h = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
    return (height - h) // 2, (width - w) // 2, h, w, flip


def boxes(records: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Crop records as boxes in [0, 1] of the source image, by PixPro's convention.

    Pixel centres count: the first column is 0, the last 1. A flip swaps x0 and x1. Along a side of one pixel all is 0.

    Args:
        records: (..., 5) integers as from :func:`crop_record`.
        sizes: (..., 2) height and width of the image.

    Returns:
        (..., 4) float32 ``(x0, y0, x1, y1)``.
    """
    top, left, height, width, flip = np.moveaxis(records, -1, 0)
    last = np.maximum(sizes - 1, 1)
    x0, x1 = left / last[..., 1], (left + width - 1) / last[..., 1]
    y0, y1 = top / last[..., 0], (top + height - 1) / last[..., 0]
    mirrored = flip == 1
    return np.stack([np.where(mirrored, x1, x0), y0, np.where(mirrored, x0, x1), y1], axis=-1).astype(np.float32)


def crop_views(images: Iterable[Image.Image], draws: Tensor, views: Sequence[View]) -> tuple[list[Tensor], Tensor]:
    """Crop, resize and flip a batch; images are taken one at a time and not kept.

    Args:
        images: B images in RGB. Of those that were decoded for their views (:func:`reduction`) crops and boxes are
            those of the whole picture, and torch resizes what is not smaller than it: by the same filter, in a third
            of the time, but it sees no pixels around the crop and rounds otherwise. Others are resized by Pillow.
        draws: (B, V, 23), the crop draws of :func:`draw`.
        views: the V views.

    Returns:
        V tensors (B, 3, size, size) uint8, and the boxes (B, V, 4) float32.
    """
    pixels = [np.empty((len(draws), 3, view.size, view.size), np.uint8) for view in views]
    records = np.empty((len(draws), len(views), 5), np.int64)
    sizes = np.empty((len(draws), 1, 2), np.int64)
    for b, (image, sample) in enumerate(zip(images, draws.tolist(), strict=True)):
        told = image.info.get("scaled")  # a text of the file's may have the name
        width, height, divisor = told if isinstance(told, tuple) else (*image.size, None)
        sizes[b] = height, width
        for v, view in enumerate(views):
            record = crop_record(sample[v], view, height, width)
            records[b, v] = record
            pixels[v][b] = _resized(image, record, view.size, divisor)
    return [torch.from_numpy(view) for view in pixels], torch.from_numpy(boxes(records, sizes))


def reduction(draws: Sequence[Sequence[float]], views: Sequence[View], width: int, height: int) -> int:
    """By how much the sides of a picture may be divided so that no view of a sample is enlarged: 1, 2, 4 or 8.

    Args:
        draws: (V, 23), the crop draws of the sample.
        views: the V views.
        width: of the picture, in pixels.
        height: likewise.
    """
    records = [crop_record(sample, view, height, width) for sample, view in zip(draws, views, strict=True)]
    spare = min(min(record[2:4]) // view.size for record, view in zip(records, views, strict=True))
    return max(divisor for divisor in DIVISORS if divisor <= max(spare, 1))


def _resized(image: Image.Image, record: tuple[int, int, int, int, int], size: int, divisor: int | None) -> np.ndarray:
    """Crop, resize and flip one image: (3, size, size) uint8; see ``images`` of :func:`crop_views`."""
    top, left, height, width, flip = record
    box = left, top, left + width, top + height
    if divisor == 1:
        view = image.crop(box)
    else:  # one call crops and resizes: the filter sees the pixels around the box, which may cut pixels
        x0, y0, x1, y1 = (edge / (divisor or 1) for edge in box)
        view = image.resize((size, size), Image.Resampling.BICUBIC, box=(x0, y0, x1, y1))
    if flip:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)  # 4 times faster than numpy's reversed copy
    pixels = np.array(view).transpose(2, 0, 1)
    if view.size == (size, size):
        return pixels
    return interpolate(torch.from_numpy(pixels)[None], size=(size, size), mode="bicubic", antialias=True)[0].numpy()


def evaluation_view(image: Image.Image, size: int) -> Tensor:
    """The evaluation transform, RGB -> (3, size, size) uint8: shorter side resized to ``size`` pixels, centre crop.

    It gives the very pixels of open_clip's and timm's transforms, so that an export can name theirs.
    """
    return torch.from_numpy(np.array(_central(image, size, Image.Resampling.BICUBIC))).permute(2, 0, 1)


def evaluation_masks(masks: np.ndarray, size: int) -> Tensor:
    """The evaluation transform of masks, every pixel the class of the nearest: (M, H, W) -> (M, size, size) uint8."""
    views = [_central(Image.fromarray(mask), size, Image.Resampling.NEAREST) for mask in masks]
    return torch.from_numpy(np.array([np.asarray(view) for view in views], np.uint8))


def _central(image: Image.Image, size: int, resample: Image.Resampling) -> Image.Image:
    """The shorter side resized to ``size``, then the central square."""
    short = min(image.size)
    if max(image.size) > 32 * short:  # a strip: resized whole, it would take gigabytes
        left, top = ((side - min(side, 32 * short)) // 2 for side in image.size)
        image = image.crop((left, top, image.width - left, image.height - top))
    width, height = (int(size * side / short) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.resize((width, height), resample).crop((left, top, left + size, top + size))

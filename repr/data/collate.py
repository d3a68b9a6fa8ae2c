"""Rows of any data set of pictures with captions or labels -> training batches, for a loader of one's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from repr.batch import Batch
from repr.data.colour import colour_views
from repr.data.datasets import MAX_CAPTION_CHARS, Tokenizer
from repr.data.sources.pictures import as_rgb
from repr.data.views import Purpose, View, crop_views, draw, expand, stream
from repr.seeds import uniform

Transform = Callable[[Any], Tensor]  # a picture, RGB or as the data set gives a tensor -> (3, H, W) float


@dataclass(eq=False)
class Collate:
    """The ``collate_fn`` of a loader whose data set gives rows as torchvision's do: a picture, and what tells of it.

    Texts after the picture are its captions, one of which is drawn; whole numbers are its labels; None is left out. A
    batch has ``views``, ``seed`` and, where the rows tell them, ``text`` and ``label``, with ``boxes`` of each
    :class:`View`. It has no ``index``, which a row does not know. The seeds come from torch's generator.

    Args:
        views: V views, large ones first: each a :class:`View`, or each a function that makes (3, H, W) float of a
            picture, such as a transform of torchvision. PixPro needs the boxes of the former.
        tokenizer: list of B texts -> (B, L) int64; None leaves captions out.
        mean: by which pixels of a :class:`View` are normalised, of three channels in [0, 1].
        std: likewise.

    Raises:
        ValueError: the views are none or of both kinds; when called, a row is of another form.
    """

    views: Sequence[View] | Sequence[Transform]
    tokenizer: Tokenizer | None = None
    mean: Sequence[float] = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, as in conf/data
    std: Sequence[float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self) -> None:
        drawn = [isinstance(view, View) for view in self.views]
        if all(drawn):
            self.views = expand(cast(Sequence[View], self.views))
        elif any(drawn):
            raise ValueError("Collate: give views of one kind, each a View or each a function")

    def __call__(self, rows: Sequence[Any]) -> Batch:
        """The batch of B rows."""
        pictures, *others = zip(*map(_parts, rows), strict=True)
        captions, labels = others
        seed = torch.empty(len(rows), dtype=torch.int64).random_()
        batch = Batch(seed=seed)
        if isinstance(self.views[0], View):
            views = cast(Sequence[View], self.views)
            crops, colour = draw(seed, views)
            pixels, batch["boxes"] = crop_views(map(_image, pictures), crops, views)
            batch["views"] = colour_views(pixels, colour, self.mean, self.std)
        else:
            batch["views"] = [_stacked([view(x) for x in pictures]) for view in cast(Sequence[Transform], self.views)]
        if self.tokenizer is not None:
            if not all(captions):
                raise ValueError("Collate: a row has no caption; give each one, or tokenizer=None for pictures alone")
            chosen = uniform(stream(seed, Purpose.CAPTION), 1)[:, 0].tolist()
            drawn = [texts[int(number * len(texts))] for texts, number in zip(captions, chosen, strict=True)]
            batch["text"] = self.tokenizer([text[:MAX_CAPTION_CHARS] for text in drawn])
        if any(labels):
            if len({*map(len, labels)}) > 1:
                raise ValueError("Collate: rows have other numbers of labels; give each row as many, -1 for an unknown")
            batch["label"] = torch.tensor(labels)
        return batch


def _parts(row: Any) -> tuple[Any, list[str], list[int]]:
    """The picture, the captions and the labels of a row."""
    picture, *others = row if isinstance(row, (tuple, list)) else (row,)
    captions, labels = list[str](), list[int]()
    for other in others:
        several = other if isinstance(other, (tuple, list)) else [other]
        if all(isinstance(text, str) for text in several):
            captions += several
        elif other is not None:
            labels += _labels(other)
    return (as_rgb(picture) if isinstance(picture, Image.Image) else picture), captions, labels


def _labels(value: Any) -> list[int]:
    try:
        numbers = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        numbers = torch.empty(0)
    if numbers.is_floating_point() or numbers.is_complex():
        raise ValueError(
            f"Collate: {value!r:.60} beside a picture is no caption (text) and no label (whole number); let "
            "target_transform of the data set make one of it"
        )
    return numbers.long().flatten().tolist()


def _image(picture: Any) -> Image.Image:
    """The picture in RGB, also of a tensor (C, H, W) or an array (H, W, C)."""
    if isinstance(picture, Image.Image):
        return picture
    if not isinstance(picture, (Tensor, np.ndarray)):
        raise ValueError(f"Collate: a row begins with a {type(picture).__name__}; give (picture, caption or label)")
    pixels = torch.as_tensor(picture)
    if pixels.is_floating_point() and not 0 <= pixels.min() <= pixels.max() <= 1:
        raise ValueError("Collate: pixels lie outside [0, 1]; take Normalize out of the data set, a View does it")
    try:
        return as_rgb(functional.to_pil_image(picture))
    except (TypeError, ValueError) as error:
        raise ValueError(f"Collate: no picture can be made of {type(picture).__name__}: {error}") from error


def _stacked(views: Sequence[Any]) -> Tensor:
    """(B, 3, H, W) of what a function has made."""
    for view in views:
        if not isinstance(view, Tensor) or not view.is_floating_point() or view.ndim != 3 or len(view) != 3:
            told = f"{view.dtype} {tuple(view.shape)}" if isinstance(view, Tensor) else type(view).__name__
            raise ValueError(
                f"Collate: a view is {told}, not float (3, H, W); begin it with v2.ToImage() and end it with "
                "v2.ToDtype(torch.float32, scale=True)"
            )
        if view.shape != views[0].shape:
            raise ValueError(f"Collate: views of {tuple(view.shape)} and {tuple(views[0].shape)}; crop all to one size")
    return torch.stack(list(views))

"""The records of features that metrics read."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Features:
    """The feature table of one data set; row i of every entry is the same sample.

    ``image`` (N, D) is what ``encode_image`` gives, ``text`` (N, D) what ``encode_text`` gives for the
    sample's caption, ``trunk`` (N, T) the backbone's output before any projection (``image`` where
    there is none). None of them is normalised. ``caption`` (N,) tells equal captions apart from
    different ones: rows with the same caption have the same number. ``poolings`` holds other poolings of
    the backbone's output by name, where a flow gives them, such as ``mean_pool`` beside a class token.

    Where images have several captions each, ``text`` is (C, D), of the distinct ones, and ``pairs`` says which belong
    together; retrieval reads such tables.
    """

    index: Tensor  # (N,) int64
    image: Tensor  # (N, D) float32
    trunk: Tensor  # (N, T) float32
    text: Tensor | None = None  # (N, D) float32
    caption: Tensor | None = None  # (N,) int64
    labels: dict[str, Tensor] = field(default_factory=dict)  # attribute -> (N,) int64, -1 = no label
    poolings: dict[str, Tensor] = field(default_factory=dict)  # name -> (N, T) float32
    pairs: Tensor | None = None  # (P, 2) int64, rows of `image` and `text`; None: row i of both belong together
    logits: dict[str, Tensor] = field(default_factory=dict)  # head -> (N, C) float32, of the classes it was trained on


@dataclass(frozen=True)
class DenseFeatures:
    """Feature maps of some pictures of a data set; row i of every entry is the same sample.

    ``maps`` are those of the evaluation transform, ``crops`` those of two crops of a picture, which ``boxes`` place in
    it (:func:`repr.data.views.boxes`). Nothing is normalised. ``masks`` hold the classes of the pixels, ``NO_CLASS``
    for none; there are none where the data know no classes.
    """

    index: Tensor  # (N,) int64
    maps: Tensor  # (N, C, h, w) float32
    crops: tuple[Tensor, Tensor]  # (N, C, h', w') float32 each
    boxes: Tensor  # (N, 2, 4) float32
    masks: dict[str, Tensor] = field(default_factory=dict)  # name -> (N, H, W) uint8

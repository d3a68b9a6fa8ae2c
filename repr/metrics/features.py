"""The feature tables that metrics read, and how they read them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Features:
    """The feature table of one data set; row i of every entry is the same sample, and nothing is normalised.

    ``image`` is what ``encode_image`` gives, ``text`` what ``encode_text`` gives for the caption of the sample, and
    ``trunk`` the output of the backbone before any projection (``image`` where there is none). Rows with equal captions
    have the same number in ``caption``. ``poolings`` holds other poolings of the backbone's output by name, where a
    flow gives them, such as ``mean_pool`` beside a class token.

    Where images have several captions each, ``text`` is (C, D), of the distinct ones, and ``pairs`` says which belong
    together.
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
    """Feature maps of some pictures of a data set; row i of every entry is the same sample, and nothing is normalised.

    ``maps`` are those of the evaluation transform, ``crops`` those of two crops of a picture, which ``boxes`` place in
    it (:func:`repr.data.views.boxes`). ``masks`` hold the classes of the pixels, ``NO_CLASS`` for none.
    """

    index: Tensor  # (N,) int64
    maps: Tensor  # (N, C, h, w) float32
    crops: tuple[Tensor, Tensor]  # (N, C, h', w') float32 each
    boxes: Tensor  # (N, 2, 4) float32
    masks: dict[str, Tensor] = field(default_factory=dict)  # name -> (N, H, W) uint8


def finite(features: Tensor) -> Tensor:
    """Give the features back, if they are numbers.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    if features.numel() and not torch.stack(features.aminmax()).isfinite().all():  # holds no second table
        rows = int((~features.isfinite().flatten(1).all(1)).sum())
        raise ValueError(
            f"{rows} of {len(features)} rows hold NaN or infinity: take a checkpoint from before it diverged"
        )
    return features


def labels_of(features: Features, attribute: str) -> Tensor:
    """Give the labels (N,) of an attribute.

    Raises:
        ValueError: the table lacks the attribute.
    """
    if attribute not in features.labels:
        raise ValueError(f"no labels named {attribute!r}; choose one of {sorted(features.labels)}")
    return features.labels[attribute]


def labelled(features: Features, attribute: str) -> tuple[Tensor, Tensor]:
    """Give the positions (M,) of the rows that are not labelled -1, and their labels (M,).

    Raises:
        ValueError: the table lacks the attribute, or none of its rows is labelled.
    """
    labels = labels_of(features, attribute)
    rows = (labels >= 0).nonzero().squeeze(1)
    if len(rows) == 0:
        raise ValueError(f"no row has a label for {attribute!r}; leave this metric out or give labels")
    return rows, labels[rows]


def labelled_trunk(features: Features, attribute: str) -> tuple[Tensor, Tensor]:
    """Give ``trunk`` (M, T), which must be finite, and the labels (M,) of the rows that :func:`labelled` gives."""
    rows, labels = labelled(features, attribute)
    return finite(features.trunk[rows]), labels


def standardisation(features: Tensor) -> tuple[Tensor, Tensor]:
    """Give the mean and the reciprocal of the deviation of each column of features (N, T): (T,) each.

    A column whose deviation is below float32's resolution of its mean is constant and has the reciprocal 0, so that
    rounding is not scaled up to a signal.
    """
    deviation, mean = torch.std_mean(features, 0, correction=0)
    constant = deviation <= torch.finfo(torch.float32).eps * mean.abs()
    return mean, deviation.masked_fill(constant, torch.inf).reciprocal()


def distinct_captions(table: Features) -> tuple[Tensor, Tensor]:
    """Give the first row (C,) of each distinct caption, and which of these each row of the table has (N,).

    Without ``caption`` every row's caption is its own.
    """
    rows = torch.arange(len(table.image), device=table.image.device)
    distinct, caption = (rows if table.caption is None else table.caption).unique(return_inverse=True)
    return torch.full_like(distinct, len(rows)).scatter_reduce(0, caption, rows, "amin"), caption


def one_caption(table: Features) -> Features:
    """Keep the first caption of each image, so that row i of ``text`` is that of image i.

    ``pairs`` must name the captions of an image in their order. Where an image has none, the result has no text.
    """
    if table.pairs is None or table.text is None:
        return table
    order = torch.arange(len(table.pairs), device=table.pairs.device)
    first = torch.full((len(table.image),), len(order), device=order.device)
    first.scatter_reduce_(0, table.pairs[:, 0], order, "amin")  # the first pair of each image
    if (first == len(order)).any():
        return replace(table, text=None, pairs=None)
    caption = table.pairs[first, 1]
    return replace(table, text=table.text[caption], caption=caption, pairs=None)

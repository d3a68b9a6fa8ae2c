"""The records that cross layers, and the randomness that belongs to a sample.

Every random choice of a sample (crop, colour, caption, mask, mixing weight) is a pure function of
(seed, epoch, index): :func:`sample_seed` hashes the three into one number a sample, and
:func:`uniform` turns that number into as many uniform draws as are asked for. Nothing depends on
workers, ranks or history, so a batch can be drawn again by hand.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypedDict, cast

import torch
from torch import Tensor

NO_CLASS = 255  # in a mask: a pixel without a class


class Batch(TypedDict, total=False):
    """A batch; row i of every entry is the same sample.

    Shapes: B samples, V views, A labelled attributes, P colour parameters, L tokens, M masks, T tables. Where no
    pictures are read (``views`` is empty), ``views``, ``boxes``, ``colour`` and ``image`` are not there.
    """

    index: Tensor  # (B,) int64, position in the data set
    seed: Tensor  # (B,) int64, the only source of per-sample randomness in flows
    views: list[Tensor]  # V x (B, 3, H_v, W_v), large ones first; uint8 before, float after the device half
    boxes: Tensor  # (B, V, 4) float32, crop in [0, 1] of the source image; a flip swaps the ends
    colour: Tensor  # (B, V, P) float32, drawn colour parameters
    text: Tensor  # (B, L) int64, token ids
    tables: list[Tensor]  # T x (B, F_t) float32, blocks of numbers
    label: Tensor  # (B, A) int64, -1 where a sample has no label
    image: Tensor  # (B, 3, H, W), evaluation transform; only in evaluation batches
    mask: Tensor  # (B, M, H, W) uint8, classes of the pixels of `image`, NO_CLASS for none; in dense evaluation
    crops: list[Tensor]  # 2 x (B, 3, S, S), two crops of a sample, with `boxes`; in dense evaluation
    bad: list[tuple[int, str]]  # rows that could not be read, and why; the DataModule takes it out


def num_rows(batch: Batch) -> int:
    """How many samples a batch has."""
    first = next(iter(batch.values()))
    return len(cast(Any, first[0] if isinstance(first, list) else first))


class StepOutput(NamedTuple):
    """What a flow hands to the base: unweighted losses by name, features, and scalars that are not losses."""

    terms: dict[str, Tensor]
    features: dict[str, Tensor]
    logs: dict[str, Tensor | float]


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


def _mix(x: Tensor) -> Tensor:
    """Finaliser of SplitMix64 (Steele et al., 2014); int64 arithmetic wraps, so it is uint64 in disguise."""
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9 as int64
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB as int64
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift (torch's is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as int64, the step of SplitMix64


def sample_seed(seed: int, epoch: int | Tensor, index: Tensor) -> Tensor:
    """Hash (seed, epoch, index) into one int64 a sample.

    Args:
        seed: the run's seed.
        epoch: the epoch, from 0; or (B,) int64, how often each sample was visited before.
        index: (B,) int64 positions in the data set.

    Returns:
        (B,) int64, the same on every device.
    """
    state = torch.full_like(index, seed)
    state = _mix(state + _GOLDEN) ^ epoch
    return _mix(_mix(state + _GOLDEN) ^ index)


def uniform(seed: Tensor, num: int, *, stream: int = 0) -> Tensor:
    """Counter-based uniform numbers in [0, 1) with 24 random bits each.

    Args:
        seed: (B,) int64, the batch's ``seed``.
        num: draws a sample.
        stream: draws of different streams are independent; a flow that needs several takes several.

    Returns:
        (B, num) float32 on the device of ``seed``; row i depends on ``seed[i]``, ``stream`` and the
        column alone.
    """
    counter = torch.arange(1, num + 1, device=seed.device, dtype=torch.int64)
    start = torch.full_like(seed, _GOLDEN) * (stream + 1)  # as a tensor, since this wraps
    base = _mix(seed + start)  # (B,)
    bits = _mix(base[:, None] + _GOLDEN * counter)  # (B, num)
    return _shift(bits, 40).float() * 2.0**-24

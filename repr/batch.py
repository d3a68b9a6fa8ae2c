"""The records that cross layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict, cast

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NO_CLASS = 255  # in a mask: a pixel without a class


class Batch(TypedDict, total=False):
    """A batch; row i of every entry is the same sample.

    Shapes: B samples, V views, A labelled attributes, P colour parameters, L tokens, K wrong captions, M masks, T
    tables. Where no pictures are read, ``picture``, ``views``, ``boxes``, ``colour`` and ``image`` are not there.
    """

    index: Tensor  # (B,) int64, position in the data set
    seed: Tensor  # (B,) int64, the only source of per-sample randomness in flows
    picture: Tensor  # (B,) int64, the same number for samples of one picture; only in training batches
    views: list[Tensor]  # V x (B, 3, H_v, W_v), large ones first; uint8 before, float after the device half
    boxes: Tensor  # (B, V, 4) float32, crop in [0, 1] of the source image; a flip swaps the ends
    colour: Tensor  # (B, V, P) float32, drawn colour parameters
    text: Tensor  # (B, L) int64, token ids
    texts: Tensor  # (B, C, L) int64, token ids of the first captions of each sample; the last one stands in for more
    hard_text: Tensor  # (B, K, L) int64, those of captions that are wrong for the sample; all 0 where it has fewer
    mated: Tensor  # (B,) bool, whether rows 2k and 2k + 1 are neighbours; only where the order puts neighbours together
    tables: list[Tensor]  # T x (B, F_t) float32, blocks of numbers
    label: Tensor  # (B, A) int64, -1 where a sample has no label
    image: Tensor  # (B, 3, H, W), evaluation transform; only in evaluation batches
    mask: Tensor  # (B, M, H, W) uint8, classes of the pixels of `image`, NO_CLASS for none; in dense evaluation
    crops: list[Tensor]  # 2 x (B, 3, S, S), two crops of a sample, with `boxes`; in dense evaluation
    candidates: Tensor  # (B, P, L) int64, tokens of texts that may be true of `image`; where likelihoods are asked for
    bad: list[tuple[int, str]]  # rows that could not be read, and why; the DataModule takes it out


def num_rows(batch: Batch) -> int:
    """How many samples a batch has."""
    first = next(iter(batch.values()))
    return len(cast(Any, first[0] if isinstance(first, list) else first))


def evenly_spread(num_rows: int, num: int, device: torch.device | None = None) -> Tensor:
    """At most ``num`` of the rows 0 to ``num_rows - 1``, evenly spread: (min(num, num_rows),) int64, rising."""
    import torch

    num = min(num, num_rows)
    return torch.arange(num, device=device) * num_rows // num


@dataclass
class Embeddings:
    """What a flow gives for an evaluation batch of B samples; nothing is normalised."""

    image: Tensor  # (B, D), what `encode_image` gives
    trunk: Tensor  # (B, T), the output of the backbone before any projection; `image` where there is no projection
    text: Tensor | None = None  # (B, D), what `encode_text` gives for the captions; None without text tower or captions
    # Other poolings of the backbone's output, (B, T) each, such as `mean_pool` beside a class token; probes take each.
    poolings: dict[str, Tensor] = field(default_factory=dict)
    logits: dict[str, Tensor] = field(default_factory=dict)  # head -> (B, C), of the classes that it has learnt
    projection: Tensor | None = None  # (B, P), where a joint embedding takes its loss; `predict_step` alone gives it


@dataclass
class StepOutput:
    """What a flow hands to the base. Only the terms are needed; :mod:`repr.training.collapse` watches the rest.

    Shapes: N rows of this process; D dimensions; K prototypes.
    """

    terms: dict[str, Tensor]  # the unweighted losses, scalars
    embeddings: dict[str, Tensor] = field(default_factory=dict)  # (N, D) each
    scores: Tensor | None = None  # (N, K), the similarity of every row to every prototype
    assignments: Tensor | None = None  # (N, K), the distribution of every row over the prototypes
    logs: dict[str, Tensor | float] = field(default_factory=dict)  # other scalars, logged as `train/<name>`

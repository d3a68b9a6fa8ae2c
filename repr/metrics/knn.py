"""Weighted nearest-neighbour classification."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from repr.metrics.features import Features, finite, labelled
from repr.metrics.scores import accuracy

BLOCK = 32  # entries whose maximum is found at once; of 16 to 128 the fastest on a CPU with AVX-512


@torch.no_grad()
def knn(
    bank: Features, query: Features, *, attribute: str, k: int = 20, temperature: float = 0.07, chunk_size: int = 256
) -> dict[str, float]:
    r"""Accuracy of the weighted vote of the k bank rows nearest to a query.

    .. math::
        \hat y_q = \arg\max_c \sum_{b \in kNN(q)} [y_b = c]\, e^{\cos(q, b) / T}

    Args:
        bank: ``trunk`` (N, T), normalised inside, and labels; unlabelled rows are left out. It must not
            hold the query's own samples, which would vote for themselves.
        query: the same; a label that the bank lacks counts as wrong.
        attribute: which labels.
        k: neighbours, clipped to the rows of the bank.
        temperature: T.
        chunk_size: queries compared at a time; memory is chunk_size x N.

    Returns:
        ``knn_<attribute>`` in [0, 1]; chance is the share of the query's largest class.

    Raises:
        ValueError: there are no such labels; features are not finite; k or temperature is not positive.

    Source: Wu, Xiong, Yu & Lin, 2018, arXiv 1805.01978, section 3.4.
    """
    options = _pairs([k], [temperature])
    (predicted,) = _predict(bank, query, attribute, options, len(bank.trunk), chunk_size)
    return accuracy(f"knn_{attribute}", predicted, labelled(query, attribute)[1])


@torch.no_grad()
def knn_sweep(
    bank: Features,
    query: Features,
    *,
    attribute: str,
    ks: Sequence[int],
    temperatures: Sequence[float],
    memory: float = 1.0,
) -> dict[str, float]:
    """Accuracy of :func:`knn`, for every k and temperature from one search of the neighbours.

    Args:
        bank: as for :func:`knn`.
        query: likewise.
        attribute: likewise.
        ks: the numbers of neighbours.
        temperatures: the T.
        memory: gigabytes that the search may take beside the tables; a bank too large for that is searched in blocks.

    Returns:
        ``knn_<attribute>_k<k>_t<T>`` (:func:`sweep_name`), each with its chance. The best is not named, since it would
        be chosen on the query.

    Raises:
        ValueError: as for :func:`knn`; the memory is not positive.
    """
    options = _pairs(ks, temperatures)
    rows, bank_labels = labelled(bank, attribute)
    block, chunk_size = sizes(memory, bank.trunk, rows, max(ks), len(bank_labels.unique()))
    predicted = _predict(bank, query, attribute, options, block, chunk_size)
    labels = labelled(query, attribute)[1]
    values: dict[str, float] = {}
    for (k, temperature), classes in zip(options, predicted, strict=True):
        values |= accuracy(sweep_name(attribute, k, temperature), classes, labels)
    return values


def sweep_name(attribute: str, k: int, temperature: float) -> str:
    """The name of a number of :func:`knn_sweep`."""
    return f"knn_{attribute}_k{k}_t{temperature:g}"


def _pairs(ks: Sequence[int], temperatures: Sequence[float]) -> list[tuple[int, float]]:
    """Pair every k with every temperature; there must be one of each, and all must be positive."""
    if not ks or not temperatures or min(ks) < 1 or min(temperatures) <= 0:
        raise ValueError(
            f"set k >= 1 and temperature > 0, not k={min(ks, default=None)}, "
            f"temperature={min(temperatures, default=None)}"
        )
    return [(k, temperature) for k in ks for temperature in temperatures]


def _predict(
    bank: Features, query: Features, attribute: str, options: Sequence[tuple[int, float]], block: int, chunk_size: int
) -> list[Tensor]:
    """Classes (M,) of the labelled queries for every k and temperature, from ``block`` rows of the bank at a time."""
    rows, labels = labelled(bank, attribute)
    classes, target = labels.unique(return_inverse=True)
    blocks = rows.split(block)
    kept = [_unit(bank.trunk, rows)] if len(blocks) == 1 else None
    predicted: list[list[Tensor]] = []
    for part in labelled(query, attribute)[0].split(chunk_size):
        keys = kept or (_unit(bank.trunk, places) for places in blocks)
        cosine, neighbour = _nearest(_unit(query.trunk, part), keys, max(k for k, _ in options))
        near = target[neighbour]
        predicted.append([classes[_vote(cosine[:, :k], near[:, :k], t, len(classes)).argmax(1)] for k, t in options])
    return [torch.cat(parts) for parts in zip(*predicted, strict=True)]


def _vote(cosine: Tensor, label: Tensor, temperature: float, num_classes: int) -> Tensor:
    """The votes (M, C) of neighbours (M, k), the nearest of which stands first."""
    weight = ((cosine - cosine[:, :1]) / temperature).exp()  # less the nearest's: the same vote, no overflow
    return weight.new_zeros(len(cosine), num_classes).scatter_add_(1, label, weight)


def _nearest(queries: Tensor, keys: Iterable[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Cosines and positions (M, k) of the nearest keys, which come in blocks; all are there where they are fewer."""
    cosine = position = queries.new_empty(len(queries), 0)
    start = 0
    for block in keys:
        near, place = largest(queries @ block.T, min(k, len(block)))
        if start:
            near, order = torch.cat([cosine, near], 1).topk(min(k, start + len(block)))
            place = torch.cat([position, place + start], 1).gather(1, order)
        cosine, position, start = near, place, start + len(block)
    return cosine, position


def largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Give what ``values.topk(k)`` gives for rows (M, N), for long ones and few k up to three times faster.

    A row is cut into blocks. The k largest entries are in the k blocks with the largest maxima, which a processor finds
    at the speed of its memory, so only these are searched. Which of equal entries is taken is open, as in torch's.
    """
    num_blocks = values.shape[1] // BLOCK
    if num_blocks < 4 * k:
        return values.topk(k)
    blocks = values[:, : num_blocks * BLOCK].unflatten(1, (num_blocks, BLOCK))
    chosen = blocks.amax(2).topk(k, sorted=False)[1][:, :, None]  # (M, k, 1)
    candidates = blocks.gather(1, chosen.expand(-1, -1, BLOCK)).flatten(1)  # (M, k BLOCK)
    entries = torch.arange(BLOCK, device=values.device)
    positions = (chosen * BLOCK + entries).flatten(1)
    rest = torch.arange(num_blocks * BLOCK, values.shape[1], device=values.device)
    positions = torch.cat([positions, rest.expand(len(values), -1)], 1)
    best, place = torch.cat([candidates, values[:, rest]], 1).topk(k)
    return best, positions.gather(1, place)


def _unit(features: Tensor, rows: Tensor) -> Tensor:
    """Rows, in rising order, at unit length; without a copy before that where they are consecutive."""
    return F.normalize(finite(features[rows[0] : rows[-1] + 1] if _consecutive(rows) else features[rows]), dim=1)


def _consecutive(rows: Tensor) -> bool:
    return int(rows[-1] - rows[0]) + 1 == len(rows)


def sizes(memory: float, bank: Tensor, rows: Tensor, k: int, num_classes: int) -> tuple[int, int]:
    """Tell how many rows of the bank and how many queries may be compared at a time.

    Raises:
        ValueError: the memory is not positive.
    """
    if memory <= 0:
        raise ValueError(f"memory={memory} gigabytes; set it above 0")
    width = bank.shape[1] * bank.element_size()
    copies = 1 if _consecutive(rows) else 2
    budget = 0.95e9 * memory  # the matrix product has buffers of its own
    block = min(len(rows), max(1, int(budget / 2 / (width * copies))))
    # Of a query: its cosines, two copies of its features, the blocks that `largest` looks into, neighbours, votes.
    query = 4 * block + 2 * width + 32 * BLOCK * min(k, block // BLOCK + 1) + 64 * k + 12 * num_classes
    return block, max(1, int((budget - block * width * copies) / query))

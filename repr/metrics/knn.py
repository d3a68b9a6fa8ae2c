"""Weighted nearest-neighbour classification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from repr.batch import Features
from repr.metrics.tables import accuracy, finite, labelled, rows_within


@torch.no_grad()
def knn(
    bank: Features,
    query: Features,
    *,
    attribute: str,
    k: int = 20,
    temperature: float = 0.07,
    chunk_size: int = 256,
) -> dict[str, float]:
    r"""Accuracy of the weighted vote of the k bank rows nearest to a query.

    .. math::
        \hat y_q = \arg\max_c \sum_{b \in kNN(q)} [y_b = c]\, e^{\cos(q, b) / T}

    Args:
        bank: ``trunk`` (N, T), normalised inside, and labels; unlabelled rows are left out. It must not
            hold the query's own samples, which would vote for themselves.
        query: the same; unlabelled rows are left out, a label that the bank lacks counts as wrong.
        attribute: which labels.
        k: neighbours, clipped to the rows of the bank.
        temperature: T.
        chunk_size: queries compared at a time; memory is chunk_size x N.

    Returns:
        ``knn_<attribute>`` in [0, 1]; chance is the share of the query's largest class.

    Raises:
        ValueError: a table lacks the attribute or has no labelled row; features are not finite; k or temperature is
            not positive.

    Source: Wu, Xiong, Yu & Lin, 2018, arXiv 1805.01978, section 3.4.
    """
    (predicted,), labels = _predict(bank, query, attribute, [k], [temperature], chunk_size)
    return accuracy(f"knn_{attribute}", predicted, labels)


@torch.no_grad()
def knn_sweep(
    bank: Features,
    query: Features,
    *,
    attribute: str,
    ks: Sequence[int],
    temperatures: Sequence[float],
    memory: float = 1.0,
    search: str = "exact",
) -> dict[str, float]:
    """As :func:`knn`, for every k and temperature from one search of the neighbours.

    Args:
        bank: as for :func:`knn`.
        query: likewise.
        attribute: which labels.
        ks: the numbers of neighbours.
        temperatures: the T.
        memory: gigabytes that the cosines of the queries compared at a time may take.
        search: ``exact``, on the features' device; ``faiss``: also exact, by faiss on the CPU.

    Returns:
        ``knn_<attribute>_k<k>_t<T>`` (:func:`sweep_name`), each with its chance; which is the best is not told,
        since that would be chosen on the query.

    Raises:
        ValueError: as for :func:`knn`; faiss is asked for and not there, with the extra that has it.
    """
    if search not in ("exact", "faiss"):
        raise ValueError(f"search={search}; set it to exact or faiss")
    chunk_size = 0 if search == "faiss" else rows_within(memory, len(bank.trunk), itemsize=6)
    predicted, labels = _predict(bank, query, attribute, ks, temperatures, chunk_size)
    pairs = [(k, temperature) for k in ks for temperature in temperatures]
    values: dict[str, float] = {}
    for (k, temperature), classes in zip(pairs, predicted, strict=True):
        values |= accuracy(sweep_name(attribute, k, temperature), classes, labels)
    return values


def sweep_name(attribute: str, k: int, temperature: float) -> str:
    """What :func:`knn_sweep` calls a number."""
    return f"knn_{attribute}_k{k}_t{temperature:g}"


def _predict(
    bank: Features,
    query: Features,
    attribute: str,
    ks: Sequence[int],
    temperatures: Sequence[float],
    chunk_size: int,
) -> tuple[list[Tensor], Tensor]:
    """Classes (M,) for every k and, within it, every temperature; and the labels. A chunk size of 0 means faiss."""
    if not ks or not temperatures or min(ks) < 1 or min(temperatures) <= 0:
        raise ValueError(
            f"set k >= 1 and temperature > 0, not k={min(ks, default=None)}, "
            f"temperature={min(temperatures, default=None)}"
        )
    bank_rows, bank_labels = labelled(bank, attribute)
    rows, labels = labelled(query, attribute)
    classes, target = bank_labels.unique(return_inverse=True)
    keys = F.normalize(finite(bank.trunk[bank_rows]), dim=1)
    queries = finite(query.trunk[rows])
    most = min(max(ks), len(keys))
    search = _Faiss(keys) if chunk_size == 0 else None
    predicted: list[list[Tensor]] = []
    for chunk in queries.split(chunk_size or 4096):
        chunk = F.normalize(chunk, dim=1)
        cosine, neighbour = largest(chunk @ keys.T, most) if search is None else search(chunk, most)  # (chunk, most)
        near = target[neighbour]
        votes = [
            vote(cosine[:, :k], near[:, :k], temperature, len(classes)) for k in ks for temperature in temperatures
        ]
        predicted.append([classes[v.argmax(1)] for v in votes])
    return [torch.cat(parts) for parts in zip(*predicted, strict=True)], labels


def vote(cosine: Tensor, label: Tensor, temperature: float, num_classes: int) -> Tensor:
    """The votes (M, C) of neighbours (M, k), the nearest of which stands first."""
    weight = ((cosine - cosine[:, :1]) / temperature).exp()  # a factor a query: the same vote, no overflow
    return weight.new_zeros(len(cosine), num_classes).scatter_add_(1, label, weight)


BLOCK = 32  # entries whose maximum is found at once; of 16 to 128 the fastest on a CPU with AVX-512


def largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What ``values.topk(k)`` gives, for long rows and few k up to three times faster.

    A row is cut into blocks. At most k blocks hold an entry of the k largest, and those are among the k blocks with
    the largest maxima, which a processor finds at the speed of its memory: so only their entries are searched. Which
    of equal entries is taken is open, as in torch's.

    Args:
        values: (M, N).
        k: at most N.

    Returns:
        The k largest of each row in falling order, and their positions: (M, k) each.
    """
    num_blocks = values.shape[1] // BLOCK
    if num_blocks < 4 * k:
        return values.topk(k)
    blocks = values[:, : num_blocks * BLOCK].unflatten(1, (num_blocks, BLOCK))
    chosen = blocks.amax(2).topk(k, sorted=False)[1][:, :, None]  # (M, k, 1)
    found = blocks.gather(1, chosen.expand(-1, -1, BLOCK)).flatten(1)  # (M, k BLOCK)
    entries = torch.arange(BLOCK, device=values.device)
    positions = (chosen * BLOCK + entries).flatten(1)
    rest = torch.arange(num_blocks * BLOCK, values.shape[1], device=values.device)
    found = torch.cat([found, values[:, rest]], 1)
    positions = torch.cat([positions, rest.expand(len(values), -1)], 1)
    found, place = found.topk(k)
    return found, positions.gather(1, place)


class _Faiss:
    """Exact search by faiss, which has its own threads and blocks."""

    def __init__(self, keys: Tensor) -> None:
        try:
            import faiss
        except ImportError as error:
            raise ValueError("search=faiss needs faiss: pip install 'repr-pretrain[faiss]'") from error
        self.index: Any = faiss.IndexFlatIP(keys.shape[1])
        self.index.add(keys.float().cpu().numpy())

    def __call__(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        cosine, neighbour = self.index.search(queries.float().cpu().numpy(), k)
        return torch.from_numpy(cosine).to(queries.device), torch.from_numpy(neighbour).to(queries.device)

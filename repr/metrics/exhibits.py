"""What a person looks at beside the numbers: a map of the features, nearest neighbours, confusions, the spectrum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from repr.batch import evenly_spread
from repr.metrics.features import Features, distinct_captions, one_caption
from repr.metrics.geometry import spectrum

# Flat names with slashes, as they stand in an .npz file; :func:`exhibits` says which there are.
Exhibits = dict[str, np.ndarray]

PCA_DIM = 32  # coordinates that are kept of a feature; t-SNE starts from them
MAX_BANK = 100_000  # rows of the bank among which neighbours are looked for
SAMPLE = 20_000  # rows of which spectrum and principal axes are computed


class NamedClasses(NamedTuple):
    """The classes that zero-shot classification chooses among; see :func:`repr.metrics.zero_shot.zero_shot`."""

    attribute: str
    embeddings: Tensor  # (C, D)
    labels: Tensor  # (C,)
    names: Sequence[str]  # C, as they stand in the sentences


@torch.no_grad()
def exhibits(
    bank: Features,
    query: Features,
    *,
    attributes: Mapping[str, Sequence[str]],
    classes: Mapping[str, NamedClasses] | None = None,
    num_points: int = 500,
    num_queries: int = 6,
    num_nearest: int = 5,
) -> Exhibits:
    """Reduce the feature tables of an evaluation to what a page can show; small, whatever N.

    Points and queries are evenly spread over the set, so that none is picked for looking good.

    Args:
        bank: rows of the training set, among which pictures find their nearest by ``trunk``.
        query: the evaluated set; text and labels are optional.
        attributes: attribute -> class names; the position of a name is its label.
        classes: kind of zero-shot classification -> what it chooses among.
        num_points: rows on the map at most, M.
        num_queries: queries of each gallery, Q.
        num_nearest: neighbours of a query, k; fewer where the table is smaller.

    Returns:
        Arrays by name, in numpy on the CPU; rows are those of the data source (``Features.index``):

        ============================== ================= ======================================================
        ``rows``                       (M,) int64        of the source, on the map
        ``labels/<attribute>``         (M,) int64        -1: none
        ``names/<attribute>``          (classes,) str    of all its labels, as class files have them, else as the data
        ``map/pca``                    (M, <= 32)        principal coordinates of ``image`` at unit length
        ``map/pairs``                  (M, 2, 2)         two principal coordinates of image and text together
        ``gallery/<kind>/query``       (Q,) int64        rows of the set
        ``gallery/<kind>/nearest``     (Q, k) int64      rows of the set, for ``image_to_image`` of the training set
        ``gallery/<kind>/right/<of>``  (Q, k) int8       1 right, 0 wrong, -1 not known; of the caption or a label
        ``confusion/<kind>/<of>``      (P, 3) int64      true label, predicted label, how often (above 0)
        ``spectrum/<table>``           (D,) float64      eigenvalues of the covariance, falling
        ``num_samples``                () int64          rows of which they were computed
        ``left_out/<part>``            () str            why there is no such part
        ============================== ================= ======================================================

        Kinds of galleries: ``image_to_text`` and ``text_to_image`` (cosine of the embeddings, over distinct captions,
        as in retrieval), ``image_to_image`` (cosine of ``trunk``). Kinds of confusion: those of ``classes``, over
        all rows, and ``nearest`` (the label of the nearest row of the bank), over the M rows. The first caption of each
        image counts. A table that is not finite, or has fewer than three rows, has only ``left_out``.
    """
    if len(query.image) < 3:
        return {"left_out/all": np.array(f"the set has {len(query.image)} rows; three are the least that can be drawn")}
    query = one_caption(query)
    tables = [query.image, query.trunk, *([] if query.text is None else [query.text]), bank.trunk]
    if not all(table.isfinite().all() for table in tables):
        return {"left_out/all": np.array("the features hold NaN or infinity")}
    points = evenly_spread(len(query.image), num_points, query.image.device)
    shown = {name: labels[points] for name, labels in query.labels.items() if name in attributes}
    shown = {name: labels for name, labels in shown.items() if len(set(labels.tolist()) - {-1}) > 1}
    arrays: dict[str, Tensor | np.ndarray] = {"rows": query.index[points]}
    arrays |= {f"labels/{name}": labels for name, labels in shown.items()}
    arrays |= {f"names/{name}": np.array(list(names), dtype=np.str_) for name, names in attributes.items()}
    arrays |= _maps(query, points) | _spectra(query)
    queries = points[evenly_spread(len(points), num_queries, points.device)]
    arrays |= _neighbours(bank, query, points, shown, num_queries, num_nearest)
    arrays |= _captions(query, queries, num_nearest)
    for kind, known in (classes or {}).items():
        arrays[f"confusion/{kind}/{known.attribute}"] = _zero_shot(query, known)
        # Those of the data may be codes, and the classes more than they have.
        spoken = dict(enumerate(attributes[known.attribute])) | dict(
            zip(known.labels.tolist(), known.names, strict=True)
        )
        names = [spoken.get(label, "") for label in range(max(spoken) + 1)]
        arrays[f"names/{known.attribute}"] = np.array(names, dtype=np.str_)
    if not classes:
        arrays["left_out/zero_shot"] = np.array("no class file is set for this set (eval.zero_shot)")
    if not shown:
        arrays["left_out/labels"] = np.array("no attribute has two classes among the rows shown: nothing is coloured")
    return {name: value.cpu().numpy() if isinstance(value, Tensor) else value for name, value in arrays.items()}


def _maps(query: Features, points: Tensor) -> dict[str, Tensor]:
    sample = evenly_spread(len(query.image), SAMPLE, query.image.device)
    image = F.normalize(query.image, dim=1)
    maps = {"map/pca": _project(image[points], image[sample], PCA_DIM)}
    if query.text is not None:
        text = F.normalize(query.text, dim=1)
        both = torch.cat([image[sample], text[sample]])
        maps["map/pairs"] = torch.stack([_project(x[points], both, 2) for x in (image, text)], dim=1)
    return maps


def _project(x: Tensor, of: Tensor, dim: int) -> Tensor:
    """Coordinates of ``x`` (M, D) along the first principal axes of another table, float32; signs are fixed."""
    mean = of.double().mean(0)
    centred, num = of.double() - mean, min(dim, *of.shape)
    if len(of) < of.shape[1]:  # by the products of the rows, of which there are fewer than columns
        axes = F.normalize(centred.T @ torch.linalg.eigh(centred @ centred.T)[1].flip(1)[:, :num], dim=0)
    else:
        axes = torch.linalg.eigh(centred.T @ centred)[1].flip(1)[:, :num]  # (D, num)
    axes = F.pad(axes, (0, max(0, 2 - axes.shape[1])))
    signs = axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    return ((x.double() - mean) @ (axes * signs)).float()


def _spectra(query: Features) -> dict[str, Tensor]:
    sample = evenly_spread(len(query.image), SAMPLE, query.image.device)
    same = query.trunk.shape == query.image.shape and torch.equal(query.trunk, query.image)
    tables = {"image": query.image, "trunk": None if same else query.trunk, "text": query.text}
    spectra = {f"spectrum/{name}": spectrum(table[sample]) for name, table in tables.items() if table is not None}
    return spectra | {"num_samples": torch.tensor(len(sample))}


def _neighbours(
    bank: Features, query: Features, points: Tensor, shown: Mapping[str, Tensor], num_queries: int, num_nearest: int
) -> dict[str, Tensor]:
    """The nearest pictures of the bank, and whose label they would give."""
    rows = evenly_spread(len(bank.trunk), MAX_BANK, bank.trunk.device)
    keys = F.normalize(bank.trunk[rows], dim=1)
    nearest = [
        (F.normalize(part, dim=1) @ keys.T).topk(min(num_nearest, len(keys)))[1]
        for part in query.trunk[points].split(256)
    ]
    neighbour = rows[torch.cat(nearest)]  # (M, k) positions in the bank
    queries = evenly_spread(len(points), num_queries, points.device)
    name = "gallery/image_to_image"
    arrays = {f"{name}/query": query.index[points[queries]], f"{name}/nearest": bank.index[neighbour[queries]]}
    for attribute, labels in shown.items():
        known = bank.labels.get(attribute)
        if known is None or not torch.isin(labels[labels >= 0], known).any():
            continue  # classes that the bank does not have
        guess = known[neighbour]  # (M, k)
        right = (guess == labels[:, None]).to(torch.int8)
        right[(guess < 0) | (labels[:, None] < 0)] = -1
        arrays[f"{name}/right/{attribute}"] = right[queries]
        arrays[f"confusion/nearest/{attribute}"] = _count(labels, guess[:, 0])
    return arrays


def _captions(query: Features, queries: Tensor, num_nearest: int) -> dict[str, Tensor | np.ndarray]:
    """Pictures that look for their caption, and captions for their picture."""
    if query.text is None:
        return {"left_out/image_to_text": np.array("the encoder or the set has no captions")}
    first, caption = distinct_captions(query)  # as in retrieval
    asked = first[caption[queries]].unique()  # a caption looks once
    image, text = F.normalize(query.image, dim=1), F.normalize(query.text, dim=1)
    to_text = first[(image[queries] @ text[first].T).topk(min(num_nearest, len(first)))[1]]
    to_image = (text[asked] @ image.T).topk(min(num_nearest, len(image)))[1]
    arrays: dict[str, Tensor | np.ndarray] = {}
    for kind, start, nearest in (("image_to_text", queries, to_text), ("text_to_image", asked, to_image)):
        right = (caption[nearest] == caption[start][:, None]).to(torch.int8)
        arrays |= {f"gallery/{kind}/query": query.index[start], f"gallery/{kind}/nearest": query.index[nearest]}
        arrays[f"gallery/{kind}/right/caption"] = right
    return arrays


def _zero_shot(query: Features, classes: NamedClasses) -> Tensor:
    labels = query.labels[classes.attribute]
    rows = (labels >= 0).nonzero().squeeze(1)
    keys = F.normalize(classes.embeddings.to(query.image.device), dim=1)
    parts = [(F.normalize(part, dim=1) @ keys.T).argmax(1) for part in query.image[rows].split(8192)]
    return _count(labels[rows], classes.labels.to(labels.device)[torch.cat(parts)])


def _count(labels: Tensor, predicted: Tensor) -> Tensor:
    """How often each true label got each prediction: (P, 3), the most frequent first, of rows that have a label."""
    known = (labels >= 0) & (predicted >= 0)
    pairs, counts = torch.stack([labels[known], predicted[known]], dim=1).unique(dim=0, return_counts=True)
    return torch.cat([pairs, counts[:, None]], dim=1)[counts.argsort(descending=True, stable=True)]

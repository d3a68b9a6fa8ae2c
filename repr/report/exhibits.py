"""Exhibits in a folder: a map in two dimensions, small pictures and captions are added to those of the metrics."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from repr.data.sources.source import Source, has_pictures
from repr.files import replacing
from repr.metrics.exhibits import Exhibits
from repr.runs.folder import EXHIBITS

POINT, NEIGHBOUR = 48, 96  # sides in pixels of the pictures of the map and of the galleries
COLUMNS = 25  # pictures beside each other on a sheet
MAX_CHARS = 100  # of a caption
CLUSTERS, MEMBERS = 6, 8  # of a stage that are shown, and pictures of each
LEAST = 10  # rows from which t-SNE can tell neighbours from others


def save_exhibits(folder: Path, exhibits: Mapping[str, Exhibits], sources: Mapping[str, Source]) -> None:
    """Write ``<folder>/exhibits/<set>.npz`` of every set, each replaced as a whole.

    Call it on one process. It reads at most ``num_points`` pictures of a set and those of its galleries, and adds to
    what :func:`repr.metrics.exhibits.exhibits` gives:

    ====================== ============== ===================================================================
    ``map/tsne``           (M, 2)         t-SNE of ``map/pca``; a function of it (fixed seed)
    ``captions``           (M,) str       first caption of each row on the map, where the set has any
    ``sheet/map``          bytes          WebP, the M pictures, 25 beside each other
    ``sheet/<kind>/...``   bytes          likewise of the ``query`` and ``nearest`` rows of a gallery, flattened
    ``captions/<kind>/..`` (...,) str     their first captions
    ====================== ============== ===================================================================

    Args:
        folder: of the run, or of an evaluation.
        exhibits: set -> what the metrics give.
        sources: set -> its data source, and ``bank`` -> the training set.
    """
    for name, given in exhibits.items():
        arrays: dict[str, Any] = dict(given)
        if "rows" in arrays:
            if len(arrays["rows"]) >= LEAST:
                arrays["map/tsne"] = tsne(arrays["map/pca"])
            if has_pictures(sources[name]):
                arrays["sheet/map"] = sheet(sources[name], arrays["rows"], POINT)
                if any(captions := first_captions(sources[name], arrays["rows"])):
                    arrays["captions"] = np.array(captions, dtype=np.str_)
                arrays |= _gallery_pictures(arrays, sources[name], sources["bank"])
            else:
                arrays = {key: value for key, value in arrays.items() if not key.startswith("gallery/")}
                arrays["left_out/galleries"] = np.array("the set has no pictures")
        with replacing(folder / EXHIBITS / f"{name}.npz") as file:
            np.savez_compressed(file, **arrays)


def load_exhibits(folder: Path) -> dict[str, Exhibits]:
    """What was saved: set -> arrays; empty where there is nothing.

    Raises:
        ValueError: a file is damaged.
    """
    exhibits = {}
    for path in sorted(folder.glob(f"{EXHIBITS}/*.npz")):
        try:
            with np.load(path, allow_pickle=False) as arrays:
                exhibits[path.stem] = dict(arrays)
        except (ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{path} is damaged ({error}); move it away, and it is no longer shown") from error
    return exhibits


def tsne(coordinates: np.ndarray) -> np.ndarray:
    """Map (M, D) to (M, 2) float32, neighbours beside each other (van der Maaten & Hinton, 2008), M at least 10."""
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    perplexity = min(30.0, (len(coordinates) - 1) / 3)
    init = "pca" if coordinates.std() > 0 else "random"  # rows that are all equal have no axes
    # Several threads would wait for each other thousands of times: on two cores with another program beside, 500 rows
    # take 22 s in place of 1.2.
    with threadpool_limits(1):
        return TSNE(init=init, perplexity=perplexity, max_iter=500, random_state=0).fit_transform(coordinates)


def sheet(source: Source, rows: Sequence[int] | np.ndarray, side: int) -> np.ndarray:
    """The centres of pictures side by side, as the bytes of a WebP file; gray where one cannot be read."""
    num_lines = -(-len(rows) // COLUMNS)
    canvas = Image.new("RGB", (COLUMNS * side, num_lines * side), "#e2e8f0")
    for position, row in enumerate(rows):
        try:
            picture = ImageOps.fit(source.image(int(row)), (side, side))
        except OSError:
            continue
        line, column = divmod(position, COLUMNS)
        canvas.paste(picture, (column * side, line * side))
    buffer = io.BytesIO()
    canvas.save(buffer, "WEBP", quality=80, method=2)
    return np.frombuffer(buffer.getvalue(), dtype=np.uint8)


def first_captions(source: Source, rows: Sequence[int] | np.ndarray) -> list[str]:
    """The main caption of each row on one line, cut to 100 characters; '' where there is none."""
    captions = []
    for row in rows:
        try:
            texts = source.captions(int(row))
        except OSError:
            texts = []
        text = " ".join(texts[0][: 4 * MAX_CHARS].split()) if texts else ""
        captions.append(text if len(text) <= MAX_CHARS else text[: MAX_CHARS - 1] + "…")
    return captions


def save_clusters_shown(folder: Path, ids: np.ndarray, source: Source) -> None:
    """Write some clusters of a training set as the exhibits of its ``bank``.

    ====================== ============== ===================================================================
    ``clusters/number``    () int64       of all clusters
    ``clusters/size``      (C,) int64     of those that are shown, from the largest to the smallest
    ``clusters/rows``      (C, 8) int64   rows of each, evenly spread over it, -1 where it has fewer
    ``sheet/clusters``     bytes          WebP, their pictures
    ``captions/clusters``  (...,) str     their first captions
    ====================== ============== ===================================================================

    Args:
        folder: of the run that was clustered.
        ids: (N,) int64, the cluster of each row; -1: none.
        source: the training set.
    """
    present, sizes = np.unique(ids[ids >= 0], return_counts=True)
    by_size = np.argsort(-sizes, kind="stable")
    chosen = by_size[np.unique(np.linspace(0, len(by_size) - 1, CLUSTERS).astype(int))]
    rows = np.full((len(chosen), MEMBERS), -1)
    for place, cluster in enumerate(chosen):
        members = np.flatnonzero(ids == present[cluster])
        some = members[np.unique(np.linspace(0, len(members) - 1, MEMBERS).astype(int))]
        rows[place, : len(some)] = some
    shown = rows[rows >= 0]
    arrays = {"clusters/number": np.array(len(present)), "clusters/size": sizes[chosen], "clusters/rows": rows}
    arrays["captions/clusters"] = np.array(first_captions(source, shown), dtype=np.str_)
    if has_pictures(source):
        arrays["sheet/clusters"] = sheet(source, shown, NEIGHBOUR)
    with replacing(folder / EXHIBITS / "bank.npz") as file:
        np.savez_compressed(file, **arrays)


def _gallery_pictures(arrays: Exhibits, source: Source, bank: Source) -> Exhibits:
    """Sheets and captions of the galleries."""
    added = {}
    for kind in gallery_kinds(arrays):
        for part, shown in zip(("query", "nearest"), kind.split("_to_"), strict=True):
            owner = bank if (kind, part) == ("image_to_image", "nearest") else source
            rows = arrays[f"gallery/{kind}/{part}"].flatten()
            if shown == "image":
                added[f"sheet/{kind}/{part}"] = sheet(owner, rows, NEIGHBOUR)
            added[f"captions/{kind}/{part}"] = np.array(first_captions(owner, rows), dtype=np.str_)
    return added


def gallery_kinds(arrays: Exhibits) -> list[str]:
    """Galleries that there are, such as ``image_to_text``."""
    return [name.split("/")[1] for name in arrays if name.startswith("gallery/") and name.endswith("/query")]

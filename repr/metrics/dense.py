"""What a feature map says of its places: segmentation by a linear probe and by neighbours, and correspondence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from repr.batch import NO_CLASS
from repr.metrics.features import DenseFeatures, finite, standardisation
from repr.metrics.scores import TIE

Scorer = Callable[[Tensor], Mapping[str, Tensor]]  # cells (M, C) -> mask -> scores (M, K)


def linear_segmentation(
    bank: DenseFeatures,
    query: DenseFeatures,
    *,
    penalty: float = 1e-4,
    max_cells: int = 20_000,
    num_steps: int = 100,
    chunk_size: int = 32,
) -> dict[str, float]:
    r"""Segmentation by a linear layer on frozen cells, trained by cross-entropy on the bank.

    .. math::
        \min_{W, b} -\frac{1}{N} \sum_i \sum_c s_{ic} \log \mathrm{softmax}(x_i W + b)_c + \lambda \lVert W \rVert^2,
        \qquad \hat y_p = \arg\max_c \mathrm{enlarged}(x W + b)_{pc}

    :math:`s_i` are the shares of the classes among the pixels of cell i, so this is the cross-entropy of each pixel,
    given the features of its cell. The scores of cells are enlarged to pixels (bilinear) and compared there. The
    features are standardised with the bank's mean and deviation; L-BFGS solves the convex problem without randomness.
    (Ridge regression would name the ground nearly everywhere: least squares hides classes that are rare.)

    Args:
        bank: its maps and masks.
        query: likewise, of other pictures.
        penalty: :math:`\lambda`, of the weights without the intercept.
        max_cells: at most so many cells of the bank, drawn with a fixed seed.
        num_steps: of L-BFGS at most.
        chunk_size: pictures segmented at a time.

    Returns:
        ``linear_miou_<mask>`` and ``linear_pixels_<mask>`` as in :func:`segmentation_scores`, for every mask of which
        the bank shows two classes or more and the query one. Pixels without a class are left out.

    Raises:
        ValueError: features are not finite, or the penalty is not positive.

    Source: Oquab et al., 2023, arXiv 2304.07193, section 7.4 (a linear layer on frozen patches, enlarged).
    """
    if penalty <= 0:
        raise ValueError(f"set penalty > 0, not {penalty}: else the classes of a bank that they part have no best fit")
    cells, shares = _bank_cells(bank, query, max_cells)
    if not shares:
        return {}
    mean, scale = standardisation(cells)
    layers = {mask: _fit_linear((cells - mean) * scale, share, penalty, num_steps) for mask, share in shares.items()}

    def scorer(queries: Tensor) -> dict[str, Tensor]:
        standard = (queries - mean) * scale
        return {mask: standard @ weight + bias for mask, (weight, bias) in layers.items()}

    return _segmentation("linear", query, shares, scorer, chunk_size)


@torch.inference_mode(False)  # evaluation may be within one, where nothing has a gradient
@torch.enable_grad()
def _fit_linear(cells: Tensor, shares: Tensor, penalty: float, num_steps: int) -> tuple[Tensor, Tensor]:
    """Weight (C, K) and intercept (K,) of the least penalised cross-entropy; cells without a class count nothing."""
    classed = shares.sum(1) > 0
    x, y = cells[classed].clone(), shares[classed].clone()
    weight = x.new_zeros(x.shape[1], y.shape[1], requires_grad=True)
    bias = x.new_zeros(y.shape[1], requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=num_steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(x @ weight + bias, y) + penalty * weight.square().sum()
        value.backward()
        return value

    solver.step(loss)
    return weight.detach(), bias.detach()


@torch.no_grad()
def knn_segmentation(
    bank: DenseFeatures,
    query: DenseFeatures,
    *,
    k: int = 20,
    temperature: float = 0.07,
    max_cells: int = 20_000,
    chunk_size: int = 32,
) -> dict[str, float]:
    r"""Segmentation by the cells of the bank nearest to a cell, which vote with the shares of the classes in them.

    .. math::
        \hat y_p = \arg\max_c \mathrm{enlarged}(v)_{pc}, \qquad v_q = \sum_{b \in kNN(q)} s_b\, e^{\cos(q, b) / T}

    with the votes of a cell divided by their sum. Enlarged and compared as in :func:`linear_segmentation`.

    Args:
        bank: its maps and masks.
        query: likewise, of other pictures.
        k: neighbours, clipped to the cells of the bank.
        temperature: T.
        max_cells: at most so many cells of the bank, drawn with a fixed seed.
        chunk_size: pictures segmented at a time; memory is chunk_size x h w x max_cells.

    Returns:
        ``knn_miou_<mask>`` and ``knn_pixels_<mask>``, for the masks of :func:`linear_segmentation`.

    Raises:
        ValueError: features are not finite; k or temperature is not positive.

    Source: Balazevic et al., 2023, arXiv 2306.01667, section 3 (votes of the nearest patches, enlarged).
    """
    if k < 1 or temperature <= 0:
        raise ValueError(f"set k >= 1 and temperature > 0, not k={k}, temperature={temperature}")
    cells, shares = _bank_cells(bank, query, max_cells)
    keys = F.normalize(cells, dim=1)

    def scorer(queries: Tensor) -> dict[str, Tensor]:
        cosine, neighbour = (F.normalize(queries, dim=1) @ keys.T).topk(min(k, len(keys)))  # (M, k)
        weight = (cosine / temperature).softmax(1)[..., None]
        return {mask: (weight * share[neighbour]).sum(1) for mask, share in shares.items()}

    return _segmentation("knn", query, shares, scorer, chunk_size)


@torch.no_grad()
def correspondence(
    bank: DenseFeatures, query: DenseFeatures, *, tolerances: Sequence[float] = (0.5, 1.0), chunk_size: int = 32
) -> dict[str, float]:
    r"""How often the nearest neighbour of a cell in another crop of the picture is the cell that shows the same place.

    Every cell of the first crop whose centre lies in the second looks for its nearest cell (by cosine) there. This is
    right where its centre is at most ``tolerance`` cells from that place, along both axes: with 0.5 it is the cell that
    holds the place, with 1 one of the up to nine next to it. A tie is no success: the nearest right cell must be
    strictly nearer than every wrong one.

    Args:
        bank: is not used.
        query: ``crops`` and ``boxes``, where a flip swaps the ends.
        tolerances: in cells of the second crop.
        chunk_size: pictures compared at a time, in float64.

    Returns:
        ``correspondence@<tolerance>``, averaged over all asked cells of all pictures, in [0, 1], and with ``.chance``
        the share of right cells among all. Nothing where no two crops meet.

    Raises:
        ValueError: features are not finite, or boxes not float32.

    Source: ours; the geometry is that of Xie et al., 2020 (PixPro), arXiv 2011.10043, section 3.1.
    """
    if query.boxes.dtype != torch.float32:
        raise ValueError(f"boxes are {query.boxes.dtype}; half precision moves cells, keep them in float32")
    asked, hits, right = 0, dict.fromkeys(tolerances, 0), dict.fromkeys(tolerances, 0.0)
    for a, b, boxes in zip(*(x.split(chunk_size) for x in (*query.crops, query.boxes)), strict=True):
        inside, offset = cell_offsets(boxes[:, 0], boxes[:, 1], grid_a=a.shape[2:], grid_b=b.shape[2:])
        keys, queries = (F.normalize(finite(x.double()).flatten(2), dim=1) for x in (b, a))
        cosine = (queries.mT @ keys)[inside]  # (M, hw of b), M asked cells
        offset = offset[inside].abs().amax(-1)  # (M, hw of b)
        asked += len(cosine)
        for tolerance in tolerances:
            near = offset <= tolerance
            best, wrong = (cosine.masked_fill(~cells, -torch.inf).amax(1) for cells in (near, ~near))
            hits[tolerance] += int((best > wrong + TIE).sum())
            right[tolerance] += float(near.double().mean(1).sum())
    if not asked:
        return {}
    scores = {f"correspondence@{tolerance:g}": hits[tolerance] / asked for tolerance in tolerances}
    return scores | {f"correspondence@{tolerance:g}.chance": right[tolerance] / asked for tolerance in tolerances}


def cell_offsets(
    box_a: Tensor, box_b: Tensor, *, grid_a: Sequence[int], grid_b: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Tell where the cells of one crop lie on the grid of another.

    Args:
        box_a: (N, 4) ``(x0, y0, x1, y1)`` of the first crops in their pictures; a flip swaps the ends.
        box_b: (N, 4), likewise.
        grid_a: rows and columns of the first map.
        grid_b: likewise.

    Returns:
        Which cells of the first crop have their centre in the second, (N, HWa) bool, and the way from there to the
        centre of every cell of the second, (N, HWa, HWb, 2), down and right, in cells of the second.
    """
    places = []  # down and right, in cells of b
    for axis, (x0, x1) in enumerate(((1, 3), (0, 2))):
        share = (torch.arange(grid_a[axis], device=box_a.device) + 0.5) / grid_a[axis]
        centre = box_a[:, x0, None] + share * (box_a[:, x1] - box_a[:, x0])[:, None]  # (N, h) in the picture
        start, end = box_b[:, x0, None], box_b[:, x1, None]
        places.append((centre - start) / (end - start) * grid_b[axis])  # a crop of one pixel gives inf or nan
    down, right = torch.broadcast_tensors(places[0][:, :, None], places[1][:, None, :])
    place = torch.stack([down, right], dim=-1).flatten(1, 2)  # (N, HWa, 2)
    inside = ((place >= 0) & (place <= place.new_tensor(list(grid_b)))).all(-1)
    rows, columns = (torch.arange(n, device=place.device) + 0.5 for n in grid_b)
    centres = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)  # (HWb, 2)
    return inside, centres - place[:, :, None]


def segmentation_scores(name: str, confusion: Tensor) -> dict[str, float]:
    """Score a segmentation by its numbers of pixels (K, K), by true and predicted class.

    Returns:
        ``miou``, the mean over the classes that are true or predicted somewhere of intersection / union over all
        pixels; and ``pixels``, the share of right pixels. Their names are put where ``name`` has ``{}``. ``.chance`` is
        the better of two that do not look: naming the largest class everywhere, and drawing classes at true shares.
    """
    confusion = confusion.double()
    true, predicted, hits = confusion.sum(1), confusion.sum(0), confusion.diagonal()
    union = true + predicted - hits
    share = true[true > 0] / true.sum()
    return {
        name.format("miou"): (hits[union > 0] / union[union > 0]).mean().item(),
        f"{name.format('miou')}.chance": max(share.max().item() / len(share), (share / (2 - share)).mean().item()),
        name.format("pixels"): (hits.sum() / true.sum()).item(),
        f"{name.format('pixels')}.chance": share.max().item(),
    }


def _segmentation(
    kind: str, query: DenseFeatures, shares: Mapping[str, Tensor], scorer: Scorer, chunk_size: int
) -> dict[str, float]:
    """Score the cells of the query, enlarge the scores to pixels, and compare with the masks."""
    confusion = {mask: share.new_zeros(share.shape[1] ** 2, dtype=torch.int64) for mask, share in shares.items()}
    for rows in torch.arange(len(query.index)).split(chunk_size) if shares else ():
        maps = finite(query.maps[rows])
        for mask, scores in scorer(_cells(maps)).items():
            truth = query.masks[mask][rows]
            grid = scores.float().unflatten(0, (len(maps), *maps.shape[2:])).permute(0, 3, 1, 2)  # (n, K, h, w)
            enlarged = F.interpolate(grid, truth.shape[1:], mode="bilinear", align_corners=False)
            classed, num = truth != NO_CLASS, grid.shape[1]
            pairs = truth[classed].long() * num + enlarged.argmax(1)[classed]
            confusion[mask] += pairs.bincount(minlength=num * num)
    values: dict[str, float] = {}
    for mask, counts in confusion.items():
        values |= segmentation_scores(f"{kind}_{{}}_{mask}", counts.unflatten(0, (shares[mask].shape[1], -1)))
    return values


def _bank_cells(bank: DenseFeatures, query: DenseFeatures, max_cells: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Cells of the bank (M, C), and by mask the shares of the classes in them (M, K)."""
    num = bank.maps.shape[0] * bank.maps.shape[2] * bank.maps.shape[3]
    drawn = torch.randperm(num, generator=torch.Generator().manual_seed(0))[:max_cells].sort().values
    shares = {}
    for mask in bank.masks.keys() & query.masks.keys():
        classes, asked = (table.masks[mask][table.masks[mask] != NO_CLASS] for table in (bank, query))
        if len(asked) and len(classes.unique()) > 1:
            num_classes = int(max(classes.max(), asked.max())) + 1
            parts = [class_shares(part, num_classes, bank.maps.shape[2:]) for part in bank.masks[mask].split(32)]
            shares[mask] = torch.cat(parts)[drawn.to(classes.device)]
    cells = _cells(bank.maps)[drawn.to(bank.maps.device)] if shares else bank.maps.new_empty(0, bank.maps.shape[1])
    return finite(cells), dict(sorted(shares.items()))


def class_shares(masks: Tensor, num_classes: int, grid: Sequence[int]) -> Tensor:
    """Give the shares of the K classes in masks (N, H, W) among the classed pixels of each cell of a grid.

    Returns:
        (N * rows * columns, K) float32, row-major; a row is zero where no pixel has a class.
    """
    planes = (masks[:, None] == torch.arange(num_classes, device=masks.device)[:, None, None]).float()  # (N, K, H, W)
    pooled = F.adaptive_avg_pool2d(planes, (grid[0], grid[1])).permute(0, 2, 3, 1).flatten(0, 2)
    return pooled / pooled.sum(1, keepdim=True).clamp(min=torch.finfo(pooled.dtype).tiny)


def _cells(maps: Tensor) -> Tensor:
    """(N, C, h, w) -> (N * h * w, C), row-major."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)

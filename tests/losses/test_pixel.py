"""Masks, consistency and contrast of cells: the authors' numbers, the formulas written out, and laws."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from repr.losses.pixel import pixel_consistency, pixel_contrast, positive_mask
from repr.models.propagation import Propagation
from tests.golden import golden
from tests.losses.test_laws import Largest

LOSS, CONTRAST = golden("pixpro_loss"), golden("pixcontrast_paper")
LOSSES = {"consistency": pixel_consistency, "contrast": lambda *x: pixel_contrast(*x, temperature=0.3)}


def stored(data: dict, case: str) -> dict[str, Tensor]:
    return {key.split("/")[1]: torch.as_tensor(value) for key, value in data.items() if key.startswith(f"{case}/")}


def cases(data: dict) -> list[str]:
    return sorted({key.split("/")[0] for key in data})


def tangent(gradient: Tensor, x: Tensor) -> Tensor:
    """The authors' functions take unit vectors, ours normalise inside."""
    return gradient - (gradient * x).sum(1, keepdim=True) * x


@pytest.mark.parametrize("case", cases(LOSS))
def test_mask_value_and_gradient_equal_the_authors(case: str) -> None:
    data = stored(LOSS, case)
    grid = tuple(data["q"].shape[2:])
    boxes = data["coord_q"], data["coord_k"]
    mask = positive_mask(*boxes, grid_q=grid, grid_k=grid, threshold=float(data["pos_ratio"]))
    assert torch.equal(mask, data["pos_mask"].bool())
    assert mask.sum((1, 2)).tolist() == data["positives_per_image"].tolist()
    for limit in (0.3, 1.0, 1.7):  # the distances behind it
        theirs = data["dist_normalized"] < limit
        assert torch.equal(positive_mask(*boxes, grid_q=grid, grid_k=grid, threshold=limit), theirs)
    q, k = (data[name].flatten(2).requires_grad_() for name in ("q", "k"))
    loss = pixel_consistency(q, k, mask)
    loss.backward()
    torch.testing.assert_close(loss, data["loss"], rtol=1e-5, atol=1e-6)
    for leaf, name in ((q, "q"), (k, "k")):
        theirs = tangent(data[f"grad_{name}"].flatten(2), leaf.detach())
        torch.testing.assert_close(leaf.grad, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", cases(CONTRAST))
def test_contrast_equals_the_papers_formula(case: str) -> None:
    data = stored(CONTRAST, case)
    q, k = (data[name].flatten(2).requires_grad_() for name in ("q", "k"))
    mask = data["pos_mask"].bool()
    loss = pixel_contrast(q, k, mask, temperature=data["temperature"].item())
    torch.testing.assert_close(loss, data["loss_empty_images_as_zero"], rtol=1e-5, atol=1e-6)
    alone = [pixel_contrast(*(x[n : n + 1] for x in (q, k, mask)), temperature=0.3) for n in range(len(q))]
    torch.testing.assert_close(torch.stack(alone), data["per_image_loss"], rtol=1e-5, atol=1e-6)
    # stored is the gradient of the mean over the images that have a positive
    (loss * len(q) / (data["anchors_per_image"] > 0).sum()).backward()
    for leaf, name in ((q, "q"), (k, "k")):
        theirs = tangent(data[f"grad_{name}"].flatten(2), leaf.detach())
        torch.testing.assert_close(leaf.grad, theirs, rtol=1e-4, atol=1e-6)


def random_boxes(num: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    low, side, flip = torch.rand(3, num, 2, generator=generator)
    low, side = low * 0.3, 0.4 + 0.3 * side
    ends = torch.stack([low, low + side], dim=1)  # (N, 2 ends, 2 axes)
    mirrored = (flip[:, 0] < 0.5)[:, None]
    x = torch.where(mirrored, ends[:, :, 0].flip(1), ends[:, :, 0])
    return torch.stack([x[:, 0], ends[:, 0, 1], x[:, 1], ends[:, 1, 1]], dim=1)


def inputs(num: int = 5, dim: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Cells of maps of 3 x 4 and 4 x 2, and a mask in which the first image has no pair."""
    boxes_q, boxes_k = random_boxes(num, 1), random_boxes(num, 2)
    boxes_q[0], boxes_k[0] = torch.tensor([0.0, 0, 0.1, 0.1]), torch.tensor([0.8, 0.8, 1, 1])
    mask = positive_mask(boxes_q, boxes_k, grid_q=(3, 4), grid_k=(4, 2), threshold=1.0)
    assert not mask[0].any()
    assert mask[1:].any((1, 2)).all()
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(num, dim, cells, generator=generator).to(dtype) for cells in (12, 8))
    return q, k, mask


def mask_by_hand(boxes_q: Tensor, boxes_k: Tensor, grid_q: tuple, grid_k: tuple, threshold: float) -> Tensor:
    def cell(box: list[float], grid: tuple, row: int, column: int) -> tuple[float, float, float]:
        w, h = (box[2] - box[0]) / grid[1], (box[3] - box[1]) / grid[0]
        return box[0] + (column + 0.5) * w, box[1] + (row + 0.5) * h, math.hypot(w, h)

    def close(n: int, i: int, j: int) -> bool:
        xq, yq, dq = cell(boxes_q[n].tolist(), grid_q, *divmod(i, grid_q[1]))
        xk, yk, dk = cell(boxes_k[n].tolist(), grid_k, *divmod(j, grid_k[1]))
        return math.hypot(xq - xk, yq - yk) / max(dq, dk) < threshold

    sizes = len(boxes_q), math.prod(grid_q), math.prod(grid_k)
    return torch.tensor([[[close(n, i, j) for j in range(sizes[2])] for i in range(sizes[1])] for n in range(sizes[0])])


@pytest.mark.parametrize("grids", [((3, 4), (4, 2)), ((5, 5), (5, 5)), ((1, 1), (2, 7))])
def test_the_mask_is_its_formula_and_transposes_with_the_views(grids: tuple) -> None:
    a, b = random_boxes(12, 1), random_boxes(12, 2)
    mask = positive_mask(a, b, grid_q=grids[0], grid_k=grids[1], threshold=0.9)
    assert torch.equal(mask, mask_by_hand(a.double(), b.double(), *grids, 0.9))
    assert mask.any()
    assert torch.equal(positive_mask(b, a, grid_q=grids[1], grid_k=grids[0], threshold=0.9), mask.mT)


def test_equal_crops_match_cell_by_cell_and_a_flip_mirrors_the_columns() -> None:
    box = torch.tensor([[0.1, 0.2, 0.5, 0.6]])
    options = {"grid_q": (4, 4), "grid_k": (4, 4), "threshold": 0.7}
    assert torch.equal(positive_mask(box, box, **options)[0], torch.eye(16, dtype=torch.bool))
    flipped = positive_mask(box, box[:, [2, 1, 0, 3]], **options)[0].unflatten(1, (4, 4))
    assert torch.equal(flipped.flip(2).flatten(1), torch.eye(16, dtype=torch.bool))
    point = torch.zeros(1, 4)  # of an image of one pixel
    assert not positive_mask(point, point, **options).any()


def consistency_by_hand(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    total = q.new_zeros(())
    for n in range(len(q)):
        pairs = mask[n].nonzero().tolist()
        cosines = [F.cosine_similarity(q[n, :, i], k[n, :, j], dim=0) for i, j in pairs]
        total = total - 2 * sum(cosines) / (len(pairs) + 1e-6)
    return total / len(q)


def contrast_by_hand(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    total = q.new_zeros(())
    for n in range(len(q)):
        values = []
        for i in range(q.shape[2]):
            if mask[n, i].any():
                powers = (F.cosine_similarity(q[n, :, i : i + 1], k[n], dim=0) / 0.3).exp()
                values.append(-(powers[mask[n, i]].sum() / powers.sum()).log())
        total = total + (sum(values) / len(values) if values else 0)
    return total / len(q)


@pytest.mark.parametrize(("name", "by_hand"), [("consistency", consistency_by_hand), ("contrast", contrast_by_hand)])
def test_value_and_gradient_are_those_of_the_formula(name: str, by_hand: object) -> None:
    q, k, mask = inputs(num=11)
    leaves = [x.clone().requires_grad_() for x in (q, k, q, k)]
    ours, theirs = LOSSES[name](*leaves[:2], mask), by_hand(*leaves[2:], mask)
    torch.testing.assert_close(ours, theirs)
    (3 * ours).backward()
    (3 * theirs).backward()
    torch.testing.assert_close(leaves[0].grad, leaves[2].grad)
    torch.testing.assert_close(leaves[1].grad, leaves[3].grad)
    assert not leaves[0].grad[0].any()  # the image without overlap


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name: str) -> None:
    q, k, mask = inputs(num=3, dim=3)
    torch.autograd.gradcheck(lambda q, k: LOSSES[name](q, k, mask), (q.requires_grad_(), k.requires_grad_()))


@pytest.mark.parametrize("name", LOSSES)
def test_order_scale_and_precision(name: str) -> None:
    q, k, mask = inputs(num=6)
    loss, value = LOSSES[name], LOSSES[name](q, k, mask)
    n, i, j = torch.randperm(6), torch.randperm(12), torch.randperm(8)
    torch.testing.assert_close(loss(q[n][:, :, i], k[n][:, :, j], mask[n][:, i][:, :, j]), value)
    torch.testing.assert_close(loss(5 * q, 0.01 * k, mask), value)
    leaf = q.bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = loss(leaf, k.bfloat16(), mask)
    half.backward()
    assert half.dtype == torch.float32
    assert torch.equal(half, loss(q.bfloat16().float(), k.bfloat16().float(), mask))
    assert leaf.grad.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), value, rtol=0, atol=0.02)


@pytest.mark.parametrize("name", LOSSES)
def test_extremes_are_finite(name: str) -> None:
    q, k, mask = inputs(num=5, dtype=torch.float32)
    for scale in (0.0, 1e-20, 1e18):
        leaf = (q * scale).requires_grad_()
        LOSSES[name](leaf, k, mask).backward()
        assert leaf.grad.isfinite().all()
    sharp = pixel_contrast(q.requires_grad_(), k, mask, temperature=1e-3)
    sharp.backward()
    assert sharp.isfinite()
    assert q.grad.isfinite().all()
    nothing = torch.zeros_like(mask)
    leaf = q.detach().requires_grad_()
    empty = LOSSES[name](leaf, k, nothing)
    empty.backward()
    assert empty.item() == 0
    assert not leaf.grad.any()


def test_values_at_chance_and_at_the_ends_of_the_range() -> None:
    q, _, mask = inputs(num=4)
    mask = mask[1:]
    same = torch.ones(3, 6, 8, dtype=torch.float64)
    counts = mask.sum(2)
    chance = [(8 / counts[n][counts[n] > 0]).log().mean() for n in range(3)]
    torch.testing.assert_close(pixel_contrast(q[1:], same, mask, temperature=0.1), torch.stack(chance).mean().double())
    ones = torch.ones(3, 6, 12, dtype=torch.float64)
    assert pixel_consistency(ones, same, mask).item() == pytest.approx(-2)
    assert pixel_consistency(ones, -same, mask).item() == pytest.approx(2)


def test_numbers_for_every_pair_of_cells_exist_once_at_most() -> None:
    """Of 64 images with 36 cells of two numbers; the mask's distances and the float mask of consistency are whole."""
    num, cells = 64, 36
    boxes = random_boxes(num, 1), random_boxes(num, 2)
    q, k = torch.randn(2, num, 2, cells).unbind()
    q.requires_grad_()
    with Largest() as distances:
        mask = positive_mask(*boxes, grid_q=(6, 6), grid_k=(6, 6), threshold=0.7)
    whole = num * cells * cells
    assert distances.numel == whole
    with Largest() as consistency:
        pixel_consistency(q, k, mask).backward()
    assert consistency.numel == whole
    propagation = Propagation(2, gamma=2.0, num_layers=1)
    for function in (lambda: pixel_contrast(q, k, mask, temperature=0.3), lambda: propagation(q).sum()):
        with Largest() as sliced:
            function().backward()
        assert sliced.numel == whole // 8


@pytest.mark.parametrize(
    ("boxes", "grids", "threshold", "words"),
    [
        (((3, 4), (2, 4)), ((2, 2), (2, 2)), 0.7, r"\(N, 4\) each; got \(3, 4\) and \(2, 4\)"),
        (((3, 2, 4), (3, 2, 4)), ((2, 2), (2, 2)), 0.7, r"\(N, 4\)"),
        (((3, 4), (3, 4)), ((2, 0), (2, 2)), 0.7, "both at least 1"),
        (((3, 4), (3, 4)), ((2, 2), (4,)), 0.7, "height and width"),
        (((3, 4), (3, 4)), ((2, 2), (2, 2)), 0.0, "threshold=0.0"),
    ],
)
def test_boxes_and_grids_that_do_not_fit(boxes: tuple, grids: tuple, threshold: float, words: str) -> None:
    a, b = (torch.zeros(shape) for shape in boxes)
    with pytest.raises(ValueError, match=words):
        positive_mask(a, b, grid_q=grids[0], grid_k=grids[1], threshold=threshold)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_boxes_in_half_precision_are_refused(dtype: torch.dtype) -> None:
    boxes = random_boxes(3)
    for pair in ((boxes.to(dtype), boxes), (boxes, boxes.to(dtype))):
        with pytest.raises(ValueError, match=r"keep them float32, with trainer\.precision=bf16-mixed"):
            positive_mask(*pair, grid_q=(2, 2), grid_k=(2, 2), threshold=0.7)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("q", "k", "mask", "words"),
    [
        ((2, 3, 4), (2, 5, 4), (2, 4, 4), "of equal N and C"),
        ((2, 3, 2, 2), (2, 3, 2, 2), (2, 4, 4), r"must be \(N, C, HW\)"),
        ((2, 3, 4), (2, 3, 9), (2, 4, 4), r"must be \(2, 4, 9\) bool; got \(2, 4, 4\) bool"),
    ],
)
def test_maps_that_do_not_fit(name: str, q: tuple, k: tuple, mask: tuple, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LOSSES[name](torch.zeros(q), torch.zeros(k), torch.zeros(mask, dtype=torch.bool))
    with pytest.raises(ValueError, match="uint8"):
        LOSSES[name](torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.zeros(2, 4, 4, dtype=torch.uint8))


def test_a_temperature_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature=0"):
        pixel_contrast(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), torch.ones(1, 4, 4, dtype=torch.bool), temperature=0)

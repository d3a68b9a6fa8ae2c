import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, jaccard_score
from sklearn.neighbors import NearestNeighbors

from repr.batch import NO_CLASS
from repr.metrics.dense import (  # fmt: skip
    cell_offsets,
    class_shares,
    correspondence,
    knn_segmentation,
    linear_segmentation,
    segmentation_scores,
)
from repr.metrics.features import DenseFeatures

BOX = torch.tensor([[0.1, 0.2, 0.7, 0.8], [0.3, 0.1, 0.9, 0.6]])  # two crops of one picture


def scenes(rng, num, grid=(3, 4), side=(12, 16), dim=10, noise=0.6):
    """Maps that tell, with noise, the class of most pixels of a cell; three classes and some pixels without one."""
    coarse = torch.randint(3, (num, *grid), generator=rng)
    masks = F.interpolate(coarse[:, None].float(), side, mode="nearest")[:, 0].byte()
    masks = torch.where(torch.rand(masks.shape, generator=rng) < 0.2, masks.roll(1, 2), masks)
    masks[torch.rand(masks.shape, generator=rng) < 0.05] = NO_CLASS
    directions = torch.randn(3, dim, generator=torch.Generator().manual_seed(1))
    maps = directions[coarse].permute(0, 3, 1, 2) + noise * torch.randn(num, dim, *grid, generator=rng)
    return dense(maps, {"kind": masks})


def dense(maps, masks=None, crops=None, boxes=None):
    num = len(maps)
    boxes = BOX.repeat(num, 1, 1) if boxes is None else boxes
    return DenseFeatures(torch.arange(num), maps, crops or (maps, maps), boxes, masks or {})


def cells_and_shares(table, num_classes=3):
    """As plain loops."""
    maps, masks = table.maps.numpy(), table.masks["kind"].numpy()
    (num, _, rows, columns), cells, shares = maps.shape, [], []
    height, width = masks.shape[1] // rows, masks.shape[2] // columns
    for n in range(num):
        for r in range(rows):
            for c in range(columns):
                block = masks[n, r * height : (r + 1) * height, c * width : (c + 1) * width]
                counts = np.array([(block == k).sum() for k in range(num_classes)])
                cells.append(maps[n, :, r, c])
                shares.append(counts / max(counts.sum(), 1))
    return np.array(cells, np.float64), np.array(shares)


def enlarged_scores(scores, table):
    num, _, rows, columns = table.maps.shape
    grid = torch.as_tensor(scores).float().reshape(num, rows, columns, -1).permute(0, 3, 1, 2)
    mask = table.masks["kind"]
    predicted = F.interpolate(grid, mask.shape[1:], mode="bilinear", align_corners=False).argmax(1)
    classed = mask != NO_CLASS
    truth, predicted = mask[classed].numpy(), predicted[classed].numpy()
    return jaccard_score(truth, predicted, average="macro"), accuracy_score(truth, predicted)


def test_shares_are_those_of_a_plain_loop(rng):
    table = scenes(rng, 5)
    assert class_shares(table.masks["kind"], 3, (3, 4)).numpy() == pytest.approx(cells_and_shares(table)[1], abs=1e-6)
    blank = torch.full((1, 4, 4), NO_CLASS, dtype=torch.uint8)
    assert class_shares(blank, 3, (2, 2)).tolist() == [[0.0] * 3] * 4


def test_the_linear_layer_is_that_of_scikit_learn(rng):
    bank, query = scenes(rng, 20), scenes(rng, 9)
    found = linear_segmentation(bank, query, penalty=1e-3)
    (x, shares), (z, _) = cells_and_shares(bank), cells_and_shares(query)
    mean, deviation = x.mean(0), x.std(0)
    rows, classes = np.repeat(np.arange(len(x)), 3), np.tile(np.arange(3), len(x))  # a row a class, with its share
    layer = LogisticRegression(C=1 / (2 * 1e-3 * len(x)), tol=1e-8, max_iter=1000)
    layer.fit(((x - mean) / deviation)[rows], classes, sample_weight=shares.ravel())
    miou, pixels = enlarged_scores(layer.decision_function((z - mean) / deviation), query)
    assert (found["linear_miou_kind"], found["linear_pixels_kind"]) == pytest.approx((miou, pixels), abs=2e-3)
    assert found["linear_miou_kind.chance"] < 0.35 < miou < 0.95  # of something
    assert linear_segmentation(bank, query, penalty=1e-3, chunk_size=4) == pytest.approx(found)
    with torch.inference_mode():
        assert linear_segmentation(bank, query, penalty=1e-3) == found


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.5), (1000, 0.07)])
def test_neighbours_are_those_of_scikit_learn(rng, k, temperature):
    bank, query = scenes(rng, 12), scenes(rng, 7)
    found = knn_segmentation(bank, query, k=k, temperature=temperature, chunk_size=3)
    (x, shares), (z, _) = cells_and_shares(bank), cells_and_shares(query)
    distance, rows = NearestNeighbors(n_neighbors=min(k, len(x)), metric="cosine").fit(x).kneighbors(z)
    weight = np.exp((1 - distance) / temperature)
    votes = (weight[..., None] * shares[rows]).sum(1) / weight.sum(1, keepdims=True)
    miou, pixels = enlarged_scores(votes, query)
    assert (found["knn_miou_kind"], found["knn_pixels_kind"]) == pytest.approx((miou, pixels), abs=1e-6)


def test_a_part_of_the_bank_is_the_same_part_every_time(rng):
    bank, query = scenes(rng, 40), scenes(rng, 10)
    for metric in (linear_segmentation, knn_segmentation):
        few = metric(bank, query, max_cells=100)
        assert few == metric(bank, query, max_cells=100)
        assert few != metric(bank, query)
        assert all(value > few[f"{name}.chance"] for name, value in few.items() if "chance" not in name)


def test_scores_leave_out_absent_classes_and_count_wrongly_predicted_ones(rng):
    truth, predicted = torch.randint(4, (2, 500), generator=rng)
    truth[truth == 2] = 1  # class 2 is predicted, but never true; class 4 is neither
    confusion = (truth * 5 + predicted).bincount(minlength=25).reshape(5, 5)
    found = segmentation_scores("{}", confusion)
    assert found["miou"] == pytest.approx(jaccard_score(truth, predicted, average="macro", labels=range(4)))
    assert found["pixels"] == pytest.approx(accuracy_score(truth, predicted))
    share = truth.bincount().double() / 500
    assert found["pixels.chance"] == pytest.approx(share.max().item())
    one, drawn = [torch.full_like(truth, share.argmax()), truth[torch.randperm(500, generator=rng)]]
    blind = [jaccard_score(truth, guess, average="macro") for guess in (one, drawn)]
    assert found["miou.chance"] == pytest.approx(max(blind), abs=0.03)


def test_a_collapsed_model_is_at_chance(rng):
    bank, query = scenes(rng, 20), scenes(rng, 10)
    flat = [dense(torch.full_like(table.maps, 0.3), table.masks) for table in (bank, query)]
    for metric in (linear_segmentation, knn_segmentation):
        values = metric(*flat)
        assert all(value <= values[f"{name}.chance"] + 1e-9 for name, value in values.items() if "chance" not in name)
    assert correspondence(*flat)["correspondence@1"] == 0


def test_without_masks_there_is_no_segmentation(rng):
    bank, query = scenes(rng, 4), scenes(rng, 4)
    for metric in (linear_segmentation, knn_segmentation):
        assert metric(bank, dense(query.maps)) == {}
        assert metric(dense(bank.maps, {"kind": torch.zeros(4, 12, 16).byte()}), query) == {}  # one class
        assert metric(bank, dense(query.maps, {"kind": torch.full((4, 12, 16), NO_CLASS).byte()})) == {}


def brute_correspondence(table, tolerance):
    """Cell by cell, in the picture's coordinates."""
    hits, right = [], []
    for a, b, (box_a, box_b) in zip(*(x.double().numpy() for x in (*table.crops, table.boxes)), strict=True):

        def centre(box, row, column, shape):
            x0, y0, x1, y1 = box
            return x0 + (column + 0.5) / shape[2] * (x1 - x0), y0 + (row + 0.5) / shape[1] * (y1 - y0)

        for r, c in np.ndindex(a.shape[1:]):
            x, y = centre(box_a, r, c, a.shape)
            if not (min(box_b[[0, 2]]) <= x <= max(box_b[[0, 2]]) and min(box_b[[1, 3]]) <= y <= max(box_b[[1, 3]])):
                continue
            cosine, near = {}, {}
            for i, j in np.ndindex(b.shape[1:]):
                u, v = centre(box_b, i, j, b.shape)
                width, height = abs(box_b[2] - box_b[0]) / b.shape[2], abs(box_b[3] - box_b[1]) / b.shape[1]
                near[i, j] = max(abs(u - x) / width, abs(v - y) / height) <= tolerance
                norm = np.linalg.norm(a[:, r, c]) * np.linalg.norm(b[:, i, j])
                cosine[i, j] = a[:, r, c] @ b[:, i, j] / norm
            hits.append(near[max(cosine, key=cosine.get)])
            right.append(np.mean(list(near.values())))
    return np.mean(hits), np.mean(right)


def random_boxes(rng, num):
    low, size = 0.5 * torch.rand(num, 2, 2, generator=rng), 0.2 + 0.3 * torch.rand(num, 2, 2, generator=rng)
    boxes = torch.cat([low, low + size], dim=2)
    flipped = torch.rand(num, 2, generator=rng) < 0.5
    boxes[flipped] = boxes[flipped][:, [2, 1, 0, 3]]
    return boxes


def test_correspondence_is_that_of_a_plain_loop(rng):
    crops = torch.randn(12, 6, 4, 5, generator=rng), torch.randn(12, 6, 3, 4, generator=rng)
    table = dense(crops[0], crops=crops, boxes=random_boxes(rng, 12))
    found = correspondence(table, table, tolerances=(0.5, 1.0, 2.0), chunk_size=5)
    for tolerance in (0.5, 1.0, 2.0):
        hits, chance = brute_correspondence(table, tolerance)
        assert found[f"correspondence@{tolerance:g}"] == pytest.approx(hits)
        assert found[f"correspondence@{tolerance:g}.chance"] == pytest.approx(chance)


def places(boxes, grid):
    """Features that know where in the picture their cell lies: (N, 50, h, w)."""
    rows, columns = ((torch.arange(n) + 0.5) / n for n in grid)
    x = boxes[:, 0, None] + columns * (boxes[:, 2] - boxes[:, 0])[:, None]
    y = boxes[:, 1, None] + rows * (boxes[:, 3] - boxes[:, 1])[:, None]
    waves = torch.linspace(-1, 2, 25)
    along = [(-((place[..., None] - waves) ** 2) / 0.02).exp() for place in (x, y)]
    x, y = along[0][:, None].expand(-1, grid[0], -1, -1), along[1][:, :, None].expand(-1, -1, grid[1], -1)
    return torch.cat([x, y], dim=-1).permute(0, 3, 1, 2)


def test_features_that_know_their_place_are_right_and_flips_matter(rng):
    boxes = random_boxes(rng, 40)
    crops = places(boxes[:, 0], (6, 6)), places(boxes[:, 1], (6, 6))
    found = correspondence(dense(crops[0]), dense(crops[0], crops=crops, boxes=boxes))
    assert found["correspondence@1"] == 1
    assert found["correspondence@0.5"] > 0.97
    turned = torch.stack([boxes[:, 0], boxes[:, 1, [2, 1, 0, 3]]], 1)  # the same crops, told of wrongly
    assert correspondence(dense(crops[0]), dense(crops[0], crops=crops, boxes=turned))["correspondence@0.5"] < 0.5


def test_cells_of_a_crop_on_the_grid_of_another():
    half = torch.tensor([[0.0, 0.0, 0.5, 1.0]])
    inside, offset = cell_offsets(torch.tensor([[1.0, 0.0, 0.0, 1.0]]), half, grid_a=(1, 4), grid_b=(1, 2))
    assert inside.tolist() == [[False, False, True, True]]  # mirrored: the left half is seen on the right
    assert offset[0, 2].tolist() == [[0, -1], [0, 0]]  # to the first cell one to the left; the second is the place
    assert offset[0, 3].tolist() == [[0, 0], [0, 1]]


def test_crops_that_do_not_meet_give_no_number(rng):
    boxes = torch.tensor([[[0.0, 0.0, 0.4, 0.4], [0.6, 0.6, 1.0, 1.0]], [[0.0, 0.0, 0.4, 0.4], [0.2, 0.2, 0.2, 0.2]]])
    maps = torch.randn(2, 5, 3, 3, generator=rng)
    assert correspondence(dense(maps), dense(maps, boxes=boxes)) == {}


def test_errors_say_what_to_do(rng):
    table = scenes(rng, 3)
    broken = dense(table.maps / 0, table.masks)
    for metric in (linear_segmentation, knn_segmentation, correspondence):
        with pytest.raises(ValueError, match="NaN or infinity"):
            metric(table, broken)
    with pytest.raises(ValueError, match="keep them in float32"):
        correspondence(table, dense(table.maps, boxes=table.boxes.half()))
    with pytest.raises(ValueError, match="penalty > 0"):
        linear_segmentation(table, table, penalty=0)
    with pytest.raises(ValueError, match="k=0"):
        knn_segmentation(table, table, k=0)

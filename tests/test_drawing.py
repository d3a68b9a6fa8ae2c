"""Pictures for people."""

import torch

from repr.data.colour import normalise
from repr.drawing import GAP, PAPER, enlarge, grid, shown


def test_the_normalisation_is_undone_to_the_pixel() -> None:
    pixels = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    mean, std = (0.4, 0.5, 0.3), (0.2, 0.3, 0.25)
    assert torch.equal(shown(normalise(pixels, mean, std), mean, std), pixels)
    assert shown(torch.full((1, 3, 1, 1), 9.0), mean, std).unique().tolist() == [255]


def test_small_pictures_grow_by_whole_pixels_and_large_ones_shrink() -> None:
    picture = torch.arange(12, dtype=torch.uint8).reshape(3, 2, 2)
    assert torch.equal(enlarge(picture, 7)[:, ::4, ::4], picture)  # 2 to 8 pixels, the nearest whole factor
    assert enlarge(picture, 7).shape == (3, 8, 8)
    assert enlarge(torch.zeros(3, 300, 600, dtype=torch.uint8)).shape == (3, 80, 160)


def test_a_grid_keeps_every_picture_and_shows_paper_between() -> None:
    rows = [[torch.full((3, 4, 5), 10), torch.full((3, 6, 2), 20)], [torch.full((3, 3, 3), 30)]]
    sheet = grid(rows)
    assert sheet.shape == (3, 6 + 3 + 3 * GAP, 5 + 2 + 3 * GAP)
    assert [(sheet[0] == value).sum().item() for value in (10, 20, 30)] == [20, 12, 9]
    assert sheet[0, 0].unique().tolist() == [PAPER]

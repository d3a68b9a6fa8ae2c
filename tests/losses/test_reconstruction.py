"""Patches and the masked error: the numbers of MAE's code, and laws."""

import pytest
import torch
from torch import Tensor

from repr.losses.reconstruction import masked_mse, normalize_patches, patchify, unpatchify
from tests.golden import golden

PATCHES, LOSS = golden("mae_patchify"), golden("mae_loss")


def stored(data: dict, case: str) -> dict[str, Tensor]:
    return {key.split("/")[1]: torch.as_tensor(value) for key, value in data.items() if key.startswith(f"{case}/")}


def cases(data: dict) -> list[str]:
    return sorted({key.split("/")[0] for key in data})


@pytest.mark.parametrize("case", cases(PATCHES))
def test_patches_equal_the_authors(case: str) -> None:
    data = stored(PATCHES, case)
    size = int(data["patch_size"])
    assert torch.equal(patchify(data["images"], patch_size=size), data["tokens"])
    assert torch.equal(unpatchify(data["tokens"], patch_size=size), data["unpatchified"])


@pytest.mark.parametrize("case", cases(LOSS))
def test_value_and_gradient_equal_the_authors(case: str) -> None:
    data = stored(LOSS, case)
    target = patchify(data["images"], patch_size=int(data["patch_size"]))
    target = normalize_patches(target) if data["norm_pix"] else target
    flat = target.std(dim=2) < 1e-3  # of a constant patch only rounding is left, times 1000
    torch.testing.assert_close(target[~flat], data["target"][~flat], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(target[flat], data["target"][flat], rtol=0, atol=1e-3)
    pred = data["pred"].requires_grad_()
    loss = masked_mse(pred, target, data["mask"])
    loss.backward()
    torch.testing.assert_close(loss, data["loss"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pred.grad, data["grad_pred"], rtol=1e-4, atol=1e-6)


def test_patches_of_a_rectangle_run_row_by_row() -> None:
    images = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    tokens = patchify(images, patch_size=2)
    assert tokens.shape == (2, 6, 12)
    assert torch.equal(tokens[1, 4], images[1, :, 2:4, 2:4].permute(1, 2, 0).flatten())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="patches of 5 pixels do not fill an image of 12 x 15"):
        patchify(torch.zeros(1, 3, 12, 15), patch_size=5)
    for shape in ((1, 5, 12), (1, 4, 10)):
        with pytest.raises(ValueError, match="are no patches of 2 pixels of a square"):
            unpatchify(torch.zeros(shape), patch_size=2)


def test_the_error_is_that_of_the_removed_patches_alone() -> None:
    pred, target = torch.randn(3, 5, 8, dtype=torch.float64), torch.randn(3, 5, 8, dtype=torch.float64)
    mask = torch.tensor([[1, 0, 0, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]])
    loss = masked_mse(pred, target, mask)
    expected = torch.stack([(pred[n, i] - target[n, i]).square().mean() for n, i in mask.nonzero()]).mean()
    torch.testing.assert_close(loss, expected)
    pred[mask == 0] = 7
    torch.testing.assert_close(masked_mse(pred, target, mask), expected)
    assert torch.autograd.gradcheck(lambda x: masked_mse(x, target, mask), pred.requires_grad_())


def test_a_prediction_of_zero_is_at_chance() -> None:
    target = normalize_patches(torch.rand(4, 6, 48) * 3 + 1)
    torch.testing.assert_close(target.mean(2), torch.zeros(4, 6), rtol=0, atol=1e-5)
    assert masked_mse(torch.zeros(4, 6, 48), target, torch.ones(4, 6)).item() == pytest.approx(1 - 1 / 48, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_float32_and_flat_patches_stay_finite(dtype: torch.dtype) -> None:
    images = torch.full((2, 3, 8, 8), 0.3, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        target = normalize_patches(patchify(images, patch_size=4))
        loss = masked_mse(torch.ones(2, 4, 48, dtype=dtype), target, torch.ones(2, 4))
    assert target.dtype == loss.dtype == torch.float32
    assert loss.item() == pytest.approx(1, abs=1e-3)

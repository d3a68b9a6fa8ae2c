"""Each level at chance is what the loss gives for features without relation."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from repr.losses import captioning, clustering, contrastive, decorrelation, hypersphere, mixup, pixel, reconstruction
from repr.losses.chance import LEVELS, at_chance

N, D = 300, 400  # rows without relation are nearly orthogonal
X, Y = torch.randn(2, N, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
BIAS = torch.tensor(-4.0, dtype=torch.float64)
EQUAL = torch.ones(N, D, dtype=torch.float64)  # all similarities equal

CASES = {
    contrastive.clip: (partial(contrastive.clip, logit_scale=20.0), (EQUAL, EQUAL), {}),
    contrastive.sigmoid: (partial(contrastive.sigmoid, logit_scale=1e-9), (X, Y), {"logit_bias": BIAS}),
    contrastive.pairs: (partial(contrastive.pairs, logit_scale=20.0), (EQUAL, EQUAL), {}),
    contrastive.cross_nt_xent: (contrastive.cross_nt_xent, (EQUAL, EQUAL), {}),
    contrastive.nt_xent: (partial(contrastive.nt_xent, temperature=0.1), (EQUAL, EQUAL), {}),
    mixup.mixed_contrast: (
        partial(mixup.mixed_contrast, perm=torch.arange(N).roll(1), lam=torch.rand(N), temperature=0.1),
        (EQUAL, EQUAL),
        {},
    ),
    mixup.soft_clip: (partial(mixup.soft_clip, temperature=0.1), (EQUAL, EQUAL), {}),
    hypersphere.alignment: (partial(hypersphere.alignment, alpha=1.0), (X, Y), {}),
    hypersphere.uniformity: (partial(hypersphere.uniformity, t=1.5), (X,), {}),
    hypersphere.cross_uniformity: (hypersphere.cross_uniformity, (X, Y), {}),
    decorrelation.invariance: (decorrelation.invariance, (X, Y), {}),
    decorrelation.covariance: (decorrelation.covariance, (X,), {}),
    decorrelation.cross_correlation: (partial(decorrelation.cross_correlation, off_diagonal_weight=0.1), (X, Y), {}),
    clustering.swapped_prediction: (
        partial(clustering.swapped_prediction, assign_views=[0], temperature=0.1),
        ([EQUAL, EQUAL], [X.softmax(1)]),
        {},
    ),
    clustering.swapped_pairs: (
        partial(clustering.swapped_pairs, logit_scale=20.0), ([EQUAL, EQUAL], [EQUAL, EQUAL]), {},
    ),
    pixel.pixel_consistency: (
        pixel.pixel_consistency, (X.T[None], Y.T[None], torch.ones(1, N, N, dtype=torch.bool)), {},
    ),
    reconstruction.masked_mse: (
        reconstruction.masked_mse, (0 * X[None], reconstruction.normalize_patches(X[None]), torch.ones(1, N)), {},
    ),
    captioning.caption: (
        partial(captioning.caption, pad_id=0), (0 * X[None], torch.eye(D), torch.ones(1, N, dtype=torch.int64)), {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("loss", LEVELS, ids=lambda loss: loss.__name__)
def test_the_level_is_the_value_for_features_without_relation(loss: object) -> None:
    function, inputs, options = CASES[loss]
    value = function(*inputs, **options)
    level = at_chance(function, num_rows=N, dim=D, **options)
    assert float(level) == pytest.approx(value.item(), rel=0.03, abs=0.02)


def test_wrong_captions_make_finding_the_right_one_harder() -> None:
    options = {"logit_scale": 20.0, "extra_text": EQUAL}
    assert at_chance(contrastive.clip, num_rows=N, num_extra=N) == pytest.approx(
        contrastive.clip(EQUAL, EQUAL, **options).item()
    )
    level = at_chance(contrastive.sigmoid, num_rows=N, num_extra=N, logit_bias=BIAS)
    value = contrastive.sigmoid(X, Y, logit_scale=1e-9, logit_bias=BIAS, extra_text=X.roll(1, 1))
    assert float(level) == pytest.approx(value.item())


def test_of_a_loss_that_is_not_known_nothing_is_said() -> None:
    assert at_chance(F.mse_loss, num_rows=N, dim=D) is None
    assert at_chance(partial(decorrelation.variance), num_rows=N, dim=D) is None


def test_cells_without_relation_are_told_apart_by_the_number_that_match() -> None:
    mask = torch.rand(3, 16, 25, generator=torch.Generator().manual_seed(0)) < 0.2
    mask[1] = False  # crops that do not overlap
    mask[2, :5] = False  # cells outside the overlap
    equal = torch.ones(3, 8, 25)
    value = pixel.pixel_contrast(equal[..., :16], equal, mask, temperature=0.3)
    assert pixel.contrast_at_chance(mask).item() == pytest.approx(value.item(), rel=1e-5)

"""Signs of collapse, on features that have or have not collapsed."""

import math

import pytest
import torch

from repr.losses.clustering import sinkhorn
from repr.metrics.collapse import assignment_entropy, feature_std, prototype_entropy


def test_feature_std_runs_from_one_point_to_the_whole_sphere() -> None:
    spread = torch.randn(4000, 32)
    assert feature_std(spread) == pytest.approx(1, abs=1e-2)
    assert feature_std(3 * spread) == pytest.approx(feature_std(spread))
    assert feature_std(torch.ones(8, 4)) == pytest.approx(0, abs=1e-7)
    assert feature_std(torch.eye(4)) == pytest.approx(math.sqrt(3 / 4))  # the mean has length 1/2


def test_assignments_of_equal_samples_have_the_entropy_of_chance() -> None:
    equal = sinkhorn(torch.full((6, 5), 0.2), epsilon=0.05, num_iters=3)
    assert assignment_entropy(equal) == pytest.approx(math.log(5))
    assert assignment_entropy(torch.eye(5)) == 0


def test_usage_of_prototypes() -> None:
    assert prototype_entropy(torch.eye(5)) == pytest.approx(math.log(5))
    assert prototype_entropy(torch.tensor([[0.9, 0.1]] * 7)) == 0
    assert prototype_entropy(torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9]])) == pytest.approx(
        -(2 / 3) * math.log(2 / 3) - (1 / 3) * math.log(1 / 3)
    )

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from repr.metrics.features import Features


@pytest.fixture
def table() -> Callable[..., Features]:
    """A feature table whose trunk is its image features, with labels by keyword."""

    def make(
        image: Tensor, text: Tensor | None = None, caption: list[int] | None = None, **labels: list[int] | Tensor
    ) -> Features:
        return Features(
            index=torch.arange(len(image)),
            image=image,
            trunk=image,
            text=text,
            caption=None if caption is None else torch.tensor(caption),
            labels={name: torch.as_tensor(values) for name, values in labels.items()},
        )

    return make


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)

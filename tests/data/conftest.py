from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from repr.data.datamodule import DataModule
from repr.data.views import View

TWO_VIEWS = {
    "large": View(
        size=16, scale=(0.2, 1), flip=0.5, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, jitter_prob=0.8
    ),
    "small": View(size=8, scale=(0.1, 0.4), flip=0.5, gray_prob=0.3, blur_prob=0.5, solarize_prob=0.3),
}


class Noise:
    """A source of N noise images of different sizes, two captions each and one attribute."""

    def __init__(self, num_rows, salt=0):
        self.num_rows, self.salt = num_rows, salt
        self.attributes = {"parity": ["even" if row % 2 == 0 else "odd" for row in range(num_rows)]}

    def __len__(self):
        return self.num_rows

    def key(self, index):
        return f"noise-{index}"

    def image(self, index):
        rng = np.random.default_rng([self.salt, index])
        height, width = rng.integers(10, 40, size=2)
        return Image.fromarray(rng.integers(0, 256, size=(height, width, 3), dtype=np.uint8))

    def captions(self, index):
        return [f"picture {index}", f"number {index}"]


def tokenize(texts):
    """Characters as tokens, eight of them."""
    return torch.tensor([[ord(letter) for letter in text.ljust(16)[-8:]] for text in texts])


@pytest.fixture
def noise():
    return Noise


@pytest.fixture
def make_datamodule():
    def make(**options):
        defaults = {
            "train": Noise(31),
            "eval": {"val": Noise(10, salt=1), "other": Noise(3, salt=2)},
            "views": TWO_VIEWS,
            "batch_size": 6,
            "eval_batch_size": 4,
            "image_size": 12,
            "seed": 5,
            "mean": (0.5, 0.4, 0.3),
            "std": (0.2, 0.3, 0.4),
            "tokenizer": tokenize,
        }
        return DataModule(**{**defaults, **options})

    return make


@pytest.fixture
def root():
    """The repository."""
    return Path(__file__).parents[2]

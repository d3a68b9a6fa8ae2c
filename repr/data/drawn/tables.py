"""Drawn tables: several blocks of numbers that see the same latent vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from repr.data.sources.columns import Labels
from repr.seeds import sample_seed, uniform

SPLITS = ("train", "val")
LATENT = 12  # dimensions of what the views share


class DrawnTables:
    """Rows of numbers in several blocks, all views of one latent vector, as the omics of a patient are.

    A row's latent is the centre of its class plus a deviation of its own. Each block sees it through a fixed random
    network with one hidden layer and adds noise of its own. So a block alone tells the class badly, and rows that are
    alike in one block are alike in the others. Everything is a function of (seed, split, row).

    Args:
        split: ``train`` or ``val``.
        num_rows: how many rows there are.
        widths: number of columns of each block.
        num_classes: how many classes there are; all are equally frequent.
        spread: length of a row's own deviation, where the centres have length 1.
        noise: standard deviation of the noise in a block, where that of its signal is 1.
        seed: decides everything that is random.

    Attributes:
        tables: ``view1``, ``view2``, ... -> (N, F) float32.

    Raises:
        ValueError: the split is unknown, or sizes make no table.
    """

    def __init__(
        self,
        split: str,
        *,
        num_rows: int,
        widths: Sequence[int] = (200, 200, 200),
        num_classes: int = 5,
        spread: float = 1.0,
        noise: float = 2.0,
        seed: int = 0,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"DrawnTables: no split {split!r}; set split to one of {list(SPLITS)}")
        if num_rows < 1 or num_classes < 2 or not widths or min(widths) < 1:
            raise ValueError(
                f"DrawnTables: num_rows={num_rows}, num_classes={num_classes}, widths={list(widths)}; set at least one "
                "row, two classes and one block with a column"
            )
        classes = torch.arange(num_rows) % num_classes
        keys = sample_seed(seed, 1 + SPLITS.index(split), torch.arange(num_rows))
        fixed = sample_seed(seed, 0, torch.arange(max(num_classes, LATENT, 64)))
        centres = _normal(fixed[:num_classes], LATENT, 0)
        latent = (centres[classes] + spread * _normal(keys, LATENT, 0)) / LATENT**0.5  # (N, LATENT)
        self.tables = {}
        for view, width in enumerate(widths):
            hidden = (latent @ _normal(fixed[:LATENT], 64, 1 + 2 * view)).tanh()  # (N, 64)
            signal = hidden @ _normal(fixed[:64], width, 2 + 2 * view) / 64**0.5
            table = signal / signal.std() + noise * _normal(keys, width, 1 + view)
            self.tables[f"view{view + 1}"] = table.float().numpy()
        self.attributes = {"class": Labels.of(f"class {number}" for number in classes.tolist())}

    def __len__(self) -> int:
        return len(self.attributes["class"])

    def key(self, index: int) -> str:
        """The number of the row."""
        return str(index)

    def captions(self, index: int) -> list[str]:
        """There are none."""
        return []


def _normal(seed: Tensor, num: int, stream: int) -> Tensor:
    """(B, num) standard normal numbers, float64."""
    return torch.special.ndtri(uniform(seed, num, stream=stream).double() + 2.0**-25)

"""Several augmented views of each of some rows, as LiDAR wants them."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from repr.batch import Batch
from repr.data.datasets import one_line
from repr.data.sources.source import Source
from repr.data.views import View, crop_views, draw
from repr.seeds import sample_seed

_BLANK = Image.new("RGB", (1, 1))  # holds the place of a picture that cannot be read


class RepeatedViews(Dataset[Batch]):
    """Batches of views: position ``i * num_views + q`` is the view q of row i.

    A view is that of visit q in training with ``seed``. ``index`` is the position; a row that cannot be read has
    ``-1 - position``, as in :class:`repr.data.datasets.EvalDataset`.

    Args:
        source: the pictures.
        rows: (M,) int64, rows of the source.
        num_views: Q.
        view: how each is drawn.
        seed: of the draws.
    """

    def __init__(self, source: Source, rows: Tensor, num_views: int, view: View, seed: int) -> None:
        self.source, self.rows, self.num_views, self.view, self.seed = source, rows, num_views, view, seed

    def __len__(self) -> int:
        return len(self.rows) * self.num_views

    def __getitems__(self, positions: list[int]) -> Batch:
        """The batch of these positions: ``views``, one (B, 3, S, S) uint8, and its ``colour``."""
        place = torch.tensor(positions)
        rows = self.rows[place // self.num_views]
        crops, colour = draw(sample_seed(self.seed, place % self.num_views, rows), [self.view])
        pictures, bad, last = [], dict[int, str](), -1
        for row in rows.tolist():
            if row != last:  # the views of a row follow each other
                last, picture = row, _BLANK
                try:
                    picture = self.source.image(row)
                except OSError as error:
                    bad[row] = one_line(error)
            pictures.append(picture)
        views, boxes = crop_views(pictures, crops, [self.view])
        unread = torch.tensor([row in bad for row in rows.tolist()])
        batch = Batch(index=torch.where(unread, -1 - place, place), views=views, boxes=boxes, colour=colour)
        if bad:
            batch["bad"] = list(bad.items())
        return batch

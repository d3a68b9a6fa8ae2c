"""The visual words of a feature map, which follow the features that it has had."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from repr.distributed import mean
from repr.losses.bow import Pool, bag, codes, distances
from repr.losses.exchange import row_blocks
from repr.models.embedding_queue import Queue

_MEMORY = 0.99  # share of itself that the mean distance keeps at a step


class Vocabulary(nn.Module):
    """Cells of earlier pictures as words, and how far a cell is from the nearest of them.

    At the start words are rectified normal noise, which the cells of the first batches replace. The mean distance of
    cells from their nearest words, over all ranks, sets the softness of the assignment, so that it follows the scale of
    the features; it starts at .5.

    Args:
        num_words: K, a multiple of the global batch.
        dim: C, channels of the map.
        inverse_delta: sharpness of the assignment; None: the nearest word has the whole.
        pool: how cells make the bag of their picture, ``max`` or ``mean``.
        chunk_size: pictures whose distances to all words exist at a time; None: all of the batch.
    """

    mean_distance: Tensor

    def __init__(
        self, num_words: int, dim: int, *, inverse_delta: float | None, pool: Pool, chunk_size: int | None = None
    ) -> None:
        super().__init__()
        self.inverse_delta, self.pool, self.chunk_size = inverse_delta, pool, chunk_size
        self.queue = Queue(1, num_words, dim)
        self.queue.rows.normal_().relu_()
        self.register_buffer("mean_distance", torch.tensor(0.5))

    @property
    def words(self) -> Tensor:
        """(K, C), newest first."""
        return self.queue.rows[0]

    @torch.no_grad()
    def bags(self, maps: Tensor) -> Tensor:
        """The bags (B, K) of pictures by their maps (B, C, h, w); in training the mean distance follows them first."""
        blocks = row_blocks(len(maps), self.chunk_size)
        known = distances(maps, self.words) if len(blocks) == 1 else None

        def of(rows: slice) -> Tensor:
            return distances(maps[rows], self.words) if known is None else known

        if self.training:
            nearest = torch.cat([of(rows).amin(1).flatten(1).mean(1) for rows in blocks]).mean()
            self.mean_distance.lerp_(mean(nearest).to(self.mean_distance.dtype), 1 - _MEMORY)
        options: Any = {"inverse_delta": self.inverse_delta, "mean_distance": self.mean_distance}
        return torch.cat([bag(codes(of(rows), **options), pool=self.pool) for rows in blocks])

    @torch.no_grad()
    def learn(self, maps: Tensor, draws: Tensor) -> None:
        """Take one word of each picture (B, C, h, w): the mean of 3 x 3 cells at a place drawn by ``draws`` (B,)."""
        means = nn.functional.avg_pool2d(maps.float(), min(3, *maps.shape[2:]), stride=1).flatten(2)  # (B, C, places)
        place = (draws.double() * means.shape[2]).long()
        self.queue.push(means[torch.arange(len(means), device=means.device), :, place].unsqueeze(1))

"""The embeddings of the last batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from repr.distributed import gather, rank, world_size


class Queue(nn.Module):
    """First in, first out; a slot for each view whose embeddings are kept.

    Every rank holds the whole queue, so that the checkpoint of the first one has all of it and a run goes on with
    another number of processes; each uses its own share (:meth:`mine`).

    Args:
        num_slots: S, views that are kept.
        length: rows a slot, of all ranks together; a multiple of the global batch.
        dim: D, width of an embedding.
    """

    rows: Tensor

    def __init__(self, num_slots: int, length: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(num_slots, length, dim))  # newest first
        self.num_filled = 0  # not a tensor: a GPU would be waited for in every step

    @property
    def is_full(self) -> bool:
        """Whether every row has been written."""
        return self.num_filled >= self.rows.shape[1]

    def mine(self) -> Tensor:
        """This rank's share: (S, length / W, D)."""
        return self.rows.tensor_split(world_size(), dim=1)[rank()]

    @torch.no_grad()
    def push(self, embeddings: Tensor) -> None:
        """Put a batch in front and drop as many rows at the end.

        Args:
            embeddings: (B, S, D) of this rank; those of all ranks are put in.

        Raises:
            ValueError: the global batch does not divide the length.
        """
        new = gather(embeddings.detach()).transpose(0, 1).to(self.rows.dtype)  # (S, W * B, D)
        num, length = new.shape[1], self.rows.shape[1]
        if length % num:
            raise ValueError(length_fault(length, num))
        self.rows.copy_(torch.cat([new, self.rows[:, : length - num]], dim=1))
        self.num_filled = min(self.num_filled + num, length)

    def get_extra_state(self) -> Tensor:
        """How many rows are filled, for the checkpoint."""
        return torch.tensor(self.num_filled)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the number from a checkpoint."""
        self.num_filled = int(state)


def length_fault(length: int, batch_size: int) -> str:
    """What to say of a queue that whole batches do not fill."""
    below = length // batch_size * batch_size
    near = f"{below} or {below + batch_size}" if below else str(batch_size)
    return f"queue_length={length} is not a multiple of the global batch of {batch_size}: set it to {near}, or to 0"

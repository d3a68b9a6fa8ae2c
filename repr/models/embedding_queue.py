"""The embeddings of the last batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from repr.distributed import gather, rank, world_size


class Queue(nn.Module):
    """First in, first out; ``num_slots`` views are kept, ``length`` rows of each, of all ranks together.

    Every rank holds the whole queue, so that the checkpoint of the first one has all of it and a run goes on with
    another number of processes; each uses its own share (:meth:`mine`).
    """

    rows: Tensor
    num_filled: Tensor

    def __init__(self, num_slots: int, length: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(num_slots, length, dim))  # newest first
        self.register_buffer("num_filled", torch.zeros((), dtype=torch.int64))
        self._full = False

    @property
    def is_full(self) -> bool:
        """Whether every row has been written; once it is, no GPU is waited for to know it."""
        self._full = self._full or int(self.num_filled) >= self.rows.shape[1]
        return self._full

    def filled(self) -> Tensor:
        """The rows that have been written, the same on every rank: (S, F, D)."""
        return self.rows if self.is_full else self.rows[:, : int(self.num_filled)]

    def mine(self) -> Tensor:
        """This rank's share: (S, length / W, D)."""
        return self.rows.tensor_split(world_size(), dim=1)[rank()]

    @torch.no_grad()
    def push(self, embeddings: Tensor) -> None:
        """Put the embeddings (B, S, D) of all ranks in front, and drop as many rows at the end.

        Raises:
            ValueError: the global batch does not divide the length.
        """
        new = gather(embeddings.detach()).transpose(0, 1).to(self.rows.dtype)  # (S, W * B, D)
        num, length = new.shape[1], self.rows.shape[1]
        if length % num:
            raise ValueError(length_fault(length, num))
        self.rows.copy_(torch.cat([new, self.rows[:, : length - num]], dim=1))
        self.num_filled.add_(num).clamp_(max=length)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._full = False  # until what was loaded says otherwise


def length_fault(length: int, batch_size: int, name: str = "queue_length") -> str:
    """What to say of a queue that whole batches do not fill."""
    below = length // batch_size * batch_size
    near = f"{below} or {below + batch_size}" if below else str(batch_size)
    none = ", or to 0" if name == "queue_length" else ""
    return f"{name}={length} is not a multiple of the global batch of {batch_size}: set it to {near}{none}"

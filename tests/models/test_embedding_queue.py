"""The queue of features of earlier batches."""

import pytest
import torch

from repr.models.embedding_queue import Queue


def test_the_queue_is_first_in_first_out() -> None:
    queue = Queue(2, 6, 1)
    for step in range(4):
        assert queue.is_full == (step >= 3)
        batch = torch.tensor([[10.0 * step, 10 * step + 1], [10 * step + 2, 10 * step + 3]])[..., None]
        queue.push(batch)  # (B=2, S=2, D=1)
    assert queue.rows[0, :, 0].tolist() == [30, 32, 20, 22, 10, 12]
    assert queue.rows[1, :, 0].tolist() == [31, 33, 21, 23, 11, 13]
    assert torch.equal(queue.mine(), queue.rows)
    other = Queue(2, 6, 1)
    other.load_state_dict(queue.state_dict())
    assert other.is_full
    other.load_state_dict(Queue(2, 6, 1).state_dict())
    assert not other.is_full
    with pytest.raises(
        ValueError, match=r"queue_length=6 is not a multiple of the global batch of 4: set it to 4 or 8"
    ):
        queue.push(torch.zeros(4, 2, 1))

"""The counters of Lightning's loops as a function of the optimizer's steps."""

from __future__ import annotations

from typing import Any

from repr.data.samplers import position


def loop_state(step: int, num_batches: int, accumulate: int, *, ended: bool = False) -> dict[str, Any]:
    """What Lightning's fit loop counts at the end of an optimizer step in a run that nothing has interrupted.

    Lightning saves some thirty counters and counts on from them. After a resume a few lag behind the others (an epoch
    that begins with it never becomes ``ready``), so a second resume sends the loop to another place than the data.
    Derived from the optimizer's steps they are those of an uninterrupted run, however often it was stopped.

    Args:
        step: optimizer steps so far, 1 or more; ``on_train_batch_end`` of the last one is running.
        num_batches: batches an epoch.
        accumulate: batches a step; the last step of an epoch takes those that are left.
        ended: whether the loop has come to its end after that step, so that it will not start again.
    """
    epoch, first = position(step - 1, num_batches, accumulate)
    batch = min(first + accumulate, num_batches)  # batches of this epoch so far
    steps = {"total": _counts(step), "current": _counts(first // accumulate + 1)}
    completed = 0 if ended else -1
    batches = {
        "total": _counts(epoch * num_batches + batch, completed=completed),
        "current": _counts(batch, completed=completed),
    }
    epochs = _counts(epoch + 1, processed=completed, completed=completed)
    return {
        "epoch_progress": {"total": epochs, "current": epochs},
        "epoch_loop.batch_progress": {**batches, "is_last_batch": batch == num_batches},
        "epoch_loop.scheduler_progress": steps,
        "epoch_loop.automatic_optimization.optim_progress": {"optimizer": {"step": steps, "zero_grad": steps}},
        "epoch_loop.state_dict": {"_batches_that_stepped": step if ended else step - 1},  # after the evaluation
    }


def _counts(number: int, processed: int = 0, completed: int = 0) -> dict[str, int]:
    """Lightning's counts of ``number`` events; the last of them may be not yet processed or completed (-1)."""
    return {"ready": number, "started": number, "processed": number + processed, "completed": number + completed}

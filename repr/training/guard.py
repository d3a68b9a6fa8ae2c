"""A loss or gradient that is not finite never reaches the weights: the run says what failed, and stops or skips."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.utils._pytree import tree_leaves

from repr.batch import Batch
from repr.distributed import gather, gather_objects, rank
from repr.files import replacing
from repr.optim import parameters_of
from repr.runs.folder import NON_FINITE
from repr.shard import local, whole


class NonFiniteError(ValueError):
    """A loss or a gradient became NaN or infinite."""


class NonFiniteGuard(pl.Callback):
    """Stop the run, or leave the step out, where a loss or gradient is NaN or infinite.

    Loss and gradients are looked at once an optimizer step, before clipping and update, and all ranks decide alike. If
    one is not finite, all ranks run the step once more to find the first module whose output is not finite.
    ``<folder>/non_finite_rank<r>.json`` receives the step, the terms, the module and the data-set indices;
    ``non_finite_rank<r>.pt`` the batch and, on the first rank, ``state_dict``.

    A skipped step changes no weight, no optimizer state and no buffer; the schedule goes on. How many there were is
    logged as ``train/skipped_steps``. With ``trainer.precision=16-mixed`` infinite gradients are normal: its scaler
    leaves such steps out, and only the loss is looked at.

    Args:
        folder: of the run.
        action: ``stop`` or ``skip``.
        max_skips: stop after more than this many skipped steps in a row.

    Raises:
        ValueError: ``action`` is neither, or ``max_skips`` negative.
    """

    def __init__(self, folder: str | Path, *, action: Literal["stop", "skip"] = "stop", max_skips: int = 10) -> None:
        if action not in ("stop", "skip"):
            raise ValueError(f"callbacks.guard.action is '{action}'; set it to stop or skip")
        if max_skips < 0:
            raise ValueError(f"callbacks.guard.max_skips={max_skips}; set it to 0 or more steps")
        self.folder, self.action, self.max_skips = Path(folder), action, max_skips
        self._skipped = self._in_a_row = 0
        self._step = -1
        self._buffers: list[Tensor] = []
        self._index: list[Tensor] = []  # of every micro-batch of the step
        self._loss_is_bad: list[Tensor] = []
        self._batch: Batch = {}  # the one that failed, or the last
        self._terms: dict[str, Tensor] = {}
        self._has_failed = False  # a micro-batch of the step

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Agree on the first process's folder."""
        self.folder = trainer.strategy.broadcast(self.folder)

    def state_dict(self) -> dict[str, int]:
        """How many steps were skipped so far, and how many of them in a row."""
        return {"skipped": self._skipped, "in_a_row": self._in_a_row}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Count on."""
        self._skipped, self._in_a_row = state_dict["skipped"], state_dict["in_a_row"]

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        """Remember the batch, and at the first one of a step what a skip would have to bring back."""
        if trainer.global_step != self._step or batch_idx % trainer.accumulate_grad_batches == 0:
            self._step, self._has_failed = trainer.global_step, False
            self._index, self._loss_is_bad = [], []
            if self.action == "skip":
                self._buffers = [buffer.clone() for buffer in pl_module.buffers()]
        self._index += [batch["index"]] if "index" in batch else []
        if not self._has_failed:
            self._batch = batch

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: Tensor) -> None:
        """Note whether the loss is finite, without waiting for the device."""
        if not self._has_failed:
            self._terms = pl_module.output.terms
        bad = ~torch.isfinite(loss.detach())
        self._loss_is_bad.append(bad)
        if trainer.accumulate_grad_batches > 1:  # the batch would be gone when the step comes to be checked
            self._has_failed = self._has_failed or bool(bad)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        """Check, and stop the run by a :class:`NonFiniteError` or skip the step."""
        loss_is_bad = torch.stack(self._loss_is_bad).any()
        gradients = [g for p in parameters_of(optimizer) if p.grad is not None and (g := local(p.grad)).numel()]
        is_checked = getattr(trainer.precision_plugin, "scaler", None) is None and bool(gradients)
        # Squares may overflow where no gradient does; the largest one cannot, and takes a CPU eight times as long.
        for order in (2.0, float("inf")):
            bad = loss_is_bad
            if is_checked:
                bad = bad | ~torch.isfinite(get_total_norm(gradients, order))
            flags = gather(torch.stack([bad, loss_is_bad])[None])  # (W, 2)
            if not flags.any():
                self._in_a_row, self._batch = 0, {}
                return
        what = self._report(trainer, pl_module, flags[:, 1].tolist())
        self._skipped, self._in_a_row = self._skipped + 1, self._in_a_row + 1
        if self.action == "stop" or self._in_a_row > self.max_skips:
            advice = (
                "callbacks.guard.action=skip leaves such steps out"
                if self.action == "stop"
                else f"{self.max_skips} steps before it were skipped; callbacks.guard.max_skips is that number"
            )
            raise NonFiniteError(
                f"{what}. Lower optim.lr, lengthen optim.warmup_steps, or set trainer.gradient_clip_val or "
                f"trainer.precision=32-true; {advice}"
            )
        pl_module.zero_grad()  # optimizers pass over parameters without gradient, and their state stays as it is
        for buffer, before in zip(pl_module.buffers(), self._buffers, strict=True):
            buffer.copy_(before)
        trainer.print(f"skipped: {what}")
        pl_module.log("train/skipped_steps", float(self._skipped))

    def _report(self, trainer: pl.Trainer, module: Any, bad_losses: list[bool]) -> str:
        """Find what failed, write it down at the first step of a row, and say it in a few words."""
        terms = {name: float(term) for name, term in self._terms.items()}
        bad_terms = [name for name, value in terms.items() if not math.isfinite(value)]
        where = first_module(trainer, module, self._batch)
        path = self.folder / NON_FINITE.format(rank())
        if self._in_a_row == 0:
            record = {
                "step": trainer.global_step,
                "epoch": trainer.current_epoch,
                "bad_terms": bad_terms,
                "terms": {name: str(value) for name, value in terms.items()},
                "where": where,
                "index": [row for index in self._index for row in index.tolist()],
            }
            with replacing(path.with_suffix(".json")) as file:
                file.write(json.dumps(record, indent=1).encode())
            weights = {name: whole(tensor) for name, tensor in module.state_dict().items()}  # all ranks take part
            state = {"batch": self._batch} | ({"state_dict": weights} if trainer.is_global_zero else {})
            with replacing(path.with_suffix(".pt")) as file:
                torch.save(move_data_to_device(state, "cpu"), file)
        trainer.strategy.barrier()  # a rank that leaves now would take the others with it
        if any(bad_losses) and not bad_losses[rank()]:
            other = bad_losses.index(True)
            path, where = path.with_name(NON_FINITE.format(other)), f"only on rank {other}"
        failed = ", ".join(bad_terms) or ("the loss" if any(bad_losses) else "a gradient")
        return (
            f"{failed} is not finite at step {trainer.global_step}: {where}; the batch's indices are in {path}.json, "
            f"batch and weights in {path}.pt"
        )


def first_module(trainer: pl.Trainer, module: Any, batch: Batch) -> str:
    """Where a step stops being finite: an input, a parameter, a module's output, or a module's gradient.

    ``module`` is an objective whose backward pass has run. Its step is run once more, without gradients; buffers and
    generators are left as they were. All ranks must call it at the same time, since a step may gather.
    """
    order: list[str] = []  # of the innermost modules, as they ran
    outputs: list[str] = []  # modules whose output is not finite

    def hook(name: str) -> Any:
        def note(child: nn.Module, _: Any, output: Any) -> None:
            if next(child.children(), None) is None:
                order.append(name)
            if not _is_finite(output):
                outputs.append(name)

        return note

    handles = [child.register_forward_hook(hook(name)) for name, child in module.named_modules() if name]
    buffers = [buffer.clone() for buffer in module.buffers()]
    devices = [module.device] if module.device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices), trainer.precision_plugin.forward_context():
            module.step(batch)
    finally:
        for handle in handles:
            handle.remove()
        for buffer, before in zip(module.buffers(), buffers, strict=True):
            buffer.copy_(before)
    bad_weights = _not_finite(dict(module.named_parameters()))
    bad_gradients = _not_finite({name: p.grad for name, p in module.named_parameters() if p.grad is not None})
    if inputs := [name for name, value in batch.items() if not _is_finite(value)]:
        return f"the batch's {', '.join(inputs)} are not finite already"
    if bad_weights:
        return f"the parameter {bad_weights[0]} is not finite already"
    if outputs:
        return f"the first module whose output is not finite is {outputs[0]}"
    owners = [name.rpartition(".")[0] for name in bad_gradients]
    last = [name for name in order if name in owners] or owners  # backward begins with the module that ran last
    return f"the first module whose gradient is not finite is {last[-1]}" if last else "every module's output is finite"


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that are not finite on this rank or, where tensors are sharded, on any: all must ask."""
    bad = [not _is_finite(local(tensor)) for tensor in tensors.values()]
    if any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        bad = [any(of_ranks) for of_ranks in zip(*gather_objects(bad), strict=True)]
    return [name for name, is_bad in zip(tensors, bad, strict=True) if is_bad]


def _is_finite(value: Any) -> bool:
    """Whether all tensors inside a value are finite."""
    return all(bool(leaf.isfinite().all()) for leaf in tree_leaves(value) if isinstance(leaf, Tensor))

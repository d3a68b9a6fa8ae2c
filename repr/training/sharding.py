"""FSDP2 as a Lightning strategy, with the checkpoints of every other one."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from repr.optim import parameters_of
from repr.runs.checkpoint_files import read_checkpoint, write_shards
from repr.shard import shard_like, whole


class FSDP2(ModelParallelStrategy):
    """Lightning's ``ModelParallelStrategy`` over all processes; it shares its checkpoints with every other strategy.

    Lightning's own gives the state of an optimizer back by the order of the module's parameters. The order of its
    groups is another one as soon as there are two, so that a checkpoint of DDP would come back in disorder.

    Args:
        save_distributed_checkpoint: every process writes its shards, to one folder that all see; else the first one
            writes a file, as under DDP.
        process_group_backend: None: gloo on CPUs and nccl on GPUs.
        timeout: seconds after which a collective that others do not take part in fails; None: torch's.
    """

    lightning_restore_optimizer = True  # Lightning is to call load_optimizer_state_dict

    def __init__(
        self,
        *,
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout: float | None = None,
    ) -> None:
        limit: dict[str, Any] = {} if timeout is None else {"timeout": timedelta(seconds=timeout)}
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            **limit,
        )

    def setup_environment(self) -> None:
        """Split over all processes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Shards, or on the first process whole tensors on the CPU and nothing on the others."""
        assert self.lightning_module is not None
        return self._for_saving(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of an optimizer, as :meth:`lightning_module_state_dict`."""
        state = (optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer).state_dict()
        return {**state, "state": {index: self._for_saving(values) for index, values in state["state"].items()}}

    def _for_saving(self, state: Mapping[str, Any]) -> dict[str, Any]:
        if self._save_distributed_checkpoint:
            return dict(state)
        kept = {}
        for name, value in state.items():
            full = whole(value).cpu() if isinstance(value, Tensor) else value  # every process takes part
            if self.is_global_zero:
                kept[name] = full
        return kept

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a folder of shards, or a file."""
        path = Path(self.broadcast(filepath))
        if self._save_distributed_checkpoint:
            write_shards(checkpoint, path)
        else:
            Strategy.save_checkpoint(self, checkpoint, path, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a file or a folder; of a folder no more than this process holds."""
        torch.cuda.empty_cache()
        assert self.lightning_module is not None
        likes: dict[str, Tensor] = {f"state_dict.{n}": t for n, t in self.lightning_module.state_dict().items()}
        for number, optimizer in enumerate(self.optimizers):
            likes |= {f"optimizer_states.{number}.{index}": p for index, p in enumerate(parameters_of(optimizer))}

        def template(key: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
            like = likes.get(key, likes.get(key.rpartition(".")[0]))
            if isinstance(like, DTensor) and like.shape == size:
                return torch.empty_like(like, dtype=dtype)
            return torch.empty(size, dtype=dtype)

        return read_checkpoint(Path(self.broadcast(checkpoint_path)), template=template)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take this process's share of every tensor."""
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        state = {name: _share(tensor, own.get(name)) for name, tensor in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this process's share of every state; it belongs to the parameter with its place in the groups."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = parameters_of(optimizer)
            state = {
                index: {key: _share(value, parameters[index]) for key, value in values.items()}
                for index, values in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})


def _share(value: Any, like: Tensor | None) -> Any:
    """This process's share of what belongs to a sharded tensor; numbers and tensors of other shapes as they are."""
    if isinstance(value, Tensor) and not isinstance(value, DTensor) and like is not None and value.shape == like.shape:
        return shard_like(value, like)
    return value

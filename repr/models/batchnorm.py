"""BatchNorm whose statistics are those of all ranks, on any device."""

from __future__ import annotations

import torch
import torch.distributed as dist
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as kernels  # noqa: N813 - of torch's module of that name
from torch.nn.modules.batchnorm import _BatchNorm

from repr.distributed import all_reduce, world_size


class SyncBatchNorm(_BatchNorm):
    """BatchNorm over all ranks; on one process it is plain BatchNorm.

    torch's module of this name refuses the CPU, and so does DDP where it finds one. This one takes torch's kernels on
    CUDA; elsewhere mean and variance are reduced one after the other, which is slower and as exact as on one process.
    Ranks may hold unequal numbers of rows: every row counts alike.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that torch gives it
        """Normalise (N, C, ...) over all dimensions but the second, and over ranks."""
        if not self.training or world_size() == 1:
            return super().forward(input)
        num_batches, share = self.num_batches_tracked, 0.0  # of this batch in the running statistics
        if num_batches is not None:
            num_batches.add_(1)
            share = 1 / int(num_batches) if self.momentum is None else self.momentum
        if input.is_cuda:
            statistics = (self.running_mean, self.running_var, self.eps, share)
            return kernels.apply(input, self.weight, self.bias, *statistics, dist.group.WORLD, world_size())
        dims, shape = [0, *range(2, input.ndim)], [1, -1, *[1] * (input.ndim - 2)]
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        count = x.new_full((1,), x.numel() // x.shape[1])
        total = all_reduce(torch.cat([x.sum(dims), count]))  # (C + 1,)
        num = total[-1].detach()
        mean = total[:-1] / num  # (C,)
        x = x - mean.view(shape)
        variance = all_reduce(x.square().sum(dims)) / num
        if self.running_mean is not None and self.running_var is not None:
            self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), share)
            unbiased = variance.detach() * num / (num - 1).clamp(min=1)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)
        x = x * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            x = x * self.weight.view(shape) + self.bias.view(shape)
        return x.to(input.dtype)

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002
        """Take any number of dimensions."""


_SYNCHRONISED = (SyncBatchNorm, nn.SyncBatchNorm)


class SyncBatchNormAct(SyncBatchNorm):
    """:class:`SyncBatchNorm` followed by what timm's ``BatchNormAct2d`` holds: dropout and activation."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Normalise, drop, activate."""
        return self.act(self.drop(super().forward(input)))


@torch.no_grad()
def share_statistics(module: nn.Module) -> None:
    """Give all ranks the first one's running statistics of every BatchNorm that is not synchronised.

    So all evaluate the same model, and the first rank's checkpoint is everyone's.
    """
    for norm in module.modules():
        if isinstance(norm, _BatchNorm) and not isinstance(norm, _SYNCHRONISED):
            for buffer in norm.buffers():
                dist.broadcast(buffer, 0)


def synchronise(module: nn.Module) -> nn.Module:
    """Exchange every BatchNorm inside ``module`` for one that is synchronised; names and tensors stay.

    Returns the module itself, or its replacement where it is a BatchNorm.
    """
    if isinstance(module, _BatchNorm) and not isinstance(module, _SYNCHRONISED):
        kind = SyncBatchNormAct if isinstance(module, BatchNormAct2d) else SyncBatchNorm
        new = kind(module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats)
        for holder in ("_parameters", "_buffers", "_modules"):
            setattr(new, holder, getattr(module, holder))
        return new.train(module.training)
    for name, child in module.named_children():
        setattr(module, name, synchronise(child))
    return module


def unsynchronised_fault(module: nn.Module, num_processes: int) -> str | None:
    """What BatchNorm makes of a batch that ``num_processes`` share, or None where it does no harm."""
    for name, norm in module.named_modules() if num_processes > 1 else ():
        if isinstance(norm, _BatchNorm) and norm.training and not isinstance(norm, _SYNCHRONISED):
            return (
                f"{name} is BatchNorm with the statistics of one of {num_processes} processes, so the result depends "
                "on their number: set sync_batchnorm=true"
            )
    return None

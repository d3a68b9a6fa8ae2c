"""The losses as their papers write them, on features of length 1, without regard to memory or overflow."""

import torch
from torch import Tensor
from torch.nn import functional as F


def clip(x: Tensor, y: Tensor, scale: Tensor, bias: float = 0.0) -> Tensor:
    logits, target = scale * x @ y.T + bias, torch.arange(len(x))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def sigmoid(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    sign = 2 * torch.eye(len(x), dtype=x.dtype) - 1
    return -F.logsigmoid(sign * (scale * x @ y.T + bias)).sum() / len(x)


def nt_xent(x: Tensor, y: Tensor, temperature: Tensor) -> Tensor:
    z = torch.cat([x, y])
    itself = torch.eye(len(z), dtype=torch.bool)
    logits = (z @ z.T / temperature).masked_fill(itself, -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(x)))


def alignment(x: Tensor, y: Tensor, alpha: float) -> Tensor:
    return (x - y).norm(dim=1).pow(alpha).mean()


def uniformity(x: Tensor, t: float) -> Tensor:
    return torch.pdist(x).square().mul(-t).exp().mean().log()


def cross_uniformity(x: Tensor, y: Tensor, t: float) -> Tensor:
    square = (x[:, None] - y).square().sum(2)
    return square[~torch.eye(len(x), dtype=torch.bool)].mul(-t).exp().mean().log()


def mixed_contrast(x: Tensor, y: Tensor, scale: Tensor, perm: Tensor, lam: Tensor) -> Tensor:
    target = torch.zeros(len(x), len(x), dtype=x.dtype)
    for i, j in enumerate(perm.tolist()):
        target[i, i] += lam[i]
        target[i, j] += 1 - lam[i]
    logits = scale * x @ y.T
    return -(target * (logits.log_softmax(1) + logits.log_softmax(0))).sum() / (2 * len(x))


def soft_clip(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    target, logits = (scale * y @ y.T).softmax(1), scale * x @ y.T
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

"""The randomness that belongs to a sample: every draw is a pure function of (seed, epoch, index).

:func:`sample_seed` hashes the three into one number a sample, and :func:`uniform` turns that number into as many draws
as are asked for. Nothing depends on workers, ranks or history, so a batch can be drawn again by hand.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _mix(x: Tensor) -> Tensor:
    """Finaliser of SplitMix64 (Steele et al., 2014); int64 arithmetic wraps, so it is uint64 in disguise."""
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9 as int64
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB as int64
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift (torch's is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as int64, the step of SplitMix64


def sample_seed(seed: int, epoch: int | Tensor, index: Tensor) -> Tensor:
    """Hash (seed, epoch, index) into one int64 a sample: (B,) int64, the same on every device.

    Args:
        seed: the run's seed.
        epoch: the epoch, from 0; or (B,) int64, how often each sample was visited before.
        index: (B,) int64 positions in the data set.
    """
    state = torch.full_like(index, seed)
    state = _mix(state + _GOLDEN) ^ epoch
    return _mix(_mix(state + _GOLDEN) ^ index)


def uniform(seed: Tensor, num: int, *, stream: int = 0) -> Tensor:
    """Counter-based uniform numbers in [0, 1) with 24 random bits each: (B, num) float32 on the device of ``seed``.

    Row i depends on ``seed[i]`` (int64), ``stream`` and the column alone. Draws of different streams are independent;
    a flow that needs several takes several.
    """
    counter = torch.arange(1, num + 1, device=seed.device, dtype=torch.int64)
    start = torch.full_like(seed, _GOLDEN) * (stream + 1)  # as a tensor, since this wraps
    base = _mix(seed + start)  # (B,)
    bits = _mix(base[:, None] + _GOLDEN * counter)  # (B, num)
    return _shift(bits, 40).float() * 2.0**-24


def permutation(num: int, seed: int, epoch: int, stream: int) -> Tensor:
    """A permutation (num,) int64 that is a function of its arguments; ``stream`` is negative, as no row is."""
    state = int(sample_seed(seed, epoch, torch.tensor([stream])))
    return torch.randperm(num, generator=torch.Generator().manual_seed(state))


def epoch_order(num_samples: int, seed: int, epoch: int) -> Tensor:
    """The permutation of an epoch: (num_samples,) int64, a function of (seed, epoch)."""
    return permutation(num_samples, seed, epoch, -1)  # no sample has index -1

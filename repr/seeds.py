"""The randomness that belongs to a sample: every draw is a pure function of (seed, epoch, index).

:func:`sample_seed` hashes the three into one number a sample, and :func:`uniform` turns that number into as many draws
as are asked for. Nothing depends on workers, ranks or history, so a batch can be drawn again by hand.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Integers = TypeVar("Integers", Tensor, np.ndarray)  # int64


def _mix(x: Integers) -> Integers:
    """Finaliser of SplitMix64 (Steele et al., 2014); int64 arithmetic wraps, so it is uint64 in disguise."""
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9 as int64
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB as int64
    return x ^ _shift(x, 31)


def _shift(x: Integers, bits: int) -> Integers:
    """Logical right shift (that of int64 is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as int64, the step of SplitMix64
_ROUNDS = 6  # of two halves; with four, a row of five comes first more often than another


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


def permute(index: Tensor, num: int | Tensor, seed: int, epoch: int | Tensor, stream: int | Tensor) -> Tensor:
    """Where a permutation of ``range(num)`` sends each of some positions: (M,) int64, in O(M) memory whatever ``num``.

    There is one permutation for each (num, seed, epoch, stream). A tensor of (M,) in place of one of these gives every
    position its own.

    A Feistel network (generalised by Black and Rogaway, 2002): a position is a pair on a grid of hardly more than
    ``num`` cells, and in turn each half is moved by a hash of the other. What leaves ``range(num)`` walks on until it
    is back.

    Args:
        index: (M,) int64 positions below ``num``.
        num: the number of positions.
        seed: the run's seed.
        epoch: as in :func:`sample_seed`.
        stream: negative, as no row is.
    """
    key = sample_seed(seed, epoch, torch.as_tensor(stream))
    return torch.from_numpy(_walk(index.numpy(), np.atleast_1d(np.asarray(num)), np.atleast_1d(key.numpy())))


def _walk(index: np.ndarray, num: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Where the permutation of this ``key`` sends positions; ``num`` and ``key`` are (1,) or (M,), all are int64.

    In numpy, whose calls take a fraction of torch's time where there are few positions.
    """
    width = np.ceil(np.sqrt(num)).astype(np.int64)
    height = (num + width - 1) // width
    top, left = np.divmod(index, width)
    state = key
    for _ in range(_ROUNDS):
        state = _mix(state + _GOLDEN)
        top = (top + _shift(_mix(left ^ state), 1)) % height  # halved, since the sum must not wrap
        state = _mix(state + _GOLDEN)
        left = (left + _shift(_mix(top ^ state), 1)) % width
    moved = top * width + left
    if len(outside := np.flatnonzero(moved >= num)):
        own_num, own_key = (value[outside] if len(value) > 1 else value for value in (num, key))
        moved[outside] = _walk(moved[outside], own_num, own_key)
    return moved

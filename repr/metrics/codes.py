"""Statistics of visual codes: how a vocabulary is used, as of words in a text."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping

import numpy as np
from scipy.optimize import minimize_scalar
from torch import Tensor

from repr.batch import NO_CLASS
from repr.metrics.dense import class_shares
from repr.metrics.scores import CHANCE

_STEEPEST = 20.0  # exponent of Zipf's law that a fit may give


def code_statistics(codes: Tensor, *, num_codes: int, masks: Mapping[str, Tensor] | None = None) -> dict[str, float]:
    r"""Tell how the cells of pictures use their codes, read row by row, one picture after the other.

    * ``codes_used``: the share of the K codes that occur.
    * ``codes_entropy``: of a cell's code, :math:`-\sum_k p_k \ln p_k` with Miller and Madow's correction, in nats; at
      chance ln K.
    * ``codes_conditional_entropy``: of a cell's code given that of the cell to its left, in nats.
    * ``codes_zipf``: s of Zipf's law, :math:`c_r \propto r^{-s}` of the counts in falling order, by maximum likelihood
      over the codes that occur; ``codes_zipf_r2``: of the line through ln c over ln r. A shift of r is not fitted,
      since it and s make up for each other.
    * ``codes_heaps``: the slope of ln V(n) over ln n for n from a tenth of the cells to all, with V(n) the codes among
      the first n cells; 0 is a vocabulary that was all used before.
    * ``codes_compression``: bytes by zlib over :math:`n \log_2 K / 8`.
    * ``codes_granularity_<mask>``: V-measure, in [0, 1], of the codes and the classes that fill most of each cell;
      ``codes_granularity_picture``, of the codes and the pictures they are in.

    What depends on order or place has as its level at chance that of the same codes in a random order.

    Args:
        codes: (N, H, W) int64 from 0 on.
        num_codes: K.
        masks: name -> classes of the pixels of the N pictures (N, H', W') uint8, ``NO_CLASS`` for none.

    Raises:
        ValueError: there is no code, or one of K or more.

    Source: the numbers of Chan et al., 2024, arXiv 2411.05001, by their usual definitions; no code of theirs is known.
    """
    from sklearn.metrics import v_measure_score  # half a second that the first step need not wait for

    if not codes.numel() or int(codes.amin()) < 0 or int(codes.amax()) >= num_codes:
        raise ValueError(f"codes are (N, H, W) from 0 to num_codes - 1 = {num_codes - 1}; got {tuple(codes.shape)}")
    read = codes.cpu().numpy()
    shuffled = np.random.default_rng(0).permutation(read.reshape(-1)).reshape(read.shape)
    counts = np.sort(np.bincount(read.reshape(-1), minlength=num_codes))[::-1]
    counts = counts[counts > 0]
    values = {
        "codes_used": len(counts) / num_codes,
        "codes_entropy": _entropy(counts),
        "codes_entropy" + CHANCE: math.log(num_codes),
        **_zipf(counts),
    }
    ordered = {"codes_conditional_entropy": _conditional, "codes_heaps": _heaps, "codes_compression": _compression}
    for name, statistic in ordered.items():
        values |= {name: statistic(read, num_codes), name + CHANCE: statistic(shuffled, num_codes)}
    for name, classes in _classes(codes, masks or {}).items():
        known = classes != NO_CLASS
        for level, of in (("", read), (CHANCE, shuffled)):
            values[f"codes_granularity_{name}{level}"] = float(v_measure_score(classes[known], of[known]))
    return values


def _entropy(counts: np.ndarray) -> float:
    """In nats, of counts above 0; a finite sample looks less even than what it is drawn from, hence the last term."""
    share = counts / counts.sum()
    return float(-(share * np.log(share)).sum() + (len(counts) - 1) / (2 * counts.sum()))


def _conditional(codes: np.ndarray, num_codes: int) -> float:
    """Entropy of pairs of neighbours in a row, less that of the left ones."""
    left, right = codes[..., :-1].reshape(-1), codes[..., 1:].reshape(-1)
    if not left.size:
        return 0.0
    both, one = (np.unique(x, return_counts=True)[1] for x in (left.astype(np.int64) * num_codes + right, left))
    return _entropy(both) - _entropy(one)


def _zipf(counts: np.ndarray) -> dict[str, float]:
    """Of counts in falling order."""
    if len(counts) < 2:
        return {}
    ranks = np.log(np.arange(1, len(counts) + 1))

    def surprise(s: float) -> float:
        return s * float((counts * ranks).sum() / counts.sum()) + float(np.logaddexp.reduce(-s * ranks))

    fit = minimize_scalar(surprise, bounds=(0, _STEEPEST), method="bounded")
    logs = np.log(counts)
    r2 = 1.0 if logs.std() == 0 else float(np.corrcoef(ranks, logs)[0, 1] ** 2)
    return {"codes_zipf": float(fit.x), "codes_zipf_r2": r2}


def _heaps(codes: np.ndarray, num_codes: int) -> float:
    first = np.sort(np.unique(codes.reshape(-1), return_index=True)[1])  # where each code occurs first
    nums = np.unique(np.geomspace(max(codes.size / 10, 1), codes.size, 50).astype(np.int64))
    if len(nums) < 2:
        return 0.0
    seen = np.searchsorted(first, nums)  # codes among the first n
    return float(np.polyfit(np.log(nums), np.log(seen), 1)[0])


def _compression(codes: np.ndarray, num_codes: int) -> float:
    packed = codes.astype(np.uint8 if num_codes <= 256 else "<u2" if num_codes <= 65536 else "<u4").tobytes()
    return len(zlib.compress(packed, 9)) / max(codes.size * math.log2(num_codes) / 8, 1)


def _classes(codes: Tensor, masks: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """The class of each cell (N, H, W) by each mask that has two or more, and the number of its picture."""
    found = {}
    for name, mask in masks.items():
        present = mask[mask != NO_CLASS]
        if len(present) and len(present.unique()) > 1:
            parts = [class_shares(part, int(present.max()) + 1, codes.shape[1:]) for part in mask.split(32)]
            most = [share.argmax(1).where(share.sum(1) > 0, NO_CLASS) for share in parts]
            found[name] = np.concatenate([x.cpu().numpy() for x in most]).reshape(codes.shape)
    found["picture"] = np.broadcast_to(np.arange(1, len(codes) + 1)[:, None, None] * (NO_CLASS + 1), codes.shape)
    return found

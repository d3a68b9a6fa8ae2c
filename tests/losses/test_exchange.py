"""Losses of rows that several processes hold: value and gradients are those of one process that holds all."""

import socket
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from repr.distributed import node_size, rank, world_size
from repr.losses.contrastive import clip, nt_xent, sigmoid
from repr.losses.contrastive import pairs as minimal_pairs
from repr.losses.decorrelation import covariance, cross_correlation, invariance, variance
from repr.losses.exchange import ALONE, GATHER, RING, Ring
from repr.losses.hypersphere import alignment, cross_uniformity, uniformity
from repr.losses.mixup import mixed_contrast, soft_clip
from tests.losses.test_laws import pairs, partners
from tests.parity_cases import in_processes

NUM = 12  # rows of all
WORLDS = [*(pytest.param(world, marks=pytest.mark.slow) for world in (2, 3, 6)), 4]
SCALE = 100.0  # exp(100) is no float32, so every sum needs its maximum
CHUNKS = (None, 1, 2)
EXCHANGES = {"gather": GATHER, "ring": RING, "ring of pairs": Ring(2)}
Loss = Callable[..., Tensor]  # (x, y, scale, bias, chunk_size=..., exchange=...)
DRAW = partners(torch.empty(NUM))


def keys() -> Tensor:
    """Of this process's rows: some pairs are no negatives, within a process and over processes."""
    num = torch.arange(NUM)
    return torch.stack([num % 5, NUM + num // 2], dim=1).chunk(world_size())[rank()]


def wrong_captions(x: Tensor) -> dict[str, Tensor]:
    """Two for each of this process's rows, of which some do not count, and some share a key with a row of another."""
    num = torch.arange(NUM)
    further = torch.randn(NUM, 2, x.shape[1], generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    valid, theirs = (num % 3 > 0).repeat(2, 1).T, torch.stack([num + 7, num + 40], dim=1) % 60

    def mine(values: Tensor) -> Tensor:
        return values.chunk(world_size())[rank()].flatten(0, 1)

    own = torch.cat([num.chunk(world_size())[rank()], mine(theirs)])[:, None]
    return {"extra_text": mine(further), "extra_valid": mine(valid), "keys": own}


def mated() -> Tensor:
    """All pairs but one, so that processes have different numbers of them."""
    return (torch.arange(NUM) // 2 != 1).chunk(world_size())[rank()]


PAIRWISE: dict[str, Loss] = {
    "clip": lambda x, y, s, b, **o: clip(x, y, logit_scale=s, **o),
    "clip, smoothed": lambda x, y, s, b, **o: clip(x, y, logit_scale=s, label_smoothing=0.1, **o),
    "sigmoid": lambda x, y, s, b, **o: sigmoid(x, y, logit_scale=s, logit_bias=b, **o),
    "nt_xent": lambda x, y, s, b, **o: nt_xent(x, y, temperature=1 / s, **o),
    "uniformity": lambda x, y, s, b, **o: uniformity(x, **o),
    "cross_uniformity": lambda x, y, s, b, **o: cross_uniformity(x, y, **o),
    "mixed_contrast": lambda x, y, s, b, **o: mixed_contrast(x, y, temperature=1 / s, **DRAW, **o),
    "as published": lambda x, y, s, b, **o: mixed_contrast(x, y, temperature=1 / s, overwrite=True, **DRAW, **o),
    "one-sided": lambda x, y, s, b, **o: mixed_contrast(x, y, temperature=1 / s, bidirectional=False, **DRAW, **o),
    "soft_clip": lambda x, y, s, b, **o: soft_clip(x, y, temperature=1 / s, **o),
    "clip, keys": lambda x, y, s, b, **o: clip(x, y, logit_scale=s, keys=keys(), **o),
    "sigmoid, keys": lambda x, y, s, b, **o: sigmoid(x, y, logit_scale=s, logit_bias=b, keys=keys(), **o),
    "nt_xent, keys": lambda x, y, s, b, **o: nt_xent(x, y, temperature=1 / s, keys=keys(), **o),
    "clip, wrong captions": lambda x, y, s, b, **o: clip(x, y, logit_scale=s, **wrong_captions(x), **o),
    "sigmoid, wrong captions": lambda x, y, s, b, **o: sigmoid(
        x, y, logit_scale=s, logit_bias=b, **wrong_captions(x), **o
    ),
}
SUMS: dict[str, Loss] = {
    "alignment": lambda x, y, s, b, **o: alignment(x, y, **o),
    "pairs": lambda x, y, s, b, **o: minimal_pairs(x, y, logit_scale=s, mated=mated(), **o),
    "invariance": lambda x, y, s, b, **o: invariance(x, y, **o),
    "variance": lambda x, y, s, b, **o: variance(x / 10, **o),
    "covariance": lambda x, y, s, b, **o: covariance(x, **o),
    "cross_correlation": lambda x, y, s, b, **o: cross_correlation(x, y, off_diagonal_weight=0.3, **o),
    "covariance of more features than rows": lambda x, y, s, b, **o: covariance(torch.cat([x, y], 1), **o),
    "cross_correlation of more features than rows": lambda x, y, s, b, **o: cross_correlation(
        torch.cat([x, y, x.sin(), y.sin()], 1), torch.cat([y, x, y.cos(), x.cos()], 1), off_diagonal_weight=0.3, **o
    ),
    "cross_correlation, as it is": lambda x, y, s, b, **o: cross_correlation(x, y, standardise=False, **o),
}
CASES = [(name, kind, chunk) for name in PAIRWISE for kind in EXCHANGES for chunk in CHUNKS]
CASES += [(name, "gather", None) for name in SUMS]


def evaluate(name: str, kind: str | None, chunk: int | None) -> list[Tensor]:
    """Value, and gradients of both features, the scale and the bias: of this process's rows."""
    x, y = (leaf.detach().chunk(world_size())[rank()].clone().requires_grad_() for leaf in pairs(NUM))
    leaves = [x, y, *(torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (SCALE, -SCALE / 3))]
    options = {"chunk_size": chunk} if name in PAIRWISE else {}
    loss = {**PAIRWISE, **SUMS}[name](*leaves, **options, exchange=EXCHANGES[kind] if kind else ALONE)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    found = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)]
    return [loss.detach(), *found]


def work() -> dict[str, list[Tensor]]:
    hosts, socket.gethostname = socket.gethostname, lambda: f"host-{rank() // 2}"
    assert node_size() == (2 if world_size() in (4, 6) else 1)  # three processes are 2 + 1, two are on one machine
    socket.gethostname = hosts
    return {str(case): evaluate(*case) for case in CASES if world_size() != 3 or case[1] != "ring of pairs"}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict]]:
    return cache(lambda world: in_processes(work, world, tmp_path_factory.mktemp("ranks")))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("name", "kind", "chunk"), CASES)
def test_processes_share_a_loss(name, kind, chunk, world, ranks):
    """With DDP's mean: of rows the gradients are put together, of the scale and the bias averaged."""
    if world == 3 and kind == "ring of pairs":
        return  # processes come in pairs
    if name == "pairs" and NUM // world % 2:
        return  # as do its rows
    found = [record[str((name, kind, chunk))] for record in ranks(world)]
    value, *grads = evaluate(name, None, None)
    for record in found:
        torch.testing.assert_close(record[0], value, rtol=1e-10, atol=1e-12)
    for i, grad in enumerate(grads, start=1):
        ours = torch.stack([record[i] for record in found])
        ours = ours.flatten(0, 1) / world if grad.ndim else ours.mean()
        torch.testing.assert_close(ours, grad, rtol=1e-9, atol=1e-9)

"""The cross-entropy of captions: its formula and gradient, the numbers of open_clip's own code, and two processes."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from repr.distributed import all_reduce, rank
from repr.losses.captioning import caption, log_likelihood, word_losses
from repr.losses.chance import at_chance
from tests.golden import golden
from tests.parity_cases import in_processes

COCA = golden("coca")
PAD = 0


def example(dtype: torch.dtype = torch.float64, num: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """What a decoder gives, a head, and captions of different lengths, one of them empty."""
    rng = torch.Generator().manual_seed(1)
    hidden, head = (torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in ((num, 5, 3), (3, 7)))
    targets = torch.randint(1, 7, (num, 5), generator=rng)
    targets[0, 2:], targets[1] = PAD, PAD
    return hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_(), targets


def formula(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ head).transpose(1, 2), targets, ignore_index=PAD)


@pytest.mark.parametrize("chunk", [None, 1, 4, 100])
def test_is_its_formula_and_has_its_gradient(chunk: int | None) -> None:
    hidden, head, targets = example()
    ours = caption(hidden, head, targets, pad_id=PAD, chunk_size=chunk)
    theirs = formula(hidden, head, targets)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    grads = torch.autograd.grad(ours, (hidden, head), retain_graph=True)
    for one, other in zip(grads, torch.autograd.grad(theirs, (hidden, head)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    assert not grads[0][targets == PAD].any()
    again = torch.autograd.grad(ours, (hidden, head))
    assert all(map(torch.equal, again, grads))


def test_soft_targets_and_a_bias() -> None:
    """Distributions in the place of words; those of one word each are the words."""
    hidden, head, _ = example()
    rows, words = torch.tensor([3, 0, 7]), torch.tensor([1, 6, 2])
    flat, bias = hidden.flatten(0, 1), torch.linspace(-1, 1, 7, dtype=torch.float64, requires_grad=True)
    soft = torch.rand(3, 7, dtype=torch.float64).softmax(1)
    for q in (F.one_hot(words, 7).double(), soft):
        options = {"bias": bias, "soft": lambda part, q=q: q[part], "chunk_size": 2}
        ours = word_losses(flat, head, rows, None, **options)
        torch.testing.assert_close(ours, -(q * (flat[rows] @ head + bias).log_softmax(1)).sum(1))
        torch.autograd.gradcheck(
            lambda x, w, b, q=q: word_losses(x, w, rows, None, bias=b, soft=lambda part: q[part], chunk_size=2),
            (flat, head, bias),
        )
    of_words = word_losses(flat, head, rows, words, bias=bias)
    torch.testing.assert_close(of_words, F.cross_entropy(flat[rows] @ head + bias, words, reduction="none"))


def test_chance_extremes_and_types() -> None:
    hidden, head, targets = example()
    num = head.shape[1]
    value = caption(torch.zeros_like(hidden), head, targets, pad_id=PAD).item()
    assert value == pytest.approx(math.log(num))
    assert at_chance(partial(caption, pad_id=PAD), dim=num) == pytest.approx(value)
    sure = caption(1e4 * hidden.float(), 1e4 * head.float(), targets, pad_id=PAD)
    assert sure.isfinite()
    none = caption(hidden, head, torch.full_like(targets, PAD), pad_id=PAD)
    assert none == 0
    assert not torch.autograd.grad(none, head)[0].any()
    half = [x.detach().bfloat16().requires_grad_() for x in (hidden, head)]
    with torch.autocast("cpu", torch.bfloat16):
        loss = caption(*half, targets, pad_id=PAD)
    assert loss.dtype == torch.float32
    assert [grad.dtype for grad in torch.autograd.grad(loss, half)] == [torch.bfloat16] * 2
    torch.testing.assert_close(loss, formula(*(x.float() for x in half), targets))
    with pytest.raises(ValueError, match=r"hidden is \(B, L, D\)"):
        caption(hidden, head.T, targets, pad_id=PAD)


def test_how_likely_a_caption_is() -> None:
    hidden, head, targets = example()
    words = (hidden @ head).log_softmax(2).gather(2, targets[..., None])[..., 0]
    expected = torch.where(targets == PAD, 0, words).sum(1)
    torch.testing.assert_close(log_likelihood(hidden, head, targets, pad_id=PAD), expected)


class Largest(TorchDispatchMode):
    """The most entries of any tensor that is made."""

    num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.num = max(self.num, *(x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor)), 0)
        return out


def test_logits_are_never_whole() -> None:
    """Neither those of all words, nor a copy of what the decoder gives for padding."""
    hidden, head = torch.randn(50, 8, 3, requires_grad=True), torch.randn(3, 40, requires_grad=True)
    targets = torch.randint(1, 40, (50, 8))
    with Largest() as largest:
        caption(hidden, head, targets, pad_id=PAD, chunk_size=10).backward()
    assert largest.num == hidden.numel()  # 1,200; the logits are 16,000


@pytest.mark.parametrize("case", ["a_shared_pooler_legacy_mask", "b_cascade_correct_mask", "d_no_pooler"])
def test_open_clip(case: str) -> None:
    """Its logits are the product of themselves and the identity."""
    logits, labels = (torch.tensor(COCA[f"{case}/out.{name}"]) for name in ("logits", "labels"))
    ours = caption(logits.double(), torch.eye(logits.shape[2]).double(), labels, pad_id=PAD)
    expected = COCA[f"{case}/out.caption_loss_f64"] / COCA[f"{case}/cfg.caption_weight"]
    assert ours.item() == pytest.approx(float(expected), rel=1e-6)


def _share() -> list[Tensor]:
    mine = slice(rank() * 4, rank() * 4 + 4)
    logits = torch.tensor(COCA["dist2/global.logits"][mine], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor(COCA["dist2/global.labels"][mine])
    loss = caption(logits, torch.eye(11, dtype=torch.float64), labels, pad_id=PAD, all_reduce=all_reduce)
    return [loss.detach(), *torch.autograd.grad(loss, logits)]


def test_two_processes_with_different_numbers_of_words(tmp_path) -> None:
    """The mean of their gradients is that of one, where open_clip's is up to 93 % off."""
    logits = torch.tensor(COCA["dist2/global.logits"], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor(COCA["dist2/global.labels"])
    whole = caption(logits, torch.eye(11, dtype=torch.float64), labels, pad_id=PAD)
    np.testing.assert_allclose(2 * whole.item(), COCA["dist2/single.caption_loss_f64"], rtol=1e-6)  # its weight is 2
    (expected,) = torch.autograd.grad(whole, logits)
    losses, grads = zip(*in_processes(_share, 2, tmp_path), strict=True)
    assert all(loss.item() == pytest.approx(whole.item(), rel=1e-12) for loss in losses)
    torch.testing.assert_close(torch.cat(grads) / 2, expected)  # as DDP takes their mean

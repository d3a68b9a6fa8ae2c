"""Wrong captions as further texts of a contrast, by the numbers of NegCLIP's code; and the loss of minimal pairs."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from repr.losses.contrastive import clip, pairs, sigmoid
from tests.golden import golden
from tests.losses import naive
from tests.losses.test_laws import assert_close, evaluate
from tests.losses.test_laws import pairs as features

NEGCLIP = golden("negclip")
BLOCKS = ("image", "hard_image", "text", "text_of_hard_image", "hard_text", "hard_text_of_hard_image")
NUM, MORE = 7, 5
VALID = torch.tensor([True, False, True, True, False])
# The fourth sample shares its caption with the third wrong one, and its picture with the first sample.
KEYS = torch.tensor(
    [[10, 0], [11, 1], [12, 2], [10, 3], [14, 4], [15, 5], [16, 6]] + [[20 + i, 30 + i] for i in range(5)]
)
KEYS[NUM + 2, 1] = 3


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("case", ["a_n4_d8", "b_n16_d32_s100", "c_captions_only", "w2_n8"])
def test_negclip(case: str, chunk: int | None) -> None:
    names = [name for name in BLOCKS if f"{case}/in.{name}" in NEGCLIP]
    blocks = [torch.tensor(NEGCLIP[f"{case}/in.{n}"], dtype=torch.float64, requires_grad=True) for n in names]
    scale = torch.tensor(NEGCLIP[f"{case}/in.log_logit_scale"], dtype=torch.float64, requires_grad=True)
    third = len(blocks) // 3
    image, text, hard = (torch.cat(blocks[i * third : (i + 1) * third]) for i in range(3))
    value = clip(image, text, logit_scale=scale.exp(), extra_text=hard, chunk_size=chunk)
    value.backward()
    assert value.item() == pytest.approx(NEGCLIP[f"{case}/out.loss_f64"].item(), rel=1e-9)
    for name, x in zip([*names, "log_logit_scale"], [*blocks, scale], strict=True):
        expected = torch.tensor(NEGCLIP[f"{case}/grad.{name}_f64"])
        torch.testing.assert_close(x.grad, expected, rtol=1e-7, atol=1e-9)
    own = [torch.tensor(NEGCLIP[f"{case}/in.{name}"], dtype=torch.float64) for name in ("image", "text")]
    without = NEGCLIP[f"{case}/aux.clip_without_hard_negatives_f64"].item()
    assert clip(*own, logit_scale=scale.exp().item(), chunk_size=chunk).item() == pytest.approx(without, rel=1e-7)


def leaves() -> list[Tensor]:
    x, y = features(NUM)
    more = features(MORE, seed=3)[0]
    return [x, y, more, torch.tensor(20.0, dtype=torch.float64, requires_grad=True)]


def ours(name: str, x: Tensor, y: Tensor, more: Tensor, scale: Tensor, **options: object) -> Tensor:
    if name == "clip":
        return clip(x, y, logit_scale=scale, extra_text=more, **options)
    return sigmoid(x, y, logit_scale=scale, logit_bias=-scale / 3, extra_text=more, **options)


def formula(name: str, x: Tensor, y: Tensor, more: Tensor, scale: Tensor) -> Tensor:
    """From the whole matrix, without what ``VALID`` and ``KEYS`` leave out."""
    x, y, more = (F.normalize(z) for z in (x, y, more))
    out = (KEYS[:NUM, None] == KEYS).any(2)
    out[:, :NUM].fill_diagonal_(False)
    out[:, NUM:] |= ~VALID
    logits, true = (scale * x @ torch.cat([y, more]).T), torch.arange(NUM)
    if name == "clip":
        logits = logits.masked_fill(out, -torch.inf)
        return (F.cross_entropy(logits, true) + F.cross_entropy(logits[:, :NUM].T, true)) / 2
    signs = 2 * torch.eye(NUM, NUM + MORE, dtype=torch.float64) - 1
    return -F.logsigmoid(signs * (logits - scale / 3)).masked_fill(out, 0).sum() / NUM


@pytest.mark.parametrize("chunk", [None, 1, 3, 50])
@pytest.mark.parametrize("name", ["clip", "sigmoid"])
def test_further_texts_are_columns_of_the_images_alone(name: str, chunk: int | None) -> None:
    options = {"chunk_size": chunk, "extra_valid": VALID, "keys": KEYS}
    found = evaluate(lambda *x: ours(name, *x, **options), leaves())
    assert_close(found, evaluate(lambda *x: formula(name, *x), leaves()), 1e-10)
    assert not found[3][~VALID].any()


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("name", ["clip", "sigmoid"])
def test_none_and_none_that_count_are_no_further_texts(name: str, chunk: int | None) -> None:
    x, y, more, scale = leaves()
    plain = ours(name, x, y, None, scale, chunk_size=chunk)
    assert torch.equal(ours(name, x, y, more[:0], scale, chunk_size=chunk), plain)
    masked = ours(name, x, y, more, scale, chunk_size=chunk, extra_valid=torch.zeros(MORE, dtype=torch.bool))
    torch.testing.assert_close(masked, plain)
    assert ours(name, x, y, more, scale, chunk_size=chunk) > plain
    half = [z.detach().bfloat16() for z in (x, y, more)]
    value = ours(name, *half, scale.float(), chunk_size=chunk)
    assert torch.equal(value, ours(name, *(z.float() for z in half), scale.float(), chunk_size=chunk))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"extra_text": torch.ones(MORE, 3)}, r"extra_text is \(M, 7\).*got \(5, 3\)"),
        ({"extra_text": torch.ones(MORE, 7), "extra_valid": VALID[:2]}, r"got \(5, 7\) and \(2,\)"),
        ({"extra_valid": VALID}, r"got \(0, 7\) and \(5,\)"),
        ({"extra_text": torch.ones(MORE, 7), "keys": KEYS[:NUM]}, "keys has 7 rows for 7 texts and 5"),
    ],
)
def test_shapes_that_do_not_fit(options: dict, words: str) -> None:
    x, y, *_ = leaves()
    with pytest.raises(ValueError, match=words):
        clip(x, y, logit_scale=1.0, **options)


def test_pairs_are_the_contrast_of_two_samples_each() -> None:
    mated = torch.tensor([True, True, True, False, True, True, True])

    def each(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        x, y = F.normalize(x), F.normalize(y)
        return torch.stack([naive.clip(x[k : k + 2], y[k : k + 2], scale) for k in (0, 4)]).mean()

    x, y, _, scale = leaves()
    expected = evaluate(each, [x, y, scale])
    assert_close(evaluate(lambda x, y, s: pairs(x, y, logit_scale=s, mated=mated), [x, y, scale]), expected, 1e-10)
    torch.testing.assert_close(
        pairs(x, y, logit_scale=20.0), pairs(x[:6], y[:6], logit_scale=20.0, mated=torch.ones(6, dtype=torch.bool))
    )


def test_without_a_pair_there_is_nothing_to_tell_apart() -> None:
    x, y, _, scale = leaves()
    for value in (
        pairs(x, y, logit_scale=scale, mated=torch.zeros(NUM, dtype=torch.bool)),
        pairs(x[:1], y[:1], logit_scale=scale),
    ):
        assert value == 0
        assert not any(grad.any() for grad in torch.autograd.grad(value, (x, y, scale)))
    same = torch.ones(4, 3)
    assert pairs(same, same, logit_scale=100.0).item() == pytest.approx(math.log(2))

"""ALBEF: which pairs do not match, which words are hidden, what each term is, and what is refused."""

import math
from typing import Any

import pytest
import timm
import torch
from torch.nn import functional as F

from repr.batch import Batch
from repr.config import ConfigError, compose
from repr.config_check import check
from repr.models.fusion import TextReader, hide_words
from repr.objectives.fusion import NEGATIVE_STREAM, Fusion
from repr.objectives.negatives import draw_negatives, negative_logits
from tests.objectives.conftest import OWN, tokenizer

SEEDS = torch.arange(20_000)


def make(backbone: str = "test_vit", **options: Any) -> Fusion:
    size = {"img_size": 32} if backbone == "test_vit" else {}
    image = timm.create_model(backbone, num_classes=0, **size)
    text = TextReader(context_length=12, vocab_size=49409, width=32, layers=1, output_dim=16)
    return Fusion(image, text, **{"num_layers": 1, "queue_length": 48, **options})


def test_negatives_are_drawn_as_often_as_they_are_alike() -> None:
    logits = torch.tensor([[5.0, 1.0, 0.0, -1.0]], dtype=torch.float64).expand(len(SEEDS), 4)
    same = torch.tensor([True, False, False, False]).expand(len(SEEDS), 4)
    found = draw_negatives(logits, same, SEEDS, stream=0).bincount(minlength=4) / len(SEEDS)
    expected = torch.cat([torch.zeros(1), logits[0, 1:].float().softmax(0)])
    torch.testing.assert_close(found, expected, rtol=0, atol=0.012)
    assert torch.equal(
        draw_negatives(logits, same, SEEDS, stream=0)[7:9], draw_negatives(logits[7:9], same[7:9], SEEDS[7:9], stream=0)
    )


def test_negatives_where_all_weights_vanish() -> None:
    """A softmax that knows one row only leaves the order of the others; equal samples leave all but the row itself."""
    sharp = torch.tensor([[0.0, -1e6, -1e6 + 1e3], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    same = torch.eye(3, dtype=torch.bool)
    same[1] = True
    drawn = torch.stack([draw_negatives(sharp, same, SEEDS[i : i + 3], stream=1) for i in range(200)])
    assert set(drawn[:, 0].tolist()) == {2}
    assert set(drawn[:, 1].tolist()) == {0, 2}
    assert set(drawn[:, 2].tolist()) == {0, 1}
    assert draw_negatives(sharp * torch.nan, same, SEEDS[:3], stream=1).max() < 3  # diverged: the guard ends the run
    with pytest.raises(ValueError, match="set the global batch to 2 or more"):
        draw_negatives(sharp[:1, :1], same[:1, :1], SEEDS[:1], stream=1)


def test_hidden_words() -> None:
    ids = tokenizer()(["a red cat on a mat", "", "dog"])
    ids = ids.repeat(2000, 1)
    seed = torch.arange(len(ids))
    options = {"pad_id": 0, "eos_id": 49407, "mask_id": 49408}
    read, hidden = hide_words(ids, seed, share=0.3, **options)
    long, empty, one = (hidden[i::3].float().sum(1) for i in range(3))
    assert empty.sum() == 0
    assert (one == 1).all()
    assert long.min() == 1
    assert long.mean() == pytest.approx(6 * 0.3 + 0.7**6, abs=0.1)  # at least one
    assert torch.equal(read[~hidden], ids[~hidden])
    assert not hidden[:, 0].any()
    assert not (hidden & ((ids == 0) | (ids == 49407))).any()
    masked, kept = (read[hidden] == 49408).float().mean(), (read[hidden] == ids[hidden]).float().mean()
    assert masked == pytest.approx(0.8, abs=0.02)
    assert kept == pytest.approx(0.1, abs=0.02)
    assert not (read[hidden] == 0).any()
    again = hide_words(ids[5:7], seed[5:7], share=0.3, **options)
    assert torch.equal(again[0], read[5:7])


def test_every_pair_is_scored_by_itself(batch: Batch) -> None:
    """``matching`` is the mean over single pairs, with negatives of the keys; captions that are equal do not count."""
    objective = make(weights={"matching": 1, "contrast": 1}).eval()
    batch["text"][1] = batch["text"][0]
    image, ids = batch["views"][0], batch["text"]
    with torch.no_grad():
        value = objective.step(batch).terms["matching"]
        features = objective.encode_image(image), objective.encode_text(ids)  # the teacher is a copy of the student
        same = (ids[:, None] == ids).all(2)
        drawn = [
            draw_negatives(
                negative_logits(x, y, temperature=0.07), same, batch["seed"], stream=NEGATIVE_STREAM + stream
            )
            for stream, (x, y) in enumerate((features, features[::-1]))
        ]
        assert drawn[0][0] != 1
        assert drawn[1][1] != 0
        tokens, right = objective.encode_tokens(image), torch.arange(8)
        pairs = [(right, right, 1), (drawn[1], right, 0), (right, drawn[0], 0)]  # picture, caption, whether they match
        losses = [
            F.cross_entropy(objective.match(tokens[i : i + 1], ids[j : j + 1]), torch.tensor([match]))
            for pictures, texts, match in pairs
            for i, j in zip(pictures.tolist(), texts.tolist(), strict=True)
        ]
    torch.testing.assert_close(value, torch.stack(losses).mean())


def test_padding_is_not_seen(batch: Batch) -> None:
    objective = make().eval()
    tokens, ids = objective.encode_tokens(batch["views"][0]), batch["text"]
    expected = objective.match(tokens, ids)
    with torch.no_grad():
        objective.text.token_embedding.weight[0] += 100
    torch.testing.assert_close(objective.match(tokens, ids), expected)
    grad = torch.autograd.grad(expected[:, 1].sum(), objective.text.positional_embedding)[0].abs().sum(1)
    length = int((ids != 0).sum(1).max())
    assert (grad[:length] > 0).all()
    assert (grad[length:] == 0).all()


def test_without_a_teacher_the_contrast_is_that_of_clip(batch: Batch) -> None:
    objective = make(alpha=0, queue_length=0, weights={"contrast": 1})
    assert objective.teacher is None
    image, text = (
        F.normalize(x, dim=1) for x in (objective.encode_image(batch["views"][0]), objective.encode_text(batch["text"]))
    )
    logits = image @ text.T / 0.07
    expected = (F.cross_entropy(logits, torch.arange(8)) + F.cross_entropy(logits.T, torch.arange(8))) / 2
    torch.testing.assert_close(objective.step(batch).terms["contrast"], expected)
    assert not hasattr(objective, "fusion")


def test_the_queue_fills_and_is_what_keys_are_compared_with(batch: Batch) -> None:
    objective = make()
    assert objective.queue.filled().shape[1] == 0
    for num in (0, 8, 16):
        objective.step(batch)
        assert objective.chance(8)["contrast"] == pytest.approx(math.log(8 + num))
    assert objective.queue.filled().shape[1] == 24
    objective.eval()
    objective.step(batch)
    assert objective.queue.filled().shape[1] == 24
    torch.testing.assert_close(
        objective.queue.rows[0, :8],
        F.normalize(objective.teacher.image_projection(objective.teacher.backbone(batch["views"][0])), dim=1),
    )


def test_alpha_rises_and_the_temperature_is_clamped() -> None:
    objective = make(alpha_steps=10)
    assert [objective.alpha_at(step) for step in (0, 5, 10, 99)] == pytest.approx([0, 0.2, 0.4, 0.4])
    with torch.no_grad():
        objective.logit_scale.fill_(50.0)
    objective.finish_step()
    assert objective.temperature.item() == pytest.approx(0.001)


@pytest.mark.parametrize(("term", "frozen"), [("matching", True), ("masked_language", True), ("contrast", False)])
def test_any_term_alone_reaches_what_it_trains(term: str, frozen: bool, batch: Batch) -> None:
    objective = make(weights={term: 1})
    objective.total(objective.step(batch).terms).backward()
    assert [n for n, p in objective.named_parameters() if p.requires_grad and p.grad is None] == []
    assert objective.image_projection.weight.requires_grad != frozen
    assert (objective.teacher is None) == (term == "matching")


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"text\.width=200 is no multiple of text\.heads=3"):
        TextReader(context_length=12, vocab_size=9, width=200, layers=1, output_dim=16)


def test_convolutional_maps_are_tokens_too(batch: Batch) -> None:
    objective = make("test_resnet")
    assert objective.encode_tokens(batch["views"][0]).shape == (8, 1, objective.backbone.num_features)
    assert objective.total(objective.step(batch).terms).isfinite()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"alpha": 1.5}, r"alpha=1\.5; set it from 0 to 1"),
        ({"mask_share": 0}, r"mask_share=0 hides no word: set it above 0, or weights\.masked_language to 0"),
        ({"num_layers": 0}, "num_layers=0; set it to 1 or more"),
    ],
)
def test_an_option_that_cannot_be_is_told(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make(**options)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["text.vocab_size=49408", "text.context_length=2", "objective.queue_length=50"],
            [
                "tokenizer has 49408 words, and 1 more are needed, and text.vocab_size is 49408: set it to 49409",
                "text.context_length=2 has no place for a word to hide: set it to 3 or more",
                "objective.queue_length=50 is not a multiple of the global batch of 12: set it to 48",
            ],
        ),
        (
            ["data.batch_size=1", "tokenizer=none"],
            [
                "Fusion compares the samples of a batch: set data.batch_size to 2",
                "reads captions, and tokenizer is null",
            ],
        ),
        (["text=clip_small"], ["needs the tokens of captions: set text=reader_small or reader_base"]),
    ],
)
def test_what_does_not_fit_is_told_at_once(words: list[str], told: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        check(compose(["objective=albef", *OWN["albef"], *words]))
    assert [sentence for sentence in told if sentence not in str(error.value)] == []

"""Objectives as a notebook makes them: two modules and nothing else, and one clear error for what they cannot be."""

from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import timm
from omegaconf import OmegaConf
from torch import nn

from repr.objectives.base import Objective
from repr.objectives.image_text import ImageText
from repr.objectives.joint_embedding import JointEmbedding
from repr.objectives.masked_autoencoders import MaskedImageText, MaskedViews
from repr.objectives.mixup_contrast import MixupContrast
from repr.objectives.pixpro import PixPro
from repr.objectives.swav import SwAV
from repr.training.trainer import prepare


def vit(**options: Any) -> nn.Module:
    return timm.create_model("test_vit", img_size=32, **options)


def text() -> nn.Module:
    return open_clip.transformer.TextTransformer(context_length=12, width=32, heads=2, layers=1, output_dim=16)


MAKERS: dict[str, Callable[[Any], Objective]] = {
    "ImageText": lambda backbone: ImageText(backbone, text()),
    "JointEmbedding": JointEmbedding,
    "SwAV": SwAV,
    "PixPro": PixPro,
    "MaskedViews": MaskedViews,
    "MaskedImageText": lambda backbone: MaskedImageText(backbone, text()),
    "MixupContrast": lambda backbone: MixupContrast(backbone, num_classes=3, weights={"image_head": 1.0}),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_backbone_is_all_that_is_needed(make: Callable[[Any], Objective]) -> None:
    objective = make(vit(num_classes=0))
    assert objective.weights
    assert objective.optim.lr > 0


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_what_is_no_backbone_is_one_error(make: Callable[[Any], Objective]) -> None:
    with pytest.raises(ValueError, match=r"set backbone|has no num_features: give a module such as timm.create_model"):
        make("resnet18")
    with pytest.raises(ValueError, match=r"set backbone|has no num_features"):
        make(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)))
    with pytest.raises(ValueError, match="ends with a classifier of 1000 classes: make it with num_classes=0"):
        make(vit())


@pytest.mark.parametrize("wrong", ["clip", nn.Embedding(10, 4)])
def test_what_is_no_text_tower_is_one_error(wrong: Any) -> None:
    with pytest.raises(ValueError, match="which has no output_dim: give a module such as open_clip's TextTransformer"):
        ImageText(vit(num_classes=0), wrong)
    with pytest.raises(ValueError, match="which has no output_dim"):
        MaskedImageText(vit(num_classes=0), wrong)


def test_a_ring_of_one_process_is_told_to_change_nothing() -> None:
    with pytest.warns(UserWarning, match="exchange=ring changes nothing: there is one process"):
        prepare(JointEmbedding(vit(num_classes=0), exchange="ring"), OmegaConf.create({"exchange": "ring"}), 1)


def test_a_ring_needs_losses_that_pass_rows_on() -> None:
    with pytest.raises(ValueError, match="exchange=ring: the losses of contrast take no exchange"):
        JointEmbedding(vit(num_classes=0), exchange="ring", losses={"contrast": lambda a, b: (a - b).sum()})

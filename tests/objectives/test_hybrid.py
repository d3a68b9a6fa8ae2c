"""A sum of objectives over shared encoders."""

import copy
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import open_dict
from open_clip.transformer import TextTransformer
from torch import nn

from repr.batch import Batch
from repr.config import compose
from repr.models.backbone import backbone
from repr.objectives.hybrid import Hybrid
from repr.objectives.joint_embedding import JointEmbedding
from repr.objectives.self_distillation import SelfDistillation
from tests.objectives.conftest import OBJECTIVES, config

SIMCLR = partial(JointEmbedding, hidden_dim=32, dim=16)
DINO = partial(SelfDistillation, hidden_dim=32, dim=16, num_prototypes=12)


def vit(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return backbone(
        "vit_small_patch16_224", image_size=32, depth=2, embed_dim=32, num_heads=2, dynamic_img_size=True, **options
    )


def text() -> nn.Module:
    return TextTransformer(context_length=12, width=32, heads=2, layers=1, output_dim=16)


def hybrid(**options: Any) -> Hybrid:
    return Hybrid(vit(), text=text(), **options)


def as_part(name: str) -> tuple[Any, Hybrid]:
    """An objective of conf/objective, and a hybrid of it alone with the same weights."""
    cfg = config(name)
    node = cfg.objective.copy()
    with open_dict(node):
        node.update({key: None for key in ("backbone", "optim", "text") if key in node}, _partial_=True)
    torch.manual_seed(0)
    alone = instantiate(cfg.objective)
    towers = {"text": instantiate(cfg.objective.text)} if cfg.objective.get("text") else {}
    both = Hybrid(instantiate(cfg.objective.backbone), parts={"only": instantiate(node)}, optim=alone.optim, **towers)
    shared = ("backbone.", "text.")
    state = {key if key.startswith(shared) else f"parts.only.{key}": x for key, x in alone.state_dict().items()}
    both.load_state_dict(state)
    return alone, both


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_hybrid_of_one_part_is_that_part(name: str, batch: Batch) -> None:
    if compose([f"objective={name}"]).objective._target_.endswith("Hybrid"):
        pytest.skip("is one of several")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone, both = as_part(name)
    losses: list[list[torch.Tensor]] = []
    for objective in (alone, both):
        torch.manual_seed(0)  # for dropout
        optimizer, schedule = objective.optim.build(objective, 10)
        objective.total_steps = 10
        losses.append([])
        for _ in range(10):
            loss = objective.total(objective.step(copy.copy(batch)).terms)
            optimizer.zero_grad()
            loss.backward()
            objective.on_before_optimizer_step(optimizer)
            optimizer.step()
            schedule.step()
            objective.finish_step()
            losses[-1].append(loss.detach())
    assert torch.equal(torch.stack(losses[0]), torch.stack(losses[1]))

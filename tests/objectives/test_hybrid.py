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
from repr.config import CONF, ConfigError, compose
from repr.config_check import check
from repr.models.backbone import backbone
from repr.models.fusion import TextReader
from repr.objectives.conditioned_masking import ConditionedMasking
from repr.objectives.fusion import Fusion
from repr.objectives.hybrid import Hybrid
from repr.objectives.image_text import ImageText
from repr.objectives.joint_embedding import JointEmbedding
from repr.objectives.masked_autoencoders import MaskedImageText, MaskedViews
from repr.objectives.self_distillation import SelfDistillation
from repr.optim import Optim
from tests.objectives.conftest import OBJECTIVES, config

SIMCLR = partial(JointEmbedding, hidden_dim=32, dim=16)
DINO = partial(SelfDistillation, hidden_dim=32, dim=16, num_prototypes=12)

# The objectives that are no hybrids themselves.
ALONE = [name for name in OBJECTIVES if "\nparts:" not in (CONF / "objective" / f"{name}.yaml").read_text()]


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
    reader = "text." if getattr(alone, "text", None) is not None else "words."  # as CapPa calls it
    words = {key: key.replace(reader, "text.", 1) for key in alone.state_dict() if key.startswith(reader)}
    shared = ("backbone.", "text.")
    names = {key: words.get(key, key if key.startswith(shared) else f"parts.only.{key}") for key in alone.state_dict()}
    both.load_state_dict({names[key]: x for key, x in alone.state_dict().items()})
    return alone, both


@pytest.mark.slow
@pytest.mark.parametrize("name", ALONE)
def test_a_hybrid_of_one_part_is_that_part(name: str, batch: Batch) -> None:
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


def test_what_two_parts_ask_for_is_encoded_once(batch: Batch) -> None:
    both = hybrid(
        parts={"a": ImageText, "b": ImageText, "simclr": SIMCLR}, views={"a": [0], "b": [0], "simclr": [1, 0]}
    )
    seen: list[int] = []
    both.backbone.patch_embed.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    both.text.token_embedding.register_forward_pre_hook(lambda _, inputs: seen.append(-len(inputs[0])))
    output = both.step(batch)
    assert sorted(seen) == [-8, 8, 8]  # one text, and of three views of two parts those that differ
    both.total(output.terms).backward()
    shared = both.backbone.patch_embed.proj.weight.grad.clone()
    both.zero_grad()
    for name in both.parts:  # each by itself
        both.weights_now = lambda name=name: {k: w for k, w in both.weights.items() if k.startswith(name)}
        both.active = lambda name=name: [name]
        alone = both.step(batch)
        both.total(alone.terms).backward()
        assert all(torch.allclose(alone.terms[key], output.terms[key], rtol=1e-6) for key in alone.terms)
    torch.testing.assert_close(both.backbone.patch_embed.proj.weight.grad, shared, rtol=1e-4, atol=1e-7)


def test_batch_norm_sees_each_part_s_views_together(batch: Batch) -> None:
    torch.manual_seed(0)
    resnet = backbone("test_resnet", image_size=32)
    parts = {"one": SIMCLR, "same": SIMCLR, "other": SIMCLR}
    both = Hybrid(resnet, parts=parts, views={"one": [0, 1], "same": [0, 1], "other": [1, 0]})
    seen: list[int] = []
    resnet.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    both.step(batch)
    assert seen == [16, 16]


def test_a_part_that_hides_patches_or_needs_no_gradient_is_encoded_apart(batch: Batch) -> None:
    both = hybrid(parts={"clip": ImageText, "mae": partial(MaskedViews, positions="learned")}, views={"mae": [0]})
    rebuilt = both.step(batch).terms["mae.reconstruction"]
    alone = copy.deepcopy(both.parts["mae"])
    alone.backbone = both.backbone
    assert torch.equal(rebuilt, alone.step(batch).terms["reconstruction"])
    sum_in_itself = MaskedImageText(both.backbone, both.text, positions="learned")
    sum_in_itself.decoder.load_state_dict(both.parts["mae"].decoder.state_dict())
    assert torch.equal(rebuilt, sum_in_itself.step(batch).terms["reconstruction"])


def test_a_stage_costs_nothing_before_it_begins_and_begins_anew(batch: Batch) -> None:
    both = hybrid(
        parts={"clip": ImageText, "dino": DINO}, stages={"dino": [0.5, 1]}, optim=Optim(warmup_steps=2, lr=0.1)
    )
    both.total_steps, dino = 6, both.parts["dino"]
    optimizer, schedule = both.optim.build(both, 6)
    start = {name: x.clone() for name, x in dino.state_dict().items()}
    rates = []
    for step in range(6):
        output = both.step(batch)
        assert output.terms.keys() == both.weights_now().keys()
        assert ("dino.views" in output.terms) == (step >= 3)
        optimizer.zero_grad()
        both.total(output.terms).backward()
        late = next(group for group in optimizer.param_groups if dino.head.prototypes.weight in set(group["params"]))
        rates.append(late["lr"] / optimizer.param_groups[0]["lr"])
        both.on_before_optimizer_step(optimizer)
        optimizer.step()
        schedule.step()
        both.finish_step()
        if step < 2:
            assert all(torch.equal(start[name], x) for name, x in dino.state_dict().items())
        elif step == 2:  # the teacher is the student, which has trained meanwhile
            teacher, student = dino.teacher.backbone.state_dict(), both.backbone.state_dict()
            assert all(torch.equal(teacher[name], student[name]) for name in student)
    assert rates == pytest.approx([0, 0, 0, 0.5, 1, 1])
    assert dino.step_number == 3
    assert not torch.equal(start["head.prototypes.weight"], dino.head.prototypes.weight)


def test_what_one_part_does_not_reach_another_may() -> None:
    mae = partial(MaskedViews, positions="learned")  # takes tokens, and not what is pooled
    tower = vit(global_pool="map", class_token=False)
    with pytest.raises(ValueError, match="does not train attn_pool"):
        mae(copy.deepcopy(tower))
    assert all(
        p.requires_grad for p in Hybrid(tower, parts={"mae": mae, "simclr": SIMCLR}).backbone.blocks.parameters()
    )
    assert tower.attn_pool.q.weight.requires_grad
    reader = TextReader(context_length=12, vocab_size=49409, width=32, layers=1, output_dim=16)
    reader.ln_final.requires_grad_(False)  # as the user wants it
    parts = {"voltron": ConditionedMasking, "albef": partial(Fusion, queue_length=0, num_layers=1)}
    both = Hybrid(vit(), text=reader, parts=parts)
    assert both.text.text_projection.requires_grad
    assert not both.text.ln_final.weight.requires_grad
    alone = Hybrid(vit(), text=copy.deepcopy(reader), parts={"voltron": ConditionedMasking})
    assert not alone.text.text_projection.requires_grad


def test_what_is_evaluated_is_the_main_part(batch: Batch) -> None:
    both = hybrid(parts={"simclr": SIMCLR, "clip": ImageText})
    assert (both.main_name, both.EMBEDDINGS) == ("clip", ImageText.EMBEDDINGS)
    evaluation = Batch(index=batch["index"], image=batch["views"][0], text=batch["text"])
    expected = both.eval().embed(evaluation)
    assert not [name for name in both.state_dict() if name.startswith(("parts.clip.backbone", "parts.clip.text"))]
    part = both.evaluated()
    assert isinstance(part, ImageText)
    assert {"backbone", "text"} <= dict(part.named_children()).keys()
    assert torch.equal(part.embed(evaluation).image, expected.image)


FAULTS = {
    "clip.contrast: 1, clip.contrst: 1": ({"weights": {"clip.contrst": 1.0}}, "parts.clip: weights names contrst"),
    "an unknown part": ({"views": {"mae": [0]}}, "views names mae; the parts are clip, simclr"),
    "a stage beyond the end": ({"stages": {"clip": [0.5, 1.2]}}, "stages.clip=.* 0 <= from < to <= 1"),
    "an unknown main part": ({"main": "dino"}, "main=dino; the parts are clip, simclr"),
    "a main part without text": ({"main": "simclr"}, "main=simclr encodes no text, and clip does"),
    "no text tower": ({"text": None}, "parts.clip: it needs a text tower: set text"),
    "a name with a dot": ({"parts": {"a.b": SIMCLR}}, "parts.a.b cannot have this name"),
    "no part": ({"parts": {}}, "parts is empty"),
    "no objective": ({"parts": {"a": lambda backbone: backbone}}, "is no Objective"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_told(fault: str) -> None:
    options, message = FAULTS[fault]
    with pytest.raises(ValueError, match=message):
        Hybrid(vit(), **{"parts": {"clip": ImageText, "simclr": SIMCLR}, "text": text(), **options})


def test_all_faults_of_a_config_are_told_together() -> None:
    cfg = compose(
        [
            "objective=slip", "backbone=resnet", "backbone.name=test_resnet", "objective.views.simclr=[1,7]",
            "+objective.stages.clip=[0.9,1.1]", "objective.weights.simclr={variace: 1}", "chunk_size=2",
        ]
    )  # fmt: skip
    with pytest.raises(ConfigError) as error:
        check(cfg)
    assert "objective.weights.simclr.variace: " in str(error.value)
    cfg.objective.weights.simclr = {"variance": 1}
    with pytest.raises(ConfigError, match=r"objective\.stages\.clip=\[0\.9, 1\.1\]: set it to"):
        check(cfg)
    cfg.objective.stages = None
    with pytest.raises(ConfigError, match=r"objective\.views\.simclr names view 7, and views has 3"):
        check(cfg)
    cfg.objective.views.simclr = [1, 2]
    cfg.objective.parts.simclr.weights = {"contrast": 2}
    with pytest.raises(ConfigError, match=r"parts\.simclr\.weights has no effect: set objective\.weights\.simclr"):
        check(cfg)
    cfg.objective.views.simclr = "${view:distorted}"
    with pytest.raises(ConfigError, match="views has no distorted; it has plain, augmented"):
        check(cfg)


def test_a_view_of_one_part_that_the_backbone_refuses_is_told_with_that_part() -> None:
    with pytest.raises(ConfigError, match=r"PixPro|map of some|one cell"):
        check(compose(["objective=clip_pixcontrast", "backbone=resnet", "backbone.name=test_resnet", "image_size=32"]))


def test_a_size_that_the_shared_backbone_refuses_is_told_once() -> None:
    with pytest.raises(ConfigError) as refused:
        check(compose(["experiment=clip_pixcontrast_emoji", "views.augmented.size=33", "run_folder=x"]))
    (fault,) = refused.value.faults
    assert "cannot take pictures of 33 x 33 pixels" in fault

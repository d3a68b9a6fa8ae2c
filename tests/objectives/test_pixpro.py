"""The PixPro flow: the authors' two steps, teacher, instance branch, backbones, and what it refuses."""

import math
import warnings
from functools import partial
from pathlib import Path
from typing import ClassVar

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from repr.batch import Batch
from repr.config import ConfigError, compose
from repr.config_check import check
from repr.drawing import shown
from repr.losses.pixel import pixel_contrast, positive_mask
from repr.models.backbone import backbone, feature_map
from repr.models.heads import project
from repr.models.teacher import Teacher
from repr.objectives.match_picture import RIGHT, WRONG
from repr.objectives.pixpro import PixPro
from repr.optim import Optim
from repr.training.guard import NonFiniteGuard
from tests.conftest import RunGroup
from tests.golden import golden
from tests.models.test_propagation import PLACES

FULL = golden("pixpro_full")
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


class Encoder(nn.Module):
    """The toy of the stored runs: two convolutions."""

    num_features = 12

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.b1, self.c2 = nn.Conv2d(3, 8, 4, 4, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 12, 1)

    def forward_intermediates(self, images: Tensor, **_: object) -> list[Tensor]:
        return [self.c2(self.b1(self.c1(images)).relu()).relu()]


def named_as_theirs(flow: PixPro) -> dict[str, Tensor]:
    """Our tensors under the authors' names."""
    owners = {"encoder": flow.backbone, "encoder_k": flow.teacher.backbone}
    tensors = {
        f"{name}.{key}": t for name, owner in owners.items() for key, t in owner.state_dict(keep_vars=True).items()
    }
    stacks = {
        "projector": flow.projector,
        "projector_k": flow.teacher.projector,
        "value_transform": flow.propagation.values,
    }
    for name, stack in stacks.items():
        parts = PLACES if len(stack) > 1 else {"": 0}
        for part, place in parts.items():
            for key, tensor in stack[place].state_dict(keep_vars=True).items():
                tensors[".".join(filter(None, (name, part, key)))] = tensor
    return tensors


@pytest.mark.parametrize("case", sorted({key.split("/")[0] for key in FULL}))
def test_two_steps_equal_the_authors(case: str) -> None:
    """Loss, every gradient, the teacher's weights, the running statistics of both branches."""
    data = {key.split("/")[1]: torch.as_tensor(value) for key, value in FULL.items() if key.startswith(f"{case}/")}
    flow = PixPro(Encoder(), hidden_dim=16, dim=8, num_layers=int(data["transform_layers"]))
    stacks = [flow.projector, flow.teacher.projector, flow.propagation.values]
    for stack in stacks:  # theirs have a bias before BatchNorm, which takes it out again
        if len(stack) > 1:
            stack[0] = nn.Linear(*stack[0].weight.T.shape)
    flow.teacher.requires_grad_(False)
    ours = named_as_theirs(flow)
    start = {key.removeprefix("init."): value for key, value in data.items() if key.startswith("init.")}
    missing = ours.keys() - start.keys()
    assert all(key.endswith("num_batches_tracked") for key in missing), missing
    with torch.no_grad():
        for key, value in start.items():
            ours[key].copy_(value.view_as(ours[key]))
    trained = [p for p in flow.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=data["sgd_lr"].item())
    k, total, base = (data[name].item() for name in ("k_start", "K_total", "base_momentum"))
    for step in range(2):
        momentum = Teacher(momentum=base, final_momentum=1.0).momentum_at(k + step, total)
        assert momentum == pytest.approx(data["momentum_used"][step].item(), abs=1e-7)
        flow.teacher.update(flow, momentum)
        views, boxes = ([data[f"step{step}.{name}{v}"] for v in (1, 2)] for name in ("im", "coord"))
        optimizer.zero_grad()
        loss = flow.total(flow.step(Batch(views=views, boxes=torch.stack(boxes, dim=1))).terms)
        loss.backward()
        torch.testing.assert_close(loss, data["loss"][step], rtol=1e-5, atol=1e-6)
        for key in (key for key in data if key.startswith(f"step{step}.grad.")):
            tensor = ours[key.removeprefix(f"step{step}.grad.")]
            vanishes = key.endswith("linear1.bias")  # before BatchNorm, so all that is stored is rounding
            close = {"rtol": 0, "atol": 1e-5} if vanishes else CLOSE
            torch.testing.assert_close(
                tensor.grad, data[key].view_as(tensor), **close, msg=lambda m, key=key: f"{key}: {m}"
            )
        optimizer.step()
    compared = [key.removeprefix("final.") for key in data if key.startswith("final.")]
    assert len(compared) > 15
    for key in compared:
        torch.testing.assert_close(ours[key].detach(), data[f"final.{key}"].view_as(ours[key]), **CLOSE, msg=key)


def flow_of(**options: object) -> PixPro:
    """Small, with a teacher that differs from the student."""
    torch.manual_seed(0)
    flow = PixPro(Encoder(), hidden_dim=10, dim=6, **options)
    torch.manual_seed(1)
    for parameter in flow.teacher.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return flow


def crops(num: int = 6, size: int = 16) -> Batch:
    """Two views of random pictures; the crops of the first sample do not overlap, those of the last are mirrored."""
    generator = torch.Generator().manual_seed(2)
    views = [torch.randn(num, 3, size, size, generator=generator) for _ in range(2)]
    corners = 0.2 * torch.rand(num, 2, 2, generator=generator)
    boxes = torch.cat([corners, corners + 0.6], dim=2)
    boxes[0] = torch.tensor([[0, 0, 0.3, 0.3], [0.6, 0.6, 1, 1]])
    boxes[-1, 1] = boxes[-1, 1, [2, 1, 0, 3]]
    return Batch(views=views, boxes=boxes)


def test_the_instance_branch_is_its_formula() -> None:
    """-2 cos in both directions, after projector, predictor and mean over cells, as in the authors' code."""
    flow, batch = flow_of(weights={"pixel": 0.0, "instance": 1.0}), crops()
    assert not hasattr(flow, "projector")
    term = flow.step(batch).terms["instance"]

    def embed(trunk: nn.Module, *heads: nn.Module) -> list[Tensor]:
        pooled = []
        for view in batch["views"]:
            rows = trunk.forward_intermediates(view)[0].permute(0, 2, 3, 1).reshape(-1, 12)
            for head in heads:
                rows = head(rows)
            pooled.append(F.normalize(rows.view(6, 16, -1).mean(1), dim=1))
        return pooled

    q = embed(flow.backbone, flow.instance_projector, flow.instance_predictor)
    k = embed(flow.teacher.backbone, flow.teacher.instance_projector)
    expected = -2 * (q[0] * k[1]).sum(1).mean() - 2 * (q[1] * k[0]).sum(1).mean()
    torch.testing.assert_close(term, expected, rtol=1e-5, atol=1e-6)


def test_both_terms_are_those_that_each_has_alone() -> None:
    both = flow_of(weights={"pixel": 1.0, "instance": 0.5})
    output = both.step(crops())
    alone = PixPro(Encoder(), hidden_dim=10, dim=6)
    alone.load_state_dict({name: t for name, t in flow_state(both).items() if "instance" not in name})
    torch.testing.assert_close(output.terms["pixel"], alone.step(crops()).terms["pixel"])
    total = both.total(output.terms)
    torch.testing.assert_close(total, output.terms["pixel"] + 0.5 * output.terms["instance"])
    total.backward()
    without = [name for name, p in both.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    assert all(p.grad is None for p in both.teacher.parameters())


def flow_state(flow: PixPro) -> dict[str, Tensor]:
    """As it was before the step, whose running statistics do not matter here."""
    return {name: tensor.detach().clone() for name, tensor in flow.state_dict().items()}


def test_crops_that_do_not_overlap_count_as_zero_and_are_counted() -> None:
    batch = crops()
    output = flow_of().step(batch)
    assert output.logs["no_overlap"].item() == pytest.approx(1 / 6)
    assert output.logs["matches"].item() > 0
    apart = batch["boxes"].clone()
    apart[:] = apart[0]
    nothing = flow_of().step(Batch(views=batch["views"], boxes=apart))
    assert nothing.terms["pixel"].item() == 0
    assert nothing.logs["no_overlap"].item() == 1


def test_pixcontrast_compares_projections_without_propagation() -> None:
    loss = partial(pixel_contrast, temperature=0.3)
    flow, batch = flow_of(gamma=None, losses={"pixel": loss}), crops()
    assert not list(flow.propagation.parameters())
    term = flow.step(batch).terms["pixel"]
    maps = [flow.backbone.forward_intermediates(view)[0] for view in batch["views"]]
    targets = [flow.teacher.backbone.forward_intermediates(view)[0] for view in batch["views"]]
    q = [project(flow.projector, m) for m in maps]
    k = [project(flow.teacher.projector, m) for m in targets]
    mask = positive_mask(*batch["boxes"].unbind(1), grid_q=(4, 4), grid_k=(4, 4), threshold=0.7)
    torch.testing.assert_close(term, loss(q[0], k[1], mask) + loss(q[1], k[0], mask.mT))


@pytest.mark.parametrize("name", ["test_resnet", "vit_tiny_patch16_224", "convnext_atto"])
def test_backbones_and_what_is_evaluated(name: str) -> None:
    pools_patches = {"depth": 2, "embed_dim": 24, "num_heads": 2, "global_pool": "avg", "fc_norm": False}
    sizes = pools_patches if name.startswith("vit") else {}
    flow = PixPro(backbone(name, image_size=64, **sizes), hidden_dim=8, dim=4)
    views = [torch.randn(3, 3, 64, 64) for _ in range(2)]
    output = flow.step(Batch(views=views, boxes=torch.tensor([0.0, 0, 1, 1]).expand(3, 2, 4)))
    cells = {"test_resnet": 4, "convnext_atto": 4}.get(name, 16)
    assert output.embeddings["cells"].shape == (3 * cells, 4)
    assert output.logs["matches"] == cells  # equal square crops match cell by cell
    flow.eval()
    image = flow.encode_image(views[0])
    assert image.shape == (3, flow.backbone.num_features)
    if not name.startswith("convnext"):  # which normalises once more
        torch.testing.assert_close(image, feature_map(flow.backbone, views[0]).mean((2, 3)))


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_a_run_follows_the_schedule_whatever_the_accumulation(precision: str, tmp_path: Path) -> None:
    """Three micro-batches a step: one update of the teacher a step, with the momentum of that step."""

    class Watched(PixPro):
        seen: ClassVar[list[float]] = []

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            before = self.teacher.projector[0].weight.clone()
            if batch_idx and batch_idx % 3 == 0:  # the first after an optimizer step
                expected = torch.lerp(
                    self.last,
                    self.projector[0].weight,
                    1 - self.teacher.momentum_at(self.step_number, self.total_steps),
                )
                torch.testing.assert_close(before, expected)
            self.last = before
            self.seen.append(self.teacher.momentum_at(self.step_number, self.total_steps))
            return super().training_step(batch, batch_idx)

    torch.manual_seed(0)
    flow = Watched(Encoder(), hidden_dim=8, dim=4, momentum=0.5, optim=Optim(lr=0.1))
    with torch.no_grad():
        flow.backbone.c1.weight.mul_(2)  # as init_from does
    trainer = pl.Trainer(
        max_epochs=1, accumulate_grad_batches=3, logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, precision=precision, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(flow, DataLoader([crops() for _ in range(9)], batch_size=None))
    steps = [0.5, 0.5 + 0.5 * (1 - math.cos(math.pi / 3)) / 2, 0.5 + 0.5 * (1 - math.cos(2 * math.pi / 3)) / 2]
    assert Watched.seen[-9:] == pytest.approx([m for m in steps for _ in range(3)])
    assert flow.teacher.backbone.b1.num_batches_tracked == 18
    assert flow.teacher.momentum_at(flow.step_number, flow.total_steps) == 1.0


def test_a_new_run_starts_with_the_teacher_as_the_student_is(tmp_path: Path) -> None:
    flow = flow_of()
    trainer = pl.Trainer(
        max_steps=1, logger=False, enable_checkpointing=False, accelerator="cpu", enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    start = {name: tensor.clone() for name, tensor in flow.backbone.named_parameters()}
    flow.teacher.momentum = 1.0
    trainer.fit(flow, DataLoader([crops()], batch_size=None))
    for name, tensor in flow.teacher.backbone.named_parameters():
        assert torch.equal(tensor, start[name])


def test_a_skipped_step_leaves_the_teacher_alone(tmp_path: Path) -> None:
    flow = flow_of(momentum=0.5, optim=Optim(lr=0.1))
    bad = crops()
    bad["views"][0][0, 0, 0, 0] = torch.nan
    states = []

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: PixPro, *args: object) -> None:
            states.append({name: tensor.clone() for name, tensor in module.state_dict().items()})

    trainer = pl.Trainer(
        max_steps=4, logger=False, enable_checkpointing=False, accelerator="cpu", enable_progress_bar=False,
        callbacks=[NonFiniteGuard(tmp_path, action="skip"), Keep()], enable_model_summary=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(flow, DataLoader([crops(), bad, crops(), crops()], batch_size=None))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[1]["teacher.projector.0.weight"], states[2]["teacher.projector.0.weight"])
    assert flow.step_number == trainer.global_step == 4  # the skipped one counts


def test_the_picture_shows_matches_and_what_was_found() -> None:
    flow, batch = flow_of().eval(), crops(num=2)
    batch["boxes"] = torch.tensor([0.0, 0, 1, 1]).expand(2, 2, 4)
    batch["views"][1] = batch["views"][0]
    show = partial(shown, mean=(0, 0, 0), std=(1, 1, 1))
    picture = flow.pictures(batch, show)["matches"]
    assert picture.dtype == torch.uint8
    assert picture.shape[0] == 3
    assert picture.shape[1] > 2 * 192
    right, wrong = (torch.tensor(colour)[:, None, None] for colour in (RIGHT, WRONG))
    assert (picture[:, :, 400:] == right).all(0).sum() > 500  # every cell finds itself
    assert not (picture == wrong).all(0).any()
    batch["views"][1] = batch["views"][0].flip(3)  # though the boxes say otherwise
    assert (flow.pictures(batch, show)["matches"] == wrong).all(0).sum() > 500
    batch["boxes"] = torch.tensor([[0.0, 0, 0.2, 0.2], [0.5, 0.5, 1, 1]]).expand(2, 2, 4)
    assert not (flow.pictures(batch, show)["matches"] == wrong).all(0).any()


def without(batch: Batch, key: str) -> Batch:
    return {name: value for name, value in batch.items() if name != key}


def test_batches_that_do_not_fit() -> None:
    flow, batch = flow_of(), crops()
    cases = [
        (without(batch, "boxes"), "the batch has no boxes: take repr's DataModule"),
        (batch | {"views": batch["views"][:1]}, "compares two views of a sample, and the batch has one"),
        (batch | {"views": [batch["views"][0], batch["views"][1][:4]]}, "two views of 6 and 4 samples do not fit"),
        (batch | {"boxes": batch["boxes"][:4]}, r"do not fit boxes of shape \(4, 2, 4\)"),
        (batch | {"boxes": batch["boxes"][:, 0]}, "every sample needs a box for each view"),
        (batch | {"boxes": batch["boxes"].half()}, "boxes are float16"),
    ]
    for wrong, words in cases:
        with pytest.raises(ValueError, match=words):
            flow.step(wrong)
    flow.backbone.num_features = 13
    with pytest.raises(ValueError, match="map has 12 channels and its num_features says 13"):
        flow.step(batch)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": {"pixels": 1}}, r"^weights names pixels"),
        ({"losses": {"pixels": F.mse_loss}}, r"^losses names pixels"),
        ({"momentum": 1.5}, r"^momentum=1\.5"),
        ({"gamma": 0.0}, "gamma > 0"),
    ],
)
def test_bad_options(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PixPro(Encoder(), **options)


def test_a_class_token_that_would_be_evaluated_is_warned_of() -> None:
    vit = ["objective=pixpro", "run_folder=x", "backbone=vit_b16", "backbone.name=vit_tiny_patch16_224"]
    with pytest.warns(UserWarning, match=r"not its class token.*set \+backbone\.global_pool=avg"):
        check(compose(vit))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(compose([*vit, "+backbone.global_pool=avg", "+backbone.fc_norm=false"]))


@pytest.mark.filterwarnings("ignore:PixPro trains the patches")
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["views=clip"], "PixPro compares two views of a sample, and views has 1: set views=byol"),
        (["views=multicrop"], "and views has 8"),
        (["backbone.name=test_efficientnet"], "PixPro does not train conv_head.weight of the backbone"),
        (["backbone.name=test_resnet", "image_size=32"], "makes one cell of a view of 32 x 32 pixels"),
        (["backbone.name=vit_tiny_patch16_224", "views.second.size=40"], "cannot take pictures of 40 x 40 pixels"),
        (["eval=emoji"], "encodes images only: set eval=images"),
    ],
)
def test_what_can_be_known_is_refused_by_the_check(overrides: list[str], words: str) -> None:
    base = ["objective=pixpro", "backbone=resnet", "image_size=64", "run_folder=x"]
    given = {override.split("=")[0] for override in overrides}
    cfg = compose([*(override for override in base if override.split("=")[0] not in given), *overrides])
    with pytest.raises(ConfigError) as refused:
        check(cfg)
    assert words in str(refused.value)


@pytest.mark.slow
def test_two_processes_train_a_backbone_whose_last_norm_the_map_does_not_reach(
    run_group: RunGroup, tmp_path: Path
) -> None:
    """DDP would wait for its gradients, and stop at the second step."""
    small = ["smoke=true", "objective=pixpro", "backbone.name=test_convnext", "trainer.limit_train_batches=3"]
    ddp = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", f"run_folder={tmp_path}", "data.eval=null"]
    done = run_group(2, *small, *ddp)
    for status, out in done:
        assert status == 0, out
    assert "PixPro does not reach head.norm.weight, head.norm.bias of the backbone" in done[0][1]
    assert (tmp_path / "checkpoints" / "step=3.ckpt").is_file()

"""DINO, iBOT, DINOv2: heads, centers and schedules of the authors' code; what a step is, and what is refused."""

import math

import numpy as np
import pytest
import timm
import torch
from torch import nn

from repr.batch import Batch
from repr.config import compose
from repr.config_check import check
from repr.data.sources.emoji import Emoji
from repr.losses.clustering import sinkhorn
from repr.losses.distillation import moved_center, patch_distillation, self_distillation
from repr.losses.hypersphere import koleo
from repr.models.heads import PrototypeHead
from repr.models.masking import TokenMasking, encode_hidden
from repr.objectives.self_distillation import SelfDistillation
from repr.optim import Optim, clip_each
from repr.training.collapse import collapse_signs
from tests.golden import golden
from tests.objectives.conftest import VIT, build, make_batch

DINO, IBOT = golden("dino"), golden("ibot")
SMALL = ["objective.num_prototypes=12"]


@pytest.mark.parametrize("case", ["head_norm_last", "head_free_last"])
def test_the_head_is_that_of_the_authors(case):
    file = {key.removeprefix(f"{case}/"): torch.tensor(DINO[key]) for key in DINO if key.startswith(f"{case}/")}
    layers = sorted({int(key.split(".")[2]) for key in file if key.startswith("init.mlp.")})
    weights = [file[f"init.mlp.{layer}.weight"] for layer in layers]
    widths = [weights[0].shape[1], *map(len, weights)]
    head = PrototypeHead(widths, len(file["init.last_layer.weight_v"]), learn_length=case == "head_free_last")
    state = {key.removeprefix("init."): value for key, value in file.items() if key.startswith("init.mlp.")}
    state |= {"prototypes.weight": file["init.last_layer.weight_v"], "length": file["init.last_layer.weight_g"][:, 0]}
    head.load_state_dict(state)
    x = file["x"].clone().requires_grad_()
    out = head(x)
    torch.testing.assert_close(out, file["y"], rtol=1e-5, atol=1e-6)
    out.backward(file["cotangent"])
    torch.testing.assert_close(x.grad, file["grad.x"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(head.prototypes.weight.grad, file["grad.last_layer.weight_v"], rtol=1e-4, atol=1e-6)
    assert (head.length.grad is not None) == (case == "head_free_last")


@pytest.mark.parametrize("case", ["head_shared", "head_separate"])
def test_the_heads_of_views_and_patches_are_those_of_the_authors(case: str) -> None:
    """Theirs share all but the last layer, or that too; ours are one, or two of everything."""
    file = {key.removeprefix(f"{case}/"): torch.tensor(IBOT[key]) for key in IBOT if key.startswith(f"{case}/")}
    heads = []
    for last in ("last_layer", "last_layer" if case == "head_shared" else "last_layer2"):
        head = PrototypeHead([6, 7, 7, 4], 8)
        state = {key.removeprefix("init."): value for key, value in file.items() if key.startswith("init.mlp.")}
        state |= {"prototypes.weight": file[f"init.{last}.weight_v"], "length": file[f"init.{last}.weight_g"][:, 0]}
        head.load_state_dict(state)
        heads.append(head)
    x = file["x"].clone().requires_grad_()
    cls, patch = heads[0](x[:, 0]), heads[1](x[:, 1:].flatten(0, 1)).view(3, 4, 8)
    torch.testing.assert_close(cls, file["cls"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(patch, file["patch"], rtol=1e-5, atol=1e-6)
    ((cls * file["cotangent_cls"]).sum() + (patch * file["cotangent_patch"]).sum()).backward()
    torch.testing.assert_close(x.grad, file["grad.x"], rtol=1e-4, atol=1e-6)
    grads = heads[0].mlp[0].weight.grad + heads[1].mlp[0].weight.grad
    torch.testing.assert_close(grads, file["grad.mlp.0.weight"], rtol=1e-4, atol=1e-6)


def test_scores_of_some_rows_and_the_mean_of_all() -> None:
    head, x, rows = PrototypeHead([6, 5, 4], 9), torch.randn(20, 6), torch.tensor([3, 0, 11])
    some, mean = head.forward_some(x, rows)
    torch.testing.assert_close(some, head(x)[rows])
    torch.testing.assert_close(mean, head(x).mean(0))
    assert head.forward_some(x, rows[:0])[0].shape == (0, 9)


@pytest.mark.parametrize("case", ["loss_2global", "loss_2plus2"])
def test_the_center_of_patches_follows_all_cells(case: str) -> None:
    centers = [torch.zeros(IBOT[f"{case}/teacher_{part}"].shape[-1]) for part in ("cls", "patch")]
    for step in range(len(IBOT[f"{case}/loss"])):
        for i, (part, after) in enumerate((("cls", "center_after"), ("patch", "center2_after"))):
            seen = torch.tensor(IBOT[f"{case}/teacher_{part}"][step])
            momentum = float(IBOT[f"{case}/cfg.center_momentum_f64"][i])
            centers[i] = moved_center(centers[i], seen, momentum=momentum)
            expected = torch.tensor(IBOT[f"{case}/{after}"][step]).flatten()
            torch.testing.assert_close(centers[i], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["loss_2global", "loss_2plus3"])
def test_the_center_follows_all_rows_of_the_teacher(case):
    center = torch.zeros(DINO[f"{case}/teacher"].shape[2])
    for teacher, after in zip(DINO[f"{case}/teacher"], DINO[f"{case}/center_after"], strict=True):
        center = moved_center(center, torch.tensor(teacher).view(2, -1, len(center)), momentum=0.9)
        torch.testing.assert_close(center, torch.tensor(after[0]), rtol=1e-5, atol=1e-6)


def test_the_decay_rises_as_the_authors_does():
    base, final, epochs, steps, *_ = DINO["schedule_wd/cfg.base_final_epochs_iters_warmup_start_f64"].tolist()
    total = int(epochs * steps)
    optim = Optim(lr=1e-3, weight_decay=base, final_weight_decay=final)
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    optimizer, schedule = optim.build(model, total)
    for expected in DINO["schedule_wd/value_f64"][:total]:
        assert [group["weight_decay"] for group in optimizer.param_groups] == pytest.approx([expected, 0.0])
        optimizer.step()
        schedule.step()
    kept = schedule.state_dict()
    optimizer, schedule = optim.build(model, total)
    schedule.load_state_dict(kept)
    schedule.step()
    assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(final)


def test_each_gradient_is_clipped_by_itself():
    names = ("a", "b", "last_layer.weight", "last_layer.bias")
    parameters = [nn.Parameter(torch.tensor(DINO[f"clip/before.{name}"])) for name in names]
    for parameter in parameters:
        parameter.grad = parameter.detach().clone()
    clip_each(parameters, 3.0)
    for parameter, name in zip(parameters, names, strict=True):
        torch.testing.assert_close(parameter.grad, torch.tensor(DINO[f"clip/after.{name}"]), rtol=1e-5, atol=1e-6)


def test_what_is_watched_is_without_what_all_scores_have_in_common() -> None:
    flow, batch = build("dino", *SMALL), make_batch(8)
    flow.center.fill_(3.0)
    output = flow.step(batch)
    raw = flow.head(flow.backbone(batch["views"][0]))
    torch.testing.assert_close(output.embeddings["scores"], raw.detach() - flow.center)
    assert output.assignments is output.scores
    torch.testing.assert_close(output.assignments.sum(1), torch.ones(8))


def test_a_step_of_dino():
    objective = build("dino", *SMALL, "objective.freeze_steps=1", "objective.temperature_steps=4",
                      "objective.teacher_temperature=0.08")  # fmt: skip
    output = objective.step(make_batch(8))
    assert output.terms["views"].item() == pytest.approx(math.log(12), abs=2)
    assert 0 < output.logs["teacher_entropy"] < math.log(12)
    assert objective.center.abs().max() > 0
    output.terms["views"].backward()
    objective.on_before_optimizer_step(None)
    assert objective.head.prototypes.weight.grad is None
    assert objective.head.mlp[0].weight.grad is not None
    assert all(parameter.grad is None for parameter in objective.teacher.parameters())
    assert [objective.teacher_temperature_at(step) for step in (0, 2, 4, 9)] == pytest.approx([0.04, 0.06, 0.08, 0.08])
    objective.finish_step()
    center = objective.center.clone()
    objective.eval()
    objective.step(make_batch(8))
    assert torch.equal(objective.center, center)


PATCHES = "+backbone.patch_size=8"  # 16 of a large view, 4 of a small one
HIDDEN_CENTER = "objective.center_seen=false"


def test_a_step_of_ibot_is_what_it_says() -> None:
    flow, batch = build("ibot", PATCHES), make_batch(8)
    with torch.no_grad():
        flow.mask_token.normal_()
        flow.center.normal_(std=0.1)
        flow.patch_center.normal_(std=0.1)
    vit, teacher, views = flow.backbone, flow.teacher, batch["views"]
    centers = flow.center.clone(), flow.patch_center.clone()
    hidden = flow.masking.draw(batch["seed"], (4, 4), num_views=2)
    output = flow.step(batch)
    student, targets, cells, cell_targets = [], [], [], []
    for view, mask in zip(views[:2], hidden.chunk(2), strict=True):
        patches = vit.patch_embed(view).flatten(1, 2)  # a ViT by hand, since ours is hooked
        x = torch.where(mask[..., None], flow.mask_token, patches)
        x = torch.cat([vit.cls_token.expand(len(x), -1, -1), x], 1) + vit.pos_embed
        x = vit.norm(vit.blocks(x))
        student.append(flow.head(x[:, 0]))
        cells.append(flow.head(x[:, 1:].flatten(0, 1)).unflatten(0, (8, 16)))
        t = teacher.backbone.forward_features(view)
        targets.append(teacher.head(t[:, 0]))
        cell_targets.append(teacher.head(t[:, 1:].flatten(0, 1)).unflatten(0, (8, 16)))
    student += [flow.head(vit(view)) for view in views[2:]]
    temperatures = {"student_temperature": 0.1, "teacher_temperature": 0.04}
    torch.testing.assert_close(
        output.terms["views"], self_distillation(student, targets, center=centers[0], **temperatures)
    )
    losses = [
        patch_distillation(s, t, m, center=centers[1], **temperatures)
        for s, t, m in zip(cells, cell_targets, hidden.chunk(2), strict=True)
    ]
    torch.testing.assert_close(output.terms["patches"], torch.stack(losses).mean())
    for center, old, seen in ((flow.center, centers[0], targets), (flow.patch_center, centers[1], cell_targets)):
        torch.testing.assert_close(center, 0.9 * old + 0.1 * torch.stack(seen).flatten(0, -2).mean(0))
    output.terms["patches"].backward()
    assert flow.mask_token.grad.any()
    flow.finish_step()
    assert flow.patch_head is None


def test_a_center_of_hidden_patches() -> None:
    flow, batch = build("ibot", PATCHES, HIDDEN_CENTER), make_batch(4)
    hidden = flow.masking.draw(batch["seed"], (4, 4), num_views=2)
    tokens = flow.teacher.backbone.forward_features(torch.cat(batch["views"][:2]))
    flow.step(batch)
    torch.testing.assert_close(flow.patch_center, 0.1 * flow.teacher.head(tokens[:, 1:][hidden]).mean(0))


def test_such_a_center_stays_where_nothing_is_hidden() -> None:
    flow, batch = build("ibot", PATCHES, HIDDEN_CENTER, "objective.masking.share=1e-6"), make_batch(4)
    flow.patch_center.fill_(0.5)
    assert flow.step(batch).terms["patches"] == 0
    assert flow.patch_center.eq(0.5).all()
    assert flow.center.any()


def test_a_step_of_dinov2_is_what_it_says() -> None:
    flow, batch = build("dinov2", PATCHES, "objective.freeze_steps=1"), make_batch(8)
    assert not [name for name, _ in flow.named_buffers() if "center" in name]
    hidden = flow.masking.draw(batch["seed"], (4, 4), num_views=2)
    images = torch.cat(batch["views"][:2])
    tokens = encode_hidden(flow.backbone, images, hidden, flow.mask_token)
    seen = flow.teacher.backbone.forward_features(images)
    how = {"epsilon": 0.04, "num_iters": 3}
    targets = sinkhorn(flow.teacher.patch_head(seen[:, 1:][hidden]), **how)
    cells = -(targets * (flow.patch_head(tokens[:, 1:][hidden]) / 0.1).log_softmax(1)).sum(1)
    own = hidden.nonzero()[:, 0]
    means = torch.zeros(16).index_add(0, own, cells) / hidden.sum(1).clamp(min=1)
    output = flow.step(batch)
    torch.testing.assert_close(output.terms["patches"], means.mean())
    views = flow.head(torch.cat([tokens[:, 0], *(flow.backbone(view) for view in batch["views"][2:])])).chunk(4)
    assigned = sinkhorn(flow.teacher.head(seen[:, 0]), **how).chunk(2)
    pairs = [-(q * (s / 0.1).log_softmax(1)).sum(1).mean()
             for i, q in enumerate(assigned) for j, s in enumerate(views) if i != j]  # fmt: skip
    torch.testing.assert_close(output.terms["views"], torch.stack(pairs).mean())
    near = [koleo(view[:, 0]) for view in tokens.chunk(2)]
    torch.testing.assert_close(output.terms["koleo"], near[0] + near[1])
    flow.total(output.terms).backward()
    flow.on_before_optimizer_step(None)
    for head in (flow.head, flow.patch_head):
        assert head.prototypes.weight.grad is head.length.grad is None


def test_masks_come_from_the_seed_alone() -> None:
    """Whatever was run before, in whatever order the rows come, and whatever the step is."""
    flow, batch = build("ibot", PATCHES).eval(), make_batch(8)
    first = flow.step(batch).terms["patches"]
    torch.rand(100)
    flow.step_number = 5
    order = torch.randperm(8)
    again = Batch(seed=batch["seed"][order], views=[view[order] for view in batch["views"]])
    torch.testing.assert_close(flow.step(again).terms["patches"], first)
    batch["seed"] = batch["seed"] + 1
    assert not torch.isclose(flow.step(batch).terms["patches"], first)


def test_a_batch_in_which_nothing_is_hidden_has_gradients_all_the_same() -> None:
    """Under DDP other processes wait for them."""
    flow, batch = build("dinov2", PATCHES, "objective.masking.share=1.0e-9"), make_batch(4)
    output = flow.step(batch)
    assert output.terms["patches"] == 0
    flow.total(output.terms).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["objective=dino", "views=clip"], "num_large=2 of 1 views"),
        (["objective=dino", "small_size=300"], "others are larger"),
        (["objective=dino", "objective.teacher_temperature=0"], "teacher_temperature=0; set it above 0"),
        (["objective=dino", "objective.center_momentum=2"], "center_momentum=2; set it from 0 to 1"),
        (["objective=dino", "+optim.clip_each=0"], "optim.clip_each is 0; set it above 0"),
        (["objective=dino", "optim=lars", "optim.name=lars_l2", "+optim.final_weight_decay=0.1"], "other than lars_l2"),
        (["objective=ibot", "backbone=resnet"], "ResNet has no patch tokens to mask"),
        (
            ["objective=ibot", "image_size=32", "small_size=32", "backbone.patch_size=32"],
            "of the 1 patch.* of a view hides none",
        ),
        (["objective=dinov2", *VIT, "data.batch_size=1"], "compares the samples of a batch"),
        (["objective=dino", "objective.num_prototypes=10000000000"], "head.prototypes.weight, 10000000000 x 256"),
        (["objective=dino", "objective.num_prototypes=2.5"], "takes a whole number, such as 65536, and is 2.5"),
    ],
)
def test_what_does_not_fit_is_told(options, told):
    with pytest.raises(ValueError, match=told):
        check(compose(options))


def test_what_a_notebook_gets_wrong_is_told() -> None:
    flow, batch = build("ibot", PATCHES), make_batch(4)
    with pytest.raises(ValueError, match=r'masks are drawn from batch\["seed"\]'):
        flow.step(Batch(views=batch["views"]))
    with pytest.raises(ValueError, match="large views have one shape, where patches are hidden"):
        flow.step(Batch(views=batch["views"][1:], seed=batch["seed"]))
    for options, told in (
        ({"num_prototypes": 1}, "num_prototypes=1; set it to 2 or more"),
        ({"num_iters": 0}, "num_iters=0; set it to 1 or more"),
        ({"weights": {"patches": 1}}, "weights.views=0, and the other terms come on top"),
        ({"centering": "none"}, "centering is 'none'; set it to mean or sinkhorn"),
    ):
        with pytest.raises(ValueError, match=told):
            SelfDistillation(flow.backbone, **{"num_prototypes": 8, **options})
    normalised_later = timm.create_model("test_vit", num_classes=0, global_pool="avg")
    with pytest.raises(ValueError, match="set fc_norm=false"):
        SelfDistillation(normalised_later, num_prototypes=8, weights={"views": 1, "patches": 1})
    for options, told in (
        ({"kind": "text"}, "kind is 'text'; set it to block or random"),
        ({"ratio": (0.5, 0.1)}, "set two numbers between 0 and 1, the smaller first"),
        ({"ratio": (0.0, 0.1)}, "set two numbers between 0 and 1"),
        ({"ratio": 0.3}, "ratio=0.3; set two numbers between 0 and 1"),
        ({"ratio": "ab"}, "ratio=ab; set two numbers"),
        ({"ratio": (0.1, 1.0)}, "set two numbers between 0 and 1"),
        ({"share": 0}, "share=0 of the pictures; set it above 0"),
    ):
        with pytest.raises(ValueError, match=told):
            TokenMasking(**options)


@pytest.mark.slow
@pytest.mark.parametrize(("center_momentum", "collapses"), [(1.0, True), (0.9, False)])
def test_without_its_center_it_collapses_and_that_is_seen(center_momentum: float, collapses: bool) -> None:
    """Forty steps on two crops of emoji; a center that keeps all of itself stays 0."""
    source = Emoji("train")
    images = [np.asarray(source.image(i * 11).convert("RGB").resize((36, 36))) for i in range(480)]
    pictures = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 64 - 2
    flow = build(
        "dino", f"objective.center_momentum={center_momentum}", "objective.momentum=0.9", "optim.lr=7e-3",
        "objective.num_prototypes=256", "objective.hidden_dim=128", "objective.dim=64", "objective.freeze_steps=20",
        backbone=["backbone.name=test_resnet"],
    )  # fmt: skip
    optimizer, schedule = flow.optim.build(flow, 60)
    for _ in range(40):
        rows, views = pictures[torch.randint(480, (32,))], []
        for y, x in torch.randint(5, (2, 2)).tolist():
            views.append(rows[..., y : y + 32, x : x + 32] * (0.6 + 0.8 * torch.rand(32, 3, 1, 1)))
        output = flow.step(Batch(views=views))
        optimizer.zero_grad()
        flow.total(output.terms).backward()
        flow.on_before_optimizer_step(optimizer)
        optimizer.step()
        schedule.step()
        flow.finish_step()
    values, signs = collapse_signs(output, 1024, {"std_scores": 1.0})
    assert bool(signs) == ("scores" in signs) == collapses, (values, signs)
    assert (output.logs["teacher_entropy"] < 0.05) == collapses

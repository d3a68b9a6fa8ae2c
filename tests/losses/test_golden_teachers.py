"""Numbers of the authors' own code: BYOL, MoCo v3, DINO, iBOT, LeJEPA, OBoW, SimLAP; on one process and on two."""

import numpy as np
import pytest
import torch
from torch import Tensor

from repr.distributed import all_reduce, rank
from repr.losses.bow import bag, bag_loss, codes, distances
from repr.losses.class_pairs import class_pair_contrast, masked_contrast
from repr.losses.clustering import sinkhorn
from repr.losses.distillation import patch_distillation, self_distillation
from repr.losses.exchange import GATHER, RING
from repr.losses.hypersphere import koleo
from repr.losses.momentum import key_contrast, regression
from repr.losses.sigreg import random_directions, sigreg
from tests.golden import golden
from tests.parity_cases import in_processes

BYOL, MOCO, DINO, IBOT, SIGREG, OBOW, SIMLAP, TWO = (
    golden(name) for name in ("byol", "mocov3", "dino", "ibot", "sigreg", "obow", "simlap", "ssl_dist2")
)


def leaf(x: np.ndarray) -> Tensor:
    return torch.tensor(x, dtype=torch.float64, requires_grad=True)


def close(ours: Tensor, golden: np.ndarray, *, value: float = 1e-5, grad: float | None = None) -> None:
    """Relative to the largest entry: the golden numbers are float32 unless their name says otherwise."""
    expected = torch.as_tensor(golden, dtype=torch.float64)
    bound = (value if grad is None else grad) * max(expected.abs().max().item(), 1e-3)
    torch.testing.assert_close(ours.detach().double(), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("case", ["regression_a", "regression_b"])
def test_byol(case):
    online, target = (leaf(BYOL[f"{case}/{name}_f64"]) for name in ("online", "target"))
    value = regression(online, target)
    close(value, BYOL[f"{case}/mean_f64"], value=1e-12)
    value.backward()
    assert target.grad is None


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("case", ["loss_a", "loss_b"])
def test_moco_v3(case, chunk):
    q, k, temperature = leaf(MOCO[f"{case}/q"]), leaf(MOCO[f"{case}/k"]), float(MOCO[f"{case}/temperature"])
    value = 2 * temperature * key_contrast(q, k, temperature=temperature, chunk_size=chunk)
    close(value, MOCO[f"{case}/loss"])
    value.backward()
    close(q.grad, MOCO[f"{case}/grad.q"])
    assert k.grad is None


@pytest.mark.parametrize("case", ["loss_2global", "loss_2plus3"])
def test_dino(case):
    file = {key.removeprefix(f"{case}/"): DINO[key] for key in DINO if key.startswith(f"{case}/")}
    views, center = int(file["cfg.views"]), torch.zeros(file["student"].shape[2], dtype=torch.float64)
    for step in range(len(file["loss"])):
        student, teacher = leaf(file["student"][step]), leaf(file["teacher"][step])
        value = self_distillation(
            student.chunk(views),
            teacher.chunk(2),
            center=center,
            student_temperature=0.1,
            teacher_temperature=float(file["teacher_temperature_f64"][step]),
        )
        close(value, file["loss"][step])
        value.backward()
        close(student.grad, file["grad.student"][step], grad=1e-4)
        assert teacher.grad is None
        center = torch.tensor(file["center_after"][step], dtype=torch.float64)


@pytest.mark.parametrize("case", ["loss_2global", "loss_2plus2"])
def test_ibot(case):
    file = {key.removeprefix(f"{case}/"): IBOT[key] for key in IBOT if key.startswith(f"{case}/")}
    num_local = int(file["cfg.global_local"][1])
    center, center2 = (torch.zeros(file[f"student_{part}"].shape[-1]) for part in ("cls", "patch"))
    for step in range(len(file["loss"])):
        cls, patch = leaf(file["student_cls"][step]), leaf(file["student_patch"][step])
        local = leaf(file["student_local"][step]) if num_local else None
        student = [*cls.chunk(2), *(local.chunk(num_local) if local is not None else [])]
        teacher = [torch.tensor(file[f"teacher_{part}"][step], dtype=torch.float64) for part in ("cls", "patch")]
        mask = torch.tensor(file["mask"][step]).flatten(2)
        first = self_distillation(
            student,
            teacher[0].chunk(2),
            center=center,
            student_temperature=0.1,
            teacher_temperature=float(file["temperature_cls_f64"][step]),
        )
        temperature = float(file["temperature_patch_f64"][step])
        second = sum(
            patch_distillation(
                s, t, m, center=center2, student_temperature=0.1, teacher_temperature=temperature
            )
            for s, t, m in zip(patch.chunk(2), teacher[1].chunk(2), mask, strict=True)
        ) / 2  # fmt: skip
        weights = file["cfg.lambda1_lambda2"].tolist()
        close(weights[0] * first, file["cls"][step])
        close(weights[1] * second, file["patch"][step])
        (weights[0] * first + weights[1] * second).backward()
        close(cls.grad, file["grad.student_cls"][step], grad=1e-4)
        close(patch.grad, file["grad.student_patch"][step], grad=1e-4)
        if local is not None:
            close(local.grad, file["grad.student_local"][step], grad=1e-4)
        center, center2 = (torch.tensor(file[f"{name}_after"][step]) for name in ("center", "center2"))


@pytest.mark.parametrize("case", ["epps_pulley_a", "epps_pulley_b"])
def test_the_statistic_of_one_direction(case):
    x, knots = SIGREG[f"{case}/x"], SIGREG[f"{case}/knots"]
    directions = torch.eye(x.shape[1], dtype=torch.float64)
    options = {"num_knots": len(knots), "bound": float(knots[-1])}
    for column, expected in enumerate(SIGREG[f"{case}/statistic"]):
        close(sigreg(leaf(x), directions=directions[:, column : column + 1], **options), expected)
    rows = leaf(x)
    (sigreg(rows, directions=directions, **options) * x.shape[1]).backward()
    close(rows.grad, SIGREG[f"{case}/grad.x_of_sum"], grad=1e-4)


@pytest.mark.parametrize("case", ["sliced_a", "sliced_views"])
def test_the_statistic_of_directions_and_views(case):
    x = leaf(SIGREG[f"{case}/x"])
    for step, (directions, expected) in enumerate(
        zip(SIGREG[f"{case}/directions"], SIGREG[f"{case}/value"], strict=True)
    ):
        x.grad = None
        value = sigreg(x, directions=torch.tensor(directions))
        close(value, expected)
        if step == 0:
            value.backward()
            close(x.grad, SIGREG[f"{case}/step0.grad.x"], grad=1e-4)


@pytest.mark.parametrize("case", ["lejepa_a", "lejepa_b"])
def test_lejepa(case):
    z, share = leaf(SIGREG[f"{case}/projections"]), float(SIGREG[f"{case}/lamb"])
    gauss = sigreg(z, directions=torch.tensor(SIGREG[f"{case}/directions"]))
    close(gauss, SIGREG[f"{case}/sigreg"])
    ((1 - share) * (z - z.mean(0)).square().mean() + share * gauss).backward()
    close(z.grad, SIGREG[f"{case}/grad.projections"], grad=1e-4)


def test_levels_of_sigreg():
    x = torch.randn(20, 200, 64, generator=torch.Generator().manual_seed(0))
    directions = torch.nn.functional.normalize(torch.randn(64, 256, generator=torch.Generator().manual_seed(1)), dim=0)
    assert sigreg(x, directions=directions).item() == pytest.approx(1.05, abs=0.1)
    assert sigreg(torch.zeros(50, 64), directions=directions).item() == pytest.approx(0.402 * 50, rel=1e-2)
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: sigreg(z, directions=directions[:3, :5].double(), num_knots=4), x)


def test_directions_are_drawn_by_step_and_spread_evenly():
    directions = random_directions(5, 20_000, seed=3, step=7)
    assert torch.equal(directions, random_directions(5, 20_000, seed=3, step=7))
    assert directions.shape == (5, 20_000)
    torch.testing.assert_close(directions.norm(dim=0), torch.ones(20_000))
    torch.testing.assert_close(directions @ directions.T / 20_000, torch.eye(5) / 5, rtol=0, atol=6e-3)
    assert directions.mean(1).abs().max() < 0.01
    for seed, step in ((3, 8), (4, 7)):
        assert (directions * random_directions(5, 20_000, seed=seed, step=step)).sum(0).mean().abs() < 0.01


EXTRACTED = sorted({key.split("/")[0] for key in OBOW if key.startswith("extract")})


@pytest.mark.parametrize("case", EXTRACTED)
def test_bags_of_words(case):
    file = {key.removeprefix(f"{case}/"): OBOW[key] for key in OBOW if key.startswith(f"{case}/")}
    words, mean = torch.tensor(file["embedding_init"], dtype=torch.float64), 0.5
    inverse = float(file["cfg.inv_delta"])
    pool = "mean" if str(file.get("cfg.bow_pool", "")) == "avg" else "max"
    for step, features in enumerate(file["features"]):
        found = distances(torch.tensor(features, dtype=torch.float64)[..., 1:-1, 1:-1], words)
        mean = 0.99 * mean + 0.01 * found.amin(1).mean().item()
        assert mean == pytest.approx(float(file["min_distance_mean_after"][step]), rel=1e-5)
        assigned = codes(found, inverse_delta=None if inverse < 0 else inverse, mean_distance=mean)
        close(assigned, file["codes"][step])
        close(bag(assigned, pool=pool), file["bow"][step])
        words = torch.tensor(file["embedding_after"][step], dtype=torch.float64)


@pytest.mark.parametrize("case", ["predict_a", "predict_b"])
def test_the_loss_of_a_bag(case):
    kinds = [key for key in OBOW if key.startswith(f"{case}/loss")]
    for kind in range(len(kinds)):
        levels = [key for key in OBOW if key.startswith(f"{case}/logits{kind}_")]
        values = []
        for level in range(len(levels)):
            logits = leaf(OBOW[f"{case}/logits{kind}_{level}"])
            target = torch.tensor(OBOW[f"{case}/target{level}"], dtype=torch.float64)
            values.append(bag_loss(logits, target.repeat_interleave(len(logits) // len(target), 0)))
        close(torch.stack(values).mean(), OBOW[f"{case}/loss{kind}"])


MASKED = sorted({key.split("/")[0] for key in SIMLAP if key.startswith("multipos")})


@pytest.mark.parametrize("reduction", ["rows", "pairs"])
@pytest.mark.parametrize("case", MASKED)
def test_masked_contrast(case, reduction):
    logits = leaf(SIMLAP[f"{case}/logits"])
    masks = (torch.tensor(SIMLAP[f"{case}/{name}"]) for name in ("positives", "excluded"))
    value = masked_contrast(logits, *masks, reduction=reduction)
    close(value, SIMLAP[f"{case}/loss_{reduction}"])
    value.backward()
    close(logits.grad, SIMLAP[f"{case}/grad_{reduction}.logits"], grad=1e-4)


@pytest.mark.parametrize(("form", "reduction"), [("plain", "rows"), ("renormalised", "pairs")])
@pytest.mark.parametrize("case", ["pure_f64", "pure_open_gate_f64"])
def test_class_pairs(case, form, reduction):
    leaves = {name: leaf(SIMLAP[f"{case}/{name}_f64"]) for name in ("z1", "z2", "gate")}
    labels, partner = (torch.tensor(SIMLAP[f"{case}/{name}"]) for name in ("labels", "label_partner"))
    value = class_pair_contrast(
        **leaves,
        anchor=labels,
        partner=partner,
        labels=labels,
        scale=10.0,
        renormalise=form == "renormalised",
        reduction=reduction,
    )
    close(value, SIMLAP[f"{case}/loss_{form}_{reduction}_f64"], value=2e-6)  # FastSSL divides by |P| + 1e-6
    value.backward()
    for name, x in leaves.items():
        close(x.grad, SIMLAP[f"{case}/{form}.grad.{name}_f64"], grad=3e-6)


def test_rows_without_negatives_and_without_labels_take_no_part():
    z, gate = torch.randn(4, 3, requires_grad=True), torch.ones(4, 3)
    labels = torch.tensor([0, 0, 1, -1])
    options = {"scale": 10.0, "renormalise": True, "reduction": "pairs"}
    value = class_pair_contrast(z, z, gate, anchor=labels, partner=labels.flip(0), labels=labels, **options)
    value.backward()
    assert z.grad.isfinite().all()
    nothing = torch.full((4,), -1)
    assert class_pair_contrast(z, z, gate, anchor=nothing, partner=nothing, labels=labels, **options) == 0


def two_processes() -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    x = leaf(TWO["sigreg/x"][rank()])
    directions = torch.eye(x.shape[1], dtype=torch.float64)
    value = sigreg(x, directions=directions, all_reduce=all_reduce)
    value.backward()
    found |= {"sigreg": value.detach(), "sigreg.grad": x.grad}
    temperature = float(TWO["mocov3/temperature"])
    for name, exchange in (("gather", GATHER), ("ring", RING)):
        q, k = leaf(TWO["mocov3/q"][rank()]), leaf(TWO["mocov3/k"][rank()])
        value = 2 * temperature * key_contrast(q, k, temperature=temperature, exchange=exchange)
        value.backward()
        found |= {f"mocov3.{name}": value.detach(), f"mocov3.{name}.grad": q.grad}
    for name, exchange in (("gather", GATHER), ("ring", RING)):
        x = leaf(TWO["mocov3/q"][rank()])
        value = koleo(x, exchange=exchange, chunk_size=3)
        value.backward()
        found |= {f"koleo.{name}": value.detach(), f"koleo.{name}.grad": x.grad}
    rows = torch.tensor(TWO["mocov3/q"]).flatten(0, 1)
    found["sinkhorn"] = sinkhorn(rows if rank() == 0 else rows[:0], epsilon=0.5, num_iters=3, all_reduce=all_reduce)
    return found


def test_two_processes(tmp_path):
    records = in_processes(two_processes, 2, tmp_path)
    for index, record in enumerate(records):
        close(record["sigreg"], TWO["sigreg/statistic.rank0"].mean())
        close(record["sigreg.grad"], TWO[f"sigreg/grad.x_of_mean.rank{index}"], grad=1e-4)
        for name in ("gather", "ring"):
            close(record[f"mocov3.{name}"], (TWO["mocov3/loss.rank0"] + TWO["mocov3/loss.rank1"]) / 2)
            close(record[f"mocov3.{name}.grad"], TWO[f"mocov3/grad.q.rank{index}"], grad=1e-4)
    whole = leaf(TWO["mocov3/q"]).flatten(0, 1)
    (grad,) = torch.autograd.grad(naive_koleo(whole), whole)
    for index, record in enumerate(records):
        for name in ("gather", "ring"):
            close(record[f"koleo.{name}"], naive_koleo(whole).detach(), value=1e-9)
            close(record[f"koleo.{name}.grad"] / 2, grad.chunk(2)[index], grad=1e-9)
    close(records[0]["sinkhorn"], sinkhorn(whole.detach().float(), epsilon=0.5, num_iters=3))
    assert records[1]["sinkhorn"].shape == (0, whole.shape[1])


def naive_koleo(x: Tensor) -> Tensor:
    x = torch.nn.functional.normalize(x, dim=1)
    distance = (x[:, None] - x).square().sum(2).add(1e-16).sqrt() + 9 * torch.eye(len(x), dtype=x.dtype)
    return -distance.amin(1).log().mean()


def test_koleo() -> None:
    x = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    expected = naive_koleo(x)
    (grad,) = torch.autograd.grad(expected, x)
    for chunk in (None, 1, 4, 100):
        value = koleo(3 * x, chunk_size=chunk)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(torch.autograd.grad(value, x)[0], grad)
    same = torch.ones(5, 4, requires_grad=True)
    value = koleo(same)
    value.backward()
    assert value.item() == pytest.approx(8 * np.log(10), rel=1e-4)
    assert same.grad.isfinite().all()
    with pytest.raises(ValueError, match="undefined for 1 sample"):
        koleo(x[:1])


def test_a_queue_stands_beside_the_own_key_alone():
    q, k, queue = (torch.randn(num, 8, dtype=torch.float64, requires_grad=True) for num in (6, 6, 10))
    queue.data[3] = 0  # a place that nothing has filled
    temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    unit = [torch.nn.functional.normalize(x, dim=1) for x in (q, k, queue)]
    logits = torch.cat([(unit[0] * unit[1]).sum(1, keepdim=True), unit[0] @ unit[2].T], 1) / temperature
    expected = torch.nn.functional.cross_entropy(logits, torch.zeros(6, dtype=torch.long))
    grads = torch.autograd.grad(expected, [q, temperature])
    for chunk in (None, 4):
        rows = queue.detach().clone()
        value = key_contrast(q, k, temperature=temperature, queue=rows, chunk_size=chunk)
        rows.copy_(rows.roll(1, 0))  # the next batch comes before backward
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(torch.autograd.grad(2 * value, [q, temperature]), tuple(2 * grad for grad in grads))
        number = key_contrast(q, k, temperature=0.2, queue=queue, chunk_size=chunk)
        torch.testing.assert_close(torch.autograd.grad(number, q)[0], grads[0])
        with torch.no_grad():
            torch.testing.assert_close(key_contrast(q, k, temperature=0.2, queue=queue, chunk_size=chunk), expected)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda x: sigreg(x, directions=torch.ones(3, 2)), r"directions \(D, M\)"),
        (lambda x: sigreg(x, directions=torch.ones(4, 2), num_knots=1), "at least 2 knots"),
        (lambda x: self_distillation([x], [x], center=x[0], student_temperature=1, teacher_temperature=1), "no pairs"),
        (lambda x: key_contrast(x, x, temperature=1.0, queue=torch.ones(3, 5)), r"queue is \(K, D\)"),
        (lambda x: distances(x, x), r"features are \(B, C, H, W\)"),
        (lambda x: bag(x.view(2, 4, 1, 1), pool="min"), "set it to max or mean"),
        (lambda x: bag_loss(x, x[:1]), r"logits and target are \(B, K\)"),
        (lambda x: masked_contrast(x, x > 0, x > 0, reduction="sum"), "set it to rows or pairs"),
    ],
)
def test_what_does_not_fit_is_refused(call, told):
    with pytest.raises(ValueError, match=told):
        call(torch.ones(2, 4))

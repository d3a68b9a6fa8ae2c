"""Pairs of classes: gate, projector and loss against the authors' numbers, partners, and what is refused."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from repr.fit import main
from repr.losses.class_pairs import class_pair_contrast, draw_partners
from repr.models.backbone import backbone
from repr.models.gate import Gate
from repr.models.heads import mlp
from repr.objectives.class_pairs import ClassPairs
from tests.golden import golden
from tests.losses.test_golden_teachers import close, leaf
from tests.objectives.conftest import make_batch

SIMLAP = golden("simlap")


def filled(module: nn.Module, case: str, prefix: str) -> dict[str, nn.Parameter]:
    """Golden weights into a module; its parameters by their golden names."""
    ours = {name.replace("classes", "label_embedding"): p for name, p in module.named_parameters()}
    for name, parameter in ours.items():
        parameter.data = torch.tensor(SIMLAP[f"{case}/init.{prefix}{name}"], dtype=torch.float64)
    return {f"{prefix}{name}": parameter for name, parameter in ours.items()}


@pytest.mark.parametrize("kind", ["fused", "product"])
def test_the_gate(kind: str) -> None:
    case = f"gate_{kind}"
    classes, width = SIMLAP[f"{case}/init.label_embedding.weight"].shape
    hidden, dim = (len(SIMLAP[f"{case}/init.mlp.{layer}.bias"]) for layer in (2, 5))
    gate = Gate(classes, dim, kind=kind, class_dim=width, hidden_dim=hidden).double()
    weights = filled(gate, case, "")
    pair = [torch.tensor(SIMLAP[f"{case}/{name}"]) for name in ("y1", "y2")]
    opened = gate(*pair)
    close(opened, SIMLAP[f"{case}/gate"])
    (opened * torch.tensor(SIMLAP[f"{case}/cotangent"])).sum().backward()
    for name, parameter in weights.items():
        close(parameter.grad, SIMLAP[f"{case}/grad.{name}"], grad=1e-4)
    close(gate(*pair[::-1]), opened.detach().numpy())


@pytest.mark.parametrize(
    ("case", "reduction"), [("fastssl_form", "rows"), ("vitookit_form_two_views", "pairs")]
)  # fmt: skip
def test_projector_gate_and_loss(case: str, reduction: str) -> None:
    head = nn.Sequential(*mlp([6, 9, 5], last_bias=False), nn.LayerNorm(5)).double()
    gate = Gate(4, 5, class_dim=5, hidden_dim=6).double()
    weights = filled(head, case, "projector.") | filled(gate, case, "filter.")
    h1, h2 = (leaf(SIMLAP[f"{case}/{name}"]) for name in ("h1", "h2"))
    labels = torch.tensor(SIMLAP[f"{case}/labels"])
    partner = labels[torch.tensor(SIMLAP[f"{case}/perm"])]
    opened = gate(labels, partner)
    close(opened, SIMLAP[f"{case}/gate"])
    classes = {"anchor": labels, "partner": partner, "labels": labels}
    views = head(h1), head(h2)
    for name, z in zip(("z1", "z2"), views, strict=True):
        close(z, SIMLAP[f"{case}/{name}"])
    renormalised = class_pair_contrast(*views, opened, **classes, scale=10.0, renormalise=True, reduction="pairs")
    close(renormalised, SIMLAP[f"{case}/loss_renormalised_pairs"])
    value = class_pair_contrast(*views, opened, **classes, scale=10.0, renormalise=False, reduction=reduction)
    close(value, SIMLAP[f"{case}/loss"])
    value.backward()
    for name, x in {"h1": h1.grad, "h2": h2.grad, **{name: p.grad for name, p in weights.items()}}.items():
        close(x, SIMLAP[f"{case}/grad.{name}"], grad=1e-4)


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("reduction", ["rows", "pairs"])
def test_chunks_change_nothing(renormalise: bool, reduction: str) -> None:
    generator = torch.Generator().manual_seed(0)
    z1, z2, gate = (torch.rand(7, 5, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3))
    labels = torch.tensor([0, 1, 2, 0, 1, 2, -1])
    options = {"anchor": labels, "partner": labels.roll(2), "labels": labels, "scale": 10.0}
    values = [
        class_pair_contrast(
            z1, z2, gate, **options, renormalise=renormalise, reduction=reduction, chunk_size=chunk
        )
        for chunk in (None, 3)
    ]  # fmt: skip
    torch.testing.assert_close(values[1], values[0])
    for ours, plain in zip(*(torch.autograd.grad(value, (z1, z2, gate)) for value in values), strict=True):
        torch.testing.assert_close(ours, plain)


def partners(labels: Tensor, pairs: str, seed: Tensor | None = None) -> Tensor:
    seed = torch.arange(len(labels)) if seed is None else seed
    return draw_partners(labels, seed, pairs=pairs, num_classes=5)


def test_partners_are_drawn_by_the_seeds_of_the_samples() -> None:
    labels = torch.arange(3000) % 5
    arbitrary, distinct = partners(labels, "arbitrary"), partners(labels, "distinct")
    assert torch.equal(arbitrary.sort().values, labels.sort().values)  # the classes of the batch, in another order
    assert (arbitrary == labels).float().mean() == pytest.approx(0.2, abs=0.03)
    assert not (distinct == labels).any()
    assert ((distinct - labels) % 5).bincount().tolist() == pytest.approx([0, 750, 750, 750, 750], abs=90)
    assert torch.equal(partners(labels, "identical"), labels)
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(0))
    for pairs, drawn in (("arbitrary", arbitrary), ("distinct", distinct)):  # however processes share the samples
        assert torch.equal(partners(labels[order], pairs, order), drawn[order])
    unlabelled = torch.where(labels == 3, -1, labels)
    for pairs in ("arbitrary", "distinct", "identical"):
        drawn = partners(unlabelled, pairs)
        assert torch.equal(drawn < 0, unlabelled < 0)


def flow_of(**options: object) -> ClassPairs:
    torch.manual_seed(0)
    return ClassPairs(backbone("test_resnet"), **{"num_classes": 3, "hidden_dim": 16, "dim": 8, **options})


@pytest.mark.parametrize("gate", ["fused", "product", "open"])
def test_pairs_and_gates_of_the_flow(gate: str) -> None:
    values, flow = set(), flow_of(gate=gate)
    for flow.pairs in ("arbitrary", "identical", "distinct"):
        output = flow.step(make_batch(9))
        values.add(output.terms["pairs"].item())
        assert output.logs["positives"] == 3
        assert ("activation" in output.logs) == (gate != "open")
        assert 1.38 < output.logs["pairs.chance"] < 1.95  # three or six negatives
    assert len(values) == 3
    shapes = [tuple(x.shape) for x in flow.eval().pictures({}, show=torch.Tensor.byte).values()]
    assert shapes == ([] if gate == "open" else [(3, 159, 159)])


def test_samples_without_label_take_no_part() -> None:
    flow, batch, some = flow_of(gate="open", reduction="pairs").eval(), make_batch(12), make_batch(12)
    batch["label"][8:] = -1
    some["views"] = [view[:8] for view in some["views"]]
    some |= {name: some[name][:8] for name in ("seed", "label")}
    torch.testing.assert_close(flow.step(batch).terms["pairs"], flow.step(some).terms["pairs"])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"num_classes": 2}, "num_classes=2: samples of two classes .* set it to 3 or more"),
        ({"gate": "closed"}, "gate=closed; set it to fused, product or open"),
        ({"pairs": "same"}, "pairs=same; set it to arbitrary, distinct or identical"),
        ({"reduction": "sum"}, "reduction=sum; set it to rows or pairs"),
        ({"temperature": 0}, "temperature=0; set it above 0"),
    ],
)
def test_options_that_do_not_exist_are_refused(options: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        flow_of(**options)


def test_a_batch_without_labels_and_data_with_few_classes_are_refused(tmp_path: Path) -> None:
    batch = make_batch(8)
    del batch["label"]
    with pytest.raises(ValueError, match="needs two views of a sample and its label"):
        flow_of().step(batch)
    for row in range(16):
        (tmp_path / "data" / "ab"[row % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (row, 0, 0)).save(tmp_path / "data" / "ab"[row % 2] / f"{row}.png")
    run = [
        "objective=class_pairs", "smoke=true", "backbone.name=test_resnet", "data=folder", "eval.headline=[]",
        f"data.train.root={tmp_path / 'data'}", f"run_folder={tmp_path / 'run'}", "callbacks.progress=null",
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="needs 3 classes or more"):
        main([*run, "data.train.labels=true"])

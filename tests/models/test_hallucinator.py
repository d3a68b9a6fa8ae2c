"""What is hallucinated, against stored numbers of our form and the law of its cosine; and in the flows."""

import pytest
import torch

from repr.losses.contrastive import clip, cross_nt_xent
from repr.losses.momentum import key_contrast
from repr.models.backbone import backbone
from repr.models.hallucinator import Hallucinator, extrapolated
from repr.objectives.joint_embedding import JointEmbedding
from repr.objectives.momentum import Momentum
from tests.golden import golden
from tests.losses.test_golden_teachers import close, leaf
from tests.objectives.conftest import make_batch

OURS = golden("hallucinator_ours")


@pytest.mark.parametrize("case", ["infonce_a", "infonce_b"])
def test_stored_numbers(case: str) -> None:
    file = {key.removeprefix(f"{case}/"): OURS[key] for key in OURS if key.startswith(f"{case}/")}
    query, key, share = leaf(file["q_f64"]), leaf(file["k_f64"]), torch.tensor(file["lam_f64"])
    hallucinator = Hallucinator(query.shape[1], 1.0).double()
    weights = dict(zip(("W1", "b1", "W2", "b2"), hallucinator.parameters(), strict=True))
    for name, parameter in weights.items():
        parameter.data = torch.tensor(file[f"{name}_f64"])
    temperature, queue = float(file["temperature"]), torch.tensor(file["queue_f64"])
    with_queue = len(queue) > 0
    other = key.detach() if with_queue else key  # MoCo's form, or SimCLR's
    close(extrapolated(query, other, share), file["extrapolated_f64"], value=1e-9)
    beyond = hallucinator(query, other, share)
    close(beyond, file["hallucinated_f64"], value=1e-9)

    def loss(anchors: torch.Tensor) -> torch.Tensor:
        if with_queue:
            return key_contrast(anchors, other, temperature=temperature, queue=queue)
        return cross_nt_xent(anchors, other, temperature=temperature)

    base, added = loss(query), loss(beyond)
    close(base, file["contrast_f64"], value=1e-7)
    close(added, file["hallucination_f64"], value=1e-7)
    (base + added).backward()
    close(query.grad, file["grad.q_f64"], grad=1e-6)
    for name, parameter in weights.items():
        close(parameter.grad, file[f"grad.{name}_f64"], grad=1e-6)
    if with_queue:
        assert key.grad is None
    else:
        close(key.grad, file["grad.k_f64"], grad=1e-6)


def test_the_cosine_falls_by_law() -> None:
    query, key = (torch.randn(50, 8, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (0, 1))
    share = torch.linspace(0, 2, 50, dtype=torch.float64)[:, None]
    cosine = torch.cosine_similarity(query, key)
    beyond = torch.cosine_similarity(extrapolated(query, key, share), key)
    s = share[:, 0]
    expected = ((1 + s) * cosine - s) / ((1 + s).square() + s.square() - 2 * s * (1 + s) * cosine).sqrt()
    torch.testing.assert_close(beyond, expected)
    assert (beyond <= cosine + 1e-12).all()


def test_one_half_of_clip() -> None:
    x, y = torch.randn(2, 12, 5, dtype=torch.float64)
    halves = cross_nt_xent(x, y, temperature=0.2) + cross_nt_xent(y, x, temperature=0.2)
    torch.testing.assert_close(halves / 2, clip(x, y, logit_scale=5.0))


@pytest.mark.parametrize(
    ("kind", "base", "options"),
    [
        (JointEmbedding, "contrast", {}),
        (Momentum, "regression", {}),
        (Momentum, "contrast", {}),
        (Momentum, "contrast", {"queue_length": 16, "predictor_layers": 0, "one_way": True}),
    ],
)
def test_in_the_flows(kind: type, base: str, options: dict) -> None:
    weights = {base: 1, "hallucination": 1}
    flow = kind(backbone("test_resnet"), hidden_dim=16, dim=8, weights=weights, **options)
    output = flow.step(make_batch(8))
    assert output.terms.keys() == weights.keys() == flow.chance(8).keys() & weights.keys()
    assert output.logs["cos_extrapolated"] < output.logs["cos_pair"]
    identity = torch.nn.Linear(8, 8, bias=False)
    torch.nn.init.eye_(identity.weight)
    flow.hallucinator.bound, flow.hallucinator.map = 0.0, identity
    if kind is Momentum:  # the contrast of JointEmbedding has other candidates
        same = flow.step(make_batch(8)).terms
        torch.testing.assert_close(same["hallucination"], same[base])


def test_a_share_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="extrapolation=-1; set it to 0 or more"):
        Hallucinator(4, -1)

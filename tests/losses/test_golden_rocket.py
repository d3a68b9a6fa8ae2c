"""CLIP with views and texts of several kinds (Fini et al., 2023, arXiv 2305.08675), composed of our losses."""

import pytest
import torch
from torch import Tensor

from repr.losses.clustering import sinkhorn, swapped_pairs, swapped_prediction
from repr.losses.contrastive import clip
from repr.losses.decorrelation import cross_correlation
from repr.losses.features import normalise
from repr.losses.momentum import regression
from tests.golden import golden

DATA = golden("cliprocket_losses")
CASES = sorted({key.split("/")[0] for key in DATA})


def rocket(x: dict[str, Tensor], num: int, smoothing: float) -> Tensor:
    """CLIP of the plain views, and of every distorted view with every distorted text, with smoothed labels."""
    plain = clip(x["z_image_global"], x["z_text_global"], logit_scale=x["log_logit_scale"].exp())
    scale = x["log_h_logit_scale"].exp()
    local = [
        clip(x[f"h_image_local{a}"], x[f"h_text_local{b}"], logit_scale=scale, label_smoothing=smoothing)
        for a in range(num)
        for b in range(num)
    ]
    return (plain + num * torch.stack(local).mean()) / (1 + num) if num else plain


def pairs(num: int) -> list[tuple[str, str]]:
    """The plain view and text, and every distorted view with every distorted text."""
    return [("", "")] + [(f"_local{a}", f"_local{b}") for a in range(num) for b in range(num)]


def siamese(x: dict[str, Tensor], num: int) -> Tensor:
    """Predictions of a modality against projections of the other, which get no gradient; or a teacher's (BYOLIP)."""
    of = "_momentum" if "v_image_momentum" in x else ""
    terms = [regression(x[f"p_image{a}"], x[f"v_text{b}{of}"].detach()) for a, b in pairs(num)]
    terms += [regression(x[f"p_text{b}"], x[f"v_image{a}{of}"].detach()) for a, b in pairs(num)]
    return torch.stack(terms).mean()


def correlations(x: dict[str, Tensor], num: int, weight: float) -> Tensor:
    """Projections whose correlations come near the identity matrix (BarLIP)."""
    options = {"off_diagonal_weight": weight, "standardise": False}
    return torch.stack([cross_correlation(x[f"v_image{a}"], x[f"v_text{b}"], **options) for a, b in pairs(num)]).mean()


def assigned_to_pairs(x: dict[str, Tensor], case: dict) -> Tensor:
    """Which captions go with a picture predicts which do with its other view, and the reverse (SwALIP)."""
    images, texts = ([x[f"h_{kind}_local{a}"] for a in (0, 1)] for kind in ("image", "text"))
    options = {"epsilon": float(case["cfg.target_epsilon"]), "num_iters": int(case["cfg.sk_iters"])}
    return swapped_pairs(images, texts, logit_scale=x["log_h_logit_scale"].exp(), **options)


def assigned_to_prototypes(x: dict[str, Tensor], case: dict) -> Tensor:
    """Prototypes that both modalities share (SwALIP's first form), with a teacher's assignments where it has one."""
    of = "_momentum" if case["cfg.momentum"] else ""
    prototypes = x["prototypes"]
    scores = [normalise(x[f"h_{kind}"]) @ prototypes.T for kind in ("image", "text")]
    teachers = [normalise(x[f"h_{kind}{of}"]) @ prototypes.T for kind in ("image", "text")]
    options = {"epsilon": float(case["cfg.target_epsilon"]), "num_iters": int(case["cfg.sk_iters"])}
    found = [sinkhorn(s, **options) for s in teachers]
    for assignments, kind in zip(found, ("image", "text"), strict=True):
        torch.testing.assert_close(assignments, torch.as_tensor(case[f"aux.q_{kind}"]), rtol=1e-4, atol=1e-6)
    temperature = (-x["log_swalip_logit_scale"]).exp()
    return swapped_prediction(scores, found, assign_views=(0, 1), temperature=temperature)


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case: str) -> None:
    of_case = {key.split("/")[1]: value for key, value in DATA.items() if key.startswith(f"{case}/")}
    x = {
        key.removeprefix("in."): torch.as_tensor(value).clone().requires_grad_()
        for key, value in of_case.items()
        if key.startswith("in.")
    }
    if "cfg.num_augs" in of_case:
        num = int(of_case["cfg.num_augs"])
        loss = rocket(x, num, float(of_case["cfg.label_smoothing"])) * (1 + (str(of_case["cfg.avg_or_sum"]) == "sum"))
    else:
        loss = clip(x["z_image"], x["z_text"], logit_scale=x["log_logit_scale"].exp())
    term, weight = torch.zeros(()), 1.0
    if "out.siamlip_loss" in of_case:
        term = siamese(x, num)
    elif "out.barlip_loss" in of_case:
        term = float(of_case["cfg.scale_loss"]) * correlations(x, num, float(of_case["cfg.lamb"]))
    elif "out.swalip_loss" in of_case:
        term = (assigned_to_prototypes if "prototypes" in x else assigned_to_pairs)(x, of_case)
        weight = float(of_case["cfg.swalip_weight"])
    for key in ("out.siamlip_loss", "out.barlip_loss", "out.swalip_loss"):
        if key in of_case:
            torch.testing.assert_close(term.item(), float(of_case[key]), rtol=1e-5, atol=1e-6)
    loss = loss + weight * term
    torch.testing.assert_close(loss.item(), float(of_case["out.loss"]), rtol=1e-5, atol=1e-6)
    loss.backward()
    names = [key.removeprefix("grad.") for key in of_case if key.startswith("grad.")]
    assert names
    for name in names:
        torch.testing.assert_close(x[name].grad, torch.as_tensor(of_case[f"grad.{name}"]), rtol=1e-4, atol=1e-6)

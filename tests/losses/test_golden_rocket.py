"""CLIP with views and texts of several kinds (Fini et al., 2023, arXiv 2305.08675), composed of our losses.

Left out: BarLIP, whose correlation has no standardisation (the last BatchNorm stands for it, with gains of its own),
and SwALIP, whose prototypes are the other modality.
"""

import pytest
import torch
from torch import Tensor

from repr.losses.contrastive import clip
from repr.losses.momentum import regression
from tests.golden import golden

DATA = golden("cliprocket_losses")
CASES = sorted({key.split("/")[0] for key in DATA if key.startswith(("cl2l", "siamlip", "byolip"))})


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


def siamese(x: dict[str, Tensor], num: int) -> Tensor:
    """Predictions of a modality against projections of the other, which get no gradient; or a teacher's (BYOLIP)."""
    of = "_momentum" if "v_image_momentum" in x else ""
    pairs = [("", "")] + [(f"_local{a}", f"_local{b}") for a in range(num) for b in range(num)]
    terms = [regression(x[f"p_image{a}"], x[f"v_text{b}{of}"].detach()) for a, b in pairs]
    terms += [regression(x[f"p_text{b}"], x[f"v_image{a}{of}"].detach()) for a, b in pairs]
    return torch.stack(terms).mean()


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case: str) -> None:
    of_case = {key.split("/")[1]: value for key, value in DATA.items() if key.startswith(f"{case}/")}
    x = {
        key.removeprefix("in."): torch.as_tensor(value).clone().requires_grad_()
        for key, value in of_case.items()
        if key.startswith("in.")
    }
    num = int(of_case["cfg.num_augs"])
    loss = rocket(x, num, float(of_case["cfg.label_smoothing"])) * (1 + (str(of_case["cfg.avg_or_sum"]) == "sum"))
    if "out.siamlip_loss" in of_case:
        term = siamese(x, num)
        torch.testing.assert_close(term.item(), float(of_case["out.siamlip_loss"]), rtol=1e-5, atol=1e-6)
        loss = loss + term
    torch.testing.assert_close(loss.item(), float(of_case["out.loss"]), rtol=1e-5, atol=1e-6)
    loss.backward()
    for key, value in of_case.items():
        if key.startswith("grad.") and (grad := x[key.removeprefix("grad.")].grad) is not None:
            torch.testing.assert_close(grad, torch.as_tensor(value), rtol=1e-4, atol=1e-6)

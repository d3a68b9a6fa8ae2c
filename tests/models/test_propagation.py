"""The pixel propagation module: the authors' numbers, its formula, precision."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repr.models.propagation import Propagation
from tests.golden import golden

PPM = golden("pixpro_ppm")
PLACES = {"linear1": 0, "bn1": 1, "linear2": 3}  # of the authors' names in our stack of layers


def load_values(stack: nn.Sequential, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put the authors' transform into ours; gives our tensor by their name."""
    if any(name.startswith("linear1") for name in weights):
        stack[0] = nn.Linear(*stack[0].weight.T.shape)  # theirs has a bias before BatchNorm, which takes it out again
    ours = {}
    state = dict(stack.named_parameters()) | dict(stack.named_buffers())
    for name, value in weights.items():
        part, _, leaf = name.rpartition(".")
        tensor = state[f"{PLACES.get(part, 0)}.{leaf}"]
        tensor.data.copy_(value.view_as(tensor))
        ours[name] = tensor
    return ours


@pytest.mark.parametrize("case", sorted({key.split("/")[0] for key in PPM}))
def test_output_and_gradients_equal_the_authors(case: str) -> None:
    data = {key.split("/")[1]: torch.as_tensor(value) for key, value in PPM.items() if key.startswith(f"{case}/")}
    assert not data["clamp"]
    x = data["x"].flatten(2).requires_grad_()
    module = Propagation(x.shape[1], gamma=data["gamma"].item(), num_layers=int(data["transform_layers"]))
    weights = {key.removeprefix("weight."): value for key, value in data.items() if key.startswith("weight.")}
    ours = load_values(module.values, weights) if weights else {}
    y = module.train(bool(data["train"]))(x)
    torch.testing.assert_close(y, data["y"].flatten(2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(F.normalize(y, dim=1), data["y_normalized"].flatten(2), rtol=1e-5, atol=1e-6)
    (y * data["cotangent"].flatten(2)).sum().backward()
    torch.testing.assert_close(x.grad, data["grad_x"].flatten(2), rtol=1e-4, atol=1e-6)
    for name in (key.removeprefix("grad.") for key in data if key.startswith("grad.")):
        theirs = data[f"grad.{name}"].view_as(ours[name])
        torch.testing.assert_close(ours[name].grad, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 3.5])
def test_it_is_its_formula_in_any_number_of_images(gamma: float) -> None:
    module = Propagation(5, gamma=gamma, num_layers=1).double()
    x = torch.randn(11, 5, 6, dtype=torch.float64, requires_grad=True)
    expected = []
    for cells in x:
        f = F.normalize(cells, dim=0)
        v = F.normalize(module.values[0](cells.T), dim=1)  # (HW, C)
        weights = ((f.T @ f).clamp_min(0) + (1e-6 if gamma < 1 else 0)) ** gamma
        expected.append((weights @ v).T)
    ours = module(x)
    torch.testing.assert_close(ours, torch.stack(expected))
    grads = [torch.autograd.grad(y.square().sum(), [x, *module.parameters()]) for y in (ours, torch.stack(expected))]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_half_precision_and_dead_cells_stay_finite() -> None:
    module = Propagation(6, gamma=2.0, num_layers=2)
    x = torch.randn(4, 6, 9)
    x[:, :, 0] = 0
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.float32
    y.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("options", [{"gamma": 0.0, "num_layers": 1}, {"gamma": 2.0, "num_layers": -1}])
def test_bad_options(options: dict) -> None:
    with pytest.raises(ValueError, match="set gamma > 0 and num_layers >= 0"):
        Propagation(4, **options)

"""The PixPro flow: the authors' two steps, teacher, instance branch, backbones, and what it refuses."""

import pytest
import torch
from torch import Tensor, nn

from repr.batch import Batch
from repr.models.teacher import cosine_momentum
from repr.objectives.pixpro import PixPro
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
        momentum = cosine_momentum(k + step, start=base, total=total)
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

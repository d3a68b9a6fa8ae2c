"""What is frozen gets no gradient and stays in evaluation mode; everything else trains."""

import pytest
import timm
import torch
from torch import nn

from repr.models.freezing import freeze


class Flow(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.text = backbone, nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
        self.logit_scale = nn.Parameter(torch.ones(()))


def trained(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def test_a_vit_keeps_its_last_blocks_and_norm() -> None:
    small = {"img_size": 32, "embed_dim": 32, "num_heads": 2, "depth": 4}
    flow = Flow(timm.create_model("vit_tiny_patch16_224", num_classes=0, **small))
    freeze(flow, {"text": 0, "backbone": 2})
    blocks = {name.split(".")[2] for name in trained(flow) if "blocks" in name}
    others = {name for name in trained(flow) if "blocks" not in name}
    assert blocks == {"2", "3"}
    assert others == {"backbone.norm.weight", "backbone.norm.bias", "logit_scale"}
    assert not flow.text.training
    assert not flow.text[1].training
    assert [block.training for block in flow.backbone.blocks] == [False, False, True, True]


def test_the_batchnorm_of_a_frozen_resnet_keeps_its_statistics() -> None:
    flow = Flow(timm.create_model("test_resnet", num_classes=0))
    freeze(flow, {"backbone": 1})
    before = {name: buffer.clone() for name, buffer in flow.backbone.named_buffers()}
    flow.backbone(torch.randn(4, 3, 32, 32))
    changed = {name for name, buffer in flow.backbone.named_buffers() if not torch.equal(buffer, before[name])}
    assert changed
    assert all(name.startswith("layer4.") for name in changed)
    assert all(name.startswith("backbone.layer4.") for name in trained(flow) if name.startswith("backbone"))
    freeze(flow, {"backbone": 0})
    assert trained(flow) == {"text.0.weight", "text.0.bias", "logit_scale"}


@pytest.mark.parametrize(
    ("towers", "message"),
    [
        ({"txt": 0}, r"freeze\.txt: Flow has no such part; it has backbone, text"),
        ({"text": 2}, r"freeze\.text=2: Sequential tells no layers; set it to 0"),
        ({"backbone": 99}, r"freeze\.backbone=99: it has \d+ layers"),
    ],
)
def test_errors(towers: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        freeze(Flow(timm.create_model("test_resnet", num_classes=0)), towers)

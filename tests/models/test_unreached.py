"""Parameters of a backbone that a flow does not train."""

import warnings

import pytest
import torch

from repr.models.backbone import backbone, feature_map
from repr.models.unreached import freeze_unreached


@pytest.mark.parametrize(
    ("name", "frozen"), [("test_convnext", ["head.norm.weight", "head.norm.bias"]), ("test_resnet", [])]
)
def test_what_a_map_does_not_reach_is_frozen_and_told(name: str, frozen: list[str]) -> None:
    model = backbone(name)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        freeze_unreached(model, "PixPro", feature_map)
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == frozen
    assert [str(warning.message).partition(" of the")[0] for warning in told] == (
        [f"PixPro does not reach {', '.join(frozen)}"] if frozen else []
    )
    feature_map(model, torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_weights_behind_the_map_are_refused() -> None:
    with pytest.raises(ValueError, match=r"PixPro does not train pre_logits\.fc1\.weight"):
        freeze_unreached(backbone("vgg11"), "PixPro", feature_map)
    vit = backbone("vit_tiny_patch16_224", global_pool="map", fc_norm=False, depth=1)
    with pytest.raises(ValueError, match=r"MAE does not train attn_pool"):
        freeze_unreached(vit, "MAE", lambda model, images: model.forward_features(images))

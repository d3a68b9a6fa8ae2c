"""Making backbones, running them, and what they tell of themselves on the meta device."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from repr.models.backbone import backbone, encode_views, feature_map, pixel_convolutions, refused_sizes, width_of
from repr.models.unreached import freeze_unreached

VIT = {"name": "vit_tiny_patch16_224", "image_size": 64, "depth": 1, "embed_dim": 24, "num_heads": 2}


def test_a_vit_takes_views_of_several_sizes_and_its_positions_are_interpolated() -> None:
    model = backbone(**VIT, dynamic_img_size=True)
    large, small = torch.randn(2, 3, 64, 64), torch.randn(2, 3, 32, 32)
    features = encode_views(model, [large, large, small])
    assert features.shape == (6, 24)
    torch.testing.assert_close(features[:2], features[2:4])
    torch.testing.assert_close(features[4:], model(small))
    features.sum().backward()
    assert model.pos_embed.grad.abs().sum() > 0
    assert model.state_dict().keys() == backbone(**VIT).state_dict().keys()


def test_what_a_backbone_cannot_take_is_found() -> None:
    assert list(refused_sizes(backbone(**VIT), [32, 64])) == [32]
    assert list(refused_sizes(backbone(**VIT, dynamic_img_size=True), [24, 32, 64])) == [24]
    assert refused_sizes(backbone("test_resnet"), [16, 33]) == {}


@pytest.mark.parametrize(
    ("options", "shape"),
    [({"name": "test_resnet"}, (2, 96, 2, 2)), (VIT, (2, 24, 4, 4)), (VIT | {"reg_tokens": 2}, (2, 24, 4, 4))],
)
def test_the_feature_map_is_what_the_model_pools(options: dict, shape: tuple[int, ...]) -> None:
    model = backbone(**options).eval()
    images = torch.randn(2, 3, 64, 64)
    features = feature_map(model, images)
    assert features.shape == shape
    model.reset_classifier(0, "avg")  # from the class token, where there is one, to the mean of the map
    pooled = model.forward_features(images)
    pooled = pooled.mean((2, 3)) if pooled.ndim == 4 else pooled[:, model.num_prefix_tokens :].mean(1)
    torch.testing.assert_close(features.mean((2, 3)), pooled)
    top = torch.zeros_like(images)
    top[:, :, :16, :16] = images[:, :, :16, :16]
    change = (feature_map(model, top) - feature_map(model, torch.zeros_like(images))).abs().sum(1)
    assert (change.flatten(1).argmax(1) == 0).all()  # row-major, from the top left


def test_a_backbone_without_a_map_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Flatten gives no feature map; set backbone\.name"):
        feature_map(nn.Flatten(), torch.zeros(1, 3, 8, 8))


def test_views_of_unequal_batch_size_are_refused() -> None:
    with pytest.raises(ValueError, match="hold 2, 3 samples"):
        encode_views(nn.Flatten(), [torch.zeros(2, 3), torch.zeros(3, 3)])


@pytest.mark.parametrize(
    "name", ["mobilenetv3_small_050", "vgg11", "lcnet_050", "test_mambaout", "inception_next_atto", "test_resnet"]
)
def test_the_width_is_that_of_what_a_model_gives(name: str) -> None:
    model = backbone(name)
    modes = [module.training for module in model.modules()]
    assert width_of(model) == model.eval()(torch.zeros(1, 3, 64, 64)).shape[1]
    assert all(modes)


def test_the_width_of_a_module_of_ones_own_is_that_of_what_it_gives() -> None:
    model = nn.Sequential(nn.Conv2d(3, 7, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.num_features = 5
    assert width_of(model) == 7
    with pytest.raises(ValueError, match=r"gives \(1, 192, 14, 14\) for one picture|gives \(1, 197, 192\)"):
        width_of(backbone("vit_tiny_patch16_224", global_pool="", depth=1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "test_resnet", "in_chans": 1}, "backbone.in_chans=1: views have three channels"),
        ({"name": "test_vit", "in_chans": 4}, "backbone.in_chans=4: views have three channels"),
        ({"name": "test_resnet", "foo": 1}, "backbone.name=test_resnet cannot be made so: .*'foo'"),
    ],
)
def test_what_a_backbone_cannot_be_made_with_is_one_line(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        backbone(**options)


def test_a_model_whose_first_convolution_crashes_torch_in_the_layout_of_others_has_another() -> None:
    model = backbone("mobileone_s0")
    assert all(p.is_contiguous() for p in model.parameters())  # a crash would end the tests
    model(torch.randn(2, 3, 32, 32)).sum().backward()


class Cut(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.detach()


def test_a_model_that_is_changed_is_asked_anew() -> None:
    """What is known of a timm model is kept for others of the same structure."""
    model: Any = backbone("test_resnet")
    width, refused = width_of(model), refused_sizes(model, [8, 32])
    assert (width_of(backbone("test_resnet")), refused_sizes(backbone("test_resnet"), [8, 32])) == (width, refused)
    model.reset_classifier(0, "catavgmax")
    assert width_of(model) == 2 * width
    vit: Any = backbone(**VIT)
    assert list(refused_sizes(vit, [32, 64])) == [32]
    vit.set_input_size((32, 32))
    assert list(refused_sizes(vit, [32, 64])) == [64]
    vit.blocks[0] = type("Cut", (nn.Module,), {"forward": lambda _, tokens: tokens})()
    freeze_unreached(vit, "flow")
    assert all(parameter.requires_grad for parameter in vit.parameters())
    vit.blocks[0] = Cut()
    with pytest.warns(UserWarning, match="does not reach cls_token, pos_embed, patch_embed"):
        freeze_unreached(vit, "flow")


def test_a_convolution_that_sees_one_pixel_is_found() -> None:
    model = backbone("resnet50")
    assert pixel_convolutions(model, [16, 32]) == {16: "layer4.0.conv2"}
    assert pixel_convolutions(backbone("test_vit"), [16]) == {}

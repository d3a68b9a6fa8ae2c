"""Starting from files of other libraries: the backbone is found, its tensors are those of the file to the bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightly.models.modules as lightly
import open_clip
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from repr.models.backbone import backbone
from repr.objectives.image_text import ImageText
from repr.runs.initial_weights import LoadReport, load_weights

VIT = {"embed_dim": 48, "depth": 2, "num_heads": 3}
State = dict[str, Tensor]


class Flow(nn.Module):
    """As much of an objective as initial weights need."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        self.backbone = backbone(name, **options).eval()


def random_state(model: nn.Module, seed: int) -> State:
    """Tensors for a model, all its own."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + torch.rand(tensor.shape, generator=generator) / 50 if tensor.is_floating_point() else tensor + 7
        for name, tensor in model.state_dict().items()
    }


def below(prefix: str, state: State, **others: Tensor) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in (state | others).items()}


def load(flow: nn.Module, content: Any, path: Path) -> LoadReport:
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return load_weights(flow, str(path))


def equal(flow: nn.Module, state: State) -> bool:
    own = flow.backbone.state_dict()
    return all(torch.equal(own[name], tensor) for name, tensor in state.items())


RESNET = timm.create_model("test_resnet", num_classes=0)
TRANSFORMER = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, **VIT)
A, B = random_state(RESNET, 1), random_state(RESNET, 2)
C, D = random_state(TRANSFORMER, 1), random_state(TRANSFORMER, 2)
HEAD = {"fc.weight": torch.rand(1000, 192), "fc.bias": torch.rand(1000)}


@pytest.mark.parametrize(
    ("content", "prefix", "others", "unused"),
    [
        (A | HEAD, "", [], 2),  # torchvision, timm
        ({"state_dict": B, "state_dict_ema": A, "epoch": 3}, "state_dict_ema.", ["state_dict."], 0),  # timm's training
        ({"model": A | HEAD, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}}, "model.", [], 2),
        (  # MoCo v1 and v2
            {"state_dict": below("module.encoder_q.", A | HEAD) | below("module.encoder_k.", B | HEAD)},
            "state_dict.encoder_q.",
            ["state_dict.encoder_k."],
            2,
        ),
        (  # MoCo v3
            {"state_dict": below("module.base_encoder.", A) | below("module.momentum_encoder.", B)},
            "state_dict.base_encoder.",
            ["state_dict.momentum_encoder."],
            0,
        ),
        (  # solo-learn
            {
                "state_dict": below("backbone.", A)
                | below("momentum_backbone.", B)
                | {"projector.0.weight": torch.rand(3, 3), "classifier.weight": torch.rand(3, 3)},
                "hyper_parameters": {"method": "byol"},
            },
            "state_dict.",
            [],
            2 + len(B),
        ),
        (  # lightly's DINO
            {"state_dict": below("student_backbone.", B) | below("teacher_backbone.", A)},
            "state_dict.teacher_backbone.",
            ["state_dict.student_backbone."],
            0,
        ),
        ({"state_dict": below("_orig_mod.module.encoder.net.", A)}, "state_dict.encoder.net.", [], 0),
    ],
)
def test_the_backbone_is_found_below_its_prefix(
    content: Any, prefix: str, others: list[str], unused: int, tmp_path: Path
) -> None:
    flow = Flow("test_resnet")
    report = load(flow, content, tmp_path / "a.pth")
    assert equal(flow, A)
    assert (report.prefix, report.others) == (prefix, others)
    assert (report.missing, report.resized) == ([], [])
    assert len(report.used) == len(A)
    assert len(report.unused) == unused
    assert f"{len(A)} tensors used" in str(report)
    assert all(f"'{place}'" in str(report) or place in str(report) for place in (prefix, *others))


def test_dino_mae_and_their_kind_are_read_and_resized_as_timm_does(tmp_path: Path) -> None:
    student, teacher = below("module.backbone.", D), below("backbone.", C)
    dino = {"student": student | {"module.head.last_layer.weight": torch.rand(4, 4)}, "teacher": teacher, "epoch": 1}
    flow = Flow("vit_tiny_patch16_224", image_size=32, **VIT)
    report = load(flow, dino, tmp_path / "dino.pth")
    assert equal(flow, C)
    assert (report.prefix, report.others) == ("teacher.", ["student."])
    mae = {"model": D | {"mask_token": torch.rand(1, 1, 8), "decoder_blocks.0.norm1.weight": torch.rand(8)}}
    report = load(flow, mae, tmp_path / "mae.pth")
    assert equal(flow, D)
    assert report.missing == report.resized == []
    larger = Flow("vit_tiny_patch16_224", image_size=48, patch_size=8, **VIT)
    report = load(larger, {"model": C}, tmp_path / "mae.pth")
    assert report.resized == ["backbone.patch_embed.proj.weight", "backbone.pos_embed"]
    timm_own = timm.models.vision_transformer.checkpoint_filter_fn(dict(C), larger.backbone)
    assert equal(larger, timm_own)
    pooled = Flow("vit_tiny_patch16_224", image_size=32, global_pool="avg", fc_norm=True, **VIT)
    report = load(pooled, C, tmp_path / "pooled.pt")
    assert report.missing == ["backbone.fc_norm.bias", "backbone.fc_norm.weight"]
    assert "2 left as initialised (backbone.fc_norm.bias, backbone.fc_norm.weight)" in str(report)


def test_dinov2_with_registers_is_read_by_its_own_names(tmp_path: Path) -> None:
    options = {**VIT, "image_size": 28, "init_values": 1e-5}
    flow = Flow("vit_small_patch14_reg4_dinov2", **options)
    state = random_state(flow.backbone, 1)
    published = state | {"mask_token": torch.rand(1, 48), "register_tokens": state["reg_token"]}
    del published["reg_token"]
    published["pos_embed"] = torch.cat([torch.zeros(1, 1, 48), state["pos_embed"]], dim=1)
    report = load(flow, {"teacher": below("backbone.", published)}, tmp_path / "dinov2.pth")
    assert report.missing == report.resized == []
    assert equal(flow, state)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (
            lambda: torchvision.models.VisionTransformer(112, 16, 2, 3, 48, 192),
            {"name": "vit_tiny_patch16_224", "image_size": 112, **VIT},
        ),
        (
            lambda: torchvision.models.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [7, 7]),
            {
                "name": "swin_tiny_patch4_window7_224",
                "image_size": 112,
                "embed_dim": 24,
                "depths": (2, 2),
                "num_heads": (2, 4),
            },
        ),
        (
            lambda: torchvision.models.ConvNeXt(
                [
                    torchvision.models.convnext.CNBlockConfig(16, 24, 2),
                    torchvision.models.convnext.CNBlockConfig(24, 32, 2),
                    torchvision.models.convnext.CNBlockConfig(32, 40, 1),
                    torchvision.models.convnext.CNBlockConfig(40, None, 1),
                ]
            ),
            {"name": "convnext_atto", "depths": (2, 2, 1, 1), "dims": (16, 24, 32, 40)},
        ),
        (torchvision.models.mobilenet_v2, {"name": "mobilenetv2_100"}),
    ],
)
def test_torchvisions_models_give_the_same_features(
    theirs: Callable[[], nn.Module], ours: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, flow = theirs().eval(), Flow(**ours)
    report = load(flow, model.state_dict(), tmp_path / "model.pth")
    assert report.missing == report.resized == []
    assert len(report.unused) >= 2  # of the classifier
    for name in ("head", "heads", "fc", "classifier"):
        if hasattr(model, name):
            layer = getattr(model, name)
            setattr(model, name, nn.Sequential(*layer[:-1]) if isinstance(layer, nn.Sequential) else nn.Identity())
    pictures = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        torch.testing.assert_close(flow.backbone(pictures), model(pictures), rtol=1e-4, atol=1e-5)


def test_a_resnet_of_torchvision_and_lightlys_models_are_read(tmp_path: Path) -> None:
    model = torchvision.models.resnet18()
    module = nn.ModuleDict(
        {"backbone": nn.Sequential(*list(model.children())[:-1]), "head": lightly.SimCLRProjectionHead(512, 64, 16)}
    )
    flow = Flow("resnet18")
    resnet = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("fc.")}
    assert load(flow, model.state_dict(), tmp_path / "torchvision.pth").unused == [
        "backbone.fc.bias",
        "backbone.fc.weight",
    ]
    assert equal(flow, resnet)
    flow = Flow("resnet18")
    report = load(flow, {"state_dict": module.state_dict(), "global_step": 3}, tmp_path / "simclr.ckpt")
    assert equal(flow, resnet)
    assert (report.prefix, report.missing) == ("state_dict.", [])
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, **VIT)
    masked = nn.ModuleDict({"backbone": lightly.MaskedVisionTransformerTIMM(vit)})
    flow = Flow("vit_tiny_patch16_224", image_size=32, **VIT)
    assert load(flow, {"state_dict": masked.state_dict()}, tmp_path / "mae.ckpt").missing == []
    assert equal(flow, {name: tensor for name, tensor in vit.state_dict().items() if not name.startswith("head.")})


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """A small model of open_clip's own classes."""
    folder = tmp_path_factory.mktemp("config")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (folder / "tiny-native.json").write_text(__import__("json").dumps(config))
    open_clip.add_model_config(folder / "tiny-native.json")
    torch.manual_seed(0)
    return open_clip.create_model("tiny-native").eval()


def image_text(context_length: int = 12) -> ImageText:
    text = open_clip.transformer.TextTransformer(
        context_length=context_length, width=32, heads=2, layers=1, output_dim=16
    )
    options = {"patch_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 1, "image_size": 32, "act_layer": "gelu"}
    return ImageText(backbone("vit_base_patch16_clip_224", **options), text).eval()


def test_checkpoints_of_open_clip_give_the_same_embeddings(clip: nn.Module, tmp_path: Path) -> None:
    state = clip.state_dict()
    training = {"epoch": 1, "name": "x", "state_dict": below("module.", state), "optimizer": {"state": {}}}
    torch.save(training, tmp_path / "epoch_1.pt")
    save_file(state, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text("{}")
    (tmp_path / "both").mkdir()
    for name in ("open_clip_model.safetensors", "model.safetensors"):  # the second one for transformers
        save_file(state if "open" in name else {"x": torch.zeros(1)}, tmp_path / "both" / name)
    pictures, tokens = torch.randn(2, 3, 32, 32), open_clip.tokenize(["a red bus", "two cats"], 12)
    for source in ("epoch_1.pt", "open_clip_model.safetensors", "both"):
        flow = image_text()
        report = load_weights(flow, f"{'open_clip:local-dir:' if source == 'both' else ''}{tmp_path / source}")
        assert report.missing == report.unused == report.resized == []
        with torch.no_grad():
            torch.testing.assert_close(flow.encode_image(pictures), clip.encode_image(pictures), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(flow.encode_text(tokens), clip.encode_text(tokens), rtol=1e-4, atol=1e-5)
        assert torch.equal(flow.logit_scale, clip.logit_scale)
    longer = image_text(context_length=20)
    fresh = longer.text.positional_embedding.detach().clone()
    report = load_weights(longer, str(tmp_path / "epoch_1.pt"))
    assert report.resized == ["text.positional_embedding"]
    assert torch.equal(longer.text.positional_embedding[:12], clip.positional_embedding)
    assert torch.equal(longer.text.positional_embedding[12:], fresh[12:])
    alone = Flow("vit_base_patch16_clip_224", patch_size=16, embed_dim=64, depth=2, num_heads=1, image_size=32)
    assert load_weights(alone, str(tmp_path / "epoch_1.pt")).missing == []
    assert equal(
        alone, {"norm.weight": state["visual.ln_post.weight"], "cls_token": state["visual.class_embedding"][None, None]}
    )


def test_a_folder_of_timm_is_read(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet")
    timm.models.save_for_hf(model, str(tmp_path / "hub"), safe_serialization="both")
    for source in (f"timm:local-dir:{tmp_path / 'hub'}", str(tmp_path / "hub"), f"{tmp_path}/hub/pytorch_model.bin"):
        flow = Flow("test_resnet")
        report = load_weights(flow, source)
        assert equal(flow, {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("fc.")})
        assert report.unused == ["backbone.fc.bias", "backbone.fc.weight"]


def test_the_student_of_our_own_checkpoint_is_read_and_its_teacher_not_told(tmp_path: Path) -> None:
    flow = Flow("test_resnet")
    flow.teacher = nn.ModuleDict({"backbone": backbone("test_resnet")})
    ours = below("backbone.", A) | below("teacher.backbone.", B)
    report = load(flow, {"state_dict": ours}, tmp_path / "a.ckpt")
    assert (report.prefix, report.others, report.missing, len(report.used)) == ("state_dict.", [], [], len(ours))
    assert equal(flow, A)
    assert load(flow, A, tmp_path / "a.pt").missing == []  # it starts as the student


def test_grey_pictures_are_three_equal_channels(tmp_path: Path) -> None:
    grey = timm.create_model("test_resnet", in_chans=1, num_classes=0).eval()
    flow = Flow("test_resnet")
    report = load(flow, grey.state_dict(), tmp_path / "grey.pth")
    assert report.resized == ["backbone.conv1.0.weight"]
    pictures = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(flow.backbone(pictures.expand(-1, 3, -1, -1)), grey(pictures), rtol=1e-4, atol=1e-5)


def test_another_architecture_is_told_with_the_backbone_that_fits(tmp_path: Path) -> None:
    deeper = below("module.encoder_q.", empty("resnet34"))
    with pytest.raises(
        ValueError, match=r"architecture: it has as well 80 .*layer1\.2\..*fits backbone\.name=resnet34$"
    ):
        load(Flow("resnet18"), {"state_dict": deeper}, tmp_path / "a.pth")
    tiny = empty("vit_tiny_patch16_224")
    with pytest.raises(ValueError, match=r"it lacks 24 .*ls1\.gamma.*It fits backbone\.name=vit_tiny_patch16_224$"):
        load(Flow("vit_tiny_patch16_224", init_values=1e-5), tiny, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"has shape .*It fits backbone\.name=vit_tiny_patch16_224$"):
        load(Flow("vit_tiny_patch16_224", image_size=32, **VIT), {"model": tiny}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"has no tensor of the backbone, such as 'backbone\.blocks\.0"):
        load(Flow("vit_tiny_patch16_224", image_size=32, **VIT), {"weight": torch.zeros(3)}, tmp_path / "a.pth")


def empty(name: str) -> State:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    return {key: torch.empty(tensor.shape) for key, tensor in model.state_dict().items()}

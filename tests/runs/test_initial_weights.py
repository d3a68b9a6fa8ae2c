"""Starting from other weights: what is used, resized, left and refused."""

from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from torch import nn

from repr.models.backbone import backbone
from repr.objectives.image_text import ImageText
from repr.runs.checkpoints import damage, last_checkpoint
from repr.runs.initial_weights import load_weights
from tests.objectives.conftest import build, make_batch


def clip_b32(embed_dim: int = 512, image_size: int = 224, context_length: int = 77) -> ImageText:
    text = open_clip.transformer.TextTransformer(
        context_length=context_length, output_dim=embed_dim, act_layer=open_clip.transformer.QuickGELU
    )
    return ImageText(backbone("vit_base_patch32_clip_quickgelu_224", image_size=image_size), text)


@pytest.fixture(scope="module")
def openai_style(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """An open_clip model of OpenAI's architecture with random weights, and the file that holds them."""
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32-quickgelu")
    path = tmp_path_factory.mktemp("open_clip") / "weights.pt"
    torch.save(model.state_dict(), path)
    return path, model.eval()


def test_a_native_open_clip_model_gives_the_same_embeddings(openai_style: tuple[Path, nn.Module]) -> None:
    path, model = openai_style
    objective = clip_b32().eval()
    report = load_weights(objective, f"open_clip:ViT-B-32-quickgelu/{path}")
    assert report.missing == report.unused == report.resized == []
    images, tokens = torch.randn(2, 3, 224, 224), open_clip.tokenize(["a red bus", "two cats"])
    with torch.no_grad():
        torch.testing.assert_close(objective.encode_image(images), model.encode_image(images), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(objective.encode_text(tokens), model.encode_text(tokens), rtol=1e-4, atol=1e-5)
    assert torch.equal(objective.logit_scale, model.logit_scale)


def test_positions_are_resized_and_heads_of_another_width_start_afresh(openai_style: tuple[Path, nn.Module]) -> None:
    objective = clip_b32(embed_dim=128, image_size=96, context_length=32)
    before = objective.image_projection.weight.detach().clone()
    report = load_weights(objective, f"open_clip:ViT-B-32-quickgelu/{openai_style[0]}")
    assert report.resized == ["backbone.pos_embed", "text.positional_embedding"]
    assert report.missing == ["image_projection.weight", "text.text_projection"]
    assert torch.equal(objective.image_projection.weight, before)
    assert torch.equal(objective.text.positional_embedding, openai_style[1].positional_embedding[:32])
    assert "2 resized (backbone.pos_embed, text.positional_embedding)" in str(report)
    assert "2 left as initialised (image_projection.weight, text.text_projection)" in str(report)


def test_an_open_clip_model_over_timm_is_read(tmp_path: Path) -> None:
    config = {
        "embed_dim": 16,
        "vision_cfg": {"timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear", "image_size": 64},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (tmp_path / "tiny-timm.json").write_text(__import__("json").dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-timm.json")
    model = open_clip.create_model("tiny-timm").eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    text = open_clip.transformer.TextTransformer(context_length=12, width=32, heads=2, layers=1, output_dim=16)
    objective = ImageText(backbone("test_resnet"), text).eval()
    report = load_weights(objective, f"open_clip:tiny-timm/{tmp_path / 'weights.pt'}")
    assert report.missing == report.unused == []
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(objective.encode_image(images), model.encode_image(images), rtol=1e-5, atol=1e-6)


def test_a_checkpoint_of_ours_is_read_at_another_image_size(tmp_path: Path) -> None:
    first, second = build("clip", seed=0), build("clip", "image_size=64", seed=1)
    torch.save({"state_dict": first.state_dict()}, tmp_path / "a.ckpt")
    report = load_weights(second, str(tmp_path / "a.ckpt"))
    assert report.resized == ["backbone.pos_embed"]
    assert report.missing == report.unused == []
    third = build("clip", seed=1)
    load_weights(third, str(tmp_path / "a.ckpt"))
    batch = make_batch()
    assert torch.equal(first.step(batch).terms["contrast"], third.step(batch).terms["contrast"])


def test_a_run_folder_stands_for_its_last_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    assert last_checkpoint(tmp_path) is None
    first = build("clip")
    for step in (9, 10):
        content = {"state_dict": first.state_dict(), "optimizer_states": [], "loops": {}, "global_step": step}
        torch.save(content, tmp_path / "checkpoints" / f"step={step}.ckpt")
    assert last_checkpoint(tmp_path).name == "step=10.ckpt"
    assert load_weights(build("clip", seed=1), str(tmp_path)).missing == []


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """A run folder's three checkpoints; large enough tensors that a byte in the middle belongs to one."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step in (2, 4, 10):
        content = {"state_dict": {"w": torch.full((1000,), float(step))}, "optimizer_states": [], "loops": {}}
        torch.save(content | {"global_step": step}, folder / f"step={step}.ckpt")
    return folder


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda data: data[:-1], "cut short"),
        (lambda data: data[: len(data) // 2], "cut short"),
        (lambda data: b"", "it is empty"),
        (lambda data: b"no zip" * 100, "cut short or overwritten"),
        (flipped, "checksum"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_named(
    harm: Callable[[bytes], bytes], reason: str, three: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step, whole in ((10, "step=4.ckpt"), (4, "step=2.ckpt")):
        path = three / f"step={step}.ckpt"
        path.write_bytes(harm(path.read_bytes()))
        (three / "step=12.ckpt.part").write_bytes(b"half")  # never taken for a checkpoint
        assert last_checkpoint(three.parent).name == whole
        line = capsys.readouterr().err.splitlines()[-1]
        assert str(path) in line
        assert reason in line
    path = three / "step=2.ckpt"
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(ValueError, match="no whole checkpoint") as error:
        last_checkpoint(three.parent)
    assert all(f"step={step}.ckpt" in str(error.value) for step in (2, 4, 10))


def test_every_flipped_byte_of_a_tensor_is_found(three: Path) -> None:
    path = three / "step=2.ckpt"
    data = path.read_bytes()
    start = data.index(torch.full((1000,), 2.0).numpy().tobytes())
    for position in range(start, start + 4000, 97):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x80]) + data[position + 1 :])
        assert "checksum" in damage(path), position
    path.write_bytes(data)
    assert damage(path) is None


def test_what_is_no_checkpoint_of_a_run_is_passed_over(three: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {}}, three / "step=12.ckpt")
    torch.save({"state_dict": {}, "code": Path}, three / "step=13.ckpt")
    torch.save(torch.zeros(3), three / "step=14.ckpt")
    (three / "step=last.ckpt").write_bytes(b"somebody's copy")
    assert last_checkpoint(three.parent).name == "step=10.ckpt"
    first, second, third = capsys.readouterr().err.splitlines()
    assert "it has no state_dict, optimizer_states" in first
    assert "weights_only" in second or "Weights only" in second
    assert "it has no optimizer_states, loops, global_step" in third


def test_what_cannot_be_used_is_refused(tmp_path: Path) -> None:
    objective = build("clip")
    torch.save({"state_dict": timm.create_model("test_resnet").state_dict()}, tmp_path / "resnet.ckpt")
    other = {"state_dict": build("clip", "++backbone.embed_dim=48", "++backbone.num_heads=3").state_dict()}
    torch.save(other, tmp_path / "wide.ckpt")
    (tmp_path / "half.ckpt").write_bytes((tmp_path / "wide.ckpt").read_bytes()[:50_000])
    for source, words in {
        f"{tmp_path}/resnet.ckpt": "another architecture: it has no tensor of the backbone",
        f"{tmp_path}/wide.ckpt": "another architecture: 'backbone.",
        f"{tmp_path}/half.ckpt": "is damaged (cut short",
        f"{tmp_path}/none.ckpt": "does not exist",
        f"{tmp_path}": "without checkpoints",
        "open_clip:ViT-B-33/openai": "no model 'ViT-B-33'",
        "open_clip:ViT-B-32": "needs a tag",
        "timm:resnet5000": "no such model",
    }.items():
        with pytest.raises(ValueError, match=r"init_from=") as refused:
            load_weights(objective, source)
        assert words in str(refused.value)


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "test_resnet", "convnext_atto"]
)
def test_backbones_take_the_image_size_and_give_one_vector(name: str) -> None:
    model = backbone(name, image_size=64).eval()
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, model.num_features)


def test_an_unknown_backbone_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"backbone\.name is 'resnet51'.*nearest: .*resnet50"):
        backbone("resnet51")

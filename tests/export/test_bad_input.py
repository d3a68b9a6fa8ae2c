"""One clear error each, and nothing is lost."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from repr.config import ConfigError
from repr.export.__main__ import main, parse
from repr.export.folders import export
from repr.objectives.image_text import ImageText
from repr.runs.folder import stage_folders
from repr.runs.trained import Trained
from tests.export.conftest import trained


def told(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command line says as it leaves."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert isinstance(stop.value.code, str)
    assert stop.value.code.startswith("error: ")
    return stop.value.code


class Louder(ImageText):
    """Encodes text otherwise than open_clip's tower does."""

    def encode_text(self, tokens: Tensor) -> Tensor:
        return 1.001 * super().encode_text(tokens)


@pytest.fixture
def copied(run_and_export: tuple[Path, Path], tmp_path: Path) -> Path:
    """A run folder that a test may damage."""
    return Path(shutil.copytree(run_and_export[0], tmp_path / "run"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs=x"], "there is no option 'runs'; did you mean 'run'?"),
        (["run"], "run is not of the form key=value"),
        (["run=x", "force=yes"], "force takes true or false, but got 'yes'"),
        (["run=x", "out=y"], "to has no value: set it"),
        (["run=x", "out=y", "to=onnxx"], "to=onnxx; set it to open_clip, timm, hf or onnx"),
        (["run=x", "out=y", "to=timm", "weights=ema"], "weights=ema; set it to model, teacher or unaveraged"),
        (["run=x", "out=y", "to=timm", "untrained_text=true"], "untrained_text=true is for to=open_clip"),
        (["run=nothing", "out=y", "to=timm"], "run=nothing does not exist"),
        (["run=.", "out=y", "to=timm"], "is not (inside) a run folder: config.yaml is missing"),
    ],
)
def test_options(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in told(words, capsys)
    assert list(tmp_path.iterdir()) == []


def test_options_have_defaults() -> None:
    options = parse(["run=x", "to=timm", "out=a=b", "force=true"])
    assert options == {
        "run": "x", "to": "timm", "out": "a=b", "weights": "model", "force": True, "untrained_text": False,
        "trust": False,
    }  # fmt: skip


def test_a_folder_that_exists(
    run_and_export: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, made = run_and_export
    out = Path(shutil.copytree(made, tmp_path / "out"))
    assert "exists; choose another, or set force=true" in told([f"run={run}", "to=timm", f"out={out}"], capsys)
    card = out / "open_clip_config.json"
    for spoil, restore, name in (
        (lambda: (out / "thesis.tex").write_text("years of work"), (out / "thesis.tex").unlink, "thesis.tex"),
        (
            lambda: (out / "more").mkdir() or (out / "more" / "a").symlink_to("/a"),
            (out / "more" / "a").unlink,
            "more/a",
        ),
        (lambda: card.write_text(card.read_text() + " "), lambda: card.write_text(card.read_text()[:-1]), card.name),
    ):
        spoil()
        before = sorted(out.rglob("*"))
        fault = told([f"run={run}", "to=timm", f"out={out}", "force=true"], capsys)
        assert f"force=true removes only what an export wrote, and {name} in out={out} is not" in fault
        assert sorted(out.rglob("*")) == before
        restore()
    before = sorted(path.name for path in out.iterdir())
    fault = told([f"run={run}", "to=open_clip", f"out={out}", "force=true", "untrained_text=true"], capsys)
    assert "has a trained text tower" in fault
    assert sorted(path.name for path in out.iterdir()) == before
    checkpoint = next((run / "checkpoints").iterdir())
    main([f"run={checkpoint}", "to=timm", f"out={out}", "force=true"])
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors", "written.json"}
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_full_disk(run_and_export: tuple[Path, Path], small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = Path(shutil.copytree(run_and_export[1], small_disk / "out"))
    (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free - 2**20))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "the disk is full" in told([f"run={run_and_export[0]}", "to=open_clip", f"out={out}", "force=true"], capsys)
    assert {path.name for path in small_disk.iterdir()} == {"out", "filler"}
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_tower_that_the_library_does_not_give_is_not_kept(tmp_path: Path) -> None:
    model = trained("clip", "objective._target_=tests.export.test_bad_input.Louder")
    with pytest.raises(ValueError, match=r"open_clip loads .* but its text differs from ours by .* so it was not kept"):
        export(model, tmp_path / "out", to="open_clip")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("+backbone.act_layer=silu",), "makes timm's test_resnet by name alone, here with act_layer=silu"),
        (("objective.hidden_dim=8",), "no model with an MLP on its towers (hidden_dim)"),
        (("backbone.name=test_vit2",), "test_vit2 is built for 160 x 160 pixels"),
        (("+text.use_pad_mask=true",), "cannot express text.use_pad_mask=True"),
        (("+text.act_layer={_target_: hydra.utils.get_class, path: torch.nn.ReLU}",), "cannot express text.act_layer="),
        (("tokenizer.context_length=8",), "tokenizer.context_length=8 is not text.context_length=12"),
        (("tokenizer=null",), "encodes text, and tokenizer is null"),
        (("tokenizer={_target_: open_clip.tokenizer.SigLipTokenizer}",), "only open_clip's SimpleTokenizer"),
    ],
)
def test_what_open_clip_cannot_express(options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        export(trained("clip", *options), tmp_path / "out", to="open_clip")
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_flow_without_a_teacher_and_a_run_without_an_average(
    run_and_export: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fault = told([f"run={run_and_export[0]}", "to=timm", f"out={tmp_path}/out", "weights=teacher"], capsys)
    assert "weights=teacher: ImageText of " in fault
    assert "has no teacher; leave it out" in fault
    fault = told([f"run={run_and_export[0]}", "to=timm", f"out={tmp_path}/out", "weights=unaveraged"], capsys)
    assert "holds no average of weights; leave it out" in fault
    assert list(tmp_path.iterdir()) == []


def test_stages_are_not_joined_by_onnxruntime(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="to=onnx is for one model: export each stage by itself"):
        export({"stage-0": trained("clip")}, tmp_path / "out", to="onnx")


def test_spaces_of_two_widths(tmp_path: Path) -> None:
    """Which M3CoL may have where it compares no modalities."""
    model = trained("m3col_no_contrast", "text.output_dim=24")
    with pytest.raises(
        ConfigError, match=r"open_clip has one space .* are 96 and 24 wide. Export the image tower with"
    ):
        export(model, tmp_path / "out", to="open_clip")


def test_a_flow_without_pictures() -> None:
    with pytest.raises(ConfigError, match="MixupContrast was trained without pictures and has no encoder of them"):
        trained("m3col_no_contrast", "objective.backbone=null", "objective.weights.image_head=0")


class Eigenvalues(ImageText):
    """Ends with an operation that ONNX does not have."""

    def encode_image(self, images: Tensor) -> Tensor:
        return torch.linalg.eigvals(super().encode_image(images)[:, None] * torch.eye(16)).real


@pytest.mark.slow
def test_a_tower_that_onnx_cannot_express(tmp_path: Path) -> None:
    model = trained("clip", "objective._target_=tests.export.test_bad_input.Eigenvalues")
    with pytest.raises(ConfigError, match="torch cannot write the image tower of clip with test_resnet as ONNX: "):
        export(model, tmp_path / "out", to="onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_text_tower_without_tokenizer_does_not_go_to_onnx(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="encodes text, and tokenizer is null"):
        export(trained("clip", "tokenizer=null"), tmp_path / "out", to="onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_objective_of_another_config() -> None:
    model = trained("clip")
    with pytest.raises(ConfigError, match=r"another version had written it: 'head.0.weight' is missing"):
        Trained.copy_of(model.objective, trained("simclr").cfg)


def test_checkpoints_that_cannot_be_exported(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint,) = (copied / "checkpoints").iterdir()
    words = [f"run={copied}", "to=timm", f"out={tmp_path}/out"]
    content = torch.load(checkpoint, weights_only=True)
    tensors = content["state_dict"]
    tensors["image_head.weight"] = tensors.pop("image_projection.weight")  # what a rename leaves behind
    torch.save(content, checkpoint)
    fault = told(words, capsys)
    assert f"{checkpoint} does not fit the objective of its config" in fault
    assert "'image_projection.weight' is missing (it has 'image_head.weight')" in fault
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])
    assert "no whole checkpoint to go on from" in told(words, capsys)
    assert f"run={checkpoint} is damaged" in told([f"run={checkpoint}", *words[1:]], capsys)
    checkpoint.rename(checkpoint.with_suffix(".ckpt.part"))
    assert "has no finished checkpoint" in told(words, capsys)
    assert not (tmp_path / "out").exists()


def test_weights_of_timm_are_not_asked_for_again() -> None:
    """A run that began with pretrained weights is exported without network."""
    model = trained("clip")
    cfg = model.cfg.copy()
    OmegaConf.update(cfg, "backbone.pretrained", True, force_add=True)
    again = Trained.copy_of(model.objective, cfg)
    assert torch.equal(again.objective.backbone.conv1[0].weight, model.objective.backbone.conv1[0].weight)


def test_stages_that_are_not_all_there(run_and_export: tuple[Path, Path], tmp_path: Path) -> None:
    cfg = OmegaConf.load(run_and_export[0] / "config.yaml")
    (tmp_path / "run").mkdir()
    OmegaConf.update(cfg, "procedure", {"num_stages": 2, "norm": "each"}, force_add=True)
    OmegaConf.save(cfg, tmp_path / "run" / "config.yaml")
    (tmp_path / "run" / "stage-0").symlink_to(run_and_export[0])
    with pytest.raises(ConfigError, match="has 1 of its 2 stages: resume it first"):
        export(tmp_path / "run", tmp_path / "out", to="open_clip")
    (tmp_path / "run" / "stage-1").symlink_to(run_and_export[0])
    export(tmp_path / "run", tmp_path / "out", to="open_clip")
    manifest = json.loads((tmp_path / "out" / "stages.json").read_text())
    assert [stage["folder"] for stage in manifest["stages"]] == ["stage-0", "stage-1"]
    assert manifest["norm"] == "each"


def test_stage_folders_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("stage-10", "stage-2", "stage-0", "stage-x", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
    (tmp_path / "stage-3").mkdir()
    assert list(stage_folders(tmp_path)) == ["stage-0", "stage-2", "stage-10"]

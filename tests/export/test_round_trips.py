"""What is exported gives, in the library it is for, what it gives here."""

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import timm
import torch
import yaml
from hydra.errors import InstantiationException
from open_clip.push_to_hf_hub import save_for_hf as save_open_clip
from open_clip_train.zero_shot import run as open_clip_zero_shot
from safetensors.torch import load_file, save_file
from timm.models._hub import has_hf_hub
from torch import Tensor
from torch.utils.data import DataLoader

from repr.config import CONF, ConfigError
from repr.data.sources.emoji import Emoji
from repr.export.folders import TARGETS, export, load_joined, write
from repr.export.target import Export, Samples
from repr.export.verify import LOADER, TOLERANCE, answers_elsewhere, difference
from repr.runs.initial_weights import load_weights
from repr.runs.trained import Trained
from tests.export.conftest import trained
from tests.objectives.conftest import OBJECTIVES

# The oldest timm cannot read from the hub by the newest huggingface_hub.
TO_HUB = "hf" if has_hf_hub() else "timm"
BACKBONES = ("test_resnet", "test_vit", "test_convnext")
# More patches than I-JEPA's four blocks, and a second class token.
OWN_BACKBONE = {"ijepa": ["+backbone.patch_size=8"], "tips": ["+backbone.reg_tokens=1"]}
# Whose text tower, or a register, open_clip cannot be told, at least not with the options of their files.
TIMM_ALONE = ("albef", "voltron_cond", "voltron_dual", "coca_dino", "siglip2", "tips")
VIT = ("backbone.name=vit_tiny_patch16_224", "+backbone.depth=2", "+backbone.embed_dim=32", "+backbone.num_heads=2")
VITS = {  # of another size, depth and width than the name says
    "plain": (),
    "clip": ("backbone.name=vit_base_patch32_clip_224",),
    "quick": (
        "backbone.name=vit_base_patch32_clip_quickgelu_224",
        "+text.act_layer={_target_: hydra.utils.get_class, path: open_clip.transformer.QuickGELU}",
    ),
    "average": ("+backbone.global_pool=avg",),
    "average_after_norm": ("+backbone.global_pool=avg", "+backbone.fc_norm=false"),
    "scaled": ("+backbone.init_values=0.1", "+backbone.mlp_ratio=2"),
    "no_biases": ("+backbone.qkv_bias=false", "+backbone.no_embed_class=true"),
    "dropout": ("+backbone.drop_path_rate=0.2", "+backbone.patch_drop_rate=0.2", "+backbone.drop_rate=0.1"),
}
# As open_clip has its CoCa: one pooler, which norms what it gives, and a class token that sees a padding.
COCA = (
    *VIT, *VITS["clip"], "+backbone.final_norm=false", "+backbone.global_pool=avg", "+backbone.fc_norm=false",
    "objective.pooler=shared", "objective.num_queries=4", "text.width=16", "text.correct_cls_mask=false",
)  # fmt: skip


def one_trained(name: str, first: int) -> Trained:
    """An objective with the first backbone, counted from ``first`` on, that it takes: some need a ViT."""
    if name == "coca":
        return trained(name, *COCA)
    for i in range(len(BACKBONES)):
        try:
            patches = OWN_BACKBONE.get(name, [])
            return trained(name, *patches, backbone=BACKBONES[(first + i) % len(BACKBONES)])
        except InstantiationException as error:
            if not isinstance(error.__cause__, ValueError | TypeError):  # TypeError: a ResNet has no patches
                raise
    raise AssertionError(f"{name} takes none of {BACKBONES}")


class Exports:
    """Exports that are written one after the other and then loaded by one process."""

    def __init__(self, root: Path, samples: Samples) -> None:
        self.root, self.samples = root, samples
        self.exports: list[Export] = []
        self.have_text: list[bool] = []
        self.faults: dict[str, str | None] = {}

    def add(self, name: str, model: Trained, to: str, **options: bool) -> Path:
        folder = self.root / name
        folder.mkdir(parents=True)
        self.exports.append(write(model, folder, self.samples, to=to, **options))
        self.have_text.append(to != "timm" and model.has_text)
        return folder

    def load(self) -> None:
        answers = answers_elsewhere(self.exports, self.samples)
        for one, theirs in zip(self.exports, answers, strict=True):
            self.faults[one.folder.relative_to(self.root).as_posix()] = difference(theirs, one.answers)

    def files(self, name: str) -> set[str]:
        return {path.name for path in (self.root / name).rglob("*.*")}

    def model_cfg(self, name: str) -> dict[str, Any]:
        return json.loads((self.root / name / "open_clip_config.json").read_text())["model_cfg"]


@pytest.fixture(scope="module")
def loaded(samples: Samples, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    exports = Exports(tmp_path_factory.mktemp("exports"), samples)
    for name in ("clip", "simclr"):
        for backbone in BACKBONES:
            for to in ("open_clip", "timm"):
                exports.add(f"{to}/{name}-{backbone}", trained(name, backbone=backbone), to)
    for name, options in VITS.items():
        exports.add(f"vit/{name}", trained("clip", *VIT, *options), "open_clip")
    exports.add("vit/images", trained("simclr", *VIT, "+backbone.global_pool=avg"), "open_clip")
    exports.add("whole", trained("simclr"), "open_clip", untrained_text=True)
    exports.add("args", trained("simclr", "+backbone.act_layer=silu"), "timm")
    exports.add("coca/shared", trained("coca", *COCA), "open_clip")
    no_pooler = ("objective.pooler=null", "objective.parallel_fraction=0.5", "text.width=32", COCA[-1])
    exports.add("coca/none", trained("coca", *VIT, *VITS["quick"], *no_pooler), "open_clip")
    exports.add("hf/both", trained("clip", backbone="test_vit"), "hf")
    exports.add("hf/images", trained("simclr", backbone="test_convnext"), TO_HUB)
    exports.add("teacher/model", trained("pixpro"), "timm")
    exports.add("teacher/teacher", trained("pixpro").of_teacher(), TO_HUB)
    exports.load()
    return exports


def test_every_kind_of_backbone_comes_back(loaded: Exports) -> None:
    assert {name: fault for name, fault in loaded.faults.items() if fault} == {}
    assert loaded.files("timm/clip-test_vit") == {"config.json", "model.safetensors"}
    assert loaded.files("open_clip/clip-test_vit") == {"open_clip_config.json", "open_clip_model.safetensors"}
    assert loaded.files("open_clip/simclr-test_vit") == {"open_clip_config.json", "open_clip_visual.safetensors"}
    for name, one, has_text in zip(loaded.faults, loaded.exports, loaded.have_text, strict=True):
        answers = one.answers
        assert ("text" in answers) == has_text, name
        for kind in ("image", "text") if has_text else ("image",):
            apart = torch.pdist(answers[kind]) / answers[kind].norm(dim=1).mean()
            assert apart.max() > 100 * TOLERANCE, f"{name}: the {kind} embeddings cannot be told apart"


@pytest.mark.slow
def test_every_objective_comes_back(samples: Samples, tmp_path: Path) -> None:
    """Each with one kind of backbone and to one library: what is exported does not depend on it otherwise."""
    exports = Exports(tmp_path, samples)
    for i, name in enumerate(OBJECTIVES):
        model = one_trained(name, i)
        exports.add(name, model, "open_clip" if model.has_text and name not in TIMM_ALONE else "timm")
    exports.load()
    assert {name: fault for name, fault in exports.faults.items() if fault} == {}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((f"vit/{name}", (*VIT, *VITS[name])) for name in ("scaled", "no_biases")),
        ("vit/images", (*VIT, "+backbone.global_pool=avg")),
    ],
)
def test_a_run_starts_from_an_export(name: str, options: tuple[str, ...], loaded: Exports) -> None:
    """Whatever its names are there, with class token or not and with parts that open_clip has not."""
    export = next(one for one in loaded.exports if one.folder == loaded.root / name)
    objective = trained("clip" if "text" in export.answers else "simclr", *options).objective
    for parameter in objective.parameters():
        torch.nn.init.ones_(parameter.requires_grad_(False))
    report = load_weights(objective, str(export.folder))
    assert not [missing for missing in report.missing if not missing.startswith("head.")]
    with torch.inference_mode():
        assert (
            difference({"image": objective.encode_image(export.answers["pixels"])}, {"image": export.answers["image"]})
            is None
        )
        if "text" in export.answers:
            text = objective.encode_text(export.answers["tokens"])
            assert torch.equal(text, export.answers["text"])


def test_a_captioner_is_open_clips_coca(loaded: Exports) -> None:
    """The fresh process has compared its logits after each word, too."""
    for name in ("shared", "none"):
        model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{loaded.root / 'coca' / name}")
        assert isinstance(model, open_clip.CoCa)
        answers = next(one.answers for one in loaded.exports if one.folder == loaded.root / "coca" / name)
        with torch.inference_mode():
            said = model.eval()(answers["pixels"], answers["tokens"])["logits"].argmax(2)  # greedy, after true words
        assert torch.equal(said, answers["logits"].argmax(2))
        assert len(said.unique()) > 2


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("text.correct_cls_mask=true",), "text.correct_cls_mask=True"),
        (("objective.pooler=parallel",), "Train with objective.pooler=shared"),
        (("text.width=32",), "embed_dim=16 and text.width=32"),
        (("++backbone.final_norm=true",), "with backbone.final_norm=false where objective.pooler=shared"),
    ],
)
def test_a_captioner_that_open_clip_cannot_express_is_refused(
    options: tuple[str, ...], told: str, samples: Samples, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=told):
        write(trained("coca", *COCA, *options), tmp_path, samples, to="open_clip")


def test_open_clip_builds_by_timms_name_where_it_can(loaded: Exports) -> None:
    towers = {name: loaded.model_cfg(f"open_clip/clip-{name}")["vision_cfg"] for name in BACKBONES}
    assert [tower.get("timm_model_name") for tower in towers.values()] == ["test_resnet", None, "test_convnext"]
    assert towers["test_vit"]["image_size"] == 32  # by its name it takes 160
    for name in VITS:
        assert loaded.model_cfg(f"vit/{name}")["vision_cfg"]["layers"] == 2
        assert loaded.model_cfg(f"vit/{name}")["quick_gelu"] == (name == "quick")


def test_a_whole_model_has_an_untrained_text_tower(loaded: Exports) -> None:
    name = f"local-dir:{loaded.root / 'whole'}"
    model, _, _ = open_clip.create_model_and_transforms(name)
    assert model.encode_text(open_clip.get_tokenizer(name)(["a cat"])).shape == (1, 96)


@pytest.mark.slow
def test_every_kind_of_tower_goes_to_onnx(samples: Samples, tmp_path: Path) -> None:
    """Projected and plain ones, pooled by class token and by mean, of patches in any number; GELU and QuickGELU.

    The fresh process calls them with batches of one, two and five or more rows.
    """
    exports = Exports(tmp_path, samples)
    for backbone in BACKBONES:
        exports.add(f"clip-{backbone}", trained("clip", backbone=backbone), "onnx")
    for name in ("simclr", "mae_clip", "cmae"):
        exports.add(name, trained(name, backbone="test_vit"), "onnx")
    exports.add("quick", trained("clip", *VIT, *VITS["quick"]), "onnx")
    exports.add("average", trained("simclr", *VIT, *VITS["average"], "+backbone.dynamic_img_size=true"), "onnx")
    exports.load()
    assert {name: fault for name, fault in exports.faults.items() if fault} == {}
    assert exports.files("simclr") == {"image.onnx", "settings.json", "load.py"}
    assert exports.files("clip-test_convnext") == {"image.onnx", "text.onnx", "settings.json", "load.py"}
    used = {"json", "pathlib", "typing", "numpy", "onnxruntime", "PIL", "open_clip"}
    assert imported((tmp_path / "clip-test_convnext" / "load.py").read_text()) == used
    settings = json.loads((tmp_path / "clip-test_convnext" / "settings.json").read_text())
    assert settings["image"]["size"] == 32
    assert settings["text"] == {"tokenizer": "open_clip.SimpleTokenizer", "context_length": 12}


def test_a_teacher_is_exported_where_it_is_asked_for(loaded: Exports) -> None:
    """Its convolutions and the statistics of its own BatchNorm."""
    own, other = (load_file(loaded.root / "teacher" / name / "model.safetensors") for name in ("model", "teacher"))
    kept = trained("pixpro").objective.teacher.backbone.state_dict()
    assert own.keys() == other.keys() == kept.keys()
    assert all(torch.equal(other[name], tensor) for name, tensor in kept.items())
    assert not any(torch.equal(own[name], other[name]) for name in ("conv1.0.weight", "bn1.running_mean"))


def test_open_clip_pushes_to_the_hub_what_lies_in_the_folder(loaded: Exports, tmp_path: Path) -> None:
    """``push_to_hf_hub`` uploads what this function saves of a model."""
    folder = loaded.root / "hf/both"
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    config = json.loads((folder / "open_clip_config.json").read_text())
    no_tokenizer = SimpleNamespace(save_pretrained=lambda folder: None)  # open_clip's own has nothing to save
    save_open_clip(model, no_tokenizer, config["model_cfg"], tmp_path, safe_serialization=True)
    assert json.loads((tmp_path / "open_clip_config.json").read_text()) == config
    own, other = (load_file(path / "open_clip_model.safetensors") for path in (folder, tmp_path))
    assert own.keys() == other.keys()
    assert all(torch.equal(own[key], other[key]) for key in own)


@pytest.mark.skipif(not has_hf_hub(), reason="this timm cannot push by this huggingface_hub")
def test_timm_pushes_to_the_hub_what_lies_in_the_folder(loaded: Exports, tmp_path: Path) -> None:
    folder = loaded.root / "hf/images"
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    ours, theirs = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path))
    assert theirs["architecture"] == ours["architecture"]
    assert theirs["num_classes"] == ours["num_classes"] == 0
    for key in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode"):
        assert theirs["pretrained_cfg"][key] == ours["pretrained_cfg"][key], key
    own, other = (load_file(path / "model.safetensors") for path in (folder, tmp_path))
    assert own.keys() == other.keys()
    assert all(torch.equal(own[key], other[key]) for key in own)


def test_any_change_of_an_export_is_found(samples: Samples, tmp_path: Path) -> None:
    """Each is what a faulty writer would do."""
    exports, clip, simclr = Exports(tmp_path, samples), trained("clip", backbone="test_vit"), trained("simclr")
    for name, model, to, file, where in (
        ("text of the hub", clip, "hf", "open_clip_model.safetensors", "text.ln_final.bias"),
        ("text", clip, "open_clip", "open_clip_model.safetensors", "text.ln_final.bias"),
        ("image", simclr, "open_clip", "image_tower/open_clip_visual.safetensors", "trunk.bn1.running_mean"),
        ("image of timm", simclr, "timm", "model.safetensors", "bn1.running_mean"),
    ):
        path = exports.add(name, model, to) / file
        tensors = load_file(path)
        tensors[where] += 1e-3
        save_file(tensors, path)
    for name, model, to, part, change in (
        ("pixels", clip, "open_clip", "preprocess_cfg", {"mean": [0.48, 0.46, 0.41]}),
        ("pixels of crops", clip, "open_clip", "preprocess_cfg", {"resize_mode": "squash"}),
        ("pixels of timm", simclr, "timm", "pretrained_cfg", {"crop_pct": 0.9}),
        ("tokens", clip, "open_clip", "model_cfg", {"text_cfg": {"tokenizer_kwargs": {"clean": "whitespace"}}}),
    ):
        path = exports.add(name, model, to) / ("config.json" if to == "timm" else "open_clip_config.json")
        config = json.loads(path.read_text())
        for key, value in change.items():
            config[part][key] = {**config[part][key], **value} if isinstance(value, dict) else value
        path.write_text(json.dumps(config))
    exports.load()
    assert all(fault and fault.startswith(f"its {name.split()[0]} ") for name, fault in exports.faults.items()), (
        exports.faults
    )


def test_stages_are_exported_and_joined(tmp_path: Path) -> None:
    """Their file says how, and its reader needs nothing of ours; the fresh process has compared what it gives."""
    models = {"stage-0": trained("clip"), "stage-1": trained("clip", backbone="test_vit")}
    export(models, tmp_path / "clip", to="open_clip", norm="each")
    manifest = json.loads((tmp_path / "clip" / "stages.json").read_text())
    assert manifest == {"stages": [{"to": "open_clip", "folder": name} for name in models], "norm": "each"}
    assert "repr" not in imported((tmp_path / "clip" / "join.py").read_text())
    with pytest.raises(ConfigError, match="do not take the same pixels"):
        export({"a": models["stage-0"], "b": trained("clip", "image_size=48")}, tmp_path / "new", to="open_clip")
    with pytest.raises(ConfigError, match="give each the name of a folder"):
        export({"a/b": models["stage-0"]}, tmp_path / "new", to="open_clip")
    assert {path.name for path in tmp_path.iterdir()} == {"clip"}


@pytest.mark.slow
@pytest.mark.parametrize("to", ["open_clip", "timm", "hf"])
def test_stages_of_images_are_exported_and_joined(to: str, tmp_path: Path) -> None:
    models = {f"stage-{i}": trained("simclr", backbone=backbone) for i, backbone in enumerate(BACKBONES)}
    export(models, tmp_path / "images", to=to)
    card = {"README.md"} if to == "hf" else set()
    assert {path.name for path in (tmp_path / "images").iterdir()} == {
        *models,
        "stages.json",
        "join.py",
        "written.json",
        *card,
    }


def imported(source: str) -> set[str]:
    """The packages that a program imports."""
    nodes = list(ast.walk(ast.parse(source)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


def test_the_loading_side_is_not_ours_and_has_no_network() -> None:
    used = {"gc", "huggingface_hub", "json", "sys", "tempfile", "pathlib", "typing", "torch", "PIL", "safetensors"}
    assert imported(LOADER.read_text()) == used
    loads = {name: imported(inspect.getsource(target.load)) for name, target in TARGETS.items()}
    assert loads == {"open_clip": {"open_clip"}, "timm": {"timm"}, "onnx": {"runpy", "torch"}}
    assert imported(inspect.getsource(load_joined)) == {"runpy"}
    program = (
        f"import sys; sys.path.insert(0, {str(LOADER.parent)!r}); import load_elsewhere, socket\n"
        "sys.addaudithook(load_elsewhere.close_network); socket.create_connection(('127.0.0.1', 9))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "OSError: loading an export asked for the network" in done.stderr


def num_right(scores: Tensor, target: Tensor, topk: tuple[int, ...]) -> list[float]:
    """As open_clip's own, which turns arrays of one element into floats; numpy 2.4 has stopped doing so."""
    return [float((scores.topk(k)[1] == target[:, None]).sum()) for k in topk]


def test_zero_shot_by_open_clip_is_the_number_of_evaluate(
    run_and_export: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, folder = run_and_export
    monkeypatch.setattr("open_clip_train.zero_shot.accuracy", num_right)
    results = json.loads((run.parent / "evaluation" / "metrics.json").read_text())["results"]
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    classes = yaml.safe_load((CONF / "eval/classes/emoji_val.yaml").read_text())
    tokenizer, names = open_clip.get_tokenizer(f"local-dir:{folder}"), list(classes["names"].values())
    weights = open_clip.build_zero_shot_classifier(model.eval(), tokenizer, names, classes["templates"])
    source, keys = Emoji("val"), list(classes["names"])
    rows = [(preprocess(source.image(i)), keys.index(source.attributes["concept"][i])) for i in range(len(source))]
    arguments = SimpleNamespace(device="cpu", precision="fp32", batch_size=256)
    theirs = open_clip_zero_shot(model, weights, DataLoader(rows, batch_size=256), arguments)
    for k, value in zip((1, 5), theirs, strict=True):
        assert value == pytest.approx(results[f"val/zero_shot_top{k}"]["value"])
        assert value > 1.5 * k / len(names)  # it has learned something

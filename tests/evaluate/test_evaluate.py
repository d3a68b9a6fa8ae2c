"""`repr.evaluate`: runs and foreign models, what is kept, what is left out, what is refused."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import yaml
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file

from repr.config import CONF, ConfigError, compose
from repr.config_check import check, value_faults
from repr.data.sources.emoji import Emoji
from repr.data.sources.folder import Folder
from repr.data.sources.shards import Shards
from repr.evaluate.evaluation import config, evaluate, read_encoder
from repr.evaluate.protocol import read_protocols
from repr.fit import fit
from repr.metrics.classes import Classes, load_classes
from repr.report.exhibits import load_exhibits
from repr.report.page import write_report
from repr.runs.folder import save_config
from tests.conftest import Ended

QUIET = [
    "callbacks.progress=null",
    "data.num_workers=0",
    "data.eval_batch_size=256",
    "+trainer.enable_progress_bar=false",
]
TOWERS = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
PREPROCESS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear", "resize_mode": "squash"}


def run(*overrides: str, **options: Any) -> dict[str, Any]:
    cfg, name, files = config([*overrides, *QUIET])
    check(cfg)
    return evaluate(cfg, data_name=name, class_files=files, **options)


def values(found: dict[str, Any]) -> dict[str, float]:
    return {name: entry["value"] for name, entry in found["results"].items()}


def write_towers(folder: Path, towers: dict[str, Any] = TOWERS) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.model.CLIP(**towers)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    told = {"model_cfg": towers, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(told))
    return f"open_clip:local-dir:{folder}"


@pytest.mark.parametrize("data", sorted(path.stem for path in (CONF / "data").glob("*.yaml")))
def test_no_data_need_a_size_before_the_encoder_tells_its_own(data: str) -> None:
    root = ["data.train.root=x"] if data == "cifar10" else []  # its eval takes it over
    cfg, _, _ = config(["model=timm:resnet18", f"data={data}", "eval=[knn]", *root])
    assert cfg.image_size is None
    for option in OmegaConf.missing_keys(cfg):
        OmegaConf.update(cfg, option, "x")
    assert value_faults(cfg) == []


def test_a_size_of_null_is_told_once_where_the_data_have_their_own() -> None:
    null = ["data.eval.held_out.size=null", "data.train.seed=null"]
    cfg, _, _ = config(["model=timm:resnet18", "data=trifeature", *null])
    faults = ConfigError(value_faults(cfg)).faults
    assert [fault.partition(" is null")[0] for fault in faults] == ["data.train.seed", "data.eval.held_out.size"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of two steps, and what it found at its end."""
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    small = [
        "smoke=true",
        "backbone.name=test_resnet",
        "text.layers=1",
        f"run_folder={folder}",
        "trainer.accelerator=cpu",
    ]
    results = fit(
        compose([*small, "trainer.limit_val_batches=1.0", "data.eval_batch_size=256", "callbacks.pictures=null"])
    )
    return folder, {name: value for name, (value, _) in results.items()}


@pytest.fixture(scope="module")
def of_run(trained: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    return run(
        f"model={trained[0]}", "eval=[knn,ridge,zero_shot,retrieval,geometry,dense]", "eval.knn.ks=[1,20]",
        "eval.dense.num_images=20", "trainer.accelerator=cpu",
    )  # fmt: skip


def test_a_run_has_the_numbers_of_its_training(trained: tuple[Path, dict[str, Any]], of_run: dict[str, Any]) -> None:
    found, online = values(of_run), trained[1]
    renamed = {
        name.replace("knn_", "knn_") + ("_k20_t0.07" if "/knn_" in name else ""): x for name, x in online.items()
    }
    assert len(renamed) > 40
    for name, value in renamed.items():
        assert found[name] == pytest.approx(value, abs=1e-9 if "/" in name and "_R@" in name else 1e-5), name
    assert found.keys() - renamed.keys() > {
        "val/knn_category_k1_t0.07",
        "val/correspondence@0.5",
        "val/knn_miou_figure",
    }


def test_every_number_has_its_protocol(trained: tuple[Path, dict[str, Any]], of_run: dict[str, Any]) -> None:
    written = json.loads((of_run["folder"] / "metrics.json").read_text())
    assert written == {key: value for key, value in of_run.items() if key != "folder"}
    assert of_run["folder"] == trained[0] / "evaluation" / f"own-{of_run['protocol_hash']}"
    knn = written["results"]["val/knn_category_k20_t0.07"]
    assert knn["chance"] == pytest.approx(190 / 1008)
    assert {**knn["protocol"], "mean": 0, "std": 0} == {
        "eval": "knn", "resolution": 32, "resize": "shorter side to the resolution", "crop": "centre",
        "interpolation": "bicubic", "mean": 0, "std": 0, "precision": "32-true", "stored": "float32",
        "features": "trunk", "similarity": "cosine", "vote": "exp(cosine / temperature)", "search": "exact",
        "bank": 64, "k": 20, "temperature": 0.07, "chance": "share of the largest class",
    }  # fmt: skip
    assert written["results"]["val/zero_shot_top1"]["protocol"]["templates"] == ["{}"]
    hashes = {name: entry["protocol_hash"] for name, entry in written["results"].items()}
    assert hashes["val/knn_style_k20_t0.07"] == hashes["test_style/knn_category_k20_t0.07"]
    assert hashes["val/knn_style_k20_t0.07"] != hashes["val/knn_style_k1_t0.07"]
    assert written["left_out"].keys() == {"test_style/zero_shot"}


def test_the_report_shows_it(trained: tuple[Path, dict[str, Any]], of_run: dict[str, Any], tmp_path: Path) -> None:
    write_report([trained[0]], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text().partition('<section id="protocols">')[2].partition("</section>")[0]
    rows = {row[0]: row for row in re.findall(r"<tr><td>([^<]*).*?</td><td[^>]*>(.*?)</td><td[^>]*>(.*?)</td>", page)}
    assert rows.keys() == of_run["results"].keys()
    for name, entry in of_run["results"].items():
        assert rows[name][2] == ("" if entry["chance"] is None else f"{entry['chance']:.4f}")
    assert f">{of_run['results']['val/knn_category_k20_t0.07']['value']:.3f}<" in rows["val/knn_category_k20_t0.07"][1]
    assert page.count("&quot;vote&quot;: &quot;exp(cosine / temperature)&quot;") > 1
    another = tmp_path / "another"  # a model of others has no run folder
    another.mkdir()
    shutil.copy(of_run["folder"] / "metrics.json", another)
    write_report([another], tmp_path / "other.html")
    assert page.partition("</table>")[0] in (tmp_path / "other.html").read_text()


def test_features_are_taken_once_and_again_where_a_file_is_damaged(
    trained: tuple[Path, dict[str, Any]], of_run: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    store = trained[0] / "evaluation" / "features"

    def stamps() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in store.rglob("*.npy")}

    words = [f"model={trained[0]}", "eval=[knn,retrieval]", "eval.knn.ks=[20]", "trainer.accelerator=cpu"]
    before = stamps()
    run(*words)
    assert stamps() == before
    victim = max((path for path in before if path.name == "trunk.npy"), key=lambda path: path.stat().st_size)
    whole = victim.read_bytes()
    for damaged in (whole[:-100], whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:]):
        victim.write_bytes(damaged)
        capsys.readouterr()
        again = run(*words)
        assert f"extracted anew: {victim} is not the file that was written" in capsys.readouterr().out
    assert {path for path, stamp in stamps().items() if stamp != before[path]} == set(victim.parent.glob("*.npy"))
    assert victim.read_bytes() == whole
    same = values(again).keys() & values(of_run).keys()
    assert len(same) > 15
    assert all(values(again)[name] == values(of_run)[name] for name in same)
    half = run(*words, "features=bfloat16")
    sizes = [path.stat().st_size for path in store.rglob("trunk.npy") if path not in before]
    assert len(whole) * 0.4 < max(sizes) < len(whole) * 0.6
    assert values(half) == pytest.approx(values(again), abs=0.03)
    assert half["protocol_hash"] != again["protocol_hash"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 oblong pictures of two classes; most in `some` have captions, all in `all` have one to three."""
    folder, source = tmp_path_factory.mktemp("pictures"), Emoji("val")
    for i in range(40):
        for kind in ("some", "all", "none"):
            path = folder / kind / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            source.image(i * 25).crop((0, i % 7, 64, 60)).save(path)
            texts = [f"{source.captions(i * 25)[0]} {i} {n}" for n in range(1 + i % 3)]
            if kind == "all" or (kind == "some" and i >= 5):
                path.with_suffix(".txt").write_text("\n".join(texts))
            elif kind == "some":
                path.with_suffix(".txt").write_text("\n")
    return folder


def folder_data(root: Path, *, captions: bool, labels: bool) -> list[str]:
    told = {"_target_": "repr.data.sources.folder.Folder", "root": str(root), "captions": captions, "labels": labels}
    words = [f"data.train.{key}={json.dumps(value)}" for key, value in told.items() if key != "_target_"]
    return ["data=folder", *words, *(f"+data.eval.held.{key}={json.dumps(value)}" for key, value in told.items())]


def test_what_an_unlabelled_set_lacks_is_said(pictures: Path, tmp_path: Path) -> None:
    model = write_towers(tmp_path / "model")
    where = [f"out={tmp_path}/out", f"cache={tmp_path}/cache", "eval=[knn,linear,zero_shot,retrieval,geometry,dense]"]
    found = run(f"model={model}", *where, *folder_data(pictures / "none", captions=False, labels=False))
    assert found["left_out"].keys() == {f"held/{name}" for name in ("knn", "linear", "zero_shot", "retrieval", "dense")}
    assert found["left_out"]["held/knn"] == "held has no labels"
    assert found["left_out"]["held/retrieval"] == "held has no captions"
    assert "held/uniformity_image" in found["results"]
    found = run(f"model={model}", *where, *folder_data(pictures / "some", captions=True, labels=True))
    assert found["left_out"]["held/retrieval"] == "5 of 40 pictures have no caption"
    assert found["results"]["held/t2i_R@1"]["chance"] == pytest.approx(1 / 35)
    assert found["left_out"]["held/zero_shot"].startswith("no class file names the labels of held")


def test_timm_models_see_what_timm_shows_them(pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "timm"
    folder.mkdir()
    model = timm.create_model("test_vit", num_classes=0, img_size=64).eval()
    told = {"mean": [0.4, 0.5, 0.6], "std": [0.3, 0.2, 0.25], "interpolation": "bilinear", "crop_pct": 0.8}
    config_json = {
        "architecture": "test_vit", "num_classes": 0, "model_args": {"img_size": 64},
        "pretrained_cfg": {"input_size": [3, 64, 64], "num_classes": 0, "crop_mode": "center", **told},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config_json))
    save_file(model.state_dict(), folder / "model.safetensors")
    encoder = read_encoder(f"timm:local-dir:{folder}", None)
    library = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(library), is_training=False)
    image = Image.open(pictures / "none" / "a" / "0.png").convert("RGB")
    assert torch.equal(encoder.transform(image), transform(image))
    with torch.inference_mode():
        mine = encoder.module.embed({"image": transform(image)[None]})
        torch.testing.assert_close(mine.trunk, library(transform(image)[None]))
    assert (encoder.image_size, encoder.resize) == (64, "shorter side to 80")
    larger = read_encoder(f"timm:local-dir:{folder}", 96)  # a position table can be resized
    assert larger.transform(image).shape == (3, 96, 96)
    where = [f"out={tmp_path}/out", f"cache={tmp_path}/cache", "eval=[knn,dense]", "eval.dense.num_images=8"]
    found = run(f"model=timm:local-dir:{folder}", *where, *folder_data(pictures / "none", captions=False, labels=True))
    assert found["left_out"] == {}
    assert found["results"]["held/knn_label_k10_t0.07"]["protocol"]["interpolation"] == "bilinear"
    assert "held/correspondence@0.5" in found["results"]


def test_open_clip_models_give_open_clips_embeddings(pictures: Path, tmp_path: Path) -> None:
    """Of its own ViT and of its ResNet; the trunk is what its projection is applied to."""
    image = Image.open(pictures / "none" / "a" / "0.png").convert("RGB")
    resnet = TOWERS | {"vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}}
    for name, towers in (("vit", TOWERS), ("resnet", resnet)):
        encoder = read_encoder(write_towers(tmp_path / name, towers), None)
        library, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / name}")
        assert torch.equal(encoder.transform(image), transform(image))
        tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / name}")(["a cat", "two dogs"])
        assert torch.equal(encoder.tokenizer(["a cat", "two dogs"]), tokens)
        with torch.inference_mode():
            mine, theirs = encoder.module.embed({"image": transform(image)[None]}), library.eval()
            torch.testing.assert_close(mine.image, theirs.encode_image(transform(image)[None]))
            torch.testing.assert_close(encoder.module.encode_text(tokens), theirs.encode_text(tokens))
            if name == "vit":
                assert mine.trunk.shape == (1, 32)
                torch.testing.assert_close(mine.trunk @ theirs.visual.proj, mine.image)
    with pytest.raises(
        ValueError, match="cannot take pictures of 96 x 96 pixels, and its image size cannot be changed"
    ):
        read_encoder(f"open_clip:local-dir:{tmp_path}/resnet", 96)
    assert read_encoder(f"open_clip:local-dir:{tmp_path}/vit", 48).image_size == 48


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=nowhere"], "model=nowhere does not exist; give a run folder"),
        (["model=open_clip:ViT-Q", "data=emoji"], "open_clip has no model 'ViT-Q'"),
        (["model=open_clip:ViT-B-32/nobody", "data=emoji"], "no file and no tag of ViT-B-32; it has openai"),
        (["model=timm:resnet5", "data=emoji"], "timm does not have; nearest: resnet"),
        (["model=timm:local-dir:nowhere", "data=emoji"], "nowhere is no folder"),
        (["model=x", "eval=[knm]"], "eval has no option 'knm'; did you mean 'knn'"),
        (["model=timm:x", "evl=[knn]"], "there is no option 'evl'; did you mean 'eval'"),
        (["model=timm:x", "eval=[knn]", "eval.knn.kss=[3]"], "did you mean 'eval.knn.ks'"),
        (["model=timm:x", "features=half"], "features=half; set it to float32 or bfloat16"),
        (["data=emoji"], "model has no value: set it"),
        (["model=timm:test_resnet", "data=folder", "data.train.root=."], "data.eval names no set"),
    ],
)
def test_bad_input_is_one_clear_error(
    words: list[str], message: str, tmp_path: Path, pictures: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(pictures / "none")
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        run(*words, f"out={tmp_path}", f"cache={tmp_path}/cache")


def test_labels_that_a_class_file_lacks_are_named(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    content = {"attribute": "category", "templates": ["{}"], "names": {"Flags": "flags"}}
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=r"zero_shot.classes.val: the class file lacks \d of the \d labels of val"):
        run(f"model={trained[0]}", "eval=[zero_shot]", f"eval.zero_shot.classes={{val: {tmp_path}/few.yaml}}")


def test_several_class_files_and_classes_that_the_data_lack(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    names = [*sorted(set(Emoji("val").attributes["category"])), "Unicorns"]
    for templates in (["{}"], ["{}", "a picture of {}"]):
        content = {"attribute": "category", "templates": templates, "names": {name: name for name in names}}
        (tmp_path / f"t{len(templates)}.yaml").write_text(yaml.safe_dump(content))
    files = f"[{tmp_path}/t1.yaml, {tmp_path}/t2.yaml]"
    found = run(f"model={trained[0]}", "eval=[zero_shot]", f"eval.zero_shot.classes={{val: {files}}}")
    assert set(found["results"]) == {f"val/zero_shot_t{n}_top{k}" for n in (1, 2) for k in (1, 5)}
    assert found["results"]["val/zero_shot_t1_top1"]["chance"] == pytest.approx(190 / 1008)  # of the largest class
    assert found["results"]["val/zero_shot_t1_top1"]["protocol"]["chance"].startswith("share of the largest class")


def test_a_run_is_evaluated_with_the_class_files_that_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by name in a folder of one's own; the file is gone, and the program is started elsewhere."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "eval" / "classes").mkdir(parents=True)
    file = tmp_path / "mine" / "eval" / "classes" / "ours.yaml"
    file.write_text(
        "attribute: category\ntemplates: ['my {}']\nnames: {on: light, 1e3: lot, 2020-01-01: date, ~: none}"
    )
    given = ["eval.zero_shot.classes={val: ours}", f"run_folder={tmp_path}/run"]
    before = Classes.load(file)
    for more in ([], ["smoke=true"]):
        save_config(compose([*given, *more], config_dir="mine"), tmp_path / "run")
    file.unlink()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    shape = CONF / "eval" / "classes" / "trifeature_shape.yaml"
    for words, others in (([], {}), (["eval.zero_shot.classes={test_style: trifeature_shape}"], {"test_style": shape})):
        cfg, _, _ = config([f"model={tmp_path}/run", "eval=[zero_shot]", *words])
        protocol = read_protocols(OmegaConf.to_container(cfg.eval, resolve=True))["zero_shot"]
        assert {name: load_classes(files) for name, files in protocol.classes.items()} == {
            name: {"zero_shot": classes}
            for name, classes in {"val": before, **{name: Classes.load(path) for name, path in others.items()}}.items()
        }


def test_questions_and_exhibits(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Of a set that is drawn, beside one that asks nothing."""
    drawn = "{_target_: repr.data.drawn.composition.DrawnComposition, num_items: 8}"
    words = [
        f"model={trained[0]}",
        "data=emoji",
        "eval=[compositional,exhibits]",
        "eval.exhibits.num_points=20",
        f"out={tmp_path}/out",
    ]
    found = run(*words, "~data.eval.test_style", f"+data.eval.drawn={drawn}", f"cache={tmp_path}", "data.bank_size=50")
    assert found["left_out"] == {"val/compositional": "val asks no questions"}
    assert found["results"]["drawn/group_score"]["chance"] == pytest.approx(1 / 6)
    assert found["results"]["drawn/text_score"]["protocol"]["context_length"] == 16
    shown = load_exhibits(tmp_path / "out")
    assert shown.keys() == {"val", "drawn"}
    assert shown["val"]["gallery/image_to_text/nearest"].shape == (6, 5)


@pytest.mark.slow
def test_fine_tuning_learns_what_a_random_backbone_does_not_know(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    words = [f"model={trained[0]}", "data=trifeature", "data.train.renders=1", "eval=[ridge,finetune]", "seed=1"]
    words += ["eval.finetune.attributes=[colour]", "eval.finetune.epochs=6", "eval.finetune.batch_size=32"]
    words += ["eval.finetune.lr=3e-3", f"out={tmp_path}/out", f"cache={tmp_path}/cache"]
    found = run(*words, "trainer.accelerator=cpu")
    tuned = found["results"]["held_out/finetune_colour"]
    assert tuned["value"] > 0.5
    assert tuned["chance"] < 0.15
    assert tuned["protocol"]["layer_decay"] == 0.75
    assert found["results"].keys() >= {"held_out/ridge_colour", "held_out/ridge_shape"}
    assert values(run(*words, "trainer.accelerator=cpu"))["held_out/finetune_colour"] == tuned["value"]
    towers = run(f"model={write_towers(tmp_path / 'model')}", *words[1:])
    assert "not one of timm's" in towers["left_out"]["held_out/finetune"]


@pytest.mark.slow
def test_two_processes_write_what_one_does(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, processes: Callable[..., list[Ended]]
) -> None:
    words = [
        f"model={trained[0]}",
        "eval=[knn,retrieval,geometry,dense]",
        "eval.dense.num_images=21",
        f"cache={tmp_path}/c2",
    ]
    command = [
        sys.executable,
        "-m",
        "repr.evaluate",
        *words,
        *QUIET,
        f"out={tmp_path}/two",
        "trainer=ddp",
        "trainer.accelerator=cpu",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    one = run(*words, f"out={tmp_path}/one", f"cache={tmp_path}/c1")
    assert two["results"].keys() == one["results"].keys()
    assert values(two) == pytest.approx(values(one), abs=1e-5)
    for ended in processes(2, *command[2:]):
        assert ended.status == 0, ended.err
    assert json.loads((tmp_path / "two" / "metrics.json").read_text()) == two


OPENCLIPART = Path(__file__).parents[3] / "shared" / "data" / "openclipart"


@dataclass
class Rows:
    """What clip-benchmark takes for a loader."""

    batches: list[Any]
    classes: list[str]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    @property
    def dataset(self) -> "Rows":
        return self


@pytest.mark.slow
def test_clip_benchmark_finds_the_same_on_the_same_pictures(tmp_path: Path) -> None:
    """A model with random weights in a folder, drawings with one or two captions each: zero-shot and retrieval."""
    classification = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification", reason="make test has it")
    retrieval = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval", reason="make test installs it")
    if not OPENCLIPART.is_dir():
        pytest.skip("the drawings of openclipart are not at ../shared/data/openclipart")
    shards = Shards(f"{OPENCLIPART}/val-*.tar", captions=["txt", "json:title"], labels=["json:category"])
    seen: set[str] = set()
    for row, label in enumerate(shards.attributes["category"]):
        texts = [text for text in dict.fromkeys(shards.captions(row)) if text not in seen]
        if label and texts:  # of equal captions none could be told to be right
            seen.update(texts)
            path = tmp_path / "drawings" / label / f"{row:05}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(shards.encoded(row))
            path.with_suffix(".txt").write_text("\n".join(texts))
    source = Folder(tmp_path / "drawings", labels=True, captions=True)
    labels = list(source.attributes["label"])
    names, templates = sorted(set(labels)), ["a drawing of {}.", "{}"]
    content = {"attribute": "label", "templates": templates, "names": {name: name for name in names}}
    (tmp_path / "category.yaml").write_text(yaml.safe_dump(content))
    name = write_towers(tmp_path / "model", TOWERS | {"embed_dim": 64})
    found = run(
        f"model={name}", *folder_data(tmp_path / "drawings", captions=True, labels=True), "eval=[zero_shot,retrieval]",
        f"eval.zero_shot.classes={{held: {tmp_path}/category.yaml}}", f"out={tmp_path}/out", f"cache={tmp_path}/cache",
    )  # fmt: skip

    model, _, transform = open_clip.create_model_and_transforms(name.removeprefix("open_clip:"))
    tokenizer = open_clip.get_tokenizer(name.removeprefix("open_clip:"))
    images = torch.stack([transform(source.image(row)) for row in range(len(source))]).split(100)
    targets = torch.tensor([names.index(label) for label in labels]).split(100)
    captions = [source.captions(row) for row in range(len(source))]
    texts = [captions[i : i + 100] for i in range(0, len(captions), 100)]
    told = [template.replace("{}", "{c}") for template in templates]
    loader = Rows(list(zip(images, targets, strict=True)), names)
    classifier = classification.zero_shot_classifier(model.eval(), tokenizer, names, told, "cpu", amp=False)
    logits, target = classification.run_classification(model, classifier, loader, "cpu", amp=False)
    hits = logits.topk(5).indices == target[:, None]  # as its `accuracy`, which needs an older numpy
    assert values(found)["held/zero_shot_top1"] == hits[:, 0].double().mean().item()
    assert values(found)["held/zero_shot_top5"] == hits.any(1).double().mean().item()
    loader = Rows(list(zip(images, texts, strict=True)), names)
    theirs = retrieval.evaluate(model, loader, tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
    for k in (1, 5, 10):
        assert values(found)[f"held/i2t_R@{k}"] == pytest.approx(theirs[f"text_retrieval_recall@{k}"], abs=1e-7)
        assert values(found)[f"held/t2i_R@{k}"] == pytest.approx(theirs[f"image_retrieval_recall@{k}"], abs=1e-7)
    assert len(source) > 250
    assert max(map(len, captions)) == 2
    assert values(found)["held/t2i_R@10"] > 0

import runpy

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue

from repr.config import CONF
from repr.data.drawn.trifeature import ATTRIBUTES
from repr.data.sources.emoji import Emoji
from repr.data.views import View
from repr.metrics.classes import Classes


@pytest.fixture
def config(tmp_path):
    def make(data, views, *overrides):
        (tmp_path / "run.yaml").write_text(
            f"defaults: [{{data: {data}}}, {{views: {views}}}, _self_]\n"
            "seed: 7\nimage_size: 48\ntokenizer: null\nhard_captions: null\ndistorted_captions: null\n"
            f"hydra: {{searchpath: ['file://{CONF}']}}\n"
        )
        with initialize_config_dir(str(tmp_path), version_base=None):
            return compose("run", list(overrides))

    return make


def test_emoji_config_builds_and_gives_batches(config):
    datamodule = instantiate(config("emoji", "clip_small", "data.num_workers=0", "data.batch_size=8").data)
    assert type(datamodule.eval) is dict
    assert datamodule.eval_names == ["bank", "val", "test_style"]
    assert datamodule.seed == 7
    batch = next(iter(datamodule.train_dataloader()))
    assert [view.shape for view in batch["views"]] == [(8, 3, 48, 48)]
    assert batch["label"].shape == (8, 4)
    assert {name: len(classes) for name, classes in datamodule.attributes.items()} == {
        "category": 9, "subcategory": 98, "style": 6, "concept": 1907,
    }  # fmt: skip


def test_folder_config_needs_a_root(config, tmp_path):
    with pytest.raises(MissingMandatoryValue, match=r"data\.train\.root"):
        instantiate(config("folder", "simclr").data)
    for row in range(4):
        Emoji("val").image(row).save(tmp_path / f"{row}.png")
    overrides = f"data.train.root={tmp_path}", "data.batch_size=4", "data.num_workers=0"
    datamodule = instantiate(config("folder", "simclr", *overrides).data)
    batch = next(iter(datamodule.train_dataloader()))
    assert [view.shape for view in batch["views"]] == [(4, 3, 48, 48)] * 2


@pytest.mark.parametrize("name", ["clip", "clip_small", "simclr", "byol"])
def test_views_are_views(config, name):
    views = instantiate(config("emoji", name).views, _convert_="all")
    assert all(isinstance(view, View) for view in views.values())


def test_class_file_is_what_the_tool_writes(root):
    path = root / "conf" / "eval" / "classes" / "emoji_val.yaml"
    assert path.read_text(encoding="utf-8") == runpy.run_path(str(root / "tools" / "emoji_classes.py"))["class_file"](
        "val"
    )
    classes, val = OmegaConf.to_container(OmegaConf.load(path)), Emoji("val")
    assert classes["attribute"] == "concept"
    assert classes["templates"] == ["{}"]
    expected = {concept: val.captions(row)[0] for row, concept in enumerate(val.attributes["concept"])}
    assert classes["names"] == expected
    assert len(expected) == 293


def test_trifeature_config_builds_and_its_class_files_are_its_attributes(config, root):
    datamodule = instantiate(config("trifeature", "clip_small", "data.num_workers=0", "data.batch_size=8").data)
    assert (len(datamodule.train), len(datamodule.eval["held_out"])) == (4800, 600)
    assert next(iter(datamodule.train_dataloader()))["label"].shape == (8, 3)
    assert datamodule.train.image(0).size == (48, 48)
    for attribute, names in ATTRIBUTES.items():
        classes = Classes.load(root / "conf" / "eval" / "classes" / f"trifeature_{attribute}.yaml")
        assert (classes.attribute, list(classes.names.values())) == (attribute, names)
        assert sorted(classes.ids(datamodule.attributes[attribute])) == list(range(10))

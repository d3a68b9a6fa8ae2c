import pickle
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from repr.batch import NO_CLASS
from repr.data.datamodule import DataModule
from repr.data.drawn.scenes import COLOURS, SHAPES, Scenes, Thing, paint
from repr.data.eval_datasets import DenseDataset
from repr.data.sources.emoji import Emoji
from repr.data.sources.folder import Folder
from repr.data.sources.mixture import Mixture
from repr.data.views import View, evaluation_masks, evaluation_view
from repr.evaluate.during_training import GatheredTables
from repr.evaluate.protocols import Dense

CROPS = [View(size=16, scale=(0.3, 0.8), flip=0.5)] * 2


def pixels(source, rows):
    return [np.asarray(source.image(row)) for row in rows]


def test_a_row_is_a_function_of_seed_split_and_index():
    source, rows = Scenes("train", num_images=40), [7, 0, 39, 7]
    first = pixels(source, rows)
    for other in (Scenes("train", num_images=5000), pickle.loads(pickle.dumps(source))):
        assert all(np.array_equal(a, b) for a, b in zip(first, pixels(other, rows), strict=True))
        assert list(other.attributes["shape"])[:40] == list(source.attributes["shape"])
    assert np.array_equal(first[0], np.asarray(Image.open(BytesIO(source.encoded(7)))))
    assert not np.array_equal(first[0], pixels(Scenes("train", num_images=40, seed=1), [7])[0])
    assert (source.key(7), len(source)) == ("train-000007", 40)


def test_splits_share_no_scene():
    seen = {picture.tobytes() for split in ("train", "val") for picture in pixels(Scenes(split), range(40))}
    assert len(seen) == 80


def test_masks_attributes_and_captions_tell_of_the_same_objects():
    source = Scenes("val", num_images=60, num_objects=(2, 5))
    names = list(source.mask_classes)
    assert names == ["figure", "shape", "colour", "texture"]
    for row in range(60):
        masks, things = source.masks(row), source.things(row)
        assert masks.shape == (4, 64, 64)
        assert (masks.astype(bool) == masks[0].astype(bool)).all()  # ground is ground in all of them
        assert source.attributes["count"][row] == str(len(things))
        front, caption = things[-1], source.captions(row)[0]
        assert caption.count(" and ") == len(things) - 1
        column, line = (int(64 * place) for place in front.centre)
        for number, name in enumerate(names[1:]):
            label = source.attributes[name][row]
            assert label == source.mask_classes[name][front.classes[number] + 1]
            assert label in caption.split(" and ")[0]
            assert source.mask_classes[name].index(label) in masks[number + 1]
        if source.attributes["shape"][row] in ("circle", "square", "star"):
            assert masks[1][line, column] == front.classes[0] + 1  # nothing lies in front of the largest


@pytest.mark.parametrize(
    ("shape", "area"),
    [("circle", np.pi * 0.81), ("ring", np.pi * (0.96**2 - 0.44**2)), ("square", 2.56), ("bar", 1.44),
     ("cross", 2 * 1.9 * 0.66 - 0.66**2), ("star", 10 * 0.5 * 0.44 * np.sin(np.pi / 5)), ("triangle", 1.404)],
)  # fmt: skip
@pytest.mark.parametrize("turn", [0.0, 0.13])
def test_a_mask_has_the_area_of_its_shape_and_the_edge_is_smooth(shape, area, turn):
    canvas, masks = np.full((128, 128, 3), 100, np.float32), np.zeros((4, 128, 128), np.uint8)
    thing = Thing((list(SHAPES).index(shape), 0, 0), (0.504, 0.504), 0.25, np.float32([turn, 0.5, 0, 0, 0, 0]))
    paint(thing, canvas, masks)
    assert masks[0].sum() / 32**2 == pytest.approx(area, rel=0.03)
    inside = canvas[masks[0] == 1]
    assert np.median(inside, axis=0) == pytest.approx(COLOURS["red"], rel=0.15)
    assert np.unique(canvas[..., 0].round()).size > 20  # not two values with a jagged border


def test_classes_are_even_and_the_figure_is_a_part():
    source = Scenes("train", num_images=2000)
    for name, num in {"shape": 8, "colour": 6, "texture": 5, "count": 4}.items():
        counts = np.unique(list(source.attributes[name]), return_counts=True)[1]
        assert len(counts) == num
        assert counts.min() > 0.75 * 2000 / num
    assert 0.15 < np.mean([source.masks(row)[0].mean() for row in range(50)]) < 0.35


@pytest.mark.parametrize(
    ("options", "message"),
    [({"split": "test"}, r"set split to one of \['train', 'val'\]"), ({"size": 16}, "size from 32 to 224"),
     ({"num_images": 0}, "set num_images >= 1"), ({"num_objects": (4, 3)}, "num_objects"),
     ({"num_objects": (1, 9)}, "1 to 8"), ({"radius": (0.0, 0.2)}, "radius")],
)  # fmt: skip
def test_errors_say_what_to_set(options, message):
    with pytest.raises(ValueError, match=message):
        Scenes(**{"split": "train", **options})


def test_masks_go_through_the_same_crop_as_the_picture():
    mask = np.random.default_rng(0).integers(0, 4, (5, 8), np.uint8).repeat(8, axis=0).repeat(8, axis=1)  # 40 x 64
    palette = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
    for size in (20, 40, 80):
        picture = evaluation_view(Image.fromarray(palette[mask]), size).permute(1, 2, 0).numpy()
        seen = palette[evaluation_masks(mask[None], size)[0].numpy()]
        assert seen.shape == picture.shape
        close = np.abs(seen.astype(int) - picture).max(-1) < 100  # a border between colours is in between
        assert close.mean() > 0.97, size
    assert evaluation_masks(np.empty((0, 4, 4), np.uint8), 8).shape[0] == 0


def test_figure_and_ground_of_the_emoji():
    source = Emoji("val")
    masks = np.stack([source.masks(row) for row in range(0, 1000, 40)])
    assert masks.shape == (25, 1, 64, 64)
    assert source.mask_classes == {"figure": ["ground", "figure"]}
    assert 0.4 < masks.mean() < 0.8
    corners = masks[:, 0][:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.mean() < 0.1  # ground
    for row, mask in zip(range(0, 1000, 40), masks[:, 0], strict=True):
        white = (np.asarray(source.image(row)) >= 250).all(-1)
        assert not mask[white].any()


def test_a_mixture_has_the_masks_of_all():
    scenes, emoji = Scenes("val", num_images=3), Emoji("val")
    both = Mixture([scenes, emoji])
    assert both.mask_classes == scenes.mask_classes
    assert np.array_equal(both.masks(2), scenes.masks(2))
    assert np.array_equal(both.masks(3)[0], emoji.masks(0)[0])
    assert (both.masks(3)[1:] == NO_CLASS).all()

    class Other(Scenes):
        @property
        def mask_classes(self):
            return {"figure": ["no", "yes"]}

    with pytest.raises(ValueError, match="masks named 'figure' have the classes"):
        Mixture([scenes, Other("val", num_images=1)])


def test_batches_of_dense_evaluation(tmp_path):
    for row in range(4):
        Image.fromarray(np.full((30, 40, 3), 50 * row, np.uint8)).save(tmp_path / f"{row}.png")
    (tmp_path / "2.png").write_bytes(b"no picture")
    source = Mixture([Scenes("val", num_images=2), Folder(tmp_path)])
    batch = DenseDataset(source, torch.arange(6), 24, CROPS, source.mask_classes).__getitems__([0, 1, 4, 5])
    assert batch["index"].tolist() == [0, 1, -5, 5]
    assert [row for row, _ in batch["bad"]] == [4]
    assert batch["mask"].shape == (4, 4, 24, 24)
    assert torch.equal(batch["mask"][1], evaluation_masks(source.masks(1), 24))
    assert (batch["mask"][2:] == NO_CLASS).all()
    assert torch.equal(batch["image"][0], evaluation_view(source.image(0), 24))
    assert [crop.shape for crop in batch["crops"]] == [(4, 3, 16, 16)] * 2
    again = DenseDataset(source, torch.arange(6), 24, CROPS, source.mask_classes).__getitems__([1])
    assert torch.equal(again["boxes"][0], batch["boxes"][1])
    assert torch.equal(again["crops"][1][0], batch["crops"][1][1])
    assert not torch.equal(batch["boxes"][0], batch["boxes"][1])
    plain = DenseDataset(Folder(tmp_path), torch.arange(4), 24, CROPS, ["figure"]).__getitems__([0])
    assert "mask" not in plain


def test_dense_evaluation_spreads_them_over_a_set(make_datamodule):
    options = {"train": Scenes("train", num_images=30), "eval": {"val": Scenes("val", num_images=9)}, "bank_size": 20}
    datamodule: DataModule = make_datamodule(**options)
    tables = GatheredTables(SimpleNamespace(datamodule=datamodule, precision="32-true"), torch.nn.Identity())
    views = {"main": View(size=16, scale=(0.3, 0.8), count=2)}
    requests = [tables._wanted[tables.want_maps(name, views, 5)] for name in ("bank", "val")]
    bank, val = (datamodule.in_order(request.dataset()) for request in requests)
    assert torch.cat([batch["index"] for batch in bank]).tolist() == [0, 6, 12, 18, 24]
    assert torch.cat([batch["index"] for batch in val]).tolist() == [0, 1, 3, 5, 7]
    assert [request.rows.tolist() for request in requests] == [[0, 6, 12, 18, 24], [0, 1, 3, 5, 7]]
    batch = next(iter(val))
    boxes, crops = batch["boxes"], batch["crops"]
    sent = datamodule.on_after_batch_transfer(batch, 1)
    assert all(crop.is_floating_point() for crop in sent["crops"])
    assert torch.equal(sent["boxes"], boxes)
    assert crops[0].dtype == torch.uint8
    one = {"main": {"_target_": "repr.data.views.View", "size": 16, "scale": [0.3, 0.8]}}
    for given, words in (({}, "at least one view"), (one, r"gives 1 crops; set it to two \(count: 2\)")):
        with pytest.raises(ValueError, match=words):
            Dense(metrics={}, views=given, num_images=5)
    dense = Dense(metrics={}, views={"main": one["main"] | {"count": 2}}, num_images=0)
    assert [*dense.option_faults()] == ["eval.protocol.num_images=0; set it above 0"]

"""What the report shows agrees with the metrics of the same tables, and stays small."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from repr.metrics.exhibits import NamedClasses, exhibits
from repr.metrics.features import Features
from repr.metrics.retrieval import retrieval
from repr.metrics.zero_shot import zero_shot


@pytest.fixture(scope="module")
def tables() -> tuple[Features, Features]:
    """A bank of 200 rows and a set of 60 of three classes, each caption twice; every seventh row of a source."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 8, generator=generator)

    def table(num: int, noise: float) -> Features:
        label = torch.arange(num) % 3
        image, text, trunk = (centres[label] + noise * torch.randn(num, 8, generator=generator) for _ in range(3))
        caption = torch.arange(num) // 2
        text = text[caption * 2]
        labels = {"kind": label, "one": torch.zeros_like(label), "none": torch.full_like(label, -1)}
        return Features(torch.arange(num) * 7, image, torch.cat([trunk, trunk], 1), text, caption, labels)

    return table(200, 0.8), table(60, 0.8)


NAMES = {"kind": ["a", "b", "c"], "one": ["x"], "none": ["y"]}


def test_they_agree_with_the_metrics(tables: tuple[Features, Features]) -> None:
    bank, query = tables
    classes = {
        "attribute": "kind",
        "class_embeddings": query.image[torch.tensor([2, 0, 1])],
        "class_labels": torch.tensor([2, 0, 1]),
    }
    known = {"zero_shot": NamedClasses(*classes.values(), ["see", "ay", "bee"])}
    found = exhibits(bank, query, attributes=NAMES, num_queries=60, classes=known)
    values = retrieval(query) | zero_shot(query, **classes)
    right = found["gallery/image_to_text/right/caption"]
    assert right.shape == (60, 5)
    assert (right == 1).any(1).mean() == pytest.approx(values["i2t_R@5"])
    assert (right[:, 0] == 1).mean() == pytest.approx(values["i2t_R@1"])
    right = found["gallery/text_to_image/right/caption"]
    assert right.shape == (30, 5)  # a caption asks once
    assert (right == 1).any(1).mean() == pytest.approx(values["t2i_R@5"])
    true, predicted, count = found["confusion/zero_shot/kind"].T
    assert count.sum() == 60
    assert found["names/kind"].tolist() == ["ay", "bee", "see"]
    more = NamedClasses(
        "kind", torch.cat([classes["class_embeddings"], query.image[3:4]]), torch.tensor([2, 0, 1, 5]), [*"abcd"]
    )
    found = exhibits(bank, query, attributes=NAMES, classes={"zero_shot": more})
    assert found["names/kind"].tolist() == ["b", "c", "a", "", "", "d"]  # one that the data lack can be said too
    assert count[true == predicted].sum() / 60 == pytest.approx(values["zero_shot_top1"])


def test_pictures_find_their_nearest_in_the_bank(tables: tuple[Features, Features]) -> None:
    bank, query = tables
    found = exhibits(bank, query, attributes=NAMES, num_queries=4, num_nearest=3)
    rows = np.array([0, 15, 30, 45])
    assert found["gallery/image_to_image/query"].tolist() == (rows * 7).tolist()
    cosine = F.cosine_similarity(query.trunk[rows][:, None], bank.trunk[None], dim=2).numpy()
    nearest = np.argsort(-cosine, axis=1)[:, :3]
    assert found["gallery/image_to_image/nearest"].tolist() == (nearest * 7).tolist()
    assert (
        found["gallery/image_to_image/right/kind"].tolist() == (nearest % 3 == rows[:, None] % 3).astype(int).tolist()
    )
    all_nearest = F.cosine_similarity(query.trunk[:, None], bank.trunk[None], dim=2).argmax(1) % 3
    table = np.zeros((3, 3), dtype=int)
    np.add.at(table, (np.arange(60) % 3, all_nearest.numpy()), 1)
    true, predicted, count = found["confusion/nearest/kind"].T
    assert table[true, predicted].tolist() == count.tolist()
    assert count.sum() == 60
    assert (np.diff(count) <= 0).all()


def test_the_map_keeps_distances(tables: tuple[Features, Features]) -> None:
    bank, query = tables
    found = exhibits(bank, query, attributes=NAMES, num_points=30)
    assert found["rows"].tolist() == list(range(0, 420, 14))
    assert found["labels/kind"].tolist() == [2 * i % 3 for i in range(30)]
    assert not {"labels/one", "labels/none"} & found.keys()  # nothing to tell apart
    x = F.normalize(query.image[::2].double(), dim=1)
    pca = torch.from_numpy(found["map/pca"]).double()  # of eight dimensions none is lost
    torch.testing.assert_close(torch.cdist(pca, pca), torch.cdist(x, x), atol=1e-5, rtol=0)
    assert found["map/pairs"].shape == (30, 2, 2)


def test_images_alone_and_unlabelled_sets_say_what_is_left_out(tables: tuple[Features, Features]) -> None:
    bank, query = tables
    bare = Features(query.index, query.image, query.image)
    found = exhibits(Features(bank.index, bank.image, bank.image), bare, attributes={})
    assert {name for name in found if name.startswith("left_out/")} == {
        "left_out/image_to_text", "left_out/zero_shot", "left_out/labels",
    }  # fmt: skip
    assert {name.split("/")[1] for name in found if name.startswith("gallery/")} == {"image_to_image"}
    assert not any(name.startswith(("confusion/", "labels/")) for name in found)
    assert [name for name in found if name.startswith("spectrum/")] == ["spectrum/image"]


def test_features_that_cannot_be_drawn_are_told() -> None:
    def found(image: torch.Tensor) -> dict:
        table = Features(torch.arange(len(image)), image, image)
        return exhibits(table, table, attributes={})

    assert list(found(torch.ones(2, 3))) == ["left_out/all"]
    assert "NaN" in str(found(torch.full((9, 3), torch.nan))["left_out/all"])
    collapsed = found(torch.ones(9, 3))
    assert np.abs(collapsed["map/pca"]).max() < 1e-6
    assert found(torch.arange(9.0)[:, None])["map/pca"].shape == (9, 2)


def test_of_several_captions_of_an_image_the_first_counts(tables: tuple[Features, Features]) -> None:
    bank, query = tables
    text = torch.cat([query.text.flip(0), query.text])  # the second half is what belongs to the images
    rows = torch.arange(len(query.image))
    pairs = torch.stack([rows, rows + len(rows)], dim=1)
    more = torch.cat([pairs, torch.stack([rows[:5], torch.full_like(rows[:5], 2 * len(rows) - 1)], dim=1)])
    several = exhibits(bank, replace(query, text=text, pairs=more), attributes={})
    one = exhibits(bank, replace(query, caption=rows), attributes={})  # each caption is one of its own
    assert several.keys() == one.keys()
    assert all(np.array_equal(several[name], one[name]) for name in one)
    without = exhibits(bank, replace(query, text=text, pairs=pairs[1:]), attributes={})
    assert "left_out/image_to_text" in without  # the first image has no caption

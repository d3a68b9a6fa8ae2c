"""The drawn set of three attributes: a function of its options, as many of each value as promised, and told apart."""

from collections import Counter
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from repr.data.drawn.trifeature import ATTRIBUTES, Trifeature, draw_object


def pixels(source: Trifeature, index: int) -> np.ndarray:
    return np.array(source.image(index), dtype=np.int64)


def test_combinations_are_split_and_all_rendered() -> None:
    train, held_out = Trifeature("train", renders=2), Trifeature("held_out", renders=3)
    assert (len(train), len(held_out)) == (1600, 600)
    parts = [{train.key(i).split("/")[0] for i in range(1600)}, {held_out.key(i).split("/")[0] for i in range(600)}]
    assert [len(part) for part in parts] == [800, 200]
    assert not parts[0] & parts[1]
    assert len({train.key(i) for i in range(1600)}) == 1600
    for source in (train, held_out):
        for attribute, names in ATTRIBUTES.items():
            assert set(source.attributes[attribute]) == set(names), attribute
    assert parts[0] != {key.split("/")[0] for key in map(Trifeature("train", renders=1, seed=1).key, range(800))}


def test_a_picture_is_a_function_of_seed_combination_and_render() -> None:
    few, many = Trifeature("train", renders=2, size=32), Trifeature("train", renders=5, size=32)
    assert few.key(7) == many.key(16)
    assert (pixels(few, 7) == pixels(many, 16)).all()
    assert (pixels(few, 7) != pixels(few, 6)).any()
    assert (pixels(few, 7) != pixels(Trifeature("train", renders=2, size=32, seed=1), 7)).any()
    assert (np.array(Image.open(BytesIO(few.encoded(7)))) == pixels(few, 7)).all()


@pytest.mark.parametrize("size", [32, 64, 224])
def test_objects_lie_on_the_canvas_and_edges_are_smooth(size: int) -> None:
    source = Trifeature("held_out", renders=1, size=size)
    for index in range(0, 200, 9):
        image = source.image(index)
        assert (image.size, image.mode) == ((size, size), "RGB")
        array = np.array(image, dtype=np.int64)
        border = np.concatenate([array[0], array[-1], array[:, 0], array[:, -1]])
        assert (border == 150).mean() > 0.7, source.key(index)
        assert 0.05 < (array != 150).any(2).mean() < 0.6, source.key(index)
    solid = next(i for i in range(200) if source.attributes["texture"][i] == "solid")
    assert len(np.unique(pixels(source, solid).reshape(-1, 3), axis=0)) > 2


def test_textures_can_be_told_apart_at_the_smallest_size() -> None:
    """By their spectrum without its direction, averaged over draws: each is nearest to itself in other draws."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(32), np.fft.fftfreq(32))) * 32
    rings = [(frequency >= ring) & (frequency < ring + 1) for ring in range(16)]

    def spectrum(texture: str, seed: int) -> np.ndarray:
        draws = np.random.default_rng(seed).random((40, 7)).tolist()
        images = [draw_object("black", "circle", texture, draws=row, size=32) for row in draws]
        power = np.abs(np.fft.fft2([np.array(image.convert("L")) - 150.0 for image in images])).mean(0)
        return np.log([power[ring].mean() for ring in rings])

    first, second = (np.stack([spectrum(texture, seed) for texture in ATTRIBUTES["texture"]]) for seed in (0, 1))
    nearest = np.linalg.norm(first[:, None] - second[None], axis=2).argmin(1)
    assert nearest.tolist() == list(range(10))


def test_captions_fill_the_templates() -> None:
    source = Trifeature("train", templates={"a {texture} {colour} {shape}": 3, "{colour} {shape}": 1})
    colour, shape, texture = (source.attributes[name][5] for name in ("colour", "shape", "texture"))
    assert source.captions(5) == [f"a {texture} {colour} {shape}", f"{colour} {shape}"]
    assert source.caption_weights(5) == [3.0, 1.0]
    assert all(f"{colour} {shape}" in text and texture in text for text in Trifeature("train").captions(5))


def test_hues_colour_the_canvas_and_are_an_attribute() -> None:
    source = Trifeature("train", renders=1, size=32, hues=4)
    corners = {(source.attributes["canvas"][i], tuple(pixels(source, i)[0, 0])) for i in range(60)}
    assert Counter(hue for hue, _ in corners) == {f"hue {number}": 1 for number in range(4)}
    assert len({colour for _, colour in corners}) == 4
    assert Trifeature("train", renders=1).attributes.keys() == set(ATTRIBUTES)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"split": "val"}, "split"),
        ({"size": 16}, "size from 32 to 224"),
        ({"renders": 0}, "renders"),
        ({"hues": -1}, "hues"),
        ({"templates": {}}, "templates is empty"),
        ({"templates": {"a {color} square": 1}}, "colour"),
        ({"templates": {"a {colour} square": 0}}, "positive weight"),
    ],
)
def test_bad_options_say_what_to_set(options: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Trifeature(**{"split": "train", **options})

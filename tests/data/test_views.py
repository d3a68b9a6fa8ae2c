import io
from functools import partial
from math import log

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from scipy.stats import chisquare, ks_2samp, kstest
from torchvision.transforms import v2

from repr.data.sources.pictures import decode
from repr.data.views import Colour, View, boxes, crop_record, crop_views, draw, evaluation_view, expand, reduction
from repr.seeds import sample_seed

SIMCLR = View(
    size=8, scale=(0.08, 1), flip=0.5, brightness=0.8, contrast=0.8, saturation=1.2, hue=0.2, jitter_prob=0.8,
    gray_prob=0.2, blur_prob=0.5, solarize_prob=0.1,
)  # fmt: skip


def seeds(num):
    return sample_seed(0, 0, torch.arange(num))


def records(view, height, width, num):
    crops, _ = draw(seeds(num), [view])
    return np.array([crop_record(sample, view, height, width) for sample in crops[:, 0].tolist()])


@pytest.mark.parametrize("size", [(375, 500), (64, 64), (40, 90)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.9, 1.0)])
def test_crops_follow_torchvisions_law(size, scale):
    height, width = size
    theirs = v2.RandomResizedCrop(8, scale=scale)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    expected = [theirs.make_params([image]) for _ in range(3000)]
    ours = records(View(size=8, scale=scale), height, width, 3000)
    for column, name in enumerate(("top", "left", "height", "width")):
        result = ks_2samp(ours[:, column], [params[name] for params in expected])
        assert result.pvalue > 1e-3, name


@pytest.mark.parametrize("size", [(300, 30), (30, 300), (30, 30), (37, 41)])
def test_where_no_try_fits_the_crop_is_torchvisions(size):
    view = View(size=8, scale=(1, 1), ratio=(0.75, 4 / 3))
    torch.manual_seed(0)
    expected = v2.RandomResizedCrop(8, scale=view.scale, ratio=view.ratio).make_params([torch.empty(3, *size)])
    draws = [0.999] * 23  # ratio 4/3 of the whole area never fits
    if size == (37, 41):
        expected = {"top": 0, "left": 0, "height": 37, "width": 41}
    assert crop_record(draws, view, *size)[:4] == tuple(expected[k] for k in ("top", "left", "height", "width"))


def test_area_ratio_and_flip():
    ours = records(View(size=8, scale=(0.2, 0.4), ratio=(0.5, 2), flip=0.3), 2000, 2000, 4000)
    area = ours[:, 2] * ours[:, 3] / 4e6
    assert kstest(area, "uniform", args=(0.2, 0.2)).pvalue > 1e-3
    assert kstest(np.log(ours[:, 3] / ours[:, 2]), "uniform", args=(log(0.5), log(4))).pvalue > 1e-3
    assert ours[:, 4].mean() == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (2, 3)])
def test_crops_of_tiny_images_lie_inside(size):
    for top, left, height, width, _ in records(View(size=8, scale=(0.08, 1)), *size, 200):
        assert 0 <= top < top + height <= size[0]
        assert 0 <= left < left + width <= size[1]


def test_colour_law():
    _, colour = draw(seeds(20000), [SIMCLR])
    columns = dict(zip(Colour, colour[:, 0].T.numpy(), strict=True))
    jittered = columns[Colour.BRIGHTNESS] != 1
    assert jittered.mean() == pytest.approx(0.8, abs=0.015)
    ranges = {"BRIGHTNESS": (0.2, 1.6), "CONTRAST": (0.2, 1.6), "SATURATION": (0, 2.2), "HUE": (-0.2, 0.4)}
    for name, args in ranges.items():
        values = columns[Colour[name]]
        assert kstest(values[jittered], "uniform", args=args).pvalue > 1e-3, name
        assert set(values[~jittered]) == {0.0 if name == "HUE" else 1.0}
    assert columns[Colour.GRAY].mean() == pytest.approx(0.2, abs=0.015)
    assert columns[Colour.SOLARIZE].mean() == pytest.approx(0.1, abs=0.015)
    blurred = columns[Colour.BLUR] > 0
    assert blurred.mean() == pytest.approx(0.5, abs=0.015)
    assert kstest(columns[Colour.BLUR][blurred], "uniform", args=(0.1, 1.9)).pvalue > 1e-3
    assert chisquare(np.bincount(columns[Colour.ORDER].astype(int), minlength=24)).pvalue > 1e-3
    correlation = np.corrcoef(np.stack(list(columns.values()))[:, jittered])
    assert np.abs(correlation - np.eye(len(Colour))).max() < 0.035


def test_colour_is_neutral_by_default():
    _, colour = draw(seeds(100), [View(size=8, scale=(1, 1))])
    assert torch.equal(colour[:, 0, :-1], torch.tensor([1.0, 1, 1, 0, 0, 0, 0]).expand(100, -1))


def test_options_and_views_do_not_shift_each_other():
    plain = View(size=8, scale=(0.3, 1))
    crops, colour = draw(seeds(50), [SIMCLR])
    more_crops, more_colour = draw(seeds(50), [SIMCLR, plain])
    assert torch.equal(more_crops[:, :1], crops)
    assert torch.equal(more_colour[:, :1], colour)
    assert torch.equal(draw(seeds(50), [plain])[0], crops)
    assert not (more_crops[:, 0] == more_crops[:, 1]).any(dim=0).all()
    without_gray = View(**{**vars(SIMCLR), "gray_prob": 0.0})
    other = draw(seeds(50), [without_gray])[1]
    kept = [column for column in Colour if column != Colour.GRAY]
    assert torch.equal(other[:, :, kept], colour[:, :, kept])


def test_a_sample_does_not_depend_on_its_batch():
    together, alone = draw(seeds(9), [SIMCLR]), draw(seeds(9)[4:5], [SIMCLR])
    for whole, part in zip(together, alone, strict=True):
        assert torch.equal(whole[4:5], part)


def test_boxes_match_pixpros_golden_values(root):
    golden = np.load(root / "tests" / "golden" / "pixpro_coords.npz")
    for case in sorted({name.split("/")[0] for name in golden}):
        width, height = golden[f"{case}/image_size_wh"]
        size, box = np.array([height, width]), golden[f"{case}/box_i_j_h_w"]
        flip = int(golden[f"{case}/hflip"])
        assert np.array_equal(boxes(np.array([*box, 0]), size), golden[f"{case}/coord_before_flip"])
        assert np.array_equal(boxes(np.array([*box, flip]), size), golden[f"{case}/coord_after_hflip"])
    assert boxes(np.array([0, 0, 1, 1, 1]), np.array([1, 1])).tolist() == [0, 0, 0, 0]


def test_boxes_say_where_the_pixels_are_from():
    """In an image whose red is the column and green the row, the corners of a view hold its box."""
    rows, columns = np.mgrid[0:200, 0:250].astype(np.uint8)
    image = Image.fromarray(np.stack([columns, rows, rows], axis=-1))
    view = View(size=40, scale=(0.3, 0.8), flip=0.5)
    crops, _ = draw(seeds(40), [view])
    (pixels,), box = crop_views([image] * 40, crops, [view])
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (40, 3, 40, 40)
    assert (box.dtype, box.shape) == (torch.float32, (40, 1, 4))
    corners = pixels[:, (0, 1), (0, 0), (0, 0)], pixels[:, (0, 1), (-1, -1), (-1, -1)]
    found = torch.cat(corners, dim=1) / torch.tensor([249.0, 199, 249, 199])
    assert (found - box[:, 0]).abs().max() < 0.02  # half a pixel of the view
    assert (box[:, 0, 2] < box[:, 0, 0]).float().mean() == pytest.approx(0.5, abs=0.3)


@pytest.mark.parametrize("shape", [(60, 80), (80, 60), (61, 83), (31, 64), (97, 20), (500, 333)])
def test_evaluation_view_is_torchvisions_resize_and_centre_crop(shape):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8))
    ours = evaluation_view(image, 30)
    theirs = v2.Compose([v2.Resize(30, v2.InterpolationMode.BICUBIC), v2.CenterCrop(30), v2.PILToTensor()])(image)
    assert torch.equal(ours, theirs)
    square = Image.fromarray(rng.integers(0, 256, (30, 30, 3), np.uint8))
    assert np.array_equal(evaluation_view(square, 30).numpy(), np.asarray(square).transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": (0.5, 1.5)}, "scale"),
        ({"scale": (0, 1)}, "scale"),
        ({"ratio": (2, 1)}, "ratio"),
        ({"flip": 1.5}, "flip=1.5; set a value from 0 to 1"),
        ({"hue": 0.6}, "from 0 to 0.5"),
        ({"contrast": -1}, "contrast"),
        ({"blur_sigma": [0, 2]}, "blur_sigma"),
        ({"count": 0}, "count"),
    ],
)
def test_view_errors(options, message):
    with pytest.raises(ValueError, match=message):
        View(**{"size": 8, "scale": (0.5, 1), **options})


def test_expand():
    large, small = View(size=16, scale=[0.5, 1], count=2), View(size=8, scale=[0.5, 1])
    assert expand([large, small]) == [large, large, small]
    for wrong in ([small, large], []):
        with pytest.raises(ValueError, match="large ones first"):
            expand(wrong)


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1), (64, 64), (375, 500)])
def test_views_that_torch_resizes_are_pillows_crops_resized(size):
    image = Image.fromarray(np.random.default_rng(0).integers(100, 156, (*size, 3), np.uint8))
    view = View(size=24, scale=(0.2, 1), flip=0.5)
    draws, _ = draw(seeds(20), [view])
    decoded = decode(stored(image, "PNG"), "a", reduction=lambda width, height: 8)
    (pixels,), _ = crop_views([decoded] * 20, draws, [view])
    for found, sample in zip(pixels, draws[:, 0].tolist(), strict=True):
        top, left, height, width, flip = crop_record(sample, view, *size)
        crop = image.crop((left, top, left + width, top + height)).resize((24, 24), Image.Resampling.BICUBIC)
        expected = np.asarray(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else crop).transpose(2, 0, 1)
        assert np.abs(found.numpy().astype(int) - expected).max() <= 2


# Decoding at a scale of the JPEG --------------------------------------------------------------------------------------

VIEWS = [View(size=40, scale=(0.2, 0.9), flip=0.5), View(size=20, scale=(0.3, 0.8))]


def stored(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, quality=95, **options)
    return file.getvalue()


def ramps(width, height, mode="RGB"):
    """Red tells the column, green the row: where a view is from can be seen."""
    x, y = np.linspace(0, 250, width), np.linspace(0, 250, height)[:, None]
    pixels = np.stack(np.broadcast_arrays(x, y, (x + y) / 2), -1)
    return Image.fromarray(pixels.round().astype(np.uint8)).convert(mode)


def oriented(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


LARGE = {
    "plain": stored(ramps(800, 600)),
    "odd": stored(ramps(803, 597)),
    "progressive": stored(ramps(800, 600), progressive=True),
    "gray": stored(ramps(800, 600, "L")),
    "CMYK": stored(ramps(800, 600, "CMYK")),
    **{f"orientation {n}": stored(ramps(800, 600), exif=oriented(n)) for n in range(2, 9)},
    **{f"odd, orientation {n}": stored(ramps(804, 602), exif=oriented(n)) for n in (3, 6)},
    "several pictures": stored(ramps(800, 600), "MPO", save_all=True, append_images=[ramps(800, 600)]),
}


@pytest.mark.parametrize("kind", LARGE)
def test_a_large_jpeg_decoded_at_a_scale_gives_the_same_views(kind):
    draws, _ = draw(seeds(12), VIEWS)
    whole = decode(LARGE[kind], kind)
    reductions = [partial(reduction, sample, VIEWS) for sample in draws.tolist()]
    small = [decode(LARGE[kind], kind, reduction=ask) for ask in reductions]
    assert {image.size for image in small} > {whole.size} or max(image.width for image in small) <= 402
    for image, ask in zip(small, reductions, strict=True):
        divisor = ask(*whole.size)
        assert divisor in (2, 4, 8)
        assert image.info["scaled"][:2] == whole.size
        if "odd, " not in kind:  # which could be shifted
            assert image.size == tuple(-(-side // divisor) for side in whole.size)
    expected, expected_boxes = crop_views([whole] * 12, draws, VIEWS)
    found, found_boxes = crop_views(small, draws, VIEWS)
    assert torch.equal(found_boxes, expected_boxes)
    for one, other in zip(found, expected, strict=True):
        difference = (one.int() - other).abs().float()
        assert difference.mean() < 0.6
        assert difference.max() <= 5


def test_what_a_picture_is_divided_by_follows_from_its_size_and_views():
    def divisors(size, width, height):
        view = View(size=size, scale=(0.5, 1))
        samples = draw(seeds(50), [view])[0].tolist()
        sides = [min(crop_record(sample[0], view, height, width)[2:4]) for sample in samples]
        found = [reduction(sample, [view], width, height) for sample in samples]
        for side, divisor in zip(sides, found, strict=True):
            assert divisor == 1 or side / divisor >= size
            assert divisor == 8 or side / (2 * divisor) < size
        return set(found)

    assert divisors(32, 640, 480) == {8}
    assert divisors(32, 300, 300) == {4, 8}
    assert divisors(224, 500, 375) == {1}
    large, small = draw(seeds(1), VIEWS)[0].tolist()[0]
    assert reduction([large, small], VIEWS, 800, 600) == min(
        reduction([large], VIEWS[:1], 800, 600), reduction([small], VIEWS[1:], 800, 600)
    )


@pytest.mark.parametrize("data", [stored(ramps(60, 50)), stored(ramps(800, 600), "PNG")], ids=["small", "PNG"])
def test_other_pictures_are_decoded_as_they_were(data):
    draws, _ = draw(seeds(3), VIEWS)
    for sample in draws.tolist():
        image = decode(data, "a", reduction=partial(reduction, sample, VIEWS))
        assert np.array_equal(image, decode(data, "a"))
        assert image.info["scaled"] == (*image.size, 1)


def test_what_a_file_says_of_itself_is_no_scale():
    text = PngInfo()
    text.add_text("scaled", "(8, 8, 8)")
    image = decode(stored(ramps(60, 50), "PNG", pnginfo=text), "a")
    assert "scaled" in image.info
    draws, _ = draw(seeds(1), VIEWS)
    for one, other in zip(
        crop_views([image], draws, VIEWS)[0], crop_views([ramps(60, 50)], draws, VIEWS)[0], strict=True
    ):
        assert torch.equal(one, other)


def test_damage_is_told_at_every_scale():
    for data in (LARGE["plain"][:-900], LARGE["plain"][:200], b""):
        told = []
        for ask in (None, lambda width, height: 8):
            with pytest.raises(OSError, match=r"^a\.jpg: not readable as an image") as fault:
                decode(data, "a.jpg", reduction=ask)
            told.append(str(fault.value).partition("(")[0])
        assert told[0] == told[1]

from itertools import permutations

import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from repr.data.colour import colour_views, gaussian_blur, normalise, shift_hue
from repr.data.views import Colour, View, draw
from repr.seeds import sample_seed

# torchvision's gray has 0.2989 red where we (and ITU-R 601) have 0.299.
TOLERANCE = {"atol": 5e-4, "rtol": 0}
PLAIN = {"mean": (0, 0, 0), "std": (1, 1, 1)}
STRONG = View(
    size=20, scale=(1, 1), brightness=0.8, contrast=0.8, saturation=0.8, hue=0.4, jitter_prob=0.8,
    gray_prob=0.2, blur_prob=0.5, solarize_prob=0.3,
)  # fmt: skip


def images(num, size=20):
    """Smooth images, noise, and some gray and black pixels, where hue is not defined."""
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(0, 256, (num, 3, size, size), generator=generator, dtype=torch.uint8)
    batch[::2] = tv.gaussian_blur(batch[::2], [7, 7])
    batch[:, :, :3] = batch[:, :1, :3]
    batch[:, :, 3] = 0
    return batch


def drawn(num, *views):
    return draw(sample_seed(1, 2, torch.arange(num)), views)[1]


def by_torchvision(image, colour):
    """One sample through torchvision's functions: (3, H, W) uint8 -> float."""
    image = image / 255
    adjust = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue]
    factors = colour[:4].tolist()
    for turn in list(permutations(range(4)))[int(colour[Colour.ORDER])]:
        if factors[turn] != (0 if turn == Colour.HUE else 1):
            image = adjust[turn](image, factors[turn])
    if colour[Colour.GRAY]:
        image = tv.rgb_to_grayscale(image, num_output_channels=3)
    if sigma := colour[Colour.BLUR].item():
        reach = min(int((4 * colour[Colour.BLUR]).ceil()), image.shape[-1] - 1)
        image = tv.gaussian_blur(image, [2 * reach + 1] * 2, [sigma] * 2)
    return tv.solarize(image, 128 / 255) if colour[Colour.SOLARIZE] else image


def test_every_sample_matches_torchvision():
    num = 96
    view, colour = images(num), drawn(num, STRONG)
    assert len(colour[:, 0, Colour.ORDER].unique()) == 24
    (ours,) = colour_views([view], colour, **PLAIN)
    for sample in range(num):
        expected = by_torchvision(view[sample], colour[sample, 0])
        close = torch.isclose(ours[sample], expected, **TOLERANCE)
        # a value within the tolerance of solarize's threshold may fall on its other side
        near = torch.isclose(ours[sample] + expected, torch.ones(()), atol=2e-3) & bool(
            colour[sample, 0, Colour.SOLARIZE]
        )
        assert (close | near).all(), sample


@pytest.mark.parametrize("column", list(Colour)[:-1])
def test_one_operation_alone(column):
    colour = torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 0]).repeat(8, 1, 1)
    colour[1:, :, column] = torch.tensor([0.3, 0.7, 1.6, 0.1, 0.4, 0.2, 0.45])[:, None]
    if column in (Colour.GRAY, Colour.SOLARIZE):
        colour[1:, :, column] = 1
    view = images(8)
    (ours,) = colour_views([view], colour, **PLAIN)
    assert torch.equal(ours[0], view[0] / 255)  # neutral
    for sample in range(1, 8):
        if column == Colour.HUE:
            colour[sample, 0, column] = (colour[sample, 0, column] + 0.5) % 1 - 0.5
        torch.testing.assert_close(ours[sample], by_torchvision(view[sample], colour[sample, 0]), **TOLERANCE)


def test_samples_do_not_depend_on_their_batch():
    view, colour = images(24), drawn(24, STRONG)
    (together,) = colour_views([view], colour, **PLAIN)
    for sample in (0, 7, 23):
        (alone,) = colour_views([view[sample : sample + 1]], colour[sample : sample + 1], **PLAIN)
        torch.testing.assert_close(alone[0], together[sample], atol=1e-6, rtol=0)


def test_inputs_are_not_changed_and_float_views_pass():
    ready = torch.rand(4, 3, 5, 5)
    view, colour = images(4), drawn(4, STRONG, STRONG)
    before = view.clone(), colour.clone()
    ours = colour_views([view, ready], colour, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3))
    assert ours[1] is ready
    assert torch.equal(view, before[0])
    assert torch.equal(colour, before[1])
    assert ours[0].dtype == torch.float32


def test_normalise():
    view, mean, std = images(2), (0.5, 0.4, 0.3), (0.1, 0.2, 0.3)
    expected = tv.normalize(view / 255, mean, std)
    torch.testing.assert_close(normalise(view, mean, std), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(normalise(view / 255, mean, std), expected, atol=1e-6, rtol=0)


def test_hue_turns_full_circle():
    view = images(3) / 255
    torch.testing.assert_close(shift_hue(view, torch.tensor([0.0, 1.0, -1.0])), view, atol=2e-6, rtol=0)
    red = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1)
    torch.testing.assert_close(shift_hue(red, torch.tensor([1 / 3])).flatten(), torch.tensor([0.0, 1, 0]))


def test_blur_keeps_constants_and_is_clipped_to_small_images():
    torch.testing.assert_close(
        gaussian_blur(torch.full((2, 3, 4, 6), 0.7), torch.tensor([0.1, 9])), torch.tensor(0.7).expand(2, 3, 4, 6)
    )


def test_everything_runs_on_the_device_of_the_views():
    """Torch's meta device refuses to mix with CPU tensors, as a GPU does."""
    (ours,) = colour_views([images(48).to("meta")], drawn(48, STRONG), **PLAIN)
    assert (ours.device.type, ours.shape, ours.dtype) == ("meta", (48, 3, 20, 20), torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("colour_moves", [False, True])
def test_a_gpu_gives_the_same(colour_moves, device):
    """To a level of 255, but where a value at solarize's threshold falls on its other side."""
    view, colour = images(96), drawn(96, STRONG)
    (ours,) = colour_views([view.to(device)], colour.to(device) if colour_moves else colour, **PLAIN)
    (expected,) = colour_views([view], colour, **PLAIN)
    close = (ours.cpu() - expected).abs() <= 1 / 255
    solarized = colour[:, 0, Colour.SOLARIZE].bool()[:, None, None, None]
    assert (close | (solarized & torch.isclose(ours.cpu() + expected, torch.ones(()), atol=2e-3))).all()
    assert torch.isclose(ours.cpu(), expected, atol=1e-5).float().mean() > 0.9999

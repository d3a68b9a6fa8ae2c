"""Augmented views, device half: uint8 pixels and drawn colour parameters -> normalised float views.

Pure functions of a batch on any device, with one parameter a sample. The law is that of torchvision's ColorJitter,
RandomGrayscale, GaussianBlur and RandomSolarize on float images.

kornia's functions give the same, but these are faster (ms an image of 224 x 224, one CPU core, batches of 32): hue 1.8
against 4.9, blur 0.75 against 3.4; one pass of 0.6 serves brightness, contrast and saturation (0.1, 0.5 and 0.8).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import permutations

import torch
from torch import Tensor
from torch.nn import functional

from repr.data.views import Colour

_ORDERS = torch.tensor(list(permutations(range(4))))  # (24, 4), columns of Colour in the order of acting
_NEUTRAL = torch.tensor([1.0, 1.0, 1.0, 0.0])
_SOLARIZE_FROM = 128 / 255
_BLUR_REACH = 4.0  # standard deviations at which the Gaussian is cut off (6e-5 of its mass)


def colour_views(views: Sequence[Tensor], colour: Tensor, mean: Sequence[float], std: Sequence[float]) -> list[Tensor]:
    """Apply the drawn colour parameters and normalise.

    Brightness, contrast, saturation and hue act in the sample's own order, then gray, blur, solarize. Views that are
    float already are returned as they are.

    Args:
        views: V tensors (B, 3, H_v, W_v) uint8.
        colour: (B, V, P) float32, columns as in :class:`repr.data.views.Colour`. It is read on the CPU, so that one on
            a GPU waits for the device.
        mean: of the three channels, of pixels in [0, 1].
        std: likewise.

    Returns:
        V tensors (B, 3, H_v, W_v) float32 on the device of the views.
    """
    plan = colour.cpu()
    return [
        view if view.is_floating_point() else normalise(_coloured(view, plan[:, v]), mean, std)
        for v, view in enumerate(views)
    ]


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """``(images - mean) / std`` by channel: (B, 3, H, W), float in [0, 1] or uint8 -> (B, 3, H, W) float32."""
    shift, scale = _to(torch.tensor([[*mean], [*std]], dtype=torch.float32)[..., None, None], images)  # (3, 1, 1) each
    return (_unit(images) - shift).div_(scale)


def _unit(images: Tensor) -> Tensor:
    return images if images.is_floating_point() else images.float().div_(255)


def _to(values: Tensor, like: Tensor) -> Tensor:
    """Small CPU tensor to the device of another, without waiting for what runs there."""
    return values.to(like.device, non_blocking=True)


def _coloured(view: Tensor, colour: Tensor) -> Tensor:
    """One view, uint8 -> float in [0, 1]; ``colour`` is (B, P) on the CPU."""
    x = _unit(view)
    _jitter_(x, colour)
    _on_rows_(x, colour[:, Colour.GRAY] == 1, _luma)
    _on_rows_(x, colour[:, Colour.BLUR] > 0, gaussian_blur, colour[:, Colour.BLUR])
    _on_rows_(x, colour[:, Colour.SOLARIZE] == 1, lambda rows: torch.where(rows >= _SOLARIZE_FROM, 1 - rows, rows))
    return x


def _on_rows_(x: Tensor, mask: Tensor, function: Callable[..., Tensor], *params: Tensor) -> None:
    """``x[mask] = function(x[mask], *params[mask])`` in place; mask (B,) and params (B, ...) lie on the CPU."""
    rows = mask.nonzero()[:, 0]
    if len(rows):
        index = _to(rows, x)
        changed = function(x.index_select(0, index), *(param[rows] for param in params))
        x.index_copy_(0, index, changed.expand(-1, 3, -1, -1))


def _jitter_(x: Tensor, colour: Tensor) -> None:
    """Brightness, contrast, saturation and hue in place, each sample in its order.

    At each of the four positions one blend serves all samples whose turn is not hue.
    """
    factors = colour[:, :4]
    order = _ORDERS[colour[:, Colour.ORDER].long()]  # (B, 4)
    active = factors != _NEUTRAL
    for position in range(4):
        turn = order[:, position : position + 1]  # (B, 1), which of the four acts
        factor, acts = factors.gather(1, turn), active.gather(1, turn)
        is_hue = turn == Colour.HUE
        if (acts & ~is_hue).any():
            _blend_(x, torch.where(is_hue, 1.0, factor), turn)
        _on_rows_(x, (acts & is_hue)[:, 0], shift_hue, factor[:, 0])


def _blend_(x: Tensor, factor: Tensor, turn: Tensor) -> None:
    """``clamp(f x + (1 - f) t)`` in place; t is black for brightness, mean gray for contrast, gray for saturation.

    ``x`` is (B, 3, H, W) in [0, 1]; ``factor`` and ``turn``, a column of :class:`Colour`, are (B, 1) on the CPU.
    """
    rest = 1 - factor
    weights = torch.stack([factor, rest * (turn == Colour.CONTRAST), rest * (turn == Colour.SATURATION)])
    keep, to_mean, to_gray = _to(weights[..., None, None], x)  # (B, 1, 1, 1) each
    gray = _luma(x)
    target = gray.mean(dim=(2, 3), keepdim=True) * to_mean + gray * to_gray  # (B, 1, H, W)
    x.mul_(keep).add_(target).clamp_(0, 1)


def _luma(x: Tensor) -> Tensor:
    """Gray value by ITU-R 601: (B, 3, H, W) -> (B, 1, H, W)."""
    return (x[:, 0:1] * 0.299).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:3], alpha=0.114)


def shift_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of RGB images; value and saturation stay.

    A channel is a fixed piecewise-linear function of the hue, so HSV itself is never built.

    Args:
        x: (B, 3, H, W) in [0, 1].
        turns: (B,), 1 = once around the circle.
    """
    red, green, blue = x.unbind(1)
    value = x.amax(1)  # (B, H, W)
    chroma = value - x.amin(1)
    divisor = torch.where(chroma == 0, 1.0, chroma)
    of_red, of_green, of_blue = (green - blue) / divisor, (blue - red) / divisor + 2, (red - green) / divisor + 4
    hue = torch.where(value == red, of_red, torch.where(value == green, of_green, of_blue))  # in sixths of a turn
    hue = hue.add_(6 * _to(turns, x)[:, None, None])
    distance = (hue[:, None] + _to(torch.tensor([5.0, 3.0, 1.0]), x)[:, None, None]).remainder_(6)  # (B, 3, H, W)
    return value[:, None] - chroma[:, None] * torch.minimum(distance, 4 - distance).clamp_(0, 1)


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Blur each sample with its own width, edges reflected.

    The kernel is cut at four standard deviations of the sample, so that no sample's result depends on the widths of the
    others in the batch.

    Args:
        x: (B, C, H, W) float.
        sigma: (B,) standard deviations in pixels, on the CPU, all > 0.
    """
    batch, channels, height, width = x.shape
    reach = (_BLUR_REACH * sigma).ceil().clamp(max=min(height, width) - 1)[:, None]  # (B, 1)
    radius = int(reach.max())
    steps = torch.arange(-radius, radius + 1)
    taps = torch.exp(-0.5 * (steps / sigma[:, None]) ** 2) * (steps.abs() <= reach)  # (B, K)
    taps = _to((taps / taps.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0), x)
    x = functional.pad(x.reshape(1, batch * channels, height, width), [radius] * 4, mode="reflect")
    x = functional.conv2d(x, taps[:, None, None, :], groups=batch * channels)
    x = functional.conv2d(x, taps[:, None, :, None], groups=batch * channels)
    return x.view(batch, channels, height, width)

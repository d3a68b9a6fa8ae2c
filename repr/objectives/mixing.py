"""What M3CoL mixes, and by which losses it compares modalities."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from repr.losses import mixup
from repr.objectives.loss_choice import Loss

LEVELS = ("embedding", "input")


@dataclass(frozen=True)
class Mixing:
    """Which samples are mixed, where and how long, and how modalities are compared.

    Args:
        levels: modality -> where it is mixed: ``embedding``, which those have that are not named, or ``input``.
        switch: share of the run with the mixed contrast, rounded down to whole epochs, or to steps where
            ``trainer.max_steps`` alone limits the run.
        draw: ``(seed, stream=...) -> (perm, lam)``; the stream is the number of the modality.
        mixed_loss: ``(mixed, other, perm=..., lam=...)`` before the switch.
        clean_loss: ``(a, b)`` after it.
        mix_other: the other modality is mixed too, as it is in the authors' code by a slip. To reproduce its numbers.

    Raises:
        ValueError: there is no such level, text is mixed at the input, or the switch is no share.
    """

    levels: Mapping[str, str] = field(default_factory=dict)
    switch: float = 0.33
    draw: Callable[..., tuple[Tensor, Tensor]] = mixup.draw_mix
    mixed_loss: Loss = mixup.mixed_contrast
    clean_loss: Loss = mixup.soft_clip
    mix_other: bool = False

    def __post_init__(self) -> None:
        for name, level in self.levels.items():
            if level not in LEVELS:
                raise ValueError(f"levels.{name}={level}; set it to {' or '.join(LEVELS)}")
        if self.levels.get("text") == "input":
            raise ValueError("levels.text=input: token ids cannot be mixed; set it to embedding")
        if not 0 <= self.switch <= 1:
            raise ValueError(f"switch={self.switch}; set it to a share of the run, from 0 to 1")

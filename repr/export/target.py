"""What a target of exports consists of, and what every one of them is shown and must give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor

from repr.data.colour import normalise
from repr.data.sources.emoji import Emoji
from repr.data.sources.pictures import decode, read_picture
from repr.data.views import evaluation_view
from repr.runs.trained import Trained

NUM_PICTURES = 6  # square ones; two more are not

Answers = Mapping[str, Tensor]
Loaded = tuple[Any, Any, Any]  # model, transform of a PIL picture, tokenizer or None


@dataclass(frozen=True)
class Target:
    """A library that encoders are written for: what ``to=NAME`` means.

    Attributes:
        write: ``write(trained, folder, samples)`` fills an empty folder; it gives the arguments that ``load`` needs
            beside the folder, and our own answers to the samples, which those of the library must equal.
        load: ``load(folder, **arguments)`` gives a model with ``encode_image`` (or one that is called itself) and
            ``encode_text``, the transform of a PIL picture, and the tokenizer or None. Its source alone is run in
            another process, where nothing of this package can be imported: whatever it uses, it imports itself.
        mark: files by which a folder is known as such an export, which ``force=true`` may replace.
        missing: says what must be installed first, or None.
    """

    write: Callable[..., tuple[dict[str, Any], Answers]]
    load: Callable[..., Loaded]
    mark: tuple[str, ...]
    missing: Callable[[], str | None] = lambda: None


@dataclass(frozen=True)
class Export:
    """An export that is written and not yet verified.

    Attributes:
        to: the name of its target.
        folder: where it lies.
        load: of its target.
        arguments: those of ``load`` beside the folder.
        answers: what it must give.
        hub: whether it is loaded by the name that it will have on Hugging Face's hub; then the library that reads it.
    """

    to: str
    folder: Path
    load: Callable[..., Loaded]
    arguments: Mapping[str, Any]
    answers: Answers
    hub: str | None = None


@dataclass(frozen=True)
class Samples:
    """Real pictures and captions, in files of ``folder``."""

    folder: Path

    @cached_property
    def _rows(self) -> tuple[list[Path], list[str]]:
        source = Emoji("test_style")
        rows = [i * len(source) // NUM_PICTURES for i in range(NUM_PICTURES)]
        paths = []
        for row in rows:
            paths.append(self.folder / f"{row}.webp")
            paths[-1].write_bytes(source.encoded(row))
        for row, box in ((rows[1], (3, 0, 48, 64)), (rows[2], (0, 11, 64, 48))):  # upright and wide
            paths.append(self.folder / f"{row}_crop.png")
            source.image(row).crop(box).save(paths[-1])
        captions = [source.captions(row)[0] for row in rows]
        return paths, [*captions, " and ".join(captions * 4), "Ünïcode & <b>signs</b> 🎈"]

    @property
    def pictures(self) -> list[Path]:
        """Image files."""
        return self._rows[0]

    @property
    def captions(self) -> list[str]:
        """Short ones, one that is longer than any context, one with signs."""
        return self._rows[1]


def our_answers(trained: Trained, samples: Samples, *, trunk: bool = False) -> dict[str, Tensor]:
    """What our own towers make of the samples: ``pixels``, ``image`` and, where there is text, ``tokens`` and ``text``.

    Args:
        trained: the objective.
        samples: what it is shown.
        trunk: ``image`` is the backbone's output, without a projection; no text.
    """
    data, objective = trained.cfg.data, trained.objective
    views = [evaluation_view(decode(read_picture(str(path)), str(path)), data.image_size) for path in samples.pictures]
    pixels = normalise(torch.stack(views), data.mean, data.std)
    encode = objective.backbone if trunk else objective.encode_image
    with torch.inference_mode():
        answers = {"pixels": pixels, "image": encode(pixels)}
        if trained.has_text and not trunk:
            answers["tokens"] = instantiate(trained.cfg.tokenizer)(samples.captions)
            answers["text"] = objective.encode_text(answers["tokens"])
    return answers

"""What a target of exports consists of, and what each export is shown and must give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor

from repr.config import ConfigError
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
        write: ``write(trained, folder, samples)`` fills an empty folder and returns the arguments that ``load`` needs
            beside the folder, and our own answers to the samples, which those of the library must equal. It raises
            ``ConfigError`` where the library cannot express the objective.
        load: ``load(folder, **arguments)`` returns a model with ``encode_image`` (or one that is called itself) and
            ``encode_text``, the transform of a PIL picture, and the tokenizer or None. Its source alone is run in
            another process, where nothing of this package can be imported: whatever it uses, it imports itself. Where
            the folder is a name on the hub instead, ``cache_dir`` is the only argument.
        missing: returns what must be installed first, as a sentence, or None.
    """

    write: Callable[..., tuple[dict[str, Any], Answers]]
    load: Callable[..., Loaded]
    missing: Callable[[], str | None] = lambda: None


@dataclass(frozen=True)
class Export:
    """An export that is written and not yet verified.

    Attributes:
        to: what errors call its target.
        folder: where it lies.
        load: see :class:`Target`; so are ``arguments`` and ``answers``.
        hub: the library that reads it by the name that it will have on Hugging Face's hub; None: it is loaded from
            its folder.
    """

    to: str
    folder: Path
    load: Callable[..., Loaded]
    arguments: Mapping[str, Any]
    answers: Answers
    hub: str | None = None


class Samples:
    """Real pictures and captions, which every export is shown.

    Args:
        folder: where the pictures are written.

    Attributes:
        pictures: image files, square ones, an upright and a wide one.
        captions: short ones, one that is longer than any context, one with signs.
    """

    def __init__(self, folder: Path) -> None:
        source = Emoji("test_style")
        rows = [i * len(source) // NUM_PICTURES for i in range(NUM_PICTURES)]
        self.pictures = [folder / f"{row}.webp" for row in rows]
        for row, path in zip(rows, self.pictures, strict=True):
            path.write_bytes(source.encoded(row))
        for row, box in ((rows[1], (3, 0, 48, 64)), (rows[2], (0, 11, 64, 48))):
            self.pictures.append(folder / f"{row}_crop.png")
            source.image(row).crop(box).save(self.pictures[-1])
        captions = [source.captions(row)[0] for row in rows]
        self.captions = [*captions, " and ".join(captions * 4), "Ünïcode & <b>signs</b> 🎈"]


def our_answers(trained: Trained, samples: Samples, *, trunk: bool = False) -> dict[str, Tensor]:
    """What our own towers make of the samples: ``pixels``, ``image`` and, where there is text, ``tokens`` and ``text``.

    With ``trunk``, ``image`` is the backbone's output without a projection, and there is no text.

    Raises:
        ConfigError: a text tower was trained, and the config has no tokenizer.
    """
    data, objective = trained.cfg.data, trained.objective
    has_text = trained.has_text and not trunk
    if has_text and trained.cfg.get("tokenizer") is None:
        raise ConfigError(
            [f"{trained.name} encodes text, and tokenizer is null: set it to the one that it was trained with"]
        )
    views = [evaluation_view(decode(read_picture(str(path)), str(path)), data.image_size) for path in samples.pictures]
    pixels = normalise(torch.stack(views), data.mean, data.std)
    encode_image = objective.backbone if trunk else objective.encode_image
    with torch.inference_mode():
        answers = {"pixels": pixels, "image": encode_image(pixels)}
        if has_text:
            answers["tokens"] = instantiate(trained.cfg.tokenizer)(samples.captions)
            answers["text"] = objective.encode_text(answers["tokens"])
    return answers

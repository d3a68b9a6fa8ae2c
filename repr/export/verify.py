"""Compare exports, loaded by the libraries they are for in a fresh process, with our own towers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from safetensors.torch import load_file
from torch import Tensor

from repr.data.colour import normalise
from repr.data.sources.emoji import Emoji
from repr.data.sources.pictures import decode, read_picture
from repr.data.views import evaluation_view
from repr.runs.trained import Trained

LOADER = Path(__file__).with_name("load_elsewhere.py")
TOLERANCE = 1e-5  # of normalised pixels; of an embedding, relative to its length
NUM_PICTURES = 6  # square ones; two more are not
LOADER_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

Answers = Mapping[str, Tensor]


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


def verify(exports: Sequence[Mapping[str, Any]], ours: Sequence[Answers], samples: Samples) -> None:
    """Load every export in one fresh process without network and compare what it gives with ours.

    Args:
        exports: arguments of a loader each, and ``to``, its name, see :mod:`repr.export.load_elsewhere`.
        ours: what each must give.
        samples: what they are shown.

    Raises:
        ValueError: an export does not load, or gives something else; nothing of it may be kept.
    """
    for export, own, theirs in zip(exports, ours, answers_elsewhere(exports, samples), strict=True):
        if fault := difference(theirs, own):
            raise ValueError(f"{export['to']} loads {export['folder']}, but {fault}, so it was not kept")


def answers_elsewhere(exports: Sequence[Mapping[str, Any]], samples: Samples) -> list[dict[str, Tensor]]:
    """What a fresh process without this package and without network makes of the samples, for each export.

    Raises:
        ValueError: it ends with an error.
    """
    with tempfile.TemporaryDirectory() as work:
        job, answer = Path(work) / "job.json", Path(work) / "answer.safetensors"
        pictures = [str(path) for path in samples.pictures]
        task = {"exports": exports, "pictures": pictures, "captions": samples.captions, "answer": str(answer)}
        job.write_text(json.dumps(task), encoding="utf-8")
        # -P: the program's own folder is no place to import from.
        command, environment = [sys.executable, "-P", str(LOADER), str(job)], os.environ | LOADER_ENVIRONMENT
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            raise ValueError(f"the export does not load in a fresh process, so it was not kept: {last[0]}")
        found = load_file(answer)
    answers: list[dict[str, Tensor]] = [{} for _ in exports]
    for name, tensor in found.items():
        index, _, key = name.partition("/")
        answers[int(index)][key] = tensor
    return answers


def difference(theirs: Answers, ours: Answers) -> str | None:
    """How two sets of answers differ by more than rounding, or None."""
    for name, own in ours.items():
        other = theirs.get(name)
        if other is None or other.shape != own.shape:
            return f"its {name} has shape {None if other is None else tuple(other.shape)}, not {tuple(own.shape)}"
        if not own.is_floating_point():
            if not torch.equal(own, other):
                return f"its {name} are others than ours"
            continue
        scale = 1.0 if name == "pixels" else own.norm(dim=-1, keepdim=True)
        worst = float(((other - own).abs() / scale).max())
        if not worst <= TOLERANCE:  # NaN too
            return f"its {name} differs from ours by {worst:.1e} (allowed: {TOLERANCE:g})"
    return None

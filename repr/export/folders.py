"""Exports: written aside, verified by the library they are for, and only then where they were asked for."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from repr.config import ConfigError
from repr.export import openclip, timm_trunk
from repr.export.trained import Trained
from repr.export.verify import Samples, our_answers, verify
from repr.files import replacing_folder

TARGETS = ("open_clip", "timm")
MARKS = ("open_clip_config.json", "config.json", "stages.json")  # one of them lies in every export

Source = str | Path | Trained


def export(source: Source, out: str | Path, *, to: str, untrained_text: bool = False, force: bool = False) -> Path:
    """Export one objective.

    Args:
        source: a run folder, a checkpoint inside one, or :meth:`Trained.copy_of` an objective in memory.
        out: the folder; it is there only if the library it is for gives our embeddings, transform included.
        to: ``open_clip`` (both towers, or the image tower) or ``timm`` (the backbone).
        untrained_text: of an objective on images, a whole open_clip model with a random text tower.
        force: replace an export that is there.

    Returns:
        ``out``.

    Raises:
        ConfigError: the source, the folder, or a tower that the library cannot express.
        ValueError: the library gives something else; nothing was kept.
    """
    _check(out, to, force, untrained_text)
    with replacing_folder(Path(out)) as folder, _samples() as samples:
        write_and_verify({folder: _trained(source)}, samples, to=to, untrained_text=untrained_text)
    return Path(out)


def export_stages(
    stages: Mapping[str, Source],
    out: str | Path,
    *,
    to: str,
    normalise_each: bool = False,
    force: bool = False,
) -> Path:
    """Export every stage of multistage learning as a model of its own, ``stages.json``, and ``join.py``.

    ``join.py`` needs nothing of this package: ``load()`` reads the stages with their library and gives one model, whose
    ``encode_image`` (and ``encode_text``) are those of the stages joined and brought to unit length, (B, sum of D).

    Args:
        stages: name of a folder below ``out`` -> run folder, checkpoint, or :class:`Trained`; the first stage first.
        out: the folder; it is there only if every stage and the joined model give our embeddings.
        to: as for :func:`export`; with ``timm`` it is the backbones that are joined.
        normalise_each: bring each stage to unit length before joining; the authors join raw outputs.
        force: replace an export that is there.

    Returns:
        ``out``.

    Raises:
        ConfigError: as for :func:`export`, and stages that do not see the same transform or tokens.
        ValueError: likewise.
    """
    _check(out, to, force, untrained_text=False)
    if not stages or any(name != Path(name).name for name in stages):
        raise ConfigError([f"stages are {list(stages)}; give each the name of a folder"])
    with replacing_folder(Path(out)) as folder, _samples() as samples:
        trained = {folder / name: _trained(source) for name, source in stages.items()}
        for path in trained:
            path.mkdir()
        write_and_verify(trained, samples, to=to, joined=folder, normalise_each=normalise_each)
    return Path(out)


def write_and_verify(
    models: Mapping[Path, Trained],
    samples: Samples,
    *,
    to: str,
    untrained_text: bool = False,
    joined: Path | None = None,
    normalise_each: bool = False,
) -> None:
    """Write exports into empty folders, and verify them all in one fresh process.

    Args:
        models: folder -> objective.
        samples: pictures and captions.
        to: one of ``TARGETS``.
        untrained_text: as for :func:`export`.
        joined: the folder that receives the reader of all of them; None: each stands for itself.
        normalise_each: as for :func:`export_stages`.

    Raises:
        ConfigError: the library cannot express one.
        ValueError: it gives something else than ours.
    """
    exports: list[dict[str, Any]] = []
    answers: list[dict[str, Tensor]] = []
    for folder, trained in models.items():
        ours = our_answers(trained, samples, trunk=to == "timm")
        if to == "timm":
            extra = timm_trunk.write(trained, folder)
        else:
            extra = openclip.write(trained, folder, ours["pixels"], untrained_text=untrained_text)
        exports.append({"to": to, "folder": str(folder), **extra})
        answers.append(ours)
    if joined is not None:
        answers.append(_join(answers, normalise_each))
        stages = [{**entry, "folder": Path(entry["folder"]).name} for entry in exports]
        timm_trunk.write_json({"stages": stages, "normalise_each": normalise_each}, joined / "stages.json")
        shutil.copyfile(Path(__file__).with_name("join_stages.py"), joined / "join.py")
        exports.append({"to": "joined", "folder": str(joined)})
    verify(exports, answers, samples)


def _join(answers: Sequence[Mapping[str, Tensor]], normalise_each: bool) -> dict[str, Tensor]:
    """What the reader must give.

    Raises:
        ConfigError: the stages see other pixels or tokens.
    """
    first = answers[0]
    for name in ("pixels", "tokens"):
        if any(name in answer and not torch.equal(answer[name], first[name]) for answer in answers):
            raise ConfigError([f"the stages do not take the same {name}: train them with one image_size and tokenizer"])
    joined = {name: tensor for name, tensor in first.items() if name in ("pixels", "tokens")}
    for name in ("image", "text"):
        if name in first:
            parts = [normalize(answer[name], dim=-1) if normalise_each else answer[name] for answer in answers]
            joined[name] = normalize(torch.cat(parts, dim=-1), dim=-1)
    return joined


def _trained(source: Source) -> Trained:
    return source if isinstance(source, Trained) else Trained.read(source)


class _samples(tempfile.TemporaryDirectory):  # noqa: N801 - used as a function
    """Samples for as long as a block lasts."""

    def __enter__(self) -> Samples:
        return Samples(Path(super().__enter__()))


def _check(out: str | Path, to: str, force: bool, untrained_text: bool) -> None:
    """Raise before anything is read."""
    out = Path(out)
    if to not in TARGETS:
        raise ConfigError([f"to={to}; set it to {' or '.join(TARGETS)}"])
    if untrained_text and to != "open_clip":
        raise ConfigError([f"untrained_text=true is for to=open_clip, not to={to}"])
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConfigError([f"out={out} is not a folder; choose another"])
    if out.exists() and not force:
        raise ConfigError([f"out={out} exists; choose another, or set force=true to replace it"])
    if out.exists() and any(out.iterdir()) and not any((out / mark).is_file() for mark in MARKS):
        raise ConfigError([f"out={out} holds something else than an export, which force=true does not remove"])

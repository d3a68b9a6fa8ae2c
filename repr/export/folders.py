"""Exports: written aside, verified by the library they are for, and only then where they were asked for."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from repr.config import ConfigError
from repr.export import model_card, onnx_towers, openclip, timm_trunk
from repr.export.options import HUB, STAGED, check_options
from repr.export.target import Answers, Export, Loaded, Samples, Target
from repr.export.verify import verify
from repr.files import checksum, replacing_folder
from repr.models.concat import Norm, join
from repr.runs.folder import load_run, stage_folders
from repr.runs.trained import Trained

TARGETS: dict[str, Target] = {
    "open_clip": openclip.TARGET,
    "timm": timm_trunk.TARGET,
    "onnx": onnx_towers.TARGET,
}
STAGES, READER = "stages.json", "join.py"
WRITTEN = "written.json"  # the files of an export, with their sizes and checksums

Source = str | Path | Trained


def export(
    source: Source | Mapping[str, Source],
    out: str | Path,
    *,
    to: str,
    weights: str = "model",
    norm: Norm = "joined",
    untrained_text: bool = False,
    force: bool = False,
    trust: bool = False,
) -> Path:
    """Export one objective, or all stages of multistage learning; of several processes one calls this.

    Every stage becomes a model of its own, beside ``stages.json`` and ``join.py``, which needs nothing of this package:
    its ``load()`` reads the stages with their library and gives one model, whose ``encode_image`` (and ``encode_text``)
    are those of the stages joined, (B, sum of D). With ``to=timm`` it is the backbones that are joined.

    Args:
        source: a run folder, a checkpoint inside one, or :meth:`Trained.copy_of` an objective in memory; of stages the
            folder of the whole run, or name of a folder below ``out`` -> source of a stage, the first stage first.
        out: the folder; it is there only if the library it is for gives our embeddings, transform included.
        to: ``open_clip`` (both towers, or the image tower), ``timm`` (the backbone), or ``hf``: the first where a text
            tower was trained and otherwise the second, with a model card, as Hugging Face's hub takes it. ``onnx``:
            a file for each tower, for onnxruntime.
        weights: ``model``: those that the run evaluates; where a callback of Lightning averages weights
            (``EMAWeightAveraging``), the average, and ``unaveraged`` those that are trained. ``teacher``: those of the
            moving average that the flow keeps.
        norm: of stages that are given by name, see :func:`repr.models.concat.join`.
        untrained_text: of an objective on images, a whole open_clip model with a random text tower.
        force: replace an export that is there; a folder that holds anything else, or files edited since, stays.
        trust: see :func:`repr.runs.folder.load_run`.

    Returns:
        ``out``.

    Raises:
        ConfigError: the source, the folder, a tower that the library cannot express, or stages that do not see the
            same transform or tokens.
        ValueError: the library gives something else; nothing was kept.
    """
    targets = (*STAGED, *TARGETS)
    check_options(out, to=to, weights=weights, untrained_text=untrained_text, force=force, targets=targets)
    if to in TARGETS and (fault := TARGETS[to].missing()):
        raise ConfigError([fault])
    _check_replaced(Path(out))
    if isinstance(source, str | Path) and (stages := stage_folders(source)):
        if untrained_text:
            raise ConfigError([f"untrained_text=true is for one model, and {source} has stages: export one of them"])
        procedure = load_run(source, built=()).get("procedure") or {}
        if len(stages) < (num_stages := procedure.get("num_stages", 0)):
            raise ConfigError([f"run={source} has {len(stages)} of its {num_stages} stages: resume it first"])
        source, norm = stages, procedure.get("norm", "joined")
    with replacing_folder(Path(out)) as folder, tempfile.TemporaryDirectory() as work:
        samples = Samples(Path(work))
        if isinstance(source, Mapping):
            exports = _write_stages(source, folder, samples, to, norm, weights, trust)
        else:
            exports = [write(_trained(source, weights, trust), folder, samples, to=to, untrained_text=untrained_text)]
        verify(exports, samples)
        timm_trunk.write_json({name: checksum(folder / name) for name in _files(folder)}, folder / WRITTEN)
    return Path(out)


def _write_stages(
    stages: Mapping[str, Source], folder: Path, samples: Samples, to: str, norm: Norm, weights: str, trust: bool
) -> list[Export]:
    if to not in STAGED:
        raise ConfigError([f"to={to} is for one model: export each stage by itself, run=RUN_FOLDER/stage-0 and so on"])
    if not stages or any(name != Path(name).name for name in stages):
        raise ConfigError([f"stages are {list(stages)}; give each the name of a folder"])
    trained = [_trained(source, weights, trust) for source in stages.values()]
    library = _library(to, trained[-1])
    exports = []
    for name, stage in zip(stages, trained, strict=True):
        (folder / name).mkdir()
        exports.append(write(stage, folder / name, samples, to=library))
    entries = [{"to": library, "folder": export.folder.name, **export.arguments} for export in exports]
    timm_trunk.write_json({"stages": entries, "norm": norm}, folder / STAGES)
    shutil.copyfile(Path(__file__).with_name("join_stages.py"), folder / READER)
    if to == HUB:
        model_card.write(trained[-1], folder, library, num_stages=len(stages))
    answers = _joined_answers([export.answers for export in exports], norm)
    return [Export("joined", folder, load_joined, {}, answers), *exports]


def write(trained: Trained, folder: Path, samples: Samples, *, to: str, untrained_text: bool = False) -> Export:
    """Write an export into an empty folder; see :func:`export`.

    Raises:
        ConfigError: the library cannot express the objective.
    """
    library = _library(to, trained)
    options = {"untrained_text": True} if untrained_text else {}
    arguments, answers = TARGETS[library].write(trained, folder, samples, **options)
    if to == HUB:
        model_card.write(trained, folder, library)
    return Export(to, folder, TARGETS[library].load, arguments, answers, library if to == HUB else None)


def load_joined(folder: str) -> Loaded:
    """Run the reader beside the stages."""
    import runpy

    return runpy.run_path(f"{folder}/join.py")["load"]()


def _joined_answers(answers: Sequence[Answers], norm: Norm) -> dict[str, Tensor]:
    """What all stages together must give; stages that see different pixels or tokens are refused."""
    joined = {
        name: answer for name, answer in answers[0].items() if name != "logits"
    }  # of a decoder, which is not joined
    for name in ("pixels", "tokens"):
        if any(name in answer and not torch.equal(answer[name], joined[name]) for answer in answers):
            raise ConfigError([f"the stages do not take the same {name}: train them with one image_size and tokenizer"])
    for name in {"image", "text"} & joined.keys():
        joined[name] = join([answer[name] for answer in answers], norm)
    return joined


def _trained(source: Source, weights: str, trust: bool) -> Trained:
    unaveraged = weights == "unaveraged"
    if not isinstance(source, Trained):
        source = Trained.read(source, unaveraged=unaveraged, trust=trust)
    elif unaveraged:
        raise ConfigError([f"weights=unaveraged is for a run folder or checkpoint, and {source.name} is neither"])
    return source.of_teacher() if weights == "teacher" else source


def _library(to: str, trained: Trained) -> str:
    return to if to != HUB else "open_clip" if trained.has_text else "timm"


def _check_replaced(out: Path) -> None:
    """Raise where ``force`` would remove something else than an export."""
    written = _written(out)
    if others := [
        name for name in _files(out) if name != WRITTEN and not _is_as_written(out / name, written.get(name))
    ]:
        named = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        raise ConfigError(
            [f"force=true removes only what an export wrote, and {named} in out={out} is not: choose another folder"]
        )


def _files(folder: Path) -> list[str]:
    """The files of a folder and those below it, by their paths inside it."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def _is_as_written(path: Path, written: list[int] | None) -> bool:
    return written is not None and path.is_file() and not path.is_symlink() and checksum(path) == written


def _written(folder: Path) -> dict[str, list[int]]:
    """What the export in a folder wrote: file -> size and checksum; nothing where there is none."""
    try:
        written = json.loads((folder / WRITTEN).read_text())
    except (OSError, ValueError):
        return {}
    return written if isinstance(written, dict) else {}

"""How a run folder is laid out: the names of its files, and its config. No other room writes these names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from repr.config import ConfigError, change
from repr.files import replacing

CONFIG = "config.yaml"  # the composed config, from which the run can be rebuilt
CHECKPOINTS = "checkpoints"  # step=<n>.ckpt
METRICS = "metrics.csv"  # a row a logged step
RESULTS = "results.json"  # name -> {"value", "chance"} of the last evaluation
EXHIBITS = "exhibits"  # <set>.npz: what the page shows of the last evaluation
PICTURES = "pictures"  # <name>.png: what the run was trained on
REPORT = "report.html"
EVALUATIONS = "evaluation"  # <data>-<protocol>/metrics.json, by repr.evaluate
EVALUATION = "metrics.json"
JOINED = "joined"  # the results of all stages of a multistage run as one encoder
STAGE, CLUSTERS = "stage.json", "clusters.npz"  # of a finished stage

Results = dict[str, tuple[float, float | None]]  # name -> (value, level at chance)


def is_run(folder: str | Path) -> bool:
    """Whether a run was trained in a folder."""
    return Path(folder, CONFIG).is_file()


def can_resume(folder: str | Path | None) -> bool:
    """Whether a run in a folder, or a stage of it, has saved anything to go on from."""
    return folder is not None and any(Path(folder).rglob(f"{CHECKPOINTS}/*.ckpt"))


def run_folder(path: str | Path, option: str) -> Path:
    """The run folder that a path means: itself, or that of a checkpoint inside it.

    Args:
        path: a run folder or a checkpoint.
        option: where the path was given, for errors.

    Raises:
        ConfigError: no run lies there.
    """
    path = Path(path)
    folder = path.parent.parent if path.is_file() or path.suffix == ".ckpt" else path
    if not path.exists():
        raise ConfigError([f"{option}={path} does not exist; give a run folder, or a checkpoint inside one"])
    if not is_run(folder):
        raise ConfigError(
            [f"{option}={path} is not (inside) a run folder: {folder / CONFIG} is missing; name a folder below runs/"]
        )
    return folder


def load_run(folder: str | Path, overrides: Sequence[str] = ()) -> DictConfig:
    """The config of a run, with values changed by ``overrides`` (:func:`repr.config.change`).

    Raises:
        ConfigError: no run lies there, or an override is not the value of an existing option.
    """
    if not is_run(folder):
        raise ConfigError([f"{folder} is not a run folder: it has no {CONFIG}; name a folder below runs/"])
    cfg = OmegaConf.load(Path(folder, CONFIG))
    assert isinstance(cfg, DictConfig)
    return change(cfg, overrides)


def save_config(cfg: DictConfig, folder: str | Path) -> None:
    """Write the config of a run, from which it can be rebuilt."""
    with replacing(Path(folder, CONFIG)) as file:
        file.write(OmegaConf.to_yaml(cfg).encode())


def save_results(results: Results, folder: str | Path) -> None:
    """Write the results of a run's last evaluation."""
    with replacing(Path(folder, RESULTS)) as file:
        file.write(json.dumps({k: {"value": v, "chance": c} for k, (v, c) in results.items()}, indent=1).encode())


def stage_folder(run: str | Path, stage: int) -> Path:
    """Where a stage of a multistage run lies, which is a run folder itself."""
    return Path(run, f"stage-{stage}")


def stage_folders(run: str | Path) -> dict[str, Path]:
    """The stages ``stage-<n>`` of a multistage run folder in order; empty for any other."""
    found = [path for path in Path(run).glob("stage-*") if is_run(path)]
    numbers = {int(path.name.removeprefix("stage-")): path for path in found if path.name[6:].isdigit()}
    return {numbers[number].name: numbers[number] for number in sorted(numbers)}

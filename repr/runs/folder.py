"""How a run folder is laid out: the names of its files, and its config. No other room writes these names."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from repr.config import CONF, ConfigError, change
from repr.files import replacing, yaml_text
from repr.runs.trust import check_trusted

CONFIG = "config.yaml"  # the composed config, from which the run can be rebuilt
CHECKPOINTS = "checkpoints"  # step=<n>.ckpt, see repr.runs.checkpoints
METRICS = "metrics.csv"  # a row a logged step
RESULTS = "results.json"  # name -> {"value", "chance"} of the last evaluation
FACTS = "facts.json"  # where the run has run, how long, and what its numbers mean
LOGGER_RUNS = "loggers.json"  # library -> the id of this run with its logger
EXHIBITS = "exhibits"  # <set>.npz: what the page shows of the last evaluation
PICTURES = "pictures"  # <name>.png: what the run was trained on
REPORT = "report.html"
EVALUATIONS = "evaluation"  # <data>-<protocol>/metrics.json, by repr.evaluate
EVALUATION = "metrics.json"
NON_FINITE = "non_finite_rank{}"  # .json and .pt: the step whose loss or gradient was not finite, by process
JOINED = "joined"  # the results of all stages of a multistage run as one encoder
STAGE, CLUSTERS = "stage.json", "clusters.npz"  # of a finished stage, stage-<n>
STAGES = "stages.csv"  # the results of all stages side by side
NEIGHBOURS = "neighbours.npz"  # of each row of the training set, where procedure=neighbours has found them
LOCK = ".lock"  # held by the process that trains
SWEEP = "sweep.json"  # of a folder that holds run folders: what is swept
EXPORT = "export"  # all stages, for another library

ENCODER = ("objective", "data", "tokenizer")  # sections of the config that are built of a trained encoder
_REMEDY = "move it away: python -m repr.evaluate makes its numbers again"
Results = dict[str, tuple[float, float | None]]  # name -> (value, level at chance)


def is_run(folder: str | Path) -> bool:
    """Whether a run was trained in a folder."""
    return Path(folder, CONFIG).is_file()


def holder(path: str | Path) -> Path:
    """The run folder that a path means: itself, or that of a checkpoint inside it; it need not be there."""
    path = Path(path)
    return path.parent.parent if path.is_file() or path.suffix == ".ckpt" else path


def can_resume(folder: str | Path | None) -> bool:
    """Whether a run in a folder, or a stage of it, has saved anything to go on from."""
    return folder is not None and any(Path(folder).rglob(f"{CHECKPOINTS}/*.ckpt"))


def run_folder(path: str | Path, option: str) -> Path:
    """As :func:`holder`, of a run that must be there.

    Args:
        path: a run folder or a checkpoint.
        option: where the path was given, for errors.

    Raises:
        ConfigError: no run lies there.
    """
    folder = holder(path)
    if not Path(path).exists():
        raise ConfigError([f"{option}={path} does not exist; give a run folder, or a checkpoint inside one"])
    if not is_run(folder):
        raise ConfigError(
            [f"{option}={path} is not (inside) a run folder: {folder / CONFIG} is missing; name a folder below runs/"]
        )
    return folder


def load_run(
    folder: str | Path, overrides: Sequence[str] = (), *, trust: bool = False, built: Sequence[str] | None = None
) -> DictConfig:
    """The config of a run.

    Args:
        folder: of the run.
        overrides: values to change, see :func:`repr.config.change`.
        trust: whether the config may name any class; else only those of :mod:`repr.runs.trust`, since a run folder may
            come from a stranger and what it names is built.
        built: the sections of the config that will be built; None: all.

    Raises:
        ConfigError: no run lies there, its config is damaged or names what may not be built, or an override is not the
            value of an existing option.
    """
    path = Path(folder, CONFIG)
    if not is_run(folder):
        raise ConfigError([f"{folder} is not a run folder: it has no {CONFIG}; name a folder below runs/"])
    try:
        cfg = OmegaConf.create(yaml_text(path))
    except (ValueError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError([f"{path} is damaged ({' '.join(str(error).split())}); put a copy of it back"]) from error
    if not isinstance(cfg, DictConfig) or not cfg:
        raise ConfigError([f"{path} is damaged ({'it is empty' if not cfg else 'a list'}); put a copy of it back"])
    _complete(cfg, path)
    change(cfg, overrides)  # which builds nothing, and refuses a mistyped option at once
    if not trust:
        check_trusted(cfg, str(path), built)
    return cfg


def _complete(cfg: DictConfig, path: Path) -> None:
    """Give a config that was edited, or written by an older version, the plain options that it lacks.

    Raises:
        ConfigError: it lacks what has no default.
    """
    root: Any = OmegaConf.load(CONF / "fit.yaml")
    groups = [str(group) for entry in root.pop("defaults") if isinstance(entry, DictConfig) for group in entry]
    required = ["name", *(group for group in groups if group != "experiment")]
    if lacking := [key for key in required if key not in cfg]:
        told = f"{path} has no {', '.join(lacking)}: put it back, as another run of this experiment has it"
        raise ConfigError([told])
    if missing := [key for key in root if key not in cfg]:
        warnings.warn(f"{path} has no {', '.join(map(str, missing))}; the default is taken", stacklevel=3)
        cfg.update({key: root[key] for key in missing})


def save_config(cfg: DictConfig, folder: str | Path) -> None:
    """Write the config of a run, from which it can be rebuilt."""
    with replacing(Path(folder, CONFIG)) as file:
        file.write(OmegaConf.to_yaml(cfg).encode())


def save_results(results: Results, folder: str | Path) -> None:
    """Write the results of a run's last evaluation."""
    with replacing(Path(folder, RESULTS)) as file:
        file.write(json.dumps({k: {"value": v, "chance": c} for k, (v, c) in results.items()}, indent=1).encode())


def load_results(folder: str | Path) -> dict[str, dict[str, float | None]]:
    """Name -> ``value`` and ``chance`` of a run's last evaluation; empty before the run has ended."""
    path = Path(folder, RESULTS)
    results = _read_json(path) if path.is_file() else {}
    if not all(isinstance(one, dict) and {"value", "chance"} <= one.keys() for one in results.values()):
        raise ValueError(f"{path} is damaged (it holds other things than results); {_REMEDY}")
    return results


def save_facts(facts: Mapping[str, Any], folder: str | Path) -> None:
    """Write where a run has run, how long, and what its numbers mean; :class:`repr.training.facts.Facts` says how."""
    with replacing(Path(folder, FACTS)) as file:
        file.write(json.dumps(facts, indent=1).encode())


def load_facts(folder: str | Path) -> dict[str, Any]:
    """What :func:`save_facts` wrote; empty where it has not yet, and of runs of older versions.

    Raises:
        ValueError: the file is damaged.
    """
    path = Path(folder, FACTS)
    facts = _read_json(path, "move it away") if path.is_file() else {}
    kinds: dict[str, Any] = {"seconds": (int, float), "versions": dict, "meanings": dict, "protocols": dict}
    wrong = [name for name, kind in kinds.items() if name in facts and not isinstance(facts[name], kind)]
    if wrong or not 0 <= facts.get("seconds", 0) < 1e12:
        raise ValueError(f"{path} is damaged ({', '.join(wrong) or 'seconds'} cannot be so); move it away")
    return facts


def save_logger_run(library: str, run: str, folder: str | Path) -> None:
    """Keep the id that a logger's library has given a run, or was told."""
    with replacing(Path(folder, LOGGER_RUNS)) as file:
        file.write(json.dumps(load_logger_runs(folder) | {library: run}).encode())


def load_logger_runs(folder: str | Path) -> dict[str, Any]:
    """Library -> the id of a run with it; empty where no such logger was used."""
    path = Path(folder, LOGGER_RUNS)
    return _read_json(path, "move it away, and loggers begin a new run") if path.is_file() else {}


def load_evaluations(folder: str | Path) -> dict[Path, dict[str, Any]]:
    """Folder -> what ``repr.evaluate`` has written there, the latest last.

    Args:
        folder: a run folder, or one of ``repr.evaluate`` itself, or a folder that holds several of these.
    """
    places = (f"{EVALUATIONS}/*/{EVALUATION}",) if is_run(folder) else (f"*/{EVALUATION}", EVALUATION)
    paths = [path for place in places for path in sorted(Path(folder).glob(place))]
    paths.sort(key=lambda path: path.stat().st_mtime)
    return {path.parent: _read_json(path) for path in paths}


def _read_json(path: Path, remedy: str = _REMEDY) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged (it is no mapping); {remedy}")
    return content


def stage_folder(run: str | Path, stage: int) -> Path:
    """Where a stage of a multistage run lies, which is a run folder itself."""
    return Path(run, f"stage-{stage}")


def stage_folders(run: str | Path) -> dict[str, Path]:
    """The stages ``stage-<n>`` of a multistage run folder in order; empty for any other."""
    found = [path for path in Path(run).glob("stage-*") if is_run(path)]
    numbers = {int(path.name.removeprefix("stage-")): path for path in found if path.name[6:].isdigit()}
    return {numbers[number].name: numbers[number] for number in sorted(numbers)}

"""What may be built from a stored config. It may come from a stranger, so what it names is compared with a list.

Everything else in a run folder is data: checkpoints are read without running code, pictures and tables as such.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from repr.config import ConfigError

# Modules and packages that define what may be built: of the first classes and functions, of the second classes alone,
# of the third networks alone.
_ANY = ("repr.losses", "repr.models", "repr.metrics")
_CLASSES = (
    "repr.objectives",
    "repr.data.sources",
    "repr.data.drawn",
    "repr.data.questions",
    "repr.data.views",
    "repr.data.datamodule",
    "repr.data.hard_captions",
    "repr.data.distorted_captions",
    "repr.evaluate.protocols",
    "repr.evaluate.probes",
    "repr.evaluate.reranking",
    "repr.evaluate.finetune",
    "repr.evaluate.during_training",
    "repr.procedures",
    "repr.training",
    "repr.optim",
    "sklearn.cluster",
)
_NETWORKS = ("torch.nn.modules", "timm", "open_clip")
_NAMES = (
    "hydra.utils.get_class",  # whose path is looked at likewise
    "lightning.pytorch.Trainer",
    "open_clip.SimpleTokenizer",
    "repr.data.clusters.load_clusters",
    "repr.fit.single",
    "repr.runs.scorer.PatchScorer.load",
    *(
        f"lightning.pytorch.callbacks.{name}"
        for name in (
            "DeviceStatsMonitor",
            "EMAWeightAveraging",
            "EarlyStopping",
            "LearningRateMonitor",
            "ModelSummary",
            "RichModelSummary",
            "RichProgressBar",
            "TQDMProgressBar",
            "Timer",
            "WeightAveraging",
        )
    ),
    "lightning.pytorch.loggers.CSVLogger",
    "lightning.pytorch.loggers.TensorBoardLogger",
    "lightning.pytorch.strategies.DDPStrategy",
)
# Arguments that make a library unpickle a file, or run a program that a model brings along.
_ARGUMENTS = ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "trust_remote_code", "weights_only")
_FOLDERS = ("dirpath", "folder", "save_dir")  # arguments of callbacks and loggers, which write there
_MAX_VALUES = 100_000  # of a config


def check_trusted(cfg: DictConfig, where: str, sections: Sequence[str] | None = None) -> None:
    """Refuse a stored config that names what a stranger could do harm with, before anything is imported or built.

    Args:
        cfg: from a file.
        where: that file, for errors.
        sections: those that will be built; None: all.

    Raises:
        ConfigError: it names classes, functions or arguments outside the list of this module; all of them are told.
    """
    read = cfg if sections is None else {name: cfg[name] for name in sections if name in cfg}
    faults = [fault for path, node in _mappings(read, where) for fault in _faults(path, node)]
    if faults:
        raise ConfigError(
            [
                f"{where} names what a run folder of someone else must not build: {'; '.join(faults)}. "
                "If you know where the folder comes from, add trust=true"
            ]
        )


def is_trusted(cfg: DictConfig, sections: Sequence[str] | None = None) -> bool:
    """Whether a config passes :func:`check_trusted`; ``trust=true`` is needed where it does not."""
    try:
        check_trusted(cfg, "", sections)
    except ConfigError:
        return False
    return True


def resuming(cfg: DictConfig) -> str:
    """What resumes a run on the command line, with ``trust=true`` where it builds classes of one's own."""
    return f"resume={cfg.run_folder}{'' if is_trusted(cfg) else ' trust=true'}"


def _mappings(root: Any, where: str) -> Iterator[tuple[str, DictConfig]]:
    """All mappings below a node with their dotted names, those that interpolations lead to or make among them.

    Raises:
        ConfigError: there are too many; interpolations may lead to the same ones again and again.
    """
    nodes, number = [("", root)], 0
    while nodes:
        path, node = nodes.pop()
        if isinstance(node, DictConfig):
            yield path, node
        for key in range(len(node)) if isinstance(node, ListConfig) else list(node):
            if (number := number + 1) > _MAX_VALUES:
                raise ConfigError([f"{where} has more than {_MAX_VALUES:,} values: it is no config of a run"])
            try:
                child = node[key]
            except OmegaConfBaseException:  # ???, or a variable of another machine; it cannot be built either
                continue
            if isinstance(child, dict | list):  # a resolver has made it
                child = OmegaConf.create(child)
            if isinstance(child, DictConfig | ListConfig):
                nodes.append((f"{path}.{key}".lstrip("."), child))


def _faults(path: str, node: DictConfig) -> Iterator[str]:
    for key in _ARGUMENTS:
        if key in node.keys():  # noqa: SIM118 - `in node` passes over what is missing
            yield f"{path}.{key}"
    if "_target_" not in node.keys():  # noqa: SIM118
        return
    try:
        target = node["_target_"]
        named = node["path"] if target == "hydra.utils.get_class" else target
    except OmegaConfBaseException as error:
        yield f"{path} ({str(error).splitlines()[0]})"
        return
    if not (_is_known(target) and _is_known(named)):
        yield f"{path}: {named}"


def _is_known(name: Any) -> bool:
    """Whether a dotted name leads to something of the list; nothing outside the list's packages is imported."""
    if not isinstance(name, str):
        return False
    if name in _NAMES:
        return True
    if not _is_below(name, (*_ANY, *_CLASSES, "torch.nn", "timm", "open_clip")):
        return False
    try:
        target = get_object(name)
    except (ImportError, AttributeError, ValueError, HydraException):
        return False
    # A name may lead on from a module to all that the module imports, so what counts is where the object is defined.
    home = getattr(target, "__module__", None) or ""
    if not inspect.isclass(target):
        return inspect.isfunction(target) and _is_below(home, _ANY)
    from torch import nn

    return _is_below(home, (*_ANY, *_CLASSES)) or (issubclass(target, nn.Module) and _is_below(home, _NETWORKS))


def _is_below(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def check_folders(cfg: DictConfig) -> None:
    """Refuse callbacks and loggers of a stored config that write outside the folder of the run.

    Args:
        cfg: a stored config whose ``run_folder`` is where the run lies now.

    Raises:
        ConfigError: one of them does.
    """
    run = Path(cfg.run_folder).resolve()
    faults = []
    for section in ("callbacks", "logger"):
        callbacks = cfg.get(section)
        for path, node in _mappings(callbacks, section) if isinstance(callbacks, DictConfig) else ():
            for key in _FOLDERS:
                folder = node.get(key)
                if isinstance(folder, str) and not Path(folder).resolve().is_relative_to(run):
                    faults.append(
                        f"{section}.{path}.{key}={folder} lies outside {cfg.run_folder}; set it to '${{run_folder}}'"
                    )
    if faults:
        raise ConfigError(faults)

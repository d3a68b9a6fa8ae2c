"""What a config names on the disk: read before torch is imported, so that what is missing is told within a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from repr.config import ConfigError
from repr.config_check import target_faults, value_faults
from repr.errors import constructor_error
from repr.metrics.classes import load_classes

ZERO_SHOT = "repr.evaluate.protocols.ZeroShot"  # whose ``classes`` are files
_built: dict[str, Any] = {}  # sources that a check has built and no data module has taken: how they are made -> what


def check_inputs(cfg: DictConfig) -> None:
    """Check a config whose data are here: what :func:`repr.config_check.check` finds, sources, class files and weights.

    What costs little comes first: values, then files, then what needs torch. Faults of one kind are told together.

    Raises:
        ConfigError: with all of them.
        ValueError: the one that there is.
    """
    if found := value_faults(cfg):
        raise ConfigError(found)
    _built.clear()
    faults: list[ValueError] = []
    for key in ("train", "eval"):
        if OmegaConf.is_dict(cfg.data.get(key)):
            with _kept(faults):
                _built[_recipe(cfg, key)] = instantiate(cfg.data[key], _convert_="all")
    for option in ("init_from", "scorer"):
        path = cfg.get(option)
        if path and ":" not in path and not cfg.get("resume") and not Path(path).exists():
            faults.append(ConfigError([f"{option}={path} does not exist; set it to a run folder or a file"]))
    if (where := cfg.data.get("neighbours")) not in (None, "items") and not Path(where).is_file():
        faults.append(
            ConfigError([f"data.neighbours={where} does not exist; set it to items, or a file of neighbours"])
        )
    for protocol in (cfg.get("eval") or {}).values():
        if OmegaConf.is_dict(protocol) and protocol.get("_target_") == ZERO_SHOT:
            for files in (protocol.get("classes") or {}).values():
                with _kept(faults):
                    load_classes(files)
    if len(faults) > 1:
        raise ConfigError([str(fault) for fault in faults])
    if faults:
        raise faults[0]
    if found := target_faults(cfg):
        raise ConfigError(found)


def data_module(cfg: DictConfig) -> Any:
    """Build ``cfg.data``, of the sources that the last check has built, where they are the same.

    Raises:
        ValueError: what the data module refuses.
    """
    recipes = {key: _recipe(cfg, key) for key in ("train", "eval") if OmegaConf.is_dict(cfg.data.get(key))}
    sources = {key: _built.pop(recipe) for key, recipe in recipes.items() if recipe in _built}
    data = cfg.data.copy()
    with open_dict(data):
        for key in sources:
            del data[key]
    make: Callable[..., Any] = instantiate(data, _partial_=True)
    return make(**sources)


def _recipe(cfg: DictConfig, key: str) -> str:
    return key + OmegaConf.to_yaml(cfg.data[key], resolve=True)


@contextmanager
def _kept(faults: list[ValueError]) -> Iterator[None]:
    """Keep what a constructor refuses; what cannot be called at all is for the check of the config to tell."""
    try:
        yield
    except ValueError as error:
        faults.append(error)
    except InstantiationException as error:
        cause, _ = constructor_error(error)
        if isinstance(cause, ValueError):
            faults.append(cause)
        elif isinstance(cause, OSError):
            raise

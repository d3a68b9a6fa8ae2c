"""What a sweep consists of: a run for each combination of values, and the record from which it goes on."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from repr.catalog import groups, roots
from repr.config import ConfigError, compose, parse_overrides
from repr.config_check import check, value_faults
from repr.files import replacing
from repr.runs.folder import SWEEP
from repr.runs.inputs import check_inputs
from repr.runs.trust import check_trusted

MAX_NAME = 200  # signs of a folder's name


class Sweep(NamedTuple):
    """What is swept.

    Attributes:
        fixed: overrides that all runs share.
        swept: option -> its values, each as the command line takes it.
        config_dir: as in ``--config-dir``.
    """

    fixed: list[str]
    swept: dict[str, list[str]]
    config_dir: str | None

    def trials(self) -> dict[str, list[str]]:
        """Name of a run -> its overrides, of all combinations.

        Raises:
            ConfigError: an option has a value twice.
        """
        found = dict[str, list[str]]()
        for values in itertools.product(*self.swept.values()):
            pairs = [*zip(self.swept, values, strict=True)]
            parts = (
                f"{key.lstrip('+')}={re.sub(r'[^-.+=A-Za-z0-9_]+', '-', value).strip('-')}" for key, value in pairs
            )
            if (name := "+".join(parts)[:MAX_NAME]) in found:
                raise ConfigError([f"two runs of the sweep have the name {name}: give values that differ"])
            found[name] = [*self.fixed, *(f"{key}={value}" for key, value in pairs)]
        return found


def parse(words: Sequence[str], config_dir: str | None) -> Sweep:
    """Tell what is swept from what all runs share; values are those of Hydra's grammar, lists in brackets among them.

    Raises:
        ConfigError: no option has several values, or one has no end of them.
    """
    fixed, swept = list[str](), dict[str, list[str]]()
    for override in parse_overrides(words, groups(roots(config_dir))):
        if not override.is_sweep_override():
            fixed.append(str(override.input_line))
        elif override.is_choice_sweep() or override.is_range_sweep():
            swept[override.get_key_element()] = [*override.sweep_string_iterator()]
        else:
            raise ConfigError([f"{override.input_line}: give the values, as in seed=0,1,2 or seed=range(0,3)"])
    if not swept:
        raise ConfigError(["--sweep: no option has several values; give one some, as in seed=0,1,2"])
    return Sweep(fixed, swept, config_dir and str(Path(config_dir).resolve()))


def check_all(plan: Sweep, stored: Path | None) -> DictConfig:
    """Compose and check the configs of all runs; gives the first one.

    Args:
        plan: what is swept.
        stored: the folder that it was read from, if that need not be trusted; it may come from a stranger.

    Raises:
        ConfigError: the faults of all of them.
    """
    faults, configs = list[str](), list[DictConfig]()
    for overrides in plan.trials().values():
        try:
            configs.append(compose(overrides, config_dir=plan.config_dir))
            if stored:
                check_trusted(configs[-1], str(stored / SWEEP))
            faults += value_faults(configs[-1])
        except ConfigError as error:
            faults += error.faults
    read = set[str]()
    for cfg in configs if not faults else []:
        try:  # the same files need not be read again for each seed
            check(cfg) if _inputs(cfg) in read else check_inputs(cfg)
        except ValueError as error:
            faults += getattr(error, "faults", [str(error)])
        read.add(_inputs(cfg))
    if faults:
        raise ConfigError(faults)
    return configs[0]


def _inputs(cfg: DictConfig) -> str:
    """What :func:`repr.runs.inputs.check_inputs` reads of a config, as text."""
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    of_data = [plain["data"].get(key) for key in ("train", "eval", "neighbours")]
    return str([of_data, *(plain.get(key) for key in ("eval", "init_from", "scorer"))])


def load_sweep(folder: Path) -> Sweep:
    """What was swept in a folder.

    Raises:
        ConfigError: it is not that of a sweep, or its record is damaged.
    """
    if not (folder / SWEEP).is_file():
        raise ConfigError(
            [f"{folder} is not the folder of a sweep: it has no {SWEEP}; without --sweep resume= takes a run"]
        )
    try:
        told = json.loads((folder / SWEEP).read_text(encoding="utf-8"))
        return Sweep(**{name: told[name] for name in Sweep._fields})
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            [f"{folder / SWEEP} is damaged ({error}); give the sweep's options with run_folder={folder}"]
        ) from error


def save_sweep(plan: Sweep, folder: Path) -> None:
    """Write the record of a sweep, whose folder may hold it with other values.

    Raises:
        ConfigError: the folder holds another sweep.
    """
    if (folder / SWEEP).is_file():
        old = load_sweep(folder)
        if (old.fixed, [*old.swept]) != (plan.fixed, [*plan.swept]):
            raise ConfigError([f"run_folder={folder} holds a sweep of other options: name another folder"])
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / SWEEP) as file:
        file.write(json.dumps(plan._asdict(), indent=1).encode())

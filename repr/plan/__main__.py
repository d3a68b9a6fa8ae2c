"""Predict what a training step costs on a number of GPUs: ``python -m repr.plan gpus=N memory=GB [KEY=VALUE ...]``."""

from __future__ import annotations

import argparse
import difflib
import math
import warnings
from collections.abc import Sequence

from omegaconf import DictConfig

from repr.cli import command, importing, one_line_errors
from repr.config import ConfigError, compose
from repr.config_check import check

OPTIONS = {"gpus": int, "memory": float, "bandwidth": float, "tflops": float}
TFLOPS = 60.0


def options_of(words: Sequence[str]) -> tuple[list[str], dict[str, float]]:
    """Overrides of the config, and what is the planner's own.

    Raises:
        ConfigError: an own option is missing or no positive number.
    """
    given: dict[str, float] = {"bandwidth": 50.0, "tflops": TFLOPS}
    overrides, faults = [], []
    for word in words:
        key, _, value = word.partition("=")
        if key not in OPTIONS:
            overrides.append(word)
            continue
        try:
            given[key] = OPTIONS[key](value)
        except ValueError:
            given[key] = 0
        if not 0 < given[key] < math.inf:
            faults.append(f"{word}: set {key} to a {'whole ' if OPTIONS[key] is int else ''}number above 0")
    for key, example in {"gpus": "256", "memory": "80, in GB a GPU"}.items():
        if key not in given:
            faults.append(f"{key} has no value: set it, such as {key}={example}")
    if faults:
        raise ConfigError(faults)
    return overrides, given


def config(overrides: Sequence[str], gpus: int, config_dir: str | None = None) -> tuple[DictConfig, list[str]]:
    """The checked config of a run on so many GPUs, and what there is to say about it.

    Raises:
        ConfigError: it has faults, or what is planned depends on something that is not known here.
    """
    for word in overrides:
        key = word.partition("=")[0]
        if near := difflib.get_close_matches(key, OPTIONS, n=1, cutoff=0.75):
            raise ConfigError([f"there is no option '{key}'; did you mean '{near[0]}'?"])
    cfg = compose([*overrides, f"trainer.devices={gpus}", "trainer.num_nodes=1"], config_dir=config_dir)
    from repr.training.forecast import HALF, WHOLE  # here, so that a mistyped option is refused before torch's seconds

    precision, notes = str(cfg.trainer.precision), []
    if precision not in {**HALF, **WHOLE}:
        raise ConfigError(
            [f"trainer.precision={precision} cannot be planned: set it to one of {', '.join({**HALF, **WHOLE})}"]
        )
    if cfg.get("scorer"):
        notes.append(f"scorer={cfg.scorer} is left out: the frozen scorer's weights and features come on top.")
        cfg.scorer = None
    if cfg.get("compile"):
        notes.append("compile=true is left out: what a compiler fuses is not held, so the forecast is rather too high.")
        cfg.compile = False
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check(cfg)
    return cfg, notes + [str(warning.message) for warning in caught]


def parser() -> argparse.ArgumentParser:
    """The arguments of the command line."""
    result = command(
        "plan",
        "Predict what a training step costs in memory and traffic, and the largest batch that fits, without a GPU.",
        "gpus=256, memory=80, experiment=clip_vit_b32, optim.lr=1e-3, ...",
    )
    result.epilog = (
        "gpus: how many in all. memory: what each has, in GB (10^9 bytes), of which a tenth is left to CUDA's context, "
        "workspaces and fragmentation. bandwidth: what each sends, in GB/s (50: a link of 400 Gbit/s). tflops: how "
        "many operations of float32 products each makes, in 10^12 a second (60), by which the time of a pairwise loss "
        "is told: of a GPU's share, and of the whole, which each would compute without sharing. Everything else is as "
        "for fit; batch sizes are those of all GPUs together. The step is traced without data."
    )
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    options = parser().parse_intermixed_args(arguments)
    with one_line_errors():
        overrides, given = options_of(options.overrides)
        gpus = int(given["gpus"])
        with importing():
            cfg, notes = config(overrides, gpus, options.config_dir)
            from repr.plan.table import table

        shown = table(cfg, gpus=gpus, memory=given["memory"], bandwidth=given["bandwidth"], tflops=given["tflops"])
    from rich.console import Console

    Console().print(shown)
    for note in notes:
        print(note)


if __name__ == "__main__":
    main()

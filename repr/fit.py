"""Pretrain an encoder: ``python -m repr.fit [experiment=NAME] [KEY=VALUE ...]``."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from repr.config import ConfigError, check, compose, load_run
from repr.files import DISK_FULL, replacing

if TYPE_CHECKING:
    import lightning.pytorch as pl

Results = dict[str, tuple[float, float | None]]


class Run(NamedTuple):
    """What a finished run consists of."""

    objective: pl.LightningModule
    datamodule: Any
    trainer: pl.Trainer
    results: Results


def fit(cfg: DictConfig) -> Results:
    """Build what the config says, train it, evaluate it: one run, whatever ``cfg.procedure`` says.

    The run folder receives ``config.yaml``, ``checkpoints/``, ``metrics.csv``, TensorBoard events, ``pictures/`` and,
    at the end, ``results.json`` and ``report.html``.

    Args:
        cfg: from :func:`repr.config.compose`, or from :func:`repr.config.load_run` with ``resume`` set.

    Returns:
        ``<set>/<metric>`` -> (value, level at chance or None), of the evaluation after the last step, and
        ``<set>/num_bad``, the samples that could not be read, where there are any.

    Raises:
        ConfigError: the config has faults; all of them are told.
    """
    check(cfg)
    return train(cfg).results


def single(cfg: DictConfig) -> None:
    """The procedure of one ordinary run: train, and print the evaluation.

    Args:
        cfg: a config that was checked.
    """
    results = train(cfg).results
    if is_first():
        from rich.console import Console

        from repr.callbacks.evaluation import results_table

        if results:
            Console().print(results_table(results))
        else:
            print("nothing was evaluated: data.eval names no set")


def name_folder(cfg: DictConfig) -> None:
    """Give a run that has no folder one."""
    if cfg.run_folder is None:
        cfg.run_folder = f"runs/{cfg.name}/{time.strftime('%Y-%m-%d_%H-%M-%S')}"


def train(cfg: DictConfig) -> Run:
    """As :func:`fit`, for a config that was checked; gives all that was built, too."""
    name_folder(cfg)
    # Imported here, so that a mistyped option is refused before the seconds that these take.
    import lightning.pytorch as pl
    from hydra.utils import instantiate

    from repr.callbacks.evaluation import Evaluation
    from repr.lost_ranks import naming_lost_ranks
    from repr.models.checkpoint_files import read_beside
    from repr.models.freezing import freeze
    from repr.models.pretrained import last_checkpoint, load_weights
    from repr.report.exhibits import save_exhibits
    from repr.report.page import PAGE, write_report

    folder = Path(cfg.run_folder)
    checkpoint = last_checkpoint(folder / "checkpoints") if cfg.resume else None
    if cfg.resume and checkpoint is None:
        raise ConfigError([f"{folder} has no checkpoint to resume from: start the experiment anew"])
    # No tensors here, only what stands beside them; Lightning reads the rest.
    saved = read_beside(checkpoint) if checkpoint else {}
    pl.seed_everything(cfg.seed, verbose=False)
    datamodule = instantiate(cfg.data)
    objective = instantiate(cfg.objective)
    callbacks = [instantiate(node) for node in cfg.callbacks.values() if node]
    trainer = make_trainer(cfg, callbacks, [instantiate(node) for node in cfg.logger.values() if node])
    if cfg.init_from and checkpoint is None:
        report = load_weights(objective, cfg.init_from)
        trainer.print(report)
    freeze(objective, cfg.get("freeze") or {})
    prepare(objective, cfg, trainer.world_size)
    if position := saved.get(type(datamodule).__qualname__):  # if it does not fit, the run's files stay untouched
        datamodule.trainer = trainer
        datamodule.load_state_dict(position)
    if trainer.is_global_zero:
        save_config(cfg)
        _keep_metrics(trainer, saved)
    with naming_lost_ranks(folder):
        trainer.fit(objective, datamodule, ckpt_path=checkpoint)
    if trainer.global_step == 0 and checkpoint is None:  # a run of no steps, such as a pretrained stage 0 of MCL
        trainer.save_checkpoint(folder / "checkpoints" / "step=0.ckpt")
    evaluations = [callback for callback in callbacks if isinstance(callback, Evaluation)]
    if datamodule.eval_names and any(evaluation.step != trainer.global_step for evaluation in evaluations):
        trainer.validate(objective, datamodule, verbose=False)  # the run was resumed after its last step
    results = {name: value for evaluation in evaluations for name, value in evaluation.results.items()}
    bad = datamodule.gather_bad()
    results |= {f"{name}/num_bad": (float(len(rows)), None) for name, rows in bad.items() if rows}
    if trainer.is_global_zero:
        save_results(folder, results)
        for evaluation in evaluations:
            save_exhibits(folder, evaluation.shown, {"bank": datamodule.train, **datamodule.eval})
        write_report([folder], folder / PAGE)
    return Run(objective, datamodule, trainer, results)


def prepare(objective: pl.LightningModule, cfg: DictConfig, num_processes: int) -> None:
    """Set up the encoders as the config says, before anything is sharded.

    Args:
        objective: as it was built.
        cfg: the config.
        num_processes: that train together.
    """
    from repr.models.batchnorm import synchronise, unsynchronised_fault
    from repr.models.slicing import checkpoint_encoders, compile_encoders, slice_encoders

    if cfg.get("sync_batchnorm"):
        synchronise(objective)
    if fault := unsynchronised_fault(objective, num_processes):
        warnings.warn(fault, stacklevel=2)
    if cfg.get("grad_checkpointing"):
        checkpoint_encoders(objective)
    if cfg.get("compile"):
        compile_encoders(objective)
    slice_encoders(objective, cfg.get("micro_batch"))


def make_trainer(cfg: DictConfig, callbacks: Sequence[pl.Callback], loggers: Sequence[Any]) -> pl.Trainer:
    """The Trainer of a config.

    Args:
        cfg: the config.
        callbacks: all that there are.
        loggers: likewise.
    """
    from hydra.utils import instantiate
    from lightning.pytorch.callbacks import Checkpoint

    from repr.callbacks.checkpoint import AtomicCheckpointIO

    _quiet()
    return instantiate(
        cfg.trainer,
        callbacks=list(callbacks),
        logger=list(loggers),
        plugins=[AtomicCheckpointIO()],
        default_root_dir=str(cfg.run_folder),
        use_distributed_sampler=False,  # ours gives every number of processes the same global batch
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
    )


def save_config(cfg: DictConfig, folder: Path | None = None) -> None:
    """Write ``config.yaml`` of a run folder, from which the run can be rebuilt."""
    with replacing((folder or Path(cfg.run_folder)) / "config.yaml") as file:
        file.write(OmegaConf.to_yaml(cfg).encode())


def save_results(folder: Path, results: Results) -> None:
    """Write ``results.json`` of a run folder."""
    from repr.report.run import RESULTS

    with replacing(folder / RESULTS) as file:
        file.write(json.dumps({k: {"value": v, "chance": c} for k, (v, c) in results.items()}, indent=1).encode())


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m repr.fit", description="Pretrain an encoder.")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="experiment=demo, optim.lr=1e-3, ...")
    parser.add_argument("--config-dir", help="a folder of your own, laid out like conf/, whose files come first")
    parser.add_argument("--show", action="store_true", help="print the composed config and leave")
    options = parser.parse_intermixed_args(arguments)
    try:
        cfg = _config(options.overrides, options.config_dir)
        if options.show:
            print(OmegaConf.to_yaml(cfg))
            return
        check(cfg)
        from hydra.utils import instantiate

        procedure = instantiate(cfg.procedure) if cfg.get("procedure") else single  # runs of old have none
        procedure(cfg)
    except SystemExit as stop:
        if type(stop).__name__ == "Stopped" and is_first():
            print(f"stopped; to go on: python -m repr.fit resume={cfg.run_folder}", file=sys.stderr)
        raise SystemExit(stop.code) from None
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        sys.exit(f"error: {message}")
    if is_first():
        print(f"run folder: {cfg.run_folder}")


def user_message(error: BaseException) -> str | None:
    """The message of an error that one of our own checks has raised; None for any other error, which is a bug."""
    while type(error).__name__ == "InstantiationException" and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return f"{error}: the disk is full; what was saved before is kept. Make room, then resume the run"
    if not isinstance(error, ValueError | OSError):
        return None
    lines = str(error).splitlines()
    if lines and lines[0].startswith("Caught ") and "DataLoader worker" in lines[0]:  # a traceback, as text
        where = [line for line in lines if line.lstrip().startswith("File ")]
        ours = bool(where) and f"{os.sep}repr{os.sep}" in where[-1]
        return lines[-1].partition(": ")[2] if ours else None
    frames = list(traceback.walk_tb(error.__traceback__))
    raised_in = frames[-1][0].f_globals.get("__name__", "") if frames else ""
    return str(error) if raised_in == "__main__" or raised_in.startswith("repr.") else None


def _config(overrides: Sequence[str], config_dir: str | None) -> DictConfig:
    resume = [override for override in overrides if override.startswith("resume=")]
    if not resume:
        return compose(overrides, config_dir=config_dir)
    folder = resume[-1].removeprefix("resume=")
    cfg = load_run(folder, [override for override in overrides if override not in resume])
    cfg.resume = cfg.run_folder = folder
    return cfg


def is_first() -> bool:
    """Whether this is the first of all processes, however they were started."""
    from lightning.pytorch.utilities import rank_zero_only

    return getattr(rank_zero_only, "rank", 0) == 0


def _keep_metrics(trainer: pl.Trainer, saved: Mapping[str, Any]) -> None:
    """Keep the rows of ``metrics.csv`` up to the checkpoint; those after it will be written again."""
    from repr.callbacks.metrics_file import MetricsFile, Row

    steps = saved.get("global_step", 0)
    again = saved.get("callbacks", {}).get("Checkpoints", {}).get("evaluate") is not None

    def wanted(row: Row) -> bool:  # a row of training has the number of the step, from 0; one of evaluation likewise
        trained = any(name.startswith("train/") for name in row)
        return int(row["step"]) < (steps if trained or not again else steps - 1)

    for logger in trainer.loggers:
        if isinstance(logger, MetricsFile):
            logger.keep(wanted)


def _quiet_thread(failed: threading.ExceptHookArgs) -> None:
    """TensorBoard's writer meets a full disk in a thread of its own; the run itself says so once."""
    if not (isinstance(failed.exc_value, OSError) and failed.exc_value.errno in DISK_FULL):
        threading.__excepthook__(failed)


def _quiet() -> None:
    """Silence what Lightning says on every run and no one can act on."""
    threading.excepthook = _quiet_thread
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    # The only word of a process that has died, where the others hang until Lightning ends them.
    logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script").setLevel(logging.INFO)
    for message in (
        ".*exists and is not empty.*",  # the run folder is ours
        ".*does not have many workers.*",
        ".*It is recommended to use `self.log.*sync_dist=True.*",  # evaluation results are broadcast already
        ".*LeafSpec.*",  # Lightning's use of torch
        ".*no `val_dataloader`.*",
        ".*custom batch sampler `EvalBatchSampler` for prediction.*",  # it does return all rows
        ".*in eval mode at the start of training.*",  # they are frozen
        "FSDP2-wrapped module .* returned a view tensor.*",  # no flow changes an output in place
        ".*Total length of `list` across ranks is zero.*",
    ):
        warnings.filterwarnings("ignore", message=message)


if __name__ == "__main__":
    main()

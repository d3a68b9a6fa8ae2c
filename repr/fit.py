"""Pretrain an encoder: ``python -m repr.fit [experiment=NAME] [KEY=VALUE ...]``."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from omegaconf import DictConfig, OmegaConf, open_dict

from repr.cli import command, importing, is_first, one_line_errors
from repr.config import ConfigError, compose
from repr.explain import add_show, show, shown_key
from repr.listing import Help
from repr.output import stopping_unread
from repr.runs.claim import claimed
from repr.runs.folder import (
    ENCODER,
    REPORT,
    RESULTS,
    Results,
    can_resume,
    load_run,
    save_config,
    save_results,
    stage_folders,
)
from repr.runs.inputs import check_inputs, data_module
from repr.runs.trust import check_folders, check_trusted, is_trusted, resuming
from repr.sweep.running import sweep

if TYPE_CHECKING:
    import lightning.pytorch as pl


class Run(NamedTuple):
    """What a finished run consists of."""

    objective: pl.LightningModule
    datamodule: Any
    trainer: pl.Trainer
    results: Results


def fit(cfg: DictConfig) -> Results:
    """Build what the config says, train it, evaluate it: one run, whatever ``cfg.procedure`` says.

    The run folder receives what :mod:`repr.runs.folder` names, and TensorBoard events.

    Args:
        cfg: from :func:`repr.config.compose`, or from :func:`repr.runs.folder.load_run` with ``resume`` set.

    Returns:
        ``<set>/<metric>`` -> (value, level at chance or None), of the evaluation after the last step, and
        ``<set>/num_bad``, the samples that could not be read, and ``data/num_retries``, the requests to a store that
        were made again, where there are any.

    Raises:
        ConfigError: the config has faults; all of them are told.
    """
    check_inputs(cfg)
    with claimed(cfg):
        return train(cfg).results


def single(cfg: DictConfig) -> None:
    """The procedure of one ordinary run: train.

    Args:
        cfg: a config that was checked.
    """
    if cfg.resume and (num_steps := _ended(cfg)):
        if is_first():
            print(
                f"{cfg.resume} has ended after {num_steps} steps, so there is nothing to do; a larger "
                f"trainer.max_epochs= trains on, python -m repr.evaluate model={cfg.resume} evaluates it again"
            )
        return
    train(cfg)


def tell_end(cfg: DictConfig, *, every_number: bool = False) -> None:
    """Print the evaluation of a run that has ended, and the commands that come next.

    Args:
        cfg: of the run.
        every_number: print all numbers, not about ten.
    """
    from rich.console import Console

    from repr.evaluate.printed import all_lines, first_lines, of_run
    from repr.export.options import fitting_target

    folder, trust = shlex.quote(str(cfg.run_folder)), "" if is_trusted(cfg, ENCODER) else " trust=true"
    entries, console = of_run(cfg.run_folder), Console(highlight=False)
    if entries and every_number:
        console.print(all_lines(entries))
    elif entries:
        console.print(first_lines(entries, OmegaConf.select(cfg, "callbacks.evaluation.headline") or ()))
        console.print("--all and the report show every number", style="dim")
    elif Path(cfg.run_folder, RESULTS).is_file():
        why = "data.eval names no set" if cfg.callbacks.get("evaluation") else "callbacks.evaluation is null"
        print(f"nothing was evaluated: {why}")
    print(f"look      {folder}/{REPORT}\nevaluate  python -m repr.evaluate model={folder}{trust}")
    if to := fitting_target(cfg):
        print(f"export    python -m repr.export run={folder} to={to} out={folder}/{to}{trust}")


def _ended(cfg: DictConfig) -> int | None:
    """The steps of a run that was trained and evaluated to the end that its config names; None for any other."""
    from repr.runs.checkpoint_files import read_beside
    from repr.runs.checkpoints import last_checkpoint

    if not Path(cfg.run_folder, RESULTS).is_file() or (checkpoint := last_checkpoint(cfg.run_folder)) is None:
        return None
    saved = read_beside(checkpoint)
    steps, epochs = cfg.trainer.get("max_steps", -1), cfg.trainer.get("max_epochs")
    has_steps = steps in (None, -1) or saved["global_step"] < steps
    has_epochs = epochs in (None, -1) or saved["epoch"] + 1 < epochs
    ended = saved["callbacks"].get("Checkpoints", {}).get("ended")
    return saved["global_step"] if ended and not (has_steps and has_epochs) else None


def train(cfg: DictConfig) -> Run:
    """As :func:`fit`, for a config that was checked and has a run folder; gives all that was built, too."""
    # Imported here, so that a mistyped option is refused before the seconds that these take.
    from repr.data.sources.remote import num_retries
    from repr.distributed import gather_objects
    from repr.evaluate.during_training import Evaluation
    from repr.report.exhibits import load_exhibits, save_exhibits
    from repr.report.page import write_report
    from repr.report.projector import add_projector
    from repr.runs.checkpoint_files import read_beside
    from repr.runs.checkpoints import checkpoint_path, last_checkpoint
    from repr.training.loggers import add_config
    from repr.training.metrics_file import keep_rows
    from repr.training.trainer import telling_how_to_go_on

    folder = Path(cfg.run_folder)
    checkpoint = last_checkpoint(folder) if cfg.resume else None
    if cfg.resume and checkpoint is None and is_first():
        print(f"{folder} has saved nothing yet: the run starts from its beginning", flush=True)
    # No tensors here, only what stands beside them; Lightning reads the rest.
    saved = read_beside(checkpoint) if checkpoint else {}
    retries_before = num_retries()
    objective, datamodule, trainer = _built(cfg, cfg.init_from if checkpoint is None else None)
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    if position := saved.get(type(datamodule).__qualname__):  # if it does not fit, the run's files stay untouched
        datamodule.trainer = trainer
        datamodule.load_state_dict(position)
    if trainer.is_global_zero:
        keep_rows(trainer, saved)
        Path(folder, RESULTS).unlink(missing_ok=True)  # of what was the end of the run before
        save_config(cfg, folder)
        add_config(trainer, cfg)
    with telling_how_to_go_on(trainer, cfg):
        trainer.fit(objective, datamodule, ckpt_path=checkpoint)
    if trainer.should_stop:
        trainer.print(f"stopped after {trainer.global_step} steps, by trainer.max_time or a callback")
    if trainer.global_step == 0 and checkpoint is None:  # a run of no steps, such as a pretrained stage 0 of MCL
        trainer.save_checkpoint(checkpoint_path(folder, 0))
    evaluations = [callback for callback in callbacks if isinstance(callback, Evaluation)]
    if datamodule.eval_names and any(evaluation.step != trainer.global_step for evaluation in evaluations):
        trainer.validate(objective, datamodule, verbose=False)  # the run was resumed after its last step
    results = {name: value for evaluation in evaluations for name, value in evaluation.results.items()}
    bad = datamodule.bad.gather()
    results |= {f"{name}/num_bad": (float(len(rows)), None) for name, rows in bad.items() if rows}
    if retries := sum(gather_objects(num_retries() - retries_before)):
        results["data/num_retries"] = (float(retries), None)
    if trainer.is_global_zero:
        save_results(results, folder)
        for evaluation in evaluations:
            save_exhibits(folder, evaluation.shown, {"bank": datamodule.train, **datamodule.eval})
        add_projector(trainer, load_exhibits(folder))
        write_report([folder], folder / REPORT)
    return Run(objective, datamodule, trainer, results)


def _built(cfg: DictConfig, init_from: str | None) -> tuple[pl.LightningModule, Any, pl.Trainer]:
    """Objective, data module and Trainer of a config; what a step takes is compared with the memory that is free."""
    import lightning.pytorch as pl
    from hydra.utils import instantiate

    from repr.runs.initial_weights import load_weights
    from repr.training.memory import check_memory
    from repr.training.trainer import make_trainer, prepare

    pl.seed_everything(cfg.seed, verbose=False)
    callbacks = [instantiate(node) for node in cfg.callbacks.values() if node]  # first, since they refuse at once
    trainer = make_trainer(cfg, callbacks, [instantiate(node) for node in cfg.logger.values() if node])
    datamodule = data_module(cfg)
    objective = instantiate(cfg.objective)
    if init_from:
        trainer.print(load_weights(objective, init_from))
    prepare(objective, cfg, trainer.world_size)
    if is_first():
        check_memory(cfg, objective, trainer)
    return objective, datamodule, trainer


def dry_run(cfg: DictConfig) -> None:
    """Print what a run would do, how much memory it takes, and after ten steps how long; nothing of it stays.

    Args:
        cfg: a config that was checked; of a procedure of several runs an ordinary run is tried.

    Raises:
        ConfigError: it says where to go on.
    """
    if cfg.resume:
        raise ConfigError(["--dry-run tries a run from its beginning: leave resume= out, and give its options"])
    from repr.training.memory import told_memory

    with tempfile.TemporaryDirectory() as folder, open_dict(cfg):
        cfg.run_folder, cfg.logger = folder, {}
        cfg.trainer.update(limit_val_batches=0, min_epochs=None, min_steps=None)
        cfg.callbacks.update(summary={"_target_": "repr.training.summary.DryRun"}, checkpoints=None)
        objective, datamodule, trainer = _built(cfg, cfg.init_from)
        if is_first():
            is_single = cfg.procedure._target_ == "repr.fit.single"
            of = "" if is_single else f", of one run as {cfg.procedure._target_} makes several"
            print(f"dry run{of}: {told_memory(cfg, trainer)}", flush=True)
        trainer.fit(objective, datamodule)
    if is_first():
        print("dry run: nothing was kept")


def parser() -> argparse.ArgumentParser:
    """The arguments of the command line."""
    result = command("fit", "Pretrain an encoder.", "experiment=demo, optim.lr=1e-3, ...", add_help=False)
    result.add_argument("-h", "--help", action=Help)
    add_show(result)
    result.add_argument("--sweep", action="store_true", help="a run of each value, as in seed=0,1,2 optim.lr=1e-3,3e-3")
    result.add_argument("--dry-run", action="store_true", help="train ten steps to say how long all take; keep nothing")
    result.add_argument("--all", action="store_true", help="print every number of the evaluation at the end, not ten")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    options = parser().parse_intermixed_args(arguments)
    with one_line_errors():
        key = shown_key(options)
        if options.sweep:
            if options.dry_run or key is not None:
                raise ConfigError(["--sweep trains: leave --dry-run and --show out"])
            sys.exit(sweep(options.overrides, options.config_dir))
        with importing():
            cfg = _config(options.overrides, options.config_dir)
            if key is not None:
                print(show(cfg, key))
                return
            check_inputs(cfg)
            from hydra.utils import instantiate

            procedure = instantiate(cfg.procedure)
            from repr.training.checkpoints import Stopped

        with stopping_unread():
            try:
                if options.dry_run:
                    dry_run(cfg)
                    return
                with claimed(cfg):
                    procedure(cfg)
            except (KeyboardInterrupt, SystemExit) as stop:
                # Lightning makes a SystemExit(1) of Ctrl-C at a moment that nothing has been saved for.
                at_once = any(isinstance(error, KeyboardInterrupt) for error in (stop, stop.__context__))
                if (at_once or isinstance(stop, Stopped)) and is_first() and can_resume(cfg.run_folder):
                    with suppress(OSError):  # of a terminal that is gone
                        print(f"stopped; to go on: python -m repr.fit {resuming(cfg)}", file=sys.stderr)
                raise SystemExit(128 + signal.SIGINT if at_once else getattr(stop, "code", 1)) from None
        if is_first():
            tell_end(cfg, every_number=options.all)


def _config(overrides: Sequence[str], config_dir: str | None) -> DictConfig:
    given = {key: value for key, equals, value in (override.partition("=") for override in overrides) if equals}
    if "resume" not in given:
        return compose(overrides, config_dir=config_dir)
    folder, trust = given["resume"], given.get("trust", "false").lower() == "true"
    changed = [override for override in overrides if override.partition("=")[0] not in ("resume", "trust")]
    cfg = load_run(folder, changed, trust=trust)
    for stage in stage_folders(folder).values():  # the procedure goes on with them
        load_run(stage, trust=trust)
    cfg.resume, cfg.run_folder, cfg.trust = folder, folder, trust
    if not trust:
        check_trusted(cfg, folder)  # again, since what was changed may decide what an interpolation leads to
        check_folders(cfg)
    return cfg


if __name__ == "__main__":
    main()

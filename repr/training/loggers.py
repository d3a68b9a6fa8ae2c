"""What loggers get beside the numbers, and those of other libraries, with which a resumed run goes on in its own run.

Servers, accounts and modes come from where each library looks for them, such as ``WANDB_MODE=offline``,
``MLFLOW_TRACKING_URI`` or ``TRACKIO_SPACE_ID``, never from the config, which may come from a stranger.
"""

from __future__ import annotations

import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig
from torch import Tensor

from repr.runs.folder import load_logger_runs, save_logger_run
from repr.training import tensorboard


class _Elsewhere(ABC):
    """What the loggers below have in common.

    Attributes:
        library: its name, which is that of the extra, too.
    """

    library: ClassVar[str]

    @classmethod
    def missing(cls) -> str | None:
        """Say how to install the library where it is missing; the check of a config asks."""
        if find_spec(cls.library):
            return None
        return f"{cls.library} is not installed: pip install 'repr-pretrain[{cls.library}]', or set another logger="

    @abstractmethod
    def log_picture(self, name: str, picture: Tensor, step: int) -> None:
        """Show a picture, (3, H, W) uint8, under a name."""


class Wandb(_Elsewhere, WandbLogger):
    """Weights & Biases; what it keeps on the disk lies in ``<folder>/wandb``.

    Args:
        folder: of the run.
        project: where the run is listed.
        name: of the run.
    """

    library = "wandb"

    def __init__(self, folder: str | Path, project: str, name: str) -> None:
        run, settings = load_logger_runs(folder).get(self.library), {"quiet": True}
        super().__init__(name=name, project=project, save_dir=folder, version=run, settings=settings)

    def log_picture(self, name: str, picture: Tensor, step: int) -> None:
        """See the base."""
        self.log_image(name, [picture.permute(1, 2, 0).numpy()], step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End the run, which the next number begins again; else a run that follows in this process would join it."""
        super().finalize(status)
        if self._experiment is not None:
            self._id, run, self._experiment = self._experiment.id, self._experiment, None
            self._wandb_init["id"] = self._id
            run.finish(exit_code=0 if status in ("success", "finished") else 1)


class MLFlow(_Elsewhere, MLFlowLogger):
    """MLflow; without ``MLFLOW_TRACKING_URI`` in ``<folder>/mlflow``, where ``mlflow ui`` finds it.

    Args:
        folder: of the run.
        project: the experiment, as MLflow calls it, where the run is listed.
        name: of the run.
    """

    library = "mlflow"

    def __init__(self, folder: str | Path, project: str, name: str) -> None:
        own = Path(folder, self.library).resolve()
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        super().__init__(
            experiment_name=project,
            run_name=name,
            tracking_uri=uri or f"sqlite:///{own / 'mlflow.db'}",
            artifact_location=None if uri else own.as_uri(),
            run_id=load_logger_runs(folder).get(self.library),
        )
        self._own = None if uri else own

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The client, whose store is made at the first call."""
        if self._own:
            self._own.mkdir(parents=True, exist_ok=True)
        return super().experiment

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Log what is not known yet: MLflow keeps the values that a run began with."""
        known = self.experiment.get_run(self.run_id).data.params
        super().log_hyperparams({name: value for name, value in params.items() if name not in known})

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log, with names that MLflow takes: ``R@1`` as ``R_at_1``."""
        super().log_metrics({name.replace("@", "_at_"): value for name, value in metrics.items()}, step)

    def log_picture(self, name: str, picture: Tensor, step: int) -> None:
        """See the base."""
        self.experiment.log_image(self.run_id, picture.permute(1, 2, 0).numpy(), key=name, step=step)


class Trackio(_Elsewhere, Logger):
    """Trackio; without ``TRACKIO_SPACE_ID`` on this machine, where ``trackio show`` finds it.

    Args:
        folder: of the run.
        project: where the run is listed.
        name: of the run, to which something is added that tells it from others of this name.
    """

    library = "trackio"
    name = version = ""  # which Lightning wants

    def __init__(self, folder: str | Path, project: str, name: str) -> None:
        super().__init__()
        self.name = project
        self.version = load_logger_runs(folder).get(self.library) or f"{name}-{secrets.token_hex(3)}"
        self._run: Any = None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run of Trackio, begun at the first call."""
        if self._run is None:
            import trackio

            self._run = trackio.init(project=self.name, name=self.version, resume="allow", embed=False)
        return self._run

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Set the config of the run."""
        self.experiment.config.update(params)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log the numbers of a step."""
        self.experiment.log(dict(metrics), step=step)

    def log_picture(self, name: str, picture: Tensor, step: int) -> None:
        """See the base."""
        import trackio

        self.experiment.log({name: trackio.Image(picture.permute(1, 2, 0).numpy())}, step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left; the next number begins again where the run has ended."""
        if self._run is not None:
            self._run.finish()
            self._run = None


def add_config(trainer: pl.Trainer, cfg: DictConfig) -> None:
    """Give all loggers the config, and keep by which ids a resumed run goes on; call it on the first process."""
    tensorboard.add_config(trainer, cfg)
    for logger in trainer.loggers:
        if isinstance(logger, _Elsewhere):
            logger.log_hyperparams(tensorboard.plain_values(cfg))
            save_logger_run(logger.library, str(logger.version), cfg.run_folder)


def add_picture(trainer: pl.Trainer, name: str, picture: Tensor) -> None:
    """Give all loggers a picture, (3, H, W) uint8; call it on the first process."""
    for writer in tensorboard.writers(trainer):
        writer.add_image(f"pictures/{name}", picture, trainer.global_step)
    for logger in trainer.loggers:
        if isinstance(logger, _Elsewhere):
            logger.log_picture(f"pictures/{name}", picture, trainer.global_step)

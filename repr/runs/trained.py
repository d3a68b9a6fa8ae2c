"""Trained objectives: read from a run, or copied out of one that is in memory."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

from repr.cli import user_message
from repr.config import ConfigError, untrained
from repr.runs.checkpoint_files import read_checkpoint
from repr.runs.checkpoints import checkpoints, damage, last_checkpoint
from repr.runs.folder import ENCODER, load_run, run_folder
from repr.shard import whole

_TRAINED = "current_model_state"  # where Lightning's WeightAveraging puts the weights that are trained


@dataclass(frozen=True)
class Trained:
    """An objective with the config that it was built from.

    Attributes:
        objective: on the CPU, in evaluation mode; nothing else holds it.
        cfg: the config of its run.
        name: what errors call it.
        run: the run folder whose evaluation is one of these weights; None: they were not evaluated.
        weights: ``model``, ``teacher``, ``average`` or ``unaveraged``; the last two where Lightning's
            ``WeightAveraging`` has kept an average.
    """

    objective: Any
    cfg: DictConfig
    name: str
    run: Path | None = None
    weights: str = "model"

    @property
    def has_text(self) -> bool:
        """Whether a text tower was trained; a flow may have the method without one."""
        return hasattr(self.objective, "encode_text") and getattr(self.objective, "text", None) is not None

    def of_teacher(self) -> Trained:
        """The same objective with the modules of its teacher in the place of those that it follows.

        Raises:
            ConfigError: the flow has no teacher.
        """
        teacher = getattr(self.objective, "teacher", None)
        if teacher is None:
            flow = type(self.objective).__name__
            raise ConfigError([f"weights=teacher: {flow} of {self.name} has no teacher; leave it out"])
        for name, module in teacher.named_children():
            setattr(self.objective, name, module)
        return replace(self, run=None, weights="teacher")

    @classmethod
    def copy_of(cls, objective: nn.Module, cfg: DictConfig, name: str = "the objective") -> Trained:
        """A copy of an objective in memory, which may go on training where it is.

        Args:
            objective: built from ``cfg.objective``, on any device; if it is sharded, every rank must call this.
            cfg: a whole config, as :func:`repr.config.compose` gives it.
            name: what errors call it.

        Raises:
            ConfigError: the config is not that of the objective.
        """
        tensors = {key: whole(tensor) for key, tensor in objective.state_dict().items()}
        return cls(_rebuilt(cfg, tensors, name), cfg, name)

    @classmethod
    def read(cls, path: str | Path, *, unaveraged: bool = False, trust: bool = False) -> Trained:
        """The objective of a run folder, from its last whole checkpoint, or of a checkpoint inside a run folder.

        Args:
            path: the folder or checkpoint.
            unaveraged: of a run with Lightning's ``WeightAveraging``, whose checkpoints hold the average as the
                weights, take those that the optimizer steps on.
            trust: see :func:`repr.runs.folder.load_run`.

        Raises:
            ConfigError: no run lies there, it has no whole checkpoint, one that this code does not fit, or one without
                average.
        """
        path, folder = Path(path), run_folder(path, "run")
        cfg = load_run(folder, trust=trust, built=ENCODER)
        is_checkpoint = path != folder
        checkpoint: Path | None = path
        if is_checkpoint:
            if fault := damage(path):
                raise ConfigError([f"run={path} is damaged ({fault}); give another checkpoint"])
        else:
            checkpoint = last_checkpoint(path)
        if checkpoint is None:
            raise ConfigError([f"run={path} has no finished checkpoint: let it train to the end of an epoch first"])
        content = read_checkpoint(checkpoint, optimizer=False)
        averages = _TRAINED in content
        if unaveraged and not averages:
            raise ConfigError([f"weights=unaveraged: {checkpoint} holds no average of weights; leave it out"])
        tensors = content[_TRAINED if unaveraged else "state_dict"]
        # Results are those of the last step, and of the average where there is one.
        evaluated = not unaveraged and checkpoint == checkpoints(folder)[0]
        weights = "unaveraged" if unaveraged else "average" if averages else "model"
        objective = _rebuilt(cfg, tensors, str(checkpoint))
        return cls(objective, cfg, str(checkpoint), folder if evaluated else None, weights)


def _rebuilt(cfg: DictConfig, tensors: Mapping[str, Tensor], name: str) -> Any:
    """Build the objective of a config, load the tensors, every one.

    Raises:
        ConfigError: names or shapes differ.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            objective = instantiate(untrained(cfg).objective)  # the weights are at hand, the network may not be
    except (InstantiationException, OmegaConfBaseException) as error:
        cause = user_message(error) or " ".join(str(error).split())
        raise ConfigError([f"{name}: the objective of its config cannot be built: {cause}"]) from error
    if getattr(objective, "backbone", None) is None:
        raise ConfigError(
            [f"{name}: {type(objective).__name__} was trained without pictures and has no encoder of them"]
        )
    own = objective.state_dict()
    faults = [f"'{key}' is missing{_hint(key, tensors.keys() - own.keys())}" for key in own if key not in tensors]
    faults += [f"'{key}' is not known" for key in tensors if key not in own]
    faults += [
        f"'{key}' has shape {tuple(tensors[key].shape)}, not {tuple(own[key].shape)}"
        for key in own
        if key in tensors and tensors[key].shape != own[key].shape
    ]
    if faults:
        more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ConfigError(
            [
                f"{name} does not fit the objective of its config, as if another version had written it: "
                f"{'; '.join(faults[:3])}{more}. Export it with the version that trained it, or rename its tensors"
            ]
        )
    objective.load_state_dict(tensors)
    objective.eval().requires_grad_(False)
    return objective.evaluated() if hasattr(objective, "evaluated") else objective


def _hint(key: str, others: Any) -> str:
    near = difflib.get_close_matches(key, list(others), n=1, cutoff=0.6)
    return f" (it has '{near[0]}')" if near else ""

"""The base of every flow: weights, sum, logging, optimizer. It knows no method."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from inspect import getdoc, signature
from typing import Any, ClassVar, Self, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.memory import recursive_detach
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from repr.batch import Batch, Embeddings, StepOutput, num_rows
from repr.distributed import world_size
from repr.drawing import Show
from repr.models.batchnorm import share_statistics
from repr.models.teacher import Teacher
from repr.models.unreached import freeze_unreached
from repr.objectives.negatives import FALSE_NEGATIVES
from repr.objectives.views import backbone_faults, precision_faults, weights_fault
from repr.optim import Optim, clip_each, parameters_of
from repr.shard import called, local, shard, total_norm


class Objective(pl.LightningModule):
    """A flow: how views and pairs move through encoders and heads to unweighted loss terms.

    A subclass names its ``TERMS``, builds its submodules in ``__init__`` and gives :meth:`step`; the rest
    has defaults. A flow that overrides a hook of Lightning calls the one of this class too. What a flow says of its
    arguments comes on top of what stands here.

    A step that the guard skips is counted in ``step_number``, but it has no gradients, so nothing follows it. When a
    run starts or goes on, the number is Lightning's ``global_step``, which every checkpoint holds. A loop without
    Trainer calls :meth:`finish_step` after each ``optimizer.step()``, or sets the number.

    A flow has a teacher if its constructor assigns a :class:`repr.models.teacher.Teacher` to ``self.teacher``. When a
    new run starts, after ``init_from``, it becomes the student again; it follows the weights once for each step that
    was made. Checkpoints, sharding, slices, the log (``train/momentum``) and the export (``weights=teacher``) find it.

    Args:
        backbone: image encoder, (B, 3, H, W) -> (B, num_features); None in a flow that reads no pictures.
        weights: weight of each loss term; a term of weight 0 is not computed. None: 1 for the first of ``TERMS``.
        optim: optimizer and schedule.
        options: of the subclass, as far as the names of its terms depend on them.

    Args of the flows that take them:
        dim: width of what the heads give.
        hidden_dim: width of the hidden layers of the heads.
        chunk_size: rows of the matrix of pairs of a loss that exist at a time; None: all.
        exchange: how losses reach the rows of other processes, ``gather`` or ``ring``.
        loss_precision: what products of pairs are computed in on a GPU, ``float32``, ``tf32`` or ``bf16x3``.
        false_negatives: ``mask`` leaves pairs out of the contrast that have picture or caption in common,
            ``mask_labels`` those with equal labels, too; ``keep`` none.

    Attributes:
        output: what the last step gave, detached; for callbacks.
        step_number: optimizer steps (not micro-batches) that were made before the present one.
        total_steps: optimizer steps of the whole run; None until training starts, and without a Trainer.
        teacher: None in a flow that assigns none.

    Raises:
        ValueError: the weights name other terms or are all zero, or options of the flow do not go together.
    """

    TERMS: tuple[str, ...] = ()
    # Those of TERMS that push each sample away from the other samples of its batch, and from no others.
    PAIRWISE: tuple[str, ...] = ()
    STATISTICS: tuple[str, ...] = ()  # those that are variances or correlations over the batch
    # Sub-modules that treat each row of a batch by itself, which micro_batch runs in slices (repr.models.slicing).
    ENCODERS: tuple[str, ...] = ("backbone",)
    EMBEDDINGS: tuple[str, ...] = ("image", "trunk")  # what predict_step gives
    takes_hard_captions = False  # whether wrong captions of its samples are negatives, too
    takes_texts = False  # whether it reads further captions of its samples
    # What it logs: name -> a sentence that says what it is and which direction is better.
    MEANINGS: ClassVar[dict[str, str]] = {
        "loss": "Sum of the terms by their weights; lower is better, within one recipe.",
        "lr": "Learning rate, of the parameters with the highest.",
        "false_negatives": FALSE_NEGATIVES,
        "momentum": "Share of itself that the teacher keeps at a step.",
    }
    backbone: nn.Module

    def __init__(
        self,
        backbone: nn.Module | None,
        *,
        weights: Mapping[str, float] | None = None,
        optim: Optim | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        terms = self.term_names(options or {})
        weights = dict.fromkeys(terms[:1], 1.0) if weights is None else weights
        if unknown := sorted(set(weights) - set(terms)):
            raise ValueError(f"weights names {', '.join(unknown)}; the terms are {', '.join(terms)}")
        self.backbone = cast(nn.Module, backbone)
        if isinstance(backbone, nn.Module):
            freeze_unreached(backbone, type(self).__name__)
        if wrong := [name for name, weight in weights.items() if not math.isfinite(weight)]:
            raise ValueError(
                f"weights.{wrong[0]}={weights[wrong[0]]}; set it to a number, or to 0 to leave the term out"
            )
        self.weights = {name: float(weight) for name, weight in weights.items() if weight}
        if not self.weights:
            raise ValueError(f"weights are all zero; give one of {', '.join(terms)} a weight")
        self.optim = optim or Optim()
        self.output = StepOutput({})
        self.step_number = 0
        self.total_steps: int | None = None
        self.teacher: Teacher | None = None

    @classmethod
    def term_names(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        """The terms of a flow that is built with these options: ``TERMS``, unless some have the names of its parts."""
        return cls.TERMS

    def config_faults(self, cfg: Any) -> Iterator[str]:
        """What this flow finds wrong in the config around it: one message for each fault.

        The modules lie on torch's meta device: their shapes are known and nothing is computed. What the constructor can
        know by itself, it refuses with a ValueError. A flow with faults of its own yields these too.
        """
        if self.weights.keys() & {*self.PAIRWISE, *self.STATISTICS} and cfg.data.get("batch_size", 2) < 2:
            yield f"{type(self).__name__} compares the samples of a batch: set data.batch_size to 2 or more"
        if fault := weights_fault(self):
            yield fault
        if cfg.data.get("hard_captions") and not self.takes_hard_captions:
            yield f"{type(self).__name__} as it is here learns nothing from wrong captions: set hard_captions=none"
        if cfg.data.get("distorted_captions") and not self.takes_texts:
            yield f"{type(self).__name__} as it is here reads one caption of a sample: set distorted_captions=none"
        if "backbone" in self._modules and cfg.get("views"):  # a part of a hybrid has it from there, with all views
            yield from backbone_faults(self.backbone, cfg)
            yield from precision_faults(self.backbone, cfg)

    def negatives_fault(self) -> str | None:
        """Why batches of one cluster would change nothing that this flow learns from, or None.

        They are of use where the negatives of a sample are the other samples of its batch (``PAIRWISE``).
        """
        if self.weights.keys() & set(self.PAIRWISE):
            return None
        terms = ", ".join(self.weights)
        pairwise = f"; give one of {', '.join(self.PAIRWISE)} a weight" if self.PAIRWISE else ""
        return f"none of its terms ({terms}) takes the other samples of a batch for negatives{pairwise}"

    def evaluated(self) -> Objective:
        """The objective whose encoders are evaluated and exported: itself, but of a flow of several parts one of them.

        The flow is not to be used any more.
        """
        return self

    @property
    def meanings(self) -> dict[str, str]:
        """A sentence for each number that is logged, by its name there; those of ``losses`` are their own."""
        told = {
            name: sentence for name, sentence in self.MEANINGS.items() if name not in self.TERMS or name in self.weights
        }
        for name, loss in getattr(self, "losses", {}).items():
            if name in self.weights and (doc := getdoc(getattr(loss, "func", loss))):
                sentence = doc.split(".\n")[0].rstrip(".").replace("``", "")
                told[name] = f"{sentence}; lower is better."
        return {f"train/{name}": " ".join(sentence.split()) for name, sentence in told.items()}

    def step(self, batch: Batch) -> StepOutput:
        """Compute the unweighted loss terms of a batch; exactly those that have a weight."""
        raise NotImplementedError(f"{type(self).__name__} has no step()")

    def encode_image(self, images: Tensor) -> Tensor:
        """What is evaluated and exported: (B, 3, H, W) -> (B, D)."""
        return self.backbone(images)

    def embed(self, batch: Batch) -> Embeddings:
        """Embeddings of an evaluation batch, not normalised."""
        image = self.encode_image(batch["image"])
        return Embeddings(image=image, trunk=image)

    def chance(self, num_rows: int) -> Mapping[str, float | Tensor | None]:
        """Values at chance of the terms that have one, for a global batch of ``num_rows`` samples.

        They are logged as ``train/<term>.chance``, see :func:`repr.losses.chance.at_chance`.
        """
        return {}

    def pictures(self, batch: Batch, show: Show) -> dict[str, Tensor]:
        """Draw what the flow does with some rows of a training batch: name -> (3, H, W) uint8 on the CPU.

        It is called in evaluation mode without gradients, on every process; ``show`` undoes the normalisation of
        pictures. The run's report shows the result.
        """
        return {}

    def update_targets(self) -> None:
        """Change what follows the weights, such as a clamped temperature; called after each optimizer step made."""

    def finish_step(self, *, skipped: bool = False) -> None:
        """Count a step of the optimizer; clamps and teacher follow unless it was ``skipped`` and changed no weights."""
        if not skipped:
            self.update_targets()
            if self.teacher is not None:
                self.teacher.follow(self, self.step_number, self.total_steps)
        self.step_number += 1

    def on_train_start(self) -> None:
        """Learn at which step of how many the run is; a new one starts with the teacher as the student is."""
        self.step_number, self.total_steps = self.global_step, int(self.trainer.estimated_stepping_batches)
        if self.teacher is not None and self.step_number == 0:  # init_from may have changed the student
            self.teacher.restart(self)

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Weighted sum of the terms."""
        weights = self.weights_now()
        assert terms.keys() == weights.keys(), f"step() gave {sorted(terms)}, weighted are {sorted(weights)}"
        return torch.stack([weights[name] * term for name, term in terms.items()]).sum()

    def weights_now(self) -> Mapping[str, float]:
        """The weights of the terms of this step; a flow whose terms have a time of their own overrides it."""
        return self.weights

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Sum the terms of :meth:`step`, and log ``train/loss``, the terms with their chance, and other scalars.

        Other than the loss they are logged in the steps that loggers write, and in the last one.
        """
        output = self.step(batch)
        loss = self.total(output.terms)
        self.output = recursive_detach(output)
        self.log("train/loss", loss, prog_bar=True)
        if self._is_written():
            self._log_step(batch, output)
        return loss * share_of_step(self.trainer, batch_idx)

    def _is_written(self) -> bool:
        """Whether loggers write this step; what is logged in another one costs time and is never read."""
        every, step = getattr(self.trainer, "log_every_n_steps", 1), self.global_step + 1
        return bool(every and step % every == 0) or step == self.total_steps

    def _log_step(self, batch: Batch, output: StepOutput) -> None:
        rate = max(group["lr"] for group in self.trainer.optimizers[0].param_groups)
        logs = {**output.terms, **self._chance(num_rows(batch) * world_size()), **output.logs, "lr": rate}
        if self.teacher is not None:
            logs["momentum"] = self.teacher.momentum_at(self.step_number, self.total_steps)
        self.log_dict({f"train/{name}": value for name, value in logs.items()})

    def _chance(self, num_rows: int) -> dict[str, float | Tensor]:
        """The levels that there are, and that of the sum if each weighted term has one."""
        known, weights = self.chance(num_rows), self.weights_now()
        levels = {name: level for name in weights if (level := known.get(name)) is not None}
        logs = {f"{name}.chance": level for name, level in levels.items()}
        if levels.keys() == weights.keys():
            logs["loss.chance"] = sum(weights[name] * level for name, level in levels.items())
        return logs

    def validation_step(  # type: ignore[override]
        self, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> Embeddings | None:
        """Embed an evaluation batch, which callbacks collect; of a training batch, log ``val/loss`` and the terms.

        The latter comes from a user's own loader. It leaves weights, buffers and random numbers as they are.
        """
        if not batch.keys() & {"views", "seed"}:
            return self.embed(batch)
        kept = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        with isolate_rng():
            output = self.step(batch)
        self.load_state_dict(kept)
        logs = {"loss": self.total(output.terms), **output.terms, **output.logs}
        told = {f"val/{name}": value for name, value in logs.items()}
        self.log_dict(told, batch_size=num_rows(batch), sync_dist=True)
        return None

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Embeddings:
        """Embed an evaluation batch; samples may be clustered by what this returns."""
        return self.embed(batch)

    def configure_model(self) -> None:
        """With ``trainer=fsdp`` split the parameters over the processes, once; else nothing.

        Raises:
            ValueError: the objective cannot be sharded.
        """
        if self.device_mesh is not None and not self._is_sharded():
            # Autocast takes norms to float32 on CUDA; on the CPU they would refuse weights of another type.
            mixed = self.trainer.precision == "bf16-mixed" and self.device_mesh.device_type == "cuda"
            shard(self, self.device_mesh["data_parallel"], param_dtype=torch.bfloat16 if mixed else None)

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = True,
        **options: Any,
    ) -> Self:
        """As Lightning's, of a checkpoint of :mod:`repr.fit` or of any Trainer; it runs no code of the file.

        A checkpoint holds tensors, so that ``options`` repeat the arguments that the objective was built with.

        Raises:
            ValueError: they are others, or the checkpoint is a folder.
        """
        try:
            signature(cls).bind_partial(**options)  # Lightning leaves out what it does not know
            return super().load_from_checkpoint(
                checkpoint_path, map_location, hparams_file, strict, weights_only, **options
            )
        except (TypeError, RuntimeError, IsADirectoryError) as error:
            needed = [name for name, option in signature(cls).parameters.items() if option.default is option.empty]
            raise ValueError(
                f"{checkpoint_path} gives no {cls.__name__}: {' '.join(str(error).split()):.300}. Give the arguments "
                f"that it was built with, as in load_from_checkpoint(PATH, {(needed or ['backbone'])[0]}=..., ...). A "
                "run folder of repr.fit knows them: repr.runs.trained.Trained.read(RUN_FOLDER).objective"
            ) from error

    def _is_sharded(self) -> bool:
        return any(isinstance(part, FSDPModule) for _, part in called(self))

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """As Lightning does it; torch's own cannot take sharded and whole gradients together."""
        parameters = parameters_of(optimizer)
        if self.optim.clip_each is not None:
            clip_each(parameters, self.optim.clip_each)
        if not self._is_sharded():
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            mine = [local(gradient) for gradient in gradients]
            if gradient_clip_algorithm == "value":
                torch._foreach_clamp_min_(mine, -gradient_clip_val)
                torch._foreach_clamp_max_(mine, gradient_clip_val)
            else:
                scale = gradient_clip_val / (total_norm(gradients) + 1e-6)
                torch._foreach_mul_(mine, scale.clamp(max=1.0))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step the optimizer, then whatever follows the weights; a skipped step has no gradients left."""
        super().optimizer_step(*args, **kwargs)
        self.finish_step(skipped=all(parameter.grad is None for parameter in self.parameters()))
        if self._is_sharded():  # DDP does it by itself
            share_statistics(self)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer and its schedule, stepped once per optimizer step.

        Raises:
            ValueError: nothing says when training ends, where the schedule does.
        """
        if math.isinf(num_steps := self.trainer.estimated_stepping_batches):
            raise ValueError(
                "training has no last step, at which the schedule of the learning rate ends: give the Trainer "
                "max_steps, or max_epochs and data of a length"
            )
        optimizer, schedule = self.optim.build(self, int(num_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def share_of_step(trainer: pl.Trainer, batch_idx: int) -> float:
    """What to multiply the loss of a batch by, so that a step is the mean over its batches.

    It is 1, but in the last step of an epoch if that has fewer batches than ``accumulate_grad_batches``, by which
    Lightning divides each loss.
    """
    accumulate = trainer.accumulate_grad_batches
    left = trainer.num_training_batches - batch_idx // accumulate * accumulate
    return accumulate / min(accumulate, left)

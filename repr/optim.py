"""Optimizer and learning-rate schedule of every objective: parameter groups, timm's factory, one factor a step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import timm.optim
import torch
from omegaconf import OmegaConf
from timm.models import group_parameters
from timm.optim.lars import Lars
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import implicit_replication
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from repr.errors import first_line
from repr.shard import local, norms, uncalled_parameters

Schedule = Literal["cosine", "constant"]
LARS_L2 = "lars_l2"
# What an optimizer may answer to options, or to gradients, that it was not made for.
REFUSALS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Optim:
    """The optimizer of a run; values are used as written, nothing is scaled by the batch size.

    Attributes:
        name: any optimizer of timm's factory (``timm.optim.list_optimizers()``), or ``lars_l2`` (:class:`LarsL2`).
        lr: peak learning rate.
        weight_decay: decay of every parameter with two or more dimensions, but those that a module lists in
            ``no_weight_decay()``, as timm's do their positions and class tokens. Biases, gains of norms and learned
            scalars have fewer, and pulling those to zero changes what the network can express.
        final_weight_decay: decay at the end of the run, reached along half a cosine; None: it stays.
        decay_1d: decay biases and gains too (some papers do).
        options: further arguments of the optimizer, for example ``betas``, ``eps``, ``momentum``.
        schedule: ``cosine`` (to ``final_lr`` at the last step) or ``constant``.
        warmup_steps: steps of linear warm-up, of which the last has ``lr``; below 1 their share of the run (0.05).
        warmup_lr: learning rate of the first of them; None: ``lr / warmup_steps``, as in open_clip.
        peak_after_warmup: the first step after the warm-up, instead of its last, is the first with ``lr``; a cosine
            begins there either way.
        final_lr: learning rate at the end of the cosine or of the cooldown.
        cooldown_steps: last steps of a constant schedule over which it falls to ``final_lr``; below 1 their share.
        cooldown_power: shape of that fall; 1 is linear.
        layer_decay: factor by which the learning rate of the backbone falls from each layer to the one below it, as
            timm's ``group_matcher`` counts layers; everything else keeps the full rate. None: no such decay.
        clip_each: norm to which the gradient of each parameter is clipped by itself, as DINO's authors do; None: not.

    Raises:
        ValueError: options that exclude each other, no such optimizer, or one that makes no step with them.
    """

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    final_weight_decay: float | None = None
    decay_1d: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    schedule: Schedule = "cosine"
    warmup_steps: float = 0
    warmup_lr: float | None = None
    peak_after_warmup: bool = False
    final_lr: float = 0.0
    cooldown_steps: float = 0
    cooldown_power: float = 1.0
    layer_decay: float | None = None
    clip_each: float | None = None

    def __post_init__(self) -> None:
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"optim.schedule is '{self.schedule}'; set it to cosine or constant")
        for name in ("lr", "weight_decay"):
            if not (isinstance(value := getattr(self, name), int | float) and 0 <= value < math.inf):
                raise ValueError(f"optim.{name} is {value}; set it to a number of 0 or more")
        for name in ("warmup_steps", "cooldown_steps"):
            value = getattr(self, name)
            if isinstance(value, bool | str | None) or not (0 <= value < 1 or (value >= 1 and value % 1 == 0)):
                raise ValueError(
                    f"optim.{name} is {value}; set it to a number of steps, or to a share of the run below 1"
                )
        if self.cooldown_steps and self.schedule != "constant":
            raise ValueError("optim.cooldown_steps belongs to optim.schedule=constant")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"optim.layer_decay is {self.layer_decay}; set it between 0 and 1, or to null")
        if self.final_weight_decay is not None and (self.final_weight_decay < 0 or self.name.lower() == LARS_L2):
            raise ValueError(
                f"optim.final_weight_decay is {self.final_weight_decay} with optim.name={self.name}; set it to 0 or "
                f"more and to an optimizer other than {LARS_L2}, or to null"
            )
        if self.clip_each is not None and self.clip_each <= 0:
            raise ValueError(f"optim.clip_each is {self.clip_each}; set it above 0, or to null")
        self._try()

    def build(self, module: nn.Module, total_steps: int) -> tuple[Optimizer, LambdaLR]:
        """Make the optimizer of ``module`` and the schedule to step once per optimizer step.

        Raises:
            ValueError: warm-up and cooldown are longer than the run, or an optimizer that does not go with sharded
                parameters.
        """
        if sum(self._phases(total_steps)) > total_steps:
            raise ValueError(
                f"optim.warmup_steps={self.warmup_steps} and optim.cooldown_steps={self.cooldown_steps} exceed the "
                f"{total_steps} steps of this run: lower them, or raise trainer.max_epochs or trainer.max_steps"
            )
        optimizer = self._make(self.param_groups(module, total_steps))
        _fuse(optimizer)
        optimizer.register_load_state_dict_post_hook(_lay_out)
        if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
            if optimizer.defaults.get("max_grad_norm") is not None:  # over sharded and whole gradients together
                raise ValueError(
                    f"optim.name={self.name} clips by itself, which sharded parameters do not allow: set "
                    "optim.options.max_grad_norm=null and trainer.gradient_clip_val"
                )
            optimizer.__class__ = _on_shards(type(optimizer))
        firsts = [group.pop("first_step") for group in optimizer.param_groups]
        factors: list[Callable[[int], float]] = [
            partial(self.lr_factor, total_steps=total_steps, first_step=first) for first in firsts
        ]
        if self.final_weight_decay is None:
            return optimizer, LambdaLR(optimizer, factors)
        return optimizer, _WithDecay(optimizer, factors, partial(self.decay_at, total_steps=total_steps))

    def _phases(self, total_steps: int) -> tuple[int, int]:
        """Whole steps of warm-up and of cooldown."""
        warmup, cooldown = (
            round(steps * total_steps if steps < 1 else steps) for steps in (self.warmup_steps, self.cooldown_steps)
        )
        return warmup, cooldown

    def _make(self, groups: list[dict[str, Any]]) -> Optimizer:
        # Plain values: some optimizers keep them in their state, and a checkpoint is read back as plain data.
        options: Any = self.options
        if OmegaConf.is_config(options):
            options = OmegaConf.to_container(options, resolve=True)
        if self.name.lower() == LARS_L2:
            return LarsL2(groups, lr=self.lr, **options)
        return timm.optim.create_optimizer_v2(groups, opt=self.name, lr=self.lr, **options)

    def _try(self) -> None:
        """Make two steps with a matrix, a vector and a convolution's weight, so that what fails does so at once."""
        known = [LARS_L2, *map(str, timm.optim.list_optimizers())]
        if self.name.lower() not in known:
            raise ValueError(f"optim.name is '{self.name}'; there are {', '.join(known)}")
        # Some work on a GPU alone; the config may be built on the meta device.
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            params = [nn.Parameter(torch.ones(shape)) for shape in ((4, 3), (3,), (2, 3, 2, 2))]
            try:
                optimizer = self._make([{"params": params, "lr": self.lr, "weight_decay": self.weight_decay}])
                for _ in range(2):
                    for param in params:
                        param.grad = torch.ones_like(param)
                    optimizer.step()
            except REFUSALS as error:
                told, reason = dict(self.options), first_line(error)
                if isinstance(error, IndexError) and "betas" in self.options:
                    reason = "it takes another number of betas, such as three"
                raise ValueError(
                    f"optim.name={self.name} makes no step with optim.options={told} ({reason}): set other options, or "
                    "another name, such as adamw"
                ) from error

    def lr_factor(self, step: int, total_steps: int, first_step: int = 0) -> float:
        """Learning rate at ``step`` (from 0) as a share of ``lr``; ``final_lr`` is reached one step after the last.

        What is trained from ``first_step`` on has a warm-up of its own from there, as many steps long.
        """
        warmup, cooldown = self._phases(total_steps)
        if first_step:
            late = min((step - first_step + 1) / max(warmup, 1), 1.0) if step >= first_step else 0.0
            return late * self.lr_factor(step, total_steps)
        if step < warmup:
            start = 1 / warmup if self.warmup_lr is None or not self.lr else self.warmup_lr / self.lr
            return start + (1 - start) * step / (warmup if self.peak_after_warmup else max(warmup - 1, 1))
        final = self.final_lr / self.lr if self.lr else 0.0
        if self.schedule == "cosine":
            progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
            return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
        if not cooldown:
            return 1.0
        left = min(max((total_steps - step) / cooldown, 0.0), 1.0)
        return final + (1 - final) * left**self.cooldown_power

    def decay_at(self, step: int, total_steps: int) -> float:
        """Weight decay at ``step`` (from 0) of what is decayed; the final one is reached one step after the last."""
        final = self.weight_decay if self.final_weight_decay is None else self.final_weight_decay
        progress = min(step / max(total_steps, 1), 1.0)
        return final + (self.weight_decay - final) * 0.5 * (1 + math.cos(math.pi * progress))

    def param_groups(self, module: nn.Module, total_steps: int = 1) -> list[dict[str, Any]]:
        """Group trainable parameters by (learning rate, weight decay, first step), those of the module itself apart.

        FSDP2 shards all but those, and optimizers cannot update sharded and whole ones in one call. A module may tell
        by ``first_step(name, total_steps)`` from which step on a parameter is trained.
        """
        whole, first_step = uncalled_parameters(module), getattr(module, "first_step", lambda name, total_steps: 0)
        scales = self._layer_scales(module)
        kept = {f"{path}.{name}" for path, part in module.named_modules() for name in _not_decayed(part)}
        groups: dict[tuple[float, float, bool, int], dict[str, Any]] = {}
        for name, param in module.named_parameters():
            if not param.requires_grad:
                continue
            decayed = param.ndim > 1 or (self.decay_1d and param.ndim == 1)
            decay = self.weight_decay if decayed and name not in kept else 0.0
            lr = self.lr * scales.get(name, 1.0)
            first = first_step(name, total_steps)
            new: dict[str, Any] = {"params": [], "lr": lr, "weight_decay": decay, "first_step": first}
            groups.setdefault((lr, decay, name not in whole, first), new)["params"].append(param)
        return list(groups.values())

    def _layer_scales(self, module: nn.Module) -> dict[str, float]:
        """Share of the learning rate of each parameter that ``layer_decay`` lowers."""
        if self.layer_decay is None:
            return {}
        trunk: Any = module.get_submodule("backbone")
        if not hasattr(trunk, "group_matcher"):
            raise ValueError(f"optim.layer_decay needs a timm backbone, and {type(trunk).__name__} tells no layers")
        layers = group_parameters(trunk, trunk.group_matcher(coarse=False), reverse=True)
        top = max(layers.values())
        return {f"backbone.{name}": self.layer_decay ** (top - layer) for name, layer in layers.items()}


def _fuse(optimizer: Optimizer) -> None:
    """Let Adam and AdamW update all parameters of a group by one kernel, unless ``options`` say otherwise.

    An optimizer that is made with ``fused=True`` would take the scale of 16-mixed from the gradients by itself, after
    they were clipped and looked at; one whose groups are changed does not. SGD is left as it is: its kernel fails where
    some parameters of a group get their first gradient later than others.
    """
    for group in optimizer.param_groups if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW) else ():
        has_kernel = all(parameter.device.type in ("cpu", "cuda") for parameter in group["params"])
        if has_kernel and group["fused"] is None and group["foreach"] is None and not group["differentiable"]:
            group["fused"] = True


@torch.no_grad()
def _lay_out(optimizer: Optimizer) -> None:
    """Give a state that was loaded the memory layout of its parameters: kernels pair numbers by their place in memory.

    A checkpoint of sharded parameters is contiguous, the weights of a convolution need not be.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                like = torch.empty_like(parameter, dtype=value.dtype, device=value.device)
                state[name] = value if local(value).stride() == local(like).stride() else like.copy_(value)


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """All that an optimizer steps, in the order of its groups; they are had without a walk through all modules."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def clip_each(parameters: Iterable[Tensor], limit: float) -> None:
    """Scale the gradient of each parameter by itself to a norm of at most ``limit``; every rank must call it."""
    if gradients := [parameter.grad for parameter in parameters if parameter.grad is not None]:
        scales = (limit / (norms(gradients) + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([local(gradient) for gradient in gradients], list(scales.unbind()))


class _WithDecay(LambdaLR):
    """A schedule of the learning rate that sets the weight decay of what is decayed, too."""

    def __init__(
        self, optimizer: Optimizer, factors: Sequence[Callable[[int], float]], decay: Callable[[int], float]
    ) -> None:
        self._decay = decay
        self._decayed = [bool(group["weight_decay"]) for group in optimizer.param_groups]
        super().__init__(optimizer, list(factors))

    def get_lr(self) -> list[float | Tensor]:
        """The learning rates of this step."""
        for group, is_decayed in zip(self.optimizer.param_groups, self._decayed, strict=True):
            if is_decayed:
                group["weight_decay"] = self._decay(self.last_epoch)
        return super().get_lr()

    def state_dict(self) -> dict[str, Any]:
        """That of the rates; the decay follows from the step."""
        return {key: value for key, value in super().state_dict().items() if key not in ("_decay", "_decayed")}


def _not_decayed(module: Any) -> Iterable[str]:
    """The parameters that a module, such as one of timm's, says are not to be decayed."""
    told = getattr(module, "no_weight_decay", None)
    return told() if callable(told) else ()


def _on_shards(kind: type[Optimizer]) -> type[Optimizer]:
    """The optimizer, for parameters that are sharded: numbers that it makes itself count as whole on every process.

    The closure, which runs the model, stays outside, since there a mixture of both is a mistake.
    """

    class OnShards(kind):  # type: ignore[valid-type, misc]
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            loss = None if closure is None else torch.enable_grad()(closure)()
            with implicit_replication():
                super().step()
            return loss

    OnShards.__name__, OnShards.__qualname__ = kind.__name__, kind.__qualname__
    return OnShards


class LarsL2(Lars):
    """LARS that adds the decay to the gradient first and divides by the norm of their sum.

    timm's LARS divides by the sum of their norms instead, as apex's LARC does. This is the form of SimCLR's, PixPro's
    and MAE's authors. Parameters without decay take plain steps of SGD.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take the decay of a group away from timm's step."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["decay"], group["weight_decay"] = group["weight_decay"], 0.0
        group["always_adapt"] = group["decay"] > 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Decay, scale, step."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params and group["decay"]:
                torch._foreach_add_([p.grad for p in params], params, alpha=group["decay"])
        super().step()
        return loss

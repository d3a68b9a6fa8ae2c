"""What a training step of a config costs on a number of GPUs: memory at its fullest moment, and what is sent.

The step is traced without data (:mod:`repr.training.memory_trace`); what FSDP2 gathers, and DDP
copies, is counted beside it.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from repr.training.trainer import prepare

if TYPE_CHECKING:
    from repr.batch import Batch
    from repr.objectives.base import Objective
    from repr.training.memory_trace import Trace

NUM_CHUNKS = 32  # of a loss that are traced
FEWEST = 2  # rows of a process: BatchNorm and losses compare some
BUCKETS, GATHERED = "buckets of DDP", "gathered by FSDP2"
HALF = {"bf16-mixed": "bfloat16", "16-mixed": "float16"}  # precision -> type of autocast
WHOLE = {"32-true": "float32", "bf16-true": "bfloat16", "16-true": "float16"}  # -> type of everything


@dataclass(frozen=True)
class Forecast:
    """One step of one GPU with one strategy.

    Attributes:
        phase: at what part of the step most is held.
        memory: kind -> bytes then.
        sent: what -> bytes that it sends a step, and receives.
        operations: multiplications and sums of products in its losses.
    """

    phase: str
    memory: Mapping[str, float]
    sent: Mapping[str, float]
    operations: float = 0.0

    @property
    def total(self) -> float:
        """Bytes of all kinds."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class Part:
    """What FSDP2 gathers at once: a layer, or what is left of a tower."""

    module: Any
    size: int  # bytes of its parameters
    weights: int  # bytes as gathered
    gradients: int  # bytes as summed up
    is_layer: bool


class Planner:
    """Forecasts of a config on a number of GPUs, for any batch.

    Args:
        cfg: a config that was checked.
        gpus: W.
        foreach: see :func:`repr.training.memory_trace.trace_optimizer`.
    """

    def __init__(self, cfg: DictConfig, *, gpus: int, foreach: bool = True) -> None:
        from torch.nn.modules.batchnorm import _BatchNorm

        from repr.training.memory_trace import trace_optimizer

        self.cfg, self.gpus = cfg, gpus
        objective = build(cfg, gpus * FEWEST)
        parts = list(_parts(objective, half=self._half))
        towers = [m for name, m in objective.named_modules() if name in objective.ENCODERS]
        self.has_norm = any(isinstance(part, _BatchNorm) for tower in towers for part in tower.modules())
        self.trained = sum(_bytes(p) for p in objective.parameters() if p.requires_grad)
        self.buffers = sum(map(_bytes, objective.buffers()))
        # When backward begins, of the tower what is in no layer, with the tensor in which it arrived; of the layer that
        # runs its weights, those of the next one in two places likewise, its gradients, and what they are sent from.
        tower = max((2 * part.weights for part in parts if not part.is_layer), default=0)
        layer = max((3 * part.weights + 2 * part.gradients for part in parts if part.is_layer), default=0)
        gathered = tower + layer
        self.held: dict[str, float] = {BUCKETS: self.trained, GATHERED: gathered}
        self.shares: dict[str, dict[str, float]] = {"": dict.fromkeys(self.held, 0.0)}
        if gpus > 1:
            ready = sum(part.size for part in parts if part.weights < part.size)  # gathered in half precision
            split: dict[str, float] = dict.fromkeys(("parameters", "gradients", "optimizer"), 1 / gpus)
            split["half-precision weights"] = 1 - ready / max(1, sum(part.size for part in parts))
            self.shares = {"ddp": {GATHERED: 0.0}, "fsdp2": {BUCKETS: 0.0, **split}}
        stepping = dict(trace_optimizer(objective, shares=self.shares, foreach=foreach))
        self.held["optimizer"] = stepping.pop("state").bytes["optimizer"]
        self.stepping = {
            name: {**peak.bytes, BUCKETS: self.trained * self.shares[name].get(BUCKETS, 1)}
            for name, peak in stepping.items()
        }
        self._row: dict[str, Forecast] = {}  # what a sample of a GPU adds, and one of all, where not all is traced
        self._pair: dict[str, Forecast] = {}
        self.at, self._point = cache(self._at), cache(self._step)

    def loss_operations(self, rows: int) -> float:
        """Multiplications and sums of the products of a pairwise loss, for ``rows`` samples on each GPU, of all."""
        num = rows * self.gpus
        few, less = min(rows, self._two_slices or rows), min(num, self._many_chunks or num)
        traced = few * few * max(1, round(less / few))  # pairs of a process's rows and all
        return next(iter(self._point(few, less).values())).operations * rows * num / traced

    @property
    def _half(self) -> bool:
        return str(self.cfg.trainer.precision) in HALF

    def _at(self, rows: int) -> dict[str, Forecast]:
        """Forecasts by strategy for ``rows`` samples on each GPU.

        Of many slices and of very many chunks only some are traced. A group of another size makes the global batch of
        two slices; what grows with the slices, and with the chunks, does so in proportion.
        """
        num = rows * self.gpus
        few, less = min(rows, self._two_slices or rows), min(num, self._many_chunks or num)
        result = self._point(few, less)
        if rows > few:
            self._row = self._row or _slope(self._point(few, less), self._point(2 * few, less), few)
            result = {name: _mixed(result[name], self._row[name], 1, rows - few) for name in result}
        if num > less:
            self._pair = self._pair or _slope(self._point(few, less // 2), self._point(few, less), less - less // 2)
            result = {name: _mixed(result[name], self._pair[name], 1, num - less) for name in result}
        return result

    @property
    def _two_slices(self) -> int | None:
        # Views that pass an encoder one after the other are sliced each.
        return self.cfg.get("micro_batch") and max(FEWEST, 2 * self.cfg.micro_batch)

    @property
    def _many_chunks(self) -> int | None:
        return self.cfg.get("chunk_size") and NUM_CHUNKS * self.cfg.chunk_size

    def _step(self, rows: int, num: int) -> dict[str, Forecast]:
        """Forecasts for ``rows`` samples on each GPU, in about ``num`` of all."""
        return self._traced(rows, max(1, round(num / rows)))

    def _traced(self, rows: int, num_processes: int) -> dict[str, Forecast]:
        import torch
        from torch.utils._pytree import tree_leaves

        from repr.training.memory_trace import trace

        cfg, precision = self.cfg, str(self.cfg.trainer.precision)
        objective, batch = build(cfg, rows * num_processes), fake_batch(cfg, rows)
        parts = list(_parts(objective, half=self._half))
        step = trace(
            objective,
            batch,
            shares=self.shares,
            num_processes=num_processes,
            autocast=getattr(torch, HALF[precision]) if precision in HALF else None,
            accumulate=cfg.trainer.get("accumulate_grad_batches", 1) > 1,
            held=self.held,
            watch=[part.module for part in parts],
        )
        sent = self._sent(step, parts)
        num = float(sum(map(_bytes, tree_leaves(batch))))
        stepping = {
            name: Forecast("optimizer", {**held, "batch": num}, sent[name], step.operations)
            for name, held in self.stepping.items()
        }
        running = {
            name: Forecast(peak.phase, peak.bytes, sent[name], step.operations) for name, peak in step.peaks.items()
        }
        return {name: max(running[name], stepping[name], key=lambda forecast: forecast.total) for name in running}

    def _sent(self, step: Trace, parts: Sequence[Part]) -> dict[str, dict[str, float]]:
        """Bytes that a GPU sends: a ring passes all but a GPU's own share once to gather, and twice to sum."""
        once = (self.gpus - 1) / self.gpus
        flow = {
            "embeddings": once * step.gathered + step.passed,
            "their gradients, sums": once * (step.scattered + 2 * step.reduced),
        }
        weights = gradients = 0.0
        for part, counted in zip(parts, step.calls, strict=True):
            # A tower that is called by another method than forward is not counted as a whole.
            calls = counted or Counter({"with gradient" if part.gradients else "without": 1})
            weights += once * part.weights * (calls["without"] + 2 * calls["with gradient"] + calls["again"])
            gradients += once * part.gradients * calls["with gradient"]
        return {
            "": {},
            "ddp": {"gradients": 2 * once * self.trained, "buffers": once * self.buffers, **flow},
            "fsdp2": {"weights": weights, "gradients": gradients, **flow},
        }

    def largest(self, strategy: str, budget: float, rows: int) -> int:
        """The most rows of a GPU whose step takes no more than ``budget`` bytes, to 2 %; 0: none.

        Args:
            strategy: a key of forecasts.
            budget: bytes.
            rows: where to begin.
        """
        known = {max(rows, FEWEST): 0.0}
        for _ in range(12):
            rows = next(reversed(known))
            known[rows] = self.at(rows)[strategy].total
            low = max((num for num, total in known.items() if total <= budget), default=0)
            high = min((num for num, total in known.items() if total > budget), default=2**20)
            if high - low <= 1 or high == FEWEST or (low and known[low] > 0.98 * budget):
                break
            near = sorted(known, key=lambda num: abs(known[num] - budget))[:3]
            guess = _crossing([(num, known[num]) for num in near], 0.995 * budget)
            known[min(max(int(guess), low + 1, FEWEST), high - 1)] = 0.0
        return max((num for num, total in known.items() if 0 < total <= budget), default=0)


def _crossing(points: Sequence[tuple[float, float]], level: float) -> float:
    """Where a curve through some points reaches a level: through three a parabola, as of pairwise losses, or a line."""
    (a, x), *others = sorted(points)
    if not others:
        return 2 * a if level > x else a / 2
    (b, y), *others = others
    slope, bend = (y - x) / (b - a), 0.0
    for c, z in others:
        bend = ((z - y) / (c - b) - slope) / (c - a)
        slope -= bend * (b - a)  # that at the first point
    slope = max(slope, 1e-9)
    if bend <= 0:
        (b, y) = max(points)
        return a + (level - x) * (b - a) / max(y - x, 1e-9)
    return a + (math.sqrt(max(0.0, slope * slope + 4 * bend * (level - x))) - slope) / (2 * bend)


def _mixed(a: Forecast, b: Forecast, share_a: float, share_b: float) -> Forecast:
    def mix(x: Mapping[str, float], y: Mapping[str, float]) -> dict[str, float]:
        return {key: share_a * x.get(key, 0) + share_b * y.get(key, 0) for key in {**x, **y}}

    return Forecast(a.phase, mix(a.memory, b.memory), mix(a.sent, b.sent))


def _slope(few: Mapping[str, Forecast], more: Mapping[str, Forecast], num: int) -> dict[str, Forecast]:
    return {name: _mixed(more[name], few[name], 1 / num, -1 / num) for name in few}


def _bytes(tensor: Any) -> int:
    return tensor.numel() * tensor.element_size()


def build(cfg: DictConfig, batch_size: int) -> Objective:
    """The objective of a config on the meta device, as ``repr.fit`` prepares it.

    A queue is made as long as whole batches make it.
    """
    import torch
    from hydra.utils import instantiate

    length, options = cfg.objective.get("queue_length"), {}
    if length:
        options["queue_length"] = max(1, round(length / batch_size)) * batch_size
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # the check of the config has told
        objective = instantiate(cfg.objective, **options)
        prepare(objective, cfg, 1)
    return objective.to(getattr(torch, WHOLE.get(str(cfg.trainer.precision), "float32")))


def fake_batch(cfg: DictConfig, rows: int) -> Batch:
    """A training batch of a config as the flow sees it, on the meta device."""
    import torch

    from repr.batch import Batch

    dtype, sizes = getattr(torch, WHOLE.get(str(cfg.trainer.precision), "float32")), _sizes(cfg)
    with torch.device("meta"):
        numbers = {name: torch.empty(rows, dtype=torch.int64) for name in ("index", "seed")}
        batch = Batch(**numbers, label=torch.empty(rows, 1, dtype=torch.int64))  # type: ignore[typeddict-item]
        if sizes:
            batch["views"] = [torch.empty(rows, 3, size, size, dtype=dtype) for size in sizes]
            batch["boxes"] = torch.empty(rows, len(sizes), 4)
        if cfg.tokenizer is not None:
            batch["text"] = torch.empty(rows, cfg.text.context_length, dtype=torch.int64)
            if hard := cfg.data.get("hard_captions"):
                shape = rows, hard.get("count", 1), cfg.text.context_length
                batch["hard_text"] = torch.empty(shape, dtype=torch.int64)
            if num := (cfg.data.get("distorted_captions") or {}).get("count") or cfg.data.get("num_texts"):
                batch["texts"] = torch.empty(rows, num, cfg.text.context_length, dtype=torch.int64)
        if tables := cfg.objective.get("tables"):
            batch["tables"] = [torch.empty(rows, table.widths[0], dtype=dtype) for table in tables.values()]
    return batch


def _sizes(cfg: DictConfig) -> list[int]:
    return [view.size for view in (cfg.views or {}).values() for _ in range(view.get("count", 1))]


def _parts(objective: Objective, *, half: bool) -> Iterator[Part]:
    """What FSDP2 gathers at once: of every module that the flow calls each layer, and the rest."""
    from torch.nn.modules.batchnorm import _BatchNorm

    from repr.shard import called, layers

    for _, child in called(objective):
        rest = set(child.parameters())
        for layer in layers(child):
            own = rest & set(layer.parameters())
            has_norm = any(isinstance(module, _BatchNorm) for module in layer.modules())
            yield _part(layer, own, half=half and not has_norm, is_layer=True)
            rest -= own
        if rest:
            yield _part(child, rest, half=False, is_layer=False)


def _part(module: Any, parameters: set[Any], *, half: bool, is_layer: bool) -> Part:
    size, trained = sum(map(_bytes, parameters)), sum(_bytes(p) for p in parameters if p.requires_grad)
    return Part(module, size, size // 2 if half else size, trained, is_layer)

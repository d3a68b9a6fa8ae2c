"""What is alive in memory, and what is sent, in a training step that is traced without data.

The step runs on fake tensors, which have shapes and lifetimes but no values, so that a step of any model and batch
takes a second or two and no memory. All of it is traced, forward, backward and optimizer, with the flow's own slices,
checkpoints and chunks. The other processes are a number: flows send through :mod:`repr.distributed` alone, where a
group that only counts takes the place of torch's.

What is alive has a kind: ``parameters``, ``buffers``, ``gradients``, ``optimizer``, ``half-precision weights`` (copies
that autocast makes), ``batch``, ``embeddings`` (gathered from all processes), ``loss`` (what :mod:`repr.losses` makes),
and ``activations``, which is all else, such as gradients of activations.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import CodeType
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.memory import recursive_detach
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from repr.batch import Batch
from repr.distributed import Routes
from repr.losses.exchange import GATHER, RING
from repr.objectives.base import Objective

# A number that is read from a tensor (a count of steps, how full a queue is) is high, as in the middle of a run; a
# flag, which asks whether something is wrong, is not set.
LATE = 10**9
_CPU = torch.device("cpu")  # where all are made, as far as they know
_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.mm.out, torch.ops.aten.addmm_.default)
_PLACES = {"/repr/losses/": "loss", "/repr/distributed.py": "embeddings"}  # whose tensors are of a kind of their own


@dataclass(frozen=True)
class Peak:
    """The moment of a step at which most is alive.

    Attributes:
        phase: ``forward``, ``backward`` or ``optimizer``.
        bytes: kind -> bytes alive.
    """

    phase: str
    bytes: Mapping[str, float]

    @property
    def total(self) -> float:
        """Bytes of all kinds."""
        return sum(self.bytes.values())


@dataclass(frozen=True)
class Trace:
    """A step of one process.

    Attributes:
        peaks: strategy -> the fullest moment.
        gathered: bytes of all processes' rows that all-gathers put together.
        reduced: bytes that all-reduces sum up, those of parameters' gradients left out.
        scattered: bytes that reduce-scatters sum up.
        passed: bytes that are sent to one other process.
        operations: multiplications and sums of the losses' products of matrices, without what autograd makes of them.
        calls: how often each watched module was called ``with gradient``, ``without``, and ``again`` in backward.
    """

    peaks: Mapping[str, Peak]
    gathered: int
    reduced: int
    scattered: int
    passed: int
    operations: int
    calls: Sequence[Counter[str]]


class Memory(TorchDispatchMode):
    """Follows the storage of every tensor that is made while it is on, until it is freed.

    Args:
        shares: strategy -> kind -> share of a tensor that one process holds; 1 where nothing is said.
    """

    def __init__(self, shares: Mapping[str, Mapping[str, float]]) -> None:
        super().__init__()
        self.shares = shares
        self.phase, self.kind = "", ""  # of what is made now; without a kind the place in the code tells it
        self.alive: Counter[str] = Counter()
        self.totals = dict.fromkeys(shares, 0.0)
        self.operations = 0
        self.peaks: dict[str, dict[str, Peak]] = {
            name: {} for name in shares
        }  # strategy -> phase -> its fullest moment
        self._storages: dict[int, tuple[str, int]] = {}
        self._kinds: dict[CodeType, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Run an operation, and follow what it makes."""
        if func is torch.ops.aten._local_scalar_dense.default:
            return False if args[0].dtype is torch.bool else LATE
        if func is torch.ops.prim.device.default:
            return _CPU  # most of all calls
        if func is torch.ops.aten.nonzero.default:  # which entries are set nobody knows: half of them
            out = args[0].new_empty(args[0].numel() // 2, args[0].ndim, dtype=torch.int64)
        else:
            out = func(*args, **(kwargs or {}))
        if func in _PRODUCTS and self._place() == "loss":
            a, b = args[-2:]
            self.operations += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._storages:
                is_cast = func is torch.ops.aten._to_copy.default and self.kind_of(args[0]) == "parameters"
                self.follow(tensor, "half-precision weights" if is_cast else self.kind or self._place())
        return out

    def kind_of(self, tensor: Tensor) -> str:
        """The kind of a tensor that is followed."""
        return self._storages.get(tensor.untyped_storage()._cdata, ("", 0))[0]

    def follow(self, tensor: Tensor, kind: str) -> None:
        """Count a tensor, or change the kind under which it is counted."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            self._add(self._storages[key][0], -self._storages[key][1])
        else:
            weakref.finalize(storage, self._free, key)
        self._storages[key] = kind, storage.nbytes()
        self._add(kind, storage.nbytes())

    def made(self, num: int, kind: str) -> Tensor:
        """A tensor of so many bytes."""
        return self.copy(torch.empty(num, dtype=torch.uint8, device="meta"), kind)

    def copy(self, value: Any, kind: str) -> Any:
        """A tensor, or a list of them, with the shapes and types of what is on the meta device."""
        if isinstance(value, list):
            return [self.copy(item, kind) for item in value]
        self.kind = kind
        copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=_CPU)
        self.kind = ""
        return copy

    def _free(self, key: int) -> None:
        kind, num = self._storages.pop(key)
        self._add(kind, -num)

    def _add(self, kind: str, num: int) -> None:
        self.alive[kind] += num
        for name, shares in self.shares.items():
            self.totals[name] += num * shares.get(kind, 1)
            if num > 0 and self.phase:
                peak = self.peaks[name].get(self.phase)
                if peak is None or self.totals[name] > peak.total:
                    held = {kind: num * shares.get(kind, 1) for kind, num in self.alive.items() if num}
                    self.peaks[name][self.phase] = Peak(self.phase, held)

    def _place(self) -> str:
        """The kind of what the running code makes: that of the innermost function that belongs to one."""
        frame = sys._getframe(2)
        while frame is not None:
            if frame.f_code not in self._kinds:
                path = frame.f_code.co_filename.replace("\\", "/")
                self._kinds[frame.f_code] = next((kind for part, kind in _PLACES.items() if part in path), "")
            if kind := self._kinds[frame.f_code]:
                return kind
            frame = frame.f_back  # type: ignore[assignment]
        return "activations"


class Done:
    """What was sent has arrived."""

    def wait(self) -> bool:
        """At once."""
        return True


class CountingGroup:
    """In the place of ``torch.distributed``: a group of processes that sends nothing and counts what it should.

    Args:
        size: number of processes.
    """

    ReduceOp, group = dist.ReduceOp, dist.group
    isend, irecv = "sent", "taken"

    def __init__(self, size: int) -> None:
        self.size, self.gathered, self.reduced, self.scattered, self.passed = size, 0, 0, 0, 0

    def is_available(self) -> bool:
        """There is a group."""
        return True

    def is_initialized(self) -> bool:
        """There is a group."""
        return True

    def get_world_size(self) -> int:
        """Number of processes."""
        return self.size

    def get_rank(self) -> int:
        """This one is the first."""
        return 0

    def all_gather(self, out: Sequence[Tensor], x: Tensor) -> None:
        """Count the rows of all processes, which NCCL puts together in a tensor of its own."""
        x.new_empty(len(out), *x.shape)
        self.gathered += len(out) * x.numel() * x.element_size()

    def all_gather_object(self, values: list[Any], value: Any) -> None:
        """Let all have the same."""
        values[:] = [value] * len(values)

    def all_reduce(self, x: Tensor, op: Any = None) -> None:
        """Count a tensor."""
        self.reduced += x.numel() * x.element_size()

    def new_group(self) -> CountingGroup:
        """The same."""
        return self

    def P2POp(self, op: str, x: Tensor, *_: Any) -> tuple[str, Tensor]:  # noqa: N802
        """What is to be sent, or taken."""
        return op, x

    def batch_isend_irecv(self, ops: Sequence[tuple[str, Tensor]]) -> list[Done]:
        """Count what is sent to one other process."""
        self.passed += sum(x.numel() * x.element_size() for op, x in ops if op == "sent")
        return []

    def get_backend(self, group: Any = None) -> str:
        """That of GPUs."""
        return "nccl"

    def all_to_all_single(self, out: Tensor, x: Tensor, taken: Sequence[int], sent: Sequence[int]) -> None:
        """Count what comes."""
        self.passed += out.numel() * out.element_size()

    def reduce_scatter(self, out: Tensor, parts: Sequence[Tensor], group: Any = None, async_op: bool = False) -> Done:
        """Count what is summed up, which NCCL puts together in a tensor of its own."""
        out.new_empty(len(parts), *out.shape)
        self.scattered += len(parts) * out.numel() * out.element_size()
        return Done()


@contextmanager
def processes(num: int) -> Iterator[CountingGroup]:
    """Let :mod:`repr.distributed` find a group of ``num`` processes. On one process nothing changes.

    BatchNorm sees its own rows alone, since torch's synchronised kernels hold no more than those of one process; what
    they send, three numbers a channel, is not counted.
    """
    group = CountingGroup(num)
    if num == 1:
        yield group
        return
    with ExitStack() as stack:
        stack.enter_context(patch("repr.distributed.dist", group))
        stack.enter_context(patch("repr.distributed.routes", partial(_even_routes, num)))
        stack.enter_context(patch("repr.models.batchnorm.world_size", lambda: 1))
        for exchange in (GATHER, RING):  # real processes compare later
            stack.enter_context(patch.object(exchange, "_compared", True))
        yield group


def _even_routes(num_processes: int, index: Tensor, num: int) -> Routes:
    """Routes of rows that are spread evenly: which ones they are is not known of fake tensors."""
    some, rest = divmod(len(index), num_processes)
    counts = [some + (process < rest) for process in range(num_processes)]
    return Routes(index, counts, index % num, counts)


@contextmanager
def traced(objective: Objective, shares: Mapping[str, Mapping[str, float]], num_processes: int) -> Iterator[Any]:
    """Give an objective on the meta device fake tensors, and follow what is made of them.

    Yields:
        The :class:`Memory`, and the :class:`CountingGroup`.
    """
    memory = Memory(shares)
    with FakeTensorMode(), processes(num_processes) as group:
        objective._apply(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=_CPU))
        for parameter in objective.parameters():
            memory.follow(parameter, "parameters")
        for buffer in objective.buffers():
            memory.follow(buffer, "buffers")
        with memory:
            for parameter in objective.parameters():
                if parameter.requires_grad:
                    parameter.grad = memory.copy(parameter, "gradients")
            yield memory, group


def trace_optimizer(
    objective: Objective, *, shares: Mapping[str, Mapping[str, float]], foreach: bool = True
) -> Mapping[str, Peak]:
    """Trace the first step of an optimizer, and what follows it.

    Args:
        objective: on the meta device; it is of no use afterwards.
        shares: see :class:`Memory`.
        foreach: optimizers treat all parameters at once, as on a GPU, where torch has that choice.

    Returns:
        Strategy -> the fullest moment; and under ``"state"`` what is alive afterwards.
    """
    with traced(objective, shares, 1) as (memory, _):
        memory.phase = memory.kind = "optimizer"
        optimizer, _ = objective.optim.build(objective, LATE)
        for options in optimizer.param_groups:
            if options.get("foreach", True) is None and not options.get("fused"):
                options["foreach"] = foreach
        optimizer.step()
        objective.finish_step()
        alive = dict(memory.alive)
    return {name: peaks["optimizer"] for name, peaks in memory.peaks.items()} | {"state": Peak("optimizer", alive)}


def trace(
    objective: Objective,
    batch: Batch,
    *,
    shares: Mapping[str, Mapping[str, float]],
    num_processes: int = 1,
    autocast: torch.dtype | None = None,
    accumulate: bool = False,
    held: Mapping[str, float] | None = None,
    watch: Sequence[nn.Module] = (),
) -> Trace:
    """Trace forward and backward of a process in the middle of a run, as Lightning makes them.

    The gradients and the features of the last step live until this one's forward is done.

    Args:
        objective: on the meta device; it is of no use afterwards.
        batch: of this process, on the meta device.
        shares: see :class:`Memory`.
        num_processes: W; what flows gather has W times as many rows.
        autocast: its type; None: none.
        accumulate: gradients are added up over several batches, so they live in backward, too.
        held: kind -> bytes that are alive besides.
        watch: modules whose calls are counted.

    Raises:
        ValueError: what the flow itself finds wrong with the batch.
    """
    with traced(objective, shares, num_processes) as (memory, group):
        objective.train()
        objective.step_number = LATE
        calls = [Counter[str]() for _ in watch]
        for module, counts in zip(watch, calls, strict=True):
            module.register_forward_pre_hook(partial(_count, memory, counts))
        for parameter in objective.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: memory.follow(p.grad, "gradients"))
        kept = [memory.made(int(num), kind) for kind, num in (held or {}).items()]
        inputs: Any = {key: memory.copy(value, "batch") for key, value in batch.items()}
        memory.phase = "forward"
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            output = objective.step(inputs)
            loss = objective.total(output.terms)
        watched = [*output.embeddings.values(), output.scores, output.assignments]
        features = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in watched if x is not None}
        before = memory.made(sum(features.values()), "embeddings")  # the features of the last step
        objective.output = recursive_detach(output)
        del before, output
        if not accumulate:
            objective.zero_grad()
        memory.phase = "backward"
        loss.backward()
        del kept
    peaks = {name: max(of_phases.values(), key=lambda peak: peak.total) for name, of_phases in memory.peaks.items()}
    return Trace(peaks, group.gathered, group.reduced, group.scattered, group.passed, memory.operations, calls)


def _count(memory: Memory, calls: Counter[str], module: nn.Module, inputs: Any) -> None:
    grad = "with gradient" if torch.is_grad_enabled() else "without"
    calls["again" if memory.phase == "backward" else grad] += 1

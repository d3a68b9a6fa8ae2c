"""Slices, checkpoints and compilation: encoders take larger batches, or take them faster, with the same result.

A slice is encoded under activation checkpointing: its output is kept, what lies between is computed again in backward.
So the losses see the embeddings of the whole batch, while the activations of one slice are held.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial, wraps
from importlib.util import find_spec
from itertools import repeat
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from repr.shard import layers

# By which flows call a tower.
METHODS = ("forward", "forward_features", "forward_from", "forward_intermediates", "forward_views")


def slice_encoders(objective: nn.Module, micro_batch: int | None) -> None:
    """Let the encoders of a flow take no more than ``micro_batch`` rows at a time, or the whole batch if it is None.

    The rows are those of one process, and each view of a sample is one. Names and tensors stay; the methods of each
    encoder are replaced on the instance, before anything is sharded.

    Raises:
        ValueError: fewer than one row, or a flow that names no encoders.
    """
    if micro_batch is None:
        return
    if micro_batch < 1:
        raise ValueError(f"micro_batch={micro_batch}; set it to 1 or more rows, or to null for the whole batch")
    for name, encoder in encoders(objective, "micro_batch", "null"):
        slice_rows(encoder, micro_batch)
        if _has_batch_norm(encoder):
            warnings.warn(
                f"micro_batch={micro_batch}: the BatchNorm layers of {name} see the statistics of {micro_batch} rows "
                "at a time, not of the batch, so the gradient is another one; take an encoder without BatchNorm, "
                "such as a ViT, or set micro_batch=null",
                stacklevel=2,
            )


def checkpoint_encoders(objective: nn.Module) -> None:
    """Let the encoders of a flow keep the inputs of their layers alone, and compute the rest again in backward.

    It is timm's and open_clip's own switch, ``set_grad_checkpointing``; an encoder without it stays as it is.

    Raises:
        ValueError: no encoder has it.
    """
    named: list[tuple[str, Any]] = encoders(objective, "grad_checkpointing", "false")
    able = [(name, encoder) for name, encoder in named if hasattr(encoder, "set_grad_checkpointing")]
    if not able:
        raise ValueError("no encoder has set_grad_checkpointing: set grad_checkpointing=false")
    for name, encoder in able:
        encoder.set_grad_checkpointing(True)
        if _has_batch_norm(encoder):
            warnings.warn(
                f"grad_checkpointing: the running statistics of {name}'s BatchNorm count each batch twice, so they "
                "follow faster; the gradient is the same",
                stacklevel=2,
            )


def compile_encoders(objective: nn.Module) -> None:
    """Compile the layers of a flow's encoders by torch.compile, in place: names and tensors stay.

    Layer by layer, so that a layer that occurs twelve times is compiled once, and that slices, checkpoints and FSDP2,
    which work between layers, go on as they are.

    Raises:
        ValueError: no compiler is at hand, or there is nothing to compile.
    """
    if fault := compiler_fault():
        raise ValueError(fault)
    parts = [part for _, encoder in encoders(objective, "compile", "false") for part in layers(encoder)]
    if not parts:
        raise ValueError("no encoder has layers that can be told apart: set compile=false")
    for part in parts:
        part.compile()


def is_compiled(module: nn.Module) -> bool:
    """Whether any part of a module is compiled in place."""
    return any(part._compiled_call_impl is not None for part in module.modules())


def compiler_fault() -> str | None:
    """Why torch.compile cannot work here, or None."""
    if torch.cuda.is_available():
        return None if find_spec("triton") else "compile=true needs triton on a GPU: install it, or set compile=false"
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) or shutil.which("clang++"):
        return None
    return f"compile=true needs a C++ compiler, and there is no {compiler}: install one, or set compile=false"


def encoders(objective: nn.Module, option: str, off: str) -> list[tuple[str, nn.Module]]:
    """The encoders that a flow names (``ENCODERS``) and has, and their copies in its teacher.

    Raises:
        ValueError: there are none; the message says to set ``option`` to ``off``.
    """
    known = dict(objective.named_modules())
    names = (path for name in getattr(objective, "ENCODERS", ()) for path in (name, f"teacher.{name}"))
    named = [(name, known[name]) for name in names if name in known]
    if not named:
        raise ValueError(f"{option}: {type(objective).__name__} names no ENCODERS; set it to {off}")
    return named


def _has_batch_norm(module: nn.Module) -> bool:
    return any(isinstance(part, _BatchNorm) and part.training for part in module.modules())


def slice_rows(module: nn.Module, micro_batch: int) -> None:
    """Replace the methods of a module by ones that take ``micro_batch`` rows at a time in training."""
    module.micro_batch = micro_batch  # type: ignore[assignment]
    for name in METHODS:
        if hasattr(type(module), name):
            # Bound, so that a deep copy of the module runs the copy.
            setattr(module, name, MethodType(_sliced(getattr(type(module), name)), module))


def _sliced(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(self: nn.Module, *rows: Any, **options: Any) -> Any:
        return in_slices(self, partial(method, self, **options), *rows)

    return call


def in_slices(module: nn.Module, function: Callable[..., Any], *rows: Any, num_views: int = 1) -> Any:
    """Give what ``function(*rows)`` does, which runs a module on as many rows at a time as :func:`slice_rows` has set.

    Without a limit, with fewer rows, or in evaluation (mode and no gradient) it is the plain call. Dropout and the like
    draw for each slice anew, and the same once more in backward; under autocast, recomputation is too. Running
    statistics of BatchNorm count each slice once.

    Args:
        module: what the function runs.
        function: gives a tensor, or a list, tuple or dict of tensors, with as many rows.
        rows: tensors (B, ...); anything else goes to each slice as it is.
        num_views: how many rows the module sees of each; the limit is to be as many at least.
    """
    size: Any = getattr(module, "micro_batch", None)
    size = size and max(1, size // num_views)
    grad = torch.is_grad_enabled()
    if size is None or len(rows[0]) <= size or not (grad or module.training):
        return function(*rows)
    run = function
    if grad:

        def contexts() -> tuple[Any, Any]:  # of forward and of recomputation
            return nullcontext(), _statistics_kept(module)

        run = partial(checkpoint, function, use_reentrant=False, context_fn=contexts)
    num = -(-len(rows[0]) // size)  # slices of about equal size, so that none has a row or two
    parts = zip(*(x.tensor_split(num) if isinstance(x, Tensor) else repeat(x) for x in rows), strict=False)
    # A block that FSDP2 has sharded must reach its end in recomputation too, where it frees what it has gathered.
    with set_checkpoint_early_stop(False):
        return _join([run(*part) for part in parts])


def _join(outputs: Sequence[Any]) -> Any:
    """Put the rows of all slices below one another."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.cat(list(outputs))
    if isinstance(first, dict):
        return {key: _join([output[key] for output in outputs]) for key in first}
    return type(first)(_join(column) for column in zip(*outputs, strict=True))


@contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Keep running statistics of BatchNorm as they are: they have seen these rows in forward."""
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]
    counts = [norm.num_batches_tracked for norm in norms]
    before = [(norm, norm.momentum, None if n is None else n.clone()) for norm, n in zip(norms, counts, strict=True)]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, count in before:
            norm.momentum = momentum
            if count is not None and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.copy_(count)

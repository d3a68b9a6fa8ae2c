"""Which function computes each term of a flow, and how it reaches the rows of other processes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from inspect import signature
from typing import Any

from torch import Tensor

from repr.distributed import all_reduce, gather
from repr.losses.exchange import RING, Exchange
from repr.losses.precision import Precision

Loss = Callable[..., Tensor]
Losses = Mapping[str, Loss]


def chosen(
    defaults: Losses,
    losses: Losses | None = None,
    *,
    pairwise: Sequence[str] = (),
    chunk_size: int | None = None,
    exchange: Exchange | None = None,
    precision: Precision = "float32",
) -> dict[str, Loss]:
    """The loss function of each term: the default, or that of ``losses``.

    With a ``chunk_size`` the ``pairwise`` terms build so many rows of their matrix of pairs at a time. With an
    ``exchange`` all are of the global batch, of which they are called with this process's rows; a loss that takes
    neither an exchange nor ``all_reduce`` gets the rows of all. The ``precision`` is that of the products of pairwise
    terms.

    Raises:
        ValueError: ``losses`` names a term without default, or the loss of a pairwise term takes no ``chunk_size``, no
            ``precision`` other than float32, or no ``exchange`` where that is a ring.
    """
    if unknown := sorted(set(losses or {}) - set(defaults)):
        raise ValueError(f"losses names {', '.join(unknown)}; the terms are {', '.join(defaults)}")
    functions = {**defaults, **{name: _plain(loss) for name, loss in (losses or {}).items()}}
    options = {name: signature(function).parameters for name, function in functions.items()}
    if chunk_size is not None:
        if without := [name for name in pairwise if "chunk_size" not in options[name]]:
            raise ValueError(f"chunk_size={chunk_size}: the losses of {', '.join(without)} take none; set it to null")
        functions |= {name: partial(functions[name], chunk_size=chunk_size) for name in pairwise}
    if precision != "float32":
        takes = [name for name in pairwise if "precision" in options[name]]
        if not takes:
            raise ValueError(f"loss_precision={precision}: no loss of pairs takes it; set it to float32")
        functions |= {name: partial(functions[name], precision=precision) for name in takes}
    if exchange is None:
        return functions
    if exchange is RING and (without := [name for name in pairwise if "exchange" not in options[name]]):
        raise ValueError(f"exchange=ring: the losses of {', '.join(without)} take no exchange; set it to gather")
    return {name: _of_all(loss, options[name], exchange) for name, loss in functions.items()}


def _plain(loss: Loss) -> Loss:
    """A loss without the partial that Hydra makes, which asks for its policy at each call and has its own docstring."""
    if isinstance(loss, partial) and type(loss).__module__.startswith("hydra."):
        return partial(_plain(loss.func), *loss.args, **loss.keywords)
    return loss


def _of_all(loss: Loss, options: Collection[str], exchange: Exchange) -> Loss:
    """A loss of the global batch, called with this process's rows."""
    if "all_reduce" in options:
        return partial(loss, all_reduce=all_reduce)
    return partial(loss, exchange=exchange) if "exchange" in options else partial(_of_gathered, loss)


def _of_gathered(loss: Loss, *features: Tensor, **options: Any) -> Tensor:
    return loss(*map(gather, features), **options)

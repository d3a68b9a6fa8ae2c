"""How a loss of the global batch, of which each process has some rows, reaches the rows of the others.

Such a loss is handed an :class:`Exchange`, and by default one without other processes. N rows of W processes are n on
each. Processes are numbered from this one on: 0 is itself, 1 the next, and after the last comes the first.

Gradients follow the convention of :func:`repr.distributed.gather`: what a process gets for its rows and for parameters
is W times its part of the gradient of one process on the global batch, so the mean over processes is that gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Literal

import torch
from torch import Tensor

from repr.distributed import (
    add_up_at_home,
    add_up_near,
    all_reduce,
    gather,
    gather_near,
    mean,
    node_size,
    pass_on,
    rank,
    spread,
    take,
    world_size,
)

# (K processes, C rows of each, these rows (K * C, D), where what adds to their gradients goes: (K * C, D), if anywhere)
Work = Callable[[slice, slice, Tensor, Tensor | None], None]


def row_blocks(num: int, chunk_size: int | None) -> list[slice]:
    """Slices of at most ``chunk_size`` rows, which together are all ``num`` rows; one slice if None.

    Raises:
        ValueError: ``chunk_size`` is below 1.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, or None for the plain form; got {chunk_size}")
    size = chunk_size or num
    return [slice(start, min(start + size, num)) for start in range(0, num, size)]


class Exchange:
    """There is no other process, whatever runs beside: what a loss gives is that of the rows it gets."""

    size = 1  # W

    def own(self, x: Tensor) -> Tensor:
        """This process's rows (n, ...) of what all know of the global batch, (N, ...)."""
        return x

    def rows(self, x: Tensor, *, own_first: bool = True) -> Tensor:
        """The rows (n, ...) of all processes, from this one on or from the first one, with gradient: (N, ...)."""
        return x

    def take(self, x: Tensor, index: Tensor) -> Tensor:
        """Rows of the global batch, of which this process has ``x`` (n, ...), by their numbers, with gradient.

        Every process asks for as many.
        """
        return x[index]

    def all_reduce(self, x: Tensor, op: Literal["sum", "max"] = "sum") -> Tensor:
        """Sum or maximum over processes; a sum has a gradient."""
        return x

    def mean(self, x: Tensor) -> Tensor:
        """Mean over processes, which all go on alike with it."""
        return x

    def logsumexp(self, x: Tensor) -> Tensor:
        """Log-sum-exp over processes of what each has for the rows of each, (W, n), without gradient."""
        return x

    def spread(self, x: Tensor, chunk_size: int | None) -> Tensor:
        """What :meth:`visit` needs of the rows (n, D) of all processes: (W, n, D), or fewer."""
        return x[None]

    def visit(
        self, rows: Tensor, parts: Sequence[slice], chunk_size: int | None, work: Work, home: Tensor | None = None
    ) -> None:
        """Show ``work`` the rows of the processes that ``parts`` names, ``chunk_size`` of each at a time.

        Where there is a ``home`` (n, D), it gets the sum of what all processes make of this one's rows.
        """
        wait: Callable[[], object] = bool
        for mine in row_blocks(rows.shape[1], chunk_size):
            sums: Tensor | None = None
            if home is not None:
                own = home[mine]
                sums = own[None] if self.size == 1 else own.new_zeros(self.size, *own.shape)
            for part in parts:
                out = None if sums is None else sums[part].flatten(0, 1)
                work(part, mine, rows[part, mine].flatten(0, 1), out)
            wait()
            if sums is not None and self.size > 1:  # on its way while the next block is computed
                wait = add_up_at_home(own, sums)
        wait()


class Gather(Exchange):
    """Rows come to every process once, and are kept for backward: N x D numbers there, 2 N D sent by each."""

    def __init__(self) -> None:
        self._compared = False

    @property
    def size(self) -> int:  # type: ignore[override]
        """W."""
        return world_size()

    def own(self, x: Tensor) -> Tensor:  # noqa: D102
        return x.chunk(self.size)[rank()]

    def rows(self, x: Tensor, *, own_first: bool = True) -> Tensor:  # noqa: D102
        return gather(x, own_first=own_first)

    def take(self, x: Tensor, index: Tensor) -> Tensor:  # noqa: D102
        return take(x, index)

    def all_reduce(self, x: Tensor, op: Literal["sum", "max"] = "sum") -> Tensor:  # noqa: D102
        return all_reduce(x, op)

    def mean(self, x: Tensor) -> Tensor:  # noqa: D102
        return mean(x)

    def logsumexp(self, x: Tensor) -> Tensor:  # noqa: D102
        if self.size == 1:
            return x
        by_rank = x.roll(rank(), 0)
        top = self.all_reduce(by_rank, "max")
        total = self.all_reduce((by_rank - top).exp_())
        return (top + total.log_()).roll(-rank(), 0)

    def spread(self, x: Tensor, chunk_size: int | None) -> Tensor:  # noqa: D102
        self._compare(x)
        return spread(x, chunk_size)

    def _compare(self, x: Tensor) -> None:
        """See, the first time, that all processes have as many rows."""
        if not self._compared and self.size > 1:
            nums = gather(torch.tensor([len(x)], device=x.device))
            if (nums != len(x)).any():
                raise ValueError(
                    f"a loss of the global batch needs as many rows on every process, and they have {nums.tolist()}: "
                    "give all of them batches of one size, and none that is smaller at the end (drop_last)"
                )
        self._compared = True


class Ring(Gather):
    """Rows travel from machine to machine, and what adds to their gradients with them, until it is at home.

    Each process passes its rows on to its counterpart on the machine before, and those that have come are gathered
    within a machine. Where there is one machine, or machines have different numbers of processes, each process is taken
    for a machine. No process holds more than its own rows and W x chunk_size of others', and with backward 3 N D
    numbers are sent by each. The next ones are on their way while a block is computed.

    Args:
        node: processes of a machine; None: as many as there are.
    """

    def __init__(self, node: int | None = None) -> None:
        super().__init__()
        self._node = node

    def spread(self, x: Tensor, chunk_size: int | None) -> Tensor:  # noqa: D102
        self._compare(x)
        return x[None]

    def visit(  # noqa: D102
        self, rows: Tensor, parts: Sequence[slice], chunk_size: int | None, work: Work, home: Tensor | None = None
    ) -> None:
        if self.size == 1:
            super().visit(rows, parts, chunk_size, work, home)
            return
        node = self._node or node_size()
        hops = self.size // node
        wanted = {process for part in parts for process in range(self.size)[part]}
        for mine in row_blocks(rows.shape[1], chunk_size and chunk_size * hops):
            here, sums = rows[0, mine].contiguous(), None  # what this machine adds for its own rows does not travel
            for hop in range(hops):
                near = gather_near(here, node)
                leaving = [here] if hop + 1 < hops else []
                came, wait = pass_on(leaving if sums is None else [*leaving, sums], node)
                out = None if home is None else torch.zeros_like(near)
                for other in range(node):
                    process = (hop * node + other - rank() % node) % self.size
                    if process in wanted:
                        work(slice(process, process + 1), mine, near[other], None if out is None else out[other])
                wait()
                if home is not None and out is not None:
                    added = add_up_near(out)
                    if hop == 0:
                        home[mine] = added
                    else:
                        sums = added if sums is None else added.add_(came[-1])
                here = came[0] if leaving else here
            if home is not None and sums is not None:
                (back,), wait = pass_on([sums], node)
                wait()
                home[mine] += back


ALONE, GATHER, RING = Exchange(), Gather(), Ring()


def exchange_of(kind: str, pairwise: Collection[str]) -> Exchange:
    """The exchange of an objective's losses by its name, ``gather`` or ``ring``.

    Raises:
        ValueError: there is no such exchange, or a ring has no ``pairwise`` terms to serve.
    """
    if kind not in ("gather", "ring"):
        raise ValueError(f"exchange={kind}; set it to gather or ring")
    if kind == "ring" and not pairwise:
        raise ValueError("exchange=ring: no weighted term compares pairs of all processes; set it to gather")
    return RING if kind == "ring" else GATHER

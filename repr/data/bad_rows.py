"""Rows that cannot be read: they are found one by one, each is told once, and too many of a set end the run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

from repr.cli import printable
from repr.distributed import gather_objects

T = TypeVar("T")

_log = logging.getLogger(__name__)


def read_each(
    read: Callable[..., T], blank: T, bad: dict[int, str], rows: Iterable[int], *more: Iterable[object]
) -> Iterator[T]:
    """What ``read(row, *more)`` gives for each row, one at a time, and ``blank`` for rows that cannot be read.

    Args:
        read: raises ``OSError`` for a row that cannot be read.
        blank: what stands in its place.
        bad: row -> why it cannot be read; filled on the way. Rows that are in it already are not read.
        rows: of a source.
        more: further arguments of ``read``, one a row each.
    """
    for row, *arguments in zip(rows, *more, strict=True):
        value = blank
        if row not in bad:
            try:
                value = read(row, *arguments)
            except OSError as error:
                bad[row] = one_line(error)
        yield value


def one_line(error: OSError) -> str:
    """What an error says, so that it stays the last line of a worker's traceback."""
    return printable(" ".join(str(error).split()))


def too_many_bad(name: str, bad: Mapping[int, str], num_rows: int) -> str:
    """The message that ends a run whose data are too damaged."""
    return (
        f"{len(bad)} of {num_rows} samples of {name} cannot be read, more than data.max_bad_fraction allows; "
        f"the last: {list(bad.values())[-1]}. Mend or remove them (python -m repr.check lists all), "
        "or set a larger data.max_bad_fraction"
    )


class BadRows(dict[str, dict[int, str]]):
    """Set -> row -> why it cannot be read, as far as this process knows.

    Args:
        sizes: set -> its number of rows.
        max_fraction: so large a share of a set may be bad.
    """

    def __init__(self, sizes: Mapping[str, int], max_fraction: float) -> None:
        super().__init__()
        self.sizes, self.max_fraction = sizes, max_fraction

    def limit(self, name: str) -> int:
        """How many rows of a set may be bad."""
        return int(self.max_fraction * self.sizes[name])

    def note(self, name: str, rows: Mapping[int, str]) -> None:
        """Count bad rows of a set, and tell of those that are new.

        Raises:
            ValueError: too many rows of the set are bad.
        """
        known, size = self.setdefault(name, {}), self.sizes[name]
        for row, fault in rows.items():
            if row not in known:
                known[row] = fault
                done = "replaced" if name == "train" else "left out"
                _log.warning("%s: sample %d %s (%d of %d so far): %s", name, row, done, len(known), size, fault)
        if len(known) > self.limit(name):
            raise ValueError(too_many_bad(name, known, size))

    def gather(self) -> dict[str, dict[int, str]]:
        """Take in the bad rows of all ranks, in the order of rows, and give them; every rank must call it.

        Raises:
            ValueError: too many rows of a set are bad.
        """
        parts = gather_objects(dict(self))
        for name in dict.fromkeys(name for part in parts for name in part):
            rows = {row: fault for part in parts for row, fault in part.get(name, {}).items()}
            self[name] = dict(sorted(rows.items()))
            self.note(name, {})
        return dict(self)

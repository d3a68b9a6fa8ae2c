"""The rows that cannot be read: each is told once, and too many of a set end the run."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from repr.data.datasets import too_many_bad
from repr.distributed import gather_objects

_log = logging.getLogger(__name__)


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

    def gather(self) -> None:
        """Take in those of all ranks, in the order of rows; every rank must call it.

        Raises:
            ValueError: too many rows of a set are bad.
        """
        parts = gather_objects(dict(self))
        for name in dict.fromkeys(name for part in parts for name in part):
            rows = {row: fault for part in parts for row, fault in part.get(name, {}).items()}
            self[name] = dict(sorted(rows.items()))
            self.note(name, {})

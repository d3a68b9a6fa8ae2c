"""Which labels a flow learns from."""

from __future__ import annotations

from typing import Any


def learnt_column(data: Any, flow: str, attribute: str | None, num_classes: int, *, fewest: int = 1) -> int:
    """The column of ``label`` that holds an attribute of a DataModule; None: the first one.

    Raises:
        ValueError: the data has no such attribute, more than ``num_classes`` classes or less than the ``fewest``, or
            rows without a label.
    """
    known = list(data.attributes)
    name = attribute or next(iter(known), None)
    if name not in known:
        wanted = "labels" if attribute is None else f"the attribute '{attribute}'"
        raise ValueError(
            f"{flow} learns classes, and the data lacks {wanted}; it has {', '.join(known) or 'none'}: set "
            "data.train.labels (or attributes) and objective.attribute"
        )
    if (num := len(data.attributes[name])) > num_classes:
        raise ValueError(f"'{name}' has {num} classes: set objective.num_classes={num}, not {num_classes}")
    if num < fewest:
        raise ValueError(
            f"{flow} needs {fewest} classes or more, and '{name}' has {num}: set objective.attribute to another of "
            f"{', '.join(known)}, or take other data"
        )
    labels = data.train.attributes.get(name, [""] * len(data.train))
    if missing := [row for row, label in enumerate(labels) if not label]:
        raise ValueError(
            f"{len(missing)} of {len(labels)} rows of data.train have no label '{name}', the first is "
            f"{data.train.key(missing[0])}: label them or leave them out (data.train.where)"
        )
    return known.index(name)

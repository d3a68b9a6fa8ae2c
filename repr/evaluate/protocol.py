"""What an evaluation protocol is, and how protocols become numbers: the same during training and in ``repr.evaluate``.

A protocol is one object: it asks for the tables that it needs, computes numbers from them, and says how these came
about. Where the tables come from (:mod:`repr.evaluate.during_training`, :mod:`repr.evaluate.stored_tables`) it does
not know.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from hydra.utils import get_object, instantiate

from repr.config import ConfigError
from repr.evaluate.tables import Tables, short_hash
from repr.metrics.exhibits import Exhibits
from repr.metrics.scores import CHANCE

Values = dict[str, float]  # name -> value, and name + CHANCE -> its level at chance, where it has one
Parts = Iterable[tuple[Values, Mapping[str, Any]]]  # values, and what their record says beside the options


class Protocol:
    """The base of all protocols. A subclass gives :meth:`compute`; the rest has defaults.

    Its options are its public attributes, as those of a dataclass; they arrive as numbers, texts, lists and dicts.

    Attributes:
        key: its name below ``eval`` in the config.
        needs: the tables that it reads of a set, of ``pictures``, ``bank`` (pictures of the training set), ``labels``
            (that the set and the bank share), ``captions``, ``captions_if_any`` and ``questions``. A set that lacks
            one of them is left out.
        said: what its records say that no option does, such as the solver.
        silent: options that its records leave out, since no number depends on them or it is said otherwise.
    """

    key: str = "protocol"
    needs: ClassVar[tuple[str, ...]] = ("pictures",)
    said: ClassVar[Mapping[str, Any]] = {}
    silent: ClassVar[tuple[str, ...]] = ()

    @property
    def options(self) -> dict[str, Any]:
        """The options that are not None."""
        return {k: v for k, v in vars(self).items() if k != "key" and not k.startswith("_") and v is not None}

    def fault(self, tables: Tables) -> str | None:
        """Why the encoder or the data cannot be evaluated so at all, a predicate such as "needs feature maps"; or None.

        A training run that asks for such a protocol is refused; ``repr.evaluate`` leaves it out.
        """
        return None

    def want(self, tables: Tables, name: str) -> str | None:
        """Ask for the tables of a set, by default those of ``needs``; every process calls this.

        Returns:
            Why nothing can be computed for this set; None: it can.
        """
        return next((why for need in self.needs if (why := tables.want(need, name))), None)

    def prepare(self, tables: Tables) -> None:
        """What all processes do together once the tables are there, such as training; nothing by default."""

    def compute(self, tables: Tables, name: str) -> Parts:
        """The numbers of a set; the first process alone calls this.

        Yields:
            Values (``name`` and, where there is one, its level at chance as ``name + CHANCE``), and what the record of
            these values says beside the options.
        """
        return ()

    def show(self, tables: Tables, name: str) -> Exhibits | None:
        """What the report shows of a set; the first process alone calls this."""
        return None

    def record(self, tables: Tables, facts: Mapping[str, Any]) -> dict[str, Any]:
        """How a number came about: how the features were taken, ``said``, the options, and ``facts`` over these."""
        told = {name: value for name, value in self.options.items() if name not in self.silent}
        return {"eval": self.key, **tables.taken, **self.said, **told, **facts}


@dataclass(frozen=True)
class Number:
    """One number of an evaluation, with how it came about."""

    value: float
    chance: float | None
    protocol: Mapping[str, Any]

    @property
    def hash(self) -> str:
        """Of the protocol's record; numbers with equal hashes may be compared."""
        return short_hash(self.protocol)


def check_protocols(options: Mapping[str, Any]) -> None:
    """Refuse nodes of a config that are no protocols: key -> node with ``_target_``, a protocol, or None.

    Raises:
        ConfigError: there is one.
    """
    for key, node in options.items():
        target = node.get("_target_") if isinstance(node, Mapping) else type(node).__qualname__
        kind = get_object(target) if isinstance(node, Mapping) and target else type(node)
        if node is not None and not (isinstance(kind, type) and issubclass(kind, Protocol)):
            fault = f"eval.{key} is no protocol (its _target_ is {target})"
            base = f"{Protocol.__module__}.{Protocol.__name__}"
            raise ConfigError([f"{fault}: set eval.{key}._target_ to a subclass of {base}, or eval.{key}=null"])


def read_protocols(options: Mapping[str, Any]) -> dict[str, Protocol]:
    """The protocols of a config by their keys, without those that are None; see :func:`check_protocols`."""
    check_protocols(options)
    protocols = {}
    for key, node in options.items():
        if node is not None:
            made = node if isinstance(node, Protocol) else instantiate(node, _convert_="all", _recursive_=False)
            made.key = key
            protocols[key] = made
    return protocols


def plan(protocols: Mapping[str, Protocol], tables: Tables) -> list[tuple[str, Protocol]]:
    """Let all protocols ask for their tables; gives the sets with the protocols that can be computed for them.

    ``tables.left_out`` gets the reasons for the others.
    """
    asked = []
    for name in tables.sets:
        for key, protocol in protocols.items():
            why = protocol.fault(tables) or protocol.want(tables, name)
            if why is None:
                asked.append((name, protocol))
            else:
                tables.left_out[f"{name}/{key}"] = why
    return asked


@torch.no_grad()
def compute(asked: Sequence[tuple[str, Protocol]], tables: Tables) -> tuple[dict[str, Number], dict[str, Exhibits]]:
    """What :func:`plan` gives, computed from tables that are there: ``<set>/<name>`` -> number, and set -> exhibits."""
    numbers: dict[str, Number] = {}
    shown: dict[str, Exhibits] = {}
    for name, protocol in asked:
        for values, facts in protocol.compute(tables, name):
            record = protocol.record(tables, facts)
            for key, value in values.items():
                if not key.endswith(CHANCE):
                    numbers[f"{name}/{key}"] = Number(value, values.get(key + CHANCE), record)
        if (exhibits := protocol.show(tables, name)) is not None:
            shown[name] = exhibits
    return numbers, shown

"""What an evaluation protocol is, and how protocols become numbers.

A protocol is one object: it asks for the tables that it needs, computes numbers from them, and says how these came
about. It does not know where the tables come from: :mod:`repr.evaluate.during_training` or
:mod:`repr.evaluate.stored_tables`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    r"""The base of all protocols. A subclass gives :meth:`compute`; the rest has defaults.

    Its options are its public attributes, as those of a dataclass; they arrive as numbers, texts, lists and dicts.

    Attributes:
        key: its name below ``eval`` in the config.
        needs: the tables that it reads of a set: ``pictures``, ``bank`` (pictures of the training set), ``labels``
            (that the set and the bank share), ``captions``, ``captions_if_any``, ``questions``. A set that lacks one
            of them is left out.
        said: what its records say that no option does, such as the solver.
        silent: options that its records leave out.
        positive: options that are numbers above 0, or lists of such.
        shares: options that are numbers between 0 and 1.
        meanings: name of a number, as a regular expression, -> a sentence that says what it is and which direction is
            better, in which ``\1`` stands for the first group of the expression; the first that fits counts.
    """

    key: str = "protocol"
    needs: ClassVar[tuple[str, ...]] = ("pictures",)
    said: ClassVar[Mapping[str, Any]] = {}
    silent: ClassVar[tuple[str, ...]] = ()
    positive: ClassVar[tuple[str, ...]] = ()
    shares: ClassVar[tuple[str, ...]] = ()
    meanings: ClassVar[Mapping[str, str]] = {}

    @property
    def options(self) -> dict[str, Any]:
        """The options that are not None."""
        return {k: v for k, v in vars(self).items() if k != "key" and not k.startswith("_") and v is not None}

    def option_faults(self) -> Iterator[str]:
        """Say what is wrong with the options, before anything is trained or encoded: ``positive`` and ``shares``."""
        for names, high, told in ((self.positive, math.inf, "above 0"), (self.shares, 1, "between 0 and 1")):
            for name in names:
                value = getattr(self, name)
                numbers = value if isinstance(value, list | tuple) else [value]
                good = numbers and all(isinstance(number, int | float) and 0 < number < high for number in numbers)
                if value is not None and not good:
                    yield f"eval.{self.key}.{name}={value}; set it {told}"

    def fault(self, tables: Tables) -> str | None:
        """Say why the encoder or the data cannot be evaluated so at all, such as "needs feature maps", or give None.

        A training run that asks for such a protocol is refused; ``repr.evaluate`` leaves it out.
        """
        return None

    def want(self, tables: Tables, name: str) -> str | None:
        """Ask for the tables of a set, by default those of ``needs``, or say why nothing can be computed for it.

        Every process calls this.
        """
        return next((why for need in self.needs if (why := tables.want(need, name))), None)

    def prepare(self, tables: Tables) -> None:
        """Do what all processes do together once the tables are there, such as training; by default nothing."""

    def compute(self, tables: Tables, name: str) -> Parts:
        """Compute the numbers of a set, on the first process.

        Yields:
            Values, each with its level at chance as ``name + CHANCE`` where there is one, and what the record of these
            values says beside the options.
        """
        return ()

    def show(self, tables: Tables, name: str) -> Exhibits | None:
        """Make what the report shows of a set, on the first process."""
        return None

    def meaning(self, name: str) -> str:
        """Say what a number is, from ``meanings``; '' where none fits."""
        matches = ((re.fullmatch(names, name), sentence) for names, sentence in self.meanings.items())
        return next((match.expand(sentence) for match, sentence in matches if match), "")

    def record(self, tables: Tables, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Tell how a number came about: how features were taken, ``said``, the options, and ``facts`` over these."""
        told = {name: value for name, value in self.options.items() if name not in self.silent}
        return {"eval": self.key, **tables.taken, **self.said, **told, **facts}


@dataclass(frozen=True)
class Number:
    """One number of an evaluation, its level at chance, how it came about, and what it means."""

    value: float
    chance: float | None
    protocol: Mapping[str, Any]
    meaning: str = ""

    @property
    def hash(self) -> str:
        """The hash of the protocol's record; numbers with equal hashes may be compared."""
        return short_hash(self.protocol)


def check_protocols(options: Mapping[str, Any]) -> None:
    """Refuse options that are neither a node with ``_target_`` of a protocol, nor a protocol, nor None.

    Raises:
        ConfigError: there is one.
    """
    for key, node in options.items():
        target = node.get("_target_") if isinstance(node, Mapping) else type(node).__qualname__
        kind = get_object(target) if isinstance(node, Mapping) and target else type(node)
        if node is not None and not (isinstance(kind, type) and issubclass(kind, Protocol)):
            fault = f"eval.{key} is no protocol (its _target_ is {target})"
            advice = f"set eval.{key}._target_ to a subclass of {Protocol.__module__}.Protocol, or eval.{key}=null"
            raise ConfigError([f"{fault}: {advice}"])


def read_protocols(options: Mapping[str, Any]) -> dict[str, Protocol]:
    """Build the protocols of a config by their keys, without those that are None.

    Raises:
        ConfigError: as :func:`check_protocols`, and options that a protocol cannot do with.
    """
    check_protocols(options)
    protocols: dict[str, Protocol] = {}
    for key, node in options.items():
        if node is not None:
            built = isinstance(node, Protocol)
            protocols[key] = node if built else instantiate(node, _convert_="all", _recursive_=False)
            protocols[key].key = key
    if faults := [fault for protocol in protocols.values() for fault in protocol.option_faults()]:
        raise ConfigError(faults)
    return protocols


def plan(protocols: Mapping[str, Protocol], tables: Tables) -> list[tuple[str, Protocol]]:
    """Let all protocols ask for their tables, and list each set with each protocol that can be computed for it.

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
    """Compute what :func:`plan` lists from tables that are there: ``<set>/<name>`` -> number, and set -> exhibits."""
    numbers: dict[str, Number] = {}
    shown: dict[str, Exhibits] = {}
    for name, protocol in asked:
        for values, facts in protocol.compute(tables, name):
            record = protocol.record(tables, facts)
            for key, value in values.items():
                if not key.endswith(CHANCE):
                    chance = values.get(key + CHANCE)
                    numbers[f"{name}/{key}"] = Number(value, chance, record, protocol.meaning(key))
        if (exhibits := protocol.show(tables, name)) is not None:
            shown[name] = exhibits
    return numbers, shown

"""Probes: classifiers of frozen features that learn from labels of the training set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, ClassVar

from repr.evaluate.protocol import Parts, Protocol, Values
from repr.evaluate.tables import Tables
from repr.metrics.knn import knn, knn_sweep, sweep_name
from repr.metrics.linear import logistic, sgd
from repr.metrics.ridge import ridge
from repr.metrics.scores import CHANCE, MAJORITY


class Probe(Protocol):
    """A classifier of the labels that the bank and a set share, one attribute after the other.

    It sees the trunk, and then each pooling that a flow gives beside it, whose numbers are called ``<pooling>_<name>``.
    """

    needs = ("labels", "bank", "pictures")
    meanings: ClassVar = {
        r".*linear_(.+)_C": r"Inverse penalty that the held-out part chose for \1; neither direction is better.",
        r".*linear_sgd_(.+)_rate": r"Learning rate that the held-out part chose for \1; neither direction is better.",
        r".*(?:knn|ridge|linear_sgd|linear)_(.+?)(?:_k\d+_t[\d.]+)?": r"Share of samples whose \1 frozen features "
        "tell; higher is better.",
    }
    metric: ClassVar[Callable[..., Values]]  # (bank, query, attribute=..., **options) -> values
    seeded: ClassVar[bool] = False  # whether the metric takes the seed of the evaluation

    def compute(self, tables: Tables, name: str) -> Parts:
        """Compute the accuracy of every attribute and pooling."""
        bank, query = tables.pictures("bank"), tables.pictures(name)
        seed = {"seed": tables.seed} if self.seeded else {}
        learned = {"bank": tables.data.bank_size, "chance": MAJORITY, **seed}
        for attribute in tables.shared_attributes(name):
            for pooling in (None, *query.poolings):
                pair = [t if pooling is None else replace(t, trunk=t.poolings[pooling]) for t in (bank, query)]
                prefix, facts = ("", learned) if pooling is None else (f"{pooling}_", learned | {"features": pooling})
                values = type(self).metric(*pair, attribute=attribute, **self.options, **seed)
                for part, more in self.parts(attribute, values):
                    yield {f"{prefix}{key}": value for key, value in part.items()}, facts | more

    def parts(self, attribute: str, values: Values) -> Iterator[tuple[Values, dict[str, Any]]]:
        """Take the values of an attribute apart where their records differ."""
        yield values, {}


@dataclass
class KNN(Probe):
    """Weighted vote of the k rows of the training set that are nearest by cosine (:func:`repr.metrics.knn.knn`)."""

    k: int
    temperature: float
    positive = ("k", "temperature")
    metric = staticmethod(knn)
    said: ClassVar = {
        "features": "trunk",
        "similarity": "cosine",
        "vote": "exp(cosine / temperature)",
        "search": "exact",
    }


@dataclass
class KNNSweep(Probe):
    """The vote of :class:`KNN`, for every k and temperature from one search (:func:`repr.metrics.knn.knn_sweep`)."""

    ks: Sequence[int]
    temperatures: Sequence[float]
    memory: float
    positive = ("ks", "temperatures", "memory")
    metric = staticmethod(knn_sweep)
    said: ClassVar = KNN.said
    silent = ("ks", "temperatures", "memory")

    def parts(self, attribute: str, values: Values) -> Iterator[tuple[Values, dict[str, Any]]]:
        """Give each number its own k and temperature."""
        for k, temperature in product(self.ks, self.temperatures):
            key = sweep_name(attribute, k, temperature)
            yield {name: values[name] for name in (key, key + CHANCE)}, {"k": k, "temperature": temperature}


@dataclass
class Ridge(Probe):
    """Ridge regression in closed form, its penalty by leave-one-out (:func:`repr.metrics.ridge.ridge`)."""

    penalties: Sequence[float] | None = None
    positive = ("penalties",)
    metric = staticmethod(ridge)
    said: ClassVar = {"features": "trunk, standardised", "solver": "closed form", "penalty": "best of leave-one-out"}


@dataclass
class Logistic(Probe):
    """Logistic regression by L-BFGS, regularised as on a held-out part (:func:`repr.metrics.linear.logistic`)."""

    exponents: Sequence[int]
    steps_per_decade: int
    held_out: float
    max_iter: int
    tolerance: float
    positive = ("steps_per_decade", "max_iter", "tolerance")
    shares = ("held_out",)
    metric = staticmethod(logistic)
    seeded = True
    said: ClassVar = {"features": "trunk", "solver": "L-BFGS", "model": "multinomial logistic regression"}


@dataclass
class SGD(Probe):
    """Linear classifiers at many rates at once, the best on a held-out part (:func:`repr.metrics.linear.sgd`)."""

    rates: Sequence[float]
    epochs: int
    batch_size: int
    momentum: float
    held_out: float
    positive = ("rates", "epochs", "batch_size")
    shares = ("held_out",)
    metric = staticmethod(sgd)
    seeded = True
    said: ClassVar = {"features": "trunk", "solver": "SGD", "schedule": "cosine", "weight_decay": 0.0}

"""How the parts of a hybrid are made and named, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import Parameter, signature
from typing import Any

from hydra.utils import get_object
from torch import Tensor, nn

from repr.models.unreached import noted_forwards, unreached
from repr.objectives.base import Objective

MakePart = Callable[..., Objective]


def built(
    parts: Mapping[str, MakePart], shared: Mapping[str, nn.Module], weights: Mapping[str, Mapping[str, float]]
) -> tuple[dict[str, Objective], dict[str, set[str]], list[str]]:
    """The parts, the parameters of the backbone that each does not reach, and what is wrong with those that fail."""
    made: dict[str, Objective] = {}
    missed, faults = dict[str, set[str]](), list[str]()
    backbone, text = shared["backbone"], shared.get("text")
    fixed, unread = _frozen(text), list[set[nn.Parameter]]()  # of the text tower: by the user, and by each part
    for name, make in parts.items():
        with noted_forwards(backbone) as forwards:
            try:
                made[name] = _made(make, shared, weights.get(name))
            except (TypeError, ValueError) as error:
                faults += [f"parts.{name}: {fault}" for fault in getattr(error, "faults", [error])]
                continue
        if made[name].backbone is not backbone:
            faults.append(f"parts.{name} wraps its backbone, which other parts share: take another part")
        missed[name] = set(unreached(backbone, forwards))
        if text is not None and any(child is text for child in made[name]._modules.values()):
            unread.append(_frozen(text) - fixed)
            for parameter in unread[-1]:
                parameter.requires_grad_()
    for parameter in set.intersection(*unread) if unread else ():  # what one part does not read another may
        parameter.requires_grad_(False)
    return made, missed, faults


def _frozen(module: nn.Module | None) -> set[nn.Parameter]:
    return set() if module is None else {parameter for parameter in module.parameters() if not parameter.requires_grad}


def borrow(part: Objective, shared: Sequence[nn.Module]) -> list[str]:
    """Let a part hold shared encoders without owning them, so that a tensor has one name; gives their names in it."""
    borrowed = {key: child for key, child in part._modules.items() if any(child is encoder for encoder in shared)}
    for key, child in borrowed.items():
        del part._modules[key]
        vars(part)[key] = child
    return list(borrowed)


def _made(make: MakePart, shared: Mapping[str, nn.Module], weights: Mapping[str, float] | None) -> Objective:
    """A part over the shared encoders."""
    takes = signature(make).parameters
    if "text" in takes and "text" not in shared and takes["text"].default is Parameter.empty:
        raise ValueError("it needs a text tower: set text")
    given: dict[str, Any] = {name: module for name, module in shared.items() if name in takes}
    part = make(**given, **({} if weights is None else {"weights": weights}))
    if not isinstance(part, Objective):
        raise ValueError(f"{type(part).__name__} is no Objective: give a flow, or a functools.partial of one")
    return part


def terms_of(part: Any) -> tuple[str, ...]:
    """The terms of a part, as it is or as a config says it."""
    if isinstance(part, Objective):
        return tuple(part.weights)
    flow: Any = get_object(part["_target_"]) if isinstance(part, Mapping) and "_target_" in part else None
    return flow.term_names(part) if hasattr(flow, "term_names") else ()


def by_part(weights: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Part -> term -> weight, of weights that are so, or have names with a dot."""
    found: dict[str, dict[str, float]] = {}
    for key, value in weights.items():
        name, dot, term = key.partition(".")
        found.setdefault(name, {}).update({term: value} if dot else value)
    return found


def name_faults(parts: Mapping[str, Any], told: Mapping[str, Any], main: str | None) -> Iterator[str]:
    """Names that are no part's, and parts that cannot have their names."""
    if not parts:
        yield "parts is empty: give at least one objective, as parts.NAME"
    for name in parts:
        if not name or "." in name or hasattr(nn.ModuleDict, name):
            yield f"parts.{name} cannot have this name: take another"
    known = ", ".join(parts)
    for option, names in told.items():
        yield from (f"{option} names {name}; the parts are {known}" for name in names or () if name not in parts)
    if main is not None and main not in parts:
        yield f"main={main}; the parts are {known}"


def stage_fault(stage: Sequence[float]) -> str | None:
    """Why a part cannot be computed from here to there."""
    if len(stage) == 2 and 0 <= stage[0] < stage[1] <= 1:
        return None
    return "set it to [from, to], shares of the run with 0 <= from < to <= 1"


def under(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values by the names that they have in the hybrid."""
    return {f"{name}.{key}": value for key, value in values.items()}


@contextmanager
def counted(backbone: nn.Module, passes: dict[str, float], name: str) -> Iterator[None]:
    """Count the pictures that an encoder sees: those that come to its first convolution."""
    stem = next((part for part in backbone.modules() if isinstance(part, nn.Conv2d)), None)
    if stem is None:
        yield
        return

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        passes[name] = passes.get(name, 0) + len(inputs[0])

    handle = stem.register_forward_pre_hook(count)
    try:
        yield
    finally:
        handle.remove()

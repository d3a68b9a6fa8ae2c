"""Checking configs before anything is built. All faults of a config are told at once."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from hydra.errors import HydraException, InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from repr.catalog import nearest
from repr.config import ConfigError, flat, select, source_of, targets, untrained
from repr.config_values import range_faults
from repr.errors import constructor_error
from repr.signatures import NOT_LITERAL, arguments, described

_LATER = ("run_folder", "image_size")  # null in a check: the folder is made after it, an encoder tells its own size


def check(cfg: DictConfig) -> None:
    """Find every fault of a config before anything is built.

    Faults are those of :func:`value_faults` and of :func:`target_faults`.

    Raises:
        ConfigError: with all of them.
    """
    faults = value_faults(cfg)
    faults += target_faults(cfg, faults)
    if faults:
        raise ConfigError(faults)


def value_faults(cfg: DictConfig) -> list[str]:
    """The faults that are known without torch, whose import takes seconds.

    They are values left as ``???``, arguments that our own classes do not have, and options that exclude each other.

    Raises:
        ConfigError: sections, which all else reads, are no such thing, or a value cannot be resolved.
    """
    if faults := list(_section_faults(cfg)):
        raise ConfigError(faults)
    faults = [f"{key} has no value: set it" for key in sorted(_missing(OmegaConf.to_container(cfg)))]
    try:
        OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        if not (faults and isinstance(error, InterpolationToMissingValueError)):  # which is told already
            message = str(error).split("\n")[0]
            faults.append(f"{error.full_key} has no value ({message}): set it" if error.full_key else message)
        raise ConfigError(faults) from error
    for path, node in targets(cfg):
        faults += [*_unknown(path, node, arguments(node["_target_"])), *_null_faults(cfg, path, node)]
    return [*faults, *range_faults(cfg)]


def _missing(node: Any, path: str = "") -> Iterator[str]:
    """Dotted names of the values ``???``. omegaconf's own ``missing_keys`` fails where ``${...}`` leads to one."""
    if node == "???":
        yield path
    entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in entries:
        yield from _missing(child, f"{path}.{key}".lstrip("."))


def target_faults(cfg: DictConfig, known: Sequence[str] = ()) -> list[str]:
    """Targets that do not import, arguments that do not bind (inside partials too), what constructors refuse.

    Args:
        cfg: a config whose values can be resolved.
        known: its other faults; where they concern the model, it is not made.
    """
    # Without a tokenizer nothing reads captions, and open_clip, which has the text tower, takes a second to import.
    unread = () if cfg.get("tokenizer") else ("text",)
    read_targets = ((path, node) for path, node in targets(cfg) if path.partition(".")[0] not in unread)
    faults = [fault for path, node in read_targets for fault in _target_faults(path, node)]
    sizes = ("data.batch_size", "data.image_size", "image_size", "small_size")
    read = ("objective", "backbone", "views", "procedure", *sizes)
    if "objective" in cfg and not any(fault.startswith(read) for fault in (*known, *faults)):
        faults += _flow_faults(cfg)  # it reads those
    return faults


def _unknown(path: str, node: DictConfig, known: Iterable[str] | None) -> Iterator[str]:
    """Arguments of a node that its target does not have; None: it takes any."""
    if known is not None:
        for key in sorted({str(key) for key in node if not str(key).startswith("_")}.difference(known)):
            fault = f"{path}.{key}: {node['_target_']} takes no such argument; {nearest(key, known)}"
            yield f"{fault} (~{path}.{key} leaves it out)"  # it may be an experiment's, for another objective


def _null_faults(cfg: DictConfig, path: str, node: DictConfig) -> Iterator[str]:
    """Null for an argument of ours that takes none, by the name of the option that sets it."""
    target = str(node["_target_"])
    for name, (default, kind, _) in described(target).items() if target.startswith("repr.") else ():
        if name not in node or OmegaConf.is_missing(node, name) or node[name] is not None:
            continue
        option = source_of(cfg, f"{path}.{name}")
        takes_null = default is None or not kind or re.search(r"\bNone\b|^(Any|object)$", kind)
        if not takes_null and option not in _LATER:
            usual = "" if default is NOT_LITERAL else f", such as to {default}"
            yield f"{option} is null, and {target} needs a value: set it{usual}"


def _section_faults(cfg: DictConfig) -> Iterator[str]:
    """Sections that are no such thing, as where a file was edited."""
    views = select(cfg, "views")
    parts = ["objective", "data", "trainer", "procedure"]
    parts += [f"views.{name}" for name in views] if OmegaConf.is_dict(views) else []
    for key in parts:
        if key.partition(".")[0] in cfg and not _is_target(select(cfg, key)):
            yield f"{key} has no _target_: choose {key.partition('.')[0]}=NAME"
    for key in ("callbacks", "eval", "freeze", "logger", "views"):
        if not _is_mapping(value := select(cfg, key)) or (value is None and key == "callbacks"):
            yield f"{key} maps names to values, and is {value}"


def _is_mapping(node: Any) -> bool:
    return node is None or OmegaConf.is_dict(node)


def _is_target(node: Any) -> bool:
    return OmegaConf.is_dict(node) and "_target_" in node


def _target_faults(path: str, node: DictConfig) -> Iterator[str]:
    name = node["_target_"]
    try:
        target = get_object(name)
    except (ImportError, AttributeError, ValueError, HydraException) as error:
        yield f"{path}._target_: {name} does not import ({str(error).splitlines()[0]})"
        return
    if path.startswith("logger.") and hasattr(target, "missing") and (fault := target.missing()):
        yield f"{path}: {fault}"
    given = {str(key) for key in node if not str(key).startswith("_")}
    parameters = inspect.signature(target).parameters.values()
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        yield from _unknown(path, node, named)
    if not node.get("_partial_"):
        for key, parameter in named.items():
            if parameter.default is parameter.empty and key not in given:
                yield f"{path}.{key} has no value, and {name} needs it: set it"
    for key in sorted(named.keys() & given) if name.startswith("repr.") else ():
        default = named[key].default
        if isinstance(default, bool | int | float) and isinstance(node[key], DictConfig | ListConfig):
            yield f"{path}.{key} takes one value, such as {default}, and is {node[key]}"
        if named[key].annotation == "int" and isinstance(node[key], float):
            yield f"{path}.{key} takes a whole number, such as {default}, and is {node[key]}"
    if not isinstance(node.get("_partial_", False), bool):
        yield f"{path}._partial_ takes true or false, but got {node['_partial_']}"
    if not hasattr(target, "term_names"):
        return
    if odd := [key for key in ("weights", "losses") if not _is_mapping(node.get(key))]:
        yield f"{path}.{odd[0]} maps the names of terms, and is {node[odd[0]]}"
    else:
        terms = target.term_names(node)
        for key in ("weights", "losses"):
            for term in flat(node.get(key)) if key == "weights" else node.get(key) or {}:
                if term not in terms:
                    yield f"{path}.{key}.{term}: {name} has no such term; {nearest(term, terms)}"
        for term in sorted({*(node.get("losses") or {})} - {*(node.get("weights") or node.get("losses") or {})}):
            yield f"{path}.losses.{term} has no weight: set {path}.weights.{term}"


def _flow_faults(cfg: DictConfig) -> Iterator[str]:
    """What constructors refuse, and what the flow and the procedure know of the options around them."""
    flow = get_object(cfg.objective["_target_"])
    if (cfg.get("eval") or {}).get("zero_shot") and not hasattr(flow, "encode_text"):
        yield f"eval.zero_shot needs text, and {flow.__name__} encodes images only: set eval=images tokenizer=null"
    try:
        objective = on_meta(cfg)
    except ConfigError as error:
        yield from error.faults
        return
    # A LightningModule of one's own need not have it, and a procedure may be a function.
    if find := getattr(objective, "config_faults", None):
        yield from find(cfg)
    if find := getattr(instantiate(cfg.get("procedure")), "config_faults", None):
        yield from find(cfg, objective)


def on_meta(cfg: DictConfig) -> Any:
    """The objective of a config on torch's meta device: its modules have shapes and no memory, and load no weights.

    It is None where a module, such as one of a user's own, cannot be made so.

    Raises:
        ConfigError: a constructor refuses its arguments.
    """
    import torch

    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return instantiate(untrained(cfg).objective)
    except InstantiationException as error:
        cause, section = constructor_error(error)
        if isinstance(cause, ImportError) or "pip install" in str(cause):  # an optional package
            raise ConfigError([str(cause)]) from error
        if isinstance(cause, ValueError):
            faults = getattr(cause, "faults", [str(cause)])
            raise ConfigError([_in_full(fault, section, cfg) if section else fault for fault in faults]) from error
        return None


def _in_full(message: str, key: str, cfg: DictConfig) -> str:
    """What the constructor at ``key`` says of its arguments, with the full names of the options that give them.

    Those that are taken over from an option of the whole config, such as ``chunk_size``, have its name.
    """
    node = OmegaConf.select(cfg, key) or OmegaConf.create()
    own = "|".join(name for name in map(str, node) if name not in cfg or not OmegaConf.is_interpolation(node, name))
    return re.sub(rf"^({own})\b|(?<![\w.])({own})(?=[.=]\S)", rf"{key}.\g<0>", message) if own else message

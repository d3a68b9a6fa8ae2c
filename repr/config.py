"""Composing, changing, showing and checking configs. All faults of a config are reported at once."""

from __future__ import annotations

import copy
import inspect
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from repr.catalog import CONF, files, groups, nearest, roots
from repr.files import yaml_text
from repr.signatures import NOT_LITERAL, arguments, described

_PLACE = ("accelerator", "devices", "num_nodes", "strategy", "inference_mode")  # of a trainer: where it runs
_LATER = ("run_folder", "image_size")  # null in a check: the folder is made after it, an encoder tells its own size
_TRAINED = {"objective", "data", "backbone", "text", "views", "procedure"}  # groups that say what is trained

# ${conf:eval/classes/x.yaml} is a file of conf/, wherever that is installed.
OmegaConf.register_new_resolver("conf", lambda path: str(CONF / path), replace=True)


def positions(*names: str, _root_: DictConfig) -> ListConfig:
    """${view:global,local} are the positions in a batch of the views that have these names, in their order.

    Raises:
        ValueError: there is no such view.
    """
    counts = {str(name): view.get("count", 1) for name, view in (_root_.get("views") or {}).items()}
    if unknown := [name for name in names if name not in counts]:
        raise ValueError(f"views has no {unknown[0]}; it has {', '.join(counts) or 'none'}")
    order = [name for name, count in counts.items() for _ in range(count)]
    return OmegaConf.create([place for wanted in names for place, name in enumerate(order) if name == wanted])


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


OmegaConf.register_new_resolver("view", positions, replace=True)
# ${workers:8} are eight processes that load data, or as many as there are cores; no batch depends on it.
OmegaConf.register_new_resolver("workers", lambda most: min(int(most), num_cores()), replace=True)


class ConfigError(ValueError):
    """One or several faults of a config; ``faults`` has a message for each, once."""

    def __init__(self, faults: Iterable[str]) -> None:
        self.faults = list(dict.fromkeys(faults))  # an option that sets others is at fault at each of them
        many = [f"{len(self.faults)} faults in the config:", *(f"  - {fault}" for fault in self.faults)]
        super().__init__(self.faults[0] if len(self.faults) == 1 else "\n".join(many))


def compose(overrides: Sequence[str] = (), *, config_dir: str | Path | None = None, root: str = "fit") -> DictConfig:
    """Compose ``conf/fit.yaml`` with overrides as on the command line.

    Args:
        overrides: such as ``experiment=demo``, ``optim.lr=1e-3``, ``+backbone.drop_path_rate=0.1``.
        config_dir: a folder of one's own, laid out like ``conf/``, whose files come first.
        root: which file of ``conf/``.

    Raises:
        ConfigError: an override names an option or a value that does not exist; the nearest valid name is given.
    """
    folders = roots(config_dir)
    search = [f"hydra.searchpath=[file://{folder.resolve()}]" for folder in folders[1:]]
    known = groups(folders)
    parsed = parse_overrides(overrides, known)
    values = [override for override in parsed if override.key_or_group not in known and _is_value(override)]
    try:
        if faults := [fault for override in parsed for fault in _group_faults(override, known)]:
            raise ConfigError(faults)
        of_groups = [str(override.input_line) for override in parsed if override.key_or_group in known]
        stamp = tuple((path, (stat := path.stat()).st_mtime_ns, stat.st_size) for path in files(folders))
        base, filled, choices = _composed(root, (*search, *of_groups), stamp)
        if faults := [fault for override in parsed for fault in _key_faults(override, filled, known)]:
            raise ConfigError(faults)
        cfg = copy.deepcopy(base)
        # To Hydra an option that no file spells out is an addition (++).
        others = [override for override in parsed if override.key_or_group not in known]
        lines = [f"++{o.input_line}" if o in values else str(o.input_line) for o in others]
        ConfigLoaderImpl._apply_overrides_to_config(_parse(lines), cfg)
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ or error
        message = str(error).split("\n")[0] + ("" if cause is error else f": {str(cause).splitlines()[0]}")
        raise ConfigError([message]) from error
    fill(cfg)
    if cfg.get("smoke"):
        cfg.merge_with(_smoke_values(cfg))
        for override in values:  # what the user says counts more
            OmegaConf.update(cfg, override.key_or_group, override.value())
    for node in cfg.eval.values() if OmegaConf.is_dict(cfg.get("eval")) else ():
        if OmegaConf.is_dict(node) and node.get("classes"):
            node.classes = _with_class_files(OmegaConf.to_container(node.classes), folders)
    given = {override.key_or_group for override in parsed}
    if root == "fit" and given & _TRAINED and not given & {"experiment", "name"}:  # it is not the default experiment
        cfg.name = "-".join(str(choices[group]).replace("/", "_") for group in ("objective", "data"))
    return cfg


@lru_cache(maxsize=256)
def _composed(root: str, overrides: Sequence[str], stamp: Any) -> tuple[DictConfig, DictConfig, Mapping[str, str]]:
    """What the files of chosen groups are together, the same with all defaults, and the choices.

    Hydra reads all files anew each time, a sixth of a second; ``stamp`` tells whether they are as they were.
    """
    with initialize_config_dir(str(CONF), version_base="1.3"):
        base = hydra_compose(root, overrides=list(overrides), return_hydra_config=True)
    with open_dict(base):
        choices = base.pop("hydra").runtime.choices
    filled = copy.deepcopy(base)
    fill(filled)
    return base, filled, choices


def _with_class_files(node: Any, folders: Sequence[Path]) -> Any:
    """A value of ``eval.<protocol>.classes`` with the content of the class files that it names, and their paths.

    A name is that of a file in ``eval/classes`` of a root. So a run has the classes that it began with, wherever it is
    read; what is not found or not fit stays as it is.
    """
    if isinstance(node, dict):
        return {key: _with_class_files(value, folders) for key, value in node.items()}
    if isinstance(node, list):
        return [_with_class_files(value, folders) for value in node]
    places = [Path(str(node)).expanduser(), *(root / "eval" / "classes" / f"{node}.yaml" for root in reversed(folders))]
    path = next((place.resolve() for place in places if place.is_file()), None)
    if path is None:
        return node
    try:
        text = yaml_text(path)
    except ValueError:
        return str(path)
    content = yaml.load(text, yaml.BaseLoader)  # whose values are all text
    return {"file": str(path)} | content if isinstance(content, dict) and "${" not in text else str(path)


def fill(cfg: DictConfig) -> None:
    """Add what the constructors of our own classes say where no file does, in place.

    So a default stands in one place, and a config that is shown or kept still has all values. Of what is called
    with further arguments (``_partial_``) only those are added that go by their names. ``eval`` stays as it is: a
    protocol is known by the options that its files spell out.
    """
    with open_dict(cfg):
        for path, node in list(targets(cfg)):
            if path.split(".")[0] == "eval":
                continue
            for name, default in (arguments(node["_target_"], by_keyword=bool(node.get("_partial_"))) or {}).items():
                if default is not NOT_LITERAL and name not in node.keys():  # noqa: SIM118 - `in node` passes over ???
                    node[name] = default


def _smoke_values(cfg: DictConfig) -> DictConfig:
    """``smoke.yaml``, without those values of procedure, backbone and text tower that the chosen ones do not have."""
    values = OmegaConf.load(CONF / "smoke.yaml")
    assert isinstance(values, DictConfig)
    for section in ("procedure", "backbone", "text"):
        values[section] = {key: value for key, value in values[section].items() if key in (cfg.get(section) or {})}
        if not values[section]:  # null stays null
            del values[section]
    return values


def change(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Change single values of a config that was composed before, in place.

    ``trainer=NAME`` changes what it runs on (strategy, devices and the like) to that of ``conf/trainer/NAME.yaml``.

    Raises:
        ConfigError: an override is not the value of an existing option.
    """
    for place in (override for override in overrides if override.startswith("trainer=")):
        trainer = compose([place]).trainer
        cfg.trainer.update({key: trainer[key] for key in _PLACE if key in trainer})
    parsed = _parse([override for override in overrides if not override.startswith("trainer=")])
    faults = []
    for override in parsed:
        if OmegaConf.is_dict(select(cfg, override.key_or_group)) or not _is_value(override):
            faults.append(f"{override.input_line}: a resumed run keeps its config; only single values can be changed")
        else:
            faults += _key_faults(override, cfg, {})
    if faults:
        raise ConfigError(faults)
    for override in parsed:
        OmegaConf.update(cfg, override.key_or_group, override.value())
    return cfg


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
    try:
        faults = [f"{key} has no value: set it" for key in sorted(OmegaConf.missing_keys(cfg))]
        OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        message = str(error).split("\n")[0]
        faults.append(f"{error.full_key} has no value ({message}): set it" if error.full_key else message)
        raise ConfigError(faults) from error
    for path, node in targets(cfg):
        faults += [*_unknown(path, node, arguments(node["_target_"])), *_null_faults(cfg, path, node)]
    return faults + (list(_exclusion_faults(cfg)) if "objective" in cfg else [])


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
        option = _source(cfg, f"{path}.{name}")
        takes_null = default is None or not kind or re.search(r"\bNone\b|^(Any|object)$", kind)
        if not takes_null and option not in _LATER:
            usual = "" if default is NOT_LITERAL else f", such as to {default}"
            yield f"{option} is null, and {target} needs a value: set it{usual}"


def _source(cfg: DictConfig, option: str) -> str:
    """The option that sets another: where that takes its value over, at the end of all ``${...}``."""
    parent, _, name = option.rpartition(".")
    node = select(cfg, parent) if parent else cfg
    raw = OmegaConf.to_container(node).get(name) if OmegaConf.is_dict(node) else None
    over = re.fullmatch(r"\$\{(\w[\w.]*)\}", str(raw))
    return _source(cfg, over[1]) if over else option


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


def parse_overrides(overrides: Sequence[str], known: Iterable[str]) -> list[Override]:
    """Read overrides in Hydra's grammar; ``known`` are the groups, of which it takes no null.

    Raises:
        ConfigError: one is not in the grammar.
    """
    none = {f"{group}=null": f"{group}=none" for group in known}
    return _parse([none.get(override, override) for override in overrides])


def _parse(overrides: Sequence[str]) -> list[Override]:
    """Read overrides in Hydra's grammar, and refuse one that is not in it."""
    parsed = []
    for override in overrides:
        try:
            parsed += OverridesParser.create().parse_overrides([override])
        except HydraException as error:
            key, equals, value = override.partition("=")
            hint = f"; a text with signs like {{}}[], needs quotes within quotes: '{key}=\"{value}\"'" if equals else ""
            raise ConfigError([f"{override} is not of the form key=value{hint}"]) from error
    return parsed


def _is_value(override: Override) -> bool:
    return not (override.is_add() or override.is_force_add() or override.is_delete() or override.is_sweep_override())


def _group_faults(override: Override, known: Mapping[str, Iterable[str]]) -> Iterator[str]:
    if override.is_sweep_override():
        key, _, text = str(override.input_line).partition("=")
        yield (
            f"{override.input_line}: one run takes one value; --sweep makes a run of each. A text with commas needs "
            f"quotes within quotes: '{key}=\"{text}\"'"
        )
        return
    group, value = override.key_or_group, override.value()
    for option in (value if isinstance(value, list) else [value]) if group in known else ():
        if isinstance(option, str) and option not in known[group]:
            yield f"{group} has no option '{option}'; {nearest(option, known[group])}"


def _key_faults(override: Override, cfg: DictConfig, named: Iterable[str]) -> Iterator[str]:
    key = override.key_or_group
    parent, _, leaf = key.rpartition(".")
    node: Any = select(cfg, parent) if parent else cfg
    target = node.get("_target_") if OmegaConf.is_dict(node) else None
    own = arguments(target) if target else None
    if override.is_add() and own is not None and leaf not in own:
        yield f"{key}: {target} takes no such argument; {nearest(leaf, own)}"
    if key in named or not _is_value(override) or key.startswith("hydra."):
        return
    known = node.keys() if OmegaConf.is_dict(node) else ()  # `leaf in node` is false where ??? stands
    if override.value() == {} and OmegaConf.is_dict(old := select(cfg, key)) and old:
        told = f"what is given of a mapping is added to it; ~{key}.{next(iter(old))} leaves one entry out"
        yield f"{override.input_line} changes nothing: {told}"
    elif leaf in known or (OmegaConf.is_list(node) and leaf.isdigit()):
        if not OmegaConf.is_interpolation(node, leaf) and not OmegaConf.is_missing(node, leaf):
            yield from _kind_faults(key, node[int(leaf) if leaf.isdigit() else leaf], override.value())
    elif leaf not in (own or ()):
        hint = nearest(key, [*(path for path, _ in walk(cfg) if path), *named])
        plus = f" (a new argument is added with a plus, as in +{override.input_line})" if target else ""
        yield f"there is no option '{key}'; {hint}{plus}"


def _kind_faults(key: str, old: Any, new: Any) -> Iterator[str]:
    """Words where a number stands, and the like; null, quoted interpolations and lists are left to the target."""
    if new is None or isinstance(new, list | dict) or (isinstance(new, str) and "${" in new):
        return
    kinds = ((bool, "true or false"), ((int, float), "a number"))
    kind, words = next(((kind, words) for kind, words in kinds if isinstance(old, kind)), (None, ""))
    if kind and (not isinstance(new, kind) or isinstance(new, bool) != isinstance(old, bool)):
        yield f"{key} takes {words} (it is {old}), but got '{new}'"


def flat(node: Any, path: str = "") -> dict[str, Any]:
    """The values of a mapping of mappings by their dotted names, such as weights of the terms of parts."""
    values: dict[str, Any] = {}
    for key, value in (node or {}).items():
        values |= flat(value, f"{path}{key}.") if isinstance(value, Mapping | DictConfig) else {f"{path}{key}": value}
    return values


def select(cfg: DictConfig, key: str) -> Any:
    """The value at a dotted name; None where there is none, or where it cannot be resolved."""
    try:
        return OmegaConf.select(cfg, key)
    except OmegaConfBaseException:
        return None


def walk(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of a node and all below it; interpolations lead to nodes that are visited by themselves."""
    yield path, node
    keys: Iterable[Any] = node if isinstance(node, DictConfig) else ()
    if isinstance(node, ListConfig):
        keys = range(len(node))
    for key in keys:
        has_value = not OmegaConf.is_interpolation(node, key) and not OmegaConf.is_missing(node, key)
        yield from walk(node[key] if has_value else None, f"{path}.{key}".lstrip("."))


def targets(cfg: DictConfig) -> Iterator[tuple[str, DictConfig]]:
    """Every node that is instantiated, by its dotted name."""
    return ((path, node) for path, node in walk(cfg) if isinstance(node, DictConfig) and "_target_" in node)


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
    for key in named.keys() & given if name.startswith("repr.") else ():
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
        for term in set(node.get("losses") or {}) - set(node.get("weights") or node.get("losses") or {}):
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
        cause: BaseException = error
        while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
            told, cause = str(cause), cause.__cause__
        if isinstance(cause, ImportError) or "pip install" in str(cause):  # an optional package
            raise ConfigError([str(cause)]) from error
        if isinstance(cause, ValueError):
            at = re.search(r"^full_key: (.+)$", told, re.MULTILINE)
            faults = getattr(cause, "faults", [str(cause)])
            raise ConfigError([_in_full(fault, at[1], cfg) if at else fault for fault in faults]) from error
        return None


def _in_full(message: str, key: str, cfg: DictConfig) -> str:
    """What the constructor at ``key`` says of its arguments, with the full names of the options that give them.

    Those that are taken over from an option of the whole config, such as ``chunk_size``, have its name.
    """
    node = OmegaConf.select(cfg, key) or OmegaConf.create()
    own = "|".join(name for name in map(str, node) if name not in cfg or not OmegaConf.is_interpolation(node, name))
    return re.sub(rf"^({own})\b|(?<![\w.])({own})(?=[.=]\S)", rf"{key}.\g<0>", message) if own else message


def untrained(cfg: DictConfig) -> DictConfig:
    """A copy of a config whose backbone loads no weights of its library."""
    cfg = cfg.copy()
    for node in (cfg.get("backbone"), cfg.objective.get("backbone")):
        if OmegaConf.is_dict(node) and node.get("pretrained"):
            node.pretrained = False
    return cfg


def _exclusion_faults(cfg: DictConfig) -> Iterator[str]:
    devices, nodes, batch = cfg.trainer.get("devices"), cfg.trainer.get("num_nodes", 1), cfg.data.get("batch_size")
    counts = isinstance(devices, int) and isinstance(nodes, int) and isinstance(batch, int)
    if counts and devices > 0 and batch % (devices * nodes):
        yield (
            f"data.batch_size={batch} is the global batch and {devices * nodes} processes cannot share it evenly: "
            f"set it to a multiple of {devices * nodes}"
        )
    if counts and devices > 0 and isinstance(lanes := cfg.data.get("lanes"), int) and lanes % (devices * nodes):
        yield (
            f"data.lanes={lanes} and {devices * nodes} processes, each of which reads whole lanes: set it to a "
            f"multiple of {devices * nodes}"
        )
    if cfg.trainer.get("max_epochs") is None and cfg.trainer.get("max_steps", -1) in (None, -1):
        yield "the run has no end: set trainer.max_epochs or trainer.max_steps"
    views = cfg.get("views") or {}
    sizes = {key: cfg.get(key, 1) for key in ("image_size", "small_size")}
    sizes["data.image_size"] = cfg.data.get("image_size", 1)
    sizes |= {f"views.{name}.size": view.get("size", 1) for name, view in views.items()}
    for key, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            yield f"{key}={size}; set it to one number of pixels: pictures are square here"
    numbers = {f"views.{name}.count": view.get("count", 1) for name, view in views.items()} | {"data.batch_size": batch}
    numbers |= {f"data.{key}": cfg.data[key] for key in ("lanes", "window") if cfg.data.get(key) is not None}
    for key, number in numbers.items():
        if not isinstance(number, int):
            yield f"{key}={number}; set it to a whole number"
    precision = str(cfg.trainer.get("precision"))
    if precision in ("64", "64-true", "16-true", "bf16-true") or precision.startswith("transformer-engine"):
        yield (
            f"trainer.precision={precision} would cast crop boxes and colour values with the batch (half precision "
            "moves the cells of a map) and the weights, but not the views, which are made afterwards: set it to "
            "bf16-mixed, 16-mixed or 32-true"
        )
    for key, parts in (("micro_batch", "rows of an encoder"), ("chunk_size", "rows of the matrix of pairs")):
        value = cfg.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            yield f"{key}={value}; set it to the number of {parts} at a time, or to null for all at once"
    strategy = cfg.trainer.get("strategy")
    if OmegaConf.is_dict(strategy) and str(strategy.get("_target_")).endswith("FSDP2"):
        for name, callback in (cfg.get("callbacks") or {}).items():
            if str((callback or {}).get("_target_")).endswith("WeightAveraging"):
                yield (
                    f"callbacks.{name}: Lightning's averaging copies the weights, and those of trainer=fsdp are split "
                    "over processes: set trainer=ddp"
                )
    flows = [node for _, node in targets(cfg.objective)]  # those that are parts of one too
    for key, usual, wanted in (
        ("exchange", "gather", "no loss whose rows can be passed on"),
        ("loss_precision", "float32", "no loss of pairs"),
        ("false_negatives", "keep", "no contrast whose pairs could be left out"),
    ):
        if (value := cfg.get(key, usual)) not in (usual, *(node.get(key) for node in flows)):
            yield f"{key}={value}: this objective has {wanted}; set {key}={usual}"
    if cfg.get("chunk_size") and all(node.get("chunk_size") is None for node in flows):
        warnings.warn(f"chunk_size={cfg.chunk_size} changes nothing: this objective compares no pairs", stacklevel=2)

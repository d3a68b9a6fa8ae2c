"""Composing and changing configs, and going through them. All faults of what is given are told at once."""

from __future__ import annotations

import copy
import os
import re
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
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from repr.catalog import CONF, files, groups, nearest, roots
from repr.files import yaml_text
from repr.signatures import NOT_LITERAL, arguments

_PLACE = ("accelerator", "devices", "num_nodes", "strategy", "inference_mode")  # of a trainer: where it runs
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
        added = [override for override in parsed if override.is_add() and not isinstance(override.value(), dict | list)]
        if there := [override.key_or_group for override in added if select(cfg, override.key_or_group) is not None]:
            raise ConfigError([f"{key} is an option already: leave the + out" for key in there])
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


def source_of(cfg: DictConfig, option: str) -> str:
    """The option that sets another: where that takes its value over, at the end of all ``${...}``."""
    parent, _, name = option.rpartition(".")
    node = select(cfg, parent) if parent else cfg
    raw: Any = OmegaConf.to_container(node) if OmegaConf.is_dict(node) else {}
    over = re.fullmatch(r"\$\{(\w[\w.]*)\}", str(raw.get(name)))
    return source_of(cfg, over[1]) if over else option


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


def untrained(cfg: DictConfig) -> DictConfig:
    """A copy of a config whose backbone loads no weights of its library."""
    cfg = cfg.copy()
    for node in (cfg.get("backbone"), cfg.objective.get("backbone")):
        if OmegaConf.is_dict(node) and node.get("pretrained"):
            node.pretrained = False
    return cfg
